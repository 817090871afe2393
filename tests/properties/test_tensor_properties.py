"""What holds of boxes, of packed batches and of advantages, whatever the numbers."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou

from modules.functional.advantages import Baseline, group_advantages, zero_variance
from modules.functional.boxes import area, giou, iou
from modules.functional.packing import pack
from modules.trajectory import Sample, StopReason, Trajectory, Visual
from tests.properties.hostile import quick

IMAGE, PAD = 1, 0
Pair = tuple[tuple[float, ...], tuple[float, ...]]
corner = st.floats(-1e3, 1e3, width=32) | st.sampled_from([0.0, 1.0, 1e-3])
side = st.floats(0, 1e3, width=32) | st.sampled_from([0.0, 1.0, 1e-3])
box = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), corner, corner, side, side)
pairs = st.lists(st.tuples(box, box), min_size=1, max_size=8)


thick_side = st.floats(1, 1e3, width=32)  # where rounding is all there is, shifting says nothing
thick = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), corner, corner, thick_side, thick_side)


def both(rows: list[Pair]) -> tuple[Tensor, Tensor]:
    return torch.tensor([a for a, _ in rows], dtype=torch.float64), torch.tensor([b for _, b in rows]).double()


@given(pairs)
@quick(100)
def test_overlap_is_a_share_and_the_same_from_both_sides(rows: list[Pair]) -> None:
    a, b = both(rows)
    assert torch.equal(iou(a, b), iou(b, a))
    assert torch.equal(giou(a, b), giou(b, a))
    assert iou(a, b).min() >= 0
    assert iou(a, b).max() <= 1 + 1e-12
    assert (giou(a, b) <= iou(a, b) + 1e-12).all()
    assert giou(a, b).min() >= -1 - 1e-12
    torch.testing.assert_close(iou(a, a), (area(a) > 0).double())


@given(st.lists(st.tuples(thick, thick), min_size=1, max_size=8), st.floats(0.1, 10), st.floats(-100, 100))
@quick(60)
def test_overlap_knows_neither_origin_nor_unit_and_is_torchvisions(
    rows: list[Pair], scale: float, shift: float
) -> None:
    a, b = both(rows)
    torch.testing.assert_close(iou(a * scale + shift, b * scale + shift), iou(a, b), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(iou(a, b), box_iou(a, b).diagonal())
    torch.testing.assert_close(giou(a, b), generalized_box_iou(a, b).diagonal())


totals = st.lists(
    st.lists(st.floats(-100, 100) | st.sampled_from([0.0, 0.0, 1.0, float("nan")]), min_size=4, max_size=4),
    min_size=1,
    max_size=4,
)


@given(totals, st.booleans(), st.sampled_from(["mean", "leave_one_out"]), st.permutations(range(4)))
@quick(150)
def test_advantages(rows: list[list[float]], scaled: bool, baseline: Baseline, order: list[int]) -> None:
    rewards = torch.tensor(rows, dtype=torch.float64)
    found = group_advantages(rewards, scale_by_std=scaled, epsilon=1e-4, baseline=baseline)
    assert found.isfinite().all()
    assert (found[rewards.isnan()] == 0).all()
    torch.testing.assert_close(found.sum(1), torch.zeros(len(rows)).double(), atol=1e-9, rtol=0)
    moved = group_advantages(rewards[:, order], scale_by_std=scaled, epsilon=1e-4, baseline=baseline)
    torch.testing.assert_close(moved, found[:, order], rtol=1e-9, atol=1e-9)
    assert (found[zero_variance(rewards, 0.0)] == 0).all()
    for reward, value in zip(rewards, found, strict=True):  # the better of two never gets less
        judged = ~reward.isnan()
        ranks = reward[judged].argsort()
        assert (value[judged][ranks].diff() >= -1e-9).all()


@st.composite
def families(draw: st.DrawFn) -> list[Trajectory]:
    """Trajectories, some of one question, with images, crops and what an environment writes."""
    images = [Visual(torch.zeros(3, 1, 1), draw(st.integers(1, 3))) for _ in range(2)]
    made = []
    for number in range(draw(st.integers(1, 6))):
        seen = draw(st.sampled_from([(), (images[0],), (images[1],), (images[0], images[1])]))
        prompt = [IMAGE] * sum(v.tokens for v in seen) + draw(st.sampled_from([[5], [5, 6], [5, 7], [8, 6]]))
        ids: list[int] = []
        sampled: list[bool] = []
        crops: list[Visual] = []
        for _ in range(draw(st.integers(1, 3))):
            words = draw(st.lists(st.integers(10, 99), min_size=1, max_size=3))
            ids += words
            sampled += [True] * len(words)
            if draw(st.booleans()):
                crops.append(Visual(torch.zeros(3, 1, 1), draw(st.integers(1, 3)), "crop"))
                ids += [IMAGE] * crops[-1].tokens + [9]
                sampled += [False] * (crops[-1].tokens + 1)
        length = len(ids)
        made.append(
            Trajectory(
                sample=Sample(str(number), "?", tuple(torch.zeros(3, 1, 1) for _ in seen)),
                prompt_ids=torch.tensor(prompt),
                completion_ids=torch.tensor(ids),
                sampled=torch.tensor(sampled),
                log_probs=-torch.arange(1.0, length + 1) - 100 * number,
                coordinates=torch.full((length,), torch.nan),
                visuals=(*seen, *crops),
                turns=(),
                stop=StopReason.EOS,
                answer=None,
                text="",
            )
        )
    return made


@given(families(), st.sampled_from([0, 8, 15, 1000]))
@quick(120)
def test_every_sampled_token_is_packed_once_and_reads_its_own_past(made: list[Trajectory], row_tokens: int) -> None:
    lengths = [len(t.prompt_ids) + len(t.completion_ids) for t in made]
    places = [torch.arange(n)[None] for n in lengths]
    batch = pack(made, places, image_token_id=IMAGE, pad_id=PAD, row_tokens=row_tokens)
    assert len(batch.targets) == sum(int(t.sampled.sum()) for t in made)
    width = batch.token_ids.shape[1]
    for number, trajectory in enumerate(made):
        mine = batch.owners == number
        assert torch.equal(batch.targets[mine], trajectory.completion_ids[trajectory.sampled])
        assert torch.equal(batch.log_probs[mine], trajectory.log_probs[trajectory.sampled])
        whole = torch.cat([trajectory.prompt_ids, trajectory.completion_ids])
        at = trajectory.sampled.nonzero()[:, 0] + len(trajectory.prompt_ids)
        for predictor, stop in zip(batch.predictors[mine].tolist(), at.tolist(), strict=True):
            row, column = divmod(predictor, width)
            segment = batch.segment_ids[row]
            past = (segment[: column + 1] == 0) | (segment[: column + 1] == segment[column])
            assert torch.equal(batch.token_ids[row, : column + 1][past], whole[:stop])
            assert batch.position_ids[0, row, column] == stop - 1
    shown = [batch.visuals[k] for k in batch.visual_order.tolist()]
    assert sum(v.tokens for v in shown) == int(batch.is_visual.sum())
    assert {id(v) for v in shown} == {id(v) for t in made for v in t.visuals}
    if row_tokens == 0:
        assert len(batch.token_ids) == len(made)
