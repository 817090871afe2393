"""The policy module and supervised warm-up on a real Trainer: what trains, how fast, divided by what."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from modules.backbones.timm_lm import TimmLMBackbone
from modules.policy import PolicyError, Schedule
from modules.replay import Replayer
from modules.sft import SFTModule
from modules.trajectory import SampleBatch
from tests.conftest import make_backbone, make_samples
from tests.fitting import Batches, RecordingSGD, fit, fresh, furthest, plain_logits, ragged_samples, trainer, weights

SGD = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.AdamW, lr=3e-3)
UNCLIPPED = {"optimizer": SGD, "clip_norm": 1e9}


def test_loss_of_a_fixed_batch_falls() -> None:
    module = SFTModule(make_backbone(), optimizer=ADAM)
    rows = fit(module, [SampleBatch(make_samples(4))], max_steps=25).rows
    assert rows[-1]["train/loss"] < 0.3 * rows[0]["train/loss"]
    assert rows[0]["train/loss"] == pytest.approx(torch.tensor(module.backbone.banned.numel()).log().item(), rel=0.6)


def expected_step(
    backbone: TimmLMBackbone, weight: float = 1.0, lr: float = 0.1
) -> tuple[dict[str, torch.Tensor], float]:
    """One step of plain gradient descent on the mean over all written tokens, computed one by one."""
    trajectories, _ = Replayer(backbone)(ragged_samples())
    losses, weighing = [], []
    for t in trajectories:
        losses.append(
            cross_entropy(plain_logits(backbone, t)[t.sampled], t.completion_ids[t.sampled], reduction="none")
        )
        weighing.append(torch.where(t.coordinates[t.sampled].isnan(), 1.0, weight))
    assert len({len(x) for x in losses}) > 3
    loss = (torch.cat(losses) * torch.cat(weighing)).sum() / len(torch.cat(losses))
    backbone.zero_grad()
    loss.backward()
    stepped = {
        name: p.detach() - lr * (torch.zeros_like(p) if p.grad is None else p.grad)
        for name, p in backbone.named_parameters()
    }
    return stepped, float(loss)


@pytest.mark.parametrize(
    "options",
    [{"micro_batch": 1}, {"micro_batch": 3}, {"micro_batch": None}, {"head_chunk": 5}, {"grounding_weight": 0.25}],
)
def test_a_step_is_the_mean_over_written_tokens_however_it_is_cut(options: dict[str, Any]) -> None:
    expected, loss = expected_step(make_backbone(), options.get("grounding_weight", 1.0))
    module = SFTModule(make_backbone(), **UNCLIPPED, **options)
    before = weights(module.backbone)
    recorder = fit(module, [SampleBatch(ragged_samples())])
    assert recorder.rows[0]["train/loss"] == pytest.approx(loss, abs=1e-5)
    assert furthest(weights(module.backbone), before) > 1e-2
    assert furthest(weights(module.backbone), expected) < 1e-6


def test_a_step_does_not_remember_the_gradient_before() -> None:
    """Two steps of one run are one step twice: plain gradient descent remembers nothing."""
    batch = [SampleBatch(make_samples(2))]
    together = SFTModule(make_backbone(), **UNCLIPPED)
    fit(together, batch, max_steps=2)
    backbone = make_backbone()
    for _ in range(2):
        fit(SFTModule(backbone, **UNCLIPPED), batch, max_steps=1)
        backbone.zero_grad()
    assert furthest(weights(together.backbone), weights(backbone)) < 1e-6


def test_logged_parts_add_up_to_the_loss() -> None:
    module = SFTModule(make_backbone(), **UNCLIPPED, grounding_weight=0.25)
    (row,) = fit(module, [SampleBatch(make_samples(4))]).rows
    # of the eight tokens of each: two of words, four of a box, the answer and its end tag
    made, _ = module.replay(make_samples(4))
    boxes = sum(int(t.coordinates.isfinite().sum()) for t in made)
    words = sum(int(t.sampled.sum()) for t in made) - boxes
    assert boxes == 4 * 4
    total = (row["train/loss/text"] * words + 0.25 * row["train/loss/grounding"] * boxes) / (words + boxes)
    assert row["train/loss"] == pytest.approx(total, rel=1e-4)


def test_sigma_acts_and_needs_coordinate_tokens() -> None:
    after = {}
    for sigma in (None, 0.01, 2.0):
        module = SFTModule(make_backbone(), **UNCLIPPED, sigma=sigma)
        fit(module, [SampleBatch(make_samples(4))])
        after[sigma] = weights(module.backbone)
    assert furthest(after[0.01], after[None]) < 1e-6  # whole coordinates: a narrow target is the token itself
    assert furthest(after[2.0], after[None]) > 1e-3
    digits = make_backbone()
    digits.coordinate_bins = None
    with pytest.raises(ValueError, match=r"`sigma` to be null for TimmLMBackbone.* but got 2.0"):
        SFTModule(digits, sigma=2.0)


def test_a_sample_that_cannot_be_learned_from_is_named_and_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    samples = make_samples(3)
    samples[1] = replace(samples[1], rationale=())
    with caplog.at_level(logging.WARNING, "modules.policy"):
        rows = fit(SFTModule(make_backbone(), optimizer=SGD), [SampleBatch(samples)], max_epochs=2).rows
    assert [row["data/skipped"] for row in rows] == [1, 1]
    assert [r.getMessage() for r in caplog.records if "sample-1" in r.getMessage()] == [
        "skipped sample-1: it has no rationale to learn from"
    ]


@pytest.mark.parametrize("samples", [[], [replace(make_samples(1)[0], rationale=())]])
def test_a_batch_without_anything_to_learn_is_no_step(samples: list[Any]) -> None:
    module = SFTModule(make_backbone(), optimizer=ADAM)
    before = weights(module)
    fit(module, [SampleBatch(samples)])
    assert module.trainer.global_step == 0
    assert furthest(weights(module), before) == 0


def test_a_rank_without_anything_to_learn_steps_with_its_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SFTModule(make_backbone(), optimizer=SGD)
    monkeypatch.setattr(module, "_sum_over_ranks", lambda count: count + 5.0)  # a peer has five tokens
    before = weights(module)
    fit(module, [SampleBatch([])])
    assert module.trainer.global_step == 1
    assert furthest(weights(module), before) == 0  # here the peer's gradients would arrive


def test_frozen_parameters_stay_and_the_others_train() -> None:
    module = SFTModule(make_backbone(), optimizer=ADAM, freeze=["^vision", "^projector", r"layers\.0\."])
    before = weights(module.backbone)
    fit(module, [SampleBatch(make_samples(4))], max_steps=2)
    seen = {True: 0, False: 0}
    for name, p in module.backbone.named_parameters():
        frozen = name.startswith("vision") or "projector" in name or "layers.0." in name
        seen[frozen] += 1
        assert (p.grad is None) == frozen, name
        assert torch.equal(p, before[name]) == frozen, name
    assert min(seen.values()) > 5


def test_freezing_nothing_or_everything_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`freeze` 'visoin' to be one of .* or to match a parameter.*\['language'"):
        SFTModule(make_backbone(), freeze=["visoin"])
    with pytest.raises(ValueError, match="leave something to train"):
        SFTModule(make_backbone(), freeze=["vision", "."])


@pytest.mark.parametrize("clip_norm", [0.01, 0.1])
def test_clip_norm_acts(clip_norm: float) -> None:
    module = SFTModule(make_backbone(), optimizer=partial(torch.optim.SGD, lr=1.0), clip_norm=clip_norm)
    before = weights(module.backbone)
    (row,) = fit(module, [SampleBatch(make_samples(2))]).rows
    moved = torch.stack([(p - before[n]).norm() for n, p in module.backbone.named_parameters()]).norm()
    assert float(moved) == pytest.approx(clip_norm, rel=1e-3)
    assert row["train/grad_norm"] > 10 * clip_norm  # as it was before


def rates(schedule: Schedule, **options: Any) -> list[float]:
    """The learning rate of each step, over that of the optimizer."""
    module = SFTModule(make_backbone(), optimizer=partial(RecordingSGD, lr=0.1), schedule=schedule)
    fit(module, [SampleBatch(make_samples(1))] * 2, **options)
    (optimizer,) = module.trainer.optimizers
    return [rate / 0.1 for rate in optimizer.rates]


def test_schedules_act() -> None:
    assert rates(Schedule(), max_steps=3) == [1, 1, 1]
    warm = rates(Schedule(warmup=0.5), max_steps=8)
    assert warm == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1, 1])
    # four epochs of two batches are eight steps as well
    assert rates(Schedule("linear"), max_epochs=4) == pytest.approx([1 - k / 8 for k in range(8)])
    low = rates(Schedule("cosine_with_min_lr", options={"min_lr_rate": 0.5}), max_steps=4)
    assert low == pytest.approx([1, 0.5 + 0.5 * 0.8535534, 0.75, 0.5 + 0.5 * 0.1464466])


def save(module: SFTModule, path: Path) -> str:
    """A checkpoint of this module after one step."""
    run = trainer(path.parent, max_steps=1)
    run.fit(module, Batches([SampleBatch(make_samples(2))]))
    run.save_checkpoint(path)
    return str(path)


def test_init_from_loads_the_policy(tmp_path: Path) -> None:
    source = SFTModule(make_backbone(seed=1), optimizer=ADAM)
    path = save(source, tmp_path / "sft.ckpt")
    module = SFTModule(make_backbone(seed=2), init_from=path, freeze=["vision"])
    assert furthest(weights(module.backbone), weights(source.backbone)) == 0
    assert furthest(weights(source.backbone), weights(make_backbone(seed=1))) > 0


def test_init_from_something_else_is_refused(tmp_path: Path) -> None:
    path = save(SFTModule(make_backbone(), optimizer=ADAM), tmp_path / "sft.ckpt")
    with pytest.raises(ValueError, match=r"sft.ckpt' to hold the weights of this backbone, but \d+ tensors.*layers.2"):
        SFTModule(make_backbone(layers=3), init_from=path)
    wider = make_backbone()
    wider.projector = torch.nn.Linear(20, 32)
    with pytest.raises(ValueError, match=r"1 tensors are missing, unknown or of another shape, 'projector.weight'"):
        SFTModule(wider, init_from=path)
    with pytest.raises(PolicyError, match=r"there is no file 'none\.ckpt'\.$"):
        SFTModule(make_backbone(), init_from="none.ckpt")
    with pytest.raises(PolicyError, match=r"a Hugging Face folder is the backbone's `model`\.$"):
        SFTModule(make_backbone(), init_from=str(tmp_path))


def test_init_from_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    weights_only, text = tmp_path / "weights.pt", tmp_path / "notes.txt"
    torch.save(make_backbone().state_dict(), weights_only)
    text.write_text("not a checkpoint")
    for path in (weights_only, text):
        with pytest.raises(ValueError, match=rf"`init_from` '.*{path.name}' to be a training checkpoint"):
            SFTModule(make_backbone(), init_from=str(path))


def test_warm_start_from_the_fixture_is_a_copy(zooming: TimmLMBackbone) -> None:
    before = weights(zooming)
    fit(SFTModule(fresh(zooming), optimizer=ADAM), [SampleBatch(make_samples(2))])
    assert furthest(weights(zooming), before) == 0


def test_training_weights_of_half_precision_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for dtype, warned in ((torch.float32, False), (torch.bfloat16, True)):
        caplog.clear()
        fit(SFTModule(make_backbone().to(dtype), optimizer=ADAM), [SampleBatch(make_samples(2))])
        assert ("Weights of bfloat16 train" in caplog.text) == warned
