"""Log-probabilities straight from hidden states, without the logits of all tokens at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modules.functional.checks import check_tensor
from modules.functional.losses import LEAST


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    banned: Tensor,
    size: int,
) -> tuple[Tensor, Tensor]:
    """`selected_log_probs` of ``hidden @ weight.T + bias``, in chunks of tokens whose logits are computed in place.

    The same numbers as the composition of both. The backward pass computes the logits of a chunk once more and turns
    them into their own gradient, so that two chunks of logits are all that ever exists, and the gradient of the weight
    is added up where it stands: with p the probabilities, l the log-probability of the target and H the entropy,

        ``dl / dz_k = ([k = target] - p_k) / temperature``, ``dH / dz_k = -p_k (log p_k + H) / temperature``.

    Args:
        hidden: (T, D) float.
        weight: (V, D) float.
        bias: (V,) float, if there is one.
        targets: (T,) long.
        temperature: divides the logits, > 0.
        banned: (V,) bool, ids that cannot be sampled.
        size: tokens a chunk, >= 1.

    Returns:
        log_probs: (T,) float32, with gradient.
        entropy: (T,) float32 in nats, with gradient.

    Raises:
        ValueError: wrong shape or type, or a temperature or size out of range.
    """
    check_tensor("hidden", hidden, ("T", weight.shape[1]), "float")
    check_tensor("targets", targets, (hidden.shape[0],), "long")
    check_tensor("banned", banned, (weight.shape[0],), "bool")
    if not temperature > 0:
        raise ValueError(f"Expected `temperature` to be positive but got {temperature}")
    if size < 1:
        raise ValueError(f"Expected `size` to be at least 1 but got {size}")
    log_probs, entropy = _LinearLogProbs.apply(hidden, weight, bias, targets, temperature, banned, size)
    return log_probs, entropy


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        banned: Tensor,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        ids = banned.nonzero()[:, 0]
        found, entropies = [], []
        for some, wanted in zip(hidden.split(size), targets.split(size), strict=True):
            log_probs = _logits(some, weight, bias, temperature, ids)
            torch.log_softmax(log_probs, -1, out=log_probs)
            found.append(log_probs.gather(1, wanted[:, None])[:, 0])
            probs = log_probs.exp_()
            entropies.append(torch.special.entr(probs, out=probs).sum(-1))
        entropy = torch.cat(entropies)
        ctx.save_for_backward(hidden, weight, bias, targets, ids, entropy)
        ctx.temperature, ctx.size = temperature, size
        return torch.cat(found), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_log_probs: Tensor, of_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, ids, entropy = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        wide = torch.promote_types(weight.dtype, torch.float32)  # sums over chunks are not rounded to half precision
        grad_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if wants_bias else None
        exploring = bool(of_entropy.count_nonzero())
        for start in range(0, len(hidden), ctx.size):
            own = slice(start, start + ctx.size)
            gradient = _logits(hidden[own], weight, bias, ctx.temperature, ids)
            if exploring:
                log_probs = gradient.log_softmax(-1)
                surplus = log_probs.clamp(min=LEAST) + entropy[own, None]
                torch.exp(log_probs, out=gradient)
                gradient.mul_(surplus.mul_(of_entropy[own, None]).add_(of_log_probs[own, None])).neg_()
            else:
                torch.softmax(gradient, -1, out=gradient).mul_(-of_log_probs[own, None])
            gradient.scatter_add_(1, targets[own, None], of_log_probs[own, None])
            if ctx.temperature != 1:
                gradient.div_(ctx.temperature)
            gradient = gradient.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(gradient, weight, out=grad_hidden[own])
            if grad_weight is not None and wide == weight.dtype:
                grad_weight.addmm_(gradient.T, hidden[own])
            elif grad_weight is not None:
                grad_weight.add_(gradient.T @ hidden[own])
            if grad_bias is not None:
                grad_bias.add_(gradient.sum(0))
        of_weight = grad_weight if grad_weight is None else grad_weight.to(weight.dtype)
        of_bias = grad_bias if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, of_weight, of_bias, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, banned: Tensor) -> Tensor:
    """(t, V) float32 of a chunk, at this temperature, banned ids at -inf."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:
        logits.div_(temperature)
    return logits.index_fill_(1, banned, -torch.inf)
