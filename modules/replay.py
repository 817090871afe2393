"""Written rationales, played through the same environment as the policy's own trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modules.backbones.base import Backbone
from modules.engine import see_images
from modules.environment import Done, Look, respond
from modules.functional.grammar import last_answer
from modules.trajectory import Region, Sample, StopReason, Trajectory, Turn, Visual


@dataclass(eq=False)
class _Draft:
    """A trajectory in the making: crops are cut for all of them at once."""

    sample: Sample
    visuals: list[Visual]
    pieces: list[tuple[str, Tensor, Tensor, Region | None]] = field(default_factory=list)


def replay(backbone: Backbone, samples: Sequence[Sample]) -> tuple[list[Trajectory], list[str]]:
    """Trajectories that a teacher wrote, token by token as the policy would have written them.

    Each step is written in the backbone's own box space, read back by the environment, and followed
    by the crop that the environment shows: the one that the policy would see in a rollout.

    Returns:
        trajectories: of the samples whose rationale the environment accepts.
        skipped: one sentence for each of the others.
    """
    drafts: list[_Draft] = []
    skipped: list[str] = []
    for sample, seen in zip(samples, see_images(backbone, samples), strict=True):
        draft = _Draft(sample, list(seen))
        why = _write(backbone, draft)
        if why is None:
            drafts.append(draft)
        else:
            skipped.append(f"{sample.id}: {why}")
    regions = [r for d in drafts for *_, r in d.pieces if r is not None]
    images = [d.sample.images[r.image] for d in drafts for *_, r in d.pieces if r is not None]
    crops = iter(backbone.look(images, regions))
    return [_finish(backbone, draft, [next(crops) for *_, r in draft.pieces if r is not None]) for draft in drafts], skipped


def _write(backbone: Backbone, draft: _Draft) -> str | None:
    """Fill in the steps; returns why that cannot be done."""
    if not draft.sample.rationale:
        return "it has no rationale to learn from"
    for number, step in enumerate(draft.sample.rationale, start=1):
        ids, coordinates = backbone.write(step.text, step.region, draft.sample, draft.visuals)
        text = backbone.detokenize(ids)
        reply = respond(text, draft.sample, tuple(draft.visuals[: len(draft.sample.images)]), backbone.box_space)
        if step.region is not None and not isinstance(reply, Look):
            return f"step {number} should end in a valid box, but the environment reads {text!r} as {reply}"
        last = number == len(draft.sample.rationale)
        if isinstance(reply, Done) and not last:
            return f"step {number} of {len(draft.sample.rationale)} answers already"
        draft.pieces.append((text, ids, coordinates, reply.region if isinstance(reply, Look) else None))
    return None


def _finish(backbone: Backbone, draft: _Draft, crops: list[Visual]) -> Trajectory:
    prompt = backbone.prompt_ids(draft.sample, draft.visuals)
    ids, sampled, coordinates, turns, length = [], [], [], [], 0
    waiting = iter(crops)
    for text, own, coords, region in draft.pieces:
        crop = next(waiting) if region is not None else None
        turns.append(Turn(text, length, length + len(own), region=region, crop=crop))
        shown = backbone.placeholder_ids(crop) if crop is not None else own[:0]
        ids += [own, shown]
        sampled += [torch.ones(len(own), dtype=torch.bool), torch.zeros(len(shown), dtype=torch.bool)]
        coordinates += [coords, torch.full((len(shown),), torch.nan)]
        length += len(own) + len(shown)
    written = "".join(text for text, *_ in draft.pieces)
    return Trajectory(
        sample=draft.sample,
        prompt_ids=prompt,
        completion_ids=torch.cat(ids),
        sampled=torch.cat(sampled),
        log_probs=torch.zeros(length),
        coordinates=torch.cat(coordinates),
        visuals=(*draft.visuals, *crops),
        turns=tuple(turns),
        stop=StopReason.ANSWER if "</answer>" in turns[-1].text else StopReason.EOS,
        answer=last_answer(written),
        text=written,
    )
