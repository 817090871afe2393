"""What is printed where there is no terminal, and what stands on the bar where there is one."""

import io
import re
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from callbacks.progress import RunProgressBar, clock, metric_table, pace
from callbacks.rollout import RolloutCallback
from modules.engine import LocalEngine
from modules.rewards import Accuracy

pytestmark = pytest.mark.filterwarnings("ignore")


class Model(pl.LightningModule):
    """Manual optimization with two optimizer steps a batch, as R-GRPO has."""

    def __init__(self, rewards: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.rewards = rewards
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.weight.sum())
            optimizer.step()
        self.log("train/loss", 0.125, prog_bar=True)
        if self.rewards:
            self.log_dict({"train/reward/total": 0.75, "train/reward/accuracy": 0.5, "train/zoom_rate": 1.0})
            self.log("train/trajectories_per_second", 12.34)

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log_dict({"val/accuracy": 0.625, "val/zoom_rate": 0.25, "val/reward/format": 1.0})

    def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log_dict({"test/accuracy": 0.3, "test/blind/accuracy": 12.0})
        self.print("from the module")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6)


def loader(batches: int) -> DataLoader[Any]:
    return DataLoader(torch.zeros(batches, 1))  # type: ignore[arg-type]


def trainer(folder: Path, bar: RunProgressBar, **kwargs: Any) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        callbacks=[bar],
        accelerator="cpu",
        logger=CSVLogger(folder),  # has a version, which Lightning's bar would show
        enable_checkpointing=False,
        enable_model_summary=False,
        **kwargs,
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_log_file_gets_a_few_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, RunProgressBar(), max_steps=80).fit(Model(), loader(10), loader(3))
    out = capsys.readouterr().out
    assert "\r" not in out
    assert "\x1b" not in out
    lines = [line for line in out.splitlines() if line]
    # 40 batches in well under 12 seconds: the first, the last, and one for each of four validations
    train = [line for line in lines if line.startswith("step") and "validation" not in line]
    assert len(train) == 2
    numbers = "reward 0.75  acc 0.5  zoom 1  traj/s 12.3  lr 1.0e-06"
    assert train[0].startswith("step 2/80  epoch 0  2%  0:00 + 0:")
    assert train[0].endswith(f"| {numbers}")
    assert train[1].startswith("step 80/80  epoch 4  100%  0:0")
    assert "+ 0:00 left" in train[1]
    assert train[1].endswith(f"| {numbers}  val acc 0.625")
    assert re.search(r"\d step/s \| ", train[1])
    validations = [line for line in lines if "validation" in line]
    assert [line.split("  ")[0] for line in validations] == ["step 20", "step 40", "step 60", "step 80"]
    assert validations[0].endswith("| acc 0.625  zoom 0.25")
    assert out.endswith("\nval/accuracy       0.6250\nval/reward/format  1.0000\nval/zoom_rate      0.2500\n\n")


def test_lines_come_every_so_many_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("callbacks.progress.time.monotonic", lambda: now[0])

    class Timed(Model):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            now[0] += 5.0

    trainer(tmp_path, RunProgressBar(line_seconds=12), max_steps=20).fit(Timed(), loader(10))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    # a batch is two steps and five seconds: lines at 5 s, then at the first end of a batch 12 s later, ...
    assert [line.split("  ")[0] for line in lines] == [
        "step 2/20",
        "step 8/20",
        "step 14/20",
        "step 20/20",
        "step 20/20",
    ]
    assert "0:20 + 0:30 left" in lines[1]
    assert "2.50 s/step" in lines[1]


def test_a_resume_estimates_from_what_this_run_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("callbacks.progress.time.monotonic", lambda: now[0])

    class Timed(Model):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            now[0] += 5.0

    first = trainer(tmp_path, RunProgressBar(), max_steps=10)
    first.fit(Timed(), loader(20))
    first.save_checkpoint(tmp_path / "last.ckpt")
    capsys.readouterr()
    trainer(tmp_path, RunProgressBar(), max_steps=20).fit(Timed(), loader(20), ckpt_path=str(tmp_path / "last.ckpt"))
    line = capsys.readouterr().out.splitlines()[0]
    # one batch of the five that are left took 5 s
    assert line.startswith("step 12/20")
    assert "  60%  0:05 + 0:20 left  2.50 s/step |" in line


def test_supervised_training_shows_the_loss_and_epochs_bound_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path, RunProgressBar(), max_epochs=2).fit(Model(rewards=False), loader(5))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 2  epoch 0  10%  ")
    assert lines[0].endswith("| loss 0.125  lr 1.0e-06")


@pytest.mark.parametrize("terminal", [False, True])
def test_evaluation_ends_with_one_table(tmp_path: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    run = trainer(tmp_path, RunProgressBar())
    run.test(Model(), loader(3))
    out = stdout.getvalue()
    assert out.count("from the module") == 3
    assert out.endswith("\ntest/accuracy         0.3000\ntest/blind/accuracy  12.0000\n\n")
    assert out.count("test/accuracy") == 1  # Lightning's own table is off
    run.validate(Model(), loader(3))
    assert stdout.getvalue().endswith(
        "\nval/accuracy       0.6250\nval/reward/format  1.0000\nval/zoom_rate      0.2500\n\n"
    )
    before = stdout.getvalue().count("val/accuracy")
    run.validate(Model(), loader(3), verbose=False)
    assert stdout.getvalue().count("val/accuracy") == before


def test_terminal_gets_a_bar_with_short_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = Terminal()
    monkeypatch.setattr(sys, "stdout", stdout)
    trainer(tmp_path, RunProgressBar(), max_steps=8).fit(Model(), loader(4), loader(2))
    out = stdout.getvalue()
    assert "\r" in out
    assert "v_num" not in out
    assert "train/loss" not in out
    assert "reward=0.75, acc=0.5, zoom=1, traj/s=12.3, lr=1.0e-06" in out
    assert "val acc=0.625" in out
    assert "step 2/8" not in out  # no plain lines between the bars


def test_refresh_rate_zero_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, RunProgressBar(refresh_rate=0), max_steps=8).fit(Model(), loader(4))
    assert capsys.readouterr().out == ""


def test_long_evaluation_tells_where_it_is_and_how_long_it_will_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("callbacks.progress.time.monotonic", lambda: now[0])

    class Slow(Model):
        def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            now[0] += 20.0

    trainer(tmp_path, RunProgressBar(line_seconds=0.01)).test(Slow(), loader(3))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("test")]
    assert lines == [
        "test  batch 1/3  0:20 + 0:40 left  20.00 s/batch",
        "test  batch 2/3  0:40 + 0:20 left  20.00 s/batch",
        "test  batch 3/3  1:00 + 0:00 left  20.00 s/batch",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_rollout_tells_how_many_have_ended(
    terminal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("callbacks.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    bar, engine = RunProgressBar(line_seconds=12), LocalEngine()
    fit = trainer(tmp_path, bar)
    fit.callbacks.append(RolloutCallback(engine, rewards={"accuracy": Accuracy()}))  # type: ignore[attr-defined]
    bar.setup(fit, Model(), "fit")
    assert engine.watcher is not None
    for ended, seconds in ((1, 5.0), (2, 20.0), (3, 21.0), (4, 40.0), (8, 60.0), (1, 2.0)):
        now[0] = 100.0 + seconds
        engine.watcher(ended, 8, seconds)
    said = capsys.readouterr()
    if terminal:
        assert "rollout:  25%" in said.err
        assert bar._rollout_bar is None  # closed behind the last
    else:
        assert said.out.splitlines() == [
            "rollout  2/8 trajectories  0:20 + 1:00 left",
            "rollout  4/8 trajectories  0:40 + 0:40 left",
        ]


def test_formats() -> None:
    assert [clock(s) for s in (0.4, 59.6, 3599, 3600, 90061)] == ["0:00", "1:00", "59:59", "1:00:00", "25:01:01"]
    assert [pace(0, 1.0), pace(10, 4.0), pace(4, 10.0)] == ["- step/s", "2.50 step/s", "2.50 s/step"]
    assert (
        metric_table({"val/b": 12.0, "val/long": 0.12344, "train/a": 1.0}, "val/")
        == "val/b     12.0000\nval/long   0.1234"
    )
    assert metric_table({"train/a": 1.0}, "val/") == ""
