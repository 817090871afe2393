"""Rewards that belong to turns: a value for each, weighted and gated as the trajectory's, failures left out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from modules.rewards import IoU, RegionValidity, Reward, TurnReward, credited_by_turn, score, score_turns
from modules.rewards import base as rewards_base
from modules.trajectory import Region, Trajectory, Turn
from tests.test_rewards import BOX, look, refused, say, trajectory

NAN = math.nan
HALF = (0.0, 0.0, 64.0, 32.0)
QUARTER = (0.0, 0.0, 32.0, 32.0)  # IoU with HALF: 1 / 2
WHOLE = (0.0, 0.0, 64.0, 64.0)


@pytest.fixture(autouse=True)
def _nothing_reported_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards_base, "_REPORTED", set())


class Told(TurnReward):
    """Gives each turn what it is told; raises where that is an exception."""

    def __init__(self, *values: Any, **options: Any) -> None:
        super().__init__(**options)
        self.values = values

    def turns(self, trajectory: Trajectory) -> list[float]:
        (own,) = (v for t, v in self.values if t is trajectory)
        if isinstance(own, Exception):
            raise own
        return own  # type: ignore[no-any-return]


class Together(Told):
    """All at once."""

    def batch_turns(self, trajectories: Any) -> Any:
        return [(9.0, self.turns(t)) for t in trajectories]


class Constant(Reward):
    """One value for each trajectory."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = values

    def __call__(self, trajectory: Trajectory) -> float:
        raise NotImplementedError

    def batch(self, trajectories: Any) -> list[float]:
        return list(self.values)


def same(a: Any, b: Any) -> bool:
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), equal_nan=True)


def test_a_box_is_valid_or_not_in_its_own_turn() -> None:
    unseen = Turn(BOX, 0, 0, region=Region(HALF))  # the last turn was over
    played = trajectory(look("", HALF), refused(""), look("", WHOLE), look("", HALF), unseen, say(""))
    assert same(RegionValidity().turns(played), [1, 0, 1, 1, NAN, NAN])
    assert same(RegionValidity(max_area=0.9, max_overlap=0.9).turns(played), [1, 0, 0, 0, NAN, NAN])


def test_each_look_has_its_own_iou() -> None:
    played = trajectory(look("", QUARTER), refused(""), look("", HALF), say(""))
    assert same(IoU().turns(played), [NAN] * 4)  # nothing is annotated
    played = replace(played, sample=replace(played.sample, regions=(Region(HALF),)))
    assert same(IoU().turns(played), [0.5, NAN, 1.0, NAN])
    assert (IoU("best")(played), IoU("mean")(played), IoU("last")(played)) == (1, 0.75, 1)


def test_of_a_trajectory_it_is_the_mean_over_turns_unless_it_says_otherwise() -> None:
    a, b = trajectory(say(""), say(""), say("")), trajectory(say(""))
    reward = Told((a, [0.5, NAN, 1.0]), (b, [NAN]))
    assert (reward(a), reward(b)) == (0.75, 0)


def test_turns_are_weighted_and_gated_as_their_trajectory_is() -> None:
    played = [trajectory(say(""), say("")) for _ in range(4)]
    told = [(t, [1.0, 0.5]) for t in played[:3]] + [(played[3], [NAN, NAN])]
    rewards = {"gate": Constant(1.0, 0.0, NAN, 1.0), "told": Told(*told, weight=2.0, requires="gate")}
    components, totals, pay = score_turns(rewards, played)
    assert same(components["told"], [0.75, 0.75, 0.75, 0.0])
    assert same(totals, [2.5, 0.0, NAN, 1.0])
    assert same(pay.whole, [[1.5, 0.0, NAN, 0.0]])
    assert same(pay.turns, [[[2.0, 1.0], [0.0, 0.0], [NAN, NAN], [NAN, NAN]]])
    assert same(pay.of(slice(1, 3)).turns, pay.turns[:, 1:3])


def test_components_and_totals_are_those_of_score() -> None:
    played = [
        trajectory(look("", HALF), say("<answer>7</answer>")),
        trajectory(say("")),
        trajectory(refused(""), look("", WHOLE), look("", QUARTER)),
    ]
    rewards = {
        "length": Constant(0.3, 0.2, 0.1),
        "region": RegionValidity("all_valid", weight=0.5, requires="length"),
        "iou": IoU(weight=0.0),  # not known, and only watched
    }
    found, expected = score_turns(rewards, played), score(rewards, played)
    assert list(found[0]) == list(expected[0])
    assert all(torch.equal(found[0][k].nan_to_num(-1), expected[0][k].nan_to_num(-1)) for k in rewards)
    assert torch.equal(found[1], expected[1])
    assert credited_by_turn(rewards) == ["region"]
    assert found[2].turns.shape == (1, 3, 3)  # padded to the longest trajectory
    assert same(found[2].turns[0], [[0.5, NAN, NAN], [NAN] * 3, [0.0, 0.5, 0.5]])


@pytest.mark.parametrize("kind", [Told, Together])
@pytest.mark.parametrize("bad", [ZeroDivisionError("by zero"), [0.5], [0.5, math.inf], [0.5, "1"], 0.5])
def test_a_failure_is_named_and_counts_nowhere(kind: Any, bad: Any, caplog: pytest.LogCaptureFixture) -> None:
    a, b = trajectory(say(""), say("")), trajectory(say(""), say(""))
    components, totals, pay = score_turns({"told": kind((a, [0.5, 1.0]), (b, bad))}, [a, b])
    together = kind is Together and isinstance(bad, Exception)  # who judges all at once fails at once
    assert totals.isnan().tolist() == [together, True]
    assert torch.equal(components["told"].isnan(), totals.isnan())
    assert pay.turns[0, 1].isnan().all()
    assert bool(pay.turns[0, 0].isnan().any()) == together
    assert "reward `told` failed" in caplog.text


def test_without_turn_rewards_or_trajectories_there_is_nothing_to_credit() -> None:
    played = [trajectory(say(""), say(""))]
    *_, pay = score_turns({"a": Constant(1.0), "iou": IoU(weight=0.0)}, played)
    assert (pay.whole.shape, pay.turns.shape) == ((0, 1), (0, 1, 2))
    _, totals, pay = score_turns({"iou": IoU()}, [])
    assert (totals.shape, pay.turns.shape) == ((0,), (1, 0, 0))
