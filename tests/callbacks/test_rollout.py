"""The rollout callback on a real Trainer: fresh noise each iteration, means that add up, a line a trajectory."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.rollout import RolloutCallback
from modules.backbones.base import Backbone
from modules.backbones.timm_lm import TimmLMBackbone
from modules.engine import Decoding, GroupSampler, LocalEngine, Request, RolloutEngine
from modules.policy import PolicyModule
from modules.rewards import Accuracy, RegionValidity, Reward
from modules.rgrpo import RGRPOModule
from modules.sft import SFTModule
from modules.trajectory import Sample, SampleBatch, Trajectory
from tests.conftest import make_backbone, make_samples
from tests.fitting import Batches, fit, fresh, furthest, trainer, weights

ADAM = partial(torch.optim.AdamW, lr=1e-3)
GREEDY = Decoding(0.0, max_turns=3, max_turn_tokens=8)
SAMPLED = Decoding(1.5, max_turns=3, max_turn_tokens=8)
EVALUATION: dict[str, Any] = {"limit_val_batches": 1.0}


class Watched(RolloutEngine):
    """The local engine, and what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[int], Decoding]] = []
        self.played: list[Trajectory] = []

    def rollout(self, backbone: Backbone, requests: Sequence[Request], decoding: Decoding) -> list[Trajectory]:
        self.calls.append(([r.sample.id for r in requests], [r.seed for r in requests], decoding))
        self.played = LocalEngine().rollout(backbone, requests, decoding)
        return self.played

    @property
    def seeds(self) -> list[list[int]]:
        return [seeds for _, seeds, _ in self.calls]


class Tokens(Reward):
    """Differs between trajectories; of those of one question it knows nothing."""

    def __init__(self, unjudged: str = "") -> None:
        super().__init__()
        self.unjudged = unjudged

    def __call__(self, trajectory: Trajectory) -> float:
        if trajectory.sample.id == self.unjudged:
            return math.nan
        return float(trajectory.sampled.sum()) + float(trajectory.log_probs.sum()) / 100


def training(engine: RolloutEngine, **options: Any) -> RolloutCallback:
    options = {"rewards": {"tokens": Tokens()}, **options}
    return RolloutCallback(engine=engine, sampler=GroupSampler(3), decoding=SAMPLED, **options)


def test_each_iteration_has_noise_of_its_own_and_a_resumed_run_goes_on_with_it(
    zooming: TimmLMBackbone, tmp_path: Path
) -> None:
    batches = [SampleBatch(make_samples(2))]
    whole, first, rest = Watched(), Watched(), Watched()
    trainer(None, training(whole), max_steps=3, max_epochs=-1).fit(
        RGRPOModule(fresh(zooming), optimizer=ADAM), Batches(batches)
    )
    assert [ids for ids, *_ in whole.calls] == [["sample-0"] * 3 + ["sample-1"] * 3] * 3
    assert len({seed for seeds in whole.seeds for seed in seeds}) == 3 * 6
    run = trainer(tmp_path, training(first), max_steps=2, max_epochs=-1)
    run.fit(RGRPOModule(fresh(zooming), optimizer=ADAM), Batches(batches))
    run.save_checkpoint(tmp_path / "two.ckpt")
    run = trainer(tmp_path, training(rest), max_steps=3, max_epochs=-1)
    run.fit(RGRPOModule(make_backbone(seed=9), optimizer=ADAM), Batches(batches), ckpt_path=str(tmp_path / "two.ckpt"))
    assert first.seeds == whole.seeds[:2]
    assert rest.seeds == whole.seeds[2:]
    assert [t.text for t in rest.played] == [t.text for t in whole.played]


def test_another_seed_is_other_noise(zooming: TimmLMBackbone) -> None:
    found = []
    for seed in (0, 1, 20_250_519):  # a date, squared by the mixing, is beyond 64 bits
        engine = Watched()
        fit(RGRPOModule(fresh(zooming), optimizer=ADAM), [SampleBatch(make_samples(2))], training(engine, seed=seed))
        found.append(engine.seeds[0])
    assert len({seed for seeds in found for seed in seeds}) == 3 * 6


def test_groups_hold_their_own_questions_trajectories(zooming: TimmLMBackbone) -> None:
    samples, engine = make_samples(3), Watched()
    callback = training(engine, rewards={"tokens": Tokens(), "region": RegionValidity(weight=0.5)})
    module = RGRPOModule(fresh(zooming), optimizer=ADAM)
    seen: list[SampleBatch] = []
    module.training_step = lambda batch, batch_idx: seen.append(batch)  # type: ignore[method-assign,assignment]
    (row,) = fit(module, [SampleBatch(samples)], callback).rows
    groups = seen[0].groups
    assert [g.sample.id for g in groups] == [s.id for s in samples]
    assert [t for g in groups for t in g.trajectories] == engine.played
    tokens, region = Tokens(), RegionValidity()
    for group in groups:
        assert all(t.sample.id == group.sample.id for t in group.trajectories)
        assert group.rewards["tokens"].tolist() == pytest.approx([tokens(t) for t in group.trajectories])
        totals = torch.tensor([tokens(t) + 0.5 * region(t) for t in group.trajectories])
        torch.testing.assert_close(group.totals, totals)
        torch.testing.assert_close(group.advantages, (totals - totals.mean()) / (totals.std() + 1e-4))
    played = engine.played
    assert row["train/reward/region"] == pytest.approx(sum(map(region, played)) / len(played))
    zoomed = sum(any(turn.crop is not None for turn in t.turns) for t in played)
    assert row["train/zoom_rate"] == pytest.approx(zoomed / len(played))
    assert row["train/tokens"] == pytest.approx(sum(int(t.sampled.sum()) for t in played) / len(played))
    assert row["train/reward/group_std"] == pytest.approx(float(torch.stack([g.totals.std() for g in groups]).mean()))
    assert row["train/advantage/zero_groups"] == 0
    assert row["train/reward/failed"] == 0


def test_failed_judgements_are_counted_and_left_out_of_means(zooming: TimmLMBackbone) -> None:
    engine = Watched()
    callback = training(engine, rewards={"tokens": Tokens(unjudged="sample-0")})
    (row,) = fit(RGRPOModule(fresh(zooming), optimizer=ADAM), [SampleBatch(make_samples(3))], callback).rows
    judged = [Tokens()(t) for t in engine.played if t.sample.id != "sample-0"]
    assert row["train/reward/failed"] == pytest.approx(1 / 3)
    assert row["train/reward/tokens"] == pytest.approx(sum(judged) / 6, rel=1e-5)
    assert row["train/reward/total"] == pytest.approx(sum(judged) / 6, rel=1e-5)
    assert row["train/advantage/zero_groups"] == pytest.approx(1 / 3)


def test_supervised_training_rolls_nothing_out() -> None:
    engine = Watched()
    fit(SFTModule(make_backbone(), optimizer=ADAM), [SampleBatch(make_samples(2))], training(engine))
    assert engine.calls == []


def told(backbone: TimmLMBackbone, count: int) -> list[Sample]:
    """Questions whose right answer is what this policy says."""
    samples = make_samples(count)
    played = LocalEngine().rollout(backbone, [Request(s, 0) for s in samples], GREEDY)
    assert all(t.answer for t in played)
    return [replace(s, answers=(str(t.answer),)) for s, t in zip(samples, played, strict=True)]


@pytest.mark.parametrize("stage", ["val", "test"])
def test_accuracy_is_the_share_of_right_answers(zooming: TimmLMBackbone, stage: str, tmp_path: Path) -> None:
    samples = told(zooming, 4)
    samples[1], samples[3] = (replace(s, answers=("none of these",)) for s in (samples[1], samples[3]))
    # 2 of 4; a mean of the batches' means would be (2/3 + 0) / 2
    batches = [SampleBatch(samples[:3]), SampleBatch([]), SampleBatch(samples[3:])]
    callback = RolloutCallback(rewards={"accuracy": Accuracy()}, evaluations={"greedy": GREEDY, "noisy": SAMPLED})
    run = trainer(tmp_path, callback, **EVALUATION)
    module = SFTModule(fresh(zooming))
    (metrics,) = {"val": run.validate, "test": run.test}[stage](module, Batches(batches), verbose=False)
    assert metrics[f"{stage}/accuracy"] == 0.5
    assert 0 <= metrics[f"{stage}/noisy/accuracy"] <= 1
    played = LocalEngine().rollout(zooming, [Request(s, 0) for s in samples], GREEDY)
    zoomed = sum(any(turn.crop is not None for turn in t.turns) for t in played)
    assert metrics[f"{stage}/zoom_rate"] == pytest.approx(zoomed / 4)
    assert metrics[f"{stage}/tokens"] == pytest.approx(sum(int(t.sampled.sum()) for t in played) / 4)


def test_means_are_over_what_could_be_judged(zooming: TimmLMBackbone) -> None:
    samples = make_samples(4)
    batches = [SampleBatch(samples[:3]), SampleBatch(samples[3:])]
    for unjudged in ("sample-1", "sample-3"):  # one of three; all of a batch
        callback = RolloutCallback(rewards={"tokens": Tokens(unjudged)}, evaluations={"greedy": GREEDY})
        (metrics,) = trainer(None, callback, **EVALUATION).validate(
            SFTModule(fresh(zooming)), Batches(batches), verbose=False
        )
        played = LocalEngine().rollout(zooming, [Request(s, 0) for s in samples if s.id != unjudged], GREEDY)
        assert metrics["val/reward/tokens"] == pytest.approx(sum(map(Tokens(), played)) / 3, rel=1e-5)


def test_an_evaluation_does_not_depend_on_batches_or_on_training(zooming: TimmLMBackbone) -> None:
    samples, seeds = make_samples(4), []
    for batches in ([samples], [samples[:1], samples[1:]]):
        engine = Watched()
        callback = RolloutCallback(engine=engine, evaluations={"noisy": SAMPLED})
        callback.iteration = len(batches)
        trainer(None, callback, **EVALUATION).validate(
            SFTModule(fresh(zooming)), Batches([SampleBatch(b) for b in batches]), verbose=False
        )
        seeds.append([seed for call in engine.seeds for seed in call])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 4


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_predictions_are_a_line_a_sample_and_mode(zooming: TimmLMBackbone, stage: str, tmp_path: Path) -> None:
    samples = [replace(s, meta={"image_id": 7}) for s in make_samples(3)]
    rewards = {"accuracy": Accuracy(), "tokens": Tokens(unjudged="sample-1")}
    evaluations = {"greedy": GREEDY, "noisy": SAMPLED}
    callback = RolloutCallback(rewards=rewards, evaluations=evaluations)
    run = trainer(tmp_path, callback)
    batches = Batches([SampleBatch(samples[:2]), SampleBatch([]), SampleBatch(samples[2:])])
    module = SFTModule(fresh(zooming))
    _ = run.test(module, batches, verbose=False) if stage == "test" else run.predict(module, batches)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    text = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    expected = [(sample.id, mode) for sample in samples for mode in evaluations]
    assert sorted((line["id"], line["mode"]) for line in lines) == sorted(expected)
    played = LocalEngine().rollout(zooming, [Request(s, 0) for s in samples], GREEDY)
    for t in played:
        (line,) = [x for x in lines if x["id"] == t.sample.id and x["mode"] == "greedy"]
        assert (line["text"], line["answer"], line["stop"]) == (t.text, t.answer, t.stop.value)
        assert line["boxes"] == [list(region.box) for region in t.regions]
        assert (line["zooms"], line["source"]) == ([None] * len(t.regions), t.sample.source)
        assert (line["question"], line["answers"], line["image_id"]) == (t.sample.question, list(t.sample.answers), "7")
        if stage == "test":
            assert line["correct"] == int(Accuracy()(t))
            assert (line["rewards"]["tokens"] is None) == (t.sample.id == "sample-1")
        else:
            assert line["rewards"] == {}
            assert "correct" not in line
    assert callback._predictions is None  # closed


@pytest.mark.parametrize("kind", [SFTModule, RGRPOModule])
def test_batches_without_samples_pass_through(kind: type[PolicyModule], tmp_path: Path) -> None:
    module = kind(make_backbone(), optimizer=ADAM)
    before = weights(module)
    callback = training(Watched(), evaluations={"greedy": GREEDY})
    batches = Batches([SampleBatch([]), SampleBatch([])])
    run = trainer(tmp_path, callback, max_epochs=1, **EVALUATION)
    run.fit(module, batches)
    assert run.global_step == 0
    assert furthest(weights(module), before) == 0
    assert callback.iteration == (2 if isinstance(module, RGRPOModule) else 0)  # in step with ranks that had some
    assert run.validate(module, batches, verbose=False) == [{}]
    assert run.test(module, batches, verbose=False) == [{}]
    assert (tmp_path / "predictions.jsonl").read_text() == ""


def test_rollouts_keep_what_autocast_casts_and_training_does_not(zooming: TimmLMBackbone) -> None:
    kept: list[bool] = []

    class Asked(Watched):
        def rollout(self, backbone: Backbone, requests: Sequence[Request], decoding: Decoding) -> list[Trajectory]:
            kept.append(torch.is_autocast_cache_enabled())
            return super().rollout(backbone, requests, decoding)

    before = torch.is_autocast_cache_enabled()
    runner = trainer(None, training(Asked()), max_steps=1, max_epochs=-1, precision="bf16-mixed")
    runner.fit(RGRPOModule(fresh(zooming), optimizer=ADAM), Batches([SampleBatch(make_samples(2))]))
    assert kept
    assert all(kept)
    assert torch.is_autocast_cache_enabled() == before
