"""What a crop is worth: a policy that reads it gains, one that ignores it does not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from callbacks.rollout import RolloutCallback
from modules.backbones.timm_lm import TimmLMBackbone
from modules.counterfactual import GREY, log_likelihoods, retold, with_answer
from modules.engine import Decoding, GroupSampler, LocalEngine, Request
from modules.policy import PolicyError
from modules.rewards import InformationGain, Integration
from modules.rgrpo import RGRPOModule
from modules.sft import SFTModule
from modules.trajectory import SampleBatch, Trajectory
from tests.conftest import Blind, make_samples, scripted
from tests.fitting import Batches, fresh, plain_logits, trainer

GREEDY = Decoding(0.0, max_turns=3, max_turn_tokens=8)
LOOKS = '<think>I zoom in on red {"bbox_2d": [8, 12, 40, 44]}I can read it now.</think><answer>0</answer>'
GLANCES = "I can read it now.</think><answer>0</answer>"


def told(*texts: str) -> list[Trajectory]:
    samples = make_samples(len(texts))
    return LocalEngine().rollout(scripted(list(texts)), [Request(s, 0) for s in samples], GREEDY)


def gain(backbone: TimmLMBackbone, **options: object) -> InformationGain:
    reward = InformationGain(**options)  # type: ignore[arg-type]
    reward.setup(SFTModule(backbone))
    return reward


def test_it_is_the_difference_of_two_log_likelihoods(zooming: TimmLMBackbone) -> None:
    trajectories = told(LOOKS, LOOKS)
    backbone = fresh(zooming)
    answered = [with_answer(backbone, t, t.sample.answers[0]) for t in trajectories]
    seen, unseen = (
        log_likelihoods(backbone, version, 2048, 4096)
        for version in (answered, retold(answered, backbone, "blank", [], 0))
    )
    found = gain(backbone, cap=100.0).batch(trajectories)
    assert found == pytest.approx((seen - unseen).tolist(), abs=1e-5)
    assert max(map(abs, found)) > 1e-3


def test_a_policy_that_ignores_its_crops_gains_nothing(zooming: TimmLMBackbone) -> None:
    blind = fresh(zooming)
    blind.__class__ = Blind
    assert gain(blind).batch(told(LOOKS, LOOKS)) == pytest.approx([0.0, 0.0], abs=1e-6)


def test_without_a_look_there_is_no_gain_and_without_an_answer_no_knowing(zooming: TimmLMBackbone) -> None:
    looked, glanced = told(LOOKS, GLANCES)
    unknown = replace(looked, sample=replace(looked.sample, answers=()))
    values = gain(fresh(zooming)).batch([glanced, unknown])
    assert values[0] == 0.0
    assert math.isnan(values[1])


def test_what_cannot_be_swapped_is_not_judged(zooming: TimmLMBackbone) -> None:
    (alone,) = told(LOOKS)
    assert math.isnan(gain(fresh(zooming), instead="swap").batch([alone])[0])
    assert not any(map(math.isnan, gain(fresh(zooming), instead="swap").batch(told(LOOKS, LOOKS))))


def test_the_cap_acts(zooming: TimmLMBackbone) -> None:
    (value,) = gain(fresh(zooming), cap=1e-4).batch(told(LOOKS))
    assert abs(value) == pytest.approx(1e-4)
    with pytest.raises(ValueError, match="`cap` to be above 0"):
        InformationGain(cap=0.0)


def test_it_has_to_know_the_policy() -> None:
    with pytest.raises(PolicyError, match="policy that InformationGain asks"):
        InformationGain().batch(told(LOOKS))


def test_a_run_can_learn_from_it(zooming: TimmLMBackbone) -> None:
    rollout = RolloutCallback(
        sampler=GroupSampler(4),
        rewards={"gain": InformationGain()},
        decoding=Decoding(1.0, max_turns=3, max_turn_tokens=8),
    )
    runner = trainer(None, rollout, max_steps=1, max_epochs=-1, log_every_n_steps=1)
    runner.fit(RGRPOModule(fresh(zooming)), Batches([SampleBatch(make_samples(4))]))
    assert runner.callback_metrics["train/reward/failed/gain"] == 0
    assert abs(float(runner.callback_metrics["train/reward/gain"])) > 1e-4


TWICE = (
    '<think>I zoom in on red {"bbox_2d": [8, 12, 40, 44]}greenred card?blue {"bbox_2d": [0, 4, 20, 24]}'
    "redI can read it now.</think><answer>0</answer>"
)
REASONED = (["green", "red", " card?"], ["red", "I can read it now.</think><answer>"])  # behind each crop


def told_twice(*texts: str) -> list[Trajectory]:
    samples = make_samples(len(texts))
    decoding = Decoding(0.0, max_turns=3, max_turn_tokens=12)
    return LocalEngine().rollout(scripted(list(texts)), [Request(s, 0) for s in samples], decoding)


def greyed(trajectory: Trajectory, *places: int) -> Trajectory:
    """With grey in place of some of its crops."""
    instead = {
        turn.crop: replace(turn.crop, pixels=torch.full_like(turn.crop.pixels, GREY))
        for k, turn in enumerate(trajectory.turns)
        if turn.crop is not None and k in places
    }
    assert len(instead) == len(places)
    return replace(trajectory, visuals=tuple(instead.get(visual, visual) for visual in trajectory.visuals))


@torch.no_grad()
def own_log_probs(backbone: TimmLMBackbone, trajectory: Trajectory) -> torch.Tensor:
    """(C,) of the completion's tokens, by one full pass of the language model."""
    logits = plain_logits(backbone, trajectory).masked_fill(backbone.banned, -torch.inf)
    return logits.log_softmax(-1).gather(1, trajectory.completion_ids[:, None])[:, 0]


class TestTurns:
    def test_the_gain_of_a_look_is_what_its_own_crop_says(self, zooming: TimmLMBackbone) -> None:
        backbone, reward = fresh(zooming), gain(fresh(zooming), cap=100.0)
        trajectories = told_twice(TWICE, LOOKS, GLANCES, TWICE)
        found = reward.batch_turns(trajectories)
        assert [value for value, _ in found] == reward.batch(trajectories)  # as without credit
        for n in (0, 3):
            answered = with_answer(backbone, trajectories[n], trajectories[n].sample.answers[0])
            versions = [answered, greyed(answered, 0), greyed(answered, 1), greyed(answered, 0, 1)]
            seen, first, second, both = log_likelihoods(backbone, versions, 2048, 4096).tolist()
            assert found[n][1][:2] == pytest.approx([seen - first, seen - second], abs=1e-4)
            assert math.isnan(found[n][1][2])
            assert found[n][0] == pytest.approx(seen - both, abs=1e-4)
            assert abs(first - second) > 1e-3
        assert found[1][1][0] == found[1][0]  # of one look it is the trajectory's
        assert math.isnan(found[1][1][1])
        assert found[2][0] == 0
        assert all(map(math.isnan, found[2][1]))

    def test_the_gain_does_not_depend_on_how_many_are_asked_at_once(self, zooming: TimmLMBackbone) -> None:
        trajectories, found = told_twice(TWICE, LOOKS, TWICE), []
        for micro_batch in (None, 1, 2):
            reward = InformationGain(cap=100.0)
            reward.setup(SFTModule(fresh(zooming), micro_batch=micro_batch))
            found.append([v for _, turns in reward.batch_turns(trajectories) for v in turns if not math.isnan(v)])
        assert len(found[0]) == 5
        assert found[1] == pytest.approx(found[0], abs=1e-4)
        assert found[2] == pytest.approx(found[0], abs=1e-4)

    @pytest.mark.parametrize("instead", ["random", "swap"])
    def test_other_replacements_are_judged_too(self, zooming: TimmLMBackbone, instead: Any) -> None:
        found = gain(fresh(zooming), instead=instead).batch_turns(told_twice(TWICE, TWICE))
        assert all(not math.isnan(v) for _, turns in found for v in turns[:2])
        (alone,) = gain(fresh(zooming), instead=instead).batch_turns(told_twice(TWICE))
        assert math.isnan(alone[1][0]) == (instead == "swap")


class TestIntegration:
    def reward(self, backbone: TimmLMBackbone, **options: Any) -> Integration:
        made = Integration(**{"cap": 100.0, **options})
        made.setup(SFTModule(backbone))
        return made

    def test_it_is_the_difference_of_two_passes_over_the_reasoning(self, zooming: TimmLMBackbone) -> None:
        backbone = fresh(zooming)
        trajectories = told_twice(TWICE, LOOKS, TWICE)
        found = self.reward(backbone).batch_turns(trajectories)
        assert self.reward(backbone).batch(trajectories) == [value for value, _ in found]
        for n in (0, 2):
            t = trajectories[n]
            words = [backbone.detokenize(id) for id in t.completion_ids[:, None]]
            gaps = own_log_probs(backbone, t) - own_log_probs(backbone, greyed(t, 0, 1))
            expected = []
            for turn, told_words in zip(t.turns[1:], REASONED, strict=True):
                own = [k for k in range(turn.start, turn.stop) if words[k] in told_words]
                assert [words[k] for k in own] == told_words
                expected.append(gaps[own])
            assert math.isnan(found[n][1][0])  # nothing was seen yet
            assert found[n][1][1:] == pytest.approx([float(g.mean()) for g in expected], abs=1e-5)
            assert found[n][0] == pytest.approx(float(torch.cat(expected).mean()), abs=1e-5)
            assert abs(found[n][0]) > 1e-3

    def test_a_policy_that_ignores_its_crops_integrates_nothing(self, zooming: TimmLMBackbone) -> None:
        blind = fresh(zooming)
        blind.__class__ = Blind
        assert self.reward(blind).batch(told_twice(TWICE, LOOKS)) == pytest.approx([0.0, 0.0], abs=1e-6)

    def test_without_a_look_or_a_thought_behind_it_there_is_none(self, zooming: TimmLMBackbone) -> None:
        curt = LOOKS.replace("I can read it now.</think><answer>0</answer>", 'blue {"bbox_2d": [0, 4, 20, 24]}' * 3)
        glanced, silent = told_twice(GLANCES, curt)
        assert len(silent.turns) == 3
        assert self.reward(fresh(zooming)).batch([glanced, silent]) == [0.0, 0.0]

    def test_what_cannot_be_swapped_is_not_judged(self, zooming: TimmLMBackbone) -> None:
        looked, glanced = told_twice(LOOKS, GLANCES)
        sample = replace(glanced.sample, images=looked.sample.images)
        found = self.reward(fresh(zooming), instead="swap").batch([looked, replace(glanced, sample=sample)])
        assert math.isnan(found[0])
        assert found[1] == 0.0

    def test_the_cap_acts(self, zooming: TimmLMBackbone) -> None:
        ((value, turns),) = self.reward(fresh(zooming), cap=1e-4).batch_turns(told_twice(LOOKS))
        assert abs(value) == abs(turns[1]) == pytest.approx(1e-4)

    def test_it_does_not_depend_on_the_temperature_of_the_rollout(self, zooming: TimmLMBackbone) -> None:
        (looked,) = told_twice(LOOKS)
        found = [self.reward(fresh(zooming)).batch([replace(looked, temperature=t)]) for t in (1.0, 2.0)]
        assert found[0] == pytest.approx(found[1], abs=1e-6)
