"""Tiny random models of real families, as complete Hugging Face folders.

Architecture, processor and image processor are transformers' own classes at small sizes; the tokenizer is Qwen's with
the family's special tokens behind its words; the chat template is in the family's style. What differs between
families (tiles, windows, deepstack features, bidirectional attention, wrappers around images) is therefore real.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

QWEN = Path(__file__).parent / "data" / "qwen2_5_vl"
WORDS = 4096  # of Qwen's vocabulary; with all 151,643 of them a tiny model is all embedding

Parts = tuple[dict[str, Any], ProcessorMixin]  # arguments of the model's config, and its processor


@dataclass(frozen=True)
class Family:
    """What `build` needs to know of a family.

    Args:
        make: from a tokenizer that has the special tokens, the model's config and the processor.
        template: the chat template (Jinja).
        eos: the token that ends what the model writes.
        named: special tokens that are attributes of the tokenizer.
        special: further special tokens.
    """

    make: Callable[[PreTrainedTokenizerBase, str], Parts]
    template: str
    eos: str
    named: dict[str, str] = field(default_factory=dict)
    special: tuple[str, ...] = ()


def build(family: str, folder: Path, seed: int = 0, words: int | None = WORDS) -> Path:
    """Write a tiny random model of a family: config, weights, processor with chat template, tokenizer.

    Args:
        family: a key of `FAMILIES`.
        folder: where to; made if it is not there.
        seed: of the weights.
        words: how much of Qwen's vocabulary the tokenizer keeps, the most frequent first; None: all of it.

    Returns:
        ``folder``.

    Raises:
        ValueError: an unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"Expected `family` to be one of {', '.join(FAMILIES)}, but got {family!r}.")
    known = FAMILIES[family]
    tokenizer = tokenizer_of(known, words)
    arguments, processor = known.make(tokenizer, known.template)
    config = AutoConfig.for_model(family, **arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        randomise(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights with which everything matters: logits of a standard deviation above 1, no bias and no norm at rest."""
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            weight.add_(0.2 * torch.randn_like(weight))
        elif "embed" in name and weight.ndim == 2:
            weight.normal_(0, 0.5)
        else:
            inputs = weight.shape[-1] if weight.ndim < 4 else weight[0].numel()
            gain = 2.0 if name.endswith(("lm_head.weight", "q_proj.weight", "k_proj.weight")) else 1.0
            weight.normal_(0, gain / math.sqrt(inputs))


def tokenizer_of(family: Family, words: int | None = WORDS) -> PreTrainedTokenizerBase:
    """Qwen's tokenizer with a family's special tokens behind its own."""
    vocabulary, merges = _qwen_words(words)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary | {token: len(vocabulary) + k for k, token in enumerate(QWEN_ADDED)},
        merges=merges,
        unk_token=None,  # type: ignore[arg-type]  # as in Qwen's own files
        eos_token=family.eos,
        pad_token="<|endoftext|>",
        model_max_length=4096,
        extra_special_tokens=[*(token for token, special in QWEN_ADDED.items() if special), *family.special],
        model_specific_special_tokens=family.named,
    )
    tokenizer.add_tokens([token for token, special in QWEN_ADDED.items() if not special])
    return tokenizer


@cache
def _qwen_words(words: int | None) -> tuple[dict[str, int], list[Any]]:
    """The first ``words`` of the vocabulary, and the merges (pairs) that make them: word 256 + k is made by merge k."""
    vocabulary: dict[str, int] = json.loads((QWEN / "vocab.json").read_text(encoding="utf-8"))
    lines = (QWEN / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [(left, right) for left, right in (line.split(" ") for line in lines)]
    if words is None:
        return vocabulary, merges
    return {word: k for word, k in vocabulary.items() if k < words}, merges[: words - 256]


def _text(tokenizer: PreTrainedTokenizerBase, **changes: Any) -> dict[str, Any]:
    """Arguments of a small text config: grouped-query attention, rotary frequencies that notice a shift by one."""
    return {
        "vocab_size": len(tokenizer) + 3,  # real models pad their embeddings, too
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **changes,
    }


def _ids(tokenizer: PreTrainedTokenizerBase, **tokens: str) -> dict[str, Any]:
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def _qwen_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return _ids(
        tokenizer,
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
    )


MROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}
GRID = {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
DYNAMIC: dict[str, Any] = {"size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28}}
TOWER = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def _qwen2_vl(tokenizer: PreTrainedTokenizerBase, template: str) -> Parts:
    vision = {**GRID, "embed_dim": 48, "hidden_size": 32, "mlp_ratio": 2}
    config = {
        "text_config": _text(tokenizer, rope_parameters=dict(MROPE)),
        "vision_config": vision,
        "tie_word_embeddings": True,  # as the 2B model
        **_qwen_ids(tokenizer),
    }
    images = Qwen2VLImageProcessor(**DYNAMIC)
    return config, Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=template)


def _qwen2_5_vl(tokenizer: PreTrainedTokenizerBase, template: str) -> Parts:
    vision = {
        **GRID,
        "depth": 3,
        "hidden_size": 48,
        "intermediate_size": 64,
        "out_hidden_size": 32,
        "window_size": 56,  # two by two tokens
        "fullatt_block_indexes": [1],
    }
    config = {
        "text_config": _text(tokenizer, rope_parameters=dict(MROPE)),
        "vision_config": vision,
        **_qwen_ids(tokenizer),
    }
    images = Qwen2VLImageProcessor(**DYNAMIC)
    return config, Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=template)


def _qwen3_vl(tokenizer: PreTrainedTokenizerBase, template: str) -> Parts:
    vision = {
        **GRID,
        "depth": 3,
        "patch_size": 16,
        "hidden_size": 48,
        "intermediate_size": 64,
        "out_hidden_size": 32,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1],
    }
    text = _text(tokenizer, head_dim=8, num_hidden_layers=3, rope_parameters={**MROPE, "mrope_interleaved": True})
    config = {"text_config": text, "vision_config": vision, **_qwen_ids(tokenizer)}
    images = Qwen2VLImageProcessor(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"shortest_edge": 4096, "longest_edge": 65536}
    )
    return config, Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=template)


def _qwen3_vl_moe(tokenizer: PreTrainedTokenizerBase, template: str) -> Parts:
    config, processor = _qwen3_vl(tokenizer, template)
    config["text_config"] |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return config, processor


def _glm4v(tokenizer: PreTrainedTokenizerBase, template: str) -> Parts:
    vision = {**GRID, "hidden_size": 48, "intermediate_size": 64, "out_hidden_size": 32, "image_size": 56}
    rope = {**MROPE, "partial_rotary_factor": 0.5}
    config = {
        "text_config": _text(tokenizer, num_attention_heads=2, num_key_value_heads=1, rope_parameters=rope),
        "vision_config": vision,
        **_ids(
            tokenizer,
            image_token_id="<|image|>",
            video_token_id="<|video|>",
            image_start_token_id="<|begin_of_image|>",
            image_end_token_id="<|end_of_image|>",
            video_start_token_id="<|begin_of_video|>",
            video_end_token_id="<|end_of_video|>",
        ),
    }
    # its limits count both frames of a temporal patch
    images = Glm4vImageProcessor(size={"shortest_edge": 8 * 28 * 28, "longest_edge": 128 * 28 * 28})
    return config, Glm4vProcessor(images, tokenizer, Glm4vVideoProcessor(), chat_template=template)


def _idefics_config(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Tiles of 28 x 28 pixels, four tokens each."""
    return {
        "text_config": _text(tokenizer, model_type="llama"),
        "vision_config": {**TOWER, "image_size": 28, "patch_size": 7},
        "scale_factor": 2,
        "pad_token_id": tokenizer.pad_token_id,
        **_ids(tokenizer, image_token_id="<image>"),
    }


def _smolvlm(tokenizer: PreTrainedTokenizerBase, template: str) -> Parts:
    images = SmolVLMImageProcessor(size={"longest_edge": 84}, max_image_size={"longest_edge": 28})
    videos = SmolVLMVideoProcessor(size={"longest_edge": 28}, max_image_size={"longest_edge": 28})
    processor = SmolVLMProcessor(images, tokenizer, videos, image_seq_len=4, chat_template=template)
    return _idefics_config(tokenizer), processor


def _idefics3(tokenizer: PreTrainedTokenizerBase, template: str) -> Parts:
    images = Idefics3ImageProcessor(size={"longest_edge": 84}, max_image_size={"longest_edge": 28})
    return _idefics_config(tokenizer), Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)


def _internvl(tokenizer: PreTrainedTokenizerBase, template: str) -> Parts:
    config = {
        "text_config": _text(tokenizer, model_type="qwen2"),
        "vision_config": {**TOWER, "image_size": [28, 28], "patch_size": [7, 7]},
        "image_seq_length": 4,
        "downsample_ratio": 0.5,
        "tie_word_embeddings": False,
        **_ids(tokenizer, image_token_id="<IMG_CONTEXT>"),
    }
    # as published: it is the processor that asks for tiles
    side = {"height": 28, "width": 28}
    images = GotOcr2ImageProcessor(size=side, crop_to_patches=False, min_patches=1, max_patches=6)
    videos = InternVLVideoProcessor(size={"height": 28, "width": 28})
    return config, InternVLProcessor(images, tokenizer, videos, image_seq_length=4, chat_template=template)


def _llava_onevision(tokenizer: PreTrainedTokenizerBase, template: str) -> Parts:
    grid = [[28 * rows, 28 * columns] for rows in range(1, 4) for columns in range(1, 4)]
    shared = {"vision_aspect_ratio": "anyres_max_4"}  # the largest grid has nine tiles and is shrunk
    config = {
        "text_config": _text(tokenizer, model_type="qwen2"),
        "vision_config": {
            **TOWER,
            "model_type": "siglip_vision_model",
            "image_size": 28,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "image_grid_pinpoints": grid,
        **shared,
        **_ids(tokenizer, image_token_index="<image>", video_token_index="<video>"),
    }
    images = LlavaOnevisionImageProcessor(size={"height": 28, "width": 28}, image_grid_pinpoints=grid)
    processor = LlavaOnevisionProcessor(
        images,
        tokenizer,
        LlavaOnevisionVideoProcessor(size={"height": 28, "width": 28}),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=template,
        **shared,
    )
    return config, processor


def _gemma3(tokenizer: PreTrainedTokenizerBase, template: str) -> Parts:
    text = _text(
        tokenizer,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=20,  # an image has 16 tokens
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
        },
    )
    vision = {**TOWER, "model_type": "siglip_vision_model", "image_size": 56, "patch_size": 7, "vision_use_head": False}
    config = {
        "text_config": text,
        "vision_config": vision,
        "mm_tokens_per_image": 16,
        **_ids(
            tokenizer,
            image_token_index="<image_soft_token>",
            boi_token_index="<start_of_image>",
            eoi_token_index="<end_of_image>",
        ),
    }
    images = Gemma3ImageProcessor(size={"height": 56, "width": 56})
    return config, Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=16)


QWEN_ADDED: dict[str, bool] = {  # token -> whether it is special, in the order of their ids
    token["content"]: token["special"]
    for token in json.loads((QWEN / "tokenizer_config.json").read_text(encoding="utf-8"))[
        "added_tokens_decoder"
    ].values()
}
QWEN_TEMPLATE: str = json.loads((QWEN / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
IDEFICS = ("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", "<video>", *TILES)

QWEN3_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GLM_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}"
    "{% if message.content[0].type == 'image' %}:{% else %}: {% endif %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
INTERNVL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }} "
    "{% for part in message.content if part.type == 'image' %}<image>{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ '\\n' + part.text }}{% endfor %}"
    "<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_TEMPLATE = (
    "<bos>{% for message in messages %}<start_of_turn>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text | trim }}{% endif %}"
    "{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(_qwen2_vl, QWEN_TEMPLATE, "<|im_end|>"),
    "qwen2_5_vl": Family(_qwen2_5_vl, QWEN_TEMPLATE, "<|im_end|>"),
    "qwen3_vl": Family(_qwen3_vl, QWEN3_TEMPLATE, "<|im_end|>"),
    "qwen3_vl_moe": Family(_qwen3_vl_moe, QWEN3_TEMPLATE, "<|im_end|>"),
    "glm4v": Family(
        _glm4v,
        GLM_TEMPLATE,
        "<|endoftext|>",
        special=(
            *("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|image|>", "<|video|>"),
            *(f"<|{edge}_of_{kind}|>" for kind in ("image", "video") for edge in ("begin", "end")),
        ),
    ),
    "smolvlm": Family(_smolvlm, SMOLVLM_TEMPLATE, "<end_of_utterance>", special=IDEFICS),
    "idefics3": Family(_idefics3, SMOLVLM_TEMPLATE, "<end_of_utterance>", special=IDEFICS),
    "internvl": Family(
        _internvl,
        INTERNVL_TEMPLATE,
        "<|im_end|>",
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "llava_onevision": Family(_llava_onevision, LLAVA_TEMPLATE, "<|im_end|>", special=("<image>", "<video>")),
    "gemma3": Family(
        _gemma3,
        GEMMA_TEMPLATE,
        "<end_of_turn>",
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        ("<bos>", "<start_of_turn>"),
    ),
}
