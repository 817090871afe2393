"""Any timm vision encoder, a projector, any Hugging Face causal language model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import timm
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from modules.backbones.base import Backbone, Part
from modules.backbones.cache import RaggedCache
from modules.backbones.fragments import FragmentVocabulary, fragment_tokenizer
from modules.crop import CropAndScale
from modules.functional.boxes import BoxSpace
from modules.trajectory import Sample, Visual

IMAGE_TOKEN = "<image>"


@dataclass(frozen=True)
class VisionConfig:
    """A timm encoder: ``timm.create_model(name, pretrained=pretrained, **options)``.

    Args:
        name: a timm model name, or ``hf-hub:...`` / ``local-dir:...`` as timm understands them.
        pretrained: load timm's weights.
        options: further arguments of the architecture.
        mean: of the pixels that the encoder expects; None: what timm knows of the model.
        std: likewise.
    """

    name: str
    pretrained: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    mean: float | list[float] | None = None
    std: float | list[float] | None = None


@dataclass(frozen=True)
class LanguageConfig:
    """A Hugging Face causal language model, loaded by ``name`` or built at random from ``config``.

    Args:
        name: hub name or local folder of pretrained weights.
        config: arguments of ``AutoConfig.for_model``, ``model_type`` among them; the vocabulary
            size is the tokenizer's where none is given.
    """

    name: str | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.name is None) == (not self.config):
            raise ValueError(
                "Expected exactly one of `language.name` (pretrained) and `language.config` (random), but got "
                f"name={self.name!r} and config={self.config!r}."
            )


@dataclass(frozen=True)
class TokenizerConfig:
    """A pretrained tokenizer, or one that is made of fragments.

    Args:
        name: hub name or local folder of a Hugging Face tokenizer; None: the vocabulary below.
        vocabulary: of a policy that is trained from nothing.
    """

    name: str | None = None
    vocabulary: FragmentVocabulary = field(default_factory=FragmentVocabulary)


@dataclass(frozen=True)
class ScalerConfig:
    """How an image or a crop is brought to the encoder's patch grid.

    Args:
        size: (height, width); None: the zoom rule (crops) within the limits below.
        min_pixels: smallest area after scaling, in pixels.
        max_pixels: largest area after scaling, in pixels.
    """

    size: tuple[int, int] | None = None
    min_pixels: int = 64 * 64
    max_pixels: int = 1024 * 1024

    def build(self, grid: int) -> CropAndScale:
        """The layer, for an encoder whose sides must be multiples of ``grid``."""
        if self.size is not None:
            return CropAndScale(size=self.size)
        return CropAndScale(grid=grid, min_pixels=self.min_pixels, max_pixels=self.max_pixels)


class TimmLMBackbone(Backbone):
    """A small or large policy out of library parts.

    Args:
        vision: the encoder.
        language: the language model; it runs with PyTorch's scaled dot product attention.
        tokenizer: its words.
        image: how whole images are scaled.
        crop: how crops are scaled.
        projector: from the encoder's width to the language model's.
        box_space: the space in which boxes are written.
        instruction: text behind every question.
        context_length: longest sequence; None: what the language model's config says.
    """

    pixel_mean: Tensor  # (3, 1, 1)
    pixel_std: Tensor

    def __init__(
        self,
        vision: VisionConfig,
        language: LanguageConfig,
        tokenizer: TokenizerConfig,
        image: ScalerConfig,
        crop: ScalerConfig,
        projector: Literal["linear", "mlp"] = "linear",
        box_space: Literal["pixels", "resized", "unit", "thousand"] = "pixels",
        instruction: str = "",
        context_length: int | None = None,
    ) -> None:
        super().__init__()
        self.instruction = instruction
        self.box_space = BoxSpace(box_space)
        if tokenizer.name is None:
            self.tokenizer = fragment_tokenizer(tokenizer.vocabulary)
            families = [self.tokenizer.convert_tokens_to_ids(f) for f in tokenizer.vocabulary.coordinate_tokens()]
            bins = torch.tensor(families) if families else None
            self.bin_size = float(tokenizer.vocabulary.step)
        else:
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer.name)
            self.tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, False)
            bins = None
        self.register_buffer("coordinate_bins", bins, persistent=False)
        self.image_token_id = cast(int, self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))

        self.vision = build_encoder(vision)
        known = self.vision.pretrained_cfg
        for name, given in (("mean", vision.mean), ("std", vision.std)):
            value = torch.as_tensor(known[name] if given is None else given, dtype=torch.float32)
            self.register_buffer(f"pixel_{name}", value.expand(3).reshape(3, 1, 1).clone(), persistent=False)
        self.patch = int(self.vision.feature_info[-1]["reduction"])
        self.image_scaler, self.crop_scaler = image.build(self.patch), crop.build(self.patch)

        self.language: Any
        if language.name is not None:
            self.language = AutoModelForCausalLM.from_pretrained(language.name, attn_implementation="sdpa")
            if len(self.tokenizer) > self.language.get_input_embeddings().num_embeddings:
                self.language.resize_token_embeddings(len(self.tokenizer))
        else:
            config = AutoConfig.for_model(**{"vocab_size": len(self.tokenizer), **language.config})
            self.language = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        width = self.language.config.get_text_config().hidden_size
        self.context_length = context_length or self.language.config.get_text_config().max_position_embeddings

        self.projector = projection(projector, self.vision.num_features, width)
        # The language model's own positions are one-dimensional: it is told row, column and role as well.
        self.spatial_scale = nn.Parameter(torch.full((width,), 0.5))
        self.roles = nn.ParameterDict({r: nn.Parameter(0.1 * torch.randn(width)) for r in ("image", "crop")})

        vocabulary = self.language.get_input_embeddings().num_embeddings
        reserved = {self.image_token_id, self.tokenizer.pad_token_id, self.tokenizer.unk_token_id}
        banned = torch.zeros(vocabulary, dtype=torch.bool)
        banned[sorted(k for k in reserved if k is not None)] = True
        banned[len(self.tokenizer) :] = True  # rows of the embedding that stand for no token
        self.eos_ids = frozenset({self.tokenizer.eos_token_id} - {None})
        banned[sorted(self.eos_ids)] = False  # some tokenizers pad with their end token
        self.register_buffer("banned", banned, persistent=False)

    def prompt_ids(self, sample: Sample, visuals: Sequence[Visual]) -> Tensor:
        """The images, then the question and the instruction."""
        images = [self.visual_ids(*visual.pixels.shape[-2:]) for visual in visuals]
        return torch.cat([*images, self.tokenize(sample.question + self.instruction)])

    def visual_ids(self, height: int, width: int) -> Tensor:
        """One placeholder a patch."""
        return torch.full(((height // self.patch) * (width // self.patch),), self.image_token_id)

    def part(self, parameter: str) -> Part:
        """See `Backbone.part`."""
        first = parameter.split(".")[0]
        return "vision" if first == "vision" else "language" if first == "language" else "projector"

    def encode(self, visuals: Sequence[Visual]) -> list[Tensor]:
        """Visuals of one shape and role go through the encoder together."""
        features: list[Tensor | None] = [None] * len(visuals)
        kinds: dict[tuple[str, torch.Size], list[int]] = {}
        for k, visual in enumerate(visuals):
            kinds.setdefault((visual.role, visual.pixels.shape), []).append(k)
        for (role, shape), members in kinds.items():
            pixels = torch.stack([visuals[k].pixels for k in members]).to(self.pixel_mean)
            maps = self.vision.forward_features((pixels - self.pixel_mean) / self.pixel_std)
            tokens = self.projector(self._sequence(maps))
            grid = (shape[-2] // self.patch, shape[-1] // self.patch)
            spatial = sincos_2d(*grid, tokens.shape[-1]).to(tokens)
            encoded = tokens + spatial * self.spatial_scale + self.roles[role]
            for k, row in zip(members, encoded, strict=True):
                features[k] = row
        return [f for f in features if f is not None]

    def _sequence(self, maps: Tensor) -> Tensor:
        """(B, N, C) patch tokens of what the encoder returns: tokens, or a map in either memory order."""
        if maps.ndim == 3:
            return maps[:, self.vision.num_prefix_tokens :]
        if getattr(self.vision, "output_fmt", "NCHW") == "NCHW":
            maps = maps.permute(0, 2, 3, 1)
        return maps.flatten(1, 2)

    def embed(self, token_ids: Tensor) -> Tensor:
        """The language model's input embeddings."""
        embedded: Tensor = self.language.get_input_embeddings()(token_ids)
        return embedded

    def forward(
        self, embeddings: Tensor, position_ids: Tensor, attention_mask: Tensor, cache: RaggedCache | None = None
    ) -> Tensor:
        """See `Backbone.forward`."""
        hidden: Tensor = self.language.base_model(
            inputs_embeds=embeddings,
            position_ids=position_ids[0],
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """The language model's output layer."""
        logits: Tensor = self.language.get_output_embeddings()(hidden)
        return logits


def build_encoder(vision: VisionConfig) -> Any:
    """The timm model without a classifier; ``Any``, since what it has depends on its kind."""
    return timm.create_model(vision.name, vision.pretrained, num_classes=0, **vision.options)


def projection(kind: Literal["linear", "mlp"], inputs: int, outputs: int) -> nn.Module:
    """The projector from the encoder's width to the language model's."""
    if kind == "linear":
        return nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


def sincos_2d(rows: int, columns: int, width: int) -> Tensor:
    """(rows * columns, width) sines and cosines of the relative row and column, half of the width each.

    Coordinates are relative to the image, (k + 0.5) / n, so that one grid means the same at every
    resolution; frequencies run from half a period over the image to 16 periods.
    """
    quarter = math.ceil(width / 4)
    frequencies = math.pi * 2 ** torch.linspace(0, 5, quarter)

    def axis(n: int) -> Tensor:
        phase = ((torch.arange(n) + 0.5) / n)[:, None] * frequencies
        return torch.cat([phase.sin(), phase.cos()], -1)

    y, x = axis(rows)[:, None], axis(columns)[None]
    both = torch.cat([y.expand(rows, columns, -1), x.expand(rows, columns, -1)], -1)
    return both.reshape(rows * columns, -1)[:, :width]
