"""A test's results: scored from what is on disk, gone on with after a kill, begun anew when anything has changed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commands.compare import compared
from commands.report import read_predictions
from modules.evaluation import ScoreError
from modules.evaluation.results import read_run
from modules.evaluation.statistics import mean_ci95, pass_at_k
from modules.policy import PolicyError
from tests.conftest import make_backbone
from tests.evaluating import GREEDY, SAMPLED, Mortal, evaluate, write_questions

ROOT = Path(__file__).parents[2]


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An evaluation that was not interrupted: its folder, and its questions."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_questions(folder / "test.jsonl")
    evaluate(folder / "run", data)
    return folder / "run", data


def test_a_killed_evaluation_goes_on_and_comes_to_the_same(whole: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = whole
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "tests.evaluating", str(folder), str(data), "3"]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-500:]
    assert not (folder / "results.json").exists()
    left = (folder / "predictions.jsonl").read_text()
    assert left.endswith('"gre')  # a torn line
    assert left.count("\n") == 2 + 2 * 3 + 2  # two batches of two questions, but for the draws of the second
    engine = Mortal()
    again = evaluate(folder, data, engine)
    draws = [[name] * 3 for name in ("sample-2", "sample-3", "sample-4", "sample-5")]
    assert engine.asked == [*draws[0], *draws[1], "sample-4", "sample-5", *draws[2], *draws[3]]
    assert results(folder) == results(run)
    texts = [
        {(line["mode"], line["id"], line.get("draw")): line["text"] for line in read_run(x)} for x in (run, folder)
    ]
    assert texts[0] == texts[1]
    known = {name: float(value) for name, value in again.callback_metrics.items()}
    assert known["test/odd/zoom_rate"] == pytest.approx(results(run)["odd"]["greedy"]["zoom_rate"])
    assert known["test/sampled/even/accuracy"] == pytest.approx(results(run)["even"]["sampled"]["accuracy"])


def test_what_is_answered_is_not_asked_again_whatever_rank_answered_it(whole: tuple[Path, Path]) -> None:
    run, data = whole
    before = results(run)
    lines = (run / "predictions.jsonl").read_text().splitlines(keepends=True)
    (run / "predictions.jsonl").unlink()
    for rank in (0, 1):
        (run / f"predictions.{rank}.jsonl").write_text("".join(lines[rank::2]))
    engine = Mortal()
    evaluate(run, data, engine)
    assert engine.asked == []
    assert results(run) == before


CHANGED: dict[str, dict[str, Any]] = {
    "decoding": {"evaluations": {"greedy": GREEDY, "sampled": SAMPLED}, "samples": {"sampled": 2}},
    "weights": {"backbone": "other"},
    "questions": {},
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_changed_configuration_starts_anew_and_says_so(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_questions(tmp_path / "test.jsonl", 2)
    evaluate(tmp_path / "run", data, samples={})
    options = dict(CHANGED[what])
    if what == "weights":
        options["backbone"] = make_backbone(seed=2, context_length=512)
    if what == "questions":
        write_questions(data, 2, answers=["9"])
    engine = Mortal()
    evaluate(tmp_path / "run", data, engine, **({"samples": {}} | options))
    assert set(engine.asked) == {"sample-0", "sample-1"}
    assert f"(changed: {what})" in caplog.text
    assert (tmp_path / "run" / "predictions.old-1" / "predictions.jsonl").is_file()


def test_numbers_are_those_of_the_lines(whole: tuple[Path, Path]) -> None:
    run, _ = whole
    found = results(run)
    assert set(found) == {"even", "odd"}
    lines = [line for line in read_run(run) if line["source"] == "even" and line["mode"] == "sampled"]
    draws = {k: [line["correct"] for line in lines if line["id"] == k] for k in {line["id"] for line in lines}}
    assert {len(each) for each in draws.values()} == {3}
    assert len({line["text"] for line in lines}) > 3  # draws differ
    entry = found["even"]["sampled"]
    assert (entry["n"], entry["draws"]) == (3, 3)
    means = [sum(each) / 3 for each in draws.values()]
    assert entry["avg@3"] == pytest.approx(sum(means) / 3)
    for k in (1, 2, 3):
        expected = sum(pass_at_k(3, sum(each), k) for each in draws.values()) / 3
        assert entry[f"pass@{k}"] == pytest.approx(expected)
    assert entry["clustered_by"] == "image"
    interval = mean_ci95(means, [line["image_id"] for line in lines if line["draw"] == 0])
    assert interval is not None
    assert entry["accuracy_ci95"] == pytest.approx([max(0, interval[0]), min(1, interval[1])])
    table = (run / "results.md").read_text().splitlines()
    assert len(table) == 2 + 4
    assert "pass@2" in table[3]
    assert {p.correct for p in read_predictions(run, "sampled")} <= {0.0, 1 / 3, 2 / 3, 1.0}  # means over draws


def test_one_draw_is_the_first_of_several(whole: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = whole
    evaluate(tmp_path / "one", data, samples={})
    first = {line["id"]: line["text"] for line in read_run(run) if line["mode"] == "sampled" and line["draw"] == 0}
    assert first == {line["id"]: line["text"] for line in read_run(tmp_path / "one") if line["mode"] == "sampled"}


def test_runs_are_compared_by_question(whole: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = whole
    same = json.loads(compared(str(run), str(run)))
    assert same["even"]["difference"] == 0
    assert same["even"]["mcnemar_p"] == 1
    modes = json.loads(compared(str(run), str(run), against="sampled"))
    assert modes["odd"]["b"] == pytest.approx(results(run)["odd"]["sampled"]["avg@3"])
    evaluate(tmp_path / "other", write_questions(tmp_path / "few.jsonl", 4), samples={})
    with pytest.raises(ScoreError, match="same questions of even, but 1 are in one of them alone, 'sample-4' first"):
        compared(str(run), str(tmp_path / "other"))
    with pytest.raises(ScoreError, match=r"evaluation 'blank' in .*run', but got \['greedy', 'sampled'\]"):
        compared(str(run), str(run), mode="blank")
    with pytest.raises(ScoreError, match=r"nothing' to hold predictions.jsonl"):
        compared(str(run), str(tmp_path / "nothing"))


def test_ids_that_two_files_share_are_named(tmp_path: Path) -> None:
    files = [str(write_questions(tmp_path / name, 2)) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(PolicyError, match=r"'sample-0' is in .*a.jsonl:1 and in .*b.jsonl:1"):
        evaluate(tmp_path / "run", files)
