"""A run that goes on takes the batches, steps and places on the curves that it would have taken, however often."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from torch.utils.data import DataLoader, Dataset

from callbacks.stop import validates
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

    def val_dataloader(self) -> DataLoader[int]:
        return DataLoader([0], collate_fn=lambda _: SampleBatch(make_samples(1)))  # type: ignore[arg-type]


class Book(L.Callback):
    """What came, and where on the curves: (epoch, batch, place, questions); and the validations: (epoch, place), at
    the steps behind which they came. Saves each of them, and ends behind a batch, or the validation that is due there.
    """

    def __init__(self, file: Path, end: int, patient: bool) -> None:
        self.file, self.end, self.patient = file, end, patient
        self.rows: dict[int, Any] = {}
        self.validations: dict[int, Any] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: SampleBatch, k: int) -> None:
        place = trainer.fit_loop.epoch_loop._batches_that_stepped
        self.rows[trainer.global_step] = (trainer.current_epoch, k, place, [s.id for s in batch.samples])
        trainer.save_checkpoint(self.file)
        if trainer.global_step == self.end and not (self.patient and validates(trainer)):
            raise Stop

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        assert trainer.global_step not in self.validations  # never twice
        place = trainer.fit_loop.epoch_loop._batches_that_stepped
        self.validations[trainer.global_step] = (trainer.current_epoch, place)
        trainer.save_checkpoint(self.file)
        if trainer.global_step == self.end:
            raise Stop


def attempt(
    file: Path, end: int, dropout: bool = False, patient: bool = False, **options: Any
) -> tuple[Book, SFTModule]:
    module = SFTModule(make_backbone(), optimizer=ADAM)
    if dropout:
        module.backbone.language.config.attention_dropout = 0.2
        for layer in module.backbone.language.model.layers:
            layer.self_attn.attention_dropout = 0.2
    book = Book(file, end, patient)
    made = trainer(None, book, **options)
    with suppress(Stop):
        made.fit(module, Data(), ckpt_path=str(file) if file.exists() else None, weights_only=True)
    return book, module


@pytest.mark.parametrize("length", [{"max_epochs": 4}, {"max_epochs": -1, "max_steps": 12}])
@pytest.mark.parametrize("ends", [[6, 7], [3, 4, 5, 6, 9, 11], [2, 4, 8]])  # an epoch has three
def test_it_goes_on_where_it_was(ends: list[int], length: dict[str, int], tmp_path: Path) -> None:
    book, whole = attempt(tmp_path / "whole.ckpt", 99, dropout=True, **length)
    assert len(book.rows) == 12
    found: dict[int, Any] = {}
    for end in [*ends, 99]:
        part, module = attempt(tmp_path / "last.ckpt", end, dropout=True, **length)
        found |= part.rows
    assert found == book.rows
    assert furthest(weights(module), weights(whole)) == 0


VALIDATION = {  # of four epochs of three batches: how it is asked for, and the steps behind which it comes
    "each epoch": ({}, [3, 6, 9, 12]),
    "every other epoch": ({"check_val_every_n_epoch": 2}, [6, 12]),
    "within an epoch": ({"val_check_interval": 2}, [2, 5, 8, 11]),
    "behind each batch": ({"val_check_interval": 1}, list(range(1, 13))),
    "across epochs": ({"val_check_interval": 2, "check_val_every_n_epoch": None}, [2, 4, 6, 8, 10, 12]),
}


@pytest.mark.parametrize("patient", [True, False])
@pytest.mark.parametrize("name", VALIDATION)
def test_it_goes_on_where_it_was_with_validations(name: str, patient: bool, tmp_path: Path) -> None:
    """A stop that waits for the validation that is due loses none; one that does not loses that one alone."""
    often, steps = VALIDATION[name]
    ends = [3, 4, 5, 6, 9, 11]
    options = {"max_epochs": 4, "limit_val_batches": 1, "patient": patient, **often}
    book, whole = attempt(tmp_path / "whole.ckpt", 99, **options)
    assert sorted(book.validations) == steps
    rows: dict[int, Any] = {}
    validations: dict[int, Any] = {}
    for end in [*ends, 99]:
        part, module = attempt(tmp_path / "last.ckpt", end, **options)
        assert not validations.keys() & part.validations.keys()
        rows |= part.rows
        validations |= part.validations
    assert rows == book.rows
    lost = set() if patient else {*ends}
    assert validations == {step: found for step, found in book.validations.items() if step not in lost}
    assert furthest(weights(module), weights(whole)) == 0
