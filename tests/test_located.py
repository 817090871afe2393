"""Boxes and answers are found in tokens as they were sampled, with real and made-up tokenizers, or left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.families import build
from modules.backbones.qwen_vl import QwenVLBackbone
from modules.backbones.timm_lm import TimmLMBackbone
from modules.functional.boxes import SpaceKind
from modules.grounding import Grounder, Grounding, token_rows
from modules.located import Located, Locator, share, step_box
from modules.replay import Replayer
from modules.scoring import collate, predicting
from modules.trajectory import Region, Sample, Step, Trajectory
from tests.fitting import ragged_samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny weights behind the beginning of Qwen2.5-VL's vocabulary, in which rare letters are several tokens each."""
    return build("qwen2_5_vl", tmp_path_factory.mktemp("qwen2_5_vl"))


def photo_samples() -> list[Sample]:
    """Two looks and an answer of several tokens; one look; no look."""
    image = torch.randint(0, 256, (3, 123, 217), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    first, second = Region((10.0, 20.0, 130.0, 100.0)), Region((60.5, 7.0, 199.0, 88.0))
    steps = [
        (
            Step("见 the sign: ", first),
            Step(" and then ", second),
            Step(" So.</think><answer> forty-two, 42 </answer>"),
        ),
        (Step("<think>", second), Step("</think><answer>7</answer>")),
        (Step("<think>12, 13</think><answer>Ölfaß</answer>"),),
    ]
    return [Sample(str(n), "What?", (image,), regions=(first,), rationale=given) for n, given in enumerate(steps)]


def locate(backbone: TimmLMBackbone | QwenVLBackbone, trajectories: Sequence[Trajectory]) -> Located:
    return Locator(backbone)(trajectories, step_box, [True] * len(trajectories))


@pytest.mark.parametrize("space", ["resized", "thousand", "unit", "pixels"])
def test_qwens_boxes_and_answers(folder: Path, space: SpaceKind) -> None:
    backbone = QwenVLBackbone(str(folder), (4, 64), (4, 64), box_space=space)
    trajectories, refused = Replayer(backbone)(photo_samples())
    assert not refused
    found = locate(backbone, trajectories)
    assert found.left_out == 0
    assert [(box.owner, box.turn) for box in found.boxes] == [
        (owner, turn) for owner, t in enumerate(trajectories) for turn in t.turns if turn.region is not None
    ]
    for box in found.boxes:
        scaled = [c * s for c, s in zip(box.written.coords, box.scale, strict=True)]
        assert scaled == pytest.approx(box.region.box, abs=1e-3)
        said = backbone.detokenize(trajectories[box.owner].completion_ids[box.written.positions])
        assert said == "".join(c for c in box.turn.text[box.turn.text.index("[") :] if c.isdigit())
    assert [box.target for box in found.boxes] == [
        step.region.box for s in photo_samples() for step in s.rationale if step.region is not None
    ]
    assert {k: backbone.detokenize(trajectories[k].completion_ids[at]) for k, at in found.answers.items()} == {
        0: " forty-two, 42",
        1: "7",
    }


def test_a_loss_of_digits_reaches_the_weights_and_stays_within_the_images(folder: Path) -> None:
    backbone = QwenVLBackbone(str(folder), (4, 64), (4, 64))
    trajectories, _ = Replayer(backbone)(photo_samples())
    grounder = Grounder(backbone, Grounding(l1=1, giou=1, answer=1), row_tokens=2048, head_chunk=7)
    (located,) = share([grounder.locate(trajectories, step_box, [True] * 3)], 1.0, lambda count: count)
    batch = collate(backbone, trajectories)
    loss, sums = grounder.loss(predicting(backbone, batch), located, 1.0)
    loss.backward()
    assert float(sums["grounding/boxes"]) == 3
    assert float(sums["grounding/answers"]) == 2
    trained = {backbone.part(n) for n, p in backbone.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"language", "projector", "vision"}
    assert all(p.grad is None or p.grad.isfinite().all() for p in backbone.parameters())


def test_rows_are_those_of_the_packed_batch(backbone: TimmLMBackbone) -> None:
    trajectories, _ = Replayer(backbone)(ragged_samples())
    for row_tokens in (0, 40, 2048):
        batch = collate(backbone, trajectories, row_tokens)
        for k, (trajectory, rows) in enumerate(zip(trajectories, token_rows(trajectories), strict=True)):
            own = rows[trajectory.sampled]
            assert torch.equal(batch.targets[own], trajectory.completion_ids[trajectory.sampled])
            assert (batch.owners[own] == k).all()


def test_a_box_that_is_not_what_the_environment_read_is_left_out(backbone: TimmLMBackbone) -> None:
    (trajectory, *_), _ = Replayer(backbone)(ragged_samples())
    look, last = trajectory.turns
    assert look.region is not None
    x1, y1, x2, y2 = look.region.box
    moved = replace(trajectory, turns=(replace(look, region=Region((x1 + 1, y1, x2, y2))), last))
    silent = replace(trajectory, sampled=torch.zeros_like(trajectory.sampled))  # nothing of it carries loss
    found = locate(backbone, [trajectory, moved, silent])
    assert [box.owner for box in found.boxes] == [0]
    assert found.left_out == 2
    assert list(found.answers) == [0]  # whose crop cannot be cut again, has no answer either
