"""Budgets against what happens: images that are scaled, trajectories that are rolled out, bytes that are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.families import build
from modules.backbones.cache import RaggedCache
from modules.backbones.qwen_vl import QwenVLBackbone
from modules.backbones.scaling import ScalerConfig
from modules.backbones.timm_lm import TimmLMBackbone
from modules.budget import (
    Memory,
    VisualTokens,
    activation_bytes,
    cache_bytes,
    language_config,
    longest_trajectory,
    memory,
    prompt_range,
    rationale_length,
    readable,
    render,
    token_table,
)
from modules.engine import Decoding, LocalEngine, Request
from modules.functional.grammar import LEAST_ZOOM, MOST_ZOOM
from modules.policy import freeze_matching
from modules.replay import Replayer
from modules.trajectory import Region, StopReason
from tests.conftest import make_backbone, make_samples, scripted

SIZES = [(40, 60), (100, 30), (64, 64), (200, 160), (90, 90)]


@pytest.fixture
def zoomer() -> TimmLMBackbone:
    """Images of 8 to 40 tokens, crops of 4 to 16."""
    backbone = make_backbone()
    backbone.image_scaler = ScalerConfig(min_pixels=8 * 64, max_pixels=40 * 64).build(8)
    backbone.crop_scaler = ScalerConfig(min_pixels=4 * 64, max_pixels=16 * 64).build(8)
    return backbone


def test_tokens_are_those_of_images_that_are_really_scaled(zoomer: TimmLMBackbone) -> None:
    table = token_table(zoomer, SIZES)
    assert [(row.name, row.size) for row in table] == [
        ("smallest", (40, 60)),
        ("median", (64, 64)),
        ("largest", (200, 160)),
        ("longest", (100, 30)),
    ]
    for row in table:
        height, width = row.size
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        assert zoomer.see([image])[0].tokens == row.image

        def crop(x: float, y: float, image: Tensor = image) -> int:
            return zoomer.look([image], [Region((0.0, 0.0, x, y))])[0].tokens

        assert crop(width / 2, height / 2) == row.quarter
        strips = [n for k in (2, 3, 4, 6) for n in (crop(width / k, height), crop(width, height / k))]
        tried = [crop(1, 1), row.quarter, crop(width, height), *strips]
        assert row.smallest == min(tried)
        assert row.largest >= max(tried)
    assert len({row.image for row in table}) > 2
    assert {row.smallest for row in table} == {4}  # their lower limit, in cells of 64 pixels


def test_the_largest_crop_is_the_largest_that_can_be_asked_for(zoomer: TimmLMBackbone) -> None:
    zoomer.crop_scaler = ScalerConfig(min_pixels=64, max_pixels=60 * 64).build(8)
    image = torch.zeros(3, 16, 24, dtype=torch.uint8)
    (row,) = token_table(zoomer, [(16, 24)])
    boxes = [(0.0, 0.0, x, y) for x in (1.0, 8.0, 16.0, 24.0) for y in (1.0, 8.0, 16.0)]
    zooms = [None, LEAST_ZOOM, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, MOST_ZOOM]
    asked = {zoom: max(zoomer.look([image], [Region(box, zoom=zoom)])[0].tokens for box in boxes) for zoom in zooms}
    assert row.largest >= max(asked.values())
    assert 3 * asked[None] < row.largest <= 60  # the rule's alone are far from the limit
    zoomer.crop_scaler = ScalerConfig(size=(16, 16)).build(8)  # no zoom can be chosen
    assert {n for row in token_table(zoomer, SIZES) for n in (row.smallest, row.largest)} == {4}


def test_images_of_any_shape_are_counted(zoomer: TimmLMBackbone) -> None:
    table = token_table(zoomer, [(1, 1), (1, 5000), (12_000, 9_000)])
    assert [row.name for row in table] == ["smallest", "median, longest", "largest"]
    assert all(4 <= row.smallest <= row.quarter <= row.largest for row in table)


def test_rows_of_one_image_are_one(zoomer: TimmLMBackbone) -> None:
    assert [row.name for row in token_table(zoomer, [(64, 64)] * 3)] == ["all"]
    assert [row.name for row in token_table(zoomer, [(64, 64), (10, 90)])] == ["smallest, longest", "median, largest"]


def test_prompts_lie_within_their_bounds(zoomer: TimmLMBackbone) -> None:
    samples = []
    for k, size in enumerate(SIZES):
        image = torch.zeros(3, *size, dtype=torch.uint8)
        samples.append(replace(make_samples(1)[0], question="red" * (k + 1), images=(image,) * (k % 3)))
    lengths = [len(zoomer.prompt_ids(s, zoomer.see(s.images) if s.images else [])) for s in samples]
    shortest, longest = prompt_range(zoomer, samples, token_table(zoomer, SIZES))
    assert shortest == min(lengths) == 1  # text only
    assert longest >= max(lengths)
    assert longest == 3 + 2 * 40  # the third: three words and two images
    one_size = [replace(s, images=(torch.zeros(3, 64, 64, dtype=torch.uint8),)) for s in samples]
    lengths = [len(zoomer.prompt_ids(s, zoomer.see(s.images))) for s in one_size]
    assert prompt_range(zoomer, one_size, token_table(zoomer, [(64, 64)])) == (min(lengths), max(lengths))


def test_the_longest_trajectory_is_one_that_uses_up_its_turns() -> None:
    box = 'red {"bbox_2d": [8, 8, 24, 24]}'  # five tokens
    backbone = scripted([box * 3], crop=ScalerConfig(size=(32, 32)))
    decoding = Decoding(0.0, max_turns=3, max_turn_tokens=len(backbone.tokenize(box)))
    sample = make_samples(1)[0]
    (trajectory,) = LocalEngine().rollout(backbone, [Request(sample, 0)], decoding)
    assert trajectory.stop is StopReason.MAX_TURNS
    length = len(trajectory.prompt_ids) + len(trajectory.completion_ids)
    (row,) = token_table(backbone, [(64, 64)])
    assert row.largest == 16
    assert length == longest_trajectory(len(trajectory.prompt_ids), 3, decoding.max_turn_tokens, row.largest)


def test_a_rationales_length_is_that_of_its_replay() -> None:
    backbone = make_backbone()
    samples = make_samples(6)
    look, last = samples[0].rationale
    samples[1] = replace(samples[1], rationale=(look, look, last))
    samples[2] = replace(samples[2], rationale=(last,))
    trajectories, _ = Replayer(backbone)(samples)
    expected = [len(t.completion_ids) for t in trajectories]
    assert len(set(expected)) == 3
    blank = [replace(s, images=(torch.empty(3, 64, 64, dtype=torch.uint8, device="meta"),)) for s in samples]
    assert [rationale_length(backbone, sample, crop=4) for sample in blank] == expected


def test_memory_of_weights_gradients_and_optimizer(backbone: TimmLMBackbone) -> None:
    freeze_matching(backbone, ["vision"])
    trained = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    kept = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    needed = memory(backbone, backbone, (0, 0), (1, 1), head_chunk=1)
    assert needed is not None
    assert needed.gradients == sum(p.grad.nbytes for p in trained if p.grad is not None)
    assert needed.optimizer == sum(t.nbytes for t in kept)
    frozen = sum(p.nbytes for p in backbone.parameters() if not p.requires_grad)
    assert frozen > 0
    buffers = sum(b.nbytes for b in backbone.buffers())
    assert needed.weights == needed.gradients + frozen + buffers
    assert needed.total == needed.weights + 3 * needed.gradients + max(needed.cache, needed.activations)
    tested = memory(backbone, backbone, (1, 1), (0, 0), head_chunk=1)
    assert tested is not None
    assert (tested.gradients, tested.optimizer, tested.activations) == (0, 0, 0)
    assert tested.weights == needed.weights


def test_memory_of_weights_in_half_precision(backbone: TimmLMBackbone) -> None:
    full = memory(backbone, backbone, (2, 100), (2, 100), head_chunk=64)
    half = memory(backbone.bfloat16(), backbone, (2, 100), (2, 100), head_chunk=64)
    assert full is not None
    assert half is not None
    assert half.optimizer == full.optimizer / 2
    assert half.cache == full.cache / 2
    assert full.activations / 2 < half.activations < full.activations  # norms and logits stay in float32


@pytest.mark.parametrize(("rows", "tokens"), [(3, 30), (2, 64), (2, 65), (1, 200)])
@torch.no_grad()
def test_memory_of_the_cache_is_that_of_its_buffers(backbone: TimmLMBackbone, rows: int, tokens: int) -> None:
    cache = RaggedCache()
    counts = torch.full((rows,), tokens)
    mask = cache.prepare(counts, tokens)
    ids = torch.ones(rows, tokens, dtype=torch.long)
    backbone(backbone.embed(ids), torch.arange(tokens).expand(1, rows, tokens), mask, cache)
    kept = sum(t.nbytes for t in [*cache.keys, *cache.values])
    assert cache_bytes(language_config(backbone), torch.float32, rows, tokens) == kept


def kept_for_backward(config: Any, dtype: torch.dtype, rows: int, tokens: int) -> int:
    """Bytes that autograd keeps of a forward pass, weights excepted."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            kept[pointer] = tensor
        return tensor

    embeddings = torch.randn(rows, tokens, config.hidden_size, dtype=dtype, requires_grad=True)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None].repeat(rows, 1, 1, 1)
    places = torch.arange(tokens).expand(rows, tokens)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(inputs_embeds=embeddings, attention_mask=mask, position_ids=places, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_memory_of_activations_is_what_autograd_keeps(family: str, dtype: torch.dtype) -> None:
    config = AutoConfig.for_model(
        family,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=50,
    )
    kept = kept_for_backward(config, dtype, rows=2, tokens=64)
    estimated = activation_bytes(config, dtype, 2, 64, checkpointed=False)
    assert kept / estimated == pytest.approx(1.0, abs=0.25)  # Qwen3 has norms of queries and keys as well
    # twice as many layers keep twice as much; checkpointed, only their inputs are more
    checkpointed = activation_bytes(config, dtype, 2, 64, checkpointed=True)
    config.num_hidden_layers = 12
    assert activation_bytes(config, dtype, 2, 64, checkpointed=False) > 1.8 * estimated
    inputs = activation_bytes(config, dtype, 2, 64, checkpointed=True) - checkpointed
    assert inputs == 6 * 2 * 64 * 64 * dtype.itemsize
    assert checkpointed < estimated / 2


def test_checkpointing_is_noticed(backbone: TimmLMBackbone) -> None:
    plain = memory(backbone, backbone, (0, 0), (4, 1000), head_chunk=16)
    for layer in backbone.language.model.layers:
        layer.gradient_checkpointing = True
    checkpointed = memory(backbone, backbone, (0, 0), (4, 1000), head_chunk=16)
    assert plain is not None
    assert checkpointed is not None
    assert checkpointed.activations < plain.activations
    assert checkpointed.weights == plain.weights


def test_logits_are_counted_a_chunk_at_a_time(backbone: TimmLMBackbone) -> None:
    def activations(chunk: int) -> int:
        needed = memory(backbone, backbone, (0, 0), (2, 50), head_chunk=chunk)
        assert needed is not None
        return needed.activations

    assert activations(30) - activations(10) == 20 * len(backbone.banned) * 4 * 4
    assert activations(1000) == activations(100)  # there are no more tokens than that


def test_the_language_model_is_found(backbone: TimmLMBackbone) -> None:
    assert language_config(backbone) is backbone.language.config
    del backbone.language
    assert language_config(backbone) is None
    assert memory(backbone, backbone, (1, 1), (1, 1), 1) is None


def test_a_real_family(tmp_path: Path) -> None:
    """Qwen2.5-VL: a token for a cell of 28 x 28 pixels, and one on either side of an image."""
    backbone = QwenVLBackbone(str(build("qwen2_5_vl", tmp_path)), image_tokens=(4, 64), crop_tokens=(4, 16))
    config = language_config(backbone)
    assert (config.model_type, config.num_key_value_heads) == ("qwen2_5_vl_text", 2)
    table = token_table(backbone, [(280, 140), (2800, 2800)])
    assert [(row.image, row.smallest, row.largest) for row in table] == [
        (50 + 2, 4 + 2, 16 + 2),
        (64 + 2, 4 + 2, 16 + 2),
    ]
    image = torch.zeros(3, 280, 140, dtype=torch.uint8)
    sample = replace(make_samples(1)[0], images=(image,))
    prompt = len(backbone.prompt_ids(sample, backbone.see([image])))
    assert prompt_range(backbone, [sample], table) == (prompt, prompt + 14)


def test_render() -> None:
    table = [
        VisualTokens("smallest, median", (480, 640), 391, 276, 4, 391),
        VisualTokens("largest", (3000, 2000), 4058, 1016, 6, 1016),
    ]
    needed = Memory(15 << 30, 14 << 30, 28 << 30, 3 << 20, 9 << 30)
    assert render(table, ["prompts  up to 4100 of 32768 tokens"], needed).split("\n") == [
        "visual tokens              size  image  quarter crop  smallest crop  largest crop",
        "  smallest, median    640 x 480    391           276              4           391",
        "  largest           2000 x 3000   4058          1016              6          1016",
        "prompts  up to 4100 of 32768 tokens",
        "memory       weights  gradients  optimizer  rollout cache  activations    peak",
        "  estimated   15 GiB     14 GiB     28 GiB          3 MiB        9 GiB  66 GiB",
    ]
    assert render([], ["prompts"], None) == "prompts"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1 << 20, "1 MiB"), (int(15.25 * 2**30), "15.2 GiB")],
)
def test_readable(count: int, text: str) -> None:
    assert readable(count) == text
