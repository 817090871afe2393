"""Sampling tokens so that a trajectory depends on its own seed alone, not on who shares its batch."""

from __future__ import annotations

import torch
from torch import Tensor


class UniformStream:
    """Uniform numbers in [0, 1) from one seed, drawn in blocks."""

    BLOCK = 64

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed % 2**64)  # it takes no more
        self._block: list[float] = []

    def next(self) -> float:
        """The next number."""
        if not self._block:
            self._block = torch.rand(self.BLOCK, generator=self._generator, dtype=torch.float64).tolist()[::-1]
        return self._block.pop()


def sample_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, banned: Tensor
) -> tuple[Tensor, Tensor]:
    """Sample by inverting the cumulative distribution.

    Args:
        logits: (B, V) float.
        uniforms: (B,) float64 in [0, 1), one for each row.
        temperature: 0 takes the most likely token.
        top_p: nucleus sampling (Holtzman et al. 2020): only the smallest set of tokens whose
            probability reaches it.
        banned: (V,) bool, never sampled.

    Returns:
        ids (B,) long and their log-probabilities (B,) at this temperature (at 1 if greedy), over all
        tokens that are not banned: the distribution that the learner computes. `top_p` cuts what is
        sampled, not what is recorded.
    """
    logits = logits.masked_fill(banned, -torch.inf)
    log_probs = (logits / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        ids = log_probs.argmax(-1)
    else:
        probs = log_probs.double().exp()
        if top_p < 1:
            ranked, order = probs.sort(-1, descending=True)
            outside = ranked.cumsum(-1) - ranked >= top_p  # the tokens before it already reach top_p
            probs = probs.masked_fill(outside.gather(-1, order.argsort(-1)), 0.0)
        cumulative = probs.cumsum(-1)
        threshold = uniforms[:, None] * cumulative[:, -1:]
        # right=True passes over tokens of probability 0; the clamp guards u * total rounding up to total
        ids = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return ids, log_probs.gather(-1, ids[:, None])[:, 0]
