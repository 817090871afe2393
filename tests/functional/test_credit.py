"""Credit by turn against sums written out by hand, and what it has to have in common with plain advantages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.functional.advantages import Baseline, group_advantages, zero_variance
from modules.functional.credit import act_differences, laid_out, of_sampled, turn_advantages
from modules.trajectory import Sample, StopReason, Trajectory, Turn

NAN = math.nan
PLAIN: dict[str, Any] = {"scale_by_std": False, "epsilon": 0.0}
SCALED: dict[str, Any] = {"scale_by_std": True, "epsilon": 1e-4}


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Three trajectories: two looks, one look, none. The turn reward pays the first the best of its looks.
LOOKS = tensor([[[0.8, 0.2, NAN], [0.5, NAN, NAN], [NAN, NAN, NAN]]])
WHOLE = tensor([[0.8, 0.5, 0.0]])
REST = tensor([1.0, 0.0, 0.5])
TOTALS = REST + WHOLE[0]


def test_written_out_by_hand() -> None:
    own, extra = turn_advantages(TOTALS, WHOLE, LOOKS, **PLAIN)
    looks = (0.8 + 0.2 + 0.5 + 0.0) / 4  # the trajectory that did not look counts as one with the value 0
    assert own.tolist() == pytest.approx([1 - 0.5, 0 - 0.5, 0.5 - 0.5 + (0.0 - looks)])
    expected = [[0.8 - looks, 0.2 - looks, 0], [0.5 - looks, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(extra, tensor(expected))
    acts = [0.5 + 0.8 - looks, 0.5 + 0.2 - looks, -0.5 + 0.5 - looks, -looks]
    assert sorted(act_differences(TOTALS, WHOLE, LOOKS).tolist()) == pytest.approx(sorted(acts))
    s = math.sqrt(sum(d * d for d in acts) / 3) + 0.01
    scaled, turns = turn_advantages(TOTALS, WHOLE, LOOKS, scale_by_std=True, epsilon=0.01)
    torch.testing.assert_close(scaled, own / s)
    torch.testing.assert_close(turns, extra / s)


def test_leave_one_out_written_out_by_hand() -> None:
    own, extra = turn_advantages(TOTALS, WHOLE, LOOKS, **PLAIN, baseline="leave_one_out")
    others = [(0.5 + 0.0) / 2, (0.8 + 0.2 + 0.0) / 3, (0.8 + 0.2 + 0.5) / 3]  # looks of the other trajectories
    assert own.tolist() == pytest.approx([1 - 0.25, 0 - 0.75, 0.5 - 0.5 - others[2]])
    expected = [[0.8 - others[0], 0.2 - others[0], 0], [0.5 - others[1], 0, 0], [0, 0, 0]]
    torch.testing.assert_close(extra, tensor(expected))


def test_two_rewards_of_which_one_knows_of_another_turn() -> None:
    """A refused box has no IoU: its trajectory is credited with that as a whole, and with its validity in the turn."""
    turns = tensor([[[0.6, NAN], [NAN, NAN]], [[0.1, NAN], [0.0, NAN]]])
    whole = tensor([[0.6, 0.0], [0.1, 0.0]])
    own, extra = turn_advantages(tensor([0.7, 0.0]), whole, turns, **PLAIN)
    assert own.tolist() == pytest.approx([0, 0 - 0.3])
    torch.testing.assert_close(extra, tensor([[0.3 + 0.05, 0], [-0.05, 0]]))


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("options", [PLAIN, SCALED])
def test_a_single_look_gets_just_what_it_gets_without_credit(options: dict[str, Any], baseline: Baseline) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):  # among them groups whose two parts nearly cancel
        parts = torch.rand(3, 6, generator=generator, dtype=torch.float64)
        whole = parts[1:] * torch.tensor([[0.5], [2.0]])
        turns = torch.full((2, 6, 3), NAN, dtype=torch.float64)
        turns[:, torch.arange(6), torch.tensor([0, 1, 2, 0, 1, 0])] = whole
        turns[:, 5] = NAN  # does not look
        totals = parts[0] + whole.sum(0)
        plain = group_advantages(totals, **options, baseline=baseline)
        own, extra = turn_advantages(totals, whole, turns, **options, baseline=baseline)
        looked = ~turns.isnan().all(0)
        torch.testing.assert_close((own[:, None] + extra)[looked], plain[:5])
        torch.testing.assert_close(own[5], plain[5])
        assert (own[:5] - plain[:5]).abs().max() > 1e-3  # what the other turns get is another thing
        found = act_differences(totals, whole, turns)
        torch.testing.assert_close(found.max() - found.min(), totals.max() - totals.min())


def test_looks_are_only_weighed_against_each_other() -> None:
    """What a group's looks get adds up to nothing, however many a trajectory makes."""
    _, extra = turn_advantages(TOTALS[:2], WHOLE[:, :2], LOOKS[:, :2], **SCALED)
    assert float(extra.sum()) == pytest.approx(0, abs=1e-12)
    assert extra[0, 0] > 0.1


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_order_in_the_group_does_not_matter(baseline: Baseline) -> None:
    order = torch.tensor([2, 0, 1])
    own, extra = turn_advantages(TOTALS, WHOLE, LOOKS, **SCALED, baseline=baseline)
    mixed = turn_advantages(TOTALS[order], WHOLE[:, order], LOOKS[:, order], **SCALED, baseline=baseline)
    torch.testing.assert_close(mixed, (own[order], extra[order]))


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_a_failed_judgement_is_as_if_it_were_not_there(baseline: Baseline) -> None:
    totals, whole, turns = TOTALS.clone(), WHOLE.clone(), LOOKS.clone()
    totals[1] = whole[0, 1] = NAN
    own, extra = turn_advantages(totals, whole, turns, **SCALED, baseline=baseline)
    rest = torch.tensor([0, 2])
    expected = turn_advantages(TOTALS[rest], WHOLE[:, rest], LOOKS[:, rest], **SCALED, baseline=baseline)
    torch.testing.assert_close((own[rest], extra[rest]), expected)
    assert own[1] == 0
    assert not extra[1].any()


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("options", [PLAIN, {"scale_by_std": True, "epsilon": 0.0}])
@pytest.mark.parametrize(
    ("totals", "whole", "turns"),
    [
        ([0.7], [[0.2]], [[[0.2]]]),  # one trajectory, one look
        ([0.7] * 3, [[0.1] * 3], [[[0.1, NAN]] * 3]),  # rounding must not become an advantage
        ([NAN, NAN], [[NAN, NAN]], [[[NAN], [0.5]]]),
        ([NAN, 0.4], [[0.0, 0.1]], [[[0.3], [0.1]]]),
        ([1.1, 1.1], [[0.1, 0.8]], [[[0.1], [0.8]]]),  # what the look pays is what the rest does not
    ],
)
def test_nothing_to_compare_is_exactly_zero(
    totals: Any, whole: Any, turns: Any, options: dict[str, Any], baseline: Baseline
) -> None:
    given = tuple(torch.tensor(x) for x in (totals, whole, turns))
    own, extra = turn_advantages(*given, **options, baseline=baseline)
    assert not own.any()
    assert not extra.any()
    assert bool(zero_variance(act_differences(*given)))


def test_looks_of_tied_trajectories_still_differ() -> None:
    """By totals the group has nothing to tell, for each trajectory is paid its best look."""
    totals, whole = tensor([1.8, 1.8]), tensor([[0.8, 0.8]])
    turns = tensor([[[0.8, 0.2], [0.8, NAN]]])
    assert bool(zero_variance(totals))
    assert not bool(zero_variance(act_differences(totals, whole, turns)))
    own, extra = turn_advantages(totals, whole, turns, scale_by_std=True, epsilon=0.0)
    assert not own.any()
    torch.testing.assert_close(extra, tensor([[0.2, -0.4], [0.2, 0.0]]) / math.sqrt(0.24 / 2))


@pytest.mark.parametrize(
    ("totals", "pay"), [([1.0, 1.001], [0.0, 1.0]), ([1.0, 1.001, 1.002, 1.0], [0.0, 0.0, 0.0, 1.0])]
)
def test_parts_that_cancel_are_not_blown_up(totals: list[float], pay: list[float]) -> None:
    """The totals differ by a thousandth, their parts by one: no trajectory gets more than an act does."""
    r, whole = tensor(totals), tensor([pay])
    own, extra = turn_advantages(r, whole, whole[..., None], scale_by_std=True, epsilon=0.0)
    plain = group_advantages(r, scale_by_std=True, epsilon=0.0)
    torch.testing.assert_close(own.abs().max(), plain.abs().max())
    # all parts are made smaller alike: they still add up to nothing, and to the acts' own proportions
    torch.testing.assert_close(own.sum(), tensor(0.0), atol=1e-9, rtol=0)
    torch.testing.assert_close(extra.sum(), tensor(0.0), atol=1e-9, rtol=0)
    acts = (own[:, None] + extra)[:, 0]
    torch.testing.assert_close(acts / acts.norm(), plain / plain.norm())
    assert acts.norm() < plain.norm()


def test_without_a_turn_reward_they_are_plain() -> None:
    none = torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, 3, 2, dtype=torch.float64)
    for baseline in ("mean", "leave_one_out"):
        own, extra = turn_advantages(TOTALS, *none, **SCALED, baseline=baseline)  # type: ignore[arg-type]
        torch.testing.assert_close(own, group_advantages(TOTALS, **SCALED, baseline=baseline))  # type: ignore[arg-type]
        assert not extra.any()


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="`epsilon` to be at least 0"):
        turn_advantages(TOTALS, WHOLE, LOOKS, scale_by_std=True, epsilon=-1.0)
    with pytest.raises(ValueError, match="`turns` to be a float tensor of shape"):
        turn_advantages(TOTALS, WHOLE, LOOKS[:, :2], **PLAIN)
    with pytest.raises(ValueError, match="`whole` to be a float tensor of shape"):
        act_differences(TOTALS, WHOLE[:, :2], LOOKS)


def test_sampled_tokens_have_what_their_turn_has() -> None:
    sampled = torch.tensor([True, True, False, False, True, True])
    nothing, none = torch.zeros(6), torch.zeros(6, dtype=torch.long)
    turns = (Turn("a", 0, 2), Turn("b", 4, 5))  # the last token is of no turn
    t = Trajectory(Sample("s", "?"), none, none, sampled, nothing, nothing, (), turns, StopReason.EOS, None, "ab")
    found = of_sampled(t, torch.tensor([5.0, 7.0, 9.0]))  # the group's longest trajectory has three turns
    assert found.tolist() == [5, 5, 7, 0]


def test_tokens_of_a_batch_are_laid_out_by_owner() -> None:
    owners = torch.tensor([1, 0, 1, 0, 2])
    values = [torch.tensor([10.0, 11.0]), torch.tensor([20.0, 21.0]), torch.tensor([30.0])]
    assert laid_out(values, owners).tolist() == [20, 10, 21, 11, 30]
