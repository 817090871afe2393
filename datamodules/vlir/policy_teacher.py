"""Rejection sampling: one's own policy is rolled out, and what answers right with few crops teaches the next one."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from datamodules.vlir.authors import split_segment
from datamodules.vlir.draft import Draft, Reason, Rejected, assemble
from datamodules.vlir.rules import Question
from datamodules.vlir.teacher import FIELDS, Attempts, Teacher, fill
from modules.backbones.base import Backbone
from modules.chat import read_template
from modules.engine import Decoding, GroupSampler, LocalEngine, RolloutEngine
from modules.policy import load_policy
from modules.store import Store
from modules.trajectory import Region, Sample, StopReason, Trajectory

logger = logging.getLogger(__name__)
STRIDES = 64  # values of each tensor that tell policies apart


class PolicyTeacher(Teacher):
    """A policy, rolled out by the engine of R-GRPO and evaluation; its attempts come with the fewest crops first.

    Trajectories are kept on disk: a killed run goes on behind the last batch of questions that was written.

    Args:
        backbone: the policy, or any local vision-language model.
        init_from: a training checkpoint with its weights; None: as the backbone is.
        engine: what rolls it out.
        decoding: how it is sampled.
        sampler: how many trajectories a question gets.
        batch_size: questions rolled out at a time.
        seed: trajectories depend on it and on their question alone.
        prompt: a text file that is shown in place of the question, with the placeholders of `ChatTeacher`'s; None:
            the question, as in a rollout. It is not in the samples.
        device: where it runs, such as ``cuda``.
    """

    name: str

    def __init__(
        self,
        backbone: Backbone,
        init_from: str | None = None,
        engine: RolloutEngine | None = None,
        decoding: Decoding = Decoding(),
        sampler: GroupSampler = GroupSampler(8),
        batch_size: int = 8,
        seed: int = 0,
        prompt: str | None = None,
        device: str = "cpu",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"Expected `batch_size` to be at least 1, but got {batch_size}.")
        if sampler.size > 1 and decoding.temperature == 0:
            raise ValueError(
                "At temperature 0 all trajectories of a question are the same: `sampler.size` has to be 1."
            )
        if init_from is not None:
            load_policy(backbone, init_from)
        self.backbone = backbone.to(device).eval()
        self.engine = LocalEngine() if engine is None else engine
        self.decoding, self.sampler, self.batch_size, self.seed = decoding, sampler, batch_size, seed
        self.template = None if prompt is None else read_template(Path(prompt), FIELDS, ("question",))
        self.fingerprint = weights_fingerprint(backbone)
        self.name = f"{type(backbone).__name__} {self.fingerprint[:12]}"
        self.store: Store | None = None

    def open(self, folder: Path) -> None:
        """See `Teacher.open`."""
        self.store = Store(folder / "policy")

    def works(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Attempts]]:
        """See `Teacher.works`."""
        assert self.store is not None
        waiting = iter(questions)
        while batch := list(islice(waiting, self.batch_size)):
            keys = [self._key(question) for question in batch]
            kept = [self.store.read(key) for key in keys]
            new = [k for k, value in enumerate(kept) if value is None]
            for k, group in zip(new, self._roll_out([batch[k] for k in new]), strict=True):
                kept[k] = {"trajectories": [written(trajectory) for trajectory in group]}
                self.store.write(keys[k], kept[k] or {})
            for question, value in zip(batch, kept, strict=True):
                assert value is not None
                yield question, attempts(value["trajectories"])

    def _roll_out(self, questions: Sequence[Question]) -> list[list[Trajectory]]:
        """A group of trajectories for each question."""
        samples = [self._shown(question) for question in questions]
        requests = [
            request
            for sample, question in zip(samples, questions, strict=True)
            for request in self.sampler.requests([sample], _number(self._key(question)) % 2**31)
        ]
        flown = self.engine.rollout(self.backbone, requests, self.decoding) if requests else []
        size = self.sampler.size
        return [flown[k : k + size] for k in range(0, len(flown), size)]

    def _shown(self, question: Question) -> Sample:
        """The sample that is rolled out."""
        sample = replace(question.sample, images=tuple(image.load() for image in question.images))
        if self.template is None:
            return sample
        sent = [self.backbone.image_scaler.output_size((0, 0, w, h), (h, w)) for h, w in question.sizes]
        return replace(sample, question=fill(self.template, question, self.backbone.box_space, sent))

    def _key(self, question: Question) -> str:
        """What a group of trajectories depends on."""
        sample = question.sample
        template = None if self.template is None else self.template.template
        shown = [sample.question, sample.choices, sample.answers, [asdict(r) for r in sample.regions], template]
        images = [fingerprint.digest for fingerprint in question.prints]
        return json.dumps(
            [self.fingerprint, asdict(self.decoding), self.sampler.size, self.seed, sample.id, images, shown]
        )


def written(trajectory: Trajectory) -> dict[str, Any]:
    """What is kept of a trajectory."""
    turns = [
        {"text": turn.text, "region": None if turn.region is None else asdict(turn.region), "fault": turn.fault}
        for turn in trajectory.turns
    ]
    return {"turns": turns, "stop": trajectory.stop.value, "text": trajectory.text}


def attempts(trajectories: Sequence[dict[str, Any]]) -> Attempts:
    """Trajectories as attempts; those with few crops first, and of these the short ones."""
    for trajectory in sorted(trajectories, key=lambda t: (len(t["turns"]), len(t["text"]))):
        try:
            yield draft_of(trajectory)
        except Rejected as error:
            yield Rejected(error.reason, error.detail, trajectory["text"])


def draft_of(trajectory: dict[str, Any]) -> Draft:
    """A kept trajectory as a draft.

    Raises:
        Rejected: it was cut, asked for a box that was refused, or is not of the form that drafts have.
    """
    if trajectory["stop"] != StopReason.ANSWER:
        raise Rejected(Reason.UNFINISHED, trajectory["stop"])
    *looks, last = trajectory["turns"]
    pieces, regions, carried = [], [], ""
    for number, turn in enumerate(looks, start=1):
        parts = split_segment(turn["text"])
        if turn["region"] is None or parts is None:
            raise Rejected(Reason.BAD_BOX, f"turn {number} was refused: {turn['fault']}")
        before, _, after = parts
        pieces.append(carried + before)
        region = turn["region"]
        regions.append(Region(tuple(region["box"]), region["image"], region.get("zoom"), region.get("why", "")))
        carried = after.strip()
    return assemble([*pieces, carried + last["text"]], regions, trajectory["text"])


@torch.no_grad()
def weights_fingerprint(backbone: Backbone) -> str:
    """A digest that differs between policies: of every tensor its name, shape and some of its values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // STRIDES)].double().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {some.tolist()}".encode())
    return digest.hexdigest()


def _number(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
