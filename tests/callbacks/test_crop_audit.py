"""Does the audit tell a policy that uses its crops from one that ignores them?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from callbacks.crop_audit import CropAudit, evenly
from callbacks.rollout import RolloutCallback
from modules.backbones.timm_lm import TimmLMBackbone
from modules.counterfactual import replace_crops, retold, with_answer
from modules.engine import Decoding, LocalEngine, Request
from modules.rewards import Accuracy
from modules.sft import SFTModule
from modules.trajectory import Group, Region, SampleBatch, Trajectory
from tests.conftest import Blind, make_samples, scripted
from tests.fitting import Batches, fresh, trainer

GREEDY = Decoding(0.0, max_turns=3, max_turn_tokens=8)
BOX = '<think>I zoom in on red {"bbox_2d": [8, 12, 40, 44]}'
ANSWER = "I can read it now.</think><answer>0</answer>"


def looked(count: int = 4) -> list[Trajectory]:
    backbone = scripted([f"{BOX}{ANSWER}"] * count)
    return LocalEngine().rollout(backbone, [Request(s, 0) for s in make_samples(count)], GREEDY)


def audited(backbone: TimmLMBackbone, micro_batch: int | None = None, **options: object) -> dict[str, float]:
    rollout = RolloutCallback(rewards={"accuracy": Accuracy()}, evaluations={"greedy": GREEDY})
    audit = CropAudit(**{"share": 1.0, **options})  # type: ignore[arg-type]
    runner = trainer(None, rollout, audit, limit_val_batches=1.0)
    module = SFTModule(backbone, micro_batch=micro_batch)
    runner.validate(module, Batches([SampleBatch(make_samples(8))]), verbose=False)
    return {name: float(value) for name, value in runner.callback_metrics.items()}


def test_the_audit_tells_a_policy_that_uses_its_crops_from_one_that_ignores_them(zooming: TimmLMBackbone) -> None:
    seeing, blind = fresh(zooming), fresh(zooming)
    blind.__class__ = Blind
    sees, ignores = audited(seeing), audited(blind)
    assert sees["val/crops"] > 0.3
    for how in ("blank", "random", "swap"):
        assert abs(sees[f"val/audit/{how}/log_likelihood_gap"]) > 1e-3
        assert ignores[f"val/audit/{how}/log_likelihood_gap"] == pytest.approx(0.0, abs=1e-6)
        assert ignores[f"val/audit/{how}/accuracy_gap"] == 0.0


def test_trajectories_one_at_a_time_are_audited_alike(zooming: TimmLMBackbone) -> None:
    together, apart = audited(fresh(zooming)), audited(fresh(zooming), micro_batch=1)
    name = "val/audit/blank/log_likelihood_gap"
    assert apart[name] == pytest.approx(together[name], abs=1e-4)
    assert abs(apart["val/audit/swap/log_likelihood_gap"]) > 1e-3  # images of the other questions are there to swap


def test_accuracy_gap_is_what_is_lost_without_the_crop(zooming: TimmLMBackbone) -> None:
    found = audited(fresh(zooming), replacements=["blank"])
    gap = found["val/accuracy"] - found["val/audit/blank/accuracy"]
    assert found["val/audit/blank/accuracy_gap"] == pytest.approx(gap)
    assert not any("swap" in name for name in found)


def test_replacements_keep_sizes_and_change_contents() -> None:
    backbone = scripted([])
    images = [s.images[0] for s in make_samples(2)]
    regions = [Region((0.0, 0.0, 20.0, 30.0)), Region((30.0, 10.0, 64.0, 64.0))]
    crops = backbone.look(images, regions)
    for how in ("blank", "random", "swap"):
        instead = replace_crops(backbone, how, crops, images, regions, images, [1, 2])  # type: ignore[arg-type]
        for crop, other in zip(crops, instead, strict=True):
            assert other.pixels.shape == crop.pixels.shape
            assert (other.tokens, other.role) == (crop.tokens, "crop")
            assert float((other.pixels - crop.pixels).abs().mean()) > 0.05
    swapped = replace_crops(backbone, "swap", crops, images, regions, images, [1, 2])
    expected = backbone.look([images[1], images[0]], regions)  # equal sizes: the same place on the other image
    for one, other in zip(swapped, expected, strict=True):
        torch.testing.assert_close(one.pixels, other.pixels)


def test_random_places_depend_on_the_seed_alone() -> None:
    backbone = scripted([])
    image = make_samples(1)[0].images[0]
    regions = [Region((0.0, 0.0, 20.0, 30.0))]
    crops = backbone.look([image], regions)

    def place(seed: int) -> Tensor:
        return replace_crops(backbone, "random", crops, [image], regions, [], [seed])[0].pixels

    assert torch.equal(place(1), place(1))
    assert not torch.equal(place(1), place(2))


def test_swapping_needs_a_second_image() -> None:
    backbone = scripted([])
    image = make_samples(1)[0].images[0]
    regions = [Region((0.0, 0.0, 20.0, 30.0))]
    with pytest.raises(ValueError, match="another image to swap"):
        replace_crops(backbone, "swap", backbone.look([image], regions), [image], regions, [image], [0])


def test_a_retold_trajectory_has_other_crops_and_the_same_tokens() -> None:
    trajectories = looked()
    again = retold(trajectories, scripted([]), "blank", [], seed=0)
    for one, other in zip(trajectories, again, strict=True):
        assert torch.equal(one.completion_ids, other.completion_ids)
        assert one.visuals[0] is other.visuals[0]
        assert one.visuals[1] is not other.visuals[1]
        assert other.turns[0].crop is other.visuals[1]


def test_another_answer_stands_where_the_answer_stood() -> None:
    backbone = scripted([])
    (trajectory,) = looked(1)
    told = with_answer(backbone, trajectory, "7")
    assert backbone.detokenize(told.completion_ids).endswith("I can read it now.</think><answer>7</answer>")
    assert backbone.detokenize(told.completion_ids[told.sampled]) == "7</answer>"
    assert len(told.completion_ids) == len(trajectory.completion_ids)
    same = with_answer(backbone, trajectory, "0")
    assert torch.equal(same.completion_ids, trajectory.completion_ids)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"share": 0.0}, "share"), ({"replacements": ["noise"]}, "noise"), ({"replacements": []}, "replacements")],
)
def test_impossible_audits_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CropAudit(**wrong)  # type: ignore[arg-type]


def test_an_audit_needs_the_mode_and_the_accuracy(zooming: TimmLMBackbone) -> None:
    with pytest.raises(ValueError, match=r"`mode` to be one of .*greedy"):
        audited(fresh(zooming), mode="sampled")
    runner = trainer(None, RolloutCallback(evaluations={"greedy": GREEDY}), CropAudit(), limit_val_batches=1.0)
    with pytest.raises(ValueError, match="to hold `accuracy`"):
        runner.validate(SFTModule(fresh(zooming)), Batches([SampleBatch(make_samples(2))]), verbose=False)


@pytest.mark.parametrize(("count", "share", "places"), [(8, 0.25, [0, 4]), (3, 0.1, [0]), (4, 1.0, [0, 1, 2, 3])])
def test_a_share_is_evenly_spaced(count: int, share: float, places: list[int]) -> None:
    none = torch.zeros(1)
    groups = [Group(s, (), {}, none, none) for s in make_samples(count)]
    assert [groups.index(g) for g in evenly(groups, share)] == places
    assert evenly([], share) == []
