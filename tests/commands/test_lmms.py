"""The policy in lmms-eval's own interface: its requests, its registry. Skipped where the harness is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("lmms_eval.api.model", reason="lmms-eval is not installed (pip install 'vlm-r3[lmms-eval]')")

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelRegistryV2

from commands.lmms import MANIFEST, VLMR3, pixels
from modules.trajectory import Sample
from tests.conftest import Scripted

ROOT = Path(__file__).parents[2]
RUN: dict[str, Any] = yaml.safe_load((ROOT / "configs/quickstart/base.yaml").read_text())


@pytest.fixture
def model(tmp_path: Path) -> VLMR3:
    """The quickstart's policy with random weights, as a checkpoint and a config.yaml of a run."""
    from commands.export import build

    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": RUN["model"]}))
    torch.manual_seed(0)
    weights = build(RUN["model"]["init_args"]["backbone"]).state_dict()
    state = {f"backbone.{name}": value for name, value in weights.items()}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.0"}, tmp_path / "last.ckpt")
    arguments = f"ckpt={tmp_path / 'last.ckpt'},max_turns=3,max_turn_tokens=8"
    made = VLMR3.create_from_arg_string(arguments, {"batch_size": 2, "device": "cpu"})
    assert torch.equal(made.backbone.state_dict()["spatial_scale"], weights["spatial_scale"])
    return made


def requests(options: dict[str, Any], count: int = 3) -> list[Instance]:
    return [
        Instance(
            request_type="generate_until",
            arguments=(
                "<image>Which digit is on the red card?",
                options,
                lambda doc: [doc["image"]],
                k,
                "cards",
                "test",
            ),
            idx=k,
            metadata={"task": "cards", "doc_id": k, "repeats": 1},
        )
        for k in range(count)
    ]


def test_the_harness_finds_it_by_its_manifest() -> None:
    registry = ModelRegistryV2()
    registry.register_manifest(MANIFEST)
    assert registry.get_model_class("vlm_r3") is VLMR3
    assert issubclass(VLMR3, lmms)


def test_it_zooms_and_gives_the_final_answer(model: VLMR3) -> None:
    picture = Image.new("RGB", (192, 192), "red")
    model.task_dict["cards"] = {"test": [{"image": picture}] * 3}
    writes = '<think>I zoom in on red {"bbox_2d": [48, 48, 96, 96]}I can read it now.</think><answer>7</answer>'
    model.backbone.__class__ = Scripted
    assert isinstance(model.backbone, Scripted)
    looked: list[int] = []
    look = model.backbone.look

    def watched(images: Any, regions: Any) -> Any:
        looked.append(len(regions))
        return look(images, regions)

    model.backbone.look = watched  # type: ignore[method-assign]
    model.backbone.script([writes])
    assert model.generate_until(requests({"until": ["\n\n"], "max_new_tokens": 1}, count=1)) == ["7"]
    assert sum(looked) == 1


def test_answers_come_in_the_order_of_the_requests(model: VLMR3) -> None:
    pictures = [Image.effect_noise((192, 192), 60 + 40 * k) for k in range(3)]
    model.task_dict["cards"] = {"test": [{"image": picture} for picture in pictures]}
    sampled, greedy = {"temperature": 1.0, "do_sample": True}, {"temperature": 1.0, "do_sample": False}
    said = model.generate_until([*requests(sampled)[:2], *requests(greedy)[2:]])
    alone = [model.generate_until([each])[0] for each in (*requests(sampled)[:2], *requests(greedy)[2:])]
    assert said == alone
    assert json.dumps(said)  # texts
    assert model.decoding_of(greedy).temperature == 0.0
    assert model.decoding_of(sampled).temperature == 1.0


def test_a_request_becomes_a_question(model: VLMR3) -> None:
    model.task_dict["cards"] = {"test": [{"image": Image.new("L", (6, 4), 255)}]}
    sample = model.sample_of(requests({}, 1)[0])
    assert isinstance(sample, Sample)
    assert sample.question == "Which digit is on the red card?"
    assert sample.images[0].shape == (3, 4, 6)
    with pytest.raises(TypeError, match="Expected pictures, but got str"):
        pixels("clip.mp4")


def test_what_it_cannot_do_is_said(model: VLMR3) -> None:
    with pytest.raises(NotImplementedError, match="take a task that generates"):
        model.loglikelihood([])
    with pytest.raises(ValueError, match="`ckpt` or `config`"):
        VLMR3()
