"""What a signal does to a run: it ends behind its step, and goes on from there."""

from __future__ import annotations

import csv
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from callbacks.rollout import RolloutCallback
from callbacks.stop import CleanStop
from datamodules.sampler import EpochOrder, SampleLoader
from modules.backbones.timm_lm import TimmLMBackbone
from modules.engine import Decoding, GroupSampler
from modules.objective import Objective
from modules.rewards import Reward
from modules.rgrpo import RGRPOModule
from modules.sft import SFTModule
from modules.trajectory import SampleBatch, Trajectory
from tests.conftest import make_backbone, make_samples
from tests.fitting import Batches, fit, fresh, furthest, trainer, weights
from tests.learning import ADAM, LIMITS

pytestmark = pytest.mark.filterwarnings("ignore")


class Same(Reward):
    """Likes everything."""

    def __call__(self, trajectory: Trajectory) -> float:
        return 1.0


class Signals(L.Callback):
    """Sends a signal to this process in the middle of a batch."""

    def __init__(self, number: int, at: int) -> None:
        self.number, self.at = number, at

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.at:
            os.kill(os.getpid(), self.number)


class Resumable(Batches):
    """The same batches by the loader that goes on in the middle of an epoch."""

    def train_dataloader(self) -> SampleLoader:  # type: ignore[override]
        whole = self.batches

        class One(torch.utils.data.Dataset[SampleBatch]):
            def __getitems__(self, indices: list[int]) -> SampleBatch:
                return SampleBatch(list(whole[indices[0]].samples))

        return SampleLoader(One(), EpochOrder([[k] for k in range(len(whole))], batch_size=1, shuffle=False))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_behind_its_step_and_it_goes_on_from_there(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = [SampleBatch(make_samples(2, seed=k)) for k in range(5)]

    def run(*more: L.Callback, **options: Any) -> SFTModule:
        module = SFTModule(make_backbone(), optimizer=partial(torch.optim.AdamW, lr=1e-3))
        saver = L.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True, enable_version_counter=False)
        made = trainer(tmp_path, CleanStop(), *more, saver, max_epochs=1, enable_checkpointing=True)
        made.fit(module, Resumable(batches), **options)
        return module

    whole = weights(run())
    (tmp_path / "last.ckpt").unlink()
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as end:
        run(Signals(number, at=2))
    assert end.value.code == 128 + number
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert "stopped behind step 3" in capsys.readouterr().out
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
    assert furthest(whole, weights(run(ckpt_path=str(tmp_path / "last.ckpt")))) == 0


class Measured(Resumable):
    """The same batches to train on, one to validate on."""

    def val_dataloader(self) -> Any:  # type: ignore[override]
        return torch.utils.data.DataLoader([0], collate_fn=lambda _: SampleBatch(make_samples(1)))


class WhileValidating(L.Callback):
    """Asks for the end in the middle of a validation."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


class BeforeValidating(WhileValidating):
    """Asks for it in the batch before."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.at - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        pass


@pytest.mark.parametrize("asks", [WhileValidating, BeforeValidating])
@pytest.mark.parametrize("at", [2, 4])
def test_a_signal_in_or_before_a_validation_ends_the_run_behind_it(
    at: int, asks: type[WhileValidating], tmp_path: Path
) -> None:
    batches = [SampleBatch(make_samples(2, seed=k)) for k in range(4)]
    went_on: list[int] = []
    measured: list[int] = []

    class Next(L.Callback):
        def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            went_on.append(trainer.global_step)

        def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            measured.append(trainer.global_step)

    def run(*more: L.Callback, **options: Any) -> SFTModule:
        module = SFTModule(make_backbone(), optimizer=partial(torch.optim.AdamW, lr=1e-3))
        saver = L.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True, enable_version_counter=False)
        often = {"limit_val_batches": 1, "val_check_interval": 2, "enable_checkpointing": True}
        trainer(tmp_path, CleanStop(), *more, Next(), saver, max_epochs=1, **often).fit(
            module, Measured(batches), **options
        )
        return module

    whole = weights(run())
    went_on.clear()
    measured.clear()
    with pytest.raises(SystemExit) as end:
        run(asks(at))
    assert end.value.code == 128 + signal.SIGTERM
    assert went_on == []  # neither an export nor the next stage
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == at
    assert furthest(whole, weights(run(ckpt_path=str(tmp_path / "last.ckpt")))) == 0
    assert went_on == [4]
    assert measured == [2, 4]


class Counts(L.Callback):
    """Has the batches and validations that it saw in its state."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen.append(("batch", trainer.global_step))

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen.append(("validation", trainer.global_step))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


@pytest.mark.parametrize("at", [2, 3])  # behind the second batch there is a validation
def test_the_last_batch_is_on_the_curves_and_in_the_state_of_callbacks_behind(at: int, tmp_path: Path) -> None:
    """A rule that counts (`Monitors`) would else miss a batch at every time limit, and a curve a point."""
    batches = [SampleBatch(make_samples(2, seed=k)) for k in range(4)]

    def run(folder: Path, *more: L.Callback, **options: Any) -> list[tuple[str, int]]:
        module, counts = SFTModule(make_backbone(), optimizer=ADAM), Counts()
        saver = L.pytorch.callbacks.ModelCheckpoint(dirpath=folder, save_last=True, enable_version_counter=False)
        often = {"limit_val_batches": 1, "val_check_interval": 2, "enable_checkpointing": True}
        logger = CSVLogger(folder, name="", version=f"at-{int('ckpt_path' in options)}")
        made = trainer(folder, CleanStop(), counts, *more, saver, max_epochs=1, logger=logger, **often)
        made.fit(module, Measured(batches), **options)
        return counts.seen

    def curve(folder: Path) -> list[tuple[str, str]]:
        rows = [row for file in sorted(folder.glob("at-*/metrics.csv")) for row in csv.DictReader(file.open())]
        return [(row["step"], row["train/loss"]) for row in rows if row["train/loss"]]

    seen = run(tmp_path / "whole")
    assert len(seen) == 6
    with pytest.raises(SystemExit):
        run(tmp_path / "stopped", Signals(signal.SIGTERM, at - 1))
    assert run(tmp_path / "stopped", ckpt_path=str(tmp_path / "stopped" / "last.ckpt")) == seen
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")


def test_a_signal_behind_the_last_batch_is_not_forgotten(tmp_path: Path) -> None:
    class AtTheEnd(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as end:
        fit(SFTModule(make_backbone()), [SampleBatch(make_samples(1))], CleanStop(), AtTheEnd())
    assert end.value.code == 128 + signal.SIGTERM


def test_groups_that_wait_for_a_step_are_not_lost(zooming: TimmLMBackbone) -> None:
    """All answers are worth the same: every step waits for a second batch."""
    module = RGRPOModule(fresh(zooming), optimizer=ADAM, objective=Objective(drop_zero_variance=True, resample=2))
    rollout = RolloutCallback(sampler=GroupSampler(2), rewards={"same": Same()}, decoding=Decoding(**LIMITS))
    seen: list[int] = []

    class Asks(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch_idx)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        fit(module, [SampleBatch(make_samples(1))] * 4, CleanStop(), rollout, Asks())
    assert seen == [0, 1]
    assert module.waiting.batches == 0


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        module = SFTModule(make_backbone(), optimizer=ADAM)
        fit(module, [SampleBatch(make_samples(1))] * 2, CleanStop(), Signals(signal.SIGINT, 1))
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert module.trainer.global_step == 2


def test_a_fork_has_no_part_in_it() -> None:
    stop = CleanStop()
    stop._process = os.getpid() + 1  # as seen from a fork
    stop._ask(signal.SIGINT, None)
    assert stop.asked is None


def test_a_second_interrupt_ends_at_once() -> None:
    class Twice(Signals):
        def on_train_batch_start(self, *args: Any) -> None:
            super().on_train_batch_start(*args)
            super().on_train_batch_start(*args)

    steps: list[int] = []

    class Counts(SFTModule):
        def training_step(self, batch: SampleBatch, batch_idx: int) -> dict[str, int]:
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    with pytest.raises(SystemExit):  # Lightning's, of a KeyboardInterrupt
        fit(Counts(make_backbone()), [SampleBatch(make_samples(1))] * 2, CleanStop(), Twice(signal.SIGINT, 0))
    assert steps == []
