"""What losses over flat sampled tokens are made of: log-probabilities, cross-entropy, and what divides them.

Conventions, for every function of this file:

- Tokens are flat: T sampled tokens of N trajectories, padding-free, in any order. ``owners`` (T,)
  says which trajectory a token belongs to; a trajectory may own none.
- A loss is a weighted SUM. It is divided once, by the sum of the counts that `token_weights`
  returns, over the whole optimizer step: all micro-batches, all ranks. Means of means are biased
  as soon as micro-batches differ in length.
- Log-probabilities are natural logarithms, computed in float32 or, if the input is wider, in its type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modules.functional.checks import check_tensor

LEAST = -1e4  # a log-probability whose probability is 0 in any precision

Normalisation = Literal["sequence", "token", "constant"]


def selected_log_probs(
    logits: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    banned: Tensor | None = None,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy of the distribution that it was drawn from.

    ``log_probs[t] = log_softmax(logits[t] / temperature)[targets[t]]`` over the ids that are not banned.
    With the sampler's temperature and ban this is the sampler's own distribution; any other choice
    puts a wrong ratio into the policy gradient.

    Args:
        logits: (T, V) float.
        targets: (T,) long.
        temperature: divides the logits, > 0.
        banned: (V,) bool, ids that cannot be sampled.
        entropy_gradient: whether the entropy carries gradient; a mere metric leaves nothing for the backward pass.

    Returns:
        log_probs: (T,), with gradient; -inf where the target itself is banned (looking for that
            here would cost a synchronisation a chunk).
        entropy: (T,) in nats.

    Raises:
        ValueError: wrong shape or type, or a temperature that is not positive.
    """
    check_tensor("logits", logits, ("T", "V"), "float")
    check_tensor("targets", targets, (logits.shape[0],), "long")
    if not temperature > 0:
        raise ValueError(f"Expected `temperature` to be positive but got {temperature}")
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if banned is not None:
        check_tensor("banned", banned, (logits.shape[1],), "bool")
        scaled = scaled.masked_fill(banned, -torch.inf)
    all_log_probs = scaled.log_softmax(dim=-1)
    entropy = _entropy(all_log_probs) if entropy_gradient else _entropy_as_metric(all_log_probs)
    return all_log_probs.gather(1, targets[:, None]).squeeze(1), entropy


def _entropy(log_probs: Tensor) -> Tensor:
    # a finite number in place of -inf: 0 times it is 0, and so is the gradient there, whatever it is multiplied by
    finite = log_probs.clamp(min=LEAST)
    return -(log_probs.exp() * finite).sum(dim=-1)


@torch.no_grad()
def _entropy_as_metric(log_probs: Tensor) -> Tensor:
    # entr(p) = -p log p with entr(0) = 0; its gradient at 0 is infinite, but it takes one (T, V) tensor less
    return torch.special.entr(log_probs.exp()).sum(dim=-1)


def in_chunks(
    fn: Callable[..., tuple[Tensor, ...]], hidden: Tensor, *per_token: Tensor, size: int
) -> tuple[Tensor, ...]:
    """Apply ``fn`` to chunks of the token axis and concatenate what it returns.

    ``fn(hidden[a:b], *(x[a:b] for x in per_token))`` typically multiplies by the language model's
    head. With gradients and more than one chunk, each chunk is recomputed in the backward pass, so
    that logits exist for ``size`` tokens at a time instead of all T x V; the price is the head twice.

    Args:
        fn: takes (t, D) and (t, ...) tensors, returns a tuple of tensors whose first axis is t.
        hidden: (T, D) float.
        *per_token: (T, ...).
        size: tokens a chunk, >= 1.

    Raises:
        ValueError: wrong shape, or a size below one.
    """
    check_tensor("hidden", hidden, ("T", "D"), "float")
    if size < 1:
        raise ValueError(f"Expected `size` to be at least 1 but got {size}")
    tokens = hidden.shape[0]
    for index, tensor in enumerate(per_token):
        if tensor.shape[:1] != (tokens,):
            raise ValueError(
                f"Expected `per_token[{index}]` to have {tokens} tokens but got shape {tuple(tensor.shape)}"
            )
    if tokens <= size:
        return fn(hidden, *per_token)
    chunks = zip(*(tensor.split(size) for tensor in (hidden, *per_token)), strict=True)
    if torch.is_grad_enabled():
        outputs = [checkpoint(fn, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        outputs = [fn(*chunk) for chunk in chunks]
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


def coordinate_cross_entropy(
    logits: Tensor, targets: Tensor, coordinates: Tensor, bins: Tensor, sigma: float
) -> Tensor:
    """Cross-entropy that grades a coordinate token by how far it is from the exact coordinate.

    Where ``coordinates[t]`` is NaN: ``-log p(targets[t])``. Elsewhere ``targets[t]`` is one of K
    ordered bins of a family f and the target is a Gaussian around the exact coordinate c:
    ``-sum_k q_k log p(bins[f, k])`` with ``q = softmax_k(-(k - c)^2 / (2 sigma^2))``. p is the softmax over the
    FULL vocabulary, so mass outside the family is punished too. For an integer c it becomes the
    ordinary cross-entropy as sigma -> 0.

    Source: Gaussian label smoothing of classified coordinates, SimCC (arXiv 2107.03332).

    Args:
        logits: (T, V) float.
        targets: (T,) long.
        coordinates: (T,) float in units of bins, NaN where the token is no coordinate.
        bins: (F, K) long, ids of each family's tokens in order of their coordinate.
        sigma: width of the target in bins, > 0.

    Returns:
        (T,) one loss a token.

    Raises:
        ValueError: wrong shape or type, a sigma that is not positive, or a coordinate on a token of no family.
    """
    check_tensor("logits", logits, ("T", "V"), "float")
    check_tensor("targets", targets, (logits.shape[0],), "long")
    check_tensor("coordinates", coordinates, (logits.shape[0],), "float")
    check_tensor("bins", bins, ("F", "K"), "long")
    if not sigma > 0:
        raise ValueError(f"Expected `sigma` to be positive but got {sigma}")
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    plain = -log_probs.gather(1, targets[:, None]).squeeze(1)
    rows = coordinates.isfinite().nonzero().squeeze(1)
    if rows.numel() == 0:
        return plain
    in_family = (bins == targets[rows, None, None]).any(dim=-1)  # (c, F)
    if not in_family.any(dim=-1).all():
        strangers = targets[rows][~in_family.any(dim=-1)].unique().tolist()
        raise ValueError(f"Expected every token with a coordinate to be one of `bins` but got token ids {strangers}")
    ids = bins[in_family.int().argmax(dim=-1)]  # (c, K)
    k = torch.arange(bins.shape[1], device=logits.device, dtype=log_probs.dtype)
    distance = (k - coordinates[rows, None].to(log_probs.dtype)) / sigma
    target_probs = (-0.5 * distance.square()).softmax(dim=-1)
    return plain.index_copy(0, rows, -(target_probs * log_probs[rows[:, None], ids]).sum(dim=-1))


def token_weights(
    owners: Tensor,
    num_trajectories: int,
    normalisation: Normalisation,
    constant: int | None = None,
    include: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Weights w_t and the local count, so that ``loss = sum of w_t * l_t / sum of counts``, over everything.

    ============  =====================  ====================  =========================================
    normalisation w_t                    count                 source
    ============  =====================  ====================  =========================================
    "sequence"    1 / length of owner    N                     GRPO, DeepSeekMath (arXiv 2402.03300) eq. 3
    "token"       1                      tokens with weight    DAPO (arXiv 2503.14476) eq. 8; SFT
    "constant"    1                      N * constant          Dr. GRPO (arXiv 2503.20783)
    ============  =====================  ====================  =========================================

    Trajectories that are empty or not included have no weight but stay in N, as in TRL's
    ``loss_type="grpo"`` and ``"dr_grpo"`` with ``mask_truncated_completions``. A trajectory that should count
    as never sampled (DAPO's filter of groups without variance) must not be in the batch at all.

    Args:
        owners: (T,) long, in [0, num_trajectories).
        num_trajectories: N, empty ones too.
        normalisation: see above.
        constant: the length that Dr. GRPO divides by, usually the limit of new tokens; only with "constant".
        include: (N,) bool, False for trajectories that shall not carry loss.

    Returns:
        weights: (T,) float32.
        count: of this micro-batch on this rank; may be 0.

    Raises:
        ValueError: wrong shape or type, an unknown normalisation, or a constant missing or out of place.
    """
    check_tensor("owners", owners, ("T",), "long")
    if normalisation not in ("sequence", "token", "constant"):
        raise ValueError(f"Expected `normalisation` to be sequence, token or constant but got {normalisation!r}")
    if (normalisation == "constant") != (constant is not None) or (constant is not None and constant < 1):
        raise ValueError(
            'Expected `constant` to be a positive integer with normalisation "constant", None with any other, '
            f"but got {constant} with {normalisation!r}"
        )
    weights = torch.ones(owners.shape[0], dtype=torch.float32, device=owners.device)
    if normalisation == "sequence":
        lengths = torch.zeros(num_trajectories, dtype=torch.float32, device=owners.device).index_add_(
            0, owners, weights
        )
        weights = 1 / lengths[owners]
    if include is not None:
        check_tensor("include", include, (num_trajectories,), "bool")
        weights = weights * include[owners]
    if normalisation == "token":
        return weights, float(weights.sum()) if include is not None else float(owners.shape[0])
    return weights, float(num_trajectories * (constant or 1))
