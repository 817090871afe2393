"""Every family computes a sequence the same in every way that training and rollouts do; and mistakes would show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from benchmarks import parity
from benchmarks.families import FAMILIES, build
from benchmarks.parity import LANDSCAPE, NAMES, PORTRAIT, failures, measure, pattern, question
from modules.backbones import hf_vlm
from modules.backbones.base import Backbone
from modules.backbones.hf_vlm import HFVLMBackbone
from modules.backbones.qwen_vl import QwenVLBackbone
from modules.backbones.scaling import ScalerConfig
from modules.replay import Replayer
from modules.trajectory import Trajectory

Get = Callable[[str], Backbone]
SIBLINGS = ("qwen3_vl_moe", "idefics3")  # differ from qwen3_vl and smolvlm in the language model or in name only


@pytest.fixture(scope="session")
def get(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """The tiny backbone of a name; made once."""
    made: dict[str, Backbone] = {}

    def get_one(name: str) -> Backbone:
        if name not in made:
            made[name] = parity.backbone_of(name, tmp_path_factory.mktemp(name)).eval()
        return made[name]

    return get_one


def written(backbone: Backbone) -> list[Trajectory]:
    """Two crops on a landscape image; one on a portrait image."""
    samples = [question("wide", pattern(*LANDSCAPE, seed=0), 2), question("tall", pattern(*PORTRAIT, seed=1), 1)]
    trajectories, skipped = Replayer(backbone)(samples)
    assert not skipped
    return trajectories


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SIBLINGS else n for n in NAMES])
def test_all_ways_to_compute_a_sequence_agree(name: str, get: Get) -> None:
    results = measure(get(name))
    assert failures(results, tolerance=1e-4) == []
    assert results["control_logit_std"] >= 1
    of_processor = {"prompt_ids_match", "full_vs_processor"}
    assert set(results) - of_processor == {
        "full_vs_native",
        "full_vs_native_portrait",
        "full_vs_native_no_crops",
        "full_vs_native_text_only",
        "incremental_vs_full",
        "packed_vs_single",
        "rollout_vs_replay",
        "rollout_vs_learner",
        "ratio_error",
        "batch_vs_single",
        "batch_vs_single_tokens",
        "box_round_trip",
        "control_crop_swapped",
        "control_positions_shifted",
        "control_logit_std",
    }
    assert of_processor <= set(results) or name == "timm_lm"


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("qwen2_5_vl", 3 * 5),  # 84 x 140 pixels, 28 a token
        ("qwen3_vl", 3 * 4),  # 96 x 128, 32 a token
        ("glm4v", 3 * 5),
        ("smolvlm", (3 * 3 + 1) * 4),  # the longer side 84: three by three tiles of 28, and the whole
        ("internvl", (3 * 2 + 1) * 4),  # six tiles in the shape that is nearest to 131 : 90, and the whole
        ("llava_onevision", 4 + 3 * 4 + 3),  # the whole; two by two tiles without the rows of padding; ends of rows
        ("gemma3", 16),
    ],
)
def test_images_are_cut_as_the_family_cuts_them(name: str, tokens: int, get: Get) -> None:
    (visual,) = get(name).see([pattern(*LANDSCAPE, seed=0)])
    assert visual.tokens == tokens


@pytest.mark.parametrize("name", ["gemma3", "internvl"])
def test_eager_attention_agrees(name: str, tmp_path: Path) -> None:
    limits = ScalerConfig(min_pixels=4 * 28**2, max_pixels=64 * 28**2)
    backbone = HFVLMBackbone(str(build(name, tmp_path)), image=limits, crop=limits, attn_implementation="eager").eval()
    trajectories = written(backbone)
    assert parity.full_vs_native(backbone, trajectories[0]) < 1e-4
    assert parity.incremental_vs_full(backbone, trajectories) < 1e-4


def test_positions_in_one_dimension_would_show(get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = get("qwen2_5_vl")
    trajectory = written(backbone)[0]
    monkeypatch.setattr(QwenVLBackbone, "positions", Backbone.positions)
    assert parity.full_vs_native(backbone, trajectory) > 0.1
    assert parity.incremental_vs_full(backbone, [trajectory]) < 1e-4  # wrong alike: it takes Hugging Face to tell


def test_positions_that_forget_a_crop_would_show(get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = get("qwen2_5_vl")
    trajectories = written(backbone)
    right = backbone.positions

    def stale(ids: torch.Tensor, visuals: list[object], start: int) -> tuple[torch.Tensor, int]:
        places, after = right(ids, visuals, start)  # type: ignore[arg-type]
        return places, after + (1 if visuals and start else 0)

    monkeypatch.setattr(backbone, "positions", stale)
    assert parity.incremental_vs_full(backbone, trajectories) > 0.1
    assert parity.rollout_vs_learner(backbone, trajectories)["rollout_vs_learner"] > 0.1


def test_features_that_miss_the_deeper_layers_would_show(get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = get("qwen3_vl")
    trajectory = written(backbone)[0]
    monkeypatch.setattr(QwenVLBackbone, "_encode", HFVLMBackbone._encode)
    monkeypatch.setattr(backbone, "features", backbone.encode)  # not those that are kept
    assert parity.full_vs_native(backbone, trajectory) > 0.1


def test_images_that_are_read_causally_would_show(get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = get("gemma3")
    trajectory = written(backbone)[0]
    monkeypatch.setattr(backbone, "bidirectional_visuals", False)
    assert parity.full_vs_native(backbone, trajectory) > 0.1


def test_a_window_that_does_not_act_would_show(get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = get("gemma3")
    trajectory = written(backbone)[0]
    monkeypatch.setattr(hf_vlm, "layer_masks", lambda mask, *_: mask)
    assert parity.full_vs_native(backbone, trajectory) > 0.1


def test_rows_that_see_each_other_would_show(get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = get("internvl")
    samples = [question(f"wide-{k}", image, k) for image in [pattern(*LANDSCAPE, seed=0)] for k in (1, 2)]
    trajectories, _ = Replayer(backbone)(samples)
    collate = parity.collate

    def one_segment(*args: object, **kwargs: object) -> object:
        batch = collate(*args, **kwargs)  # type: ignore[arg-type]
        batch.segment_ids.clamp_(max=0)
        return batch

    assert parity.packed_vs_single(backbone, trajectories) < 1e-4
    monkeypatch.setattr(parity, "collate", one_segment)
    assert parity.packed_vs_single(backbone, trajectories) > 0.1


def test_a_told_trajectory_writes_its_script_and_records_the_policy(get: Get) -> None:
    backbone = get("timm_lm")
    trajectory = written(backbone)[0]
    results = parity.rollout_vs_learner(backbone, [trajectory])
    assert results["rollout_vs_replay"] == 0
    words = parity.script(backbone, trajectory, cut=0)
    with parity.told({7: [*words[:-1], None]}):  # the last token is its own
        (rolled,) = parity.LocalEngine().rollout(
            backbone, [parity.Request(trajectory.sample, 7)], parity.Decoding(max_turn_tokens=len(words))
        )
    n = len(trajectory.completion_ids) - 1
    assert torch.equal(rolled.completion_ids[:n], trajectory.completion_ids[:n])
    written_log_probs = rolled.log_probs[:n][rolled.sampled[:n]]
    assert (written_log_probs < -1).any()  # what it was told is not what it would have written
    assert written_log_probs.std() > 0.5


def test_failures_name_what_is_wrong() -> None:
    good = {"full_vs_native": 1e-6, "control_crop_swapped": 3.0, "control_logit_std": 1.5}
    assert failures(good) == []
    bad = {"full_vs_native": 2e-4, "ratio_error": float("nan"), "control_crop_swapped": 0.01}
    assert [sentence.split()[0] for sentence in failures(bad)] == list(bad)
    assert failures({"full_vs_native": 2e-4}, tolerance=1e-3) == []


def test_command_prints_one_object_and_its_exit_code_says_whether_all_is_well(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert parity.main(["--backbone", "timm_lm", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert failures(results) == []
    assert all(isinstance(value, float) for value in results.values())
    assert parity.main(["--backbone", "timm_lm", "--tolerance", "1e-9"]) == 1
    output = capsys.readouterr()
    assert "incremental_vs_full" in output.out
    assert "incremental_vs_full is" in output.err


def test_command_names_what_there_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert parity.main(["--backbone", "qwen2vl"]) == 2
    output = capsys.readouterr()
    assert not output.out
    assert output.err.count("\n") == 1
    assert all(name in output.err for name in NAMES)
    assert parity.main(["--backbone", str(tmp_path)]) == 2  # a folder with nothing in it
    assert str(tmp_path) in capsys.readouterr().err


def test_a_folder_is_measured_as_the_backbone_that_it_holds(tmp_path: Path) -> None:
    qwen = parity.backbone_of(str(build("qwen2_vl", tmp_path / "a")), tmp_path)
    other = parity.backbone_of(str(build("smolvlm", tmp_path / "b")), tmp_path)
    assert isinstance(qwen, QwenVLBackbone)
    assert isinstance(other, HFVLMBackbone)
    assert not isinstance(other, QwenVLBackbone)


def test_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    folders = [build("gemma3", tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert torch.equal(torch.rand(3), expected)  # it leaves the global generator alone
    a, b, c = (AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in folders)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a[key], c[key]) for key in a)
    with pytest.raises(ValueError, match=", ".join(FAMILIES)):
        build("gemma", tmp_path / "d")
