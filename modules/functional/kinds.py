"""What each token of a trajectory is for: text, box or answer; and which of it reasons.

Read off the turns: a prefix of a turn's own tokens is written out until it holds the character that is looked for.
Nothing is tokenised again.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable

import torch
from torch import Tensor

from modules.functional.grammar import ANSWER, END_ANSWER
from modules.trajectory import StopReason, Trajectory, Turn

KINDS = ("text", "box", "answer")  # of what the policy writes
Detokenize = Callable[[Tensor], str]


def token_kinds(trajectory: Trajectory, detokenize: Detokenize) -> dict[str, Tensor]:
    """(C,) bool for each of `KINDS`, together the sampled tokens.

    ``box``: in a turn that ended in a request, from the token that opens its object to the turn's end. ``answer``:
    between the tags that ended the trajectory; a token that also holds part of a tag counts if it holds part of the
    answer. ``text``: all others, the tags among them.
    """
    box, answer = torch.zeros_like(trajectory.sampled), torch.zeros_like(trajectory.sampled)
    for turn in trajectory.turns:
        if turn.region is not None or turn.fault is not None:
            opening = turn.text.rfind("{", 0, turn.text.rfind("bbox_2d"))
            box[_place(trajectory, turn, opening, detokenize) : turn.stop] = True
    if trajectory.stop is StopReason.ANSWER:
        turn = trajectory.turns[-1]
        tag, close = _answer_span(turn)
        first = _place(trajectory, turn, tag + len(ANSWER), detokenize)
        answer[first : _place(trajectory, turn, close - 1, detokenize) + 1] = True
    box, answer = box & trajectory.sampled, answer & trajectory.sampled
    return {"text": trajectory.sampled & ~box & ~answer, "box": box, "answer": answer}


def reasoning(trajectory: Trajectory, detokenize: Detokenize) -> Tensor:
    """(C,) bool: the text that the policy wrote, but for the answer span, its tags included.

    A token that holds the end of the reasoning and the beginning of the tag counts.
    """
    found = token_kinds(trajectory, detokenize)["text"]
    if trajectory.stop is StopReason.ANSWER:
        turn = trajectory.turns[-1]
        tag, _ = _answer_span(turn)
        found[_place(trajectory, turn, tag - 1, detokenize) + 1 if tag > 0 else turn.start :] = False
    return found


def kinds_of_sampled(trajectory: Trajectory, detokenize: Detokenize) -> Tensor:
    """(S,) long, the kind of each sampled token as its place in `KINDS`."""
    masks = token_kinds(trajectory, detokenize)
    return torch.stack([masks[kind] for kind in KINDS]).int().argmax(0)[trajectory.sampled]


def by_kind(values: Tensor, kinds: Tensor) -> Tensor:
    """(2, 3): the sums of (T,) values over the tokens of each kind (T,), and how many these are."""
    table = torch.stack([values, torch.ones_like(values)])
    return table.new_zeros(2, len(KINDS)).index_add_(1, kinds, table)


def _answer_span(turn: Turn) -> tuple[int, int]:
    """Where the tags of the last answer of a turn begin, in characters."""
    close = turn.text.rfind(END_ANSWER)
    return turn.text.rfind(ANSWER, 0, close), close


def _place(trajectory: Trajectory, turn: Turn, at: int, detokenize: Detokenize) -> int:
    """Of the token that writes a turn's character ``at``, in the completion."""
    ids = trajectory.completion_ids[turn.start : turn.stop]
    return turn.start + bisect.bisect_right(range(len(ids)), at, key=lambda k: len(detokenize(ids[: k + 1])))
