"""The R-GRPO loss against hand-derived numbers, closed forms, and the invariances that it promises."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from modules.functional.losses import selected_log_probs, token_weights
from modules.functional.policy_gradient import importance_ratio, rgrpo_loss

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
NORMALISATIONS = [("sequence", None), ("token", None), ("constant", 7)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def without(options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


def alone(*tensors: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss where every token is a trajectory of its own."""
    count = len(tensors[0])
    return rgrpo_loss(*tensors, torch.arange(count), count, **options)  # type: ignore[misc]


def step_loss(
    index: Tensor, owners: Tensor, n: int, normalisation: str, constant: int | None, **options: Any
) -> tuple[Tensor, float]:
    """(sum, count) of the R-GRPO loss over the tokens ``index`` of a step of 40, owned by ``owners`` of n."""
    policy, sampler, reference = (randn(40, seed=s)[index] / 4 for s in range(3))
    weights, count = token_weights(owners, n, normalisation, constant)
    loss, _ = rgrpo_loss(
        policy,
        sampler,
        randn(40, seed=3)[index],
        weights,
        owners,
        n,
        **CLIP,
        beta=0.04,
        reference_log_probs=reference,
        **options,
    )
    return loss, count


@pytest.mark.parametrize("options", [{}, {"ratio_level": "sequence"}, {"correction_cap": 1.1}])
@pytest.mark.parametrize(("normalisation", "constant"), NORMALISATIONS)
class TestInvariance:
    owners = torch.cat([torch.full((length,), i) for i, length in enumerate([3, 9, 0, 14, 1, 13])])

    def test_order_of_tokens_and_trajectories(
        self, normalisation: str, constant: int | None, options: dict[str, Any]
    ) -> None:
        whole = step_loss(torch.arange(40), self.owners, 6, normalisation, constant, **options)
        shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0))
        renamed = torch.tensor([4, 0, 3, 5, 1, 2])
        other = step_loss(shuffled, renamed[self.owners[shuffled]], 6, normalisation, constant, **options)
        torch.testing.assert_close(other, whole)

    def test_micro_batches(self, normalisation: str, constant: int | None, options: dict[str, Any]) -> None:
        total, count = step_loss(torch.arange(40), self.owners, 6, normalisation, constant, **options)
        parts = []
        for first, stop in [(0, 2), (2, 3), (3, 6)]:  # the middle one has a trajectory but no token
            index = ((self.owners >= first) & (self.owners < stop)).nonzero().squeeze(1)
            parts.append(step_loss(index, self.owners[index] - first, stop - first, normalisation, constant, **options))
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
        loss, metrics = alone(*self.corner_cases(), **CLIP)
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
        alone(log_probs, *others, **CLIP)[0].backward()
        # d(-r A)/d log p = -r A where it is not clipped, 0 where it is, times the weight
        expected = torch.tensor([-1.0, 0.0, -3.0, 0.0, 3.0, -0.6], dtype=torch.float64)
        torch.testing.assert_close(log_probs.grad, expected)

    def test_bounds_can_be_turned_off(self) -> None:
        loss, metrics = alone(*self.corner_cases(), clip_low=1.0, clip_high=math.inf)
        assert loss.item() == pytest.approx(-(1.0 - 1.0 + 3.0 + 3.0 - 3.0 + 0.6))
        assert metrics["clip_low"].item() == metrics["clip_high"].item() == 0

    def test_ratio_to_the_reference(self) -> None:
        log_probs, sampler, advantages, weights = self.corner_cases()
        reference = sampler + randn(6)
        loss, metrics = alone(
            log_probs, sampler, advantages, weights, **CLIP, reference_log_probs=reference, ratio_to="reference"
        )
        as_sampler, as_sampler_metrics = alone(log_probs, reference, advantages, weights, **CLIP)
        torch.testing.assert_close(loss, as_sampler)
        torch.testing.assert_close(metrics["ratio"], as_sampler_metrics["ratio"])
        # the drift from the sampler is measured all the same
        torch.testing.assert_close(
            metrics["sampler_kl"], alone(log_probs, sampler, advantages, weights, **CLIP)[1]["sampler_kl"]
        )

    def test_penalty_is_beta_times_weighted_kl(self) -> None:
        log_probs, sampler, _, _ = self.corner_cases()
        ones, zeros = torch.ones_like(sampler), torch.zeros_like(sampler)
        reference = sampler + randn(6)
        loss, metrics = alone(log_probs, sampler, zeros, ones, **CLIP, beta=0.3, reference_log_probs=reference)
        torch.testing.assert_close(loss, 0.3 * metrics["kl"])
        unpenalised, unpenalised_metrics = alone(log_probs, sampler, zeros, ones, **CLIP, reference_log_probs=reference)
        assert unpenalised.item() == 0
        torch.testing.assert_close(unpenalised_metrics["kl"], metrics["kl"])

    def test_kl_metrics_estimate_what_they_are_called(self) -> None:
        policy, sampler, reference = (randn(9, seed=s).log_softmax(dim=0) for s in range(3))

        def expectation(under: Tensor, name: str) -> Tensor:
            """Of the estimate for one token, over the whole vocabulary."""
            one = torch.ones(1, dtype=torch.float64)
            estimates = [
                alone(policy[[i]], sampler[[i]], one, one, **CLIP, reference_log_probs=reference[[i]])[1][name]
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
            expected_penalty, _ = alone(
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
            return alone(
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
        loss, _ = alone(log_probs, empty, empty, empty, **CLIP)
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
            alone(*(changes.get(name, torch.zeros(3)) for name in names), **{**CLIP, **without(changes, names)})


def test_policy_gradient_ascends_reward() -> None:
    """The sign: a step against the gradient makes the rewarded token likelier, through all the functions."""
    logits = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    targets, owners = torch.tensor([0, 1]), torch.tensor([0, 1])
    log_probs: Callable[[], Tensor] = lambda: selected_log_probs(logits, targets)[0]  # noqa: E731
    weights, count = token_weights(owners, 2, "sequence")
    before = log_probs()
    loss, _ = rgrpo_loss(before, before.detach(), torch.tensor([1.0, -1.0]), weights, owners, 2, **CLIP)
    (loss / count).backward()
    with torch.no_grad():
        logits -= logits.grad
    assert log_probs()[0] > before[0]
    assert log_probs()[1] < before[1]


OWNERS = torch.tensor([0, 2, 2, 0, 2, 3])  # trajectory 1 wrote nothing


class TestImportanceRatio:
    def test_of_a_sequence_is_the_geometric_mean_of_its_tokens(self) -> None:
        policy, sampler = randn(6), randn(6, seed=1)
        r = importance_ratio(policy, sampler, OWNERS, 4, "token").tolist()
        assert r == pytest.approx([math.exp(a - b) for a, b in zip(policy.tolist(), sampler.tolist(), strict=True)])
        zero, two = (r[0] * r[3]) ** (1 / 2), (r[1] * r[2] * r[4]) ** (1 / 3)
        found = importance_ratio(policy, sampler, OWNERS, 4, "sequence")
        assert found.tolist() == pytest.approx([zero, two, two, zero, two, r[5]])

    def test_loss_and_gradient_of_gspo_written_out(self) -> None:
        """(1/N) sum_i min(s_i A_i, clip(s_i) A_i), where clipped trajectories have no gradient at any token."""
        sampler = randn(6, seed=1)
        shift = torch.tensor([0.1, 0.9, -0.1, 0.1, 0.4, -0.1], dtype=torch.float64)  # s: 1.105, 1.49 (clipped), 0.905
        policy = (sampler + shift).requires_grad_()
        advantage = torch.tensor([1.5, 0.0, 2.0, -1.0], dtype=torch.float64)
        weights, count = token_weights(OWNERS, 4, "sequence")
        loss, metrics = rgrpo_loss(
            policy, sampler, advantage[OWNERS], weights, OWNERS, 4, **CLIP, ratio_level="sequence"
        )
        (gradient,) = torch.autograd.grad(loss / count, policy)
        s = [math.exp(0.1), math.exp(0.4), math.exp(-0.1)]
        assert (loss / count).item() == pytest.approx(-(s[0] * 1.5 + 1.28 * 2.0 + s[2] * -1.0) / 4)
        zero, three = -s[0] * 1.5 / (2 * 4), s[2] / 4
        assert gradient.tolist() == pytest.approx([zero, 0, 0, zero, 0, three])
        assert metrics["clip_high"].item() == 3  # tokens
        assert metrics["ratio"].item() == pytest.approx(2 * s[0] + 3 * s[1] + s[2])

    @pytest.mark.parametrize("level", ["token", "sequence"])
    def test_gradcheck(self, level: Any) -> None:
        sampler, advantages, weights = (randn(6, seed=s) for s in range(1, 4))
        assert torch.autograd.gradcheck(
            lambda x: rgrpo_loss(x, sampler, advantages, weights, OWNERS, 4, **CLIP, ratio_level=level)[0],
            randn(6).requires_grad_(),
        )

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="`ratio_level` to be token or sequence but got 'turn'"):
            importance_ratio(randn(6), randn(6), OWNERS, 4, "turn")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"`owners` to be a long tensor of shape \(6\)"):
            importance_ratio(randn(6), randn(6), OWNERS[:5], 4, "token")


class TestSamplerCorrection:
    learner, sampler = randn(6, seed=5) / 3, randn(6, seed=6) / 3
    advantages, weights = randn(6, seed=7), randn(6, seed=8).abs()

    def expected(self, cap: float) -> Tensor:
        pairs = zip(self.learner.tolist(), self.sampler.tolist(), strict=True)
        return torch.tensor([min(math.exp(a - b), cap) for a, b in pairs], dtype=torch.float64)

    @pytest.mark.parametrize("cap", [1.2, 100.0])
    def test_is_a_truncated_constant_weight_and_the_ratio_is_over_the_learner(self, cap: float) -> None:
        policy = (self.learner + randn(6, seed=9) / 3).requires_grad_()
        options: dict[str, Any] = {"correction_cap": cap, "learner_log_probs": self.learner}
        loss, metrics = alone(policy, self.sampler, self.advantages, self.weights, **CLIP, **options)
        c = self.expected(cap)
        plain, _ = alone(policy, self.learner, self.advantages, self.weights * c, **CLIP)
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(torch.autograd.grad(loss, policy), torch.autograd.grad(plain, policy))
        torch.testing.assert_close(metrics["sampler_correction"], c.sum())
        capped = int((c == cap).sum())
        assert metrics["sampler_correction_capped"] == capped
        assert (0 < capped < 6) == (cap == 1.2)
        assert (c < 1).any()  # only the upper side is cut

    def test_at_the_first_step_the_policy_is_the_learner(self) -> None:
        policy = self.learner.clone().requires_grad_()
        first, _ = alone(policy, self.sampler, self.advantages, self.weights, **CLIP, correction_cap=1.2)
        later, _ = alone(
            policy,
            self.sampler,
            self.advantages,
            self.weights,
            **CLIP,
            correction_cap=1.2,
            learner_log_probs=self.learner,
        )
        torch.testing.assert_close(first, later)
        # on the learner's side of the correction the ratio is 1, and its gradient -w c A
        (gradient,) = torch.autograd.grad(first, policy)
        torch.testing.assert_close(gradient, -self.weights * self.expected(1.2) * self.advantages)

    def test_leaves_penalties_alone(self) -> None:
        policy, zeros = self.learner, torch.zeros(6, dtype=torch.float64)
        options: dict[str, Any] = {
            "beta": 0.3,
            "reference_log_probs": randn(6, seed=11),
            "entropy_bonus": 0.1,
            "entropy": randn(6, seed=12).abs(),
        }
        without, _ = alone(policy, self.sampler, zeros, self.weights, **CLIP, **options)
        with_cap, _ = alone(policy, self.sampler, zeros, self.weights, **CLIP, **options, correction_cap=0.5)
        torch.testing.assert_close(with_cap, without)

    def test_half_of_it_is_refused(self) -> None:
        tensors = (self.learner, self.sampler, self.advantages, self.weights)
        with pytest.raises(ValueError, match="`learner_log_probs` with `correction_cap` only"):
            alone(*tensors, **CLIP, learner_log_probs=self.learner)
        with pytest.raises(ValueError, match=r"`correction_cap` to be above 0 but got 0\.0"):
            alone(*tensors, **CLIP, correction_cap=0.0)
        with pytest.raises(ValueError, match="`correction_cap` with ratio_to='sampler' only"):
            alone(*tensors, **CLIP, correction_cap=2.0, ratio_to="reference", reference_log_probs=self.learner)


class TestEntropyBonus:
    def test_is_taken_off_with_the_weights(self) -> None:
        policy, sampler, advantages, weights, entropy = (randn(6, seed=s) for s in range(5))
        plain, _ = alone(policy, sampler, advantages, weights, **CLIP)
        rich, _ = alone(policy, sampler, advantages, weights, **CLIP, entropy_bonus=0.3, entropy=entropy)
        torch.testing.assert_close(plain - rich, 0.3 * (weights * entropy).sum())

    def test_ascends_the_entropy(self) -> None:
        logits = randn(1, 5).requires_grad_()
        log_probs, entropy = selected_log_probs(logits, torch.tensor([2]), entropy_gradient=True)
        one = torch.ones(1, dtype=torch.float64)
        loss, _ = alone(log_probs, log_probs.detach(), 0 * one, one, **CLIP, entropy_bonus=0.3, entropy=entropy)
        (gradient,) = torch.autograd.grad(loss, logits)
        _, after = selected_log_probs(logits - gradient, torch.tensor([2]))
        assert after > entropy + 1e-3

    def test_needs_the_entropy(self) -> None:
        with pytest.raises(ValueError, match=r"`entropy` to be given with entropy_bonus=0\.1"):
            alone(*(randn(3) for _ in range(4)), **CLIP, entropy_bonus=0.1)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_the_penalty_is_the_estimate_that_is_asked_for(kl: str) -> None:
    policy, sampler, weights, reference = (randn(6, seed=s) for s in range(4))
    loss, metrics = alone(
        policy, sampler, torch.zeros_like(policy), weights, **CLIP, beta=0.3, kl=kl, reference_log_probs=reference
    )
    d = policy - reference
    estimate = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[kl]
    torch.testing.assert_close(loss, 0.3 * (weights * estimate).sum())
    torch.testing.assert_close(metrics["kl"], estimate.sum())


@pytest.mark.parametrize(
    ("kl", "unbiased_kl", "exact"),
    [
        ("k1", True, True),
        ("k3", True, True),
        ("k2", False, True),
        ("k3", False, False),
        ("k1", False, False),
    ],
)
def test_which_penalties_have_the_gradient_of_the_divergence(kl: str, unbiased_kl: bool, exact: bool) -> None:
    """Expected on policy, over the whole vocabulary; the others' is another one, of k1 it is zero."""
    reference = randn(9, seed=2).log_softmax(dim=0)
    logits = randn(9).requires_grad_()
    divergence = kl_divergence(Categorical(logits=logits), Categorical(logits=reference))
    (expected,) = torch.autograd.grad(divergence, logits)
    sampler = logits.detach().log_softmax(dim=0)
    penalty, _ = alone(
        logits.log_softmax(dim=0),
        sampler,
        torch.zeros_like(sampler),
        sampler.exp(),
        **CLIP,
        beta=1.0,
        kl=kl,
        unbiased_kl=unbiased_kl,
        reference_log_probs=reference,
    )
    (found,) = torch.autograd.grad(penalty, logits)
    if exact:
        torch.testing.assert_close(found, expected)
    else:
        assert (found - expected).abs().max() > 0.01
    if (kl, unbiased_kl) == ("k1", False):
        assert found.abs().max() < 1e-12
