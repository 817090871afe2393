"""Losses against hand-derived numbers, torch's own distributions, and the invariances that they promise."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import cross_entropy

from modules.functional.losses import (
    coordinate_cross_entropy,
    in_chunks,
    rgrpo_loss,
    selected_log_probs,
    token_weights,
)

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
NORMALISATIONS = [("sequence", None), ("token", None), ("constant", 7)]


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

    def test_only_the_log_probs_carry_gradient(self) -> None:
        log_probs, entropy = selected_log_probs(randn(4, 6).requires_grad_(), self.targets)
        assert log_probs.requires_grad
        assert not entropy.requires_grad

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


def step_loss(index: Tensor, owners: Tensor, n: int, normalisation: str, constant: int | None) -> tuple[Tensor, float]:
    """(sum, count) of the R-GRPO loss over the tokens ``index`` of a step of 40, owned by ``owners`` of n."""
    policy, sampler, reference = (randn(40, seed=s)[index] / 4 for s in range(3))
    weights, count = token_weights(owners, n, normalisation, constant)
    loss, _ = rgrpo_loss(
        policy, sampler, randn(40, seed=3)[index], weights, **CLIP, beta=0.04, reference_log_probs=reference
    )
    return loss, count


@pytest.mark.parametrize(("normalisation", "constant"), NORMALISATIONS)
class TestInvariance:
    owners = torch.cat([torch.full((length,), i) for i, length in enumerate([3, 9, 0, 14, 1, 13])])

    def test_order_of_tokens_and_trajectories(self, normalisation: str, constant: int | None) -> None:
        whole = step_loss(torch.arange(40), self.owners, 6, normalisation, constant)
        shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0))
        renamed = torch.tensor([4, 0, 3, 5, 1, 2])
        other = step_loss(shuffled, renamed[self.owners[shuffled]], 6, normalisation, constant)
        torch.testing.assert_close(other, whole)

    def test_micro_batches(self, normalisation: str, constant: int | None) -> None:
        total, count = step_loss(torch.arange(40), self.owners, 6, normalisation, constant)
        parts = []
        for first, stop in [(0, 2), (2, 3), (3, 6)]:  # the middle one has a trajectory but no token
            index = ((self.owners >= first) & (self.owners < stop)).nonzero().squeeze(1)
            parts.append(step_loss(index, self.owners[index] - first, stop - first, normalisation, constant))
        torch.testing.assert_close(sum(loss for loss, _ in parts) / sum(n for _, n in parts), total / count)


class TestRGRPOLoss:
    def corner_cases(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log_probs, sampler_log_probs, advantages, weights for ratios on all sides of both clips."""
        ratio = torch.tensor([0.5, 0.5, 1.0, 1.5, 1.5, 1.2], dtype=torch.float64)
        advantages = torch.tensor([2.0, -2.0, 3.0, 2.0, -2.0, 1.0], dtype=torch.float64)
        weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.5], dtype=torch.float64)
        sampler = torch.full((6,), -3.0, dtype=torch.float64)
        return (sampler + ratio.log()).requires_grad_(), sampler, advantages, weights

    def test_by_hand(self) -> None:
        loss, metrics = rgrpo_loss(*self.corner_cases(), **CLIP)
        # min(r A, clip(r) A), in order: .5*2; .8*-2 (clipped); 1*3; 1.28*2 (clipped); 1.5*-2; half of 1.2*1
        assert loss.item() == pytest.approx(-(1.0 - 1.6 + 3.0 + 2.56 - 3.0 + 0.6))
        assert metrics["ratio"].item() == pytest.approx(6.2)
        assert metrics["clip_low"].item() == 1
        assert metrics["clip_high"].item() == 1
        # r - 1 - ln r, with ln .5 twice, ln 1.5 twice, ln 1.2
        expected = (6.2 - 6) - (2 * math.log(0.5) + 2 * math.log(1.5) + math.log(1.2))
        assert metrics["sampler_kl"].item() == pytest.approx(expected)
        assert set(metrics) == {"ratio", "clip_low", "clip_high", "sampler_kl"}
        assert not any(value.requires_grad for value in metrics.values())

    def test_gradient_by_hand(self) -> None:
        log_probs, *others = self.corner_cases()
        rgrpo_loss(log_probs, *others, **CLIP)[0].backward()
        # d(-r A)/d log p = -r A where it is not clipped, 0 where it is, times the weight
        expected = torch.tensor([-1.0, 0.0, -3.0, 0.0, 3.0, -0.6], dtype=torch.float64)
        torch.testing.assert_close(log_probs.grad, expected)

    def test_bounds_can_be_turned_off(self) -> None:
        loss, metrics = rgrpo_loss(*self.corner_cases(), clip_low=1.0, clip_high=math.inf)
        assert loss.item() == pytest.approx(-(1.0 - 1.0 + 3.0 + 3.0 - 3.0 + 0.6))
        assert metrics["clip_low"].item() == metrics["clip_high"].item() == 0

    def test_ratio_to_the_reference(self) -> None:
        log_probs, sampler, advantages, weights = self.corner_cases()
        reference = sampler + randn(6)
        loss, metrics = rgrpo_loss(
            log_probs, sampler, advantages, weights, **CLIP, reference_log_probs=reference, ratio_to="reference"
        )
        as_sampler, as_sampler_metrics = rgrpo_loss(log_probs, reference, advantages, weights, **CLIP)
        torch.testing.assert_close(loss, as_sampler)
        torch.testing.assert_close(metrics["ratio"], as_sampler_metrics["ratio"])
        # the drift from the sampler is measured all the same
        torch.testing.assert_close(
            metrics["sampler_kl"], rgrpo_loss(log_probs, sampler, advantages, weights, **CLIP)[1]["sampler_kl"]
        )

    def test_penalty_is_beta_times_weighted_kl(self) -> None:
        log_probs, sampler, _, _ = self.corner_cases()
        ones, zeros = torch.ones_like(sampler), torch.zeros_like(sampler)
        reference = sampler + randn(6)
        loss, metrics = rgrpo_loss(log_probs, sampler, zeros, ones, **CLIP, beta=0.3, reference_log_probs=reference)
        torch.testing.assert_close(loss, 0.3 * metrics["kl"])
        unpenalised, unpenalised_metrics = rgrpo_loss(
            log_probs, sampler, zeros, ones, **CLIP, reference_log_probs=reference
        )
        assert unpenalised.item() == 0
        torch.testing.assert_close(unpenalised_metrics["kl"], metrics["kl"])

    def test_kl_metrics_estimate_what_they_are_called(self) -> None:
        policy, sampler, reference = (randn(9, seed=s).log_softmax(dim=0) for s in range(3))

        def expectation(under: Tensor, name: str) -> Tensor:
            """Of the estimate for one token, over the whole vocabulary."""
            one = torch.ones(1, dtype=torch.float64)
            estimates = [
                rgrpo_loss(policy[[i]], sampler[[i]], one, one, **CLIP, reference_log_probs=reference[[i]])[1][name]
                for i in range(9)
            ]
            return (under.exp() * torch.stack(estimates)).sum()

        def exact(p: Tensor, q: Tensor) -> Tensor:
            return kl_divergence(Categorical(logits=p), Categorical(logits=q))

        torch.testing.assert_close(expectation(policy, "kl"), exact(policy, reference))
        torch.testing.assert_close(expectation(sampler, "sampler_kl"), exact(sampler, policy))

    def test_unbiased_kl_has_the_gradient_of_the_kl(self) -> None:
        """Expected over the sampler's whole vocabulary, the penalty's gradient; and that the plain k3 has another."""
        sampler, reference = (randn(9, seed=s).log_softmax(dim=0) for s in (1, 2))
        logits = randn(9).requires_grad_()
        kl = kl_divergence(Categorical(logits=logits), Categorical(logits=reference))
        (exact,) = torch.autograd.grad(kl, logits)

        def gradient(unbiased_kl: bool) -> Tensor:
            expected_penalty, _ = rgrpo_loss(
                logits.log_softmax(dim=0),
                sampler,
                torch.zeros_like(sampler),
                sampler.exp(),
                **CLIP,
                beta=1.0,
                unbiased_kl=unbiased_kl,
                reference_log_probs=reference,
            )
            return torch.autograd.grad(expected_penalty, logits)[0]

        torch.testing.assert_close(gradient(unbiased_kl=True), exact)
        assert (gradient(unbiased_kl=False) - exact).abs().max() > 0.01

    @pytest.mark.parametrize("ratio_to", ["sampler", "reference"])
    def test_gradcheck(self, ratio_to: str) -> None:
        sampler, reference, advantages, weights = (randn(8, seed=s) for s in range(1, 5))

        def loss(log_probs: Tensor) -> Tensor:
            return rgrpo_loss(
                log_probs,
                sampler,
                advantages,
                weights.abs(),
                **CLIP,
                beta=0.04,
                reference_log_probs=reference,
                ratio_to=ratio_to,
            )[0]

        assert torch.autograd.gradcheck(loss, randn(8).requires_grad_())

    def test_no_tokens_still_reach_the_policy(self) -> None:
        empty = torch.zeros(0)
        log_probs = torch.zeros(0, requires_grad=True)
        loss, _ = rgrpo_loss(log_probs, empty, empty, empty, **CLIP)
        loss.backward()  # a rank without tokens has to take part in the step
        assert loss.item() == 0

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"log_probs": torch.zeros(2, 3)}, r"`log_probs` to be a float tensor of shape \(T\) but got .*\(2, 3\)"),
            ({"sampler_log_probs": torch.zeros(2)}, r"`sampler_log_probs` .* shape \(3\) but got .*\(2,\)"),
            ({"advantages": torch.zeros(3, dtype=torch.long)}, "`advantages` to be a float tensor"),
            ({"weights": torch.ones(3, 1)}, r"`weights` .* but got .*\(3, 1\)"),
            ({"reference_log_probs": torch.zeros(1)}, "`reference_log_probs` to be a float tensor"),
            ({"beta": 0.1}, "`reference_log_probs` to be given with beta=0.1"),
            ({"ratio_to": "reference"}, "`reference_log_probs` to be given with .*ratio_to='reference'"),
            ({"ratio_to": "other"}, "`ratio_to` to be sampler or reference but got 'other'"),
            ({"clip_low": -0.1}, "`clip_low` to be at least 0 but got -0.1"),
            ({"beta": -1.0}, "`beta` to be at least 0 but got -1.0"),
        ],
    )
    def test_errors(self, changes: dict, message: str) -> None:
        names = ("log_probs", "sampler_log_probs", "advantages", "weights")
        with pytest.raises(ValueError, match=message):
            rgrpo_loss(**{**{name: torch.zeros(3) for name in names}, **CLIP, **changes})


def test_policy_gradient_ascends_reward() -> None:
    """The sign: a step against the gradient makes the rewarded token likelier, through all the functions."""
    logits = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    targets, owners = torch.tensor([0, 1]), torch.tensor([0, 1])
    log_probs: Callable[[], Tensor] = lambda: selected_log_probs(logits, targets)[0]  # noqa: E731
    weights, count = token_weights(owners, 2, "sequence")
    before = log_probs()
    loss, _ = rgrpo_loss(before, before.detach(), torch.tensor([1.0, -1.0]), weights, **CLIP)
    (loss / count).backward()
    with torch.no_grad():
        logits -= logits.grad
    assert log_probs()[0] > before[0]
    assert log_probs()[1] < before[1]
