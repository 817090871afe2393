"""Sampling tokens so that a trajectory depends on its own seed alone, not on who shares its batch."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 4096  # tokens whose probabilities are summed up one by one
LAST = 1 - 2**-53  # the largest float64 below 1


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
    scaled = logits if temperature in (0, 1) else logits / temperature
    if logits.shape[-1] > BLOCK and temperature > 0 and top_p == 1:
        return _sample_blocks(scaled.clone() if scaled is logits else scaled, uniforms, banned)
    log_probs = scaled.masked_fill(banned, -torch.inf).log_softmax(-1)
    if temperature == 0:
        ids = log_probs.argmax(-1)
    else:
        ids, _ = _reach((log_probs if top_p == 1 else _nucleus(log_probs, top_p)).double().exp(), uniforms)
    return ids, log_probs.gather(-1, ids[:, None])[:, 0]


def _nucleus(log_probs: Tensor, top_p: float) -> Tensor:
    """The same (B, V), with what lies outside of the nucleus at -inf."""
    ranked, order = log_probs.double().exp().sort(-1, descending=True)
    outside = ranked.cumsum(-1) - ranked >= top_p  # the tokens before it already reach top_p
    return log_probs.masked_fill(outside.gather(-1, order.argsort(-1)), -torch.inf)


def _sample_blocks(logits: Tensor, uniforms: Tensor, banned: Tensor) -> tuple[Tensor, Tensor]:
    """`sample_tokens` of a large vocabulary; uses the (B, V) ``logits`` up.

    Every logit is exponentiated once, where it stands. First the block that is reached, then the token in it, so that
    only one block is summed up token by token; a vocabulary of 150,000 takes 40 blocks. Sums are of float64: the rarest
    token has its share.
    """
    size = logits.shape[-1]
    logits.index_fill_(-1, banned.nonzero()[:, 0], -torch.inf)
    powers = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    masses = torch.stack([part.sum(-1, dtype=torch.float64) for part in powers.split(BLOCK, -1)], -1)
    block, below = _reach(masses, uniforms)
    places = block[:, None] * BLOCK + torch.arange(BLOCK, device=logits.device)
    own = powers.gather(-1, places.clamp(max=size - 1)).masked_fill_(places >= size, 0.0)
    within, _ = _reach(own.double(), below)
    ids = (block * BLOCK + within).clamp(max=size - 1)
    return ids, powers.gather(-1, ids[:, None])[:, 0].log() - masses.sum(-1).log().to(powers)


def _reach(masses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Which of (B, n) masses a share (B,) of their sum falls into, and the share of that mass that lies below it."""
    cumulative = masses.cumsum(-1)
    total = cumulative[:, -1:]
    # u * total may round up to total, behind the last mass that is not 0; right=True passes over masses of 0
    threshold = (uniforms[:, None] * total).minimum(total.nextafter(torch.zeros_like(total)))
    # the clamp is for logits that are not finite: what is sampled from them is arbitrary, but a token
    found = torch.searchsorted(cumulative, threshold, right=True).clamp(max=masses.shape[-1] - 1)
    mass = masses.gather(-1, found)
    below = cumulative.gather(-1, found) - mass
    return found[:, 0], ((threshold - below) / mass).clamp(0.0, LAST)[:, 0]
