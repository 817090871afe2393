"""How far the policy is from another one, estimated from the tokens that were sampled."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from modules.functional.checks import check_tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """Estimates of KL(policy || reference), one for each token that the policy sampled.

    With ``d = log_probs - reference_log_probs``:

    =====  ===============  ============================================================================
    name   estimate         over tokens of the policy
    =====  ===============  ============================================================================
    "k1"   d                its mean is the divergence; of either sign
    "k2"   d^2 / 2          >= 0; its mean is near the divergence, its gradient's mean is the divergence's
    "k3"   exp(-d) + d - 1  >= 0; its mean is the divergence
    =====  ===============  ============================================================================

    Source: J. Schulman, "Approximating KL Divergence" (2020); what their gradients are: arXiv 2506.09477.

    Args:
        log_probs: (T,) float, the policy's.
        reference_log_probs: (T,) float.
        estimator: see above.

    Returns:
        (T,), with gradient in both.

    Raises:
        ValueError: wrong shape or type, or an unknown estimator.
    """
    check_tensor("log_probs", log_probs, ("T",), "float")
    check_tensor("reference_log_probs", reference_log_probs, tuple(log_probs.shape), "float")
    difference = log_probs - reference_log_probs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return (-difference).expm1() + difference
    raise ValueError(f"Expected `estimator` to be k1, k2 or k3 but got {estimator!r}")


def per_trajectory(values: Tensor, owners: Tensor, num_trajectories: int) -> Tensor:
    """Sums (N,) of values (T,) over the tokens of each trajectory; 0 for one without tokens.

    Raises:
        ValueError: wrong shape or type.
    """
    check_tensor("values", values, ("T",), "float")
    check_tensor("owners", owners, tuple(values.shape), "long")
    zeros = torch.zeros(num_trajectories, dtype=values.dtype, device=values.device)
    return zeros.index_add(0, owners, values)
