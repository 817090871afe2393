"""The learner's pass alone: the shared prompt, memory, padding.

    python -m benchmarks.run --rows prefix memory padding

Trajectories are made up (random tokens, no image, random log-probabilities); the pass is `token_loss` with the policy
gradient, forward and backward, as `RGRPOModule` runs it.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.table import Row, interleaved, ratio, seconds_of
from modules.backbones.base import row_runs
from modules.backbones.fragments import FragmentVocabulary
from modules.backbones.scaling import ScalerConfig
from modules.backbones.timm_lm import LanguageConfig, TimmLMBackbone, TokenizerConfig, VisionConfig
from modules.functional.losses import selected_log_probs
from modules.functional.policy_gradient import rgrpo_loss
from modules.scoring import collate, predicting, token_loss
from modules.trajectory import Sample, StopReason, Trajectory, TrajectoryBatch

GROUP = 8
ROW_TOKENS = 2048  # `PolicyModule`'s default
CHUNK = 4096  # likewise, of its head
MIB = 1024  # kibibytes


def backbone_of(hidden: int, layers: int, vocabulary: int) -> TimmLMBackbone:
    """A random language model beside a tiny encoder that is not used; float32, ready to learn."""
    torch.manual_seed(0)
    vision = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "class_token": False}
    backbone = TimmLMBackbone(
        VisionConfig("vit_tiny_patch16_224", options={**vision, "global_pool": "", "dynamic_img_size": True}),
        LanguageConfig(
            config={
                "model_type": "qwen2",
                "vocab_size": vocabulary,
                "hidden_size": hidden,
                "intermediate_size": 4 * hidden,
                "num_hidden_layers": layers,
                "num_attention_heads": 8,
                "num_key_value_heads": 8,
                "max_position_embeddings": 8192,
                "tie_word_embeddings": False,
            }
        ),
        TokenizerConfig(vocabulary=FragmentVocabulary([f"w{k} " for k in range(1000)])),
        image=ScalerConfig(size=(16, 16)),
        crop=ScalerConfig(size=(16, 16)),
    )
    backbone.learn()
    return backbone


def group_of(backbone: TimmLMBackbone, prompt: int, completions: Sequence[int], seed: int = 0) -> list[Trajectory]:
    """Trajectories of one question, with so many tokens each; every token of a completion was sampled."""
    generator = torch.Generator().manual_seed(seed)
    words = (~backbone.banned).nonzero()[:, 0]

    def ids(count: int) -> Tensor:
        return words[torch.randint(len(words), (count,), generator=generator)]

    sample, asked = Sample(str(seed), "?"), ids(prompt)
    return [
        Trajectory(
            sample=sample,
            prompt_ids=asked,
            completion_ids=ids(length),
            sampled=torch.ones(length, dtype=torch.bool),
            log_probs=torch.full((length,), -math.log(len(words))),
            coordinates=torch.full((length,), torch.nan),
            visuals=(),
            turns=(),
            stop=StopReason.EOS,
            answer=None,
            text="",
        )
        for length in completions
    ]


def policy_gradient(batch: TrajectoryBatch) -> Callable[[Tensor, Tensor, slice], Tensor]:
    """The share of some tokens in a loss with made-up advantages."""
    advantages = torch.linspace(-1, 1, batch.num_trajectories)[batch.owners]

    def terms(log_probs: Tensor, entropy: Tensor, own: slice) -> Tensor:
        return rgrpo_loss(
            log_probs,
            batch.log_probs[own],
            advantages[own],
            torch.ones_like(advantages[own]),
            batch.owners[own],
            batch.num_trajectories,
            clip_low=0.2,
            clip_high=0.2,
        )[0]

    return terms


def learn(backbone: TimmLMBackbone, batch: TrajectoryBatch) -> None:
    """Forward and backward."""
    backbone.zero_grad()
    token_loss(backbone, batch, CHUNK, policy_gradient(batch))[0].backward()


def learn_with_all_logits(backbone: TimmLMBackbone, batch: TrajectoryBatch) -> None:
    """The same with the logits of all sampled tokens at once."""
    backbone.zero_grad()
    logits = backbone.head(predicting(backbone, batch))
    found = selected_log_probs(logits, batch.targets, batch.temperature, backbone.banned)
    policy_gradient(batch)(*found, slice(0, len(batch.targets))).backward()


def shared_prefix(
    repeats: int = 5, hidden: int = 512, layers: int = 8, vocabulary: int = 8192, prompt: int = 512, new: int = 64
) -> Row:
    """Seconds of a group whose prompt is computed once, over those with the prompt in a row for each trajectory."""
    backbone = backbone_of(hidden, layers, vocabulary)
    group = group_of(backbone, prompt, [new] * GROUP)
    once, each = (collate(backbone, group, row_tokens) for row_tokens in (ROW_TOKENS, 0))
    times = interleaved({"shared": lambda: learn(backbone, once), "each": lambda: learn(backbone, each)}, repeats)
    value, spread = ratio(times["shared"], times["each"])
    return Row(
        f"learner, group of {GROUP}, prompt {prompt}, completions of {new} / prompt computed for each",
        value,
        target=0.35,
        at_most=True,
        spread=spread,
        detail={
            "seconds": seconds_of(times),
            "positions": {"shared": once.token_ids.numel(), "each": each.token_ids.numel()},
        },
    )


def head_memory(
    trajectories: int = 16, tokens: int = 600, hidden: int = 128, layers: int = 4, vocabulary: int = 49152
) -> Row:
    """Peak memory of a pass in a process of its own, over that of one with all logits; both beyond the start."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for name in ("chunks", "all_logits"):
        with context.Pool(1) as pool:
            peaks[name] = pool.apply(peak_of, (name, trajectories, tokens, hidden, layers, vocabulary))
    value = peaks["chunks"] / peaks["all_logits"]
    return Row(
        f"learner, peak memory, {trajectories} trajectories of {tokens} tokens / all logits",
        value,
        target=0.25,
        at_most=True,
        spread=(value, value),
        detail={"mib": {name: round(peak) for name, peak in peaks.items()}, "vocabulary": vocabulary},
    )


def peak_of(name: str, trajectories: int, tokens: int, hidden: int, layers: int, vocabulary: int) -> float:
    """MiB of resident memory that a pass needs at its peak, gradients included, beyond weights and batch."""
    backbone = backbone_of(hidden, layers, vocabulary)
    made = [t for k in range(trajectories // GROUP) for t in group_of(backbone, 32, [tokens] * GROUP, seed=k)]
    batch = collate(backbone, made, ROW_TOKENS)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    (learn if name == "chunks" else learn_with_all_logits)(backbone, batch)
    return _resident("VmHWM") - before


def _resident(what: str) -> float:
    return int(Path("/proc/self/status").read_text().partition(f"{what}:")[2].split()[0]) / MIB


def padding(groups: int = 16, prompt: int = 256, median: float = 200.0, sigma: float = 0.7) -> Row:
    """Positions that the layers compute over tokens that there are, for completions of log-normal lengths."""
    backbone = backbone_of(32, 1, 2048)
    generator = torch.Generator().manual_seed(0)
    lengths = (median * torch.exp(sigma * torch.randn(groups, GROUP, generator=generator))).ceil().int().tolist()
    made = [t for k, own in enumerate(lengths) for t in group_of(backbone, prompt, own, seed=k)]
    batch = collate(backbone, made, ROW_TOKENS)
    computed = [0]

    def count(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        computed[0] += math.prod(kwargs["inputs_embeds"].shape[:2])

    hook = backbone.language.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    with torch.no_grad():
        backbone.hidden_states(batch)
    hook.remove()
    real = int((batch.segment_ids >= 0).sum())
    value = computed[0] / real
    return Row(
        "learner, positions computed / tokens, log-normal lengths",
        value,
        target=1.05,
        at_most=True,
        spread=(value, value),
        detail={
            "computed": computed[0],
            "tokens": real,
            "rows": len(batch.token_ids),
            "runs": len(row_runs(batch.segment_ids)),
            "as_one": round(batch.token_ids.numel() / real, 3),
            "lengths": {
                "median": statistics.median(n for own in lengths for n in own),
                "longest": max(map(max, lengths)),
            },
        },
    )


ROWS: dict[str, Callable[[], Row]] = {"prefix": shared_prefix, "memory": head_memory, "padding": padding}
