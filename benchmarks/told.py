"""Trajectories that write what they are told, through the policy's own passes and its own sampler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from modules import flight
from modules.functional.sampling import BLOCK, UniformStream, sample_tokens


@contextmanager
def told(scripts: Mapping[int, Sequence[int | None]]) -> Iterator[None]:
    """Within it, the trajectory of seed s writes the tokens ``scripts[s]``, and by itself where there is None.

    The uniform number with which a token would be drawn is replaced by the one that draws the token of the script,
    so that model, sampler and log-probability are what they are without it. Which token of which trajectory is due,
    the original number tells, for each is drawn but once.
    """
    due: dict[float, int] = {}
    for seed, ids in scripts.items():
        stream = UniformStream(seed)
        due |= {uniform: token for uniform, token in ((stream.next(), token) for token in ids) if token is not None}

    def sample(
        logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, banned: Tensor
    ) -> tuple[Tensor, Tensor]:
        own = sample_tokens(logits, uniforms, temperature, top_p, banned)
        wanted = torch.tensor([due.get(u, -1) for u in uniforms.tolist()], device=logits.device)
        aimed = aim(logits, wanted.clamp(min=0), temperature or 1.0, banned)
        forced = sample_tokens(logits, aimed, temperature or 1.0, 1.0, banned)
        return torch.where(wanted < 0, own[0], forced[0]), torch.where(wanted < 0, own[1], forced[1])

    with patch.object(flight, "sample_tokens", sample):
        yield


def aim(logits: Tensor, targets: Tensor, temperature: float, banned: Tensor) -> Tensor:
    """(B,) float64, the numbers with which `sample_tokens` draws the ``targets`` (B,): the middle of their share."""
    allowed = logits.masked_fill(banned, -torch.inf) / temperature
    if logits.shape[-1] > BLOCK:  # the numbers that are summed up there, to the last bit: a share may be tiny
        probs = (allowed - allowed.amax(-1, keepdim=True)).exp().double()
    else:
        probs = allowed.log_softmax(-1).double().exp()
    cumulative = probs.cumsum(-1)
    share = probs.gather(-1, targets[:, None])
    return ((cumulative.gather(-1, targets[:, None]) - share / 2) / cumulative[:, -1:])[:, 0]
