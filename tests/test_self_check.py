"""The self-check: it agrees with Hugging Face's own forward, finds what is broken and says where, leaves nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.families import build
from modules.backbones.base import Backbone
from modules.backbones.cache import RaggedCache
from modules.backbones.hf_vlm import HFVLMBackbone
from modules.backbones.qwen_vl import QwenVLBackbone
from modules.backbones.scaling import ScalerConfig
from modules.backbones.timm_lm import TimmLMBackbone
from modules.policy import PolicyError, freeze_matching
from modules.self_check import Parity, check, learn, measure, roll_out, scripts
from modules.trajectory import Trajectory, Visual
from tests.conftest import make_backbone

ZOOM = ScalerConfig(min_pixels=64, max_pixels=32 * 32)


def broken(kind: type[TimmLMBackbone], **kwargs: object) -> TimmLMBackbone:
    backbone = make_backbone(**kwargs)  # type: ignore[arg-type]
    backbone.__class__ = kind
    return backbone


class Shifted(TimmLMBackbone):
    """Counts positions one too far once something is in the cache: what a stale position counter does."""

    def forward(
        self, embeddings: Tensor, position_ids: Tensor, attention_mask: Tensor, cache: RaggedCache | None = None
    ) -> Tensor:
        late = cache is not None and attention_mask.shape[-1] > embeddings.shape[1]
        return super().forward(embeddings, position_ids + int(late), attention_mask, cache)


class Blind(TimmLMBackbone):
    """Every crop looks alike."""

    def encode(self, visuals: Sequence[Visual]) -> list[Tensor]:
        features = super().encode(visuals)
        return [torch.zeros_like(f) if v.role == "crop" else f for f, v in zip(features, visuals, strict=True)]


class NotANumber(TimmLMBackbone):
    """Crops give NaN."""

    def encode(self, visuals: Sequence[Visual]) -> list[Tensor]:
        features = super().encode(visuals)
        return [f * torch.nan if v.role == "crop" else f for f, v in zip(features, visuals, strict=True)]


def change_single_tokens(module: torch.nn.Module, by: float) -> None:
    """Add noise to what a module returns where it is called with one token a row, as in a rollout."""

    def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
        first = output if isinstance(output, Tensor) else output[0]
        if first.shape[1] == 1:
            first = first + by * torch.randn(first.shape, generator=torch.Generator().manual_seed(0))
        return first if isinstance(output, Tensor) else (first, *output[1:])

    module.register_forward_hook(hook)


@pytest.mark.parametrize("crop", [None, ZOOM])
def test_an_exact_backbone_passes(crop: ScalerConfig | None) -> None:
    parity = check(make_backbone(crop=crop))
    assert parity.std >= 1
    assert parity.difference <= 1e-4
    assert parity.control >= 0.1
    assert (parity.tolerance, parity.layer) == (1e-3, None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folders of tiny random models of real families."""
    root = tmp_path_factory.mktemp("models")
    return cache(lambda family: str(build(family, root / family)))


@pytest.mark.parametrize("family", ["smolvlm", "gemma3"])
def test_real_families_pass(folders: Callable[[str], str], family: str) -> None:
    parity = check(HFVLMBackbone(folders(family)))
    assert parity.std >= 1
    assert parity.difference <= 1e-4
    assert parity.control >= 0.1


class Stale(QwenVLBackbone):
    """Rows and columns for the images of the prompt only, as where M-RoPE's positions are kept from the prefill."""

    def positions(self, token_ids: Tensor, visuals: Sequence[Visual], start: int) -> tuple[Tensor, int]:
        return super().positions(token_ids, visuals if start == 0 else (), start)


def test_stale_rotary_positions_of_qwen_are_found(folders: Callable[[str], str]) -> None:
    folder = folders("qwen2_5_vl")
    parity = check(QwenVLBackbone(folder))
    assert parity.difference <= 1e-4
    assert parity.control >= 0.1
    with pytest.raises(PolicyError, match=r"Expected Stale .*`model\.model\.language_model\.layers\.0`"):
        check(Stale(folder))


@pytest.mark.parametrize("family", [None, "qwen2_5_vl"])
def test_what_is_compared_is_ragged_and_equals_hugging_faces_own_pass(
    folders: Callable[[str], str], family: str | None
) -> None:
    backbone = QwenVLBackbone(folders(family)) if family else make_backbone(crop=ZOOM)
    with torch.no_grad():
        rows = scripts(backbone)
        rolled = roll_out(backbone, rows)
        learned = backbone.head(learn(backbone, rolled.trajectories))
        token_by_token = backbone.head(rolled.hidden)
    (portrait, landscape), _ = ([crop.pixels.shape[-2:] for crop in row.crops.values()] for row in rows)
    assert portrait[0] > portrait[1]
    assert landscape[0] < landscape[1]
    assert [len(t.visuals) for t in rolled.trajectories] == [3, 2]
    assert len({len(t.prompt_ids) for t in rolled.trajectories}) == 2
    assert len({len(t.completion_ids) for t in rolled.trajectories}) == 2
    expected = torch.cat([native(backbone, t) for t in rolled.trajectories])
    assert (token_by_token - expected).abs().max() <= 1e-4
    assert (learned - expected).abs().max() <= 1e-4


@torch.no_grad()
def native(backbone: TimmLMBackbone | HFVLMBackbone, trajectory: Trajectory) -> Tensor:
    """(STEPS, V) what predicts each written token, by Hugging Face's own forward."""
    ids = torch.cat([trajectory.prompt_ids, trajectory.completion_ids])
    logits = backbone.native_logits(ids, trajectory.visuals)
    return logits[len(trajectory.prompt_ids) - 1 : -1][trajectory.sampled]


def test_shifted_positions_are_found_in_the_first_layer() -> None:
    with pytest.raises(PolicyError) as error:
        check(broken(Shifted))
    said = str(error.value)
    assert said.startswith("Expected Shifted to give the same logits")
    assert "`language.model.layers.0`" in said
    parity = measure(broken(Shifted))
    assert parity.difference >= 0.1  # the control: it is no rounding
    assert f"differ by {parity.difference:.3g}" in said
    assert f"deviation is {parity.std:.3g}" in said


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_layer_that_differs_is_named(layer: int) -> None:
    backbone = make_backbone(layers=3)
    change_single_tokens(backbone.language.model.layers[layer], by=1.0)
    assert measure(backbone).layer == f"language.model.layers.{layer}"


def test_what_differs_behind_the_layers_is_said_to() -> None:
    backbone = make_backbone()
    change_single_tokens(backbone.language.model.norm, by=1.0)
    with pytest.raises(PolicyError, match="its layers do not"):
        check(backbone)


def test_tolerance_decides() -> None:
    backbone = make_backbone()
    change_single_tokens(backbone.language.model.layers[1], by=0.02)
    parity = measure(backbone)
    share = parity.difference / parity.std
    assert 1e-3 < share < 0.5
    assert check(backbone, tolerance=1.1 * share).same
    with pytest.raises(PolicyError, match="token by token"):
        check(backbone, tolerance=0.9 * share)


def test_a_backbone_that_does_not_see_its_crops_is_found() -> None:
    with pytest.raises(PolicyError, match=r"Expected Blind to see its crops, .* change by 0 only"):
        check(broken(Blind))


def test_nan_is_a_difference() -> None:
    with pytest.raises(PolicyError, match="differ by nan"):
        check(broken(NotANumber))
    assert not Parity(float("nan"), 1.0, 0.25, 1.0).same
    assert not Parity(0.0, 1.0, 0.25, float("nan")).sees_crops


def test_a_crop_must_change_more_than_rounding_does() -> None:
    assert Parity(difference=0.05, std=1.0, tolerance=0.25, control=0.06).sees_crops
    assert not Parity(difference=0.05, std=1.0, tolerance=0.25, control=0.04).sees_crops
    assert not Parity(difference=0.0, std=2.0, tolerance=0.25, control=0.002).sees_crops


def test_half_precision_has_a_tolerance_of_its_own() -> None:
    backbone = make_backbone(layers=4)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = check(backbone)
    half = check(backbone.to(torch.bfloat16))
    for parity in (mixed, half):
        assert parity.tolerance == 0.25
        assert parity.difference > 1e-3 * parity.std  # rounding, which the tolerance of float32 would refuse
        assert parity.control > 2 * parity.tolerance * parity.std
    with pytest.raises(PolicyError, match="Expected Shifted"):
        check(broken(Shifted).to(torch.bfloat16))


@pytest.mark.parametrize("kind", [TimmLMBackbone, Shifted])
def test_nothing_is_left_behind(kind: type[TimmLMBackbone]) -> None:
    backbone = broken(kind)
    freeze_matching(backbone, ["vision", "projector"])  # features are then kept
    backbone.train()
    backbone.vision.eval()
    modes = {name: module.training for name, module in backbone.named_modules()}
    weights = {name: p.clone() for name, p in backbone.state_dict().items()}
    random, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
    parity = measure(backbone)
    assert parity.same == (kind is TimmLMBackbone)
    assert {name: module.training for name, module in backbone.named_modules()} == modes
    assert len(set(modes.values())) == 2
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.is_grad_enabled()
    gc.collect()
    assert len(backbone.encoded) == 0
    assert all(p.grad is None for p in backbone.parameters())
    assert all(torch.equal(weights[name], p) for name, p in backbone.state_dict().items())
    assert not any(module._forward_hooks for module in backbone.modules())


def test_modes_come_back_after_an_error() -> None:
    class Failing(TimmLMBackbone):
        def encode(self, visuals: Sequence[Visual]) -> list[Tensor]:
            assert not self.training
            raise RuntimeError("out of memory")

    backbone = broken(Failing).train()
    with pytest.raises(RuntimeError, match="out of memory"):
        check(backbone)
    assert backbone.training
    assert torch.is_grad_enabled()


def test_the_context_limits_what_is_played() -> None:
    """Image and crops are 4 tokens, prompts at most 4 + 6, and 9 tokens are written."""
    longest = max(len(t.prompt_ids) + len(t.completion_ids) for t in roll_out_of(make_backbone()))
    assert [len(row.crops) for row in scripts(make_backbone(context_length=longest))] == [2, 1]
    tight = make_backbone(context_length=longest - 2)
    assert [len(row.crops) for row in scripts(tight)] == [1, 1]
    assert check(tight).control >= 0.1
    with pytest.raises(PolicyError, match="but it holds 12"):
        check(make_backbone(context_length=12))


def roll_out_of(backbone: Backbone) -> list[Any]:
    with torch.no_grad():
        return roll_out(backbone, scripts(backbone)).trajectories


@pytest.mark.parametrize("least", [64, 16 * 16, 40 * 40])
def test_the_image_is_small(least: int) -> None:
    backbone = make_backbone()
    backbone.image_scaler = ScalerConfig(min_pixels=least, max_pixels=64 * 64).build(8)
    (image,) = scripts(backbone)[0].sample.images
    scaled = backbone.see([image])[0].pixels
    assert max(least, 24 * 8**2) <= image[0].numel() <= 1.2 * max(least, 24 * 8**2)
    assert scaled[0].numel() <= 1.5 * image[0].numel()
