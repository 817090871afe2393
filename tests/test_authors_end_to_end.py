"""The authors' files about real photographs, through the real entry point: warm-up, then R-GRPO from its checkpoint."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from commands.cli import cli
from modules.functional.boxes import iou
from modules.sft import SFTModule
from modules.trajectory import SampleBatch
from tests.conftest import CARD_QUESTION, CARDS

BASE: dict[str, Any] = {
    "model": {
        "class_path": "SFTModule",
        "init_args": {
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            "backbone": {
                "class_path": "TimmLMBackbone",
                "init_args": {
                    "box_space": "thousand",
                    "vision": {
                        "name": "vit_tiny_patch16_224",
                        "options": {
                            "img_size": 16,
                            "patch_size": 8,
                            "embed_dim": 16,
                            "depth": 1,
                            "num_heads": 2,
                            "class_token": False,
                            "global_pool": "",
                            "dynamic_img_size": True,
                        },
                    },
                    "language": {
                        "config": {
                            "model_type": "qwen2",
                            "hidden_size": 32,
                            "intermediate_size": 64,
                            "num_hidden_layers": 1,
                            "num_attention_heads": 4,
                            "num_key_value_heads": 2,
                            "max_position_embeddings": 128,
                        }
                    },
                    "tokenizer": {"vocabulary": {"coordinates": 51, "step": 20}},
                    "image": {"size": [16, 16]},
                    "crop": {"size": [16, 16]},
                },
            },
        },
    },
    "data": {"class_path": "AuthorsDataModule", "init_args": {"root": str(CARDS), "batch_size": 8}},
    "rollout": {
        "sampler": {"size": 4},
        "decoding": {"temperature": 1.0, "max_turns": 2, "max_turn_tokens": 8},
        "rewards": {"accuracy": {"class_path": "Accuracy"}, "format": {"class_path": "Format"}},
    },
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": -1,
        "max_steps": 3,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": "TrajectoryLogger"}],
    },
}
BAD_ROWS = 2  # in each file


def fragments(ranks: list[str]) -> list[str]:
    """What the rationales of the fixture are made of."""
    said = [CARD_QUESTION, '<think>The left-most card is here: {"bbox_2d": [', "It is a ", ".</think><answer>"]
    return [*said, "</answer>", *sorted(set(ranks))]


def spoil(path: Path) -> None:
    """Add a row whose photograph is missing and one without its question."""
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    mute = {key: value for key, value in rows[0].items() if key != "question"}
    path.write_text(json.dumps([*rows, {**rows[0], "image_path": "none.jpg"}, mute]))


def curves(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def values(events: EventAccumulator, tag: str) -> list[float]:
    return [event.value for event in events.Scalars(tag)]


def test_warm_up_and_r_grpo_on_the_authors_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    authors_sft: Path,
    authors_rgrpo: Path,
    left_cards: list[dict[str, Any]],
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil(authors_sft)
    spoil(authors_rgrpo)
    ranks = [card["rank"] for card in left_cards]
    config = deepcopy(BASE)
    backbone = config["model"]["init_args"]["backbone"]["init_args"]
    backbone["tokenizer"]["vocabulary"]["fragments"] = fragments(ranks)
    Path("base.yaml").write_text(yaml.safe_dump(config))
    fit = ["fit", "--config=base.yaml"]

    warm = cli([*fit, f"--data.train={authors_sft}", "--data.kind=sft", "--run_dir=sft"])

    events = curves(Path("sft"))
    assert values(events, "data/skipped") == [BAD_ROWS] * 3  # and so no rationale was refused
    losses = values(events, "train/loss")
    assert losses[-1] < losses[0]  # every step is on all rows
    assert isinstance(warm.model, SFTModule)
    assert warm.datamodule is not None
    (batch,) = warm.datamodule.train_dataloader()
    assert isinstance(batch, SampleBatch)
    replayed, refused = warm.model.replay(batch.samples)
    assert refused == []
    boxes = {card["image_path"]: (card["rank"], card["box"]) for card in left_cards}
    order = [card["image_path"] for card in left_cards]  # sample sft-<n> is row n of the file
    assert sorted(t.sample.id for t in replayed) == [f"sft-{n}" for n in range(1, len(order) + 1)]
    for trajectory in replayed:
        rank, box = boxes[order[int(trajectory.sample.id.removeprefix("sft-")) - 1]]
        (region,) = trajectory.regions
        assert float(iou(torch.tensor([region.box]), torch.tensor([box]))) > 0.8
        assert trajectory.answer == rank

    r_grpo = [f"--data.train={authors_rgrpo}", "--data.kind=rgrpo", "--trainer.max_steps=2", "--run_dir=rgrpo"]
    config["model"]["class_path"] = "RGRPOModule"
    config["model"]["init_args"] |= {
        "init_from": "sft/last.ckpt",
        "freeze": ["^vision"],
        "objective": {"drop_zero_variance": False},  # so young a policy earns nothing: all groups would be dropped
    }
    Path("rgrpo.yaml").write_text(yaml.safe_dump(config))
    cli(["fit", "--config=rgrpo.yaml", *r_grpo])

    events = curves(Path("rgrpo"))
    assert values(events, "data/skipped") == [BAD_ROWS] * 2
    assert len(values(events, "train/reward/accuracy")) == 2
    assert all(0 <= value <= 1 for value in values(events, "train/reward/accuracy"))
    assert "train/trajectory/group" in events.Tags()["images"]
    trained, untouched = (torch.load(f"{run}/last.ckpt", weights_only=True)["state_dict"] for run in ("rgrpo", "sft"))
    frozen = [name for name in trained if ".vision." in name]
    assert frozen
    assert all(torch.equal(trained[name], untouched[name]) for name in frozen)  # it did start from the warm-up
