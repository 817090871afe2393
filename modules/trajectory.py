"""The types that are handed from stage to stage.

Conventions, everywhere in this project:

- A box is ``(x1, y1, x2, y2)``, float, origin top-left, x2 and y2 exclusive, in pixels of the
  ORIGINAL image unless its type says otherwise.
- An image is RGB, CHW. At rest it is ``uint8`` (one copy, however many trajectories look at it);
  where it is computed with, it is float in [0, 1].
- Shape letters: B batch, L tokens, V vocabulary, G group, N regions, T sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, Literal

import torch
from torch import Tensor

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Region:
    """A box on one of a sample's images."""

    box: Box  # original pixels
    image: int = 0  # index into Sample.images
    zoom: float | None = None  # by how much each side of its crop is to be enlarged; None: the zoom rule
    why: str = ""  # what it is looked at for, where somebody wrote that down


@dataclass(frozen=True)
class Step:
    """One step of a written rationale: text, and the region that is looked at after it."""

    text: str  # ends where the box begins; the backbone writes the box in the space that it speaks
    region: Region | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """One question about none, one or several images."""

    id: str
    question: str
    images: tuple[Tensor, ...] = ()  # each (3, H, W) uint8
    answers: tuple[str, ...] = ()  # alternatives, each of them right; empty when unknown
    source: str = ""  # the data set that it comes from
    choices: tuple[str, ...] = ()  # the options of a multiple-choice question
    regions: tuple[Region, ...] = ()  # annotated evidence, for measuring and for grounding rewards
    rationale: tuple[Step, ...] = ()  # a written trajectory, for supervised warm-up
    meta: dict[str, Any] = field(default_factory=dict)
    answer_kind: str | None = None  # how an answer is compared (functional.graders.Kind); None: nobody said
    provenance: dict[str, Any] = field(default_factory=dict)  # where it is from and who wrote what
    examples: tuple[Sample, ...] = ()  # solved questions that stand before it in the prompt; their images have no index

    @property
    def prompt_visuals(self) -> int:
        """How many images and crops its prompt shows: those of the examples, then its own images."""
        looks = sum(len(e.images) + sum(step.region is not None for step in e.rationale) for e in self.examples)
        return looks + len(self.images)


@dataclass(frozen=True, eq=False)
class Visual:
    """One image or crop as the backbone's vision tower takes it; identity means equality."""

    pixels: Tensor  # (3, h, w) float in [0, 1], already on the backbone's patch grid
    tokens: int  # how many placeholder tokens it fills
    role: Literal["image", "crop"] = "image"


class StopReason(StrEnum):
    """Why a trajectory ended."""

    ANSWER = "answer"  # it wrote </answer>
    EOS = "eos"  # it wrote an end token without an answer
    TURN_LENGTH = "turn_length"  # a turn reached its limit of new tokens
    MAX_TURNS = "max_turns"  # another box was requested after the last turn
    CONTEXT = "context"  # the next tokens would not fit into the backbone's context

    @property
    def truncated(self) -> bool:
        """Whether a limit ended it rather than the policy."""
        return self not in (StopReason.ANSWER, StopReason.EOS)


@dataclass(frozen=True, eq=False)
class Turn:
    """What the policy wrote in one go, and what the environment gave back."""

    text: str  # as written, the box or answer included
    start: int  # the written tokens are completion_ids[start:stop]
    stop: int
    region: Region | None = None  # the valid region it asked for
    fault: str | None = None  # why its box was refused (functional.boxes.Fault or functional.grammar)
    crop: Visual | None = None  # what it was shown


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A prompt and everything after it, token by token, as it was sampled (or written by a teacher).

    ``completion_ids`` holds what the policy wrote (``sampled``) and what the environment put in
    between: crops (placeholder tokens) and refusals. Only sampled tokens ever carry loss.
    """

    sample: Sample
    prompt_ids: Tensor  # (P,) long
    completion_ids: Tensor  # (C,) long
    sampled: Tensor  # (C,) bool
    log_probs: Tensor  # (C,) float32, the sampler's; 0 where not sampled
    coordinates: Tensor  # (C,) float32, exact coordinate in bins behind a coordinate token; else NaN
    visuals: tuple[Visual, ...]  # in the order of their placeholders, prompt first
    turns: tuple[Turn, ...]
    stop: StopReason
    answer: str | None
    text: str  # everything that the policy wrote, turn after turn
    temperature: float = 1.0  # of the distribution that log_probs are of

    @property
    def regions(self) -> tuple[Region, ...]:
        """The valid regions it looked at, in order."""
        return tuple(turn.region for turn in self.turns if turn.region is not None)


@dataclass(frozen=True, eq=False)
class TurnPay:
    """What C rewards that belong to turns add to the totals of G trajectories, weighted and gated."""

    whole: Tensor  # (C, G) float32, to each total
    turns: Tensor  # (C, G, K) float32, turn by turn; NaN where a turn has no value

    def of(self, members: slice) -> TurnPay:
        """That of some of the trajectories."""
        return TurnPay(self.whole[:, members], self.turns[:, members])


@dataclass(frozen=True, eq=False)
class Group:
    """G trajectories of one question, their rewards, and what the group says of each."""

    sample: Sample
    trajectories: tuple[Trajectory, ...]
    rewards: dict[str, Tensor]  # component -> (G,) float32, unweighted; NaN where a judgement failed
    totals: Tensor  # (G,) float32, weighted sum of the components after gating
    advantages: Tensor  # (G,) float32
    turn_pay: TurnPay | None = None  # where turns are credited apart
    turn_advantages: Tensor | None = None  # (G, K) float32, what the tokens of each turn get in addition


@dataclass(eq=False)
class TrajectoryBatch:
    """Trajectories packed for one forward pass.

    Row r is ``[prefix, completion 1, completion 2, ...]``: trajectories with the same beginning share
    it, and completions do not see each other (`segment_ids`). A row of a single trajectory is the
    same thing with one completion. All flat (T,) fields run over the sampled tokens of all rows.
    """

    token_ids: Tensor  # (R, L) long
    position_ids: Tensor  # (A, R, L) long; A axes, 1 but for M-RoPE
    segment_ids: Tensor  # (R, L) long: 0 prefix, k >= 1 completion k of the row, -1 padding
    is_visual: Tensor  # (R, L) bool, placeholder tokens
    visuals: tuple[Visual, ...]  # distinct
    visual_order: Tensor  # (S,) long: visuals[visual_order[s]] fills the s-th run, row-major
    predictors: Tensor  # (T,) long: flat index into (R * L) of the position that predicts the token
    targets: Tensor  # (T,) long
    owners: Tensor  # (T,) long: index of the trajectory, in the order they were given
    log_probs: Tensor  # (T,) float32, the sampler's
    coordinates: Tensor  # (T,) float32, NaN where the token is no coordinate
    num_trajectories: int
    temperature: float  # of the distribution that log_probs are of

    def to(self, device: torch.device) -> TrajectoryBatch:
        """The same batch with its index tensors on ``device`` (visuals move when they are encoded)."""
        moved = {
            f.name: getattr(self, f.name).to(device) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


class SampleBatch:
    """What a dataloader hands on; mutable, for callbacks write into it what was rolled out.

    Not a dataclass: into those Lightning looks for tensors to convert and move, which frozen ones refuse.

    Args:
        samples: the questions.
        skipped: "file:row: why", bad rows met while it was made.
        groups: training rollouts, one group a sample.
    """

    def __init__(self, samples: list[Sample], skipped: Sequence[str] = (), groups: Sequence[Group] = ()) -> None:
        self.samples = samples
        self.skipped = list(skipped)
        self.groups = list(groups)
        self.evaluations: dict[str, list[Group]] = {}  # mode -> groups of one
