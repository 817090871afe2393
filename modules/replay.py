"""Written rationales, played through the same environment as the policy's own trajectories."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.backbones.base import Backbone, see_images
from modules.environment import Done, Look, Refuse, respond
from modules.functional.grammar import last_answer
from modules.trajectory import Region, Sample, StopReason, Trajectory, Turn, Visual


class Replayer:
    """Makes trajectories that a teacher wrote, token by token as the policy would have written them.

    Each step is written in the backbone's own box space, read back by the environment, and followed
    by the crop that the environment shows: the one that the policy would see in a rollout. What a
    rationale comes to in tokens is kept for the next epoch; pixels are not.

    Args:
        backbone: the policy that is to learn from them.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._scripts: dict[Hashable, _Script | str] = {}

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> tuple[list[Trajectory], list[str]]:
        """Replay the rationales of ``samples``.

        Returns:
            trajectories: of the samples whose rationale the environment accepts.
            skipped: one sentence for each of the others.
        """
        accepted: list[tuple[Sample, tuple[Visual, ...], _Script]] = []
        skipped: list[str] = []
        for sample, seen in zip(samples, see_images(self.backbone, samples), strict=True):
            key = (sample.id, sample.question, sample.rationale, tuple(image.shape for image in sample.images))
            if key not in self._scripts:
                self._scripts[key] = _script(self.backbone, sample, seen)
            script = self._scripts[key]
            if isinstance(script, str):
                skipped.append(f"{sample.id}: {script}")
            else:
                accepted.append((sample, seen, script))
        regions = [region for *_, script in accepted for region in script.regions]
        images = [sample.images[region.image] for sample, _, script in accepted for region in script.regions]
        crops = iter(self.backbone.look(images, regions))
        return [_play(*parts, [next(crops) for _ in parts[2].regions]) for parts in accepted], skipped


@dataclass(frozen=True, eq=False)
class _Script:
    """All of a trajectory but its pixels."""

    prompt_ids: Tensor
    completion_ids: Tensor
    sampled: Tensor
    coordinates: Tensor
    turns: tuple[Turn, ...]
    regions: tuple[Region, ...]


def _script(backbone: Backbone, sample: Sample, seen: Sequence[Visual]) -> _Script | str:
    """The tokens of a rationale, or why the environment does not accept it."""
    if not sample.rationale:
        return "it has no rationale to learn from"
    ids, sampled, coordinates, turns, length = [], [], [], [], 0
    for number, step in enumerate(sample.rationale, start=1):
        own, own_coordinates = backbone.write(step.text, step.region, sample, seen)
        if bool(backbone.banned.cpu()[own].any()):
            return f"step {number} has words that the policy cannot write: {step.text!r}"
        text = backbone.detokenize(own)
        reply = respond(text, sample, tuple(seen), backbone.box_space, backbone.zooms)
        region = reply.region if isinstance(reply, Look) else None
        if region is None and (step.region is not None or isinstance(reply, Refuse)):
            return f"step {number} should end in a valid box, but the environment reads {text!r} as {reply}"
        if isinstance(reply, Done) and number < len(sample.rationale):
            return f"step {number} of {len(sample.rationale)} answers already"
        shown = own[:0]
        if region is not None:
            shown = backbone.visual_ids(*backbone.crop_size(sample.images[region.image], region))
        turns.append(Turn(text, length, length + len(own), region=region))
        ids += [own, shown]
        sampled += [torch.ones(len(own), dtype=torch.bool), torch.zeros(len(shown), dtype=torch.bool)]
        coordinates += [own_coordinates, torch.full((len(shown),), torch.nan, dtype=torch.float32)]
        length += len(own) + len(shown)
    prompt_ids = backbone.prompt_ids(sample, seen)
    if len(prompt_ids) + length > backbone.context_length:
        return f"it comes to {len(prompt_ids) + length} tokens, but the context holds {backbone.context_length}"
    return _Script(
        prompt_ids=prompt_ids,
        completion_ids=torch.cat(ids),
        sampled=torch.cat(sampled),
        coordinates=torch.cat(coordinates),
        turns=tuple(turns),
        regions=tuple(turn.region for turn in turns if turn.region is not None),
    )


def _play(sample: Sample, seen: Sequence[Visual], script: _Script, crops: Sequence[Visual]) -> Trajectory:
    waiting = iter(crops)
    turns = tuple(
        Turn(t.text, t.start, t.stop, t.region, crop=next(waiting) if t.region is not None else None)
        for t in script.turns
    )
    text = "".join(turn.text for turn in turns)
    return Trajectory(
        sample=sample,
        prompt_ids=script.prompt_ids,
        completion_ids=script.completion_ids,
        sampled=script.sampled,
        log_probs=torch.zeros(len(script.sampled), dtype=torch.float32),
        coordinates=script.coordinates,
        visuals=(*seen, *crops),
        turns=turns,
        stop=StopReason.ANSWER if "</answer>" in turns[-1].text else StopReason.EOS,
        answer=last_answer(text),
        text=text,
    )
