"""``train.py predict`` on one's own pictures, through its real entry point, with a policy of random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from modules.engine import Decoding, LocalEngine, Request
from modules.functional.confidence import confidence
from modules.functional.kinds import token_kinds
from modules.trajectory import Sample, StopReason, Turn
from tests.conftest import make_samples, scripted

ROOT = Path(__file__).parents[1]
CONFIGS = [f"--config={ROOT}/configs/quickstart/{name}.yaml" for name in ("base", "rgrpo")]
QUESTION = "Which digit is on the red card?"

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("one", "two"):
        Image.effect_noise((64, 48), 90).convert("RGB").save(tmp_path / "photos" / f"{name}.png")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xff junk")
    return tmp_path


def test_a_folder_with_a_corrupt_picture(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    args = ["--image", "photos", "--question", QUESTION, "--at_once", "3", "--run_dir", "out"]
    train.main(["predict", *CONFIGS, *args])
    said = capfd.readouterr().out
    rows = [json.loads(line) for line in Path("out/predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["one.png", "two.png"]  # one mode, though the configuration has two
    files = {path.name for path in Path("out/answers").iterdir()}
    assert files == {f"{n:04d}-{name}.{kind}" for n, name in ((1, "one"), (2, "two")) for kind in ("png", "html")}
    assert "2 answered, 1 left out" in said
    assert "broken.jpg" in caplog.text
    for row in rows:
        # control characters aside, what was written is what is told, in the order of the questions
        assert f"--- {row['id']}: {QUESTION}" in said
        page = Path(f"out/answers/{1 + rows.index(row):04d}-{row['id'][:3]}.html").read_text()
        assert QUESTION in page
        assert (row["confidence"] is None) == (row["stop"] != "answer")
    assert said.index("--- one.png") < said.index("--- two.png")


def test_a_file_of_questions_of_which_some_are_wrong(capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": f"photos/{name}", "question": QUESTION} for name in ("one.png", "broken.jpg")]
    Path("q.jsonl").write_text("\n".join([*map(json.dumps, rows), "no JSON"]))
    train.main(["predict", *CONFIGS, "--questions", "q.jsonl", "--run_dir", "out"])
    said = capfd.readouterr().out
    assert "1 answered, 2 left out" in said
    assert json.loads(Path("out/summary.predict.json").read_text())["rows_left_out"] == 2
    assert {path.name for path in Path("out/answers").iterdir()} == {"0001-q-1.png", "0001-q-1.html"}


@pytest.mark.parametrize("question", ["What is this \U0001f600: yes or no?", "What is ${vars.x} / ${oc.env:HOME}?"])
def test_a_question_is_text_whatever_it_looks_like(
    question: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "photos").rename("${photos}")
    train.main(["predict", *CONFIGS, "--image", "${photos}/one.png", "--question", question, "--run_dir", "out"])
    assert f"--- one.png: {question}" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--image", "photos"], "--question is missing"),
        (["--question", "?"], "--image is missing"),
        (["--image", "photos", "--question", "?", "--questions", "q.jsonl"], "got both"),
        (["--image", "none.png", "--question", "?"], "none.png: no such image or folder"),
        (["--image", "photos/broken.jpg", "--question", "?"], "all were left out"),
    ],
)
def test_what_cannot_be_answered_is_one_sentence(
    args: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        train.main(["predict", *CONFIGS, *args, "--run_dir=out"])
    assert end.value.code == 2
    assert expected in capsys.readouterr().err


def test_the_engine_tells_every_token_as_it_is_written(samples: list[Sample]) -> None:
    texts = ['red {"bbox_2d": [4, 8, 28, 40]}', "7</answer>"]
    engine = LocalEngine()
    heard: list[tuple[int, str]] = []

    def listen(request: Request, turns: list[Turn], writing: str) -> None:
        assert request.sample is samples[0]
        heard.append((len(turns), writing))

    engine.listener = listen  # type: ignore[assignment]
    backbone = scripted(["".join(texts)])
    (found,) = engine.rollout(backbone, [Request(samples[0], 0)], Decoding(0.0, max_turns=3, max_turn_tokens=20))
    assert len(heard) == int(found.sampled.sum())
    assert heard[-1] == (len(found.turns), "")
    growing = [writing for turns, writing in heard if turns == 0]
    assert all(later.startswith(earlier) for earlier, later in pairwise(growing))
    # and what is told changes nothing
    (quiet,) = LocalEngine().rollout(
        scripted(["".join(texts)]), [Request(samples[0], 0)], Decoding(0.0, max_turns=3, max_turn_tokens=20)
    )
    assert torch.equal(quiet.completion_ids, found.completion_ids)


def test_confidence_is_the_product_of_the_answers_token_probabilities() -> None:
    (sample,) = make_samples(1)
    backbone = scripted(["I can read it now.</think><answer>42</answer>"])
    (found,) = LocalEngine().rollout(backbone, [Request(sample, 0)], Decoding(0.0, max_turns=2, max_turn_tokens=30))
    assert (found.stop, found.answer) == (StopReason.ANSWER, "42")
    answer = token_kinds(found, backbone.detokenize)["answer"]
    assert backbone.detokenize(found.completion_ids[answer]) == "42"
    odds = found.log_probs.clone()
    odds[answer] = torch.tensor([0.5, 0.25]).log()
    assert confidence(replace(found, log_probs=odds), backbone.detokenize) == pytest.approx(0.125)
    cut = LocalEngine().rollout(scripted(["42"]), [Request(sample, 0)], Decoding(0.0, max_turns=1, max_turn_tokens=2))
    assert confidence(cut[0], backbone.detokenize) is None
