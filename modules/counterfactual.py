"""What a policy would have said, had it been shown something else: does the crop matter?

The same crop is replaced by one of its own size, so that nothing but its content changes: neither the tokens of the
trajectory nor their positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from modules.backbones.base import Backbone
from modules.functional.boxes import clip
from modules.functional.grammar import ANSWER, END_ANSWER
from modules.functional.kinds import reasoning
from modules.scoring import collate, token_log_probs
from modules.trajectory import Box, Region, Sample, Trajectory, Visual

T = TypeVar("T")
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
    trajectories: Sequence[Trajectory],
    backbone: Backbone,
    how: Replacement,
    others: Sequence[Tensor],
    seed: int,
    only: Sequence[int] | None = None,
) -> list[Trajectory]:
    """The same trajectories, token by token, with other crops; those without crops stay as they are.

    Args:
        trajectories: as they were written.
        backbone: whose scaler cuts the crops.
        how: see `replace_crops`, as ``others``.
        others: the images to swap with.
        seed: of random places.
        only: the one turn of each whose crop is replaced; None: all crops are.
    """
    found = [
        (n, turn, turn.crop)
        for n, t in enumerate(trajectories)
        for k, turn in enumerate(t.turns)
        if turn.crop is not None and (only is None or k == only[n])
    ]
    regions = [turn.region for _, turn, _ in found if turn.region is not None]
    crops = [crop for *_, crop in found]
    images = [trajectories[n].sample.images[region.image] for (n, *_), region in zip(found, regions, strict=True)]
    seeds = [seed * 1_000_003 + k for k in range(len(found))]
    new = replace_crops(backbone, how, crops, images, regions, others, seeds) if crops else []
    instead: list[dict[Visual, Visual]] = [{} for _ in trajectories]
    for (n, _, crop), other in zip(found, new, strict=True):
        instead[n][crop] = other
    return [
        replace(
            t,
            visuals=tuple(own.get(visual, visual) for visual in t.visuals),
            turns=tuple(
                replace(turn, crop=own.get(turn.crop, turn.crop)) if turn.crop is not None else turn for turn in t.turns
            ),
        )
        for t, own in zip(trajectories, instead, strict=True)
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
        visuals=trajectory.visuals[
            : trajectory.sample.prompt_visuals + sum(t.crop is not None for t in trajectory.turns)
        ],
        temperature=1.0,
    )


@torch.no_grad()
def token_log_likelihoods(
    backbone: Backbone, trajectories: Sequence[Trajectory], row_tokens: int, chunk: int
) -> list[Tensor]:
    """(S_i,) float64 log-probabilities of what is written in each."""
    batch = collate(backbone, trajectories, row_tokens)
    log_probs, _ = token_log_probs(backbone, batch, chunk)
    in_order = log_probs[batch.owners.argsort(stable=True)].double().cpu()
    return list(in_order.split([int(t.sampled.sum()) for t in trajectories]))


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


def look_gaps(
    backbone: Backbone,
    trajectories: Sequence[Trajectory],
    how: Replacement,
    at_once: int,
    row_tokens: int,
    chunk: int,
) -> list[list[float]]:
    """How much each of several crops says about the right answer: it alone replaced, the others as they were.

    Args:
        backbone, trajectories, how, at_once, row_tokens, chunk: see `likelihood_gaps`.

    Returns:
        Of each trajectory one number a turn, nats; NaN where `likelihood_gaps` has it, where a turn was shown nothing,
        and for trajectories with one crop, of which `likelihood_gaps` says the same.
    """
    gaps = [[math.nan] * len(t.turns) for t in trajectories]
    others = images_of(t.sample for t in trajectories)
    if how == "swap" and len(others) < 2:
        return gaps
    shown = [
        (n, k)
        for n, t in enumerate(trajectories)
        for k, turn in enumerate(t.turns)
        if turn.crop is not None and t.sample.answers and sum(other.crop is not None for other in t.turns) > 1
    ]
    told = {n: with_answer(backbone, trajectories[n], trajectories[n].sample.answers[0]) for n, _ in shown}
    seen: dict[int, float] = {}
    for some in _runs(list(told), at_once):
        seen.update(
            zip(some, log_likelihoods(backbone, [told[n] for n in some], row_tokens, chunk).tolist(), strict=True)
        )
    for number, pairs in enumerate(_runs(shown, at_once)):
        versions = retold([told[n] for n, _ in pairs], backbone, how, others, number, only=[k for _, k in pairs])
        unseen = log_likelihoods(backbone, versions, row_tokens, chunk).tolist()
        for (n, k), value in zip(pairs, unseen, strict=True):
            gaps[n][k] = seen[n] - value
    return gaps


def reasoning_gaps(
    backbone: Backbone,
    trajectories: Sequence[Trajectory],
    how: Replacement,
    at_once: int,
    row_tokens: int,
    chunk: int,
) -> list[list[tuple[float, int]]]:
    """How much the crops say about what the policy reasoned behind them.

    Args:
        backbone, trajectories, how, at_once, row_tokens, chunk: see `likelihood_gaps`.

    Returns:
        Of each trajectory a pair for each turn: how many nats likelier its reasoning (`kinds.reasoning`) is, all
        crops before it as they were, than with others in their place, and of how many tokens; (0, 0) for turns before
        the first crop, (NaN, n) where ``swap`` finds no second image. At temperature 1.
    """
    others = images_of(t.sample for t in trajectories)
    masks = [_behind_crops(t) & reasoning(t, backbone.detokenize) for t in trajectories]
    spans = [[slice(turn.start, turn.stop) for turn in t.turns] for t in trajectories]
    counts = [[int(mask[span].sum()) for span in own] for mask, own in zip(masks, spans, strict=True)]
    possible = how != "swap" or len(others) > 1
    found = [[(0.0 if possible or not n else math.nan, n) for n in own] for own in counts]
    for number, some in enumerate(_runs([n for n, own in enumerate(counts) if possible and any(own)], at_once)):
        told = [replace(trajectories[n], sampled=masks[n], temperature=1.0) for n in some]
        seen, unseen = (
            token_log_likelihoods(backbone, version, row_tokens, chunk)
            for version in (told, retold(told, backbone, how, others, number))
        )
        for n, with_crops, without in zip(some, seen, unseen, strict=True):
            by_turn = (with_crops - without).split(counts[n])
            found[n] = [(float(gap.sum()), len(gap)) for gap in by_turn]
    return found


def _behind_crops(trajectory: Trajectory) -> Tensor:
    """(C,) bool: everything behind the first crop."""
    found = torch.zeros_like(trajectory.sampled)
    first = next((turn.stop for turn in trajectory.turns if turn.crop is not None), len(found))
    found[first:] = True
    return found


def _runs(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
