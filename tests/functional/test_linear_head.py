"""The head in chunks against logits that are computed whole, by autograd and by finite differences."""

import pytest
import torch
from torch import Tensor

from modules.functional.linear_head import linear_log_probs, linear_loss
from modules.functional.losses import selected_log_probs

BANNED = torch.isin(torch.arange(11), torch.tensor([0, 10]))
TARGETS = torch.tensor([1, 9, 3, 3, 5])


def inputs(bias: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = [(5, 4), (11, 4), *([(11,)] if bias else [])]
    return [torch.randn(*s, generator=random, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize("exploring", [False, True])
def test_values_and_gradients_are_those_of_whole_logits(
    bias: bool, temperature: float, size: int, exploring: bool
) -> None:
    tensors = inputs(bias)
    hidden, weight, b = (*tensors, None)[:3]
    logits = torch.nn.functional.linear(hidden, weight, b)
    expected = selected_log_probs(logits, TARGETS, temperature, BANNED, entropy_gradient=True)
    found = linear_log_probs(hidden, weight, b, TARGETS, temperature, BANNED, size)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    factors = torch.linspace(-1, 2, 5, dtype=torch.float64)

    def gradients(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        loss = (factors * pair[0].exp()).sum() + (3.0 * (factors * pair[1]).sum() if exploring else 0.0)
        return torch.autograd.grad(loss, tensors)

    for mine, theirs in zip(gradients(found), gradients(expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
        assert mine.abs().max() > 1e-2


def test_gradcheck() -> None:
    tensors = inputs(bias=True)

    def both(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return linear_log_probs(hidden, weight, bias, TARGETS, 1.3, BANNED, 2)

    assert torch.autograd.gradcheck(both, tensors)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize("exploring", [False, True])
def test_a_loss_has_the_gradient_of_whole_logits_in_one_pass(
    bias: bool, temperature: float, size: int, exploring: bool
) -> None:
    tensors = inputs(bias)
    hidden, weight, b = (*tensors, None)[:3]
    factors = torch.linspace(-1, 2, 5, dtype=torch.float64)
    seen: list[slice] = []

    def terms(log_probs: Tensor, entropy: Tensor, own: slice) -> Tensor:
        seen.append(own)
        clipped = log_probs.exp().clamp(max=0.2)  # no gradient above: a weight that only the loss knows
        return (factors[own] * clipped).sum() + (3.0 * (factors[own] * entropy).sum() if exploring else 0.0)

    logits = torch.nn.functional.linear(hidden, weight, b)
    expected = selected_log_probs(logits, TARGETS, temperature, BANNED, entropy_gradient=True)
    loss = terms(*expected, slice(0, 5))
    seen.clear()
    found, log_probs, entropy = linear_loss(hidden, weight, b, TARGETS, temperature, BANNED, size, terms)
    assert seen == [slice(k, min(k + size, 5)) for k in range(0, 5, size)]
    torch.testing.assert_close(found, loss, rtol=0, atol=1e-12)
    torch.testing.assert_close((log_probs, entropy), tuple(x.detach() for x in expected), rtol=0, atol=1e-12)
    assert not log_probs.requires_grad
    mine, theirs = torch.autograd.grad(0.3 * found, tensors), torch.autograd.grad(0.3 * loss, tensors)
    for a, e in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12)
        assert a.abs().max() > 1e-3


def test_a_loss_is_differentiated_once() -> None:
    hidden, weight = inputs(bias=False)
    loss, _, _ = linear_loss(hidden, weight, None, TARGETS, 1.0, BANNED, 2, lambda log_probs, *_: log_probs.sum())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_a_banned_target_has_no_probability() -> None:
    hidden, weight = inputs(bias=False)
    log_probs, entropy = linear_log_probs(hidden, weight, None, torch.tensor([1, 0, 3, 3, 5]), 1.0, BANNED, 2)
    assert log_probs.isneginf().tolist() == [False, True, False, False, False]
    assert bool(entropy.isfinite().all())


def test_half_precision_is_normalised_in_float32() -> None:
    hidden, weight = inputs(bias=False, dtype=torch.bfloat16)
    log_probs, entropy = linear_log_probs(hidden, weight, None, TARGETS, 1.0, BANNED, 2)
    assert log_probs.dtype == entropy.dtype == torch.float32
    expected, _ = selected_log_probs(hidden @ weight.T, TARGETS, 1.0, BANNED)
    torch.testing.assert_close(log_probs, expected)
    log_probs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16


def test_a_frozen_head_has_no_gradient() -> None:
    hidden, weight = inputs(bias=False)
    weight.requires_grad_(False)
    linear_log_probs(hidden, weight, None, TARGETS, 1.0, BANNED, 2)[0].sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_bad_arguments_are_named() -> None:
    hidden, weight = inputs(bias=False)
    for name, value in {"temperature": 0.0, "size": 0}.items():
        options = {"temperature": 1.0, "size": 2} | {name: value}
        with pytest.raises(ValueError, match=name):
            linear_log_probs(hidden, weight, None, TARGETS, banned=BANNED, **options)
    with pytest.raises(ValueError, match="banned"):
        linear_log_probs(hidden, weight, None, TARGETS, 1.0, BANNED[:-1], 2)
