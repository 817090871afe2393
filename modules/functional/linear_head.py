"""Log-probabilities straight from hidden states, without the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modules.functional.checks import check_tensor
from modules.functional.losses import LEAST

ROWS = 8  # tokens whose logits are passed over together: those of 150,000 ids stay in a cache of a few MiB
NEVER = -1e30  # a logit of no probability; finite, so that 0 times it is 0
Terms = Callable[[Tensor, Tensor, slice], Tensor]  # log-probabilities, entropies, which tokens -> their share of a loss


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
    them into their own gradient, so that one chunk of logits is all that ever exists, and the gradient of the weight
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
        log_probs: (T,) float32, with gradient; -inf where the target itself is banned.
        entropy: (T,) float32 in nats, with gradient.

    Raises:
        ValueError: wrong shape or type, or a temperature or size out of range.
    """
    _check(hidden, weight, targets, temperature, banned, size)
    log_probs, entropy = _LinearLogProbs.apply(hidden, weight, bias, targets, temperature, banned, size)
    return log_probs, entropy


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    banned: Tensor,
    size: int,
    terms: Terms,
) -> tuple[Tensor, Tensor, Tensor]:
    """A loss that is a sum over tokens, and its gradient in the same pass.

    ``terms(log_probs[own], entropy[own], own)`` is what the tokens of a slice add to the loss. It is asked for a chunk
    at a time, and tells what `linear_log_probs` has to wait for the backward pass to know: the weight of each token in
    the gradient. So a chunk's logits are computed once: three matrix products (logits, gradient of the hidden states,
    gradient of the weight) in place of four. The gradients wait, in the size of what they are of, for the one backward
    pass that there can be.

    Args:
        terms: see above; the first two, (t,) float32, carry gradient.
        others: see `linear_log_probs`.

    Returns:
        loss: a scalar, with gradient.
        log_probs: (T,) float32, without gradient.
        entropy: (T,) float32 in nats, without gradient.

    Raises:
        ValueError: see `linear_log_probs`.
    """
    _check(hidden, weight, targets, temperature, banned, size)
    loss, log_probs, entropy = _LinearLoss.apply(hidden, weight, bias, targets, temperature, banned, size, terms)
    return loss, log_probs, entropy


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, banned: Tensor, size: int) -> None:
    check_tensor("hidden", hidden, ("T", weight.shape[1]), "float")
    check_tensor("targets", targets, (hidden.shape[0],), "long")
    check_tensor("banned", banned, (weight.shape[0],), "bool")
    if not temperature > 0:
        raise ValueError(f"Expected `temperature` to be positive but got {temperature}")
    if size < 1:
        raise ValueError(f"Expected `size` to be at least 1 but got {size}")


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
        chunks = _Chunks(hidden, weight, bias, targets, temperature, banned, size)
        found = [chunks.softmax(own)[:2] for own in chunks.slices]
        log_probs, entropy = (torch.cat(parts) for parts in zip(*found, strict=True))
        ctx.save_for_backward(hidden, weight, bias, targets, banned, entropy)
        ctx.temperature, ctx.size = temperature, size
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_log_probs: Tensor, of_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, banned, _ = ctx.saved_tensors
        chunks = _Chunks(hidden, weight, bias, targets, ctx.temperature, banned, ctx.size)
        gradient = _Gradient(hidden, weight, bias, ctx.needs_input_grad[:3])
        exploring = bool(of_entropy.count_nonzero())
        for own in chunks.slices:
            _, entropy, total = chunks.softmax(own)
            gradient.add(chunks, own, total, entropy, of_log_probs[own], of_entropy[own] if exploring else None)
        return *gradient.finished(), None, None, None, None


class _LinearLoss(torch.autograd.Function):
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
        terms: Terms,
    ) -> tuple[Tensor, Tensor, Tensor]:
        chunks = _Chunks(hidden, weight, bias, targets, temperature, banned, size)
        gradient = _Gradient(hidden, weight, bias, ctx.needs_input_grad[:3])
        loss, found = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32)), []
        for own in chunks.slices:
            log_probs, entropy, total = chunks.softmax(own)
            found.append((log_probs, entropy))
            with torch.enable_grad():
                inputs = (log_probs.detach().requires_grad_(), entropy.detach().requires_grad_())
                share = terms(*inputs, own)
            loss = loss + share.detach()
            if any(ctx.needs_input_grad[:3]):
                of_log_probs, of_entropy = torch.autograd.grad(share, inputs, allow_unused=True)
                assert of_log_probs is not None
                gradient.add(chunks, own, total, entropy, of_log_probs, of_entropy)
        log_probs, entropy = (torch.cat(parts) for parts in zip(*found, strict=True))
        ctx.gradients = gradient.finished()
        ctx.mark_non_differentiable(log_probs, entropy)
        return loss, log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("Expected one backward pass through `linear_loss`, but this is another.")
        gradients, ctx.gradients = ctx.gradients, None
        return *(g if g is None else g.mul_(of_loss) for g in gradients), None, None, None, None, None


class _Chunks:
    """The logits of some tokens at a time, all in the same memory, and what they become there."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        banned: Tensor,
        size: int,
    ) -> None:
        self.hidden, self.weight, self.bias, self.targets = hidden, weight, bias, targets
        self.temperature, self.banned, self.ids = temperature, banned, banned.nonzero()[:, 0]
        self.slices = [slice(k, min(k + size, len(hidden))) for k in range(0, len(hidden), size)]
        self.wide = torch.promote_types(weight.dtype, torch.float32)
        self.memory = hidden.new_empty(min(size, len(hidden)), len(weight), dtype=self.wide)

    def softmax(self, own: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Leave exp(logits - their largest) of these tokens in memory.

        Returns:
            log-probabilities of the targets (t,), entropies (t,), and the sums (t,) of what is in memory.
        """
        hidden, targets = self.hidden[own], self.targets[own]
        logits = self.memory[: len(hidden)]
        if self.wide == self.weight.dtype:
            torch.mm(hidden, self.weight.T, out=logits)
            if self.bias is not None:
                logits.add_(self.bias)
        else:
            logits.copy_(torch.nn.functional.linear(hidden, self.weight, self.bias))
        log_probs, entropies, sums = (torch.empty_like(logits[:, 0]) for _ in range(3))
        for start in range(0, len(logits), ROWS):
            some = slice(start, start + ROWS)
            z = logits[some]
            if self.temperature != 1:
                z.div_(self.temperature)
            z.index_fill_(1, self.ids, NEVER)
            z.sub_(z.amax(1, keepdim=True))
            powers = z.exp()
            sums[some] = total = powers.sum(1)
            log_probs[some] = z.gather(1, targets[some, None])[:, 0] - total.log()
            entropies[some] = total.log() - torch.linalg.vecdot(powers, z) / total
            z.copy_(powers)
        return log_probs.masked_fill_(self.banned[targets], -torch.inf), entropies, sums


class _Gradient:
    """The gradients of hidden states, weight and bias, added up chunk by chunk where they stand."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]) -> None:
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        wide = torch.promote_types(weight.dtype, torch.float32)  # sums over chunks are not rounded to half precision
        self.weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide) if wanted[2] and bias is not None else None
        self.dtype = weight.dtype

    def add(
        self,
        chunks: _Chunks,
        own: slice,
        total: Tensor,
        entropy: Tensor,
        of_log_probs: Tensor,
        of_entropy: Tensor | None,
    ) -> None:
        """Turn what `_Chunks.softmax` left of these tokens into their part of the gradient; it is used up then.

        Rows are weighted in the narrow factor of each product, not in the (t, V) one, which needs no pass of its own.
        """
        powers, hidden, targets = chunks.memory[: len(total)], chunks.hidden[own], chunks.targets[own]
        of_targets = of_log_probs / chunks.temperature
        if of_entropy is None:
            scale = -of_targets / total
        else:
            surplus = powers.log().sub_(total.log()[:, None]).clamp_(min=LEAST).add_(entropy[:, None])
            powers.mul_(surplus.mul_(of_entropy[:, None]).add_(of_log_probs[:, None]))
            scale = -1 / (total * chunks.temperature)
        powers = powers.to(self.dtype)
        if self.hidden is not None:
            torch.mm(powers, chunks.weight, out=self.hidden[own])
            self.hidden[own].mul_(scale[:, None]).addcmul_(chunks.weight[targets], of_targets[:, None].to(self.dtype))
        if self.weight is not None:
            scaled = hidden * scale[:, None].to(self.dtype)
            if self.weight.dtype == self.dtype:
                self.weight.addmm_(powers.T, scaled)
            else:
                self.weight.add_(powers.T @ scaled)
            self.weight.index_add_(0, targets, (hidden * of_targets[:, None]).to(self.weight.dtype))
        if self.bias is not None:
            self.bias.add_(scale @ powers.to(scale.dtype)).index_add_(0, targets, of_targets.to(self.bias.dtype))

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states, weight and bias, in the type of each."""
        weight, bias = (None if g is None else g.to(self.dtype) for g in (self.weight, self.bias))
        return self.hidden, weight, bias
