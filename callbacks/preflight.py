"""What a run checks and says before it starts."""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import lightning as L
import torch
from PIL import Image

from callbacks.rollout import RolloutCallback
from modules.backbones.base import Backbone
from modules.budget import longest_trajectory, memory, prompt_range, rationale_length, render, token_table
from modules.engine import Decoding
from modules.policy import PolicyError, PolicyModule
from modules.rgrpo import RGRPOModule
from modules.self_check import check
from modules.sharding import gathered
from modules.trajectory import Sample

logger = logging.getLogger(__name__)

Split = Literal["train", "test"]
EXIF_ORIENTATION = 0x0112
TURNED = (5, 6, 7, 8)  # its values that exchange width and height
# what Pillow raises at damaged files, a record at images that its boxes do not fit, and what is no record at all
UNUSABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, Image.DecompressionBombError),
    AttributeError,
)


class Preflight(L.Callback):
    """Before a fit or a test: whether rollouts are exact, and what the run will need of context and memory.

    Says so in a few lines. Of the budget it says nothing where the data module does not read records.

    Args:
        self_check: stop if an incremental and a full pass differ; see `modules.self_check`.
        budget: print visual tokens, lengths and memory; stop if not even one crop fits into the context.
        tolerance: of the self-check, as a share of the logits' standard deviation; None: by the dtype.
        images: so many questions of the data, evenly spaced, are looked at for their lengths and image sizes.
    """

    def __init__(
        self, self_check: bool = True, budget: bool = True, tolerance: float | None = None, images: int = 200
    ) -> None:
        if tolerance is not None and tolerance <= 0:
            raise ValueError(f"Expected `tolerance` to be above 0, but got {tolerance}.")
        if images < 1:
            raise ValueError(f"Expected `images` to be at least 1, but got {images}.")
        self.self_check = self_check
        self.budget = budget
        self.tolerance = tolerance
        self.images = images

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check on every rank, speak on the first."""
        self._run(trainer, pl_module, "train")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See `on_fit_start`."""
        self._run(trainer, pl_module, "test")

    def _run(self, trainer: L.Trainer, pl_module: L.LightningModule, split: Split) -> None:
        if not isinstance(pl_module, PolicyModule) or not isinstance(pl_module.backbone, Backbone):
            return
        said: list[str] = []
        # callback hooks run outside autocast; rollouts and the learner's pass run inside
        with trainer.precision_plugin.forward_context(), gathered(pl_module):
            if self.budget:
                said += self._budget(trainer, pl_module, split)
            if self.self_check:
                said.append(self._check(pl_module.backbone))
        if trainer.is_global_zero and said:
            print("\n".join(said), flush=True)

    def _check(self, backbone: Backbone) -> str:
        try:
            parity = check(backbone, self.tolerance)
        except PolicyError as error:
            raise PolicyError(f"{error} (`--preflight.self_check false` leaves this check out.)") from error
        return (
            f"self-check    token by token and in one pass, logits differ by {parity.difference:.1g}; "
            f"with another crop by {parity.control:.2g} (standard deviation {parity.std:.2g})"
        )

    def _budget(self, trainer: L.Trainer, module: PolicyModule, split: Split) -> list[str]:
        data: Any = getattr(trainer, "datamodule", None)
        samples, of = look_at(data, split, self.images)
        if not samples:
            return []
        backbone, context = module.backbone, module.backbone.context_length
        sizes = [(image.shape[-2], image.shape[-1]) for sample in samples for image in sample.images]
        table = token_table(backbone, sizes) if sizes else []
        shortest, prompt = prompt_range(backbone, samples, table)
        if table:
            require_room(backbone, shortest, min(row.smallest for row in table))
        crop = max((row.largest for row in table), default=0)
        lines = [f"prompts       up to {prompt} of {context} tokens; {len(samples)} of {of} questions were looked at"]
        learned = cached = (0, 0)
        if split == "train" and not isinstance(module, RGRPOModule):
            tokens = prompt + max(rationale_length(backbone, sample, crop) for sample in samples)
            lines.append(f"rationales    up to {tokens} of {context} tokens, with prompt and crops")
            learned = (module.micro_batch or data.batch_size, min(tokens, context))
        decodings, in_flight, learning = rollouts(trainer, module, split)
        if decodings:
            tokens, worst = max(
                ((longest_trajectory(prompt, d.max_turns, d.max_turn_tokens, crop), d) for d in decodings),
                key=lambda pair: pair[0],
            )
            lines.append(
                f"trajectories  up to {tokens} of {context} tokens: prompt {prompt}, "
                f"turns {worst.max_turns} x {worst.max_turn_tokens}, crops {worst.max_turns - 1} x {crop}"
            )
            if tokens > context and trainer.is_global_zero:
                logger.warning(
                    "A trajectory may come to %d tokens, but the context of %s holds %d: crops that do not fit are "
                    "refused in text (`refused_context`), and what is longer ends there (`stop/context`).",
                    tokens,
                    type(backbone).__name__,
                    context,
                )
            cached = (in_flight, min(tokens, context))
            learned = (learning, min(tokens, context)) if learning else learned
        return [render(table, lines, memory(module, backbone, cached, learned, module.head_chunk))]


def rollouts(trainer: L.Trainer, module: PolicyModule, split: Split) -> tuple[list[Decoding], int, int]:
    """What a run rolls out with, how many trajectories are in flight at most, and in a micro-batch of R-GRPO."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    rollout = next((callback for callback in callbacks if isinstance(callback, RolloutCallback)), None)
    if rollout is None:
        return [], 0, 0
    decodings: list[Decoding] = []
    at_once, learning = 0, 0
    if split == "train" and isinstance(module, RGRPOModule):
        decodings.append(rollout.decoding)
        at_once = data.batch_size * rollout.sampler.size
        learning = (
            math.ceil(data.batch_size / module.objective.mini_batches) * rollout.sampler.size
        )  # groups stay whole
        learning = min(module.micro_batch or learning, learning)
    if split == "test" or data.records.get("val"):
        decodings += rollout.evaluations.values()
        at_once = max(at_once, data.val_batch_size)
    return decodings, min(at_once, getattr(rollout.engine, "max_batch", at_once)), learning


def require_room(backbone: Backbone, prompt: int, crop: int) -> None:
    """Raise PolicyError unless the shortest prompt, a written token, the smallest crop and one more token fit."""
    if prompt + crop + 2 > backbone.context_length:
        raise PolicyError(
            f"Expected the context of {type(backbone).__name__} to hold a question with its image and one crop, at "
            f"least {prompt + crop + 2} tokens ({prompt} of the prompt, {crop} of the crop), but it holds "
            f"{backbone.context_length}: take smaller images and crops, or a larger `context_length`. "
            "(`--preflight.budget false` leaves this check out.)"
        )


def look_at(data: Any, split: Split, limit: int) -> tuple[list[Sample], int]:
    """Questions of a data module that reads records, without pixels: of their images only the headers are read.

    Returns:
        At most ``limit`` of them, evenly spaced, with images on the meta device; and how many there are.
    """
    found = getattr(data, "records", None)
    records = found.get(split, []) if isinstance(found, dict) else []
    sizes: dict[Any, tuple[int, int]] = {}
    samples = []
    for record in records[:: max(1, math.ceil(len(records) / limit))]:
        try:
            for image in record.images:
                sizes[image] = sizes.get(image) or image_size(image.open())
            images = [torch.empty(3, *sizes[image], dtype=torch.uint8, device="meta") for image in record.images]
            samples.append(record.finish(replace(record.sample, images=tuple(images))))
        except UNUSABLE:
            continue  # it is left out of training as well, where it is named
    return samples, len(records)


def image_size(file: Path | BinaryIO) -> tuple[int, int]:
    """(height, width) of an image file, turned as its EXIF data say, without decoding it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's about large images; they have a limit of their own
        with Image.open(file) as image:
            # asked for EXIF data that do not stand at its beginning, a PNG is decoded
            known = image.format != "PNG" or "exif" in image.info
            turned = known and image.getexif().get(EXIF_ORIENTATION) in TURNED
            return (image.width, image.height) if turned else (image.height, image.width)
