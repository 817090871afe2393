"""Credit by turn on a real Trainer: the gradient reaches the turn that earned it, and the policy learns which look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from callbacks.monitors import Monitors, Rule
from callbacks.rollout import RolloutCallback
from modules.backbones.timm_lm import TimmLMBackbone
from modules.engine import Decoding, GroupSampler, LocalEngine, Request
from modules.functional.credit import turn_advantages
from modules.functional.kinds import KINDS, token_kinds
from modules.policy import PolicyError
from modules.rewards import IoU, RegionValidity, Reward, score_turns
from modules.rgrpo import Objective, RGRPOModule
from modules.scoring import collate, token_log_probs
from modules.trajectory import Group, Region, SampleBatch, StopReason, Trajectory, TurnPay
from tests.conftest import make_samples, scripted
from tests.fitting import fit, fresh, furthest, plain_logits, weights
from tests.learning import LIMITS, SGD, TOTALS, Wordiness, groups, rolled, step

BY_TURN: dict[str, Any] = {"credit": "turn", "scale_by_std": False}
GOOD, BAD, WORSE = "[20, 16, 52, 48]", "[40, 44, 64, 60]", "[0, 0, 28, 12]"
ANNOTATED = (Region((20.0, 16.0, 52.0, 48.0)),)
FIRST, SECOND = '<think>I zoom in on red {{"bbox_2d": {}}}', 'green {{"bbox_2d": {}}}'
END = "I can read it now.</think><answer>0</answer>"


class Seen(L.Callback):
    """The groups of each batch as the training step leaves them."""

    def __init__(self) -> None:
        self.groups: list[list[Group]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.groups.append(list(args[3].groups))


@torch.no_grad()
def log_probs_of(backbone: TimmLMBackbone, trajectories: Sequence[Trajectory]) -> list[Tensor]:
    """(S_i,) each."""
    found, _ = token_log_probs(backbone, collate(backbone, trajectories), 10_000)
    return list(found.split([int(t.sampled.sum()) for t in trajectories]))


def playing(backbone: TimmLMBackbone, *boxes: Sequence[str]) -> list[Trajectory]:
    """Trajectories about one question that look at these boxes and answer alike, as likely as this policy has them."""
    texts = ["".join(how.format(box) for how, box in zip((FIRST, SECOND), own, strict=False)) + END for own in boxes]
    sample = replace(make_samples(1)[0], regions=ANNOTATED)
    requests = [Request(sample, k) for k in range(len(texts))]
    played = LocalEngine().rollout(scripted(texts), requests, Decoding(0.0, max_turns=3, max_turn_tokens=8))
    assert all(len(t.regions) == len(own) for t, own in zip(played, boxes, strict=True))
    return [
        replace(t, log_probs=torch.zeros(len(t.sampled)).masked_scatter(t.sampled, own))
        for t, own in zip(played, log_probs_of(backbone, played), strict=True)
    ]


def judged(module: RGRPOModule, played: Sequence[Trajectory], rewards: dict[str, Reward]) -> Group:
    """As the rollout callback does."""
    components, totals, pay = score_turns(rewards, played)
    pay_or_none = pay if module.objective.credit == "turn" else None
    group = Group(played[0].sample, tuple(played), components, totals, module.advantages(totals), pay_or_none)
    return module.credited(group)


def with_turns(objective: Objective, made: Sequence[Group], seed: int = 5) -> list[Group]:
    """Groups whose turns were paid at random, but for their last, and not for all of the trajectories."""
    generator, module = torch.Generator().manual_seed(seed), RGRPOModule(scripted([]), objective=objective)
    found = []
    for group in made:
        most = max(len(t.turns) for t in group.trajectories)
        turns = torch.rand(1, len(group.trajectories), most, generator=generator)
        for k, t in enumerate(group.trajectories):
            turns[:, k, len(t.turns) - 1 :] = math.nan
        pay = TurnPay(turns.nan_to_num(0).amax(-1), turns)
        totals = group.totals + pay.whole[0]
        found.append(module.credited(replace(group, totals=totals, advantages=module.advantages(totals), turn_pay=pay)))
    assert any(group.turn_advantages is not None and group.turn_advantages.any() for group in found)
    return found


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_gradient_is_each_turns_own(
    zooming: TimmLMBackbone, monkeypatch: pytest.MonkeyPatch, micro_batch: int | None
) -> None:
    """Rewarded for looks alone, one trajectory of two has a good and a bad one: d loss / d log-prob, token by token."""
    kept: list[tuple[Tensor, Tensor]] = []

    def keeping(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        log_probs, entropy = token_log_probs(*args, **options)
        log_probs.retain_grad()
        kept.append((args[1].owners, log_probs))
        return log_probs, entropy

    monkeypatch.setattr("modules.scoring.token_log_probs", keeping)
    played = playing(zooming, (GOOD, BAD), (BAD, WORSE), (WORSE, "[16, 12, 48, 44]"))
    objective = Objective(normalisation="token", **BY_TURN)
    module = RGRPOModule(fresh(zooming), optimizer=SGD, objective=objective, micro_batch=micro_batch)
    group = judged(module, played, {"iou": IoU()})
    fit(module, [SampleBatch([group.sample], groups=[group])])
    found = torch.cat([log_probs.grad for _, log_probs in kept if log_probs.grad is not None])
    ious = [IoU().turns(t) for t in played]
    looks = [value for turns in ious for value in turns if not math.isnan(value)]
    assert len(looks) == 6
    assert ious[0][0] == 1
    expected = []
    for t, turns in zip(played, ious, strict=True):
        for turn, value in zip(t.turns, turns, strict=True):
            own = 0.0 if math.isnan(value) else value - sum(looks) / 6  # the answers were all the same: nothing
            expected += [-own] * (turn.stop - turn.start)
    assert found.tolist() == pytest.approx([g / len(expected) for g in expected], abs=1e-6)


@pytest.mark.parametrize("settings", [BY_TURN, {"credit": "turn", "baseline": "leave_one_out", "beta": 0.1}])
def test_a_step_depends_neither_on_micro_batches_nor_on_order(
    zooming: TimmLMBackbone, settings: dict[str, Any]
) -> None:
    objective = Objective(**settings)
    made = with_turns(objective, groups(zooming, TOTALS))
    whole = step(zooming, made, objective)
    assert furthest(whole, step(zooming, [replace(g, turn_advantages=None) for g in made], objective)) > 1e-4
    for micro_batch in (1, 4):
        assert furthest(step(zooming, made, objective, micro_batch=micro_batch), whole) < 1e-6
    order, mixed, module = [2, 0, 1], [], RGRPOModule(fresh(zooming), objective=objective)
    for g in made[::-1]:
        assert g.turn_pay is not None
        pay = TurnPay(g.turn_pay.whole[:, order], g.turn_pay.turns[:, order])
        members = tuple(g.trajectories[k] for k in order)
        mixed.append(module.credited(replace(g, trajectories=members, totals=g.totals[order], turn_pay=pay)))
    assert furthest(step(zooming, mixed, objective, micro_batch=2, row_tokens=0), whole) < 1e-6


def test_with_one_look_each_the_looks_are_learned_as_without_credit(zooming: TimmLMBackbone) -> None:
    """Same trajectories and rewards; what the tokens behind the look get is nothing, for it is no other reward's."""
    played = playing(zooming, (GOOD,), (BAD,), (WORSE,), ("[16, 12, 48, 44]",))
    pays = torch.tensor([0.9, 0.1, 0.3, 0.7])
    turns = torch.stack([pays, torch.full_like(pays, math.nan)], 1)[None]
    objective = Objective(normalisation="token", credit="turn")
    module = RGRPOModule(fresh(zooming), objective=objective)
    plain = Group(played[0].sample, tuple(played), {}, pays, module.advantages(pays))
    credited = module.credited(replace(plain, turn_pay=TurnPay(pays[None], turns)))
    rest = [replace(t, sampled=t.sampled.clone()) for t in played]
    for t in rest:
        for turn in t.turns:
            if turn.crop is None:
                t.sampled[turn.start : turn.stop] = False
    silenced = step(zooming, [replace(plain, trajectories=tuple(rest))], Objective(normalisation="token"))
    kept, every = (sum(int(t.sampled.sum()) for t in some) for some in (rest, played))
    before = weights(zooming)
    expected = {name: before[name] + (silenced[name] - before[name]) * kept / every for name in before}
    found = step(zooming, [credited], objective)
    assert furthest(found, before) > 1e-3
    assert furthest(found, expected) < 1e-6


@pytest.mark.parametrize("bad", [BAD, WORSE])
@pytest.mark.parametrize("good", [0, 1])
def test_only_the_good_look_becomes_likelier(zooming: TimmLMBackbone, good: int, bad: str) -> None:
    """One of four trajectories has a good look and a bad one, in either order, one a good one, two none. By trajectory
    both looks of the first become likelier, by turn the good one alone."""
    played = playing(zooming, (bad, GOOD) if good else (GOOD, bad), (GOOD,), (), ())
    risen = {}
    for credit in ("trajectory", "turn"):
        objective = Objective(normalisation="token", scale_by_std=False, credit=credit)  # type: ignore[arg-type]
        module = RGRPOModule(fresh(zooming), optimizer=partial(torch.optim.SGD, lr=0.01), objective=objective)
        group = judged(module, played, {"iou": IoU()})
        fit(module, [SampleBatch([group.sample], groups=[group])])
        after, own = log_probs_of(module.backbone.eval(), played)[0], played[0]
        change = torch.zeros(len(own.sampled)).masked_scatter(own.sampled, after) - own.log_probs
        risen[credit] = [float(change[turn.start : turn.stop].sum()) for turn in own.turns]
    assert min(risen["trajectory"][:2]) > 0.1
    assert risen["turn"][good] > 0.1
    assert risen["turn"][1 - good] < -0.1


def test_groups_whose_totals_tie_are_learned_from_where_their_looks_differ(zooming: TimmLMBackbone) -> None:
    played = playing(zooming, (GOOD, BAD), (BAD, GOOD))
    for objective, learns in ((Objective(), False), (Objective(credit="turn"), True)):
        module = RGRPOModule(fresh(zooming), optimizer=SGD, objective=objective)
        group = judged(module, played, {"iou": IoU()})
        fit(module, [SampleBatch([group.sample], groups=[group])])
        assert module.trainer.global_step == learns
        assert (furthest(weights(module.backbone), weights(zooming)) > 1e-4) == learns


def test_what_is_taken_off_a_trajectory_is_not_taken_off_its_turns(zooming: TimmLMBackbone) -> None:
    objective, seen = Objective(truncation_penalty=0.9, **BY_TURN), Seen()
    made = with_turns(objective, groups(zooming, TOTALS[:1]))
    (group,) = made
    stops = [StopReason.ANSWER, StopReason.TURN_LENGTH, StopReason.ANSWER]
    cut = [replace(t, stop=stop) for t, stop in zip(group.trajectories, stops, strict=True)]
    group = replace(group, trajectories=tuple(cut))
    module = RGRPOModule(fresh(zooming), optimizer=SGD, objective=objective)
    fit(module, [SampleBatch([group.sample], groups=[group])], seen)
    ((found,),) = seen.groups
    assert found.turn_advantages is not None
    assert group.turn_advantages is not None
    torch.testing.assert_close(found.turn_advantages, group.turn_advantages)
    torch.testing.assert_close(found.advantages, group.advantages + torch.tensor([0.3, -0.6, 0.3]))


class TestRollout:
    def rollout(self, **rewards: Reward) -> RolloutCallback:
        return RolloutCallback(sampler=GroupSampler(4), rewards=rewards, decoding=Decoding(1.0, **LIMITS))

    def test_judges_turns_and_logs_their_advantages(self, zooming: TimmLMBackbone) -> None:
        objective, seen = Objective(credit="turn", scale_by_std=True), Seen()
        module = RGRPOModule(fresh(zooming), optimizer=SGD, objective=objective)
        rollout = self.rollout(words=Wordiness(), iou=IoU(weight=3.0), region=RegionValidity(requires="iou"))
        rule = Rule("train/advantage/turn_std", above=-1.0)
        (row,) = fit(module, [SampleBatch(make_samples(4))], rollout, Monitors({"watched": rule}), seen).rows
        extras, trained = [], []
        for group in seen.groups[0]:
            _, totals, pay = score_turns(rollout.rewards, group.trajectories)
            own, extra = turn_advantages(totals, pay.whole, pay.turns, scale_by_std=True, epsilon=1e-4)
            assert group.turn_advantages is not None
            torch.testing.assert_close(group.totals, totals)
            torch.testing.assert_close(group.advantages, own)
            torch.testing.assert_close(group.turn_advantages[:, : extra.shape[1]], extra)
            extras.append(extra[~pay.turns.isnan().all(0)])
            trained.append(own)
        assert len(torch.cat(extras)) > 5
        assert row["train/advantage/turn_std"] == pytest.approx(float(torch.cat(extras).std()), rel=1e-4)
        assert row["train/advantage/turn_mean"] == pytest.approx(float(torch.cat(extras).mean()), abs=1e-5)
        assert row["train/advantage/std"] == pytest.approx(float(torch.cat(trained).std()), rel=1e-4)
        assert row["train/monitor/watched"] == 1

    @pytest.mark.parametrize("rewards", [{}, {"iou": IoU(weight=0.0)}])
    def test_nothing_to_credit_is_refused(self, zooming: TimmLMBackbone, rewards: dict[str, Reward]) -> None:
        module = RGRPOModule(fresh(zooming), objective=Objective(credit="turn"))
        with pytest.raises(PolicyError, match=r"a turn reward with a weight .*`objective\.credit: turn`, .*Wordiness"):
            fit(module, [SampleBatch(make_samples(1))], self.rollout(words=Wordiness(), **rewards))

    def test_by_trajectory_nothing_is_kept_of_turns(self, zooming: TimmLMBackbone) -> None:
        seen, module = Seen(), RGRPOModule(fresh(zooming), optimizer=SGD)
        (row,) = fit(module, [SampleBatch(make_samples(2))], self.rollout(words=Wordiness(), iou=IoU()), seen).rows
        assert all(g.turn_pay is None and g.turn_advantages is None for g in seen.groups[0])
        assert "train/advantage/turn_std" not in row


def test_entropy_by_kind_of_token_is_that_of_the_distributions(zooming: TimmLMBackbone) -> None:
    """Each trajectory in a full pass of its own."""
    made = groups(zooming, TOTALS)
    module = RGRPOModule(fresh(zooming), optimizer=SGD, micro_batch=4)
    (row,) = fit(module, [SampleBatch([g.sample for g in made], groups=made)]).rows
    found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for t in (t for g in made for t in g.trajectories):
        logits = plain_logits(zooming, t)[:, ~zooming.banned]
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        for kind, mask in token_kinds(t, zooming.detokenize).items():
            found[kind].append(entropy[mask].detach())
    joined = {kind: torch.cat(values) for kind, values in found.items()}
    assert all(len(values) > 2 for values in joined.values())
    for kind, values in joined.items():
        assert row[f"train/entropy/{kind}"] == pytest.approx(float(values.mean()), rel=1e-4)
    assert row["train/entropy"] == pytest.approx(float(torch.cat(list(joined.values())).mean()), rel=1e-4)


def test_entropy_by_kind_is_watched(zooming: TimmLMBackbone) -> None:
    """Also where there are no answers at first: a metric that is logged where there is something to count."""
    rules = {kind: Rule(f"train/entropy/{kind}", above=-1.0) for kind in KINDS}
    module = RGRPOModule(fresh(zooming), optimizer=SGD)
    rows = fit(module, [SampleBatch(make_samples(4))], rolled(), Monitors(rules), max_steps=2).rows
    assert [rows[-1][f"train/monitor/{kind}"] for kind in ("text", "box")] == [1, 1]


def test_entropy_by_kind_costs_no_pass_more(zooming: TimmLMBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    whole = TimmLMBackbone.hidden_states
    monkeypatch.setattr(TimmLMBackbone, "hidden_states", lambda *a: (passes.append(1), whole(*a))[1])
    made = groups(zooming, TOTALS)
    rows = fit(RGRPOModule(fresh(zooming), optimizer=SGD), [SampleBatch([g.sample for g in made], groups=made)]).rows
    assert len(passes) == 1
    assert "train/entropy/box" in rows[0]
