"""Losses over flat sampled tokens: supervised, grounding, and R-GRPO.

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

Normalisation = Literal["sequence", "token", "constant"]
RatioTo = Literal["sampler", "reference"]


def selected_log_probs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, banned: Tensor | None = None
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

    Returns:
        log_probs: (T,), with gradient; -inf where the target itself is banned (looking for that
            here would cost a synchronisation a chunk).
        entropy: (T,) in nats, a metric without gradient.

    Raises:
        ValueError: wrong shape or type, or a temperature that is not positive.
    """
    _check("logits", logits, ("T", "V"), "float")
    _check("targets", targets, (logits.shape[0],), "long")
    if not temperature > 0:
        raise ValueError(f"Expected `temperature` to be positive but got {temperature}")
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if banned is not None:
        _check("banned", banned, (logits.shape[1],), "bool")
        scaled = scaled.masked_fill(banned, -torch.inf)
    all_log_probs = scaled.log_softmax(dim=-1)
    with torch.no_grad():
        # entr(p) = -p log p with entr(0) = 0, where p * log_p would be 0 * -inf
        entropy = torch.special.entr(all_log_probs.exp()).sum(dim=-1)
    return all_log_probs.gather(1, targets[:, None]).squeeze(1), entropy


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
    _check("hidden", hidden, ("T", "D"), "float")
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
    _check("logits", logits, ("T", "V"), "float")
    _check("targets", targets, (logits.shape[0],), "long")
    _check("coordinates", coordinates, (logits.shape[0],), "float")
    _check("bins", bins, ("F", "K"), "long")
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
    _check("owners", owners, ("T",), "long")
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
        _check("include", include, (num_trajectories,), "bool")
        weights = weights * include[owners]
    if normalisation == "token":
        return weights, float(weights.sum()) if include is not None else float(owners.shape[0])
    return weights, float(num_trajectories * (constant or 1))


def rgrpo_loss(
    log_probs: Tensor,
    sampler_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    beta: float = 0.0,
    unbiased_kl: bool = False,
    reference_log_probs: Tensor | None = None,
    ratio_to: RatioTo = "sampler",
) -> tuple[Tensor, dict[str, Tensor]]:
    """R-GRPO: the clipped policy gradient over tokens that the policy wrote, with a KL penalty.

    ``sum_t w_t * (-min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t) + beta * k3_t)`` where
    ``r_t = exp(log_probs - denominator)`` and ``k3_t = exp(ref - log_probs) - (ref - log_probs) - 1``, the unbiased,
    non-negative estimate of KL(policy || reference).

    The denominator is the sampler (PPO, arXiv 1707.06347; bounds apart as in DAPO, arXiv 2503.14476; KL
    term of DeepSeekMath, arXiv 2402.03300, eq. 4) or, with ``ratio_to="reference"``, the reference, as the
    objective of VLM-R3 (arXiv 2505.16192) is written. That one is not clipped: ``clip_low=1, clip_high=inf``.

    Args:
        log_probs: (T,) float, the policy's; the only input with gradient.
        sampler_log_probs: (T,) float, of the distribution that the tokens were drawn from.
        advantages: (T,) float, of each token's trajectory.
        weights: (T,) float, from `token_weights`.
        clip_low: how far the ratio may fall below 1; 1 turns that side off.
        clip_high: how far the ratio may rise above 1; inf turns that side off.
        beta: weight of the KL penalty.
        unbiased_kl: multiply k3 by the policy's ratio over the sampler, with its gradient. Only then is the gradient
            that of KL(policy || reference) (DeepSeek-V3.2, arXiv 2512.02556; TRL's default); without, even on
            policy, it is the one that DeepSeekMath wrote down.
        reference_log_probs: (T,) float; needed if beta > 0 or ``ratio_to="reference"``.
        ratio_to: whose log-probabilities are the ratio's denominator.

    Returns:
        loss: weighted sum, a scalar with gradient.
        metrics: sums over all T tokens, without weights and gradient, to be divided by the number of tokens:
            "ratio"; "clip_low" and "clip_high", tokens whose gradient the clip removed on that side (so
            only A < 0 below and only A > 0 above); "sampler_kl", k3 estimate of KL(sampler || policy): drift of the
            policy and numerical mismatch alike; and, if there is a reference, "kl", k3 as above.

    Raises:
        ValueError: wrong shape or type, a negative bound or beta, or a reference that is needed and missing.
    """
    _check("log_probs", log_probs, ("T",), "float")
    given = {"sampler_log_probs": sampler_log_probs, "advantages": advantages, "weights": weights}
    if reference_log_probs is not None:
        given["reference_log_probs"] = reference_log_probs
    elif beta > 0 or ratio_to == "reference":
        raise ValueError(
            f"Expected `reference_log_probs` to be given with beta={beta} and ratio_to={ratio_to!r} but got None"
        )
    for name, tensor in given.items():
        _check(name, tensor, tuple(log_probs.shape), "float")
    if ratio_to not in ("sampler", "reference"):
        raise ValueError(f"Expected `ratio_to` to be sampler or reference but got {ratio_to!r}")
    for name, value in {"clip_low": clip_low, "clip_high": clip_high, "beta": beta}.items():
        if not value >= 0:
            raise ValueError(f"Expected `{name}` to be at least 0 but got {value}")

    denominator = sampler_log_probs if ratio_to == "sampler" or reference_log_probs is None else reference_log_probs
    ratio = (log_probs - denominator).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    metrics = {
        "ratio": ratio.detach().sum(),
        "clip_low": ((ratio < 1 - clip_low) & (advantages < 0)).sum().to(ratio.dtype),
        "clip_high": ((ratio > 1 + clip_high) & (advantages > 0)).sum().to(ratio.dtype),
        "sampler_kl": _k3(log_probs.detach() - sampler_log_probs).sum(),
    }
    if reference_log_probs is not None:
        kl = _k3(reference_log_probs - log_probs)
        metrics["kl"] = kl.detach().sum()
        if beta > 0:  # beta * kl would otherwise turn an infinite kl into NaN
            loss = loss + beta * (kl * (log_probs - sampler_log_probs).exp() if unbiased_kl else kl)
    return (weights * loss).sum(), metrics


def _k3(log_ratio: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(q || p) from samples of q and ``log_ratio = log p - log q``; >= 0."""
    return log_ratio.expm1() - log_ratio


def _check(name: str, tensor: Tensor, shape: tuple[int | str, ...], kind: Literal["float", "long", "bool"]) -> None:
    """Raise ValueError unless ``tensor`` has that type and shape; a letter stands for any size."""
    of_kind = tensor.is_floating_point() if kind == "float" else tensor.dtype == getattr(torch, kind)
    of_shape = tensor.dim() == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not (of_kind and of_shape):
        wanted = ", ".join(map(str, shape))
        raise ValueError(
            f"Expected `{name}` to be a {kind} tensor of shape ({wanted}) but got {tensor.dtype} "
            f"of shape {tuple(tensor.shape)}"
        )
