"""The R-GRPO loss over flat sampled tokens; see `modules.functional.losses` for the conventions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from modules.functional.checks import check_tensor
from modules.functional.kl import KLEstimator, kl_estimate, per_trajectory

RatioTo = Literal["sampler", "reference"]
RatioLevel = Literal["token", "sequence"]


def importance_ratio(
    log_probs: Tensor, denominator: Tensor, owners: Tensor, num_trajectories: int, level: RatioLevel
) -> Tensor:
    """How much likelier the policy is to write what was sampled than the distribution ``denominator`` is of.

    "token": ``r_t = exp(log_probs_t - denominator_t)`` (PPO, arXiv 1707.06347). "sequence": for every token of
    trajectory i the geometric mean ``r_i = exp(mean over its sampled tokens of log_probs - denominator)`` (GSPO, arXiv
    2507.18071, eq. 7). What the environment wrote is in neither.

    Args:
        log_probs: (T,) float, the policy's.
        denominator: (T,) float.
        owners: (T,) long, in [0, num_trajectories).
        num_trajectories: N.
        level: see above.

    Returns:
        (T,), with gradient.

    Raises:
        ValueError: wrong shape or type, or an unknown level.
    """
    check_tensor("owners", owners, tuple(log_probs.shape), "long")
    difference = log_probs - denominator
    if level == "token":
        return difference.exp()
    if level == "sequence":
        lengths = per_trajectory(torch.ones_like(difference), owners, num_trajectories)
        return (per_trajectory(difference, owners, num_trajectories) / lengths.clamp(min=1)).exp()[owners]
    raise ValueError(f"Expected `ratio_level` to be token or sequence but got {level!r}")


def rgrpo_loss(
    log_probs: Tensor,
    sampler_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    owners: Tensor,
    num_trajectories: int,
    *,
    clip_low: float,
    clip_high: float,
    ratio_to: RatioTo = "sampler",
    ratio_level: RatioLevel = "token",
    beta: float = 0.0,
    kl: KLEstimator = "k3",
    unbiased_kl: bool = False,
    reference_log_probs: Tensor | None = None,
    correction_cap: float | None = None,
    learner_log_probs: Tensor | None = None,
    entropy_bonus: float = 0.0,
    entropy: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """R-GRPO: the clipped policy gradient over tokens that the policy wrote.

    ``sum_t w_t * (-c_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t) + beta * kl_t - entropy_bonus * H_t)``

    - r_t is the `importance_ratio` over the sampler (PPO, arXiv 1707.06347; bounds apart as in DAPO, arXiv 2503.14476)
      or, with ``ratio_to="reference"``, over the reference, as the objective of VLM-R3 (arXiv 2505.16192) is written.
      That one is not clipped: ``clip_low=1, clip_high=inf``.
    - kl_t is a `kl_estimate` of KL(policy || reference) (GRPO: DeepSeekMath, arXiv 2402.03300, eq. 4).
    - c_t is 1, or with a ``correction_cap`` C the truncated importance weight ``min(exp(learner_t - sampler_t), C)``, a
      constant; r_t is then over the learner. It corrects for a sampler that computes otherwise than the
      learner does, or with older weights (F. Yao et al., "Your Efficient RL Framework Secretly Brings You
      Off-Policy RL Training", 2025; truncation: Ionides, 2008).
    - H_t is the entropy of the distribution that the token was drawn from (A3C, arXiv 1602.01783, section 4).

    Args:
        log_probs: (T,) float, the policy's, with gradient.
        sampler_log_probs: (T,) float, as the sampler computed them.
        advantages: (T,) float, of each token.
        weights: (T,) float, from `token_weights`.
        owners: (T,) long, the trajectory of each token.
        num_trajectories: N.
        clip_low: how far the ratio may fall below 1; 1 turns that side off.
        clip_high: how far the ratio may rise above 1; inf turns that side off.
        ratio_to: whose log-probabilities are the ratio's denominator.
        ratio_level: the ratio is a token's own, or one for all tokens of a trajectory.
        beta: weight of the KL penalty.
        kl: its estimator.
        unbiased_kl: multiply the estimate by the token's ratio over the sampler, with its gradient. Only then is the
            gradient of k1 and k3 that of KL(policy || reference) (DeepSeek-V3.2, arXiv 2512.02556; TRL's
            default); without, even on policy, k3's is the one that DeepSeekMath wrote down.
        reference_log_probs: (T,) float; needed if beta > 0 or ``ratio_to="reference"``.
        correction_cap: C, > 0; None: c_t is 1.
        learner_log_probs: (T,) float, the learner's before the first step on these tokens; None: this is that step, and
            they are ``log_probs``. Only with ``correction_cap``.
        entropy_bonus: weight of the entropy.
        entropy: (T,) float, with gradient; needed if ``entropy_bonus`` > 0.

    Returns:
        loss: weighted sum, a scalar with gradient.
        metrics: sums over all T tokens, without weights and gradient, to be divided by the number of tokens:
            "ratio"; "clip_low" and "clip_high", tokens whose gradient the clip removed on that side (so
            only A < 0 below and only A > 0 above); "sampler_kl", k3 estimate of KL(sampler || policy): drift of the
            policy and numerical mismatch alike; if there is a reference, "kl", as above; with a cap,
            "sampler_correction", c_t, and "sampler_correction_capped", tokens at which it is C.

    Raises:
        ValueError: wrong shape or type, a value out of range, or a tensor that is needed and missing.
    """
    check_tensor("log_probs", log_probs, ("T",), "float")
    given = {"sampler_log_probs": sampler_log_probs, "advantages": advantages, "weights": weights}
    optional = {"reference_log_probs": reference_log_probs, "learner_log_probs": learner_log_probs, "entropy": entropy}
    given |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    for name, tensor in given.items():
        check_tensor(name, tensor, tuple(log_probs.shape), "float")
    for name, value in {"clip_low": clip_low, "clip_high": clip_high, "beta": beta}.items():
        if not value >= 0:
            raise ValueError(f"Expected `{name}` to be at least 0 but got {value}")

    if ratio_to not in ("sampler", "reference"):
        raise ValueError(f"Expected `ratio_to` to be sampler or reference but got {ratio_to!r}")
    if ratio_to == "reference" and correction_cap is not None:
        raise ValueError("Expected `correction_cap` with ratio_to='sampler' only but got it with 'reference'")
    correction, denominator = _correction(log_probs, sampler_log_probs, learner_log_probs, correction_cap)
    if ratio_to == "reference":
        denominator = _needed(reference_log_probs, "reference_log_probs", "ratio_to='reference'")
    ratio = importance_ratio(log_probs, denominator, owners, num_trajectories, ratio_level)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    metrics = {
        "ratio": ratio.detach().sum(),
        "clip_low": ((ratio < 1 - clip_low) & (advantages < 0)).sum().to(ratio.dtype),
        "clip_high": ((ratio > 1 + clip_high) & (advantages > 0)).sum().to(ratio.dtype),
        "sampler_kl": kl_estimate(sampler_log_probs, log_probs.detach()).sum(),
    }
    if correction is not None and correction_cap is not None:
        loss = correction * loss
        metrics["sampler_correction"] = correction.sum()
        metrics["sampler_correction_capped"] = correction.eq(correction_cap).sum().to(ratio.dtype)
    if reference_log_probs is not None:
        penalty = kl_estimate(log_probs, reference_log_probs, kl)
        metrics["kl"] = penalty.detach().sum()
    if beta > 0:  # beta * kl would otherwise turn an infinite kl into NaN
        _needed(reference_log_probs, "reference_log_probs", f"beta={beta}")
        loss = loss + beta * (penalty * (log_probs - sampler_log_probs).exp() if unbiased_kl else penalty)
    if entropy_bonus:
        loss = loss - entropy_bonus * _needed(entropy, "entropy", f"entropy_bonus={entropy_bonus}")
    return (weights * loss).sum(), metrics


def _correction(
    log_probs: Tensor, sampler_log_probs: Tensor, learner_log_probs: Tensor | None, cap: float | None
) -> tuple[Tensor | None, Tensor]:
    """c_t, and what the ratio is over."""
    if cap is None:
        if learner_log_probs is not None:
            raise ValueError("Expected `learner_log_probs` with `correction_cap` only, but the cap is None")
        return None, sampler_log_probs
    if not cap > 0:
        raise ValueError(f"Expected `correction_cap` to be above 0 but got {cap}")
    learner = (log_probs if learner_log_probs is None else learner_log_probs).detach()
    return (learner - sampler_log_probs).exp().clamp(max=cap), learner


def _needed(tensor: Tensor | None, name: str, setting: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"Expected `{name}` to be given with {setting} but got None")
    return tensor
