"""What each token is for, read off tokens of one character and of several."""

from __future__ import annotations

import pytest
import torch

from modules.engine import Decoding, LocalEngine, Request
from modules.functional.kinds import KINDS, by_kind, kinds_of_sampled, reasoning, token_kinds
from modules.trajectory import StopReason, Trajectory
from tests.conftest import make_samples, scripted
from tests.writing import BOX_TURN, spell, written


def kinds(trajectory: Trajectory) -> dict[str, str]:
    found = token_kinds(trajectory, spell)
    assert torch.equal(sum(mask.int() for mask in found.values()), trajectory.sampled.int())  # type: ignore[arg-type]
    return {kind: spell(trajectory.completion_ids[mask]) for kind, mask in found.items()}


@pytest.mark.parametrize("fault", [None, "order"])
def test_tokens_are_of_the_text_the_box_or_the_answer(fault: str | None) -> None:
    last = "<answer>no</answer> so </think><answer> 42 </answer>"
    box = '{"label": "cat", "bbox_2d": [1, 2, 30, 40]}'
    assert kinds(written(BOX_TURN, last, fault=fault)) == {
        "text": BOX_TURN.removesuffix(box) + last.replace(" 42 ", ""),
        "box": box,
        "answer": " 42 ",
    }
    assert kinds(written("<answer></answer>")) == {"text": "<answer></answer>", "box": "", "answer": ""}
    unfinished = written(BOX_TURN, "<answer>4", stop=StopReason.TURN_LENGTH)
    assert kinds(unfinished)["answer"] == ""
    assert kinds(unfinished)["text"].endswith("<answer>4")


@pytest.mark.parametrize(
    ("texts", "stop", "expected"),
    [
        ((BOX_TURN, "so 4</think><answer>4</answer>"), StopReason.ANSWER, BOX_TURN[:22] + "so 4</think>"),
        (("a<answer>1</answer>b<answer>2</answer>",), StopReason.ANSWER, "a<answer>1</answer>b"),
        (("<answer>2</answer>",), StopReason.ANSWER, ""),
        (("so <answer>2",), StopReason.TURN_LENGTH, "so <answer>2"),
    ],
)
def test_reasoning_ends_where_the_last_answer_begins(texts: tuple[str, ...], stop: StopReason, expected: str) -> None:
    trajectory = written(*texts, stop=stop)
    assert spell(trajectory.completion_ids[reasoning(trajectory, spell)]) == expected


def test_a_token_that_reaches_into_a_span_is_of_it() -> None:
    """In this vocabulary one token is `red {"bbox_2d": [`, and one `I can read it now.</think><answer>`."""
    text = '<think>I zoom in on red {"bbox_2d": [8, 12, 40, 44]}I can read it now.</think><answer>7</answer>'
    backbone = scripted([text])
    (trajectory,) = LocalEngine().rollout(
        backbone, [Request(make_samples(1)[0], 0)], Decoding(0.0, max_turns=3, max_turn_tokens=12)
    )
    found = token_kinds(trajectory, backbone.detokenize)
    ids = {kind: trajectory.completion_ids[mask] for kind, mask in found.items()}
    assert backbone.detokenize(ids["box"]) == 'red {"bbox_2d": [8, 12, 40, 44]}'
    assert backbone.detokenize(ids["answer"]) == "7"
    assert [len(ids[kind]) for kind in KINDS] == [3, 5, 1]
    assert kinds_of_sampled(trajectory, backbone.detokenize).tolist() == [0, 1, 1, 1, 1, 1, 0, 2, 0]
    thought = trajectory.completion_ids[reasoning(trajectory, backbone.detokenize)]
    assert backbone.detokenize(thought) == "<think>I zoom in on I can read it now.</think><answer>"


def test_sums_by_kind() -> None:
    found = by_kind(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([1, 0, 1, 1]))
    assert found.tolist() == [[2, 13, 0], [1, 3, 0]]
