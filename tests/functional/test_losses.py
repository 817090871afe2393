"""Log-probabilities, cross-entropies and weights against hand-derived numbers and torch's own distributions."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy

from modules.functional.losses import (
    coordinate_cross_entropy,
    in_chunks,
    selected_log_probs,
    token_weights,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestSelectedLogProbs:
    targets = torch.tensor([0, 3, 3, 5])

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
    def test_equals_torch_distribution(self, temperature: float) -> None:
        logits = randn(4, 6)
        log_probs, entropy = selected_log_probs(logits, self.targets, temperature)
        expected = Categorical(logits=logits / temperature)
        torch.testing.assert_close(log_probs, expected.log_prob(self.targets))
        torch.testing.assert_close(entropy, expected.entropy())

    def test_banned_ids_leave_the_distribution(self) -> None:
        logits = randn(4, 6)
        banned = torch.tensor([False, True, False, False, True, False])
        log_probs, entropy = selected_log_probs(logits, self.targets, 1.3, banned)
        # the same four ids as a vocabulary of their own: 0, 2, 3, 5 -> 0, 1, 2, 3
        expected = Categorical(logits=logits[:, ~banned] / 1.3)
        torch.testing.assert_close(log_probs, expected.log_prob(torch.tensor([0, 2, 2, 3])))
        torch.testing.assert_close(entropy, expected.entropy())

    def test_banned_target_is_minus_infinity_and_spares_the_other_tokens(self) -> None:
        logits = randn(4, 6).requires_grad_()
        banned = torch.arange(6) == 5
        log_probs, _ = selected_log_probs(logits, self.targets, banned=banned)
        assert log_probs[3] == -math.inf
        assert log_probs[:3].isfinite().all()
        log_probs[:3].sum().backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        assert (logits.grad[:, 5] == 0).all()

    def test_half_precision_is_computed_in_float32(self) -> None:
        logits = randn(4, 6).to(torch.bfloat16)
        log_probs, entropy = selected_log_probs(logits, self.targets)
        assert log_probs.dtype == entropy.dtype == torch.float32
        torch.testing.assert_close(log_probs.double(), Categorical(logits=logits.double()).log_prob(self.targets))

    def test_the_entropy_carries_gradient_only_if_asked_to(self) -> None:
        log_probs, entropy = selected_log_probs(randn(4, 6).requires_grad_(), self.targets)
        assert log_probs.requires_grad
        assert not entropy.requires_grad
        assert selected_log_probs(randn(4, 6).requires_grad_(), self.targets, entropy_gradient=True)[1].requires_grad

    @pytest.mark.parametrize("ban", [False, True])
    def test_entropy_with_gradient(self, ban: bool) -> None:
        """Of its own definition: ``dH / d logit_k = -p_k (log p_k + H) / temperature``, none at a banned id."""
        logits = randn(4, 6).requires_grad_()
        banned = torch.arange(6) == 1 if ban else None
        _, metric = selected_log_probs(logits, self.targets, 0.7, banned)
        _, entropy = selected_log_probs(logits, self.targets, 0.7, banned, entropy_gradient=True)
        torch.testing.assert_close(entropy, metric)
        (gradient,) = torch.autograd.grad(entropy.sum(), logits)
        kept = logits.detach().masked_fill(torch.zeros(6) > 0 if banned is None else banned, -1e9)
        log_p = (kept / 0.7).log_softmax(dim=-1)
        p = log_p.exp()
        torch.testing.assert_close(gradient, torch.where(p > 0, -p * (log_p + metric[:, None]) / 0.7, 0.0))
        assert gradient.abs().max() > 0.05

    def test_entropy_of_near_certainty_is_finite(self) -> None:
        """A probability that is exactly 0 in float32."""
        logits = torch.tensor([[300.0, 0.0, 0.0, 0.0, 0.0, 0.0]]).requires_grad_()
        _, entropy = selected_log_probs(logits, self.targets[:1], entropy_gradient=True)
        entropy.sum().backward()
        assert entropy.item() == 0
        assert logits.grad is not None
        assert torch.equal(logits.grad, torch.zeros(1, 6))

    def test_gradcheck(self) -> None:
        banned = torch.arange(6) == 1
        assert torch.autograd.gradcheck(
            lambda logits: selected_log_probs(logits, self.targets, 0.7, banned)[0], randn(4, 6).requires_grad_()
        )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"logits": torch.zeros(4, 6, 1)}, r"`logits` to be a float tensor of shape \(T, V\)"),
            ({"logits": torch.zeros(4, 6, dtype=torch.long)}, "`logits` to be a float tensor"),
            ({"targets": torch.zeros(3, dtype=torch.long)}, r"`targets` to be a long tensor of shape \(4\)"),
            ({"targets": torch.zeros(4)}, "`targets` to be a long tensor"),
            ({"banned": torch.zeros(5, dtype=torch.bool)}, r"`banned` to be a bool tensor of shape \(6\)"),
            ({"temperature": 0.0}, "`temperature` to be positive but got 0.0"),
        ],
    )
    def test_errors(self, changes: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            selected_log_probs(**{"logits": torch.zeros(4, 6), "targets": self.targets, **changes})


class TestInChunks:
    def run(self, size: int, tokens: int = 7) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Log-probabilities and entropies in chunks, and gradients of hidden states and head."""
        hidden = randn(tokens, 3).requires_grad_()
        head = randn(3, 11, seed=1).requires_grad_()
        targets = torch.arange(tokens) % 11
        outputs = in_chunks(lambda h, t: selected_log_probs(h @ head, t), hidden, targets, size=size)
        (outputs[0] * randn(tokens, seed=2)).sum().backward()
        assert hidden.grad is not None
        assert head.grad is not None
        return outputs, hidden.grad, head.grad

    @pytest.mark.parametrize("size", [1, 3, 6])
    def test_values_and_gradients_equal_one_chunk(self, size: int) -> None:
        torch.testing.assert_close(self.run(size), self.run(7))

    def test_no_tokens(self) -> None:
        (log_probs, entropy), _, _ = self.run(size=3, tokens=0)
        assert log_probs.shape == entropy.shape == (0,)

    def test_logits_are_not_kept_for_backward(self) -> None:
        def kept(size: int) -> int:
            """Elements kept for the backward pass, of tensors as wide as the vocabulary."""
            sizes: list[int] = []

            def pack(tensor: Tensor) -> Tensor:
                sizes.append(tensor.numel() if tensor.shape[-1:] == (1000,) and tensor.dim() == 2 else 0)
                return tensor

            hidden = randn(20, 3).requires_grad_()
            head = randn(1000, 3, seed=1).requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                in_chunks(lambda h, t: selected_log_probs(h @ head.T, t), hidden, torch.arange(20), size=size)
            return sum(sizes)

        assert kept(size=20) >= 20 * 1000
        assert kept(size=4) == 0

    @pytest.mark.parametrize(("grad", "calls_forward", "calls_total"), [(True, 3, 6), (False, 3, 3)])
    def test_recomputes_only_for_gradients(self, grad: bool, calls_forward: int, calls_total: int) -> None:
        seen: list[int] = []

        def fn(hidden: Tensor) -> tuple[Tensor]:
            seen.append(len(hidden))
            return (hidden.exp().sum(dim=-1),)

        with torch.set_grad_enabled(grad):
            (output,) = in_chunks(fn, randn(7, 3).requires_grad_(), size=3)
        assert seen == [3, 3, 1]
        if grad:
            output.sum().backward()
        assert len(seen) == calls_total
        assert max(seen) == 3

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="`size` to be at least 1 but got 0"):
            in_chunks(lambda h: (h,), randn(7, 3), size=0)
        with pytest.raises(ValueError, match=r"`per_token\[1\]` to have 7 tokens but got shape \(6,\)"):
            in_chunks(lambda *x: x, randn(7, 3), torch.zeros(7), torch.zeros(6), size=2)
        with pytest.raises(ValueError, match="`hidden` to be a float tensor"):
            in_chunks(lambda h: (h,), randn(7), size=2)


class TestCoordinateCrossEntropy:
    # 12 ids; family 0 counts up through 2..5, family 1 down through 10..7: order is that of the bins
    bins = torch.tensor([[2, 3, 4, 5], [10, 9, 8, 7]])
    targets = torch.tensor([0, 3, 9, 11])
    coordinates = torch.tensor([math.nan, 1.3, 0.6, math.nan])

    def test_equals_the_definition_written_out(self) -> None:
        logits, sigma = randn(4, 12), 0.8
        probs = logits.softmax(dim=-1)
        expected = []
        for row, (family, c) in enumerate([(None, 0), (0, 1.3), (1, 0.6), (None, 0)]):
            if family is None:
                expected.append(-math.log(probs[row, self.targets[row]]))
                continue
            mass = [math.exp(-((k - c) ** 2) / (2 * sigma**2)) for k in range(4)]
            ids = self.bins[family].tolist()
            expected.append(-sum(m / sum(mass) * math.log(probs[row, i]) for m, i in zip(mass, ids, strict=True)))
        losses = coordinate_cross_entropy(logits, self.targets, self.coordinates, self.bins, sigma)
        torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)

    def test_without_coordinates_is_cross_entropy(self) -> None:
        logits = randn(4, 12)
        losses = coordinate_cross_entropy(logits, self.targets, torch.full((4,), math.nan), self.bins, 1.0)
        torch.testing.assert_close(losses, cross_entropy(logits, self.targets, reduction="none"))

    def test_becomes_cross_entropy_as_sigma_vanishes(self) -> None:
        logits = randn(4, 12)
        coordinates = torch.tensor([math.nan, 1.0, 1.0, math.nan])  # ids 3 and 9 are bin 1 of their families
        plain = cross_entropy(logits, self.targets, reduction="none")
        gaps = [
            (coordinate_cross_entropy(logits, self.targets, coordinates, self.bins, sigma) - plain).abs().max()
            for sigma in (1.0, 0.4, 0.1, 1e-3)
        ]
        assert gaps[0] > gaps[1] > gaps[2]
        assert gaps[2] < 1e-12  # exp(-1 / (2 * 0.1^2)) = 2e-22
        assert gaps[3] < 1e-12

    def test_gradient_is_softmax_minus_target(self) -> None:
        logits = randn(1, 12).requires_grad_()
        coordinate_cross_entropy(logits, torch.tensor([2]), torch.tensor([0.0]), self.bins, 1.0).sum().backward()
        mass = [1.0, math.exp(-0.5), math.exp(-2), math.exp(-4.5)]  # bins 0..3 of family 0 around 0, sigma 1
        expected = logits.detach().softmax(dim=-1)
        expected[0, 2:6] -= torch.tensor(mass, dtype=torch.float64) / sum(mass)
        torch.testing.assert_close(logits.grad, expected)

    def test_a_near_miss_costs_less_than_a_far_one(self) -> None:
        sure_of = 8.0 * torch.eye(12)[[3, 4, 5]]  # distance 0, 1, 2 from bin 1 of family 0
        losses = coordinate_cross_entropy(sure_of, torch.full((3,), 3), torch.ones(3), self.bins, 0.7)
        assert losses[0] < losses[1] < losses[2]

    def test_gradcheck(self) -> None:
        assert torch.autograd.gradcheck(
            lambda x: coordinate_cross_entropy(x, self.targets, self.coordinates.double(), self.bins, 0.8),
            randn(4, 12).requires_grad_(),
        )

    def test_errors(self) -> None:
        logits = randn(4, 12)
        with pytest.raises(ValueError, match=r"one of `bins` but got token ids \[0, 11\]"):
            coordinate_cross_entropy(logits, self.targets, torch.ones(4), self.bins, 1.0)
        with pytest.raises(ValueError, match=r"`sigma` to be positive but got 0\.0"):
            coordinate_cross_entropy(logits, self.targets, self.coordinates, self.bins, 0.0)
        with pytest.raises(ValueError, match=r"`bins` to be a long tensor of shape \(F, K\)"):
            coordinate_cross_entropy(logits, self.targets, self.coordinates, self.bins[0], 1.0)


class TestTokenWeights:
    owners = torch.tensor([0, 2, 2, 2, 0, 3])  # lengths 2, 0, 3, 1

    @pytest.mark.parametrize(
        ("normalisation", "constant", "weights", "count"),
        [
            ("sequence", None, [1 / 2, 1 / 3, 1 / 3, 1 / 3, 1 / 2, 1], 4),
            ("token", None, [1, 1, 1, 1, 1, 1], 6),
            ("constant", 10, [1, 1, 1, 1, 1, 1], 40),
        ],
    )
    def test_by_hand(self, normalisation: str, constant: int | None, weights: list[float], count: float) -> None:
        got, got_count = token_weights(self.owners, 4, normalisation, constant)
        torch.testing.assert_close(got, torch.tensor(weights, dtype=torch.float32))
        assert got_count == count

    @pytest.mark.parametrize(("normalisation", "constant", "count"), [("sequence", None, 4), ("token", None, 3)])
    def test_excluded_trajectories_have_no_weight(self, normalisation: str, constant: int | None, count: float) -> None:
        include = torch.tensor([True, True, False, True])
        everyone, _ = token_weights(self.owners, 4, normalisation, constant)
        weights, got_count = token_weights(self.owners, 4, normalisation, constant, include)
        torch.testing.assert_close(weights, everyone * (self.owners != 2))
        assert got_count == count

    def test_nothing_sampled(self) -> None:
        weights, count = token_weights(torch.zeros(0, dtype=torch.long), 2, "token")
        assert weights.shape == (0,)
        assert count == 0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((torch.zeros(3), 1, "token"), "`owners` to be a long tensor"),
            ((torch.zeros(3, dtype=torch.long), 1, "batch"), "`normalisation` to be .* but got 'batch'"),
            ((torch.zeros(3, dtype=torch.long), 1, "constant"), "`constant` to be a positive integer"),
            ((torch.zeros(3, dtype=torch.long), 1, "token", 5), "`constant` to be .* but got 5 with 'token'"),
            ((torch.zeros(3, dtype=torch.long), 1, "constant", 0), "`constant` to be .* but got 0"),
            ((torch.zeros(3, dtype=torch.long), 1, "token", None, torch.ones(2) > 0), r"`include` .* shape \(1\)"),
        ],
    )
    def test_errors(self, arguments: tuple, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            token_weights(*arguments)
