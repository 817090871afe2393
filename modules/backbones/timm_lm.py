"""Any timm vision encoder, a projector, any Hugging Face causal language model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import timm
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from modules.backbones.base import Backbone, Part
from modules.backbones.cache import RaggedCache
from modules.backbones.fragments import FragmentVocabulary, fragment_tokenizer
from modules.backbones.masks import cap_logits, check_language_model, layer_masks, plain_head, recompute_activations
from modules.backbones.projectors import ProjectorConfig, pixel_shuffle
from modules.backbones.scaling import ScalerConfig
from modules.functional.boxes import BoxSpace
from modules.trajectory import Sample, Visual

IMAGE_TOKEN = "<image>"
EXACT = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}  # rounding, relative to the largest logit
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VisionConfig:
    """A timm encoder: ``timm.create_model(name, pretrained=pretrained, **options)``.

    Args:
        name: a timm model name, or ``hf-hub:...`` / ``local-dir:...`` as timm understands them.
        pretrained: load its weights.
        options: further arguments of the architecture, such as ``dynamic_img_size: true`` for transformers that are
            to take images of other sizes than the one they were trained on.
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
        dtype: of its weights; encoder and projector are float32 unless the trainer's precision says otherwise.
        attn_implementation: sdpa, or eager for models that have no other (Gemma 2); flash attention has no place for
            the explicit masks of packed rows.
        gradient_checkpointing: recompute activations in the backward pass.
    """

    name: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    gradient_checkpointing: bool = False

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


class TimmLMBackbone(Backbone):
    """A small or large policy out of library parts.

    Args:
        vision: the encoder.
        language: the language model.
        tokenizer: its words.
        image: how whole images are scaled.
        crop: how crops are scaled.
        projector: from the encoder's features to the language model's embeddings.
        box_space: the space in which boxes are written.
        instruction: text behind every question.
        context_length: longest sequence; None: what the language model's config says.

    Attributes:
        patch: side in pixels of the square that the encoder makes one feature of.
        cell: side in pixels of the square that is one token.

    Raises:
        ValueError: a part that cannot be loaded, an encoder that does not turn the images it would be shown into one
            feature a patch, or a language model that this class cannot run exactly; names it and says why.
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
        projector: ProjectorConfig = ProjectorConfig(),
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
            self.tokenizer = loaded("tokenizer.name", AutoTokenizer.from_pretrained, tokenizer.name)
            self.tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, False)
            bins = None
            self.bin_size = 0.001 if self.box_space.kind == "unit" else 1.0
        self.register_buffer("coordinate_bins", bins, persistent=False)
        self.image_token_id = cast(int, self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))

        self.vision = build_encoder(vision)
        known = self.vision.pretrained_cfg
        for name, given in (("mean", vision.mean), ("std", vision.std)):
            value = torch.as_tensor(known[name] if given is None else given, dtype=torch.float32)
            self.register_buffer(f"pixel_{name}", value.expand(3).reshape(3, 1, 1).clone(), persistent=False)
        self.ratio = projector.ratio or 1
        self.patch = int(self.vision.feature_info[-1]["reduction"])
        self.cell = self.patch * self.ratio
        self.image_scaler, self.crop_scaler = image.build(self.cell), crop.build(self.cell)
        features = self._probe_encoder(vision.name, [("image", image.size), ("crop", crop.size)])

        self.language = build_language(language, len(self.tokenizer))
        self.text_config = self.language.config.get_text_config()
        self.context_length = context_length or longest_sequence(self.text_config)
        words, width = self.language.get_input_embeddings().weight.shape
        self.projector = projector.build(features.shape[-1], width)
        # The language model's own positions are one-dimensional: it is told row, column and role as well.
        self.spatial_scale = nn.Parameter(torch.full((width,), 0.5))
        self.roles = nn.ParameterDict({r: nn.Parameter(0.1 * torch.randn(width)) for r in ("image", "crop")})

        self.eos_ids = frozenset({self.tokenizer.eos_token_id} - {None})
        self.register_buffer("banned", reserved(self.tokenizer, words, but=self.eos_ids), persistent=False)
        begin = self.tokenizer.bos_token_id
        self.opening = [begin] if begin in self.tokenizer("")["input_ids"] else []
        self._told = False  # that a question has words which the tokenizer does not know
        self._check_language()

    def _probe_encoder(self, name: str, scalers: Iterable[tuple[str, tuple[int, int] | None]]) -> Tensor:
        """Encode an image as each scaler will give them; what the features do not depend on (heads, pools) is frozen.

        Returns:
            (1, N, C) features of the last of these images.
        """
        features = torch.empty(0)
        training = self.vision.training
        self.vision.eval()
        for role, size in scalers:
            height, width = size or (2 * self.cell, 3 * self.cell)
            if height % self.cell or width % self.cell:
                raise ValueError(f"Expected `{role}.size` to be multiples of {self.cell}, but got {size}.")
            rows, columns = height // self.patch, width // self.patch
            try:
                features = self._sequence(self.vision.forward_features(torch.zeros(1, 3, height, width)))
                problem = "" if features.shape[1] == rows * columns else f"it gives {features.shape[1]}"
            except (AssertionError, AttributeError, IndexError, RuntimeError, ValueError) as error:
                problem = str(error)
            if problem:
                raise ValueError(
                    f"Expected the encoder {name!r} to make {rows} x {columns} features of an {role} of {height} x "
                    f"{width} pixels, but: {problem}. Transformers may need `vision.options.dynamic_img_size: true`."
                )
        self.vision.train(training)
        parameters = list(self.vision.parameters())
        needed = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, needed, strict=True):
            parameter.requires_grad_(gradient is not None)
        return features

    @torch.no_grad()
    def _check_language(self) -> None:
        """Compare the two ways in which a language model is run: token by token with a cache, and by its own forward.

        That is how models are found out which attend in both directions, carry a state, know no explicit positions or
        do something to their logits that `head` does not know.
        """
        model = self.language.config.model_type
        ids = (~self.banned).nonzero()[:4, 0]
        training = self.language.training
        self.language.eval()
        try:
            native = self.native_logits(ids, ())
            cache, rows = RaggedCache(), []
            for start, chunk in enumerate(ids.split(1)):
                mask = cache.prepare(torch.ones(1, dtype=torch.long), 1)
                rows.append(self.head(self(self.embed(chunk[None]), torch.full((1, 1, 1), start), mask, cache))[0])
                cache.commit()
            difference = float((torch.cat(rows) - native).abs().max() / native.abs().max())
        except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"Expected a language model that takes positions, masks and a cache, but {model!r} fails: {error}"
            ) from error
        if not difference <= EXACT[native.dtype]:
            raise ValueError(
                "Expected a language model whose logits are the same token by token and in one pass, but those of "
                f"{model!r} differ by {difference:.1g} of the largest."
            )
        self.language.train(training)

    def prompt_ids(self, sample: Sample, visuals: Sequence[Visual]) -> Tensor:
        """What the tokenizer begins with, the images, then the question and the instruction."""
        images = [self.visual_ids(*visual.pixels.shape[-2:]) for visual in visuals]
        text = sample.question + self.instruction
        ids = self.tokenize(text)
        if not self._told and bool((ids == self.tokenizer.unk_token_id).any()):
            self._told = True
            logger.warning("The policy reads <unk> for the words of its prompt that the tokenizer lacks: %r", text)
        return torch.cat([torch.tensor(self.opening, dtype=torch.long), *images, ids])

    def following_ids(self, sample: Sample, visuals: Sequence[Visual]) -> Tensor:
        """The prompt without what the tokenizer begins with; an answer closes itself."""
        return self.prompt_ids(sample, visuals)[len(self.opening) :]

    def visual_ids(self, height: int, width: int) -> Tensor:
        """One placeholder a cell."""
        return torch.full(((height // self.cell) * (width // self.cell),), self.image_token_id)

    def part(self, parameter: str) -> Part:
        """See `Backbone.part`."""
        first = parameter.split(".")[0]
        return "vision" if first == "vision" else "language" if first == "language" else "projector"

    def encode(self, visuals: Sequence[Visual]) -> list[Tensor]:
        """Visuals of one shape and role go through the encoder together, and through a frozen tower once."""
        weights = list(self.vision.parameters())
        trains = any(weight.requires_grad for weight in weights)
        if trains:
            self.seen.clear()  # fused optimizers do not count what they write to a weight
        features: dict[int, Tensor] = {}
        kinds: dict[tuple[str, torch.Size], list[int]] = {}
        for k, visual in enumerate(visuals):
            kinds.setdefault((visual.role, visual.pixels.shape), []).append(k)
        for (role, shape), members in kinds.items():
            some = [visuals[k] for k in members]
            tokens = self._tower(some) if trains else torch.stack(self.seen.of(some, weights, self._tower))
            if self.ratio > 1:
                tokens = pixel_shuffle(tokens, shape[-2] // self.patch, shape[-1] // self.patch, self.ratio)
            tokens = self.projector(tokens)
            spatial = sincos_2d(shape[-2] // self.cell, shape[-1] // self.cell, tokens.shape[-1]).to(tokens)
            encoded = tokens + spatial * self.spatial_scale + self.roles[role]
            features |= zip(members, encoded, strict=True)
        return [features[k] for k in range(len(visuals))]

    def _tower(self, visuals: Sequence[Visual]) -> Tensor:
        """(B, N, C), what the vision tower makes of visuals of one shape: one row for each patch."""
        pixels = torch.stack([visual.pixels for visual in visuals]).to(self.pixel_mean)
        return self._sequence(self.vision.forward_features((pixels - self.pixel_mean) / self.pixel_std))

    def _sequence(self, maps: Tensor) -> Tensor:
        """(B, N, C) patch tokens of what the encoder returns: tokens, or a map in either memory order."""
        if maps.ndim == 3:
            return maps[:, getattr(self.vision, "num_prefix_tokens", 0) :]
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
            attention_mask=layer_masks(attention_mask, position_ids[0], self.text_config, embeddings.dtype),
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """The language model's output layer."""
        return cap_logits(self.language.get_output_embeddings()(hidden), self.text_config)

    @property
    def linear_head(self) -> nn.Linear | None:
        """See `Backbone.linear_head`."""
        return plain_head(self.language, self.text_config)

    @torch.no_grad()
    def native_logits(self, token_ids: Tensor, visuals: Sequence[Visual]) -> Tensor:
        """(L, V) logits of a whole sequence (L,) by the language model's own forward, mask and positions."""
        ids = token_ids[None].to(self.device)
        features = self.encode(visuals) if visuals else []
        embeddings = self.merge(self.embed(ids), ids == self.image_token_id, features)
        logits: Tensor = self.language(inputs_embeds=embeddings, use_cache=False).logits
        return logits[0]


def loaded(key: str, loader: Callable[..., Any], name: str, **options: Any) -> Any:
    """What a hub name or a folder holds.

    Raises:
        ValueError: it cannot be loaded; names the key, and says what the library says.
    """
    try:
        return loader(name, **options)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"Expected `{key}` to name what can be loaded, but got {name!r}: {reason}") from error


def reserved(tokenizer: Any, rows: int, but: Iterable[int]) -> Tensor:
    """(rows,) bool of an embedding's rows: those that are no text, though some tokenizers pad with their end token."""
    ids = {k for k, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids |= {tokenizer.pad_token_id, tokenizer.unk_token_id} - {None}
    mask = torch.arange(rows) >= len(tokenizer)  # rows that stand for no token
    mask[sorted(ids)] = True
    mask[sorted(but)] = False
    return mask


def build_encoder(vision: VisionConfig) -> Any:
    """The timm model without a classifier; ``Any``, since what it has depends on its kind."""
    return loaded(
        "vision.name", timm.create_model, vision.name, pretrained=vision.pretrained, num_classes=0, **vision.options
    )


def build_language(language: LanguageConfig, words: int) -> Any:
    """The language model with embeddings for as many ``words`` at least; ``Any``, as `build_encoder`."""
    options = {"dtype": getattr(torch, language.dtype), "attn_implementation": language.attn_implementation}
    if language.name is not None:
        check_language_model(loaded("language.name", AutoConfig.from_pretrained, language.name).get_text_config())
        model = loaded("language.name", AutoModelForCausalLM.from_pretrained, language.name, **options)
        if words > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(words)
    else:
        config = AutoConfig.for_model(**{"vocab_size": words, **language.config})
        check_language_model(config.get_text_config())
        model = AutoModelForCausalLM.from_config(config, **options)
    if language.gradient_checkpointing:
        recompute_activations(model)
    return model


def longest_sequence(config: Any) -> int:
    """The context length that a language model's config states."""
    length = getattr(config, "max_position_embeddings", None)
    if length is None:
        raise ValueError(f"Expected `context_length`, for the config of {config.model_type!r} does not state it.")
    return int(length)


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
