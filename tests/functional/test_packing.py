"""A packed batch read back: every predictor sees exactly the beginning of its own trajectory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modules.functional.packing import pack
from modules.trajectory import Sample, StopReason, Trajectory, TrajectoryBatch, Visual

IMAGE = 1  # the placeholder
PAD = 0
IDS = {"image_token_id": IMAGE, "pad_id": PAD}


def visual(tokens: int) -> Visual:
    return Visual(torch.zeros(3, 1, 1), tokens)


def trajectory(
    seed: int,
    prompt: list[int],
    length: int,
    seen: tuple[Visual, ...] = (),
    crops: tuple[int, ...] = (),
    **changes: float,
) -> Trajectory:
    """A random completion of ``length`` written tokens; behind the n-th of them stands crop n of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids, sampled = [], []
    shown = [visual(n) for n in crops]
    for k, token in enumerate(torch.randint(10, 99, (length,), generator=generator).tolist()):
        ids += [token]
        sampled += [True]
        if k < len(shown):
            ids += [IMAGE] * shown[k].tokens + [9]  # the environment may write a text besides
            sampled += [False] * (shown[k].tokens + 1)
    mask = torch.tensor(sampled, dtype=torch.bool)
    values = torch.rand(2, len(ids), generator=generator)
    return Trajectory(
        sample=Sample(f"s{seed}", "?", tuple(torch.zeros(3, 1, 1) for _ in seen)),
        prompt_ids=torch.tensor(prompt),
        completion_ids=torch.tensor(ids, dtype=torch.long),
        sampled=mask,
        log_probs=-values[0] * mask,
        coordinates=torch.where(mask, values[1], torch.nan),
        visuals=(*seen, *shown),
        turns=(),
        stop=StopReason.EOS,
        answer=None,
        text="",
        **changes,  # type: ignore[arg-type]
    )


def positions(trajectories: list[Trajectory]) -> list[Tensor]:
    """(2, P + C) each. The first axis is shared by equal beginnings, as positions are; the second is too."""
    lengths = [len(t.prompt_ids) + len(t.completion_ids) for t in trajectories]
    return [torch.stack([torch.arange(n), torch.arange(n) * 7 % 5]) for n in lengths]


def family() -> list[Trajectory]:
    """Rows to be: two questions about one image (three trajectories); another image; text (twice); text; the image."""
    first, second = visual(3), visual(2)
    asked, other = [IMAGE] * 3 + [5, 6, 7], [IMAGE] * 3 + [5, 8]
    return [
        trajectory(0, asked, 4, (first,), crops=(2,)),
        trajectory(1, asked, 6, (first,), crops=(1, 4)),
        trajectory(2, other, 1, (first,)),
        trajectory(3, [4] + [IMAGE] * 2 + [6], 3, (second,), crops=(2,)),
        trajectory(4, [5, 6, 7], 5),
        trajectory(5, [5, 6, 7], 2),
        trajectory(6, [5, 6], 2),
        trajectory(7, asked, 2, (first,)),
    ]


def shown_at(batch: TrajectoryBatch) -> dict[int, Visual]:
    """Which visual fills each placeholder, by flat index, read row by row."""
    filled = [v for k in batch.visual_order.tolist() for v in [batch.visuals[k]] * batch.visuals[k].tokens]
    return dict(zip(batch.is_visual.flatten().nonzero()[:, 0].tolist(), filled, strict=True))


def assert_reads_like(batch: TrajectoryBatch, trajectories: list[Trajectory]) -> None:
    """Every sampled token, in order: what its predictor may see is what stands before it in its own sequence."""
    length = batch.token_ids.shape[1]
    fills = shown_at(batch)
    flat_places = batch.position_ids.flatten(1)
    t = 0
    for k, (trajectory, places) in enumerate(zip(trajectories, positions(trajectories), strict=True)):
        whole = torch.cat([trajectory.prompt_ids, trajectory.completion_ids])
        visuals = [v for v in trajectory.visuals for _ in range(v.tokens)]
        for c in trajectory.sampled.nonzero()[:, 0].tolist():
            at = len(trajectory.prompt_ids) + c
            flat = int(batch.predictors[t])
            row, column = divmod(flat, length)
            segments = batch.segment_ids[row, : column + 1]
            # in a shared beginning, the completion that the token belongs to is not behind it yet
            own = segments[-1] if segments[-1] > 0 else 0
            seen = row * length + ((segments == 0) | (segments == own)).nonzero()[:, 0]
            assert torch.equal(batch.token_ids.flatten()[seen], whole[:at])
            assert torch.equal(flat_places[:, seen], places[:, :at])
            looked = [fills[i] for i in seen.tolist() if i in fills]
            assert all(a is b for a, b in zip(looked, visuals, strict=False))
            assert len(looked) == int((whole[:at] == IMAGE).sum())
            assert batch.targets[t] == whole[at]
            assert batch.owners[t] == k
            assert batch.log_probs[t] == trajectory.log_probs[c]
            assert batch.coordinates[t] == trajectory.coordinates[c]
            t += 1
    assert t == len(batch.predictors) == len(batch.targets) == len(batch.owners)
    assert batch.num_trajectories == len(trajectories)


@pytest.mark.parametrize("row_tokens", [10_000, 0])
def test_every_predictor_sees_the_beginning_of_its_own_trajectory(row_tokens: int) -> None:
    trajectories = family()
    batch = pack(trajectories, positions(trajectories), **IDS, row_tokens=row_tokens)
    assert batch.token_ids.shape[0] == (5 if row_tokens else 8)
    assert_reads_like(batch, trajectories)


def test_rows_and_segments() -> None:
    trajectories = family()
    batch = pack(trajectories, positions(trajectories), **IDS, row_tokens=10_000)
    runs = [row[row >= 0].unique_consecutive(return_counts=True) for row in batch.segment_ids]
    spans = [dict(zip(values.tolist(), counts.tolist(), strict=True)) for values, counts in runs]
    assert spans == [
        {0: 4, 1: 2 + 4 + 3, 2: 2 + 6 + 2 + 5, 3: 1 + 1},  # image and 5; the question's rest, written, crops
        {0: 4, 1: 3 + 3},
        {0: 3, 1: 5, 2: 2},
        {0: 2, 1: 2},
        {0: 6, 1: 2},  # no neighbour of the first row: a row of its own
    ]


def test_alone_the_prompt_is_the_prefix() -> None:
    trajectories = family()
    batch = pack(trajectories, positions(trajectories), **IDS, row_tokens=0)
    assert [int((row == 0).sum()) for row in batch.segment_ids] == [len(t.prompt_ids) for t in trajectories]
    assert batch.segment_ids.max() == 1


@pytest.mark.parametrize("pad", [PAD, IMAGE])
def test_padding_is_neither_seen_nor_shown(pad: int) -> None:
    trajectories = family()
    batch = pack(trajectories, positions(trajectories), image_token_id=IMAGE, pad_id=pad, row_tokens=10_000)
    padding = batch.segment_ids == -1
    assert padding.any()
    assert (batch.token_ids[padding] == pad).all()
    assert not batch.is_visual[padding].any()
    assert not padding.flatten()[batch.predictors].any()
    # padding stands behind what is real
    assert all(row.int().diff().min() >= 0 for row in padding if row.any())


def test_visuals_are_kept_once_however_often_they_are_shown() -> None:
    trajectories = family()
    shared = pack(trajectories, positions(trajectories), **IDS, row_tokens=10_000)
    alone = pack(trajectories, positions(trajectories), **IDS, row_tokens=0)
    crops = 1 + 2 + 1
    for batch in (shared, alone):
        assert len(batch.visuals) == 2 + crops
        assert len({id(v) for v in batch.visuals}) == 2 + crops
        assert int(batch.is_visual.sum()) == sum(batch.visuals[k].tokens for k in batch.visual_order.tolist())
    assert len(shared.visual_order) == 3 + crops  # the first image in rows 0 and 4
    assert len(alone.visual_order) == 5 + crops


def test_an_image_behind_the_question_belongs_to_each() -> None:
    """The common beginning ends before the image: each completion brings its own."""
    image = visual(3)
    trajectories = [trajectory(k, [5, 6 + k] + [IMAGE] * 3, 2, (image,), crops=(1,)) for k in range(2)]
    batch = pack(trajectories, positions(trajectories), **IDS, row_tokens=10_000)
    assert batch.token_ids.shape[0] == 1
    assert (batch.segment_ids == 0).sum() == 1
    assert_reads_like(batch, trajectories)


def test_a_trajectory_without_a_word_counts_and_owns_nothing() -> None:
    trajectories = [trajectory(0, [5], 2), trajectory(1, [5], 0), trajectory(2, [5], 1)]
    batch = pack(trajectories, positions(trajectories), **IDS, row_tokens=10_000)
    assert batch.num_trajectories == 3
    assert batch.owners.tolist() == [0, 0, 2]
    assert_reads_like(batch, trajectories)


def test_text_only() -> None:
    trajectories = family()[4:7]
    batch = pack(trajectories, positions(trajectories), **IDS, row_tokens=10_000)
    assert batch.visuals == ()
    assert batch.visual_order.shape == (0,)
    assert batch.visual_order.dtype == torch.long
    assert not batch.is_visual.any()


def test_temperature_is_handed_on_and_not_mixed() -> None:
    same = [trajectory(k, [5], 1, temperature=0.7) for k in range(2)]
    assert pack(same, positions(same), **IDS, row_tokens=10_000).temperature == 0.7
    mixed = [*same, trajectory(2, [5], 1, temperature=1.0)]
    with pytest.raises(ValueError, match=r"one temperature, but got \[0.7, 1.0\]"):
        pack(mixed, positions(mixed), **IDS, row_tokens=10_000)


@pytest.mark.parametrize("member", [0, 1])
def test_placeholders_that_do_not_match_are_refused(member: int) -> None:
    trajectories = family()[:2]
    odd = trajectories[member]
    trajectories[member] = Trajectory(**{**vars(odd), "visuals": odd.visuals[:-1]})
    with pytest.raises(ValueError, match=rf"visuals of sample 's{member}', but got"):
        pack(trajectories, positions(trajectories), **IDS, row_tokens=10_000)


def test_a_row_takes_as_many_completions_as_fit() -> None:
    trajectories = [trajectory(k, [5, 6, 7], 2) for k in range(5)]
    for row_tokens, rows in ((0, 5), (7, 3), (8, 3), (9, 2), (13, 1)):  # 3 + 2n tokens a row of n
        batch = pack(trajectories, positions(trajectories), **IDS, row_tokens=row_tokens)
        assert batch.token_ids.shape[0] == rows, row_tokens
