"""Estimates of the divergence against torch's own, over whole vocabularies."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from modules.functional.kl import kl_estimate, per_trajectory


def log_softmax(seed: int, scale: float = 1.0) -> Tensor:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * logits).log_softmax(dim=0)


@pytest.mark.parametrize(("estimator", "unbiased"), [("k1", True), ("k3", True), ("k2", False)])
def test_mean_over_the_policy(estimator: str, unbiased: bool) -> None:
    policy, reference = log_softmax(0), log_softmax(1)
    exact = kl_divergence(Categorical(logits=policy), Categorical(logits=reference))
    mean = (policy.exp() * kl_estimate(policy, reference, estimator)).sum()
    assert (abs(mean - exact) < 1e-12) == unbiased
    assert exact > 0.1


def test_k2_is_near_where_the_two_are() -> None:
    policy = log_softmax(0, 0.1)
    reference = log_softmax(1, 0.1)
    exact = kl_divergence(Categorical(logits=policy), Categorical(logits=reference))
    assert (policy.exp() * kl_estimate(policy, reference, "k2")).sum() == pytest.approx(exact.item(), rel=0.1)


def test_signs() -> None:
    policy, reference = log_softmax(0), log_softmax(1)
    assert (kl_estimate(policy, reference, "k1") < 0).any()
    for estimator in ("k2", "k3"):
        assert (kl_estimate(policy, reference, estimator) >= 0).all()
        assert torch.equal(kl_estimate(policy, policy, estimator), torch.zeros(9, dtype=torch.float64))


def test_k3_keeps_small_differences_in_single_precision() -> None:
    """exp(-d) - 1 + d would be rounding alone."""
    policy = torch.tensor([-1.0])
    assert kl_estimate(policy, policy - 2**-12).item() == pytest.approx(2**-25, rel=1e-2)


def test_sums_of_trajectories() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert per_trajectory(values, torch.tensor([3, 0, 3, 1]), 4).tolist() == [2, 4, 0, 4]
    assert per_trajectory(values[:0], torch.zeros(0, dtype=torch.long), 2).tolist() == [0, 0]


def test_errors() -> None:
    with pytest.raises(ValueError, match="`estimator` to be k1, k2 or k3 but got 'k4'"):
        kl_estimate(torch.zeros(2), torch.zeros(2), "k4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`reference_log_probs` to be a float tensor of shape \(2\)"):
        kl_estimate(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="`owners` to be a long tensor"):
        per_trajectory(torch.zeros(2), torch.zeros(2), 1)
