"""R-GRPO on a real Trainer: the gradient that was meant, once, from every group that teaches something."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.backbones.timm_lm import TimmLMBackbone
from modules.engine import Decoding, LocalEngine, Request
from modules.functional.linear_head import linear_loss
from modules.policy import Schedule
from modules.rgrpo import Objective, RGRPOModule
from modules.scoring import collate
from modules.sft import SFTModule
from modules.trajectory import SampleBatch
from tests.conftest import make_backbone, make_samples
from tests.fitting import Batches, RecordingSGD, fit, fresh, furthest, plain_logits, trainer, weights
from tests.learning import ADAM, LIMITS, SGD, TOTALS, Writes, groups, permuted, rolled, step


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
    zooming = fresh(zooming).double()  # two inner epochs of float32 come to 1e-6 by rounding alone
    made, objective = groups(zooming, TOTALS), Objective(**settings)
    whole = step(zooming, made, objective)
    assert furthest(whole, weights(zooming)) > 1e-3
    for micro_batch in (1, 4):
        assert furthest(step(zooming, made, objective, micro_batch=micro_batch), whole) < 1e-6
    assert furthest(step(zooming, made[::-1], objective), whole) < 1e-6
    mixed = [permuted(group, [2, 0, 1]) for group in made[::-1]]
    assert furthest(step(zooming, mixed, objective, micro_batch=2, head_chunk=7), whole) < 1e-6
    assert furthest(step(zooming, made, objective, row_tokens=0), whole) < 1e-6  # a row for each, padded to the longest


@pytest.mark.parametrize(
    "settings",
    [
        {"normalisation": "token", "beta": 0.1, "inner_epochs": 2},
        {"normalisation": "sequence", "entropy_bonus": 0.1},
        {"ratio_level": "sequence", "inner_epochs": 2},
        {"normalisation": "token", "sampler_correction": 1.001, "mini_batches": 2},
    ],
)
def test_a_step_is_the_same_where_there_are_too_many_logits_to_hold_at_once(
    zooming: TimmLMBackbone, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    zooming = fresh(zooming).double()
    made, objective = groups(zooming, TOTALS), Objective(**settings)
    whole = step(zooming, made, objective)
    called: list[int] = []

    def counting(hidden: Tensor, *args: Any) -> Any:
        called.append(len(hidden))
        return linear_loss(hidden, *args)

    monkeypatch.setattr("modules.scoring.linear_loss", counting)
    monkeypatch.setattr("modules.scoring.AT_ONCE", 7 * len(zooming.banned))  # seven tokens at once
    difference = furthest(step(zooming, made, objective, micro_batch=4), whole)
    assert difference < 1e-5 * furthest(whole, weights(zooming))  # selected_log_probs rounds to float32
    assert bool(called) == (objective.ratio_level == "token")


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


def test_trajectories_of_an_iteration_share_their_prompts(zooming: TimmLMBackbone) -> None:
    """What makes the learner's pass cheap: a group is one row."""
    made = groups(zooming, TOTALS)
    batch = collate(zooming, [t for g in made for t in g.trajectories])
    assert batch.token_ids.shape[0] == len(TOTALS)
