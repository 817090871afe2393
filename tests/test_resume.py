"""A run that goes on takes the batches, steps and places on the curves that it would have taken, however often."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import Dataset

from datamodules.sampler import EpochOrder, SampleLoader
from modules.sft import SFTModule
from modules.trajectory import SampleBatch
from tests.conftest import make_backbone, make_samples
from tests.fitting import furthest, trainer, weights
from tests.learning import ADAM

pytestmark = pytest.mark.filterwarnings("ignore")


class Stop(Exception):
    """The process ends here."""


class Listed(Dataset[SampleBatch]):
    def __getitems__(self, indices: list[int]) -> SampleBatch:
        return SampleBatch([make_samples(12)[k] for k in indices])


class Data(L.LightningDataModule):
    """Three batches an epoch, in another order each."""

    def train_dataloader(self) -> SampleLoader:
        return SampleLoader(Listed(), EpochOrder([[k] for k in range(12)], batch_size=4, shuffle=True))

    def transfer_batch_to_device(self, batch: SampleBatch, device: torch.device, dataloader_idx: int) -> SampleBatch:
        return batch


class Book(L.Callback):
    """What came, and where on the curves: (epoch, batch, place, questions). Saves each batch, and ends behind one."""

    def __init__(self, file: Path, end: int) -> None:
        self.file, self.end, self.rows = file, end, {}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: SampleBatch, k: int) -> None:
        place = trainer.fit_loop.epoch_loop._batches_that_stepped
        self.rows[trainer.global_step] = (trainer.current_epoch, k, place, [s.id for s in batch.samples])
        trainer.save_checkpoint(self.file)
        if trainer.global_step == self.end:
            raise Stop


def attempt(file: Path, end: int, dropout: bool = False, **options: Any) -> tuple[dict[int, Any], SFTModule]:
    module = SFTModule(make_backbone(), optimizer=ADAM)
    if dropout:
        module.backbone.language.config.attention_dropout = 0.2
        for layer in module.backbone.language.model.layers:
            layer.self_attn.attention_dropout = 0.2
    book = Book(file, end)
    made = trainer(None, book, **options)
    with suppress(Stop):
        made.fit(module, Data(), ckpt_path=str(file) if file.exists() else None, weights_only=True)
    return book.rows, module


@pytest.mark.parametrize("length", [{"max_epochs": 4}, {"max_epochs": -1, "max_steps": 12}])
@pytest.mark.parametrize("ends", [[6, 7], [3, 4, 5, 6, 9, 11], [2, 4, 8]])  # an epoch has three
def test_it_goes_on_where_it_was(ends: list[int], length: dict[str, int], tmp_path: Path) -> None:
    expected, whole = attempt(tmp_path / "whole.ckpt", 99, dropout=True, **length)
    assert len(expected) == 12
    found: dict[int, Any] = {}
    for end in [*ends, 99]:
        rows, module = attempt(tmp_path / "last.ckpt", end, dropout=True, **length)
        found |= rows
    assert found == expected
    assert furthest(weights(module), weights(whole)) == 0
