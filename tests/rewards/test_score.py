"""Rewards that fail: named, counted, left out, and never scored."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from callbacks.rollout import RolloutCallback
from modules.backbones.timm_lm import TimmLMBackbone
from modules.engine import Decoding, GroupSampler, LocalEngine
from modules.policy import PolicyError
from modules.rewards import Reward, check_failures, score
from modules.rewards import base as rewards_base
from modules.rgrpo import RGRPOModule
from modules.trajectory import SampleBatch, Trajectory
from tests.conftest import make_samples
from tests.fitting import fit, fresh
from tests.test_rewards import say, trajectory

SAMPLED = Decoding(1.5, max_turns=3, max_turn_tokens=8)


class Told(Reward):
    """Gives, or raises, what it is told."""

    def __init__(self, *values: Any, **options: Any) -> None:
        super().__init__(**options)
        self.values = iter(values)

    def __call__(self, trajectory: Trajectory) -> float:
        value = next(self.values)
        if isinstance(value, Exception):
            raise value
        return value  # type: ignore[no-any-return]


class Batched(Reward):
    """Judges all at once, with whatever it is told."""

    def __init__(self, values: Any) -> None:
        super().__init__()
        self.values, self.calls = values, 0

    def __call__(self, trajectory: Trajectory) -> float:
        raise AssertionError("one by one")

    def batch(self, trajectories: Sequence[Trajectory]) -> list[float]:
        self.calls += 1
        if isinstance(self.values, Exception):
            raise self.values
        return self.values  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _nothing_reported_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards_base, "_REPORTED", set())


def played(count: int) -> list[Trajectory]:
    return [trajectory(say("<answer>7</answer>"))] * count


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (ZeroDivisionError("by zero"), r"ZeroDivisionError: by zero \(test_score.py:\d+\)"),
        (math.inf, "finite, but got inf"),
        (-1e300, "finite, but got -1e"),
        ("1", "a number, but got str"),
        (None, "a number, but got NoneType"),
        ([1.0], "a number, but got list"),
        (1j, "a number, but got complex"),
        (torch.ones(2), "a number, but got Tensor"),
    ],
)
def test_one_failure_is_one_trajectorys(bad: Any, why: str, caplog: pytest.LogCaptureFixture) -> None:
    rewards = {"good": Told(1, 1, 1), "bad": Told(2, bad, 3)}
    with caplog.at_level(logging.WARNING):
        components, totals = score(rewards, played(3))
    assert components["bad"].isnan().tolist() == [False, True, False]
    assert components["good"].tolist() == [1, 1, 1]
    assert totals.isnan().tolist() == [False, True, False]
    assert [float(totals[0]), float(totals[2])] == [3, 4]
    (record,) = caplog.records
    assert "reward `bad` failed: " in record.getMessage()
    assert re.search(why, record.getMessage())


def test_a_failure_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        score({"a": Told(KeyError("x"), KeyError("y")), "b": Told("1", KeyError("z"))}, played(2))
    assert [r.getMessage().split("`")[1] for r in caplog.records] == ["a", "b", "b"]


def test_what_is_a_number_is_taken_as_one() -> None:
    values = (True, 2, np.float32(3), torch.tensor(4), torch.tensor([5.0]))
    components, _ = score({"a": Told(*values)}, played(5))
    assert components["a"].tolist() == [1, 2, 3, 4, 5]
    components, _ = score({"a": Told(math.nan)}, played(1))
    assert components["a"].isnan().all()


def test_a_reward_may_judge_all_at_once() -> None:
    many = Batched([0.0, 1.0, 2.0])
    components, totals = score({"many": many}, played(3))
    assert (many.calls, components["many"].tolist(), totals.tolist()) == (1, [0, 1, 2], [0, 1, 2])
    assert score({"many": Batched(torch.arange(3))}, played(3))[1].tolist() == [0, 1, 2]
    assert Told(1, 2).batch(played(2)) == [1, 2]  # by default one by one


@pytest.mark.parametrize("bad", [[1.0, 2.0], [1.0] * 4, None, 7.0, "abc", RuntimeError("down"), {0: 1.0}])
def test_a_batch_that_fails_fails_for_all(bad: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        components, totals = score({"many": Batched(bad), "good": Told(1, 1, 1)}, played(3))
    assert components["many"].isnan().all()
    assert totals.isnan().all()
    assert "reward `many` failed" in caplog.text


def test_a_bad_value_in_a_batch_is_one_trajectorys() -> None:
    components, _ = score({"many": Batched([1.0, "2", math.inf])}, played(3))
    assert components["many"].isnan().tolist() == [False, True, True]


class Flaky(Reward):
    """Raises about all trajectories of one question, and about none of another."""

    def __init__(self, *questions: str) -> None:
        super().__init__()
        self.questions = questions

    def __call__(self, trajectory: Trajectory) -> float:
        if trajectory.sample.id in self.questions:
            raise RuntimeError("no service")
        return float(trajectory.sampled.sum()) + float(trajectory.log_probs.sum()) / 100


def train(policy: TimmLMBackbone, callback: RolloutCallback) -> tuple[dict[str, float], list[Any]]:
    module = RGRPOModule(fresh(policy), optimizer=partial(torch.optim.AdamW, lr=1e-3))
    seen: list[SampleBatch] = []
    step = module.training_step
    module.training_step = lambda batch, batch_idx: (seen.append(batch), step(batch, batch_idx))[1]  # type: ignore[method-assign,assignment]
    (row,) = fit(module, [SampleBatch(make_samples(2))], callback).rows
    return row, seen[0].groups


def flaky(*questions: str, **options: Any) -> RolloutCallback:
    rewards: dict[str, Reward] = {"flaky": Flaky(*questions), "steady": Flaky()}
    return RolloutCallback(LocalEngine(), GroupSampler(3), rewards, SAMPLED, **options)


def test_a_group_that_failed_teaches_nothing_and_training_goes_on(zooming: TimmLMBackbone) -> None:
    row, (failed, judged) = train(zooming, flaky("sample-0"))
    assert failed.totals.isnan().all()
    assert failed.advantages.tolist() == [0, 0, 0]
    assert not judged.totals.isnan().any()
    assert judged.advantages.abs().max() > 0.1
    assert row["train/reward/failed"] == 0.5
    assert row["train/reward/failed/flaky"] == 0.5
    assert row["train/reward/failed/steady"] == 0
    assert math.isfinite(row["train/reward/total"])


def test_too_many_failures_end_the_run_where_that_is_asked_for(zooming: TimmLMBackbone) -> None:
    row, _ = train(zooming, flaky("sample-0", max_failed=0.5))
    assert row["train/reward/failed"] == 0.5
    with pytest.raises(PolicyError, match=r"at most 40% .* got 50% of 6: flaky 3\."):
        train(zooming, flaky("sample-0", max_failed=0.4))


def test_the_limit_itself_is_allowed() -> None:
    totals = torch.tensor([1.0, math.nan])
    rewards = {"a": Told(weight=0.0), "b": Told(requires="a"), "c": Told(), "watched": Told(weight=0.0)}
    values = {"a": totals, "b": totals, "c": torch.ones(2), "watched": totals}
    check_failures(rewards, values, totals, 0.5)
    with pytest.raises(PolicyError, match=r"got 50% of 2: a 1, b 1\."):
        check_failures(rewards, values, totals, 0.49)


@pytest.mark.parametrize("share", [-0.1, 20.0, float("nan")])
def test_the_share_that_may_fail_is_a_share(share: float) -> None:
    with pytest.raises(ValueError, match="`max_failed` to be a share"):
        RolloutCallback(max_failed=share)
