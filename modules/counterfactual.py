"""What a policy would have said, had it been shown something else: does the crop matter?

The same crop is replaced by one of its own size, so that nothing but its content changes: neither the tokens of the
trajectory nor their positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from modules.backbones.base import Backbone
from modules.functional.boxes import clip
from modules.functional.grammar import ANSWER, END_ANSWER
from modules.scoring import collate, token_log_probs
from modules.trajectory import Box, Region, Sample, Trajectory, Visual

Replacement = Literal["blank", "random", "swap"]
GREY = 128 / 255  # of blank crops; images of exactly one half, 0 once normalised, are padding to SmolVLM


def replace_crops(
    backbone: Backbone,
    how: Replacement,
    crops: Sequence[Visual],
    images: Sequence[Tensor],
    regions: Sequence[Region],
    others: Sequence[Tensor],
    seeds: Sequence[int],
) -> list[Visual]:
    """Other visuals of the same sizes.

    Args:
        backbone: whose scaler cuts them.
        how: ``blank``: grey; ``random``: as large a box, at a random place of the same image; ``swap``: the same
            place, relative to the image, on another image.
        crops: n of them.
        images: (3, H, W) uint8, the image that each was cut from.
        regions: what was cut.
        others: the images to swap with.
        seeds: one for each crop.

    Raises:
        ValueError: ``swap`` without another image.
    """
    if how == "blank":
        return [Visual(torch.full_like(crop.pixels, GREY), crop.tokens, crop.role) for crop in crops]
    shown: list[Tensor] = []
    boxes: list[Box] = []
    for image, region, seed in zip(images, regions, seeds, strict=True):
        draws = torch.rand(2, generator=torch.Generator().manual_seed(seed % 2**63)).tolist()
        if how == "random":
            shown.append(image)
            boxes.append(_moved(region, image, draws))
        else:
            strangers = [other for other in others if other is not image]
            if not strangers:
                raise ValueError("Expected another image to swap crops with, but all questions are about one.")
            shown.append(strangers[int(draws[0] * len(strangers))])
            boxes.append(_relative(region, image, shown[-1]))
    pixels = backbone.crop_scaler(
        [image.to(backbone.device) for image in shown],
        torch.tensor(boxes, dtype=torch.float32, device=backbone.device).view(-1, 4),
        sizes=[(crop.pixels.shape[-2], crop.pixels.shape[-1]) for crop in crops],
    )
    return [Visual(x, crop.tokens, crop.role) for x, crop in zip(pixels, crops, strict=True)]


def _moved(region: Region, image: Tensor, draws: Sequence[float]) -> Box:
    x1, y1, x2, y2 = region.box
    width, height = x2 - x1, y2 - y1
    left, top = draws[0] * (image.shape[-1] - width), draws[1] * (image.shape[-2] - height)
    return clip((left, top, left + width, top + height), (image.shape[-2], image.shape[-1]))


def _relative(region: Region, image: Tensor, other: Tensor) -> Box:
    """The same share of another image, at least a pixel of it."""
    scales = [other.shape[-1] / image.shape[-1], other.shape[-2] / image.shape[-2]] * 2
    x1, y1, x2, y2 = (c * s for c, s in zip(region.box, scales, strict=True))
    x1, y1 = min(x1, other.shape[-1] - 1.0), min(y1, other.shape[-2] - 1.0)
    return clip((x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)), (other.shape[-2], other.shape[-1]))


def images_of(samples: Iterable[Sample]) -> list[Tensor]:
    """Their distinct images."""
    return list({id(image): image for sample in samples for image in sample.images}.values())


def retold(
    trajectories: Sequence[Trajectory], backbone: Backbone, how: Replacement, others: Sequence[Tensor], seed: int
) -> list[Trajectory]:
    """The same trajectories, token by token, with other crops; those without crops stay as they are.

    Args:
        trajectories: as they were written.
        backbone: whose scaler cuts the crops.
        how: see `replace_crops`, as ``others``.
        others: the images to swap with.
        seed: of random places.
    """
    found = [(n, turn) for n, t in enumerate(trajectories) for turn in t.turns if turn.crop is not None]
    regions = [turn.region for _, turn in found if turn.region is not None]
    crops = [turn.crop for _, turn in found if turn.crop is not None]
    images = [trajectories[n].sample.images[region.image] for (n, _), region in zip(found, regions, strict=True)]
    seeds = [seed * 1_000_003 + k for k in range(len(found))]
    instead = dict(
        zip(crops, replace_crops(backbone, how, crops, images, regions, others, seeds) if crops else [], strict=True)
    )
    return [
        replace(
            t,
            visuals=tuple(instead.get(visual, visual) for visual in t.visuals),
            turns=tuple(replace(turn, crop=instead[turn.crop]) if turn.crop is not None else turn for turn in t.turns),
        )
        for t in trajectories
    ]


def with_answer(backbone: Backbone, trajectory: Trajectory, answer: str) -> Trajectory:
    """The trajectory up to where its last turn answers, and then another answer, which alone counts as written.

    A turn that did not answer is asked to where it ended.
    """
    last = trajectory.turns[-1]
    before, tag, _ = last.text.rpartition(ANSWER)
    kept = trajectory.completion_ids[: last.start]
    asked = backbone.tokenize((before if tag else last.text) + ANSWER)
    told = backbone.tokenize(answer + END_ANSWER)
    ids = torch.cat([kept, asked, told])
    sampled = torch.zeros(len(ids), dtype=torch.bool)
    sampled[-len(told) :] = True
    return replace(
        trajectory,
        completion_ids=ids,
        sampled=sampled,
        log_probs=torch.zeros(len(ids)),
        coordinates=torch.full((len(ids),), torch.nan),
        visuals=trajectory.visuals[: len(trajectory.sample.images) + sum(t.crop is not None for t in trajectory.turns)],
        temperature=1.0,
    )


@torch.no_grad()
def log_likelihoods(backbone: Backbone, trajectories: Sequence[Trajectory], row_tokens: int, chunk: int) -> Tensor:
    """(N,) sums of the log-probabilities of what is written in each."""
    batch = collate(backbone, trajectories, row_tokens)
    log_probs, _ = token_log_probs(backbone, batch, chunk)
    sums = torch.zeros(len(trajectories), dtype=log_probs.dtype, device=log_probs.device)
    return sums.index_add_(0, batch.owners, log_probs)


def likelihood_gaps(
    backbone: Backbone,
    trajectories: Sequence[Trajectory],
    how: Replacement,
    at_once: int,
    row_tokens: int,
    chunk: int,
) -> Tensor:
    """How much the crops say about the right answer.

    Args:
        backbone: the policy.
        trajectories: N of its own.
        how: what is shown in place of the crops.
        at_once: trajectories in one pass.
        row_tokens: see `functional.packing.pack`.
        chunk: sampled tokens whose logits exist at a time.

    Returns:
        (N,) float32, nats: log-likelihood of the first right answer behind the crops minus behind their
        replacements; NaN for trajectories without a crop, for questions without an answer, and where ``swap``
        finds no second image.
    """
    gaps = torch.full((len(trajectories),), torch.nan)
    usable = [
        n for n, t in enumerate(trajectories) if t.sample.answers and any(turn.crop is not None for turn in t.turns)
    ]
    others = images_of(t.sample for t in trajectories)
    if how == "swap" and len(others) < 2:
        return gaps
    told = [with_answer(backbone, trajectories[n], trajectories[n].sample.answers[0]) for n in usable]
    for start in range(0, len(told), at_once):
        part = told[start : start + at_once]
        seen, unseen = (
            log_likelihoods(backbone, version, row_tokens, chunk)
            for version in (part, retold(part, backbone, how, others, start))
        )
        gaps[usable[start : start + at_once]] = (seen - unseen).float().cpu()
    return gaps
