"""Small encoders and language models of every kind, and the policies that tests make of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modules.backbones.fragments import FragmentVocabulary
from modules.backbones.scaling import ScalerConfig
from modules.backbones.timm_lm import LanguageConfig, TimmLMBackbone, TokenizerConfig, VisionConfig
from modules.engine import Decoding, LocalEngine, Request
from modules.replay import Replayer
from modules.scoring import collate, token_log_probs
from modules.trajectory import Trajectory, Visual
from tests.conftest import FRAGMENTS, make_samples

VIT = {"embed_dim": 48, "depth": 1, "num_heads": 4, "dynamic_img_size": True}
STAGES = {"depths": [1, 1, 1, 1]}
SWIN = {**STAGES, "embed_dim": 12, "num_heads": [1, 2, 3, 4], "strict_img_size": False}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "vit without class token": ("vit_tiny_patch16_224", {**VIT, "class_token": False, "global_pool": ""}),
    "vit averaged": ("vit_little_patch16_reg4_gap_256", VIT),
    "siglip": ("vit_base_patch16_siglip_224", VIT),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", VIT),
    "dinov3": ("vit_small_patch16_dinov3", {**VIT, "embed_dim": 64}),
    "convnext": ("convnext_tiny", {**STAGES, "dims": [8, 16, 24, 32]}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "resnet": ("resnet10t", {}),
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
WINDOW = 6  # shorter than any sequence here
MIXED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3}
GEMMA = {"sliding_window": WINDOW, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
LANGUAGES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": {"model_type": "gpt2", **GPT2},  # learned positions
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {**LLAMA, "model_type": "qwen2", **MIXED},
    "qwen3": {**LLAMA, "model_type": "qwen3", **MIXED},
    "gemma2": {**LLAMA, "model_type": "gemma2", **GEMMA, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**LLAMA, "model_type": "gemma3_text", **GEMMA, "sliding_window_pattern": 2},
    "cohere": {**LLAMA, "model_type": "cohere", "logit_scale": 4.0},
    "granite": {**LLAMA, "model_type": "granite", "logits_scaling": 0.5},
}


def build(
    vision: VisionConfig | None = None,
    language: dict[str, Any] | None = None,
    scaler: ScalerConfig | None = None,
    tokenizer: TokenizerConfig | None = None,
    seed: int = 0,
    attention: Any = "sdpa",
    dtype: Any = "float32",
    checkpointing: bool = False,
    **options: Any,
) -> TimmLMBackbone:
    torch.manual_seed(seed)
    scaler = scaler or ScalerConfig((32, 48))
    vocabulary = FragmentVocabulary(FRAGMENTS, coordinates=17, step=4)
    backbone = TimmLMBackbone(
        vision or VisionConfig("vit_tiny_patch16_224", options={**VIT, "embed_dim": 32}),
        LanguageConfig(
            config=language or LLAMA, attn_implementation=attention, dtype=dtype, gradient_checkpointing=checkpointing
        ),
        tokenizer or TokenizerConfig(vocabulary=vocabulary),
        image=scaler,
        crop=scaler,
        **options,
    )
    return backbone.eval()


def encoder(family: str) -> VisionConfig:
    name, options = ENCODERS[family]
    return VisionConfig(name, options=options)


def written(backbone: TimmLMBackbone, count: int = 3) -> list[Trajectory]:
    """Rationales with a crop each."""
    trajectories, skipped = Replayer(backbone)(make_samples(count))
    assert not skipped
    return trajectories


def places(backbone: TimmLMBackbone, rows: int, columns: int) -> list[int]:
    """For each cell of an image of ``rows`` x ``columns`` of them: the token that changes most when the cell does."""
    side = backbone.cell
    pixels = torch.rand(3, rows * side, columns * side, generator=torch.Generator().manual_seed(0))
    visuals = [Visual(pixels, rows * columns)]
    for k in range(rows * columns):
        top, left = k // columns * side, k % columns * side
        other = pixels.clone()
        other[:, top : top + side, left : left + side] = 1 - other[:, top : top + side, left : left + side]
        visuals.append(Visual(other, rows * columns))
    with torch.no_grad():
        first, *others = backbone.encode(visuals)
    assert len(first) == rows * columns
    return [int((features - first).norm(dim=-1).argmax()) for features in others]


def normal(logits: Tensor, backbone: TimmLMBackbone) -> Tensor:
    return logits.masked_fill(backbone.banned, -torch.inf).log_softmax(-1)


def native_log_probs(backbone: TimmLMBackbone, trajectory: Trajectory) -> Tensor:
    """(sampled tokens,) by the language model's own forward over this trajectory alone."""
    ids = torch.cat([trajectory.prompt_ids, trajectory.completion_ids])
    log_probs = normal(backbone.native_logits(ids, trajectory.visuals).float(), backbone)[:-1]
    own = log_probs[torch.arange(len(ids) - 1), ids[1:]][len(trajectory.prompt_ids) - 1 :]
    return own[trajectory.sampled]


def learner_log_probs(backbone: TimmLMBackbone, trajectories: list[Trajectory]) -> Tensor:
    with torch.no_grad():
        return token_log_probs(backbone, collate(backbone, trajectories), chunk=50)[0]


def rolled_out(backbone: TimmLMBackbone) -> list[Trajectory]:
    requests = [Request(sample, seed) for sample in make_samples(2) for seed in range(3)]
    decoding = Decoding(max_turn_tokens=12, max_turns=2)
    return LocalEngine().rollout(backbone, requests, decoding)
