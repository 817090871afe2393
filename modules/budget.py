"""What a run will need of the context and of memory, before it starts: visual tokens, longest sequences, bytes.

Counts of visual tokens include what stands around an image. Lengths are upper bounds; bytes are estimates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from modules.backbones.base import Backbone
from modules.functional.grammar import MOST_ZOOM
from modules.self_check import computing_dtype
from modules.trajectory import Box, Sample, Visual

FLOAT32 = 4  # bytes
LOGITS = 4  # float32 values that exist for each logit at a time: itself, tempered, its log-probability, a gradient
NAMES = ("smallest", "median", "largest", "longest")  # images of a data set: by area, and by aspect ratio


@dataclass(frozen=True)
class VisualTokens:
    """How many tokens an image comes to, and crops of it."""

    name: str  # which image of the data
    size: tuple[int, int]  # (height, width), original pixels
    image: int
    quarter: int  # a crop of half its height and half its width
    smallest: int  # crop: of a pixel
    largest: int  # crop: of all that were tried


@dataclass(frozen=True)
class Memory:
    """Bytes. A rollout's cache and the learner's activations exist one after the other."""

    weights: int
    gradients: int
    optimizer: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        """At the worse of the two moments."""
        return self.weights + self.gradients + self.optimizer + max(self.cache, self.activations)


def token_table(backbone: Backbone, sizes: Sequence[tuple[int, int]]) -> list[VisualTokens]:
    """Visual tokens of the smallest, median and largest image, and of the one of the most extreme aspect ratio.

    Args:
        backbone: scales and counts.
        sizes: (height, width) of the data's images; one row for each distinct one of the four.
    """
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    longest = max(by_area, key=lambda size: max(size) / min(size))
    chosen = dict(zip(NAMES, (by_area[0], by_area[len(by_area) // 2], by_area[-1], longest), strict=True))
    names: dict[tuple[int, int], list[str]] = {}
    for name, size in chosen.items():
        names.setdefault(size, []).append(name)
    if len(set(sizes)) == 1:
        names = {by_area[0]: ["all"]}
    return [visual_tokens(backbone, ", ".join(group), size) for size, group in names.items()]


def visual_tokens(backbone: Backbone, name: str, size: tuple[int, int]) -> VisualTokens:
    """See `VisualTokens`; crops of a pixel, a quarter, the whole image and strips of several shapes are tried.

    Where the policy can choose its zoom, the largest one is the largest of those at the greatest zoom as well.
    Where tokens follow the shape and not the area (tiles), another shape may come to a few more.
    """
    height, width = float(size[0]), float(size[1])
    pixel, quarter, whole = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, width / 2, height / 2), (0.0, 0.0, width, height)
    strips: list[Box] = [
        box for k in (2, 3, 4, 6) for box in ((0.0, 0.0, width / k, height), (0.0, 0.0, width, height / k))
    ]
    boxes = [pixel, quarter, whole, *strips]
    crops = [len(backbone.visual_ids(*backbone.crop_scaler.output_size(box, size))) for box in boxes]
    zoomed = [
        len(backbone.visual_ids(*backbone.crop_scaler.output_size(box, size, MOST_ZOOM)))
        for box in (boxes if backbone.zooms else ())
    ]
    image = len(backbone.visual_ids(*backbone.image_scaler.output_size(whole, size)))
    return VisualTokens(name, size, image, quarter=crops[1], smallest=min(crops), largest=max(crops + zoomed))


def prompt_range(backbone: Backbone, samples: Sequence[Sample], table: Sequence[VisualTokens]) -> tuple[int, int]:
    """Bounds of the prompts' tokens: every image as small, and as large, as the ``table`` has them.

    Args:
        backbone: writes the prompts.
        samples: at least one; of their images, only the number is looked at.
        table: of visual tokens.
    """
    text = [(len(backbone.prompt_ids(replace(s, images=()), ())), len(s.images)) for s in samples]
    least = min((row.image for row in table), default=0)
    most = max((row.image for row in table), default=0)
    return min(n + images * least for n, images in text), max(n + images * most for n, images in text)


def longest_trajectory(prompt: int, max_turns: int, max_turn_tokens: int, crop: int) -> int:
    """Tokens of a trajectory that uses up its turns; behind the last one no crop is shown.

    Args:
        prompt: its tokens.
        max_turns: see `engine.Decoding`.
        max_turn_tokens: likewise.
        crop: tokens of the largest crop.
    """
    return prompt + max_turns * max_turn_tokens + (max_turns - 1) * crop


def rationale_length(backbone: Backbone, sample: Sample, crop: int) -> int:
    """Tokens of a written rationale and of what is shown in it, each time a crop of ``crop`` tokens.

    Args:
        backbone: writes it.
        sample: of its images, only the sizes are looked at.
        crop: tokens of the largest crop.
    """
    sizes = [(image.shape[-2], image.shape[-1]) for image in sample.images]
    scaled = [backbone.image_scaler.output_size((0.0, 0.0, float(w), float(h)), (h, w)) for h, w in sizes]
    seen = [Visual(torch.empty(3, *size, device="meta"), 0) for size in scaled]
    text = sum(len(backbone.write(step.text, step.region, sample, seen)[0]) for step in sample.rationale)
    return text + sum(step.region is not None for step in sample.rationale) * crop


def memory(
    policy: nn.Module, backbone: Backbone, cached: tuple[int, int], learned: tuple[int, int], head_chunk: int
) -> Memory | None:
    """What a run needs on one device; None if the backbone has no Hugging Face language model.

    Optimizer: two states of each parameter that trains, in its dtype (AdamW). Cache and activations are those of the
    language model, taken for one of Llama's form; a vision tower that trains needs more.

    Args:
        policy: the module that is trained, with everything that it holds (a reference, say).
        backbone: of ``policy``.
        cached: trajectories of a rollout in flight, and tokens of each.
        learned: trajectories of a micro-batch, and tokens of each; what they share is not taken off. 0: no training.
        head_chunk: sampled tokens whose logits exist at a time.
    """
    config = language_config(backbone)
    if config is None:
        return None
    dtype = computing_dtype(backbone)
    trained = sum(size_of(p) for p in policy.parameters() if p.requires_grad) if learned[0] else 0
    checkpointed = any(isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing for m in policy.modules())
    chunk = min(head_chunk, learned[0] * learned[1])
    logits = chunk * len(backbone.banned) * LOGITS * FLOAT32
    return Memory(
        weights=sum(map(size_of, [*policy.parameters(), *policy.buffers()])),
        gradients=trained,
        optimizer=2 * trained,
        cache=cache_bytes(config, dtype, *cached),
        activations=activation_bytes(config, dtype, *learned, checkpointed) + logits,
    )


def size_of(tensor: Tensor) -> int:
    """Bytes."""
    return tensor.numel() * tensor.element_size()


def language_config(backbone: Backbone) -> Any:
    """The config of the Hugging Face model that writes, or None if the backbone is made of none."""
    models = (m for m in backbone.modules() if isinstance(m, PreTrainedModel))
    return next((m.config.get_text_config() for m in models if m.get_output_embeddings() is not None), None)


def cache_bytes(config: Any, dtype: torch.dtype, rows: int, tokens: int) -> int:
    """Keys and values in a `RaggedCache`, whose buffers grow to the next power of two, from 64 on."""
    capacity = max(64, 1 << (tokens - 1).bit_length())
    return 2 * config.num_hidden_layers * _heads(config)[1] * rows * capacity * dtype.itemsize


def activation_bytes(config: Any, dtype: torch.dtype, rows: int, tokens: int, checkpointed: bool) -> int:
    """What the backward pass of a language model of Llama's form needs kept of its forward pass.

    For each token and layer: in float32, the inputs of two norms; in ``dtype``, their two outputs before and after
    the scale (4 times the width), queries, keys and values for all heads and twice the attention's output (5 times the
    heads' width), and four times the width of the feed-forward network. Checkpointed, only the inputs of the layers
    are kept, and one layer at a time has the rest. Attention scores are never kept (sdpa), masks are: a byte for each
    pair of tokens and as much again in ``dtype``.
    """
    width, (queries, _) = config.hidden_size, _heads(config)
    layer = 2 * width * FLOAT32 + (4 * width + 5 * queries + 4 * _feed_forward(config)) * dtype.itemsize
    layers = config.num_hidden_layers
    kept = layers * width * dtype.itemsize + layer if checkpointed else layers * layer
    return rows * tokens * kept + rows * tokens**2 * (1 + dtype.itemsize)


def _heads(config: Any) -> tuple[int, int]:
    """Width of all query heads together, and of all key heads."""
    heads = config.num_attention_heads
    dimension = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * dimension, (getattr(config, "num_key_value_heads", None) or heads) * dimension


def _feed_forward(config: Any) -> int:
    """Width of the feed-forward network, of all experts that one token goes through."""
    experts = getattr(config, "num_experts_per_tok", None)
    if experts and getattr(config, "moe_intermediate_size", None):
        return int(experts * config.moe_intermediate_size)
    return int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)


def render(table: Sequence[VisualTokens], lengths: Sequence[str], needed: Memory | None) -> str:
    """What a person reads in the terminal.

    Args:
        table: of visual tokens; may be empty.
        lengths: sentences about lengths, a line each.
        needed: bytes.
    """
    tokens = [["visual tokens", "size", "image", "quarter crop", "smallest crop", "largest crop"]]
    for row in table:
        size = f"{row.size[1]} x {row.size[0]}"
        tokens.append([f"  {row.name}", size, *(str(n) for n in (row.image, row.quarter, row.smallest, row.largest))])
    lines = [*(aligned(tokens) if table else ()), *lengths]
    if needed is not None:
        parts = {
            "weights": needed.weights,
            "gradients": needed.gradients,
            "optimizer": needed.optimizer,
            "rollout cache": needed.cache,
            "activations": needed.activations,
            "peak": needed.total,
        }
        lines += aligned([["memory", *parts], ["  estimated", *map(readable, parts.values())]])
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first column is flush left, and all others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def readable(count: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    amount, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 999.5 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{amount:.3g} {units[0]}"
