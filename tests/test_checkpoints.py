"""Checkpoints are there as a whole or not at all: a full disk, a folder that is only read, a kill, a file cut off."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import train
from commands.cli import cli
from modules.checkpoints import PART, WholeCheckpointIO
from modules.errors import PolicyError
from tests.cli_stand_ins import CONFIG, TinyPolicy

FIT = ["fit", "--config=base.yaml", "--run_dir=run"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with ``base.yaml``; no step has been taken."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(CONFIG)
    TinyPolicy.taken.clear()
    return tmp_path


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run what must end in a sentence; what it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(args)
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    return said


@contextmanager
def disk(place: Path, *options: str) -> Iterator[None]:
    """A small file system of its own, if one may be mounted here."""
    place.mkdir(exist_ok=True)
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(["size=400k", *options]), "tmpfs", str(place)], check=False
        ).returncode
    ):
        pytest.skip("only root may mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with disk(Path("run")):
        cli([*FIT, "--trainer.max_steps=2"])
        before = Path("run/last.ckpt").read_bytes()
        free = os.statvfs("run").f_bavail * os.statvfs("run").f_frsize
        Path("run/other").write_bytes(bytes(free - 4096))  # a line still fits, a checkpoint does not
        assert len(before) > 4096
        said = refused([*FIT, "--ckpt_path=last", "--trainer.logger=false"], capsys)
        assert "No space left on device" in said
        assert "run/last.ckpt is the last whole one: make room" in said
        assert Path("run/last.ckpt").read_bytes() == before
        assert not list(Path("run").glob("*.part"))
        Path("run/other").unlink()
        TinyPolicy.taken.clear()
        cli([*FIT, "--ckpt_path=last"])  # as it said
        assert TinyPolicy.taken == [2, 3]


def test_a_folder_that_is_only_read_is_said_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with disk(Path("run"), "ro"):
        said = refused(FIT, capsys)
    assert "Expected `run_dir` 'run' to be a folder that can be written, but it cannot: [Errno 30]" in said
    assert TinyPolicy.taken == []


def test_a_folder_that_is_a_file_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").write_text("")
    assert "to be a folder that can be written" in refused(FIT, capsys)


@pytest.mark.parametrize("limit", ["device", "size"])
def test_a_file_that_cannot_be_written_to_its_end_is_no_checkpoint(limit: str) -> None:
    save = WholeCheckpointIO().save_checkpoint
    save({"weights": torch.zeros(1000)}, "last.ckpt")
    before = Path("last.ckpt").read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if limit == "device":
            Path(PART).symlink_to("/dev/full")
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
        with pytest.raises(
            PolicyError, match=r"write the checkpoint 'last.ckpt', but .*(No space left|File too large)"
        ):
            save({"weights": torch.ones(1_000_000)}, "last.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert Path("last.ckpt").read_bytes() == before
    assert not Path(PART).exists()


def test_other_errors_of_torch_are_left_as_they_are() -> None:
    with pytest.raises(AttributeError, match="pickle"):
        WholeCheckpointIO().save_checkpoint({"weights": lambda: None}, "last.ckpt")
    assert not Path("last.ckpt").exists()


def test_a_kill_in_the_middle_of_writing_leaves_a_whole_checkpoint() -> None:
    """Ten kills of a process that does nothing but write; each file says of which round it is, twice."""
    io, torn = WholeCheckpointIO(), 0
    for k in range(10):
        child = os.fork()
        if child == 0:
            for n in range(10_000):
                io.save_checkpoint({"first": n, "weights": torch.full((500_000,), float(n)), "last": n}, "last.ckpt")
            os._exit(0)
        while not Path("last.ckpt").exists():
            time.sleep(0.001)
        time.sleep(0.02 + 0.007 * k)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = torch.load("last.ckpt", weights_only=True)
        assert found["first"] == found["last"]
        assert bool((found["weights"] == found["first"]).all())
        torn += Path(PART).exists()
    assert torn  # some of them hit it while it wrote
    Path(PART).write_bytes(b"what such a kill leaves")
    io.save_checkpoint({}, "step=7.ckpt")  # of a name that comes once
    assert {path.name for path in Path().iterdir()} >= {"last.ckpt", "step=7.ckpt"}
    assert not list(Path().glob("*.part"))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_checkpoint_that_was_cut_off_is_refused_with_what_to_do(
    share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    cli([*FIT, "--trainer.max_steps=2"])
    last = Path("run/last.ckpt")
    (other,) = (path for path in Path("run").glob("*.ckpt") if path.name != "last.ckpt")
    whole = last.read_bytes()
    last.write_bytes(whole[: int(share * len(whole))])
    said = refused([*FIT, "--ckpt_path=last"], capsys)
    assert "it is damaged or none" in said
    assert said.endswith(f"The newest other one is '{other}': give it as `--ckpt_path`.")
    TinyPolicy.taken.clear()
    cli([*FIT, f"--ckpt_path={other}"])
    assert TinyPolicy.taken == [2, 3]
    for path in Path("run").glob("*.ckpt"):
        path.write_bytes(b"")
    assert "There is no other one in its folder: start again without" in refused([*FIT, "--ckpt_path=last"], capsys)


def test_a_run_writes_its_checkpoints_so() -> None:
    run = cli([*FIT, "--trainer.max_steps=1"])
    assert type(run.trainer.strategy.checkpoint_io) is WholeCheckpointIO
