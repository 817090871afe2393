"""Sampling against counting, brute force and transformers' own nucleus filter."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from modules.functional.sampling import UniformStream, sample_tokens

NONE = torch.zeros(6, dtype=torch.bool)
LARGEST = 1 - 2.0**-53  # of the float64 numbers below 1


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def evenly(n: int) -> Tensor:
    """The middles of n equal parts of [0, 1)."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def counts(
    logits: Tensor, uniforms: Tensor, temperature: float = 1.0, top_p: float = 1.0, banned: Tensor = NONE
) -> Tensor:
    """(V,) how often each token of one distribution (V,) is sampled."""
    ids, _ = sample_tokens(logits.expand(len(uniforms), -1), uniforms, temperature, top_p, banned)
    return ids.bincount(minlength=len(logits))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    logits, n = randn(6) * 2, 2000
    expected = (logits.double() / temperature).softmax(-1) * n
    # A token owns an interval of length p, which holds n * p evenly spaced numbers, give or take less than one;
    # float32 log-probabilities move its ends by about 1e-6 * n.
    assert (counts(logits, evenly(n), temperature) - expected).abs().max() < 1.01


def test_frequencies_are_the_softmax_over_random_numbers() -> None:
    logits, n = randn(6), 20_000
    stream = UniformStream(seed=5)
    found = counts(logits, torch.tensor([stream.next() for _ in range(n)], dtype=torch.float64)) / n
    expected = logits.double().softmax(-1)
    # five standard deviations of a binomial share
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()


@pytest.mark.parametrize("top_p", [0.4, 0.9, 1.0])
@pytest.mark.parametrize("banned", [[0], [5], [0, 2, 5], [0, 1, 2, 3, 4]])
def test_banned_is_never_sampled_and_its_share_goes_to_the_others(banned: list[int], top_p: float) -> None:
    mask = torch.isin(torch.arange(6), torch.tensor(banned))
    logits = randn(6).masked_fill(mask, 9.0)  # banned ones are the likeliest
    ends = torch.tensor([0.0, LARGEST], dtype=torch.float64)
    found = counts(logits, torch.cat([evenly(1000), ends]), top_p=top_p, banned=mask)
    assert found[mask].sum() == 0
    if top_p == 1:
        expected = torch.zeros(6, dtype=torch.float64)
        expected[~mask] = logits[~mask].double().softmax(-1) * 1000
        assert (found - expected).abs().max() <= 3.01  # the two ends besides
    greedy, _ = sample_tokens(logits[None], ends[:1], 0.0, 1.0, mask)
    assert not mask[greedy]


def smallest_set(probs: Tensor, top_p: float) -> set[int]:
    """By trying all sets: the fewest tokens that reach top_p, and of those the most probable."""
    for size in range(1, len(probs) + 1):
        best = max(combinations(range(len(probs)), size), key=lambda c: float(probs[list(c)].sum()))
        if float(probs[list(best)].sum()) >= top_p:
            return set(best)
    raise AssertionError("all of them reach any top_p")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.8, 0.99])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, seed: int) -> None:
    logits, n = randn(6, seed=seed) * 1.5, 5000
    probs = logits.double().softmax(-1)
    found = counts(logits, evenly(n), top_p=top_p)
    kept = set(found.nonzero()[:, 0].tolist())
    assert kept == smallest_set(probs, top_p)
    warped = TopPLogitsWarper(top_p)(torch.zeros(1, 1, dtype=torch.long), logits[None])[0]
    assert kept == set(warped.isfinite().nonzero()[:, 0].tolist())
    # among the kept the proportions stay
    assert (found - warped.double().softmax(-1) * n).abs().max() < 1.01


def test_of_equally_likely_tokens_at_the_border_as_many_are_kept_as_needed() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0, 0.0]).log()
    assert counts(logits, evenly(64), top_p=0.74).tolist()[2:] == [0, 0, 0, 0]
    assert counts(logits, evenly(64), top_p=0.76)[2:].count_nonzero() == 1
    assert counts(logits, evenly(64), top_p=0.88)[2:].count_nonzero() == 2


def test_temperature_zero_takes_the_likeliest_whatever_the_noise() -> None:
    logits = randn(7, 6)
    for u in (0.0, 0.5, LARGEST):
        ids, _ = sample_tokens(logits, torch.full((7,), u, dtype=torch.float64), 0.0, 1.0, NONE)
        assert torch.equal(ids, logits.argmax(-1))


@pytest.mark.parametrize(("temperature", "divisor"), [(0.0, 1.0), (0.6, 0.6), (1.0, 1.0), (3.0, 3.0)])
@pytest.mark.parametrize("top_p", [0.3, 1.0])
def test_recorded_log_probs_are_over_all_allowed_tokens(temperature: float, divisor: float, top_p: float) -> None:
    logits, banned = randn(50, 6), torch.arange(6) == 1
    ids, log_probs = sample_tokens(logits, evenly(50), temperature, top_p, banned)
    allowed = [0, 2, 3, 4, 5]
    expected = torch.log_softmax(logits[:, allowed] / divisor, -1)
    places = torch.tensor([allowed.index(k) for k in ids.tolist()])
    torch.testing.assert_close(log_probs, expected[torch.arange(50), places])


def test_a_rows_sample_does_not_depend_on_the_other_rows() -> None:
    logits, uniforms = randn(16, 6), evenly(16)
    together, log_probs = sample_tokens(logits, uniforms, 0.9, 0.8, NONE)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    shuffled, _ = sample_tokens(logits[order], uniforms[order], 0.9, 0.8, NONE)
    assert torch.equal(shuffled, together[order])
    for k in range(16):
        alone, log_prob = sample_tokens(logits[k : k + 1], uniforms[k : k + 1], 0.9, 0.8, NONE)
        assert alone[0] == together[k]
        assert (log_prob[0] - log_probs[k]).abs() < 1e-6


def test_streams_repeat_by_seed_and_do_not_repeat_themselves() -> None:
    n = 3 * UniformStream.BLOCK + 1
    first, again, other = ([s.next() for _ in range(n)] for s in map(UniformStream, (7, 7, 8)))
    assert first == again
    assert not set(first) & set(other)
    assert len(set(first)) == n
    assert all(0 <= u < 1 for u in first)


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 + 5, 20_250_519 * 1_000_003**2])
def test_any_seed_will_do(seed: int) -> None:
    """A date as the seed of a run comes to more than 64 bits."""
    assert UniformStream(seed).next() != UniformStream(seed + 1).next()


@pytest.mark.parametrize("size", [4096, 4097, 8192, 9000])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_a_large_vocabulary_is_sampled_as_a_small_one(size: int, spread: float) -> None:
    banned = torch.zeros(size, dtype=torch.bool)
    banned[::7] = True
    logits = (randn(1, size) * spread).expand(200, -1)
    uniforms = torch.cat([evenly(198), torch.tensor([0.0, LARGEST], dtype=torch.float64)])
    ids, _ = sample_tokens(logits, uniforms, 1.0, 1.0, banned)
    assert not banned[ids].any()
    probs = logits[0].double().masked_fill(banned, -torch.inf).softmax(-1)
    reached = probs.cumsum(-1)[ids]
    # float32 log-probabilities move the borders by a few 1e-7
    assert (uniforms < reached + 1e-6).all()
    assert (uniforms >= reached - probs[ids] - 1e-6).all()


def test_the_rarest_tokens_of_a_large_vocabulary_have_their_share() -> None:
    """Of one in ten thousand millions, sums of float32 would know nothing."""
    size = 9000
    logits = randn(1, size) * 4
    powers = (logits - logits.amax()).exp().double()[0]
    shares = powers / powers.sum()
    rare = ((shares > 1e-11) & (shares < 1e-9)).nonzero()[:50, 0]
    assert len(rare) == 50
    middles = (shares.cumsum(0) - shares / 2)[rare]
    ids, _ = sample_tokens(logits.expand(50, -1), middles, 1.0, 1.0, torch.zeros(size, dtype=torch.bool))
    assert torch.equal(ids, rare)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("size", [4097, 9000])
def test_log_probs_of_a_large_vocabulary(size: int, temperature: float) -> None:
    logits, banned = randn(50, size) * 5, torch.zeros(size, dtype=torch.bool)
    banned[::7] = True
    before = logits.clone()
    ids, log_probs = sample_tokens(logits, evenly(50), temperature, 1.0, banned)
    assert torch.equal(logits, before)
    expected = (logits.double() / temperature).masked_fill(banned, -torch.inf).log_softmax(-1)
    torch.testing.assert_close(log_probs.double(), expected.gather(-1, ids[:, None])[:, 0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [6, 9000])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_do_not_end_a_rollout(size: int, bad: float) -> None:
    logits = randn(3, size)
    logits[1, 2] = bad
    banned = torch.zeros(size, dtype=torch.bool)
    ids, _ = sample_tokens(logits, evenly(3), 1.0, 1.0, banned)
    assert ((ids >= 0) & (ids < size)).all()
    logits[1, 2] = 0.0
    assert torch.equal(ids[[0, 2]], sample_tokens(logits, evenly(3), 1.0, 1.0, banned)[0][[0, 2]])
