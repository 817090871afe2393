"""Encoders and projectors of every kind in `TimmLMBackbone`: in the right order, trained, refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.nn import functional as F

from modules.backbones.projectors import ProjectorConfig, pixel_shuffle
from modules.backbones.scaling import ScalerConfig
from modules.backbones.timm_lm import VisionConfig
from modules.scoring import collate, token_log_probs
from tests.conftest import make_samples
from tests.timm_parts import ENCODERS, VIT, build, encoder, learner_log_probs, native_log_probs, places, written


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_give_a_token_a_patch_in_row_major_order_at_any_size(family: str) -> None:
    backbone = build(encoder(family), scaler=ScalerConfig(min_pixels=64 * 64, max_pixels=112 * 112))
    image = make_samples(1)[0].images[0]
    for shape in ((64, 40), (30, 64)):
        (visual,) = backbone.see([image[:, : shape[0], : shape[1]]])
        (features,) = backbone.encode([visual])
        height, width = visual.pixels.shape[-2:]
        assert (height > width) == (shape[0] > shape[1])
        assert visual.tokens == len(backbone.visual_ids(height, width)) == height * width // backbone.patch**2
        assert len(features) == visual.tokens
    assert places(backbone, 2, 3) == list(range(6))
    assert places(backbone, 3, 2) == list(range(6))


@pytest.mark.parametrize("family", ENCODERS)
def test_what_is_not_frozen_is_trained(family: str) -> None:
    """Parameters without a gradient stall data-parallel ranks, and weight decay would act on them alone."""
    backbone = build(encoder(family), scaler=ScalerConfig((84, 168)) if "v2" in family else ScalerConfig((64, 96)))
    log_probs, _ = token_log_probs(backbone, collate(backbone, written(backbone)), chunk=100)
    log_probs.sum().backward()
    assert [name for name, p in backbone.named_parameters() if p.requires_grad != (p.grad is not None)] == []
    frozen = {name.split(".")[1] for name, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"siglip": {"attn_pool"}, "vit averaged": {"fc_norm"}, "convnext": {"head"}}.get(family, set())


def test_pretrained_weights_are_loaded_heads_and_all(tmp_path: Path) -> None:
    """A folder as the hub has them, with the attention pool that is not used here."""
    torch.manual_seed(5)
    options = {k: v for k, v in VIT.items() if k != "dynamic_img_size"}
    source = timm.create_model("vit_base_patch16_siglip_224", num_classes=7, **options)
    timm.models.save_for_hf(source, tmp_path, model_args=options)
    vision = VisionConfig(f"local-dir:{tmp_path}", pretrained=True, options={"dynamic_img_size": True})
    loaded = build(vision).vision.state_dict()
    assert len(loaded) == len(source.state_dict()) - 2  # the classifier
    for name, value in loaded.items():
        assert torch.equal(value, source.state_dict()[name]), name
    random = build(VisionConfig(f"local-dir:{tmp_path}", options={"dynamic_img_size": True})).vision.state_dict()
    assert not torch.equal(random["blocks.0.attn.qkv.weight"], loaded["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("vision", "scaler", "message"),
    [
        (VisionConfig("vit_tinny"), None, r"`vision.name` to name .* 'vit_tinny': .*Unknown model"),
        (VisionConfig("vit_tiny_patch16_224", options={"depht": 1}), None, "'depht'"),
        (VisionConfig("local-dir:/none", pretrained=True), None, r"`vision.name` .*'local-dir:/none'"),
        (VisionConfig("vit_tiny_patch16_224", options={"depth": 1}), None, "of an image of 32 x 48 .*dynamic_img_size"),
        (VisionConfig("pit_ti_224"), ScalerConfig((224, 224)), "'pit_ti_224' to make . x . features .* it gives 1"),
        (
            VisionConfig("vit_tiny_patch16_224", options=VIT),
            ScalerConfig((32, 40)),
            r"`image.size` .* 16, .*\(32, 40\)",
        ),
    ],
    ids=["name", "option", "folder", "fixed size", "pooled", "off the grid"],
)
def test_encoders_that_cannot_be_used_are_refused(
    vision: VisionConfig, scaler: ScalerConfig | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(vision, scaler=scaler)


def test_pixel_shuffle_is_torchs() -> None:
    maps = torch.randn(2, 5, 4, 6)
    shuffled = pixel_shuffle(maps.flatten(2).transpose(1, 2), 4, 6, 2)
    expected = F.pixel_unshuffle(maps, 2).unflatten(1, (5, 4)).transpose(1, 2).flatten(1, 2)  # theirs: channels first
    assert torch.equal(shuffled, expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_pixel_shuffle_makes_fewer_tokens_of_a_coarser_grid(family: str) -> None:
    scaler = ScalerConfig(min_pixels=64 * 64, max_pixels=160 * 160)
    plain = build(encoder(family), scaler=scaler)
    backbone = build(encoder(family), scaler=scaler, projector=ProjectorConfig("pixel_shuffle", 2))
    assert backbone.cell == 2 * backbone.patch == 2 * plain.cell
    (visual,) = backbone.see([make_samples(1)[0].images[0][:, :40]])
    height, width = visual.pixels.shape[-2:]
    assert height % backbone.cell == width % backbone.cell == 0
    assert visual.tokens == len(backbone.visual_ids(height, width)) == height * width // backbone.cell**2
    assert 4 * visual.tokens == len(plain.visual_ids(height, width))
    assert places(backbone, 2, 3) == list(range(6))
    trajectories = written(backbone)
    native = torch.cat([native_log_probs(backbone, t) for t in trajectories])
    assert (learner_log_probs(backbone, trajectories) - native).abs().max() < 1e-4
    backbone.encode([visual])[0].sum().backward()
    assert all(p.grad is not None for p in backbone.projector.parameters())


@pytest.mark.parametrize(("kind", "ratio"), [("pixel_shuffle", None), ("pixel_shuffle", 1), ("mlp", 2)])
def test_ratios_that_do_not_fit_the_projector_are_refused(kind: Any, ratio: int | None) -> None:
    with pytest.raises(ValueError, match=r"`projector.ratio`"):
        ProjectorConfig(kind, ratio)
