"""Losses of expected boxes through the real modules: what they come to, where they go, and what they are divided by."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchvision.ops import generalized_box_iou_loss
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from callbacks.rollout import RolloutCallback
from modules.backbones.timm_lm import TimmLMBackbone
from modules.engine import Decoding
from modules.functional.soft_boxes import fit_boxes
from modules.grounding import Grounder, Grounding, check_gradient
from modules.located import annotated_box, share, step_box
from modules.policy import PolicyError, PolicyModule
from modules.replay import Replayer
from modules.rewards import Accuracy, Format
from modules.rgrpo import RGRPOModule
from modules.scoring import collate, predicting
from modules.sft import SFTModule
from modules.trajectory import Box, Group, Region, SampleBatch, Trajectory, Visual
from tests.conftest import make_backbone, make_samples
from tests.fitting import fit, fresh, furthest, plain_logits, ragged_samples, weights
from tests.learning import TOTALS, groups

SGD = partial(torch.optim.SGD, lr=0.1)
ALL = Grounding(l1=2.0, giou=0.5, answer=0.3)
Aim = Callable[[Trajectory, int], Box | None]


def exact(backbone: TimmLMBackbone) -> TimmLMBackbone:
    """A copy in float64: gradients through crops of noise are large, and so is their rounding."""
    return fresh(backbone).double()


def in_float64(group: Group) -> Group:
    """The group with images of float64: crops of bytes are float32, however exact the policy is."""
    sample = replace(group.sample, images=tuple(image.double() / 255 for image in group.sample.images))
    return replace(group, sample=sample, trajectories=tuple(replace(t, sample=sample) for t in group.trajectories))


def rolled(backbone: TimmLMBackbone, regions: bool = True) -> list[Group]:
    """Groups of the policy's own trajectories, some of them right, on samples with annotated regions or without."""
    made = []
    for n, group in enumerate(groups(backbone, TOTALS)):
        sample = group.sample if regions else replace(group.sample, regions=())
        trajectories = tuple(replace(t, sample=sample) for t in group.trajectories)
        right = torch.tensor([float((n + k) % 2) for k in range(len(trajectories))])
        made.append(replace(group, sample=sample, trajectories=trajectories, rewards={"accuracy": right}))
    return made


def batch_of(made: list[Group]) -> SampleBatch:
    return SampleBatch([g.sample for g in made], groups=made)


def naive_box(backbone: TimmLMBackbone, trajectory: Trajectory, logits: Tensor, number: int) -> Tensor:
    """(4,) expected original pixels of a turn's box, of logits (C, V): a loop over coordinate tokens and their bins."""
    turn, bins = trajectory.turns[number], backbone.coordinate_bins
    assert bins is not None
    places = [k for k in range(turn.start, turn.stop) if bool((bins == trajectory.completion_ids[k]).any())]
    coords = []
    for k in places[-4:]:
        (family,) = [f for f in bins.tolist() if int(trajectory.completion_ids[k]) in f]
        p = logits[k, family].exp()
        coords.append(sum(4.0 * n * q for n, q in enumerate(p)) / p.sum())
    return torch.stack(coords)


def naive_answer(backbone: TimmLMBackbone, trajectory: Trajectory, boxes: dict[int, Tensor]) -> Tensor:
    """The mean cross-entropy of the one answer token, when crops are cut at these boxes."""
    crops: dict[int, Visual] = {}
    for number, box in boxes.items():
        turn = trajectory.turns[number]
        assert turn.region is not None
        assert turn.crop is not None
        image = trajectory.sample.images[turn.region.image]
        (pixels,) = backbone.crop_scaler([image], box[None])
        crops[id(turn.crop)] = Visual(pixels, turn.crop.tokens, "crop")
    seen = replace(trajectory, visuals=tuple(crops.get(id(v), v) for v in trajectory.visuals))
    (place,) = answer_places(backbone, trajectory)
    logits = plain_logits(backbone, seen)[place].masked_fill(backbone.banned, -torch.inf)
    return cross_entropy(logits, trajectory.completion_ids[place])


def answer_places(backbone: TimmLMBackbone, trajectory: Trajectory) -> list[int]:
    """Where the one token between the tags stands, if the last turn ends in tag, token, tag."""
    turn = trajectory.turns[-1]
    texts = [backbone.detokenize(k[None]) for k in trajectory.completion_ids[turn.start : turn.stop]]
    opened = len(texts) >= 3 and texts[-1] == "</answer>" and texts[-3].endswith("<answer>")
    return [turn.stop - 2] if opened else []


def naive_grounding(
    backbone: TimmLMBackbone, trajectories: Sequence[Trajectory], aim: Aim, right: Sequence[bool], weights: Grounding
) -> Tensor:
    """The whole term, one trajectory after another; its gradient goes through the boxes alone."""
    l1, overlap, answers = [], [], []
    for trajectory, is_right in zip(trajectories, right, strict=True):
        logits = plain_logits(backbone, trajectory)
        height, width = trajectory.sample.images[0].shape[-2:]
        boxes = {}
        for number, turn in enumerate(trajectory.turns):
            if turn.region is None:
                continue
            box = naive_box(backbone, trajectory, logits, number)
            if turn.crop is not None:
                boxes[number] = box
            target = aim(trajectory, number)
            if target is not None:
                true = torch.tensor(target, dtype=box.dtype)
                l1.append(((box - true) / torch.tensor([width, height, width, height])).abs().mean())
                ordered = bool((box[2:] > box[:2]).all())
                if ordered:
                    overlap.append(generalized_box_iou_loss(box[None], true[None])[0])
                else:  # torchvision knows no box without an inside
                    hull = torch.cat([torch.minimum(box[:2], true[:2]), torch.maximum(box[2:], true[2:])])
                    area = (hull[2] - hull[0]).clamp(min=0) * (hull[3] - hull[1]).clamp(min=0)
                    own = (true[2] - true[0]) * (true[3] - true[1])
                    overlap.append(1 - (own - area) / area)
        if is_right and boxes and answer_places(backbone, trajectory):
            leaves = {n: b.detach().requires_grad_() for n, b in boxes.items()}
            size = torch.tensor([[float(height), float(width)]])
            fitted = {n: fit_boxes(leaf[None], size)[0][0] for n, leaf in leaves.items()}
            loss = naive_answer(backbone, trajectory, fitted)
            gradients = torch.autograd.grad(loss, list(leaves.values()))
            answers.append(sum((g * boxes[n]).sum() for g, n in zip(gradients, leaves, strict=True)))
    total = torch.zeros((), dtype=torch.float64)
    for weight, parts in ((weights.l1, l1), (weights.giou, overlap), (weights.answer, answers)):
        if parts:
            total = total + weight * torch.stack(parts).mean()
    assert l1
    assert answers
    return total


def stepped(backbone: TimmLMBackbone, loss: Tensor, lr: float = 0.1) -> dict[str, Tensor]:
    """The weights after a step of plain gradient descent."""
    backbone.zero_grad()
    loss.backward()
    return {
        n: p.detach() - lr * (torch.zeros_like(p) if p.grad is None else p.grad) for n, p in backbone.named_parameters()
    }


@pytest.mark.parametrize("options", [{}, {"micro_batch": 1}, {"micro_batch": 4, "head_chunk": 3, "row_tokens": 0}])
def test_a_step_of_warm_up_is_what_a_naive_loop_gives_however_it_is_cut(
    zooming: TimmLMBackbone, options: dict[str, Any]
) -> None:
    backbone = exact(zooming)
    trajectories, _ = Replayer(backbone)(ragged_samples())
    tokens = [
        cross_entropy(plain_logits(backbone, t)[t.sampled], t.completion_ids[t.sampled], reduction="none")
        for t in trajectories
    ]
    loss = torch.cat(tokens).mean() + naive_grounding(backbone, trajectories, step_box, [True] * 6, ALL)
    expected = stepped(backbone, loss)
    module = SFTModule(exact(zooming), optimizer=SGD, clip_norm=1e9, grounding=ALL, **options)
    (row,) = fit(module, [SampleBatch(ragged_samples())]).rows
    largest = furthest(expected, weights(exact(zooming)))
    assert furthest(weights(module.backbone), expected) < 1e-5 * largest
    assert row["train/grounding/boxes"] == 6
    assert row["train/grounding/answers"] == 4  # one does not look, one has no opening tag
    assert row["train/grounding/left_out"] == row["train/grounding/without_region"] == 0


@pytest.mark.parametrize("options", [{}, {"micro_batch": 2}])
def test_a_step_beside_the_policy_gradient_is_what_a_naive_loop_gives(
    zooming: TimmLMBackbone, options: dict[str, Any]
) -> None:
    made = [in_float64(group) for group in rolled(zooming)]
    plain = RGRPOModule(exact(zooming), optimizer=SGD, clip_norm=1e9)
    fit(plain, [batch_of(made)])
    before = weights(exact(zooming))
    trajectories = [t for g in made for t in g.trajectories]
    right = [bool(v) for g in made for v in g.rewards["accuracy"]]
    backbone = exact(zooming)
    term = stepped(backbone, naive_grounding(backbone, trajectories, annotated_box, right, ALL))
    expected = {n: weights(plain.backbone)[n] + term[n] - before[n] for n in before}
    module = RGRPOModule(exact(zooming), optimizer=SGD, clip_norm=1e9, grounding=ALL, **options)
    (row,) = fit(module, [batch_of(made)]).rows
    assert furthest(term, before) > 1e-3
    assert furthest(weights(module.backbone), expected) < 1e-6
    assert 0 < row["train/grounding/answers"] < sum(right) <= row["train/grounding/boxes"] + sum(right)


@pytest.mark.parametrize("name", ["l1", "giou", "answer"])
def test_every_weight_acts_alone(zooming: TimmLMBackbone, name: str) -> None:
    after = {}
    for weight in (0.0, 1.0, 2.0):
        warm = SFTModule(fresh(zooming), optimizer=SGD, clip_norm=1e9, grounding=Grounding(**{name: weight}))
        rows = fit(warm, [SampleBatch(make_samples(2))]).rows
        policy = RGRPOModule(fresh(zooming), optimizer=SGD, clip_norm=1e9, grounding=Grounding(**{name: weight}))
        rows += fit(policy, [batch_of(rolled(zooming))]).rows
        after[weight] = [weights(warm.backbone), weights(policy.backbone)]
        assert all((f"train/grounding/{name}" in row) == (weight > 0) for row in rows)
    for zero, one, two in zip(*after.values(), strict=True):
        moved = furthest(one, zero)
        assert moved > 1e-4
        assert furthest(two, zero) == pytest.approx(2 * moved, rel=1e-2)


def test_without_weights_nothing_is_computed(zooming: TimmLMBackbone) -> None:
    for module, batch in (
        (SFTModule(fresh(zooming), optimizer=SGD), SampleBatch(make_samples(2))),
        (RGRPOModule(fresh(zooming), optimizer=SGD), batch_of(rolled(zooming))),
    ):
        assert module.grounder is None
        (row,) = fit(module, [batch]).rows
        assert not any(name.startswith("train/grounding/") for name in row)


@pytest.mark.parametrize("method", ["warm_up", "policy_gradient"])
def test_ranks_divide_by_what_all_of_them_have(
    zooming: TimmLMBackbone, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks with unequal shares add up to the step of one rank that has everything."""
    samples, made = ragged_samples(), rolled(zooming)

    def run(some: slice, count: Callable[[float], float]) -> dict[str, Tensor]:
        module: PolicyModule
        if method == "warm_up":
            module, batch = (
                SFTModule(exact(zooming), optimizer=SGD, clip_norm=1e9, grounding=ALL),
                SampleBatch(samples[some]),
            )
        else:
            module, batch = (
                RGRPOModule(exact(zooming), optimizer=SGD, clip_norm=1e9, grounding=ALL),
                batch_of(made[some]),
            )
        monkeypatch.setattr(module, "_sum_over_ranks", count)
        fit(module, [batch])
        return weights(module.backbone)

    whole = run(slice(None), lambda count: count)
    parts = (slice(0, 1), slice(1, None))
    asked: list[list[float]] = [[], []]
    for part, own in zip(parts, asked, strict=True):
        run(part, lambda count, own=own: own.append(count) or count)  # type: ignore[misc]
    assert len(asked[0]) == len(asked[1]) == 4  # as often on every rank, else they would wait for ever
    totals = [sum(pair) for pair in zip(*asked, strict=True)]
    ranks = []
    for part in parts:
        answers = iter(totals)
        ranks.append(run(part, lambda count, answers=answers: next(answers)))  # type: ignore[misc]
    before = weights(exact(zooming))
    both = {n: before[n] + sum(rank[n] - before[n] for rank in ranks) for n in before}
    assert furthest(whole, before) > 1e-3
    assert furthest(both, whole) < 1e-6


def grounded(backbone: TimmLMBackbone, trajectories: Sequence[Trajectory], given: Grounding) -> tuple[Any, Any, Any]:
    """A grounder, where things stand in one micro-batch, and its packed form."""
    grounder = Grounder(backbone, given, row_tokens=2048, head_chunk=4096)
    located = grounder.locate(trajectories, step_box, [True] * len(trajectories))
    return grounder, share([located], 1.0, lambda count: count)[0], collate(backbone, trajectories)


def test_regions_alone_pull_the_expected_box() -> None:
    backbone = make_backbone()
    trajectories, _ = Replayer(backbone)(make_samples(4))
    grounder, located, batch = grounded(backbone, trajectories, Grounding(l1=1, giou=1))
    optimizer = torch.optim.Adam(backbone.parameters(), lr=3e-3)
    seen = []
    for _ in range(20):
        loss, sums = grounder.loss(predicting(backbone, batch), located, 1.0)
        seen.append((float(sums["grounding/l1"]) / 4, float(sums["grounding/giou"]) / 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[-1][0] < 0.4 * seen[0][0]
    assert seen[-1][1] < 0.6 * seen[0][1]


def in_double(backbone: TimmLMBackbone) -> tuple[TimmLMBackbone, list[Trajectory]]:
    """Backbone and trajectories in float64, images included, and norms, which transformers computes in float32."""
    double = exact(backbone)

    def norm(hidden: Tensor, own: Any) -> Tensor:
        normed: Tensor = own.weight * hidden * (hidden.square().mean(-1, keepdim=True) + own.variance_epsilon).rsqrt()
        return normed

    for module in double.modules():
        if isinstance(module, Qwen2RMSNorm):
            module.forward = partial(norm, own=module)  # type: ignore[method-assign]
    samples = [replace(s, images=tuple(image.double() / 255 for image in s.images)) for s in make_samples(3)]
    return double, Replayer(double)(samples)[0]


def test_the_answers_gradient_is_that_of_finite_differences(zooming: TimmLMBackbone) -> None:
    """With respect to what the coordinate tokens are predicted from, all else of the policy held fixed."""
    backbone, trajectories = in_double(zooming)
    grounder, located, batch = grounded(backbone, trajectories, Grounding(answer=1.0))
    hidden = predicting(backbone, batch).detach()
    leaf = hidden.clone().requires_grad_()
    loss, sums = grounder.loss(leaf, located, 1.0)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert float(sums["grounding/clamped"]) == 0
    coordinates = batch.coordinates.isfinite()
    assert gradient[~coordinates].abs().max() == 0  # nothing but the box is moved
    assert gradient[coordinates].abs().amax(-1).min() > 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        along = torch.randn(hidden.shape, dtype=torch.float64, generator=generator)
        ahead, behind = (float(grounder.loss(hidden + s * along, located, 1.0)[0].detach()) for s in (1e-5, -1e-5))
        assert float((gradient * along).sum()) == pytest.approx((ahead - behind) / 2e-5, rel=1e-5)
    downhill = hidden - 1e-3 * gradient / gradient.norm()
    assert float(grounder.loss(downhill, located, 1.0)[0]) < float(loss)


def test_the_answer_passes_a_frozen_tower_and_teaches_the_reader_nothing(zooming: TimmLMBackbone) -> None:
    backbone = fresh(zooming)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(backbone.part(name) == "language")
    trajectories, _ = Replayer(backbone)(make_samples(3))
    grounder, located, batch = grounded(backbone, trajectories, Grounding(answer=1.0))
    loss, _ = grounder.loss(predicting(backbone, batch), located, 1.0)
    kept = len(backbone.encoded)
    loss.backward()
    assert len(backbone.encoded) == kept == len(batch.visuals)  # soft crops are nobody's features
    head = backbone.language.lm_head.weight.grad
    assert backbone.coordinate_bins is not None
    is_bin = torch.zeros(len(head), dtype=torch.bool)
    is_bin[backbone.coordinate_bins.flatten()] = True
    assert head[is_bin].abs().max() > 0
    assert head[~is_bin].abs().max() == 0  # the answer's own logits are not trained here


def test_features_of_live_pixels_are_never_kept(zooming: TimmLMBackbone) -> None:
    backbone = fresh(zooming).requires_grad_(False)
    still, live = (Visual(torch.rand(3, 16, 16, requires_grad=on), 4, "crop") for on in (False, True))
    mixed = backbone.features([still, live, still])
    torch.testing.assert_close(torch.stack(mixed), torch.stack(backbone.encode([still, live, still])))
    assert [f.requires_grad for f in mixed] == [False, True, False]
    assert list(backbone.encoded) == [still]


def test_boxes_without_an_inside_are_counted_and_finite(zooming: TimmLMBackbone) -> None:
    """Logits that expect x1 right of x2, far from what was written."""
    backbone = fresh(zooming)
    bins = backbone.coordinate_bins
    assert bins is not None
    trajectories, _ = Replayer(backbone)(make_samples(2))
    grounder, located, batch = grounded(backbone, trajectories, ALL)
    middle = bins.shape[1] // 2
    head = backbone.head

    def pushed(hidden: Tensor) -> Tensor:
        up = torch.zeros(len(backbone.banned))
        up[bins[0, middle:]], up[bins[1, :middle]] = 30.0, 30.0
        up[bins[0, :middle]], up[bins[1, middle:]] = -30.0, -30.0
        return head(hidden) + up

    backbone.head = pushed  # type: ignore[method-assign]
    loss, sums = grounder.loss(predicting(backbone, batch), located, 1.0)
    loss.backward()
    assert float(sums["grounding/clamped"]) == 2
    assert all(value.isfinite().all() for value in sums.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in backbone.parameters())


def test_boxes_without_a_region_are_counted_and_told_of_once(
    zooming: TimmLMBackbone, caplog: pytest.LogCaptureFixture
) -> None:
    made = rolled(zooming, regions=False)
    module = RGRPOModule(fresh(zooming), optimizer=SGD, grounding=Grounding(l1=1.0))
    with caplog.at_level(logging.WARNING, "modules.grounding"):
        rows = fit(module, [batch_of(made)] * 2).rows
    plain = RGRPOModule(fresh(zooming), optimizer=SGD)
    fit(plain, [batch_of(made)] * 2)
    assert furthest(weights(module.backbone), weights(plain.backbone)) == 0
    assert all(row["train/grounding/without_region"] == row["train/grounding/boxes"] > 0 for row in rows)
    assert "train/grounding/l1" not in rows[0]
    assert len([r for r in caplog.records if "without an annotated region" in r.getMessage()]) == 1


def test_a_box_goes_to_the_nearest_region_of_its_image(zooming: TimmLMBackbone) -> None:
    (trajectory, *_), _ = Replayer(zooming)(make_samples(1))
    (region,) = trajectory.regions
    near = tuple(c + 3 for c in region.box)
    far, elsewhere = Region((50.0, 50.0, 60.0, 60.0)), Region(region.box, image=1)
    for regions, expected in (((far, Region(near), elsewhere), near), ((elsewhere,), None), ((), None)):
        asked = replace(trajectory, sample=replace(trajectory.sample, regions=regions))
        assert annotated_box(asked, 0) == expected
    assert step_box(trajectory, 0) == trajectory.sample.rationale[0].region.box  # type: ignore[union-attr]


def test_wrong_settings_are_refused(zooming: TimmLMBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ({"l1": -1.0}, {"answer": float("nan")}, {"giou": float("inf")}):
        (name,) = given
        with pytest.raises(ValueError, match=rf"`grounding\.{name}` to be 0 or above"):
            Grounding(**given)
    module = RGRPOModule(fresh(zooming), optimizer=SGD, grounding=Grounding(answer=1.0))
    with pytest.raises(PolicyError, match=r"one called `accuracy` with `grounding\.answer`.*\['format'\]"):
        RolloutCallback(rewards={"format": Format()}).on_fit_start(None, module)  # type: ignore[arg-type]
    blank = RolloutCallback(rewards={"accuracy": Accuracy()}, decoding=Decoding(crops="blank"))
    with pytest.raises(PolicyError, match=r"`rollout\.decoding\.crops` to be zoom with `grounding\.answer`.*'blank'"):
        blank.on_fit_start(None, module)  # type: ignore[arg-type]
    backbone = fresh(zooming)
    crop = backbone.crop_scaler.forward
    monkeypatch.setattr(backbone.crop_scaler, "forward", lambda *args: [pixels.detach() for pixels in crop(*args)])
    with pytest.raises(ValueError, match=r"`grounding\.answer` to be 0 for TimmLMBackbone, of which no gradient"):
        SFTModule(backbone, grounding=Grounding(answer=1.0))
    SFTModule(backbone, grounding=Grounding(l1=1.0))  # which needs none


def test_the_gradient_is_tried_without_a_trace(zooming: TimmLMBackbone) -> None:
    backbone = fresh(zooming).train()
    state = torch.get_rng_state()
    check_gradient(backbone)
    assert backbone.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in backbone.parameters())


def test_boxes_that_are_not_finite_make_the_step_one_that_is_left_out(zooming: TimmLMBackbone) -> None:
    grounder = RGRPOModule(fresh(zooming), optimizer=SGD, grounding=Grounding(answer=1.0)).grounder
    assert grounder is not None
    trajectories = [g.trajectories[0] for g in rolled(zooming)]
    located = grounder.locate(trajectories, annotated_box, [True] * len(trajectories))
    batch = collate(zooming, trajectories)
    hidden = predicting(zooming, batch) * torch.nan
    loss, _ = grounder.loss(hidden, share([located], 1.0, lambda n: n)[0], batch.temperature)
    assert loss.isnan()
