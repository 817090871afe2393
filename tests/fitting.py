"""What tests of training share: a data module out of batches, a record of what was logged, a plain forward pass."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from modules.backbones.timm_lm import TimmLMBackbone
from modules.trajectory import Region, Sample, SampleBatch, Step, Trajectory
from tests.conftest import make_samples


class Batches(L.LightningDataModule):
    """The same batches in every stage; new ones each time, for callbacks write into them."""

    def __init__(self, batches: list[SampleBatch]) -> None:
        super().__init__()
        self.batches = batches

    def loader(self) -> DataLoader[int]:
        def make(indices: list[int]) -> SampleBatch:
            batch = self.batches[indices[0]]
            return SampleBatch(list(batch.samples), groups=list(batch.groups))

        return DataLoader(range(len(self.batches)), collate_fn=make)  # type: ignore[arg-type]

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


class Recorder(L.Callback):
    """What was logged at each training batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class RecordingSGD(torch.optim.SGD):
    """Remembers the learning rate of each step."""

    rates: list[float]

    def step(self, closure: Any = None) -> Any:
        self.rates = [*getattr(self, "rates", []), self.param_groups[0]["lr"]]
        return super().step(closure)


def trainer(folder: Path | None = None, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """On the CPU, silent, leaving nothing behind but what a test asks for."""
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "log_every_n_steps": 1,
            "default_root_dir": folder,
            "callbacks": list(callbacks),
            **options,
        }
    )


def fit(module: L.LightningModule, batches: list[SampleBatch], *callbacks: L.Callback, **options: Any) -> Recorder:
    """Train, one epoch unless ``max_epochs`` or ``max_steps`` says more; returns what was logged."""
    recorder = Recorder()
    options = {"max_epochs": -1 if "max_steps" in options else 1, **options}
    trainer(None, *callbacks, recorder, **options).fit(module, Batches(batches))
    return recorder


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference between two sets of weights."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def fresh(backbone: TimmLMBackbone) -> TimmLMBackbone:
    """A copy that may be trained."""
    return copy.deepcopy(backbone)


def ragged_samples() -> list[Sample]:
    """Six questions whose rationales differ much in length: five look once, twice or not at all, one has few words."""
    samples = make_samples(6)
    look, last = samples[0].rationale
    samples[1] = replace(samples[1], rationale=(look, Step("blue ", Region((8, 8, 40, 40))), look, last))
    samples[2] = replace(samples[2], rationale=(Step("<think>I zoom in on redbluegreen" + last.text),))
    samples[4] = replace(samples[4], rationale=(Step("7</answer>"),))
    return samples


def plain_logits(backbone: TimmLMBackbone, trajectory: Trajectory) -> Tensor:
    """(C, V) what predicts each token of the completion, by one full pass of the language model over this one alone."""
    ids = torch.cat([trajectory.prompt_ids, trajectory.completion_ids])
    embeddings = backbone.merge(
        backbone.embed(ids[None]), (ids == backbone.image_token_id)[None], backbone.encode(trajectory.visuals)
    )
    logits: Tensor = backbone.language(inputs_embeds=embeddings).logits[0]
    return logits[len(trajectory.prompt_ids) - 1 : -1]
