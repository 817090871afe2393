"""Any vision-language model of transformers' `AutoModelForImageTextToText`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from modules.backbones.base import Backbone, Part
from modules.backbones.cache import RaggedCache
from modules.backbones.masks import cap_logits, check_language_model, layer_masks, plain_head, recompute_activations
from modules.backbones.scaling import ScalerConfig
from modules.functional.boxes import BoxSpace, SpaceKind
from modules.functional.grammar import LEAST_ZOOM, MOST_ZOOM
from modules.trajectory import Sample, Visual

INSTRUCTION = (
    "\nThink first, then answer. While you think, you can look at a part of the image more closely: write "
    '{"bbox_2d": [x1, y1, x2, y2]} and you are shown that part, enlarged. '
    "Put your reasoning between <think> and </think>, and then your answer between <answer> and </answer>."
)
ZOOM_INSTRUCTION = (
    f" You may say how many times its sides are enlarged, from {LEAST_ZOOM:g} to {MOST_ZOOM:g}: "
    '{"bbox_2d": [x1, y1, x2, y2], "zoom": 2}.'
)
QUESTION = "\u2063question\u2063"  # stands for the question while the chat template is rendered
SOLUTION = "\u2063solution\u2063"  # likewise, for what the assistant wrote before
OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}  # of what a processor returns
SIZES = 4096  # image sizes of which it is remembered how they are shown
# The spaces in which the families were trained to write boxes; others have learned none.
BOX_SPACES: dict[str, SpaceKind] = {
    "qwen2_vl": "thousand",
    "qwen2_5_vl": "resized",
    "qwen3_vl": "thousand",
    "qwen3_vl_moe": "thousand",
    "glm4v": "thousand",
    "glm4v_moe": "thousand",
    "internvl": "thousand",
}
REFUSED = {
    "paligemma": "its prompts attend in both directions",
    "gemma3n": "its layers take inputs of their own for each token",
    "gemma4": "its layers take inputs of their own for each token",
    "mllama": "its images are attended to across, not placed in the sequence",
}


class HFVLMBackbone(Backbone):
    """A pretrained vision-language model, with positions, masks and cache made explicit.

    Images on a patch grid of their own size (Qwen-VL, GLM-4V) are scaled once, by `CropAndScale`. All others go
    through the model's own image processor, which cuts them into tiles or squeezes them into its square; give
    ``image.size`` and ``crop.size`` that square, and they are scaled once as well.

    Args:
        model: hub name or local folder.
        random: take the configuration and the processor, but random weights.
        dtype: of the weights.
        attn_implementation: sdpa or eager; the masks of packed rows are explicit, which flash attention cannot take.
        gradient_checkpointing: recompute activations in the backward pass.
        image: limits of whole images, before the image processor.
        crop: limits of crops.
        box_space: the space in which boxes are written; None: what the family was trained on, or ``thousand``.
        instruction: text behind every question.
        offer_zoom: say behind it that the policy may choose by how much a crop is enlarged; it may either way.
        context_length: longest sequence; None: what the model's config says.

    Raises:
        ValueError: a folder without configuration, weights, processor or chat template, a model without image
            token, or one of which no exact incremental pass is known; it names what is missing.
    """

    def __init__(
        self,
        model: str,
        random: bool = False,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attn_implementation: Literal["sdpa", "eager"] = "sdpa",
        gradient_checkpointing: bool = False,
        image: ScalerConfig = ScalerConfig(),
        crop: ScalerConfig = ScalerConfig(),
        box_space: SpaceKind | None = None,
        instruction: str = INSTRUCTION,
        offer_zoom: bool = False,
        context_length: int | None = None,
    ) -> None:
        super().__init__()
        self._build(model, random, dtype, attn_implementation, gradient_checkpointing)
        self.image_scaler, self.crop_scaler = image.build(self.grid or 1), crop.build(self.grid or 1)
        self.box_space = BoxSpace(box_space or BOX_SPACES.get(self.model.config.model_type, "thousand"))
        self.bin_size = 0.001 if self.box_space.kind == "unit" else 1.0
        if offer_zoom and not self.zooms:
            what = f"{self.crop_scaler.size} for all" if self.grid else f"the scaling of {self.model.config.model_type}"
            raise ValueError(f"Expected crops to have sizes of their own with `offer_zoom`, but got {what}.")
        self.instruction = instruction + (ZOOM_INSTRUCTION if offer_zoom else "")
        self.context_length = context_length or self.text_config.max_position_embeddings
        self._expansions: dict[tuple[int, int], tuple[str, Tensor]] = {}

    def _build(self, name: str, random: bool, dtype: str, attention: str, checkpointing: bool) -> None:
        config = load("configuration", name, AutoConfig.from_pretrained)
        if config.model_type in REFUSED:
            raise ValueError(f"{config.model_type} is not supported: {REFUSED[config.model_type]}.")
        options: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
        self.model: Any
        if random:
            self.model = AutoModelForImageTextToText.from_config(config, **options)
            with suppress(OSError):  # from_config reads no generation config, and with it not all end tokens
                self.model.generation_config = GenerationConfig.from_pretrained(name)
        else:
            self.model = load("weights", name, AutoModelForImageTextToText.from_pretrained, **options)
        self.processor: Any = load("processor", name, AutoProcessor.from_pretrained)
        if not hasattr(self.processor, "tokenizer") or not hasattr(self.processor, "image_processor"):
            raise ValueError(f"Expected {name!r} to hold a processor of text and images, but got {self.processor!r}.")
        self.text_config = self.model.config.get_text_config()
        check_language_model(self.text_config)
        self.tokenizer = self.processor.tokenizer
        self.image_token_id = image_token_id(self.model.config, name)
        self.marker = image_marker(self.processor, name)
        self.grid = patch_grid(self.processor.image_processor)
        self._rope: Callable[..., Any] | None = getattr(self.model.model, "get_rope_index", None)
        self.position_axes = 3 if self._rope is not None else 1
        self.bidirectional_visuals = "token_type_ids" in inspect.signature(self.model.forward).parameters
        self._language = tuple(
            f"model.{n}."
            for n, m in self.model.named_modules()
            if m in (self.decoder, self.model.get_output_embeddings())
        )
        if checkpointing:
            recompute_activations(self.model)
        self.register_buffer("coordinate_bins", None, persistent=False)
        self.eos_ids = end_ids(self.model.generation_config, self.tokenizer.eos_token_id)
        banned = torch.zeros(self.model.get_output_embeddings().weight.shape[0], dtype=torch.bool, device="cpu")
        special = {k for k, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        banned[sorted(special | {self.image_token_id})] = True
        banned[len(self.tokenizer) :] = True  # rows of the embedding that stand for no token
        banned[sorted(self.eos_ids)] = False
        self.register_buffer("banned", banned, persistent=False)

    @property
    def decoder(self) -> Any:
        """The language model without its output layer; not an attribute, which would list its weights twice."""
        return self.model.get_decoder()

    @property
    def zooms(self) -> bool:
        """See `Backbone.zooms`; other image processors scale a crop again, whatever size it was given."""
        return self.grid is not None and super().zooms

    def part(self, parameter: str) -> Part:
        """See `Backbone.part`."""
        if parameter.startswith(self._language):
            return "language"
        return "projector" if re.search("merger|projector|connector|newline", parameter) else "vision"

    def prompt_ids(self, sample: Sample, visuals: Sequence[Visual]) -> Tensor:
        """The model's chat template around the images, the question and the instruction.

        What looks like a special token in the question is text: it is tokenized with the plain text of the template
        around it, between the special tokens on either side.
        """
        return self._asked(sample, visuals, render(self.processor, [("user", question_of(len(visuals)))]))

    def following_ids(self, sample: Sample, visuals: Sequence[Visual]) -> Tensor:
        """See `Backbone.following_ids`: the chat template behind an assistant's message."""
        before = [("user", [{"type": "text", "text": "?"}]), ("assistant", [{"type": "text", "text": SOLUTION}])]
        text = render(self.processor, [*before, ("user", question_of(len(visuals)))])
        return self._asked(sample, visuals, text.split(SOLUTION)[1])

    def _asked(self, sample: Sample, visuals: Sequence[Visual], template: str) -> Tensor:
        """(n,) ids of a rendered template, with these images and this question."""
        before, after = template.split(QUESTION)
        texts = before.split(self.marker)
        if len(texts) != len(visuals) + 1:
            raise ValueError(f"Expected the chat template to show {len(visuals)} images, but it gives {before!r}.")
        shown = [self._expansion(visual.pixels.shape[-2], visual.pixels.shape[-1])[0] for visual in visuals]
        before = texts[0] + "".join(image + text for image, text in zip(shown, texts[1:], strict=True))
        specials = "|".join(re.escape(str(t.content)) for t in self.tokenizer.added_tokens_decoder.values())
        left = max((m.end() for m in re.finditer(specials, before)), default=0)
        right = min((m.start() for m in re.finditer(specials, after)), default=len(after))
        plain = before[left:] + sample.question + self.instruction + after[:right]
        return torch.cat([self._template_ids(before[:left]), self.tokenize(plain), self._template_ids(after[right:])])

    def visual_ids(self, height: int, width: int) -> Tensor:
        """See `Backbone.visual_ids`; what the chat template and the processor put around an image belongs to it."""
        return self._expansion(height, width)[1].clone()

    def _template_ids(self, text: str) -> Tensor:
        """(n,) ids of a text whose special tokens are meant."""
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)

    def _expansion(self, height: int, width: int) -> tuple[str, Tensor]:
        """The text by which an image of this size is shown, and its ids."""
        if (height, width) not in self._expansions:
            if len(self._expansions) == SIZES:
                self._expansions.clear()
            if self.grid is not None:
                tokens = (height // self.grid) * (width // self.grid)
                one = str(self.tokenizer.convert_ids_to_tokens(self.image_token_id))
                text = self.marker.replace(one, one * tokens)
            else:
                blank = torch.zeros(3, height, width)
                ids = self.processor(text=[self.marker], images=[blank], text_kwargs={"add_special_tokens": False})
                text = str(self.tokenizer.decode(ids["input_ids"][0], skip_special_tokens=False))
            self._expansions[height, width] = text, self._template_ids(text)
        return self._expansions[height, width]

    def process(self, pixels: Sequence[Tensor]) -> dict[str, Any]:
        """What the vision tower takes of images (3, h, w) in [0, 1]."""
        options = {"do_rescale": False, "input_data_format": "channels_first", "return_tensors": "pt"}
        if self.grid is not None:
            inputs = dict(self.processor.image_processor(list(pixels), do_resize=False, **options))
        else:  # the processor has options for images of its own, over those of the image processor
            parts = [self.processor(text=[self.marker], images=[image], **options) for image in pixels]
            inputs = {name: join([part[name] for part in parts]) for name in parts[0] if name not in OF_TEXT}
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}

    def encode(self, visuals: Sequence[Visual]) -> list[Tensor]:
        """Visuals of one shape go through the tower together; on a patch grid, all of them do."""
        kinds: dict[object, list[int]] = {}
        for k, visual in enumerate(visuals):
            kinds.setdefault(None if self.grid else visual.pixels.shape, []).append(k)
        features: dict[int, Tensor] = {}
        for members in kinds.values():
            rows = self._encode([visuals[k].pixels for k in members])
            features.update(zip(members, rows.split([visuals[k].tokens for k in members]), strict=True))
        return [features[k] for k in range(len(visuals))]

    def _encode(self, pixels: Sequence[Tensor]) -> Tensor:
        """(all tokens, D) features of images, in their order."""
        return flat(self._image_outputs(pixels).pooler_output)

    def _image_outputs(self, pixels: Sequence[Tensor]) -> Any:
        encoder = self.model.model.get_image_features
        taken = inspect.signature(encoder).parameters
        inputs = {name: value for name, value in self.process(pixels).items() if name in taken}
        return encoder(**inputs, return_dict=True)

    def embed(self, token_ids: Tensor) -> Tensor:
        """The language model's input embeddings."""
        embedded: Tensor = self.model.get_input_embeddings()(token_ids)
        return embedded

    def positions(self, token_ids: Tensor, visuals: Sequence[Visual], start: int) -> tuple[Tensor, int]:
        """See `Backbone.positions`; rows and columns of visuals, where the model has axes for them."""
        if self._rope is None or not visuals:
            return super().positions(token_ids, visuals, start)
        ids = token_ids[None].cpu()
        is_visual = (ids == self.image_token_id).int()
        places = self._rope(ids, mm_token_type_ids=is_visual, image_grid_thw=self._grids(visuals))[0][:, 0] + start
        return places, int(places.max()) + 1

    def _grids(self, visuals: Sequence[Visual]) -> Tensor:
        """(n, 3) frames, rows and columns of patches."""
        patch = self.processor.image_processor.patch_size
        sizes = [visual.pixels.shape[-2:] for visual in visuals]
        return torch.tensor([[1, height // patch, width // patch] for height, width in sizes])

    def forward(
        self, embeddings: Tensor, position_ids: Tensor, attention_mask: Tensor, cache: RaggedCache | None = None
    ) -> Tensor:
        """See `Backbone.forward`."""
        return self._decode(embeddings, position_ids, attention_mask, cache)

    def _decode(
        self,
        embeddings: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        cache: RaggedCache | None,
        **more: Any,
    ) -> Tensor:
        """`forward`, with what else the language model of a family takes."""
        hidden: Tensor = self.decoder(
            inputs_embeds=embeddings,
            position_ids=position_ids if self.position_axes > 1 else position_ids[0],
            attention_mask=layer_masks(attention_mask, position_ids[0], self.text_config, embeddings.dtype),
            past_key_values=cache,
            use_cache=cache is not None,
            **more,
        ).last_hidden_state
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """The language model's output layer."""
        return cap_logits(self.model.get_output_embeddings()(hidden), self.text_config)

    @property
    def linear_head(self) -> nn.Linear | None:
        """See `Backbone.linear_head`."""
        return plain_head(self.model, self.text_config)

    @torch.no_grad()
    def native_logits(self, token_ids: Tensor, visuals: Sequence[Visual]) -> Tensor:
        """(L, V) logits of a whole sequence (L,) by Hugging Face's own forward: what every other pass must equal."""
        taken = inspect.signature(self.model.forward).parameters
        ids = token_ids[None].to(self.device)
        is_visual = (ids == self.image_token_id).long()
        inputs: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
        inputs |= {name: is_visual for name in ("mm_token_type_ids", "token_type_ids") if name in taken}
        if visuals:
            parts = [self.process([visual.pixels]) for visual in visuals]
            inputs |= {name: join([part[name] for part in parts]) for name in parts[0] if name in taken}
        logits: Tensor = self.model(input_ids=ids, **inputs, use_cache=False).logits
        return logits[0]

    def export(self, folder: Path, state_dict: Mapping[str, Tensor]) -> None:
        """Write a Hugging Face folder: configuration, these weights, processor, tokenizer and chat template."""
        self.model.save_pretrained(folder, state_dict=dict(state_dict))
        self.processor.save_pretrained(folder)


def load(what: str, name: str, loader: Callable[..., Any], **options: Any) -> Any:
    """What a hub name or a folder holds.

    Raises:
        ValueError: it is not there; says what, where, and what transformers says.
    """
    try:
        return loader(name, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"Expected the {what} of a vision-language model in {name!r}, but got: {reason}") from error


def image_token_id(config: Any, name: str) -> int:
    """The id that image features replace."""
    for key in ("image_token_id", "image_token_index"):
        if isinstance(getattr(config, key, None), int):
            return int(getattr(config, key))
    raise ValueError(f"Expected the config of {name!r} to have an `image_token_id`, but {config.model_type} has none.")


def question_of(images: int) -> list[dict[str, str]]:
    """The content of a user message: images, then the question."""
    return [{"type": "image"}] * images + [{"type": "text", "text": QUESTION}]


def render(processor: Any, turns: Sequence[tuple[str, list[dict[str, str]]]]) -> str:
    """The chat template around messages by role, up to where the assistant begins."""
    messages = [{"role": role, "content": content} for role, content in turns]
    return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def image_marker(processor: Any, name: str) -> str:
    """What the chat template writes for one image, such as ``<|vision_start|><|image_pad|><|vision_end|>``."""
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"Expected the processor of {name!r} to have a chat template, but it has none.")
    # what a second image adds: some templates write more around the first, or between images and text
    one = render(processor, [("user", question_of(1))]).split(QUESTION)[0]
    two = render(processor, [("user", question_of(2))]).split(QUESTION)[0]
    start = next((k for k, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), len(one))
    marker = two[start : start + len(two) - len(one)]
    if not marker or one.count(marker) != 1:
        raise ValueError(
            f"Expected the chat template of {name!r} to show all images alike, but with one it gives {one!r}, with two "
            f"{two!r}."
        )
    return marker


def patch_grid(image_processor: Any) -> int | None:
    """The side that image sides are multiples of, for models that take images on a patch grid of their own size."""
    if "image_grid_thw" not in image_processor.model_input_names:
        return None
    return int(image_processor.patch_size * image_processor.merge_size)


def end_ids(generation: GenerationConfig | None, of_tokenizer: int | None) -> frozenset[int]:
    """All ids that end a text."""
    given = getattr(generation, "eos_token_id", None)
    ids = given if isinstance(given, list) else [given]
    return frozenset(k for k in [*ids, of_tokenizer] if k is not None)


def flat(features: Tensor | Sequence[Tensor]) -> Tensor:
    """(n, D) of features that come by image, by tile, or by both."""
    parts = [features] if isinstance(features, Tensor) else list(features)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def join(parts: Sequence[Any]) -> Any:
    """Inputs of several images as those of one sequence; images of fewer tiles are filled up, as processors do it.

    The models leave tiles out that are all zeros (Idefics), or count them by the image's size (LLaVA).
    """
    if not isinstance(parts[0], Tensor):
        return [item for part in parts for item in part]
    largest = [max(sides) for sides in zip(*(part.shape[1:] for part in parts), strict=True)]
    joined: Tensor = parts[0].new_zeros(sum(len(part) for part in parts), *largest)
    start = 0
    for part in parts:
        joined[(slice(start, start + len(part)), *map(slice, part.shape[1:]))] = part
        start += len(part)
    return joined
