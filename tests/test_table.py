"""The numbers of a grid's table against scipy and numpy, its files, and what TensorBoard reads."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams import metadata

from commands.grid import Fit, Grid, Part, Row, cells
from commands.table import summary, write_table

Answers = np.ndarray  # (questions,) of 0 and 1


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def grid(seeds: int = 3, by: str | None = None) -> Grid:
    rows = {
        "base": Row(),
        "high": Row(set={"model.lr": 0.5}),
        "bare": Row(remove=["rewards.format"]),
        "blank": Row(test_of="base", mode="blank", test=Part(set={"crops": "blank"})),
    }
    Path("rl.yaml").write_text("rewards: {format: {}}\n")
    return Grid(rows=rows, base="base", run_dir="runs", seeds=seeds, fit=Fit(configs=["rl.yaml"]), by=by)


def write(grid: Grid, name: str, seed: int, lines: Sequence[dict[str, Any]], seconds: float = 10.0) -> None:
    """What a cell leaves when it has ended."""
    cell = next(each for each in cells(grid, seed) if each.name == name)
    for stage, mark in zip(cell.stages, cell.marks(), strict=True):
        folder = cell.root / stage.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stage.json").write_text(json.dumps({"fingerprint": mark, "ended": True}))
    (cell.weights / "fit.json").write_text(json.dumps({"seconds": seconds, "steps": 3}))
    (cell.weights / "config.yaml").write_text(
        f"model: {{lr: {0.5 if name == 'high' else 0.1}}}\nrewards: {{format: {{}}}}\n"
    )
    test = cell.root / name / "test"
    (test / "config.test.yaml").write_text("crops: zoom\n")
    (test / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def lines(correct: Answers, mode: str = "greedy", **more: Any) -> list[dict[str, Any]]:
    """Four questions an image, of which every other one has a region."""
    return [
        {"id": f"q{k}", "image_id": f"i{k // 4}", "mode": mode, "correct": int(value), "crops": k % 3}
        | {"iou": value / 2 if k % 2 else None, "answers": [str(k)], "rewards": {"accuracy": 1.0, "format": 0.25}}
        | more
        for k, value in enumerate(correct)
    ]


@pytest.fixture
def answered() -> dict[str, list[Answers]]:
    """Row -> seed -> 200 answers: seeds differ, some questions are hard for all, and so are some images."""
    rng = np.random.default_rng(0)
    hard = rng.normal(size=200) + np.repeat(rng.normal(size=50), 4)
    drawn = {}
    for name, ease in (("base", 0.0), ("high", 0.6)):
        drawn[name] = [(rng.normal(size=200) + ease + rng.normal() / 4 > hard).astype(float) for _ in range(3)]
    return drawn


def written(grid: Grid, answered: dict[str, list[Answers]]) -> dict[str, Any]:
    for name, seeds in answered.items():
        for seed, correct in enumerate(seeds):
            sampled = lines(1 - correct, "sampled")
            write(grid, name, seed, lines(correct) + sampled, seconds=10.0 + seed)
    write_table(grid)
    rows: dict[str, Any] = json.loads(Path("runs/results.json").read_text())["rows"]
    return rows


def test_over_seeds_it_is_students_interval(answered: dict[str, list[Answers]]) -> None:
    found = written(grid(), answered)["high"]["metrics"]
    for metric, of in (("accuracy", lambda x: x.mean()), ("sampled_accuracy", lambda x: 1 - x.mean())):
        values = [of(each) for each in answered["high"]]
        expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert list(found[metric]["values"].values()) == pytest.approx(values)
        assert found[metric]["mean"] == pytest.approx(np.mean(values))
        assert found[metric]["ci95"] == pytest.approx([expected.low, expected.high])
    assert found["seconds"]["values"] == {"0": 10.0, "1": 11.0, "2": 12.0}
    # mean 11, standard deviation 1, t(0.975, 2) = 4.30265
    assert found["seconds"]["ci95"] == pytest.approx(
        [11 - 4.30265 / math.sqrt(3), 11 + 4.30265 / math.sqrt(3)], abs=1e-5
    )
    assert found["mean_iou"]["values"]["0"] == pytest.approx(answered["high"][0][1::2].mean() / 2)
    assert found["crops"]["mean"] == pytest.approx(np.mean([k % 3 for k in range(200)]))
    assert found["zoom_rate"]["mean"] == pytest.approx(np.mean([k % 3 > 0 for k in range(200)]))
    assert found["reward/format"]["mean"] == 0.25


def test_a_difference_is_paired_by_seed(answered: dict[str, list[Answers]]) -> None:
    found = written(grid(), answered)["high"]["metrics"]["accuracy"]["difference"]
    a, b = ([each.mean() for each in answered[name]] for name in ("high", "base"))
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found["mean"] == pytest.approx(np.mean(a) - np.mean(b))
    assert found["ci95"] == pytest.approx([expected.low, expected.high])
    unpaired = stats.ttest_ind(a, b).confidence_interval(0.95)
    assert found["ci95"] != pytest.approx([unpaired.low, unpaired.high], rel=0.01)  # so the two could be told apart


def test_over_questions_it_is_the_spread_of_a_bootstrap_over_images(answered: dict[str, list[Answers]]) -> None:
    found = written(grid(), answered)["high"]["metrics"]["accuracy"]["difference"]
    change = np.mean([a - b for a, b in zip(answered["high"], answered["base"], strict=True)], axis=0)
    by_image = change.reshape(50, 4).mean(1)
    drawn = np.random.default_rng(1).integers(0, 50, (8000, 50))
    half = stats.t.ppf(0.975, 49) * by_image[drawn].mean(1).std() * math.sqrt(50 / 49)
    low, high = found["ci95_questions"]
    assert (low + high) / 2 == pytest.approx(change.mean())
    assert (high - low) / 2 == pytest.approx(half, rel=0.03)
    one_seed = stats.t.ppf(0.975, 49) * (answered["high"][0] - answered["base"][0]).reshape(50, 4).mean(1).std(ddof=1)
    assert half < 0.9 * one_seed / math.sqrt(50)  # three seeds tell more of a question than one


def test_one_seed_has_no_interval_over_seeds(answered: dict[str, list[Answers]]) -> None:
    one = {name: seeds[:1] for name, seeds in answered.items()}
    found = written(grid(seeds=1), one)["high"]["metrics"]["accuracy"]
    assert found["ci95"] is None
    assert found["difference"]["ci95"] is None
    expected = stats.t.interval(0.95, 49, one["high"][0].mean(), stats.sem(one["high"][0].reshape(50, 4).mean(1)))
    assert found["ci95_questions"] == pytest.approx(expected)


def test_seeds_that_are_missing_are_left_out_of_both_sides(answered: dict[str, list[Answers]]) -> None:
    rows = written(grid(), {"base": answered["base"], "high": answered["high"][:2]})
    found = rows["high"]["metrics"]["accuracy"]
    change = [a.mean() - b.mean() for a, b in zip(answered["high"][:2], answered["base"], strict=False)]
    assert found["difference"]["values"] == pytest.approx({"0": change[0], "1": change[1]})
    assert rows["high"]["cells"] == {"0": "ended", "1": "ended", "2": "not run"}
    table = Path("runs/table.md").read_text()
    assert "- `seed_2/high`: not run" in table
    assert "| `high` | 2 of 3 |" in table
    assert "- `seed_0/bare`: not run" in table


def test_questions_whose_judgement_failed_are_left_out_of_the_pairs() -> None:
    values = {0: {"a": 1.0, "b": 0.0, "c": 1.0}, 1: {"a": 1.0, "b": 1.0}}
    found = summary(values, {"a": "i", "b": "j", "c": "k"})
    assert found is not None
    assert found["values"] == pytest.approx({"0": 2 / 3, "1": 1.0})
    # of a and b, which both have: 1 and 0.5, of two images
    half = stats.t.ppf(0.975, 1) * 0.25
    assert found["ci95_questions"] == pytest.approx((0.75 - half, 0.75 + half))
    assert summary({0: {}}, {}) is None


@pytest.mark.parametrize("key", ["id", "image_id", "answers"])
def test_other_questions_are_not_compared(key: str) -> None:
    write(grid(1), "base", 0, lines(np.ones(8)))
    write(
        grid(1), "high", 0, [*lines(np.ones(8))[:7], lines(np.ones(8))[7] | {key: ["x"] if key == "answers" else "x"}]
    )
    write_table(grid(1))
    row = json.loads(Path("runs/results.json").read_text())["rows"]["high"]
    assert row["same_questions"] is False
    assert row["metrics"]["accuracy"]["difference"] is None
    assert "`high` was asked other questions than `base`" in Path("runs/table.md").read_text()


def test_a_mode_and_groups_of_questions(answered: dict[str, list[Answers]]) -> None:
    told = grid(seeds=1, by="source")
    correct = answered["base"][0]
    greedy = [line | {"source": "far" if k < 40 else "near"} for k, line in enumerate(lines(correct))]
    for name in ("base", "blank"):
        write(told, name, 0, greedy + lines(1 - correct, "blank", source="near"))
    write_table(told)
    rows = json.loads(Path("runs/results.json").read_text())["rows"]
    assert rows["base"]["metrics"]["accuracy/far"]["mean"] == pytest.approx(correct[:40].mean())
    assert rows["base"]["metrics"]["zoom_rate/near"]["mean"] == pytest.approx(
        np.mean([k % 3 > 0 for k in range(40, 200)])
    )
    blank = rows["blank"]["metrics"]
    assert blank["accuracy"]["mean"] == pytest.approx(1 - correct.mean())
    assert blank["accuracy"]["difference"]["mean"] == pytest.approx(1 - 2 * correct.mean())
    assert "sampled_accuracy" not in blank


def test_several_draws_of_a_question_are_one_answer() -> None:
    told = grid(seeds=1)
    drawn = [
        line | {"draw": draw}
        for draw, correct in enumerate(([1, 0, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]))
        for line in lines(np.array(correct), "sampled")
    ]
    write(told, "base", 0, lines(np.ones(5)) + drawn)
    write(told, "high", 0, lines(np.ones(5)) + [line for line in drawn if line["draw"] == 0])
    assert write_table(told) == []
    rows = json.loads(Path("runs/results.json").read_text())["rows"]
    assert rows["base"]["metrics"]["accuracy"]["mean"] == 1.0
    sampled = rows["high"]["metrics"]["sampled_accuracy"]
    assert rows["base"]["metrics"]["sampled_accuracy"]["mean"] == pytest.approx((3 + 1 + 1 + 0 + 2) / 4 / 5)
    # two images: questions 0 to 3, and 4; more draws are no more questions
    assert sampled["difference"]["mean"] == pytest.approx((1 / 4 - 1 / 4 + 3 / 4 + 0 + 2 / 4) / 5)
    assert rows["high"]["same_questions"] is True
    told = replace(told, rows={**told.rows, "drawn": Row(test_of="base", mode="sampled")})
    write(told, "drawn", 0, drawn)
    write_table(told)
    found = json.loads(Path("runs/results.json").read_text())["rows"]["drawn"]["metrics"]
    assert found["accuracy"]["mean"] == pytest.approx(7 / 20)
    assert found["mean_iou"]["mean"] == pytest.approx((1 / 4 + 0) / 2 / 2)  # questions 1 and 3 have a region


BROKEN: dict[str, tuple[Callable[[list[dict[str, Any]]], list[dict[str, Any]]], str]] = {
    "twice": (lambda lines: [*lines, lines[0]], "'q0' is there twice"),
    "other mode": (lambda lines: [line | {"mode": "x"} for line in lines], "mode 'greedy'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_predictions_are_a_failure_of_their_cell(name: str) -> None:
    spoil, said = BROKEN[name]
    write(grid(1), "base", 0, lines(np.ones(4)))
    write(grid(1), "high", 0, spoil(lines(np.ones(4))))
    assert write_table(grid(1)) == ["seed_0/high"]
    rows = json.loads(Path("runs/results.json").read_text())["rows"]
    assert rows["base"]["cells"] == {"0": "ended"}
    assert said in rows["high"]["cells"]["0"]


def test_the_table_and_the_csv_say_what_the_results_say(answered: dict[str, list[Answers]]) -> None:
    rows = written(grid(), answered)
    with Path("runs/table.csv").open() as file:
        said = {(line["row"], line["metric"], line["kind"]): line for line in csv.DictReader(file)}
    assert len(said) == sum(1 + (m["difference"] is not None) for r in rows.values() for m in r["metrics"].values())
    found = rows["high"]["metrics"]["accuracy"]["difference"]
    line = said["high", "accuracy", "difference"]
    assert [
        float(line[key]) for key in ("mean", "ci95_low", "ci95_high", "ci95_questions_low", "ci95_questions_high")
    ] == [
        found["mean"],
        *found["ci95"],
        *found["ci95_questions"],
    ]
    assert [float(line[f"seed_{k}"]) for k in range(3)] == [found["values"][str(k)] for k in range(3)]
    assert line["n_seeds"] == "3"
    table = Path("runs/table.md").read_text()
    interval = "[{:+.3f}, {:+.3f}]".format(*found["ci95"])
    questions = "[{:+.3f}, {:+.3f}]".format(*found["ci95_questions"])
    assert f"{found['mean']:+.3f} {interval} |" in table
    assert f"| {found['mean']:+.3f} | {interval} | {questions} |" in table
    widths = {line.count("|") for line in table.split("### accuracy")[0].splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_tensorboard_lists_every_cell_with_what_was_changed(answered: dict[str, list[Answers]]) -> None:
    told = grid()
    write(told, "blank", 1, lines(answered["base"][1], "blank"))
    for _ in range(2):  # the second time in place of the first
        written(told, answered)
    events = EventMultiplexer().AddRunsFromDirectory("runs/hparams")
    events.Reload()
    runs = events.Runs()
    assert sorted(runs) == sorted(
        [f"seed_{k}/{name}" for k in range(3) for name in ("base", "high")] + ["seed_1/blank"]
    )
    columns = set()
    for run in runs:
        tags = events.SummaryMetadata(run, metadata.SESSION_START_INFO_TAG)
        start = metadata.parse_session_start_info_plugin_data(tags.plugin_data.content)
        values = {key: value.string_value or value.number_value for key, value in start.hparams.items()}
        columns.add(tuple(sorted(values)))
        seed, name = run.removeprefix("seed_").split("/")
        assert (values["row"], values["seed"]) == (name, float(seed))
        assert values["model.lr"] == ("0.5" if name == "high" else "0.1")
        assert values["test.crops"] == '"zoom"'
        assert values["rewards.format"] == "kept"
        (point,) = events.Scalars(run, "accuracy")
        key = "base" if name == "blank" else name
        assert point.value == pytest.approx(answered[key][int(seed)].mean())
        assert math.isnan(events.Scalars(run, "sampled_accuracy")[0].value) == (name == "blank")
    assert len(columns) == 1  # the page takes its columns from one run
