"""The worked examples of `docs/rewards.md`, played through the environment and judged by the presets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import torch

import modules.rewards
from modules.environment import Done, Look, respond
from modules.functional.boxes import BoxSpace
from modules.functional.graders import Kind
from modules.functional.grammar import last_answer
from modules.rewards import Accuracy, Judge, RegionValidity, Reward
from modules.trajectory import Sample, StopReason, Trajectory, Turn, Visual
from tests.test_rewards import CONFIGS, CROP, NONE, preset

DOCUMENT = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (.+) \| `(.+)` \| (\S+ \+ .+ = .+) \| (.+ = .+) \|$", re.MULTILINE)
ROWS = {name: (text, paper, code) for name, text, paper, code in ROW.findall(DOCUMENT)}
CASES = ["right", "wrong", "truncated", "no box", "box with no inside", "whole image", "many boxes", "two answers"]
COMPONENTS = ["accuracy", "format", "region", "length"]


def play(text: str) -> Trajectory:
    """A text cut into turns where the environment does; what follows an answer still counts as written."""
    sample = Sample("s", "?", (torch.zeros(3, 64, 64, dtype=torch.uint8),), ("7",))
    visuals = (Visual(torch.zeros(3, 64, 64), 1),)
    turns, start, stop = [], 0, StopReason.EOS
    for end in range(1, len(text) + 1):
        said = respond(text[start:end], sample, visuals, BoxSpace("pixels"))
        if isinstance(said, Done):
            stop = StopReason.ANSWER
        elif said is not None:
            shown = {"region": said.region, "crop": CROP} if isinstance(said, Look) else {"fault": said.fault}
            turns.append(Turn(text[start:end], 0, 0, **shown))  # type: ignore[arg-type]
            start = end
    turns.append(Turn(text[start:], 0, 0))
    return Trajectory(
        sample, NONE, NONE, NONE.bool(), NONE.float(), NONE.float(), (), tuple(turns), stop, last_answer(text), text
    )


def paid(rewards: dict[str, Reward], trajectory: Trajectory) -> list[float]:
    """What each component adds to the total."""
    values = {name: reward(trajectory) for name, reward in rewards.items()}
    opened = {name: r.requires is None or values[r.requires] > 0 for name, r in rewards.items()}
    return [rewards[name].weight * values[name] * opened[name] for name in COMPONENTS]


def test_the_table_has_the_cases_that_matter() -> None:
    assert set(CASES) <= set(ROWS)
    assert any("nested" in name for name in ROWS)
    assert any("]}" in name and "]}" in text for name, (text, *_) in ROWS.items())
    assert len(ROWS) == DOCUMENT.count(" = ") / 2  # no row escapes the test


@pytest.mark.parametrize("name", ROWS)
def test_worked_examples(name: str) -> None:
    text, *expected = ROWS[name]
    played = play(text)
    for rewards, sums in zip((preset("paper"), preset("code")), expected, strict=True):
        terms, total = sums.split(" = ")
        assert paid(rewards, played) == pytest.approx([float(term) for term in terms.split(" + ")], abs=1e-9)
        components, totals = modules.rewards.score(rewards, [played])
        assert float(totals[0]) == pytest.approx(float(total), abs=1e-6)
        assert list(components) == COMPONENTS


def test_every_class_and_kind_is_in_the_document() -> None:
    classes = [n for n in modules.rewards.__all__ if n[0].isupper() and n not in ("RESERVED", "Reward")]
    assert all(f"| `{name}` |" in DOCUMENT for name in classes)
    assert all(f"`{kind}`" in DOCUMENT for kind in get_args(Kind))


def test_files_that_go_beyond_a_preset_change_only_what_they_say() -> None:
    judged, code = preset("judge"), preset("code")
    assert list(judged) == list(code)
    ours, theirs = judged["accuracy"], code["accuracy"]
    assert isinstance(ours, Accuracy)
    assert isinstance(ours.judge, Judge)
    assert {**vars(ours), "judge": None} == vars(theirs)
    assert all(vars(judged[name]) == vars(code[name]) for name in COMPONENTS[1:])
    checked, paper = preset("checked"), preset("paper")
    assert all(vars(checked[name]) == vars(paper[name]) for name in ("accuracy", "format", "length"))
    region = checked["region"]
    assert isinstance(region, RegionValidity)
    assert (region.rule, region.weight, region.requires, region.max_area) == ("any_valid", 0.5, "accuracy", 0.9)
    assert list(checked) == [*COMPONENTS, "iou", "repetition", "crops"]
    whole, twice = (play(ROWS[name][0]) for name in ("whole image", "the same box twice, at once"))
    assert [region(whole), region(twice), RegionValidity("all_valid", max_overlap=0.9)(twice)] == [0, 1, 0]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_files_open_with_the_command_that_uses_them(path: Path) -> None:
    comment = [line for line in path.read_text().split("rollout:")[0].splitlines() if "python train.py fit" in line]
    assert comment[0].startswith("#")
    assert comment[0].endswith(f"--config configs/rewards/{path.name}")
