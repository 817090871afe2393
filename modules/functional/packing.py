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
    prompts = torch.tensor([t.prompt_ids.numel() for t in trajectories])
    completions = torch.tensor([t.completion_ids.numel() for t in trajectories])
    _check_visuals(trajectories, prompts, completions, image_token_id)
    tokens, places, segments, order = [], [], [], []
    laid: list[tuple[int, int, int]] = []  # of each trajectory its row, the prefix, and the column where it goes on
    distinct: dict[int, int] = {}  # id of a visual -> its place in `visuals`
    visuals: list[Visual] = []
    for row, members in enumerate(_rows(trajectories, row_tokens)):
        prefix = common_length([trajectories[k].prompt_ids for k in members])
        first = trajectories[members[0]]
        shown = _count_visuals(first, prefix, image_token_id)
        line, row_places = [first.prompt_ids[:prefix]], [positions[members[0]][:, :prefix]]
        row_visuals = list(first.visuals[:shown])
        lengths = [prefix]
        for k in members:
            trajectory = trajectories[k]
            laid.append((row, prefix, sum(lengths)))
            line += [trajectory.prompt_ids[prefix:], trajectory.completion_ids]
            row_places.append(positions[k][:, prefix:])
            row_visuals += trajectory.visuals[shown:]
            lengths.append(positions[k].shape[1] - prefix)
        tokens.append(torch.cat(line))
        places.append(torch.cat(row_places, 1).T)
        segments.append(torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)))
        for visual in row_visuals:
            if id(visual) not in distinct:
                distinct[id(visual)] = len(visuals)
                visuals.append(visual)
            order.append(distinct[id(visual)])
    token_ids = pad_sequence(tokens, batch_first=True, padding_value=pad_id)
    segment_ids = pad_sequence(segments, batch_first=True, padding_value=-1)
    sampled = torch.cat([t.sampled for t in trajectories]).nonzero()[:, 0]  # within all completions
    owners = torch.arange(len(trajectories)).repeat_interleave(completions)[sampled]
    before = sampled - (completions.cumsum(0) - completions - prompts + 1)[owners]  # the predictor, within its sequence
    row_of, prefix_of, behind = torch.tensor(laid)[owners].unbind(1)
    columns = torch.where(before < prefix_of, before, before - prefix_of + behind)
    return TrajectoryBatch(
        token_ids=token_ids,
        position_ids=pad_sequence(places, batch_first=True).permute(2, 0, 1),
        segment_ids=segment_ids,
        is_visual=(token_ids == image_token_id) & (segment_ids >= 0),
        visuals=tuple(visuals),
        visual_order=torch.tensor(order, dtype=torch.long),
        predictors=row_of * token_ids.shape[1] + columns,
        targets=torch.cat([t.completion_ids for t in trajectories])[sampled],
        owners=owners,
        log_probs=torch.cat([t.log_probs for t in trajectories])[sampled],
        coordinates=torch.cat([t.coordinates for t in trajectories])[sampled],
        num_trajectories=len(trajectories),
        temperature=temperatures.pop(),
    )


def common_length(sequences: Sequence[Tensor]) -> int:
    """How many leading ids all of the 1-D ``sequences`` share."""
    first = sequences[0]
    length = first.numel()
    for other in sequences[1:]:
        if other is first:
            continue
        length = min(length, other.numel())
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
            prompt = trajectories[k].prompt_ids
            tokens = prompt.numel() + trajectories[k].completion_ids.numel()
            shared = common_length([trajectories[rows[-1][0]].prompt_ids, prompt]) if rows else 0
            if length + tokens - shared > row_tokens:
                rows.append([])
                length = shared = 0
            rows[-1].append(k)
            length += tokens - shared
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


def _check_visuals(
    trajectories: Sequence[Trajectory], prompts: Tensor, completions: Tensor, image_token_id: int
) -> None:
    """Raise ValueError for a trajectory whose placeholders, in prompt and completion of (N,) lengths, are no match."""
    placeholders = torch.zeros(len(trajectories), dtype=torch.long)
    parts = ([t.prompt_ids for t in trajectories], prompts), ([t.completion_ids for t in trajectories], completions)
    for ids, lengths in parts:
        owners = torch.arange(len(trajectories)).repeat_interleave(lengths)
        placeholders += owners[torch.cat(ids) == image_token_id].bincount(minlength=len(trajectories))
    for trajectory, found in zip(trajectories, placeholders.tolist(), strict=True):
        expected = sum(visual.tokens for visual in trajectory.visuals)
        if found != expected:
            raise ValueError(
                f"Expected {expected} visual placeholders for the {len(trajectory.visuals)} visuals of sample "
                f"{trajectory.sample.id!r}, but got {found}."
            )
