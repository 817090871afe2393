"""What a task of a SLURM job does when its time is up. scontrol is a stand-in; tests/test_slurm.py has a real one."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from filelock import FileLock
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

import commands.ablate
from callbacks import requeue
from callbacks.requeue import NOTICE, PutBack, job_name, put_back
from callbacks.rollout import RolloutCallback
from callbacks.stop import CleanStop
from commands import cli
from commands.ablate import alone
from commands.pipeline import prepare
from modules.engine import Decoding
from modules.sft import SFTModule
from modules.trajectory import SampleBatch
from tests.conftest import make_backbone, make_samples
from tests.fitting import Batches, furthest, trainer, weights
from tests.learning import ADAM, LIMITS

pytestmark = pytest.mark.filterwarnings("ignore")
JOB = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NAME": "vlm_r3",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_RESTART_COUNT": "2",
}
SCONTROL = """\
#!/bin/sh
echo "$@" >> {folder}/asked
case "$*" in
    *show*) cat {folder}/shown ;;
    *) cat {folder}/refusal >&2; test ! -s {folder}/refusal ;;
esac
"""


class Slurm:
    """A stand-in for scontrol."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "scontrol").write_text(SCONTROL.format(folder=folder))
        (folder / "scontrol").chmod(0o755)
        self.is_in("RUNNING")
        self.refuses("")

    def is_in(self, state: str, reason: str = "None") -> None:
        (self.folder / "shown").write_text(f"JobId=12 JobName=x JobState={state} Reason={reason} Dependency=(null)\n")

    def refuses(self, why: str) -> None:
        (self.folder / "refusal").write_text(why)

    @property
    def asked(self) -> list[str]:
        """What scontrol was asked for beside the job's state."""
        file = self.folder / "asked"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line for line in lines if "show" not in line]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """This process is the only task of a job; afterwards nothing of it is left."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(requeue, "PAUSE", 0.0)
    monkeypatch.setattr(NOTICE, "came", False)
    monkeypatch.setattr(NOTICE, "runs", 0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield Slurm(folder)
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Signals(L.Callback):
    """Sends a signal to this process in the middle of a batch."""

    def __init__(self, number: int, at: int = 0) -> None:
        self.number, self.at = number, at

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at:
            os.kill(os.getpid(), self.number)

    def on_test_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.on_train_batch_start(trainer, pl_module, batch, batch_idx)


def run(folder: Path, *more: L.Callback, **options: Any) -> SFTModule:
    """Three steps, from the beginning or from a checkpoint."""
    module = SFTModule(make_backbone(), optimizer=partial(torch.optim.AdamW, lr=1e-3))
    saver = L.pytorch.callbacks.ModelCheckpoint(dirpath=folder, save_last=True, enable_version_counter=False)
    batches = Batches([SampleBatch(make_samples(2, seed=5))])
    made = trainer(folder, CleanStop(), *more, saver, max_epochs=3, enable_checkpointing=True)
    made.fit(module, batches, **options)
    return module


# --- what is asked of SLURM ---


def test_a_job_is_called_as_scontrol_calls_it() -> None:
    assert job_name({}) is None
    assert job_name(JOB) == "12"
    assert job_name({**JOB, "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "3"}) == "10_3"
    assert job_name({**JOB, "SLURM_JOB_NAME": "interactive"}) is None


@pytest.mark.parametrize(
    ("state", "reason", "back"),
    [("RUNNING", "None", True), ("COMPLETING", "TimeLimit", True), ("COMPLETING", "None", False)],
    ids=["running", "at its limit", "cancelled"],
)
def test_a_job_that_was_cancelled_does_not_come_back(state: str, reason: str, back: bool, slurm: Slurm) -> None:
    slurm.is_in(state, reason)
    problem = put_back("12")
    assert slurm.asked == (["requeue 12"] if back else [])
    assert problem == (None if back else f"SLURM is ending it by itself (state {state})")


def test_scontrol_is_asked_again_where_it_fails(slurm: Slurm) -> None:
    slurm.refuses("Socket timed out")
    assert put_back("12") == "scontrol says 'Socket timed out'"
    assert slurm.asked == ["requeue 12"] * requeue.TRIES


def test_scontrol_that_is_not_there_is_named(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "No such file or directory: 'scontrol'" in str(put_back("12"))


# --- what a run does ---


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_stops_behind_its_step_and_goes_on_exactly(
    number: int, slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = weights(run(tmp_path / "whole"))
    with pytest.raises(PutBack) as end:
        run(tmp_path / "stopped", Signals(number))
    assert end.value.code == 0
    assert slurm.asked == []  # neither by Lightning in the handler nor before all is closed
    assert end.value.settle() == 0
    os.kill(os.getpid(), signal.SIGTERM)  # as SLURM does with a job that is back in the queue
    assert slurm.asked == ["requeue 12"]
    said = capsys.readouterr().out
    assert "SLURM job 12, restarts 2: training begins at step 0" in said
    assert "SLURM job 12 is back in the queue; `--ckpt_path=last` goes on from" in said
    last = tmp_path / "stopped" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 1
    NOTICE.came = False  # a new process
    assert furthest(whole, weights(run(tmp_path / "stopped", ckpt_path=str(last)))) == 0


def test_ctrl_c_does_not_put_a_job_back(slurm: Slurm, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        run(tmp_path, Signals(signal.SIGINT))
    assert (type(end.value), end.value.code) == (SystemExit, 128 + signal.SIGINT)


def test_a_signal_before_the_run_is_heeded_in_it(slurm: Slurm, tmp_path: Path) -> None:
    """Weights are loaded for minutes, and between two stages nothing trains: the signal would end the process."""
    CleanStop()
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(PutBack):
        run(tmp_path)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1


def test_a_job_that_is_refused_ends_with_an_error_for_those_that_wait_for_it(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.refuses("Requested operation is presently disabled for job 12")
    monkeypatch.setattr(cli, "CLI", lambda *_: run(tmp_path, Signals(signal.SIGUSR1)))
    with pytest.raises(SystemExit) as end:
        cli.cli(["fit"])
    assert end.value.code == 128 + signal.SIGUSR1
    said = capsys.readouterr().err
    assert "SLURM job 12 is not put back into the queue: scontrol says 'Requested operation is presently" in said
    assert f"`--ckpt_path=last` goes on from {tmp_path / 'last.ckpt'}, submitted again" in said


def test_outside_of_a_job_the_signal_is_left_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    CleanStop()
    assert signal.getsignal(signal.SIGUSR1) is before


def test_lightning_does_not_requeue_as_well(slurm: Slurm, tmp_path: Path) -> None:
    made = trainer(tmp_path, CleanStop(), max_epochs=1)
    environment = made._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    assert environment.auto_requeue  # as Lightning has it
    made.fit(SFTModule(make_backbone(), optimizer=ADAM), Batches([SampleBatch(make_samples(1))]))
    assert not environment.auto_requeue


def test_only_the_first_rank_speaks_to_slurm(slurm: Slurm) -> None:
    assert PutBack("12", signal.SIGUSR1, "", first=False).settle() == 0
    assert slurm.asked == []


# --- tests, pipelines, arrays ---


@pytest.mark.parametrize(("resume", "runs", "stops"), [(True, 0, True), (False, 0, False), (False, 1, True)])
def test_a_test_is_ended_where_it_gets_further(
    resume: bool, runs: int, stops: bool, slurm: Slurm, tmp_path: Path
) -> None:
    """One that begins anew each time, and is all that a job has time for, would be put back for ever."""
    NOTICE.runs = runs
    rollout = RolloutCallback(evaluations={"greedy": Decoding(0.0, **LIMITS)}, resume=resume)
    made = trainer(tmp_path, CleanStop(), rollout, Signals(signal.SIGUSR1))
    module = SFTModule(make_backbone(), optimizer=ADAM)
    data = Batches([SampleBatch(make_samples(1, seed=k)) for k in range(3)])
    if stops:
        with pytest.raises(PutBack):
            made.test(module, data, verbose=False)
    else:
        made.test(module, data, verbose=False)
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == (1 if stops else 3)


def test_a_pipeline_leaves_the_answers_of_an_interrupted_test(tmp_path: Path) -> None:
    prepare(tmp_path / "test", "mark")
    (tmp_path / "test" / "evaluation.json").write_text("{}")
    prepare(tmp_path / "test", "mark")
    assert (tmp_path / "test" / "evaluation.json").exists()
    prepare(tmp_path / "test", "another")
    assert not (tmp_path / "test" / "evaluation.json").exists()


def test_a_cell_that_only_waits_is_put_back_too(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands.ablate, "POLL", 0.1)
    NOTICE.came = True
    with FileLock(f"{tmp_path / 'stage'}.lock"), pytest.raises(SystemExit) as end:
        alone(tmp_path / "stage").__enter__()
    assert end.value.code == 0
    assert slurm.asked == ["requeue 12"]
