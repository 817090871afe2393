"""What a crop is worth: a policy that reads it gains, one that ignores it does not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from callbacks.rollout import RolloutCallback
from modules.backbones.timm_lm import TimmLMBackbone
from modules.counterfactual import log_likelihoods, retold, with_answer
from modules.engine import Decoding, GroupSampler, LocalEngine, Request
from modules.policy import PolicyError
from modules.rewards import InformationGain
from modules.rgrpo import RGRPOModule
from modules.sft import SFTModule
from modules.trajectory import SampleBatch, Trajectory
from tests.conftest import Blind, make_samples, scripted
from tests.fitting import Batches, fresh, trainer

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
