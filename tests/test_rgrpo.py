"""R-GRPO on a real Trainer: the gradient that was meant, once, from every group that teaches something."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from callbacks.rollout import RolloutCallback
from modules.backbones.timm_lm import TimmLMBackbone
from modules.engine import Decoding, GroupSampler, LocalEngine, Request
from modules.policy import Schedule
from modules.rewards import Reward
from modules.rgrpo import Objective, RGRPOModule
from modules.scoring import collate, token_log_probs
from modules.sft import SFTModule
from modules.trajectory import Group, SampleBatch, StopReason, Trajectory
from tests.conftest import make_backbone, make_samples
from tests.fitting import Batches, RecordingSGD, fit, fresh, furthest, plain_logits, trainer, weights

SGD = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.AdamW, lr=3e-3)
LIMITS: dict[str, int] = {"max_turns": 3, "max_turn_tokens": 10}


class Writes(Reward):
    """Pays for one token, whatever was asked."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.token = token

    def __call__(self, trajectory: Trajectory) -> float:
        return float((trajectory.completion_ids[trajectory.sampled] == self.token).any())


class Wordiness(Reward):
    """Differs between nearly all trajectories."""

    def __call__(self, trajectory: Trajectory) -> float:
        return float(trajectory.sampled.sum()) + float(trajectory.log_probs.sum()) / 100


def rolled(reward: Reward | None = None, group: int = 4, **decoding: Any) -> RolloutCallback:
    return RolloutCallback(
        sampler=GroupSampler(group), rewards={"reward": reward or Wordiness()}, decoding=Decoding(**LIMITS, **decoding)
    )


def groups(
    backbone: TimmLMBackbone, totals: Sequence[Sequence[float]], temperature: float = 1.0, std: bool = True
) -> list[Group]:
    """Groups of the policy's own trajectories, one a row, with these rewards."""
    size = len(totals[0])
    samples = make_samples(len(totals))
    requests = GroupSampler(size).requests(samples, seed=11)
    played = LocalEngine().rollout(backbone, requests, Decoding(temperature, **LIMITS))
    made = []
    for n, (sample, row) in enumerate(zip(samples, totals, strict=True)):
        values = torch.tensor(row)
        deviations = values - values.mean()
        advantages = deviations / (values.std() + 1e-4) if std else deviations
        advantages = advantages if deviations.any() else torch.zeros(size)
        made.append(Group(sample, tuple(played[n * size : (n + 1) * size]), {}, values, advantages))
    return made


def permuted(group: Group, order: list[int]) -> Group:
    """The group with its members in another order."""
    return replace(
        group,
        trajectories=tuple(group.trajectories[k] for k in order),
        totals=group.totals[order],
        advantages=group.advantages[order],
    )


TOTALS = [[0.0, 1.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, 1.0]]


def step(
    backbone: TimmLMBackbone, made: list[Group], objective: Objective = Objective(), **options: Any
) -> dict[str, Tensor]:
    """The weights after one iteration of plain gradient descent."""
    module = RGRPOModule(fresh(backbone), **{"optimizer": SGD, "clip_norm": 1e9, "objective": objective, **options})
    fit(module, [SampleBatch([g.sample for g in made], groups=made)])
    return weights(module.backbone)


@pytest.mark.parametrize("normalisation", ["sequence", "token", "constant"])
@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_a_first_step_is_the_policy_gradient(zooming: TimmLMBackbone, normalisation: Any, temperature: float) -> None:
    """Computed one trajectory at a time, by the definition: advantage times the gradient of log-probability."""
    made = groups(zooming, TOTALS, temperature)
    backbone = fresh(zooming)
    loss = torch.zeros(())
    played = [(t, a) for g in made for t, a in zip(g.trajectories, g.advantages, strict=True)]
    lengths = [int(t.sampled.sum()) for t, _ in played]
    assert len(set(lengths)) > 2
    for (t, advantage), length in zip(played, lengths, strict=True):
        logits = plain_logits(backbone, t)[t.sampled].masked_fill(backbone.banned, -torch.inf) / temperature
        log_prob = logits.log_softmax(-1).gather(1, t.completion_ids[t.sampled][:, None]).sum()
        divisor = {"sequence": len(played) * length, "token": sum(lengths), "constant": len(played) * 30}
        loss = loss - advantage * log_prob / divisor[normalisation]
    loss.backward()
    expected = {
        name: p.detach() - 0.1 * (torch.zeros_like(p) if p.grad is None else p.grad)
        for name, p in backbone.named_parameters()
    }
    objective = Objective(normalisation=normalisation, constant=30 if normalisation == "constant" else None)
    found = step(zooming, made, objective)
    assert furthest(found, weights(zooming)) > 1e-3
    assert furthest(found, expected) < 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {"normalisation": "sequence", "beta": 0.1},
        {"normalisation": "token", "beta": 0.1},
        {"ratio_level": "sequence", "inner_epochs": 2},
        {"normalisation": "token", "entropy_bonus": 0.1, "sampler_correction": 1.001, "inner_epochs": 2},
        {"normalisation": "constant", "constant": 20, "mask_truncated": True},
    ],
)
def test_a_step_depends_neither_on_micro_batches_nor_on_order_nor_on_padding(
    zooming: TimmLMBackbone, settings: dict[str, Any]
) -> None:
    made, objective = groups(zooming, TOTALS), Objective(**settings)
    whole = step(zooming, made, objective)
    assert furthest(whole, weights(zooming)) > 1e-3
    for micro_batch in (1, 4):
        assert furthest(step(zooming, made, objective, micro_batch=micro_batch), whole) < 1e-6
    assert furthest(step(zooming, made[::-1], objective), whole) < 1e-6
    mixed = [permuted(group, [2, 0, 1]) for group in made[::-1]]
    assert furthest(step(zooming, mixed, objective, micro_batch=2, head_chunk=7), whole) < 1e-6
    assert furthest(step(zooming, made, objective, row_tokens=0), whole) < 1e-6  # a row for each, padded to the longest


def test_groups_without_variance_change_nothing_unless_they_are_kept(zooming: TimmLMBackbone) -> None:
    made = groups(zooming, [*TOTALS, [1.0, 1.0, 1.0]])
    without = step(zooming, made[:3])
    assert furthest(step(zooming, made), without) < 1e-6
    kept = step(zooming, made, Objective(drop_zero_variance=False))
    # their advantages are 0, but they count: the mean is over 12 trajectories instead of 9
    before = weights(zooming)
    expected = {name: before[name] + (without[name] - before[name]) * 9 / 12 for name in before}
    assert furthest(kept, expected) < 1e-6
    assert furthest(kept, without) > 1e-4


def test_an_iteration_of_dropped_groups_is_no_step(zooming: TimmLMBackbone) -> None:
    made = groups(zooming, [[1.0, 1.0], [0.0, 0.0]])
    module = RGRPOModule(fresh(zooming), optimizer=ADAM, objective=Objective(inner_epochs=2))
    (row,) = fit(module, [SampleBatch([g.sample for g in made], groups=made)]).rows
    assert module.trainer.global_step == 0
    assert furthest(weights(module.backbone), weights(zooming)) == 0
    assert "train/loss" not in row


def test_a_failed_judgement_neither_rewards_nor_punishes(zooming: TimmLMBackbone) -> None:
    """What the unjudged trajectory holds does not matter: the step is the same with another in its place."""
    objective = Objective(normalisation="token")
    module = RGRPOModule(fresh(zooming), objective=objective)
    (group,) = groups(zooming, [[0.0, 1.0, float("nan"), 0.5]])
    group = replace(group, advantages=module.advantages(group.totals))
    assert group.advantages.tolist() == pytest.approx([-1, 1, 0, 0], abs=1e-3)
    silent = [replace(t, sampled=t.sampled & (k != 2)) for k, t in enumerate(group.trajectories)]
    counted = sum(int(t.sampled.sum()) for t in group.trajectories)
    judged = sum(int(t.sampled.sum()) for t in silent)
    before = weights(zooming)
    moved = step(zooming, [group], objective)
    alone = step(zooming, [replace(group, trajectories=tuple(silent))], objective)
    expected = {name: before[name] + (alone[name] - before[name]) * judged / counted for name in before}
    assert furthest(moved, expected) < 1e-6


def test_the_first_ratio_is_one(zooming: TimmLMBackbone) -> None:
    module = RGRPOModule(fresh(zooming), optimizer=ADAM)
    rows = fit(module, [SampleBatch(make_samples(4))], rolled(temperature=0.8), max_steps=3).rows
    for row in rows:  # every iteration rolls out with the policy of its own step
        assert row["train/ratio"] == pytest.approx(1, abs=1e-5)
        assert row["train/sampler_gap"] < 1e-5
        assert row["train/clip_fraction"] == 0
        assert row["train/grad_norm"] > 1e-3


def test_inner_epochs_and_mini_batches_are_steps_of_their_own(zooming: TimmLMBackbone) -> None:
    made = groups(zooming, [*TOTALS, [0.0, 1.0, 0.0]])
    batch = SampleBatch([g.sample for g in made], groups=made)
    rows = {}
    for epochs, parts in ((1, 1), (1, 2), (2, 2)):
        objective = Objective(inner_epochs=epochs, mini_batches=parts)
        module = RGRPOModule(fresh(zooming), optimizer=ADAM, objective=objective)
        (rows[epochs, parts],) = fit(module, [batch]).rows
        assert module.trainer.global_step == epochs * parts
    assert abs(rows[1, 1]["train/ratio"] - 1) < 1e-5
    assert rows[2, 2]["train/sampler_gap"] > rows[1, 2]["train/sampler_gap"] > 1e-4
    assert abs(rows[2, 2]["train/ratio"] - 1) > 1e-4


def test_more_mini_batches_than_groups(zooming: TimmLMBackbone) -> None:
    made = groups(zooming, TOTALS[:2])
    module = RGRPOModule(fresh(zooming), optimizer=ADAM, objective=Objective(mini_batches=5))
    fit(module, [SampleBatch([g.sample for g in made], groups=made)])
    assert module.trainer.global_step == 2


def test_clipping_acts(zooming: TimmLMBackbone) -> None:
    made = groups(zooming, TOTALS)
    batch = SampleBatch([g.sample for g in made], groups=made)
    rows, after = {}, {}
    for bound in (0.01, 1e9):
        objective = Objective(clip_low=bound, clip_high=bound, inner_epochs=3)
        module = RGRPOModule(fresh(zooming), optimizer=ADAM, objective=objective)
        (rows[bound],) = fit(module, [batch]).rows
        after[bound] = weights(module.backbone)
    assert rows[0.01]["train/clip_fraction"] > 0.05
    assert rows[1e9]["train/clip_fraction"] == 0
    assert furthest(after[0.01], after[1e9]) > 1e-4


def test_schedules_count_every_step_of_an_iteration(zooming: TimmLMBackbone) -> None:
    made = groups(zooming, TOTALS[:2])
    batch = SampleBatch([g.sample for g in made], groups=made)
    objective = Objective(inner_epochs=2, mini_batches=2)
    for options in ({"max_epochs": 2}, {"max_steps": 8}):
        module = RGRPOModule(
            fresh(zooming), optimizer=partial(RecordingSGD, lr=0.1), schedule=Schedule("linear"), objective=objective
        )
        fit(module, [batch], **options)
        (optimizer,) = module.trainer.optimizers
        assert optimizer.rates == pytest.approx([0.1 * (1 - k / 8) for k in range(8)])


class TestReference:
    @pytest.mark.parametrize(
        ("objective", "needed"),
        [(Objective(), False), (Objective(beta=0.1), True), (Objective(ratio_to="reference"), True)],
    )
    def test_is_built_only_where_something_uses_it(
        self, zooming: TimmLMBackbone, objective: Objective, needed: bool
    ) -> None:
        module = RGRPOModule(fresh(zooming), objective=objective)
        assert (module.reference is not None) == needed
        assert any(name.startswith("reference") for name in module.state_dict()) == needed

    def test_never_changes_while_the_policy_does(self, zooming: TimmLMBackbone) -> None:
        objective = Objective(beta=0.1, inner_epochs=2)
        module = RGRPOModule(fresh(zooming), optimizer=ADAM, objective=objective)
        assert module.reference is not None
        rows = fit(module, [SampleBatch(make_samples(4))], rolled(), max_steps=6).rows
        assert module.trainer.global_step == 6
        start = weights(zooming)
        assert furthest(weights(module.reference.backbone), start) == 0
        assert furthest(weights(module.backbone), start) > 1e-3
        assert not any(p.requires_grad for p in module.reference.parameters())
        assert not any(m.training for m in module.reference.backbone.modules())
        optimized = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
        assert optimized == {id(p) for p in module.backbone.parameters()}
        assert min(row["train/kl"] for row in rows) > 0

    def test_kl_begins_at_zero_and_beta_then_acts(self, zooming: TimmLMBackbone) -> None:
        batch = [SampleBatch(make_samples(4))]
        after: dict[tuple[float, int], dict[str, Tensor]] = {}
        for beta in (0.0, 1.0):
            for steps in (1, 2):
                module = RGRPOModule(fresh(zooming), optimizer=SGD, objective=Objective(beta=beta))
                rows = fit(module, batch, rolled(), max_steps=steps).rows
                after[beta, steps] = weights(module.backbone)
                if beta:
                    assert abs(rows[0]["train/kl"]) < 1e-9
                    assert steps == 1 or rows[1]["train/kl"] > 1e-6
                else:
                    assert "train/kl" not in rows[0]
        # the divergence has its minimum, and so no gradient, where policy and reference are the same
        assert furthest(after[0.0, 1], after[1.0, 1]) < 1e-6
        assert furthest(after[0.0, 2], after[1.0, 2]) > 1e-5

    def test_as_the_denominator_of_the_ratio(self, zooming: TimmLMBackbone) -> None:
        objective = Objective(ratio_to="reference", clip_low=1.0, clip_high=float("inf"))
        module = RGRPOModule(fresh(zooming), optimizer=ADAM, objective=objective)
        rows = fit(module, [SampleBatch(make_samples(4))], rolled(), max_steps=4).rows
        assert rows[0]["train/ratio"] == pytest.approx(1, abs=1e-5)
        assert abs(rows[3]["train/ratio"] - 1) > 1e-3  # the policy has left the reference,
        assert rows[3]["train/sampler_gap"] < 1e-5  # not its own samples

    def test_is_the_policy_that_training_starts_from(self, zooming: TimmLMBackbone, tmp_path: Path) -> None:
        run = trainer(tmp_path, max_steps=1)
        run.fit(SFTModule(fresh(zooming), optimizer=ADAM), Batches([SampleBatch(make_samples(2))]))
        run.save_checkpoint(tmp_path / "sft.ckpt")
        module = RGRPOModule(make_backbone(seed=9), init_from=str(tmp_path / "sft.ckpt"), objective=Objective(beta=0.1))
        assert module.reference is not None
        assert furthest(weights(module.reference.backbone), weights(run.lightning_module.backbone)) == 0

    def test_of_a_checkpoint_is_not_taken_for_the_policy(self, zooming: TimmLMBackbone, tmp_path: Path) -> None:
        module = RGRPOModule(fresh(zooming), optimizer=ADAM, objective=Objective(beta=0.1))
        run = trainer(tmp_path, rolled(), max_steps=1)
        run.fit(module, Batches([SampleBatch(make_samples(2))]))
        run.save_checkpoint(tmp_path / "rgrpo.ckpt")
        again = RGRPOModule(make_backbone(seed=9), init_from=str(tmp_path / "rgrpo.ckpt"))
        assert furthest(weights(again.backbone), weights(module.backbone)) == 0
        assert furthest(weights(again.backbone), weights(zooming)) > 0


def test_a_rank_without_groups_steps_with_its_peers(zooming: TimmLMBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    module = RGRPOModule(fresh(zooming), optimizer=SGD)
    monkeypatch.setattr(module, "_sum_over_ranks", lambda count: count + 5.0)
    (row,) = fit(module, [SampleBatch([])], rolled()).rows
    assert module.trainer.global_step == 1
    assert "train/loss" not in row


def test_what_pays_becomes_likelier(zooming: TimmLMBackbone) -> None:
    three = Writes(int(zooming.tokenize("3")))
    unseen = [Request(sample, k) for k, sample in enumerate(make_samples(64, seed=99))]

    def share(backbone: TimmLMBackbone) -> float:
        return sum(map(three, LocalEngine().rollout(backbone, unseen, Decoding(**LIMITS)))) / len(unseen)

    module = RGRPOModule(fresh(zooming), optimizer=ADAM)
    rows = fit(module, [SampleBatch(make_samples(4))] * 25, rolled(three, group=6)).rows
    assert share(zooming) < 0.3
    assert share(module.backbone) > 0.8
    assert rows[-1]["train/reward/reward"] > rows[0]["train/reward/reward"] + 0.4


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


def test_trajectories_of_an_iteration_share_their_prompts(zooming: TimmLMBackbone) -> None:
    """What makes the learner's pass cheap: a group is one row."""
    made = groups(zooming, TOTALS)
    batch = collate(zooming, [t for g in made for t in g.trajectories])
    assert batch.token_ids.shape[0] == len(TOTALS)
