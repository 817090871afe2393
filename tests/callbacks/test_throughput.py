"""The seconds of training: what they count, and that a resume keeps them."""

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from callbacks.throughput import Throughput, count_tokens
from modules.trajectory import Group, Sample, SampleBatch, StopReason, Trajectory

pytestmark = pytest.mark.filterwarnings("ignore")
STEP, VALIDATION = 0.02, 0.3


class Slow(pl.LightningModule):
    """Steps and validations of known length."""

    def __init__(self, tokens: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokens = tokens
        self.lengths = [STEP] * 10
        self.logged: list[dict[str, float]] = []

    def training_step(self, batch: SampleBatch, batch_idx: int) -> dict[str, Any]:
        time.sleep(self.lengths[self.trainer.global_step])
        told = {} if self.tokens is None else {"tokens": self.tokens}
        return {"loss": self.weight.sum(), **told}

    def validation_step(self, batch: SampleBatch, batch_idx: int) -> None:
        time.sleep(VALIDATION)

    def on_train_batch_end(self, *args: Any) -> None:
        self.logged.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(batches: int, size: int) -> DataLoader[Any]:
    samples = [Sample(f"s{k}", "?") for k in range(batches * size)]
    return DataLoader(samples, batch_size=size, collate_fn=lambda rows: SampleBatch(list(rows)))  # type: ignore[arg-type]


def trainer(folder: Path, callback: Throughput, **kwargs: Any) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def saved(folder: Path) -> dict[str, float]:
    return json.loads((folder / "fit.json").read_text())


def test_validation_does_not_count(tmp_path: Path) -> None:
    # 8 steps and 4 validations (and the sanity check) of one batch
    begun = time.perf_counter()
    trainer(tmp_path, Throughput(), max_epochs=4, log_every_n_steps=1).fit(Slow(), loader(2, 1), loader(1, 1))
    took = time.perf_counter() - begun
    result = saved(tmp_path)
    assert result["steps"] == 8
    assert took > 4 * VALIDATION + 8 * STEP
    assert 8 * STEP <= result["seconds"] <= took - 4 * VALIDATION
    assert [path.name for path in tmp_path.iterdir()] == ["fit.json"]  # no unfinished file is left


def test_rates_are_means_since_the_last_log(tmp_path: Path) -> None:
    model = Slow(tokens=70)
    model.lengths = [STEP, STEP, 5 * STEP, 5 * STEP, STEP, STEP]
    trainer(tmp_path, Throughput(), max_epochs=3, log_every_n_steps=2).fit(model, loader(2, 5), loader(1, 1))
    assert "train/step_seconds" not in model.logged[0]  # the trainer writes after batches 2, 4, 6
    for metrics, length in zip(model.logged[1::2], (STEP, 5 * STEP, STEP), strict=True):
        seconds = metrics["train/step_seconds"]
        assert length <= seconds < length + VALIDATION / 4  # a validation lies before each later window
        assert metrics["train/trajectories_per_second"] * seconds == pytest.approx(5)  # samples a batch
        assert metrics["train/tokens_per_second"] * seconds == pytest.approx(70)


def test_tokens_are_not_logged_when_nothing_tells(tmp_path: Path) -> None:
    model = Slow()
    trainer(tmp_path, Throughput(), max_epochs=1, log_every_n_steps=1).fit(model, loader(2, 1))
    assert "train/trajectories_per_second" in model.logged[-1]
    assert "train/tokens_per_second" not in model.logged[-1]


def test_a_resume_goes_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    first = trainer(tmp_path, Throughput(), max_steps=4)
    first.fit(Slow(), loader(10, 1))
    before = saved(tmp_path)["seconds"]
    first.save_checkpoint(tmp_path / "last.ckpt")
    time.sleep(VALIDATION)  # the time between two runs is nobody's

    callback = Throughput()
    second = trainer(tmp_path, callback, max_steps=6)
    begun = time.perf_counter()
    second.fit(Slow(), loader(10, 1), ckpt_path=str(tmp_path / "last.ckpt"))
    took = time.perf_counter() - begun
    result = saved(tmp_path)
    assert result["steps"] == 6
    assert before + 2 * STEP <= result["seconds"] <= before + took
    assert callback.state_dict() == {"seconds": result["seconds"]}  # the clock stands still after the fit


def test_a_run_that_has_nothing_left_to_do_keeps_its_seconds(tmp_path: Path) -> None:
    first = trainer(tmp_path, Throughput(), max_steps=2)
    first.fit(Slow(), loader(4, 1))
    before = saved(tmp_path)
    first.save_checkpoint(tmp_path / "last.ckpt")
    second = trainer(tmp_path, Throughput(), max_steps=2)
    second.fit(Slow(), loader(4, 1), ckpt_path=str(tmp_path / "last.ckpt"))
    assert saved(tmp_path) == before


def test_checkpoints_within_a_fit_hold_the_seconds_so_far(tmp_path: Path) -> None:
    seen: list[float] = []

    class Save(pl.Callback):
        """Comes before the throughput callback, as a checkpoint at a batch's end may."""

        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            seen.append(callback.state_dict()["seconds"])

    callback = Throughput()
    run = trainer(tmp_path, callback, max_steps=3)
    run.callbacks.insert(0, Save())
    run.fit(Slow(), loader(3, 1))
    assert [second - first >= STEP for first, second in zip([0.0, *seen], seen, strict=False)] == [True] * 3
    assert seen[-1] <= saved(tmp_path)["seconds"]


def test_tokens_of_a_batch() -> None:
    def written(prompt: int, completion: int) -> Trajectory:
        ids = torch.zeros(completion, dtype=torch.long)
        nothing = ids.float()
        start = torch.zeros(prompt, dtype=torch.long)
        return Trajectory(sample, start, ids, ids.bool(), nothing, nothing, (), (), StopReason.EOS, None, "")

    sample = Sample("id", "?")
    two = torch.zeros(2)
    group = Group(sample, (written(10, 3), written(10, 5)), {}, two, two)
    rolled = SampleBatch([sample], groups=[group, group])
    assert count_tokens(rolled, None) == 2 * (10 + 3 + 10 + 5)
    assert count_tokens(rolled, {"tokens": 28}) == 28  # half of them were trained
    assert count_tokens(SampleBatch([sample]), {"loss": 1}) is None
