"""What a frozen tower makes of a visual is made once, is the same, and never outlives what made it."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modules.backbones.timm_lm import TimmLMBackbone
from modules.engine import Decoding, GroupSampler, LocalEngine
from modules.reference import ReferenceModule, frozen_copy
from modules.scoring import collate, token_log_probs
from modules.trajectory import Region, Visual
from tests.conftest import make_backbone, make_samples
from tests.fitting import fresh


class Seen:
    """Counts the visuals that go through the vision tower."""

    def __init__(self, backbone: TimmLMBackbone) -> None:
        self.count = 0
        whole = backbone.vision.forward_features

        def counted(pixels: Tensor) -> Tensor:
            self.count += len(pixels)
            features: Tensor = whole(pixels)
            return features

        backbone.vision.forward_features = counted


def freeze(backbone: TimmLMBackbone) -> TimmLMBackbone:
    """The tower alone, as R-GRPO of the quickstart does."""
    backbone.vision.requires_grad_(False)
    return backbone


def looked(backbone: TimmLMBackbone) -> list[Visual]:
    """Two images and two crops."""
    images = [sample.images[0] for sample in make_samples(2)]
    regions = [Region((4.0, 8.0, 28.0, 40.0)), Region((0.0, 0.0, 16.0, 60.0))]
    return [*backbone.see(images), *backbone.look(images, regions)]


def test_a_rollout_a_learner_and_a_reference_share_one_pass_of_a_frozen_tower(zooming: TimmLMBackbone) -> None:
    backbone = freeze(fresh(zooming))
    reference = ReferenceModule(backbone)
    seen = Seen(backbone)
    of_reference = Seen(reference.backbone)  # type: ignore[arg-type]
    decoding = Decoding(max_turns=3, max_turn_tokens=8)
    requests = GroupSampler(4).requests(make_samples(3), seed=0)
    trajectories = LocalEngine().rollout(backbone, requests, decoding)
    batch = collate(backbone, trajectories)
    assert len(batch.visuals) > 3  # crops as well
    for _ in range(2):
        token_log_probs(backbone, batch, 10_000)[0].sum().backward()
    reference(batch, 10_000)
    assert seen.count == len(batch.visuals)
    assert of_reference.count == 0
    del trajectories, batch
    gc.collect()
    assert len(backbone.seen) == 0  # memory goes with the visuals


def test_kept_features_and_the_gradients_behind_them_are_those_of_a_pass(zooming: TimmLMBackbone) -> None:
    kept, made = freeze(fresh(zooming)), fresh(zooming)
    visuals = looked(kept)
    with torch.no_grad():
        before = kept.features(visuals)
        kept.spatial_scale.mul_(2.0)  # the projector trains: nothing that it made may be kept
        made.spatial_scale.mul_(2.0)
    found, expected = kept.features(visuals), made.features(visuals)  # in `made` the tower trains, and is run
    for old, a, b in zip(before, found, expected, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, old)
    weights = torch.randn(found[0].shape[-1])
    for features in (found, expected):
        (torch.cat(features) ** 2 @ weights).sum().backward()
    gradients = {name: p.grad for name, p in kept.named_parameters() if p.grad is not None}
    assert {kept.part(name) for name in gradients} == {"projector"}
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, dict(made.named_parameters())[name].grad), name  # type: ignore[arg-type]


def loaded(backbone: TimmLMBackbone) -> None:
    backbone.load_state_dict(make_backbone(seed=5).state_dict())


def exchanged(backbone: TimmLMBackbone) -> None:
    backbone.load_state_dict(make_backbone(seed=5).requires_grad_(False).state_dict(), assign=True)
    freeze(backbone)


def trained(backbone: TimmLMBackbone) -> None:
    backbone.vision.requires_grad_(True)
    optimizer = torch.optim.AdamW(backbone.vision.parameters(), lr=0.1, fused=True)
    torch.cat(backbone.features(looked(backbone))).pow(2).sum().backward()
    optimizer.step()
    freeze(backbone)


def compare_with_new(backbone: TimmLMBackbone, change: Callable[[TimmLMBackbone], object]) -> None:
    """What there is after a change is what a copy makes that keeps nothing, and not what there was."""
    visuals = looked(backbone)
    before = backbone.features(visuals)
    assert len(backbone.seen) == len(visuals)
    change(backbone)
    copy = fresh(backbone)
    copy.seen.clear()
    copy.encoded.clear()
    found, expected = backbone.features(visuals), copy.features(visuals)
    for old, a, b in zip(before, found, expected, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a.float(), old)


@pytest.mark.parametrize("change", [loaded, exchanged, trained, TimmLMBackbone.double])
def test_features_are_dropped_when_the_tower_changes(change: Callable[[TimmLMBackbone], object]) -> None:
    compare_with_new(freeze(make_backbone()), change)


@pytest.mark.parametrize("change", [loaded, TimmLMBackbone.double])
def test_features_are_dropped_when_a_frozen_policy_changes(change: Callable[[TimmLMBackbone], object]) -> None:
    compare_with_new(make_backbone().requires_grad_(False), change)


def test_what_was_made_in_inference_mode_serves_a_learner() -> None:
    """Autograd refuses tensors of inference mode: they have to be copied."""
    backbone = freeze(make_backbone())
    visuals = looked(backbone)
    with torch.inference_mode():
        backbone.features(visuals)
    torch.cat(backbone.features(visuals)).sum().backward()
    assert backbone.spatial_scale.grad is not None


def test_what_autocast_made_is_kept_from_a_pass_without_it() -> None:
    backbone = freeze(make_backbone())
    visuals = looked(backbone)
    expected = torch.cat(fresh(backbone).features(visuals))
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(torch.cat(backbone.features(visuals)).float(), expected)
    assert torch.equal(torch.cat(backbone.features(visuals)), expected)


def test_a_copy_shares_what_a_frozen_tower_made_and_not_what_another_did() -> None:
    backbone = make_backbone()
    assert frozen_copy(backbone).seen is not backbone.seen
    assert frozen_copy(freeze(backbone)).seen is backbone.seen
