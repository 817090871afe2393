"""A 7B model with random weights on a GPU: a decode step against memory, a learner's step against matrix products.

    python -m benchmarks.run --rows decode lora

The model is Qwen2.5-VL-7B in its sizes, in bfloat16. What a step is held against is measured beside it, round by round:
how fast memory is copied, and how fast large matrices are multiplied.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig

from benchmarks.families import FAMILIES, tokenizer_of
from benchmarks.learner import CHUNK, ROW_TOKENS, policy_gradient
from benchmarks.table import Row, ratio
from modules.backbones.qwen_vl import QwenVLBackbone
from modules.engine import Decoding, GroupSampler, LocalEngine
from modules.lora import LoRA, add_lora
from modules.scoring import collate, token_log_probs, token_loss
from modules.trajectory import Sample, Trajectory

NEED_A_GPU = {
    "decode": "decode step of a 7B, 64 trajectories in flight / weights and cache read once",
    "lora": "learner step of a 7B with LoRA, share of the measured matrix rate",
}


@dataclass(frozen=True)
class Size:
    """A model, and how much it is given to do.

    Args:
        text: of the language model's config.
        vision: of the tower's config.
        pixels: side of the square image that a question shows.
        copied: MiB that are copied to see how fast memory is.
        multiplied: rows and columns of the matrices that are multiplied to see how fast that is.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    pixels: int = 896  # 32 x 32 visual tokens
    copied: int = 4096
    multiplied: int = 8192


SEVEN_B = Size(
    text={
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128_000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    vision={
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
)


def model_of(size: Size, device: str) -> QwenVLBackbone:
    """The model in bfloat16, made where it stays."""
    family = FAMILIES["qwen2_5_vl"]
    tokenizer = tokenizer_of(family, None)
    arguments, processor = family.make(tokenizer, family.template)
    arguments["text_config"] |= {"vocab_size": 152_064, "tie_word_embeddings": False, **size.text}
    arguments["vision_config"] |= size.vision
    tokens = (size.pixels // 28) ** 2
    with tempfile.TemporaryDirectory() as folder:
        Qwen2_5_VLConfig(**arguments).save_pretrained(folder)
        processor.save_pretrained(folder)
        torch.manual_seed(0)
        with torch.device(device):
            backbone = QwenVLBackbone(folder, (tokens, tokens), random=True, dtype="bfloat16", instruction="")
    backbone.requires_grad_(False)
    return backbone.to(device)


def questions(count: int, size: Size) -> list[Sample]:
    """About images of noise."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, size.pixels, size.pixels)
    images = [torch.randint(256, shape, dtype=torch.uint8, generator=generator) for _ in range(count)]
    return [Sample(str(k), "What is this?", images=(image,)) for k, image in enumerate(images)]


def timed(work: Callable[[], object], device: str) -> float:
    """How long the device takes for it."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait for what a GPU still has to do."""
    if device != "cpu":
        torch.cuda.synchronize()


def bandwidth(size: Size, device: str) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.ones(size.copied << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * len(source) / timed(lambda: target.copy_(source), device)


def matrix_rate(size: Size, device: str) -> float:
    """Operations a second of a large product in bfloat16."""
    one, other = torch.randn(2, size.multiplied, size.multiplied, device=device, dtype=torch.bfloat16)
    torch.mm(one, other)
    return 2 * size.multiplied**3 / timed(lambda: torch.mm(one, other), device)


def decode_step(
    size: Size = SEVEN_B,
    device: str = "cuda",
    group: int = 8,
    lengths: tuple[int, int] = (32, 160),
    rounds: int = 3,
) -> Row:
    """Seconds of a decode step over what reading weights and cache once would take.

    A step is what a rollout takes longer for each further token, with all that the engine does behind a token.

    Args:
        size: of the model.
        device: where.
        group: questions, and trajectories of each.
        lengths: tokens of the shorter and of the longer rollout of a round.
        rounds: that count; one is run before.
    """
    backbone, engine = model_of(size, device), LocalEngine()
    requests = GroupSampler(group).requests(questions(group, size), seed=0)
    short, long = lengths

    def rollout(tokens: int) -> list[Trajectory]:
        return engine.rollout(backbone, requests, Decoding(max_turns=1, max_turn_tokens=tokens))

    config = backbone.text_config
    kept = len(rollout(short)[0].prompt_ids) + (short + long) / 2  # tokens a trajectory, half-way
    head = config.hidden_size // config.num_attention_heads
    cache = len(requests) * kept * config.num_hidden_layers * 2 * config.num_key_value_heads * head * 2
    embedded = backbone.model.get_input_embeddings().weight.nbytes  # of which a step reads a few rows
    weights = sum(p.nbytes for name, p in backbone.named_parameters() if backbone.part(name) == "language") - embedded
    steps, floors = [], []
    for _ in range(rounds):
        floors.append((weights + cache) / bandwidth(size, device))
        more = timed(lambda: rollout(long), device) - timed(lambda: rollout(short), device)
        steps.append(more / (long - short))
    value, spread = ratio(steps, floors)
    detail = {"step_s": steps, "floor_s": floors, "weights_bytes": weights, "cache_bytes": cache}
    return Row(NEED_A_GPU["decode"], value, target=2.0, at_most=True, spread=spread, detail=detail)


def lora_step(
    size: Size = SEVEN_B,
    device: str = "cuda",
    group: int = 8,
    tokens: int = 256,
    rounds: int = 5,
) -> Row:
    """Share of the measured matrix rate at which a learner's step does the operations that it needs.

    Those are twice a forward pass's: frozen weights have no gradients. Recomputed ones do not count.

    Args:
        size: of the model.
        device: where.
        group: trajectories of the one question.
        tokens: that each writes.
        rounds: that count; one is run before.
    """
    backbone = model_of(size, device)
    requests = GroupSampler(group).requests(questions(1, size), seed=0)
    written = LocalEngine().rollout(backbone, requests, Decoding(max_turns=1, max_turn_tokens=tokens))
    add_lora(backbone, LoRA(rank=16))
    backbone.to(device).learn()
    optimizer = torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad], lr=1e-5)
    needed = 2 * operations(backbone, written)

    def step() -> None:
        batch = collate(backbone, written, ROW_TOKENS)
        token_loss(backbone, batch, CHUNK, policy_gradient(batch))[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    shares, taken = [], []
    for _ in range(rounds):
        rate = matrix_rate(size, device)
        taken.append(timed(step, device))
        shares.append(needed / taken[-1] / rate)
    detail = {"step_s": taken, "operations": needed, "tokens": sum(len(t.completion_ids) for t in written)}
    spread = (min(shares), max(shares))
    return Row(NEED_A_GPU["lora"], statistics.median(shares), target=0.4, at_most=False, spread=spread, detail=detail)


@torch.no_grad()
def operations(backbone: QwenVLBackbone, trajectories: Sequence[Trajectory]) -> int:
    """Of a forward pass, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    batch = collate(backbone, trajectories, ROW_TOKENS)
    backbone.features(batch.visuals)  # of a frozen tower, computed in the rollout
    with FlopCounterMode(display=False) as counter:
        token_log_probs(backbone, batch, CHUNK)
    return counter.get_total_flops()


ROWS: dict[str, Callable[[], Row]] = {"decode": decode_step, "lora": lora_step}
