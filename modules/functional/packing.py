"""Trajectories -> one batch in which a shared beginning is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modules.trajectory import Trajectory, TrajectoryBatch, Visual


def pack(
    trajectories: Sequence[Trajectory],
    positions: Sequence[Tensor],
    *,
    image_token_id: int,
    pad_id: int,
    row_tokens: int,
) -> TrajectoryBatch:
    """Lay trajectories out in rows ``[prefix, completion 1, completion 2, ...]``.

    Neighbours whose prompts show the same images (or, without images, are the same) share a row,
    and in it the longest common beginning of their prompts. A completion's positions go on from the
    prefix, so that each reads exactly what it would read alone.

    Args:
        trajectories: N of them.
        positions: (A, P_i + C_i) long each, of the whole sequence.
        image_token_id: the placeholder of visual tokens; never a sampled token.
        pad_id: fills rows up to the longest.
        row_tokens: a row that shares a prefix ends before it grows longer than this. Attention costs
            the square of a row's length, so short sequences share only with a few others; 0 gives
            every trajectory a row of its own.

    Raises:
        ValueError: if a trajectory's placeholders and visuals do not match, or temperatures are mixed.
    """
    temperatures = {t.temperature for t in trajectories}
    if len(temperatures) != 1:
        raise ValueError(f"Expected trajectories of one temperature, but got {sorted(temperatures)}.")
    tokens, places, segments, order = [], [], [], []
    row_of, column_of, targets, owners, log_probs, coordinates = [], [], [], [], [], []
    distinct: dict[int, int] = {}  # id of a visual -> its place in `visuals`
    visuals: list[Visual] = []
    for row, members in enumerate(_rows(trajectories, row_tokens)):
        prefix = common_length([trajectories[k].prompt_ids for k in members])
        first = trajectories[members[0]]
        shown = _count_visuals(first, prefix, image_token_id)
        line, row_places = [first.prompt_ids[:prefix]], [positions[members[0]][:, :prefix]]
        row_segments = [torch.zeros(prefix, dtype=torch.long)]
        row_visuals = list(first.visuals[:shown])
        offset = prefix
        for segment, k in enumerate(members, start=1):
            trajectory = trajectories[k]
            own = torch.cat([trajectory.prompt_ids[prefix:], trajectory.completion_ids])
            _check_visuals(trajectory, image_token_id)
            line.append(own)
            row_places.append(positions[k][:, prefix:])
            row_segments.append(torch.full(own.shape, segment))
            row_visuals += trajectory.visuals[shown:]
            at = trajectory.sampled.nonzero()[:, 0]  # within the completion
            before = at + len(trajectory.prompt_ids) - 1  # the predictor, within the whole sequence
            column_of.append(torch.where(before < prefix, before, before - prefix + offset))
            row_of.append(torch.full(at.shape, row))
            targets.append(trajectory.completion_ids[at])
            owners.append(torch.full(at.shape, k))
            log_probs.append(trajectory.log_probs[at])
            coordinates.append(trajectory.coordinates[at])
            offset += len(own)
        tokens.append(torch.cat(line))
        places.append(torch.cat(row_places, 1).T)
        segments.append(torch.cat(row_segments))
        for visual in row_visuals:
            if id(visual) not in distinct:
                distinct[id(visual)] = len(visuals)
                visuals.append(visual)
            order.append(distinct[id(visual)])
    token_ids = pad_sequence(tokens, batch_first=True, padding_value=pad_id)
    segment_ids = pad_sequence(segments, batch_first=True, padding_value=-1)
    return TrajectoryBatch(
        token_ids=token_ids,
        position_ids=pad_sequence(places, batch_first=True).permute(2, 0, 1),
        segment_ids=segment_ids,
        is_visual=(token_ids == image_token_id) & (segment_ids >= 0),
        visuals=tuple(visuals),
        visual_order=torch.tensor(order, dtype=torch.long),
        predictors=torch.cat(row_of) * token_ids.shape[1] + torch.cat(column_of),
        targets=torch.cat(targets),
        owners=torch.cat(owners),
        log_probs=torch.cat(log_probs),
        coordinates=torch.cat(coordinates),
        num_trajectories=len(trajectories),
        temperature=temperatures.pop(),
    )


def common_length(sequences: Sequence[Tensor]) -> int:
    """How many leading ids all of the 1-D ``sequences`` share."""
    first = sequences[0]
    length = len(first)
    for other in sequences[1:]:
        if other is first:
            continue
        length = min(length, len(other))
        differs = (first[:length] != other[:length]).nonzero()
        length = int(differs[0]) if len(differs) else length
    return length


def _rows(trajectories: Sequence[Trajectory], row_tokens: int) -> list[list[int]]:
    """Which trajectories share a row: neighbours with equal prompt keys, as many as fit."""
    rows: list[list[int]] = []
    keys = [_prompt_key(t) for t in trajectories]
    for _, run in groupby(range(len(trajectories)), keys.__getitem__):
        length = row_tokens + 1  # the first of a run begins a row
        for k in run:
            prompt, completion = trajectories[k].prompt_ids, trajectories[k].completion_ids
            shared = common_length([trajectories[rows[-1][0]].prompt_ids, prompt]) if rows else 0
            if length + len(prompt) - shared + len(completion) > row_tokens:
                rows.append([])
                length = shared = 0
            rows[-1].append(k)
            length += len(prompt) - shared + len(completion)
    return rows


def _prompt_key(trajectory: Trajectory) -> tuple[object, ...]:
    shown = trajectory.visuals[: trajectory.sample.prompt_visuals]
    return tuple(id(v) for v in shown) if shown else ("text", *trajectory.prompt_ids.tolist())


def _count_visuals(trajectory: Trajectory, prefix: int, image_token_id: int) -> int:
    """How many visuals lie wholly within the first ``prefix`` tokens."""
    room = int((trajectory.prompt_ids[:prefix] == image_token_id).sum())
    count = 0
    while count < len(trajectory.visuals) and trajectory.visuals[count].tokens <= room:
        room -= trajectory.visuals[count].tokens
        count += 1
    return count


def _check_visuals(trajectory: Trajectory, image_token_id: int) -> None:
    ids = torch.cat([trajectory.prompt_ids, trajectory.completion_ids])
    placeholders = int((ids == image_token_id).sum())
    expected = sum(visual.tokens for visual in trajectory.visuals)
    if placeholders != expected:
        raise ValueError(
            f"Expected {expected} visual placeholders for the {len(trajectory.visuals)} visuals of sample "
            f"{trajectory.sample.id!r}, but got {placeholders}."
        )
