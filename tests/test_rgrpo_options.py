"""What R-GRPO can be told besides: penalties, entropy, corrections, a moving reference, dynamic sampling."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from modules.backbones.timm_lm import TimmLMBackbone
from modules.rgrpo import Objective, RGRPOModule
from modules.scoring import collate, token_log_probs
from modules.trajectory import Group, SampleBatch, StopReason, Trajectory
from tests.conftest import make_backbone, make_samples
from tests.fitting import Batches, fit, fresh, furthest, plain_logits, trainer, weights
from tests.learning import ADAM, SGD, TOTALS, Writes, groups, rolled, step


class Seen(L.Callback):
    """The groups of each batch as the training step leaves them."""

    def __init__(self) -> None:
        self.groups: list[list[Group]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.groups.append(list(args[3].groups))


def drifted(objective: Objective, zooming: TimmLMBackbone, **options: Any) -> RGRPOModule:
    """A policy that has left its reference."""
    options = {"optimizer": SGD, "clip_norm": 1e9, **options}
    module = RGRPOModule(make_backbone(seed=4), objective=objective, **options)
    module.backbone.load_state_dict(zooming.state_dict())
    return module


@torch.no_grad()
def log_probs_of(backbone: TimmLMBackbone, trajectory: Trajectory) -> Tensor:
    """(T,) of its sampled tokens, by a full pass of its own."""
    logits = plain_logits(backbone, trajectory)[trajectory.sampled].masked_fill(backbone.banned, -torch.inf)
    return logits.log_softmax(-1).gather(1, trajectory.completion_ids[trajectory.sampled][:, None])[:, 0]


class TestPenalties:
    @pytest.mark.parametrize("kl", ["k1", "k3"])
    @pytest.mark.parametrize("micro_batch", [None, 2])
    def test_kl_in_the_reward(self, zooming: TimmLMBackbone, kl: Any, micro_batch: int | None) -> None:
        objective = Objective(beta=0.05, kl=kl, kl_in="reward", scale_by_std=False, baseline="leave_one_out")
        module = drifted(objective, zooming, micro_batch=micro_batch)
        made, seen = groups(zooming, [*TOTALS, [1.0, 1.0, 1.0]]), Seen()
        assert module.reference is not None
        (row,) = fit(module, [SampleBatch([g.sample for g in made], groups=made)], seen).rows
        expected, divergences, tokens = [], 0.0, 0
        for group in made:
            row_totals = []
            for t, total in zip(group.trajectories, group.totals.tolist(), strict=True):
                reference = log_probs_of(module.reference.backbone, t)  # type: ignore[arg-type]
                d = (t.log_probs[t.sampled] - reference).double()
                divergence = float((d if kl == "k1" else torch.exp(-d) - 1 + d).sum())
                row_totals.append(total - 0.05 * divergence)
                divergences, tokens = divergences + divergence, tokens + len(d)
            expected.append(row_totals)
        (found,) = seen.groups
        for group, totals in zip(found, expected, strict=True):
            assert group.totals.tolist() == pytest.approx(totals, abs=1e-3)
            others = [(sum(totals) - r) / 2 for r in totals]
            assert group.advantages.tolist() == pytest.approx(
                [r - o for r, o in zip(totals, others, strict=True)], abs=1e-3
            )
        assert found[3].advantages.abs().max() > 0.01  # rewards tie, divergences do not
        assert row["train/kl"] == pytest.approx(divergences / tokens, rel=1e-3)
        assert row["train/reward/penalised"] == pytest.approx(sum(map(sum, expected)) / 12, abs=1e-3)
        assert row["train/advantage/zero_groups"] == 0
        # the loss has no penalty of its own: the step is that of these advantages
        plain = step(zooming, list(found), Objective())
        assert furthest(weights(module.backbone), plain) < 1e-4 * furthest(plain, weights(zooming))

    def test_a_truncated_trajectory_pays(self, zooming: TimmLMBackbone) -> None:
        made, seen = groups(zooming, TOTALS), Seen()
        group = made[0]
        cut = replace(group.trajectories[1], stop=StopReason.TURN_LENGTH)
        whole = [replace(t, stop=StopReason.ANSWER) for t in group.trajectories]
        group = replace(group, trajectories=(whole[0], cut, whole[2]))
        module = RGRPOModule(fresh(zooming), optimizer=SGD, objective=Objective(truncation_penalty=0.7, epsilon=0.0))
        fit(module, [SampleBatch([group.sample], groups=[group])], seen)
        ((found,),) = seen.groups
        assert found.totals.tolist() == pytest.approx([0.0, 1.0 - 0.7, 0.0])
        assert found.advantages.tolist() == pytest.approx([-(3**-0.5), 2 * 3**-0.5, -(3**-0.5)])

    def test_curves_are_of_the_advantages_that_are_learned_from(self, zooming: TimmLMBackbone) -> None:
        """The rollout callback has logged those of the rewards alone, under the same names, before."""
        seen, objective = Seen(), Objective(beta=0.3, kl_in="reward", scale_by_std=False)
        module = drifted(objective, zooming)
        (row,) = fit(module, [SampleBatch(make_samples(3))], rolled(Writes(-1)), seen).rows  # which nobody does
        advantages = torch.stack([g.advantages for g in seen.groups[0]])
        assert row["train/reward/total"] == 0
        assert row["train/reward/group_std"] == 0
        assert row["train/advantage/std"] == pytest.approx(float(advantages.std()), rel=1e-5)
        assert advantages.std() > 0.1
        assert row["train/advantage/zero_groups"] == pytest.approx(float((advantages == 0).all(-1).float().mean()))
        assert row["train/advantage/zero_groups"] < 1  # of rewards alone it would be

    def test_a_judgement_that_failed_stays_failed(self, zooming: TimmLMBackbone) -> None:
        made, seen = groups(zooming, [[1.0, float("nan"), 0.0]]), Seen()
        module = drifted(Objective(beta=0.1, kl_in="reward"), zooming)
        fit(module, [SampleBatch([made[0].sample], groups=made)], seen)
        ((found,),) = seen.groups
        assert found.totals.isnan().tolist() == [False, True, False]
        assert found.advantages[1] == 0

    def test_without_them_nothing_is_touched(self, zooming: TimmLMBackbone) -> None:
        made, seen = groups(zooming, TOTALS), Seen()
        module = drifted(Objective(beta=0.1), zooming)
        (row,) = fit(module, [SampleBatch([g.sample for g in made], groups=made)], seen).rows
        assert all(a is b for a, b in zip(seen.groups[0], made, strict=True))
        assert "train/reward/penalised" not in row


def test_the_entropy_bonus_is_the_gradient_of_the_entropy(zooming: TimmLMBackbone) -> None:
    made = groups(zooming, [[0.0, 0.0], [1.0, 1.0]])
    backbone = fresh(zooming)
    played = [t for g in made for t in g.trajectories]
    entropies = []
    for t in played:
        logits = plain_logits(backbone, t)[t.sampled][:, ~backbone.banned]
        entropies.append(torch.distributions.Categorical(logits=logits).entropy())
    mean = torch.cat(entropies).mean()
    mean.backward()
    expected = {
        name: p.detach() + 0.1 * 0.5 * (torch.zeros_like(p) if p.grad is None else p.grad)
        for name, p in backbone.named_parameters()
    }
    objective = Objective(entropy_bonus=0.5, normalisation="token", drop_zero_variance=False)
    for options in ({}, {"head_chunk": 5, "micro_batch": 1}):
        found = step(zooming, made, objective, **options)
        assert furthest(found, weights(zooming)) > 1e-3
        assert furthest(found, expected) < 1e-6


class TestSamplerCorrection:
    def off(self, made: list[Group], by: float) -> list[Group]:
        """As if the sampler had thought every token to be less likely."""
        return [
            replace(g, trajectories=tuple(replace(t, log_probs=t.log_probs - by) for t in g.trajectories)) for g in made
        ]

    @pytest.mark.parametrize("steps", [{}, {"inner_epochs": 2}, {"mini_batches": 3}])
    def test_multiplies_by_the_capped_ratio_of_learner_and_sampler(
        self, zooming: TimmLMBackbone, steps: dict[str, int]
    ) -> None:
        """Every token was twice as likely to the learner: 1.5 after the cap, and the ratio over the learner."""
        made = groups(zooming, TOTALS)
        found = step(zooming, self.off(made, math.log(2)), Objective(sampler_correction=1.5, **steps))
        louder = [replace(g, advantages=1.5 * g.advantages) for g in made]
        expected = step(zooming, louder, Objective(**steps))
        assert furthest(found, expected) < 1e-5
        assert furthest(found, step(zooming, made, Objective(**steps))) > 1e-3
        assert furthest(found, step(zooming, self.off(made, math.log(2)), Objective(**steps))) > 1e-3

    def test_is_logged(self, zooming: TimmLMBackbone) -> None:
        made = groups(zooming, TOTALS)
        rows = {}
        for by in (0.0, math.log(2)):
            module = RGRPOModule(fresh(zooming), optimizer=SGD, objective=Objective(sampler_correction=1.5))
            (rows[by],) = fit(module, [SampleBatch([g.sample for g in made], groups=self.off(made, by))]).rows
        same, other = rows[0.0], rows[math.log(2)]
        assert same["train/sampler_correction"] == pytest.approx(1, abs=1e-5)
        assert same["train/sampler_correction_capped"] == 0
        assert same["train/sampler_gap"] < 1e-5
        assert other["train/sampler_correction"] == pytest.approx(1.5)
        assert other["train/sampler_correction_capped"] == 1
        assert other["train/sampler_gap"] == pytest.approx(math.log(2), abs=1e-4)
        assert other["train/ratio"] == pytest.approx(1, abs=1e-5)


class TestSynchronisedReference:
    def test_becomes_the_policy_every_so_many_steps(self, zooming: TimmLMBackbone) -> None:
        module = RGRPOModule(fresh(zooming), optimizer=ADAM, objective=Objective(beta=0.1, sync_reference=2))
        assert module.reference is not None
        reference, gaps = module.reference, []

        class Gap(L.Callback):
            def on_train_batch_end(self, *args: Any) -> None:
                gaps.append(furthest(weights(reference.backbone), weights(module.backbone)))

        rows = fit(module, [SampleBatch(make_samples(4))], rolled(), Gap(), max_steps=5).rows
        assert [gap == 0 for gap in gaps] == [False, True, False, True, False]
        assert [abs(row["train/kl"]) < 1e-9 for row in rows] == [True, False, True, False, True]
        assert not any(p.requires_grad for p in reference.parameters())

    def test_goes_on_with_it_after_a_checkpoint(self, zooming: TimmLMBackbone, tmp_path: Path) -> None:
        objective = Objective(beta=0.1, sync_reference=2)
        run = trainer(tmp_path, rolled(), max_steps=3, max_epochs=-1)
        module = RGRPOModule(fresh(zooming), optimizer=ADAM, objective=objective)
        run.fit(module, Batches([SampleBatch(make_samples(2))]))
        run.save_checkpoint(tmp_path / "three.ckpt")
        again = RGRPOModule(make_backbone(seed=9), optimizer=ADAM, objective=objective)
        trainer(tmp_path, rolled(), max_steps=3, max_epochs=-1).fit(
            again, Batches([SampleBatch(make_samples(2))]), ckpt_path=str(tmp_path / "three.ckpt")
        )
        assert module.reference is not None
        assert again.reference is not None
        assert furthest(weights(again.reference.backbone), weights(module.reference.backbone)) == 0
        assert furthest(weights(again.reference.backbone), weights(zooming)) > 1e-3

    @pytest.mark.parametrize("freeze", [[], ["vision", "projector"]])
    def test_sees_with_the_new_tower(self, zooming: TimmLMBackbone, freeze: list[str]) -> None:
        """What the old one made of an image is not kept."""
        made = groups(zooming, TOTALS)
        batch = collate(zooming, [t for g in made for t in g.trajectories])
        module = RGRPOModule(fresh(zooming), freeze=freeze, objective=Objective(beta=0.1, sync_reference=1))
        assert module.reference is not None
        before = module.reference(batch, 10_000)
        with torch.no_grad():
            for p in module.backbone.parameters():
                if p.requires_grad:
                    p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        module.reference.synchronise(module.backbone)
        after = module.reference(batch, 10_000)
        with torch.no_grad():
            policy, _ = token_log_probs(module.backbone.eval(), batch, 10_000)
        assert torch.equal(after, policy)
        assert float((after - before).abs().max()) > 0.01
        shared = [a is b for a, b in zip(module.reference.parameters(), module.backbone.parameters(), strict=True)]
        assert any(shared) == bool(freeze)


class TestDynamicSampling:
    """Batches of two questions, of which some have nothing to tell."""

    def batches(self, backbone: TimmLMBackbone, rewards: list[list[list[float]]]) -> list[SampleBatch]:
        made = groups(backbone, [row for batch in rewards for row in batch])
        return [
            SampleBatch([g.sample for g in made[2 * k : 2 * k + 2]], groups=made[2 * k : 2 * k + 2])
            for k in range(len(rewards))
        ]

    DULL, TELLING = [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]

    def run(
        self, backbone: TimmLMBackbone, batches: list[SampleBatch], **options: Any
    ) -> tuple[RGRPOModule, list[dict[str, float]], list[int]]:
        module = RGRPOModule(fresh(backbone), optimizer=SGD, clip_norm=1e9, objective=Objective(**options))
        steps: list[int] = []

        class Steps(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
                steps.append(trainer.global_step)

        rows = fit(module, batches, Steps()).rows
        return module, rows, steps

    def test_waits_until_there_are_as_many_groups_as_a_batch_has_questions(self, zooming: TimmLMBackbone) -> None:
        rewards = [[self.DULL, self.TELLING], [self.DULL, self.DULL], [self.TELLING, self.DULL], [self.TELLING] * 2]
        batches = self.batches(zooming, rewards)
        module, rows, steps = self.run(zooming, batches, resample=5)
        assert steps == [0, 0, 1, 2]
        assert [row.get("train/batches_per_step") for row in rows] == [None, None, 3, 1]
        first = step(zooming, [batches[0].groups[1], batches[2].groups[0]])
        after_first = fresh(zooming)
        after_first.load_state_dict({**after_first.state_dict(), **first})
        assert furthest(weights(module.backbone), step(after_first, batches[3].groups)) < 1e-6

    def test_has_a_cap(self, zooming: TimmLMBackbone) -> None:
        rewards = [[self.DULL, self.TELLING], [self.DULL, self.DULL], [self.TELLING, self.DULL]]
        batches = self.batches(zooming, rewards)
        module, rows, steps = self.run(zooming, batches[:2], resample=2)
        assert steps == [0, 1]
        assert rows[1]["train/batches_per_step"] == 2
        assert furthest(weights(module.backbone), step(zooming, [batches[0].groups[1]])) < 1e-6
        _, _, steps = self.run(zooming, batches, resample=1)
        assert steps == [1, 1, 2]  # without it, one group is enough and none is no step

    def test_leaves_nothing_to_a_later_fit(self, zooming: TimmLMBackbone) -> None:
        batches = self.batches(zooming, [[self.DULL, self.TELLING], [self.TELLING, self.TELLING]])
        module, _, steps = self.run(zooming, batches[:1], resample=3)
        assert steps == [0]
        fit(module, batches[1:])
        assert furthest(weights(module.backbone), step(zooming, batches[1].groups)) < 1e-6

    @pytest.mark.parametrize(("others_lack", "expected"), [(1, [0, 0, 1]), (-1, [1, 1, 1])])
    def test_ranks_decide_together(
        self, zooming: TimmLMBackbone, monkeypatch: pytest.MonkeyPatch, others_lack: int, expected: list[int]
    ) -> None:
        """Of a rank that has enough, with peers that lack groups; and of one that lacks what its peers have."""
        mine = [self.TELLING, self.TELLING] if others_lack > 0 else [self.DULL, self.TELLING]
        monkeypatch.setattr(RGRPOModule, "_sum_over_ranks", lambda _, count: count + others_lack)
        batches = self.batches(zooming, [mine, [self.DULL, self.DULL], [self.DULL, self.DULL]])
        _, _, steps = self.run(zooming, batches, resample=3)
        assert steps == expected
