"""The backbones whose exactness is measured: tiny random ones of every family, or what a folder or a hub name holds."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from benchmarks.families import FAMILIES, build
from modules.backbones.base import Backbone
from modules.backbones.fragments import FragmentVocabulary
from modules.backbones.hf_vlm import HFVLMBackbone, load
from modules.backbones.qwen_vl import QwenVLBackbone
from modules.backbones.scaling import ScalerConfig
from modules.backbones.timm_lm import LanguageConfig, TimmLMBackbone, TokenizerConfig, VisionConfig

NAMES = ("timm_lm", *FAMILIES)

# what `benchmarks.parity` asks and writes: the vocabulary of `timm_lm`
QUESTIONS = ("What does it say?", "Which number is on the card?")
THOUGHTS = ("Left: ", "Below: ", "All: ")


def backbone_of(name: str, folder: Path) -> Backbone:
    """A tiny random backbone of a known family, written to ``folder``, or what a folder or a hub name holds.

    Raises:
        ValueError: neither a family nor something that can be a folder or a hub name, or loading fails.
    """
    if name == "timm_lm":
        return timm_lm()
    if name in FAMILIES:
        return tiny(name, build(name, folder))
    if not Path(name).is_dir() and name.count("/") != 1:
        raise ValueError(f"Expected `--backbone` to be {', '.join(NAMES)}, a folder or a hub name, but got {name!r}.")
    config = load("configuration", name, AutoConfig.from_pretrained)
    return QwenVLBackbone(name) if config.model_type.startswith("qwen") else HFVLMBackbone(name)


def tiny(family: str, folder: Path) -> HFVLMBackbone:
    """The backbone of a folder that `build` wrote, with limits within those of its image processor."""
    if family.startswith("qwen"):
        return QwenVLBackbone(str(folder), (4, 64), (4, 32), instruction="\nLook closely.")
    limits = ScalerConfig(min_pixels=4 * 28**2, max_pixels=64 * 28**2)
    return HFVLMBackbone(str(folder), image=limits, crop=limits, instruction="\nLook closely.")


def timm_lm(seed: int = 0) -> TimmLMBackbone:
    """A small vision transformer and language model, whose vocabulary is what `benchmarks.parity` writes."""
    phrases = [*QUESTIONS, *THOUGHTS, '{"bbox_2d": [', "<answer>", "4", "2", "</answer>"]
    vision = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "class_token": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TimmLMBackbone(
            VisionConfig("vit_tiny_patch16_224", options={**vision, "global_pool": "", "dynamic_img_size": True}),
            LanguageConfig(
                config={
                    "model_type": "qwen2",
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "max_position_embeddings": 1024,
                    "initializer_range": 0.3,
                    "tie_word_embeddings": False,
                }
            ),
            TokenizerConfig(vocabulary=FragmentVocabulary(phrases, coordinates=1400)),
            image=ScalerConfig(min_pixels=32 * 32, max_pixels=96 * 96),
            crop=ScalerConfig(min_pixels=16 * 16, max_pixels=64 * 64),
        )
