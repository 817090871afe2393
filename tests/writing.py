"""Trajectories of one token a character, for tests of what is read off their text."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modules.trajectory import Region, Sample, StopReason, Trajectory, Turn

BOX_TURN = 'in \\frac{1}{2} {here: {"label": "cat", "bbox_2d": [1, 2, 30, 40]}'


def written(*texts: str, stop: StopReason = StopReason.ANSWER, fault: str | None = None) -> Trajectory:
    """Turns with these texts, with three tokens of the environment after each but the last; token k has log-probability
    -k, counted from 1."""
    ids: list[int] = []
    sampled: list[bool] = []
    turns = []
    for text in texts:
        start = len(ids)
        ids += map(ord, text)
        sampled += [True] * len(text)
        asks = "bbox_2d" in text
        region = Region((1, 2, 30, 40)) if asks and fault is None else None
        turns.append(Turn(text, start, len(ids), region=region, fault=fault if asks else None))
        if text is not texts[-1]:
            ids += [ord("#")] * 3
            sampled += [False] * 3
    mask = torch.tensor(sampled)
    log_probs = -torch.arange(1.0, len(ids) + 1) * mask
    return Trajectory(
        Sample("s", "?"), torch.tensor([0]), torch.tensor(ids), mask, log_probs, torch.full((len(ids),), math.nan), (),
        tuple(turns), stop, None, "".join(texts),
    )  # fmt: skip


def spell(ids: Tensor) -> str:
    """The text of such tokens."""
    return "".join(map(chr, ids.tolist()))
