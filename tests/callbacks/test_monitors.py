"""Monitors on a real Trainer: each action acts, once and only when it should; correlations are those of numpy."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from callbacks.monitors import Monitors, Rule, SetWeight, pearson, surprisal
from callbacks.rollout import RolloutCallback
from callbacks.throughput import Throughput
from modules.backbones.timm_lm import TimmLMBackbone
from modules.engine import Decoding, GroupSampler
from modules.functional.kinds import KINDS, token_kinds
from modules.policy import PolicyError
from modules.rewards import Reward
from modules.rgrpo import Objective, RGRPOModule
from modules.sft import SFTModule
from modules.trajectory import Group, SampleBatch, Trajectory
from tests.conftest import make_samples
from tests.fitting import Batches, fit, fresh, trainer
from tests.writing import spell, written

SGD = partial(torch.optim.SGD, lr=1e-3)
EVERY_BATCH = Objective(drop_zero_variance=False)  # is a step
DECODING = Decoding(1.0, max_turns=3, max_turn_tokens=8)


class Scheduled(Reward):
    """One value for all trajectories of an iteration; its curve is what a test wants it to be."""

    def __init__(self, *values: float, weight: float = 0.0) -> None:
        super().__init__(weight)
        self.values = iter(values)

    def __call__(self, trajectory: Trajectory) -> float:
        raise NotImplementedError

    def batch(self, trajectories: Sequence[Trajectory]) -> list[float]:
        return [next(self.values)] * len(trajectories)


class Words(Reward):
    """Differs between nearly all trajectories; may not know of some of them, as good as at random."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails

    def __call__(self, trajectory: Trajectory) -> float:
        log_prob = float(trajectory.log_probs.sum())
        return math.nan if self.fails and int(-1e3 * log_prob) % 3 == 0 else len(trajectory.text) + log_prob


class Digits(Reward):
    """Some of the trajectories have one, of either length."""

    def __call__(self, trajectory: Trajectory) -> float:
        return float(sum(c.isdigit() for c in trajectory.text))


class Seen(L.Callback):
    """The groups of each iteration, as they were trained."""

    def __init__(self) -> None:
        self.groups: list[list[Group]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, out: Any, batch: Any, k: int) -> None:
        self.groups.append(list(batch.groups))


class NowAndThen(L.Callback):
    """Logs the same value at every other batch."""

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2 == 0:
            module.log("train/now_and_then", 1.0)


def rolling(**rewards: Reward) -> RolloutCallback:
    return RolloutCallback(sampler=GroupSampler(4), rewards={"words": Words(), **rewards}, decoding=DECODING)


def ran(
    backbone: TimmLMBackbone, steps: int, *callbacks: L.Callback, **options: Any
) -> tuple[L.Trainer, list[dict[str, float]]]:
    """A run of so many batches; what was logged after each of them."""
    rows: list[dict[str, float]] = []

    class Rows(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    resumed = options.pop("ckpt_path", None)
    runner = trainer(None, *callbacks, Rows(), max_steps=steps, max_epochs=-1, **options)
    batches = [SampleBatch(make_samples(2))] * 9
    runner.fit(RGRPOModule(fresh(backbone), optimizer=SGD, objective=EVERY_BATCH), Batches(batches), ckpt_path=resumed)
    return runner, rows


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "callbacks.monitors"]


HIGH = Rule("train/reward/curve", above=0.5, patience=2)


def test_a_breach_is_said_once_and_counted(zooming: TimmLMBackbone, caplog: pytest.LogCaptureFixture) -> None:
    rollout = rolling(curve=Scheduled(1, 1, 1, 0, 1, 0, 1, 1))
    with caplog.at_level(logging.WARNING):
        runner, rows = ran(zooming, 8, rollout, Monitors({"high": HIGH}))
    assert [row["train/monitor/high"] for row in rows] == [0, 1, 1, 1, 1, 1, 1, 2]
    said = "Monitor `high`: train/reward/curve is 1; it was above 0.5 2 times in a row."
    assert warnings(caplog) == [said] * 2
    assert "train/monitor/high" in runner.logged_metrics  # in TensorBoard too
    assert runner.global_step == 8


def test_a_rule_that_is_kept_says_nothing(zooming: TimmLMBackbone, caplog: pytest.LogCaptureFixture) -> None:
    between = Rule("train/reward/curve", below=0.0, above=1.0)  # the bounds themselves are allowed
    with caplog.at_level(logging.WARNING):
        _, rows = ran(zooming, 3, rolling(curve=Scheduled(1, 0, 0.5)), Monitors({"between": between}))
    assert [row["train/monitor/between"] for row in rows] == [0, 0, 0]
    assert warnings(caplog) == []


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_both_bounds_hold(zooming: TimmLMBackbone, value: float) -> None:
    rule = Rule("train/reward/curve", below=0.0, above=1.0)
    _, rows = ran(zooming, 1, rolling(curve=Scheduled(value)), Monitors({"between": rule}))
    assert rows[0]["train/monitor/between"] == 1


def test_stop_ends_the_run_cleanly(zooming: TimmLMBackbone, caplog: pytest.LogCaptureFixture) -> None:
    rule = Rule("train/reward/curve", below=0.5, patience=2, action="stop")
    with caplog.at_level(logging.WARNING):
        runner, rows = ran(zooming, 9, rolling(curve=Scheduled(0, 1, 0, 0, 0, 0)), Monitors({"low": rule}))
    assert runner.global_step == len(rows) == 4
    assert not runner.interrupted
    assert rows[-1]["train/monitor/low"] == 1
    assert warnings(caplog) == [
        "Monitor `low`: train/reward/curve is 0; it was below 0.5 2 times in a row. The run stops."
    ]


def test_a_weight_changes_what_the_next_iteration_learns_from(zooming: TimmLMBackbone) -> None:
    rule = Rule("train/reward/curve", above=0.5, patience=2, action=SetWeight("digits", 0.25))
    rollout, seen = rolling(curve=Scheduled(1, 1, 0, 0), digits=Digits(weight=3.0)), Seen()
    ran(zooming, 4, rollout, Monitors({"high": rule}), seen)
    groups = [g for made in seen.groups for g in made]
    assert any(g.rewards["digits"].any() for g in groups[:4])
    assert any(g.rewards["digits"].any() for g in groups[4:])
    for made, weight in zip(seen.groups, (3.0, 3.0, 0.25, 0.25), strict=True):  # it stays, though the curve is fine
        for group in made:
            torch.testing.assert_close(group.totals, group.rewards["words"] + weight * group.rewards["digits"])


def test_rules_go_on_after_a_resume(zooming: TimmLMBackbone, tmp_path: Path) -> None:
    rules = {
        "patient": Rule("train/reward/curve", above=0.5, patience=4),
        "quick": Rule("train/reward/curve", above=0.5, action=SetWeight("digits", 0.0)),
    }

    def run(steps: int, done: int = 0, **options: Any) -> tuple[list[dict[str, float]], RolloutCallback]:
        rollout = rolling(curve=Scheduled(*([1.0] * (steps - done))), digits=Digits())
        runner, rows = ran(zooming, steps, rollout, Monitors(rules, window=3), **options)
        runner.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return rows, rollout

    whole, _ = run(5)
    first, _ = run(3)
    again, rollout = run(5, 3, ckpt_path=str(tmp_path / "3.ckpt"))
    assert [r["train/monitor/patient"] for r in whole] == [0, 0, 0, 1, 1]
    assert [r["train/monitor/patient"] for r in first + again] == [0, 0, 0, 1, 1]
    assert [r["train/monitor/quick"] for r in again] == [1, 1]  # not said again
    assert rollout.rewards["digits"].weight == 0.0  # though it was not said again


def test_resumed_rules_do_not_start_anew(zooming: TimmLMBackbone, tmp_path: Path) -> None:
    """The control of the test above: without their state they would wait again, and the weight would be back."""
    rules = {"patient": Rule("train/reward/curve", above=0.5, patience=4)}
    runner, _ = ran(zooming, 3, rolling(curve=Scheduled(1, 1, 1)), Monitors(rules))
    runner.save_checkpoint(tmp_path / "3.ckpt")
    path = str(tmp_path / "3.ckpt")
    renamed = {"another": rules["patient"]}
    _, rows = ran(zooming, 4, rolling(curve=Scheduled(1)), Monitors(renamed), ckpt_path=path)
    assert [row["train/monitor/another"] for row in rows] == [0]
    _, rows = ran(zooming, 4, rolling(curve=Scheduled(1)), Monitors(rules), ckpt_path=path)
    assert [row["train/monitor/patient"] for row in rows] == [1]


def test_a_run_that_is_resumed_into_a_breach_stops_again(zooming: TimmLMBackbone, tmp_path: Path) -> None:
    rules = {"high": Rule("train/reward/curve", above=0.5, patience=2, action="stop")}
    runner, rows = ran(zooming, 9, rolling(curve=Scheduled(1, 1, 1)), Monitors(rules))
    assert len(rows) == 2
    runner.save_checkpoint(tmp_path / "stopped.ckpt")
    for value, steps in ((1.0, 1), (0.0, 3)):  # still above; or mended
        again = Monitors(rules)
        rollout = rolling(curve=Scheduled(*[value] * 3))
        _, rows = ran(zooming, 5, rollout, again, ckpt_path=str(tmp_path / "stopped.ckpt"))
        assert len(rows) == steps
        assert again.progress["high"].breaches == 1


def test_a_value_counts_when_it_is_logged(zooming: TimmLMBackbone) -> None:
    """At batches 0 and 2; in between it is still to be read off the trainer, and is no news."""
    rules = {"seldom": Rule("train/now_and_then", above=0.5, patience=2)}
    _, rows = ran(zooming, 4, NowAndThen(), rolling(), Monitors(rules))
    assert all(row["train/now_and_then"] == 1 for row in rows)
    assert [row["train/monitor/seldom"] for row in rows] == [0, 0, 1, 1]


def test_what_is_not_known_is_waited_for(zooming: TimmLMBackbone) -> None:
    rollout = rolling(curve=Scheduled(1, math.nan, 1, math.nan, 0))
    _, rows = ran(zooming, 5, rollout, Monitors({"high": HIGH}))
    assert [row["train/monitor/high"] for row in rows] == [0, 0, 1, 1, 1]


def test_rules_are_judged_when_logs_are_written(zooming: TimmLMBackbone) -> None:
    rollout = rolling(curve=Scheduled(1, 0, 1, 0, 1))
    _, rows = ran(zooming, 5, rollout, Monitors({"low": Rule("train/reward/curve", below=0.5)}), log_every_n_steps=2)
    counts = [row.get("train/monitor/low") for row in rows]
    assert counts == [None, 1, 1, 1, 1]  # one breach: the values in between were never logged


def test_rules_on_validation_count_validations(zooming: TimmLMBackbone) -> None:
    monitors = Monitors({"long": Rule("val/tokens", above=0.0, patience=2)})
    _, rows = ran(zooming, 5, rolling(), monitors, limit_val_batches=1, val_check_interval=2)  # behind 2 and 4
    assert [row["train/monitor/long"] for row in rows] == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("metric", ["train/zoom_rat", "zoom_rate", "train/surprisal/boxes"])
def test_a_metric_that_there_is_not_ends_the_run(zooming: TimmLMBackbone, metric: str) -> None:
    near = {"train/surprisal/boxes": "train/surprisal/box"}.get(metric, "train/zoom_rate")
    seen = Seen()
    with pytest.raises(PolicyError, match=rf"`rules\.typo\.metric`.*no '{metric}'; the nearest are .*'{near}'"):
        ran(zooming, 5, rolling(), Monitors({"typo": Rule(metric, below=0.1)}), seen)
    assert len(seen.groups) == 1  # right after the first that was logged


def test_a_metric_of_validation_is_missed_after_one(zooming: TimmLMBackbone) -> None:
    seen = Seen()
    options: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 2}
    with pytest.raises(PolicyError, match=r"no 'val/zoom'; the nearest are .*'val/zoom_rate'"):
        ran(zooming, 5, rolling(), Monitors({"typo": Rule("val/zoom", below=0.1)}), seen, **options)
    assert len(seen.groups) == 2


def test_metrics_that_are_logged_late_or_seldom_are_no_mistakes(zooming: TimmLMBackbone, tmp_path: Path) -> None:
    names = ("train/step_seconds", "train/correlation/words-same", "train/iou", "val/tokens", "train/surprisal/answer")
    rules = {str(k): Rule(name, below=-2.0) for k, name in enumerate(names)}
    rollout = rolling(same=Scheduled(1, 1, 1))
    late = Throughput()  # which logs after the monitors
    _, rows = ran(zooming, 3, rollout, Monitors(rules), late, default_root_dir=tmp_path)
    assert "train/correlation/words-same" not in rows[-1]
    assert not any(row[f"train/monitor/{name}"] for row in rows for name in rules)


def test_a_reward_that_there_is_not_is_missed_at_the_start(zooming: TimmLMBackbone) -> None:
    rule = Rule("train/crops", above=1.0, action=SetWeight("lenght", 0.0))
    seen = Seen()
    with pytest.raises(PolicyError, match=r"`rules\.typo\.action\.reward` to be one of .*'words'.* but got 'lenght'"):
        ran(zooming, 2, rolling(), Monitors({"typo": rule}), seen)
    assert seen.groups == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({}, "neither"), ({"below": 2.0, "above": 1.0}, "2.0 and 1.0"), ({"below": 0.0, "patience": 0}, "patience")],
)
def test_impossible_rules_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule("train/crops", **wrong)
    with pytest.raises(ValueError, match="`window`"):
        Monitors({}, window=0)


def test_rules_are_read_from_a_file() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(Monitors, "monitors")
    rules = {
        "a": {"metric": "train/crops", "above": 2, "action": {"reward": "length", "to": 0}},
        "b": {"metric": "train/crops", "below": 1, "patience": 3, "action": "stop"},
        "c": {"metric": "train/crops", "below": 1},
    }
    made = parser.instantiate_classes(parser.parse_object({"monitors": {"rules": rules}})).monitors
    assert made.rules["a"] == Rule("train/crops", above=2.0, action=SetWeight("length", 0.0))
    assert made.rules["b"] == Rule("train/crops", below=1.0, patience=3, action="stop")
    assert made.rules["c"].action == "warn"


def test_correlations_are_those_of_numpy_over_the_latest_iterations(zooming: TimmLMBackbone) -> None:
    rollout, seen = rolling(digits=Digits(), failing=Words(fails=True), curve=Scheduled(1, 2, 4, 8)), Seen()
    _, rows = ran(zooming, 4, rollout, Monitors(window=2), seen)
    for k in range(1, 4):
        groups = [g for made in seen.groups[k - 1 : k + 1] for g in made]
        table = {name: torch.cat([g.rewards[name] for g in groups]).double().numpy() for name in rollout.rewards}
        advantage = torch.cat([g.advantages for g in groups]).double().numpy()
        judged = ~np.isnan(table["failing"])
        assert 2 < judged.sum() < len(judged)
        expected = {
            "words-digits": np.corrcoef(table["words"], table["digits"]),
            "words-failing": np.corrcoef(table["words"][judged], table["failing"][judged]),
            "words-curve": np.corrcoef(table["words"], table["curve"]),
            # of those that were not judged the advantage is not known either
            "advantage/digits": np.corrcoef(table["digits"][judged], advantage[judged]),
            "advantage/failing": np.corrcoef(table["failing"][judged], advantage[judged]),
        }
        for name, matrix in expected.items():
            assert rows[k][f"train/correlation/{name}"] == pytest.approx(matrix[0, 1], abs=1e-6), name
    assert "train/correlation/words-curve" not in rows[0]  # of one iteration: it does not vary
    assert len([name for name in rows[-1] if name.startswith("train/correlation/")]) == 4 * 3 / 2 + 4


def test_the_reward_that_did_it_is_the_one_that_the_advantage_follows(zooming: TimmLMBackbone) -> None:
    rollout = rolling(digits=Digits(weight=1e-3))
    _, rows = ran(zooming, 3, rollout, Monitors())
    assert rows[-1]["train/correlation/advantage/words"] > 0.5
    assert rows[-1]["train/correlation/advantage/words"] > rows[-1]["train/correlation/advantage/digits"] + 0.1


def test_correlation_of_what_does_not_vary_is_not_known() -> None:
    x = torch.tensor([1.0, 2.0, 4.0, math.nan])
    assert pearson(x, -x) == pytest.approx(-1)
    assert math.isnan(pearson(x, torch.ones(4)))
    assert math.isnan(pearson(x, torch.tensor([1.0, math.nan, math.nan, 3.0])))  # one trajectory has both


def test_surprisal_is_the_mean_of_each_kind() -> None:
    one, two = written("ab<answer>7</answer>"), written('c{"bbox_2d": 1}', "<answer>8</answer>")
    found = surprisal([one, two], spell)
    # token k of a trajectory has log-probability -k, counted from 1
    assert found["train/surprisal/answer"] == pytest.approx((11 + 27) / 2)
    assert found["train/surprisal/box"] == pytest.approx(np.mean(range(2, 16)))
    texts = [*range(1, 11), *range(12, 21), 1, *range(19, 27), *range(28, 37)]
    assert found["train/surprisal/text"] == pytest.approx(np.mean(texts))
    assert set(surprisal([one], spell)) == {"train/surprisal/text", "train/surprisal/answer"}
    assert surprisal([], spell) == {}


def test_surprisals_of_a_run_are_of_what_was_rolled_out(zooming: TimmLMBackbone) -> None:
    seen = Seen()
    _, rows = ran(zooming, 1, rolling(), Monitors(), seen)
    trajectories = [t for group in seen.groups[0] for t in group.trajectories]
    every = torch.cat([-t.log_probs[t.sampled] for t in trajectories])
    counts = [sum(int(token_kinds(t, zooming.detokenize)[kind].sum()) for t in trajectories) for kind in KINDS]
    assert sum(counts) == len(every)
    mean = sum(n * rows[0].get(f"train/surprisal/{kind}", 0.0) for n, kind in zip(counts, KINDS, strict=True))
    assert mean / len(every) == pytest.approx(float(every.mean()), rel=1e-5)


def test_supervised_runs_are_watched_too(zooming: TimmLMBackbone) -> None:
    monitors = Monitors({"done": Rule("train/loss", below=1e9, action="stop")})
    recorder = fit(SFTModule(fresh(zooming), optimizer=SGD), [SampleBatch(make_samples(2))] * 3, monitors)
    assert len(recorder.rows) == 1
    never = Monitors({"never": Rule("train/zoom_rate", below=0.5)})  # nothing is rolled out
    with pytest.raises(PolicyError, match="no 'train/zoom_rate'"):
        fit(SFTModule(fresh(zooming), optimizer=SGD), [SampleBatch(make_samples(2))] * 3, never)
