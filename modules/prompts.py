"""Prompts with solved examples before the question, as conversations that the policy could have had.

An example is asked as any question is, and answered as a rollout would have been: by its rationale, with the crops that
the environment cuts, else by its first answer alone. What was solved is the same for all questions that have the same
examples, so that it is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modules.backbones.base import Backbone
from modules.functional.grammar import ANSWER, END_ANSWER
from modules.policy import PolicyError
from modules.replay import Replayer
from modules.trajectory import Sample, Step, Visual


@dataclass(frozen=True, eq=False)
class Part:
    """Some of a prompt's tokens."""

    ids: Tensor  # (n,) long
    visuals: tuple[Visual, ...]  # in the order of their placeholders


@dataclass(frozen=True, eq=False)
class Prompt:
    """The examples of a question, if it has some, and the question."""

    solved: Part | None  # one object for all questions with the same examples
    asked: Part

    @property
    def ids(self) -> Tensor:
        """(P,) long, all of it."""
        return self.asked.ids if self.solved is None else torch.cat([self.solved.ids, self.asked.ids])

    @property
    def visuals(self) -> tuple[Visual, ...]:
        """In the order of their placeholders: the question's own images are the last."""
        return self.asked.visuals if self.solved is None else (*self.solved.visuals, *self.asked.visuals)


def solve(backbone: Backbone, examples: Sequence[Sample]) -> Part:
    """Examples with their solutions, one after another.

    Args:
        backbone: the policy.
        examples: at least one, each with a rationale or an answer.

    Raises:
        PolicyError: an example that the policy could not have written; names it and says why.
    """
    told, refused = Replayer(backbone)([_with_rationale(example) for example in examples])
    if refused:
        raise PolicyError(f"Expected examples as the policy would write them, but got {refused[0]}.")
    ids: list[Tensor] = []
    visuals: list[Visual] = []
    for number, trajectory in enumerate(told):
        seen = trajectory.visuals[: len(trajectory.sample.images)]
        asked = backbone.following_ids(trajectory.sample, seen) if number else trajectory.prompt_ids
        ids += [asked, trajectory.completion_ids]
        visuals += trajectory.visuals
    return Part(torch.cat(ids), tuple(visuals))


def _with_rationale(example: Sample) -> Sample:
    if example.rationale:
        return example
    if not example.answers:
        raise PolicyError(f"Expected example {example.id!r} to have a rationale or an answer, but it has none.")
    return replace(example, rationale=(Step(f"{ANSWER}{example.answers[0]}{END_ANSWER}"),))
