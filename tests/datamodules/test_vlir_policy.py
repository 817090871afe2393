"""Rejection sampling: of what a policy wrote in the real engine, the right answer with the fewest crops is kept."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from datamodules.sources.vlir import VLIR
from datamodules.vlir.__main__ import parser
from datamodules.vlir.build import Build, build
from datamodules.vlir.policy_teacher import PolicyTeacher, weights_fingerprint
from modules.backbones.base import Backbone
from modules.engine import Decoding, GroupSampler, LocalEngine, Request, RolloutEngine
from modules.trajectory import Trajectory
from tests.conftest import make_backbone, scripted

pytest.importorskip("imagehash")

ROOT = Path(__file__).parents[2]
LOOK = 'red {"bbox_2d": [4, 8, 28, 40]}'
OTHER = 'red {"bbox_2d": [32, 8, 60, 40]}'
READ = "I can read it now.</think><answer>"
WRITTEN = [  # a group: right with two crops, with one, wrong, without a crop, with a box that is refused, unfinished
    f"<think>I zoom in on {LOOK}{OTHER}{READ}7</answer>",
    f"<think>I zoom in on {LOOK}{READ}7</answer>",
    f"<think>I zoom in on {OTHER}{READ}3</answer>",
    f"{READ}7</answer>",
    f'<think>I zoom in on red {{"bbox_2d": [28, 8, 4, 40]}}{READ}7</answer>',
    "<think>I zoom in on " * 13,
]


class Counting(RolloutEngine):
    """The real engine, and what it was asked for."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def rollout(self, backbone: Backbone, requests: Sequence[Request], decoding: Decoding) -> list[Trajectory]:
        self.requests += requests
        return LocalEngine().rollout(backbone, requests, decoding)


@pytest.fixture
def questions(tmp_path: Path) -> VLIR:
    pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    row = {"id": "q", "image": "a.png", "question": "Which digit is on the red card?", "answers": ["7"], "source": "s"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row | {"regions": [{"box": [4, 8, 28, 40]}]}))
    return VLIR(str(tmp_path / "q.jsonl"))


def teacher(texts: list[str], engine: RolloutEngine, **options: Any) -> PolicyTeacher:
    decoding = Decoding(1.0, max_turns=4, max_turn_tokens=12)
    return PolicyTeacher(scripted(texts), None, engine, decoding, GroupSampler(len(WRITTEN)), **options)


def corpus(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The only sample of a corpus, and what was rejected."""
    (row,) = [
        json.loads(line) for name in ("train", "val") for line in (out / f"{name}.jsonl").read_text().splitlines()
    ]
    return row, [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def test_the_right_answer_with_the_fewest_crops_is_kept_and_rolled_out_once(questions: VLIR, tmp_path: Path) -> None:
    engine, out = Counting(), tmp_path / "corpus"
    policy = teacher(WRITTEN, engine)
    assert build(Build(str(out), policy, [questions]))
    row, rejected = corpus(out)
    assert len(engine.requests) == len(WRITTEN)
    assert len({request.seed for request in engine.requests}) == len(WRITTEN)
    assert row["rationale"] == [
        {"text": "<think>I zoom in on red ", "region": {"box": [4.0, 8.0, 28.0, 40.0], "image": 0}},
        {"text": f"{READ}7</answer>"},
    ]
    assert row["provenance"]["teacher"] == policy.name
    # tried before it: those with no more turns
    assert {each["reason"] for each in rejected} <= {"few_crops", "unfinished", "bad_box", "wrong_answer"}
    assert "few_crops" in {each["reason"] for each in rejected}
    assert all(each["passed_later"] for each in rejected)
    assert build(Build(str(out), teacher([], engine), [questions]))  # nothing left to write
    assert len(engine.requests) == len(WRITTEN)
    assert corpus(out) == (row, rejected)


def test_everything_that_was_wrong_is_named(questions: VLIR, tmp_path: Path) -> None:
    texts = [WRITTEN[2], WRITTEN[3], WRITTEN[4], WRITTEN[5], WRITTEN[2], WRITTEN[3]]
    build(Build(str(tmp_path / "corpus"), teacher(texts, LocalEngine()), [questions]))
    rejected = [json.loads(line) for line in (tmp_path / "corpus" / "rejected.jsonl").read_text().splitlines()]
    found = sorted((each["reason"], each["detail"]) for each in rejected)
    assert [reason for reason, _ in found] == ["bad_box", "few_crops", "few_crops", "unfinished", *["wrong_answer"] * 2]
    assert found[0][1] == "turn 1 was refused: order"
    assert found[3][1] == "turn_length"


class Unprompted(Counting):
    """Counts, and rolls out the bare question: the words of a prompt are not in so small a vocabulary."""

    def rollout(self, backbone: Backbone, requests: Sequence[Request], decoding: Decoding) -> list[Trajectory]:
        self.requests += requests
        bare = [replace(r, sample=replace(r.sample, question="Which digit is on the red card?")) for r in requests]
        return LocalEngine().rollout(backbone, bare, decoding)


def test_a_prompt_is_shown_to_the_policy_and_not_kept(questions: VLIR, tmp_path: Path) -> None:
    prompt, engine = tmp_path / "p.txt", Unprompted()
    prompt.write_text("Look at this: $question $boxes")
    build(Build(str(tmp_path / "corpus"), teacher(WRITTEN, engine, prompt=str(prompt)), [questions]))
    shown = {request.sample.question for request in engine.requests}
    assert shown == {'Look at this: Which digit is on the red card? {"bbox_2d": [4, 8, 28, 40]}'}
    assert corpus(tmp_path / "corpus")[0]["question"] == "Which digit is on the red card?"


def test_policies_are_told_apart_by_their_weights() -> None:
    assert weights_fingerprint(make_backbone(0)) == weights_fingerprint(make_backbone(0))
    assert weights_fingerprint(make_backbone(0)) != weights_fingerprint(make_backbone(1))


def test_settings_that_cannot_act_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sampler\.size"):
        PolicyTeacher(make_backbone(), decoding=Decoding(0.0))


@pytest.mark.parametrize("name", ["build", "sample"])
def test_the_command_that_a_file_opens_with_is_understood(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "configs" / "vlir" / f"{name}.yaml").read_text()
    line = next(line for line in text.splitlines() if "python -m datamodules.vlir" in line)
    args = shlex.split(line.partition("datamodules.vlir ")[2])
    settings = parser().parse_args(args)
    assert f"configs/vlir/{name}.yaml" in args
    assert settings.build.sources[0].class_path.endswith("VLIR")
    for prompt in (
        settings.build.teacher.init_args.prompt,
        *(check.init_args.prompt for check in settings.build.checks),
    ):
        assert prompt is None or (ROOT / prompt).is_file()
