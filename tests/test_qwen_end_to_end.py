"""The shipped recipes with a tiny random Qwen2.5-VL on real photographs: warm-up, R-GRPO with adapters, export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.families import build
from commands.cli import cli
from modules.functional.boxes import iou
from modules.rgrpo import RGRPOModule
from modules.sft import SFTModule
from tests.conftest import CARDS

CONFIGS = Path(__file__).parents[1] / "configs"
LIMITS = [4, 64]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny weights behind the real tokenizer and processor."""
    return build("qwen2_5_vl", tmp_path_factory.mktemp("qwen2_5_vl"), words=None)


@pytest.fixture
def overlay(tmp_path: Path, folder: Path) -> Path:
    """What makes a recipe small enough for a test."""
    backbone = {"model": str(folder), "image_tokens": LIMITS, "crop_tokens": LIMITS, "context_length": 1024}
    config: dict[str, Any] = {
        "model": {"init_args": {"backbone": {"init_args": backbone}, "micro_batch": 16}},
        "data": {"init_args": {"root": str(CARDS), "batch_size": 8, "num_workers": 0}},
        "trainer": {
            "accelerator": "cpu",
            "precision": "32-true",
            "enable_model_summary": False,
        },
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def fit(recipe: str, overlay: Path, *args: str) -> Any:
    backbone = CONFIGS / "backbones" / "qwen2_5_vl.yaml"
    return cli(["fit", f"--config={CONFIGS / recipe}", f"--config={backbone}", f"--config={overlay}", *args])


def scalars(run: str, tag: str) -> list[float]:
    events = EventAccumulator(run)
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


def test_warm_up_then_r_grpo_with_adapters_on_the_authors_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overlay: Path,
    authors_sft: Path,
    authors_rgrpo: Path,
    left_cards: list[dict[str, Any]],
    write_list: Callable[..., Path],
) -> None:
    monkeypatch.chdir(tmp_path)
    adam = "--model.init_args.optimizer.init_args.lr"
    data = f"--data.init_args.train={authors_sft}"
    warm = fit("sft.yaml", overlay, data, f"{adam}=3e-3", "--trainer.max_steps=3", "--run_dir=sft")

    assert isinstance(warm.model, SFTModule)
    losses = scalars("sft", "train/loss")
    assert losses[-1] < losses[0]
    assert scalars("sft", "data/skipped") == [0.0] * 3
    frozen = {warm.model.backbone.part(n) for n, p in warm.model.backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"vision", "projector"}
    (batch, *_) = warm.datamodule.train_dataloader()
    replayed, refused = warm.model.replay(batch.samples)
    assert not refused
    boxes = {f"sft-{n}": card["box"] for n, card in enumerate(left_cards, start=1)}
    for trajectory in replayed:
        (region,) = trajectory.regions
        box = boxes[trajectory.sample.id]
        assert float(iou(torch.tensor([region.box]), torch.tensor([box]))) > 0.8
        assert trajectory.turns[0].crop is not None

    run = fit(
        "rgrpo.yaml",
        overlay,
        f"--config={CONFIGS / 'lora.yaml'}",
        f"--data.init_args.train={authors_rgrpo}",
        "--data.init_args.batch_size=2",
        "--model.init_args.init_from=sft/last.ckpt",
        "--model.init_args.objective.drop_zero_variance=false",
        "--model.init_args.objective.beta=0.1",
        "--rollout.sampler.size=2",
        "--rollout.decoding.max_turn_tokens=12",
        "--rollout.decoding.max_turns=2",
        "--trainer.max_steps=2",
        "--run_dir=rgrpo",
    )
    assert isinstance(run.model, RGRPOModule)
    assert max(scalars("rgrpo", "train/sampler_gap")) < 1e-4
    assert scalars("rgrpo", "train/ratio") == pytest.approx([1.0, 1.0], abs=1e-4)
    assert scalars("rgrpo", "train/kl")[0] == pytest.approx(0.0, abs=1e-6)  # adapters begin at zero
    trained = {n.split(".")[-3] for n, p in run.model.backbone.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
