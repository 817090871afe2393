"""Rewards worked out by hand, out of the very files that a run reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser

from callbacks.rollout import RolloutCallback
from modules.engine import Decoding, LocalEngine, Request
from modules.functional.grammar import last_answer
from modules.rewards import Accuracy, Format, Length, RegionValidity, Reward, check_gates, score
from modules.trajectory import Region, Sample, StopReason, Trajectory, Turn, Visual
from tests.conftest import make_samples, scripted

CONFIGS = Path(__file__).parents[1] / "configs" / "rewards"
NONE = torch.zeros(0, dtype=torch.long)
CROP = Visual(torch.zeros(3, 8, 8), 1, "crop")


def look(text: str, box: tuple[float, float, float, float] = (4, 8, 28, 40)) -> Turn:
    return Turn(text, 0, 0, region=Region(box), crop=CROP)


def refused(text: str, fault: str = "order") -> Turn:
    return Turn(text, 0, 0, fault=fault)


def say(text: str) -> Turn:
    return Turn(text, 0, 0)


def trajectory(*turns: Turn, stop: StopReason = StopReason.ANSWER, answers: tuple[str, ...] = ("7",)) -> Trajectory:
    text = "".join(turn.text for turn in turns)
    sample = Sample("s", "?", (torch.zeros(3, 64, 64, dtype=torch.uint8),), answers)
    return Trajectory(
        sample, NONE, NONE, NONE.bool(), NONE.float(), NONE.float(), (), turns, stop, last_answer(text), text
    )


THINK = "<think>" + 93 * "x"  # 100 characters
BOX = '{"bbox_2d": [4, 8, 28, 40]}'  # 27
TURNED = '{"bbox_2d": [28, 8, 4, 40]}'  # 27
RIGHT = "</think><answer>7</answer>"  # 26
WRONG = "</think><answer>8</answer>"  # 26


@dataclass(frozen=True)
class Example:
    trajectory: Trajectory
    paper: float
    code: float


# Of each total: accuracy + format + region + length.
EXAMPLES = {
    "right": Example(
        trajectory(look(THINK + BOX), say(RIGHT)),
        paper=1 + 1 + 0.5 + 0.153,  # 100 + 27 + 26 characters
        code=1 + 0.5 + 0.5 + 0.10,  # the shortest segment has 26: capped
    ),
    "wrong": Example(
        trajectory(look(THINK + BOX), say(WRONG)),
        paper=0 + 1 + 0 + 0.153,
        code=0 + 0.5 + 0 + 0.10,
    ),
    "truncated": Example(
        trajectory(look(THINK + BOX), say(200 * "x"), stop=StopReason.TURN_LENGTH),
        paper=0 + 0 + 0 + 0.25,  # 327 characters: capped
        code=0 + 0 + 0 + 0.10,
    ),
    "box after the last turn": Example(  # asked for, never shown
        trajectory(Turn(THINK + BOX, 0, 0, region=Region((4, 8, 28, 40))), stop=StopReason.MAX_TURNS),
        paper=0 + 0 + 0 + 0.127,
        code=0 + 0 + 0 + 0,  # nothing stands behind the box
    ),
    "no box": Example(
        trajectory(say(THINK + RIGHT)),
        paper=1 + 1 + 0 + 0.126,
        code=1 + 0.5 + 0 + 0.10,
    ),
    "refused box": Example(
        trajectory(refused(THINK + TURNED), say(RIGHT)),
        paper=1 + 1 + 0 + 0.153,
        code=1 + 0.5 + 0 + 0.10,
    ),
    "refused box, then a valid one": Example(
        trajectory(refused(THINK + TURNED), look("and " + BOX), say(RIGHT)),
        paper=1 + 1 + 0.5 + 0.184,  # 100 + 27 + 4 + 27 + 26
        code=1 + 0.5 + 0 + 0.04,  # one was refused; 4 characters between the boxes
    ),
    "whole image": Example(
        trajectory(look(THINK + '{"bbox_2d": [0, 0, 64, 64]}', (0, 0, 64, 64)), say(RIGHT)),
        paper=1 + 1 + 0.5 + 0.153,
        code=1 + 0.5 + 0.5 + 0.10,
    ),
    "two boxes": Example(
        trajectory(look(THINK + BOX), look("and " + BOX), say(RIGHT)),
        paper=1 + 1 + 0.5 + 0.184,  # at most 0.5
        code=1 + 0.5 + 0.5 + 0.04,
    ),
    "two boxes at once": Example(
        trajectory(look(THINK + BOX), look(BOX), say(RIGHT)),
        paper=1 + 1 + 0.5 + 0.180,
        code=1 + 0.5 + 0.5 + 0,
    ),
    "two answers": Example(
        trajectory(look(THINK + BOX), say("</think><answer>8</answer><answer>7</answer>")),
        paper=1 + 0 + 0.5 + 0.171,  # the last one counts; 100 + 27 + 44
        code=1 + 0 + 0.5 + 0.10,
    ),
    "no thinking": Example(
        trajectory(say("<answer>7</answer>")),
        paper=1 + 0 + 0 + 0.018,
        code=1 + 0.5 + 0 + 0.10,
    ),
    "words behind the answer": Example(
        trajectory(say(THINK + RIGHT + " I am sure.")),
        paper=1 + 0 + 0 + 0.137,
        code=1 + 0 + 0 + 0.10,
    ),
    "LaTeX": Example(  # the braces are no boxes
        trajectory(
            say(THINK + r" \sqrt{[4]} \{[1]}</think><answer>\frac{[1]}{2}</answer>"), answers=(r"\frac{[1]}{2}",)
        ),
        paper=1 + 1 + 0 + 0.156,  # 100 + 18 + 8 + 8 + 13 + 9
        code=1 + 0.5 + 0 + 0.10,
    ),
}


# Rewards of the same names, that a file before the preset may have set: nothing of them may stay.
OTHERS = """
accuracy:
  class_path: Accuracy
  init_args: {kind: anls, by_source: {s: list}, threshold: 0.9, tolerance: 0.9, weight: 2.0}
format: {class_path: Format, init_args: {form: final_answer, weight: 0.1}}
region:
  class_path: RegionValidity
  init_args: {rule: all_valid, min_side: 30, min_area: 0.3, max_area: 0.5, max_overlap: 0.5, requires: format}
length: {class_path: Length, init_args: {per_character: 1.0, cap: 9.0, of: shortest_segment, requires: accuracy}}
"""


def preset(name: str, *options: str) -> dict[str, Reward]:
    """The rewards of one of the files, as the command line reads them."""
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(RolloutCallback, "rollout")
    config = parser.parse_args([*options, f"--config={CONFIGS / name}.yaml"])
    return dict(parser.instantiate(config).rollout.rewards)


@pytest.mark.parametrize("options", [[], [f"--rollout.rewards={OTHERS}"]])
@pytest.mark.parametrize("name", ["paper", "code"])
def test_presets_pay_what_was_worked_out_by_hand(name: str, options: list[str]) -> None:
    rewards = preset(name, *options)
    assert list(rewards) == ["accuracy", "format", "region", "length"]
    components, totals = score(rewards, [example.trajectory for example in EXAMPLES.values()])
    found = dict(zip(EXAMPLES, totals.tolist(), strict=True))
    assert found == pytest.approx({k: getattr(example, name) for k, example in EXAMPLES.items()}, abs=1e-6)
    assert all(values.shape == (len(EXAMPLES),) and values.dtype == torch.float32 for values in components.values())


@pytest.mark.parametrize("name", ["paper", "code"])
def test_presets_open_with_the_command_that_uses_them(name: str) -> None:
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    comment = [line for line in lines[: lines.index("rollout:")] if "python train.py fit" in line]
    assert comment[0].startswith("#")
    assert comment[0].endswith(f"--config configs/rewards/{name}.yaml")


def test_what_the_engine_records_is_judged_the_same() -> None:
    texts = [
        'red {"bbox_2d": [4, 8, 28, 40]}I can read it now.</think><answer>7</answer>',
        'red {"bbox_2d": [28, 8, 4, 40]}I can read it now.</think><answer>7</answer>',
        'red {"bbox_2d": [28, 8, 4, 40]}red {"bbox_2d": [4, 8, 28, 40]}I can read it now.</think><answer>7</answer>',
        'red {"bbox_2d": [4, 8, 28, 40]}red {"bbox_2d": [4, 8, 28, 40]}red {"bbox_2d": [28, 8, 4, 40]}',
    ]
    requests = [Request(sample, 0) for sample in make_samples(len(texts))]
    decoding = Decoding(0.0, max_turns=3, max_turn_tokens=12)
    played = LocalEngine().rollout(scripted(texts), requests, decoding)
    valid, flawless = RegionValidity("any_valid"), RegionValidity("all_valid")
    assert [valid(t) for t in played] == [1, 0, 1, 1]
    assert [flawless(t) for t in played] == [1, 0, 0, 0]


class Judge(Reward):
    """A service that answers with these values, one call each."""

    def __init__(self, values: list[float], weight: float = 1.0, requires: str | None = None) -> None:
        super().__init__(weight, requires)
        self.values = iter(values)

    def __call__(self, trajectory: Trajectory) -> float:
        return next(self.values)


FOUR = [trajectory(say(RIGHT))] * 4


def test_components_are_neither_weighted_nor_gated_and_totals_are_both() -> None:
    rewards = {"gate": Judge([0, 0.2, 1, -1], weight=10), "paid": Judge([1, 2, 3, 4], weight=0.5, requires="gate")}
    components, totals = score(rewards, FOUR)
    assert components["gate"].tolist() == pytest.approx([0, 0.2, 1, -1])
    assert components["paid"].tolist() == [1, 2, 3, 4]
    assert totals.tolist() == pytest.approx([0 + 0, 2 + 1, 10 + 1.5, -10 + 0])


def test_the_order_of_components_does_not_matter_to_gates() -> None:
    rewards = {"paid": Judge([1, 1, 1, 1], requires="gate"), "gate": Judge([0, 1, 0, 1])}
    assert score(rewards, FOUR)[1].tolist() == [0, 2, 0, 2]


def test_a_failed_judgement_is_excluded_wherever_it_counts() -> None:
    rewards = {
        "gate": Judge([1, math.nan, 0, 1]),
        "paid": Judge([math.nan, 1, math.nan, 1], requires="gate"),
    }
    components, totals = score(rewards, FOUR)
    assert components["paid"].isnan().tolist() == [True, False, True, False]
    # the third one's gate is closed: what was not judged would not have paid
    assert totals.isnan().tolist() == [True, True, False, False]
    assert totals[2:].tolist() == [0, 2]


def test_a_component_without_weight_is_watched_and_cannot_fail_a_trajectory() -> None:
    rewards = {"accuracy": Accuracy(), "watched": Judge([math.nan, 5, 5, 5], weight=0.0)}
    components, totals = score(rewards, FOUR)
    assert components["watched"].isnan().tolist() == [True, False, False, False]
    assert totals.tolist() == [1, 1, 1, 1]


def test_unknown_gates_are_refused() -> None:
    rewards: dict[str, Reward] = {"accuracy": Accuracy(), "region": RegionValidity(requires="acuracy")}
    with pytest.raises(ValueError, match=r"`rewards.region.requires` to be one of \['accuracy', 'region'\]"):
        check_gates(rewards)
    with pytest.raises(ValueError, match="acuracy"):
        RolloutCallback(rewards=rewards)


def test_every_argument_of_a_component_acts() -> None:
    both = trajectory(refused("12345" + TURNED), look("1234567" + BOX), say(RIGHT))
    assert Length(0.01, 1.0)(both) == pytest.approx(0.01 * (5 + 27 + 7 + 27 + 26))
    assert Length(0.01, 1.0, of="shortest_segment")(both) == pytest.approx(0.05)
    assert Length(0.01, 0.03, of="shortest_segment")(both) == 0.03
    assert (RegionValidity()(both), RegionValidity("all_valid")(both)) == (1, 0)
    bare = trajectory(say("<answer>7</answer>"))
    assert (Format()(bare), Format("final_answer")(bare)) == (0, 1)


def test_a_question_without_known_answers_is_not_judged() -> None:
    assert math.isnan(Accuracy()(trajectory(say(RIGHT), answers=())))
    assert Accuracy()(trajectory(say(""), answers=("",))) == 0
