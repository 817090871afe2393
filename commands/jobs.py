"""Cells as processes of their own, several at once on one machine, each after those that it needs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from commands.grid import Cell

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
GRACE = 30.0  # seconds that a stopped process has to end by itself
LOOK = 0.2  # seconds between two looks at the processes


@dataclass(frozen=True)
class Job:
    """A cell that runs."""

    cell: Cell
    process: subprocess.Popen[bytes]
    slot: int
    began: float


def run_all(cells: Sequence[Cell], args: Sequence[str], jobs: int) -> list[bool]:
    """Run what has not ended yet.

    Args:
        cells: each after those that it needs.
        args: the command line of the grid; each process gets it and the name of its cell.
        jobs: processes at once.

    Returns:
        Whether each cell has ended.

    Raises:
        SystemExit: with code 130 if it is interrupted; all processes have ended then, as after any other exception.
    """
    waiting = [cell for cell in cells if not cell.has_ended()]
    for cell in cells:
        if cell not in waiting:
            print(f"ablate: {cell.id:<32} done before")
    running: list[Job] = []
    failed: set[str] = set()
    try:
        with interruptible():
            while waiting or running:
                for job in [each for each in running if each.process.poll() is not None]:
                    running.remove(job)
                    if not finished(job):
                        failed.add(job.cell.id)
                for cell in list(waiting):
                    needed = {f"{cell.root.name}/{name}" for name in cell.needs}
                    if broken := sorted(needed & failed):
                        waiting.remove(cell)
                        failed.add(cell.id)
                        print(f"ablate: {cell.id:<32} not run, for it needs {broken[0]}", flush=True)
                    elif len(running) < jobs and not needed & {
                        each.id for each in [*waiting, *(j.cell for j in running)]
                    }:
                        waiting.remove(cell)
                        slot = min(set(range(jobs)) - {job.slot for job in running})
                        running.append(start(cell, args, jobs, slot))
                time.sleep(LOOK)
    except KeyboardInterrupt:
        print(f"ablate: stopping {len(running)} cells; run the same command again to go on from there", flush=True)
        stop(running)
        sys.exit(130)
    except BaseException:  # they have sessions of their own: nobody else would end them
        stop(running)
        raise
    return [cell.id not in failed for cell in cells]


def start(cell: Cell, args: Sequence[str], jobs: int, slot: int) -> Job:
    """Start the process of a cell; what it prints is appended to ``<cell>.log``."""
    log = log_of(cell)
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"ablate: {cell.id:<32} started, see {log}", flush=True)
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, str(TRAIN), "ablate", *args, f"--cell={cell.id}"],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **shares(os.environ, jobs, slot, os.cpu_count() or 1, torch.cuda.device_count())},
            start_new_session=True,  # Ctrl-C reaches it through us alone
        )
    return Job(cell, process, slot, time.monotonic())


def log_of(cell: Cell) -> Path:
    """What a cell printed."""
    return cell.root / f"{cell.name}.log"


def finished(job: Job) -> bool:
    """Whether the cell of a process that is gone has ended, and a line about it."""
    ended = job.cell.has_ended()
    code = job.process.returncode
    how = "ended" if ended else f"FAILED (exit code {code}), see {log_of(job.cell)}"
    print(f"ablate: {job.cell.id:<32} {how} after {time.monotonic() - job.began:.0f} s", flush=True)
    return ended


def stop(running: Sequence[Job]) -> None:
    """Ask the processes and their children to end, and end those that do not."""
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        for job in running:
            if job.process.poll() is None:
                os.killpg(job.process.pid, number)  # a session's leader is its group's
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(job.process.poll() is None for job in running):
            time.sleep(LOOK)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends the processes as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def shares(environment: Mapping[str, str], jobs: int, slot: int, cores: int, gpus: int) -> dict[str, str]:
    """Environment variables that give a process its share of the machine.

    Args:
        environment: what is set there already; the number of threads is left alone.
        jobs: processes at once.
        slot: which of them this is, from 0.
        cores: of the machine.
        gpus: that can be seen.
    """
    said = {} if "OMP_NUM_THREADS" in environment else {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    if jobs > 1 and gpus > 1:
        names = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        visible = names.split(",")
        per = len(visible) // jobs  # the same number for all: cells that are compared run alike
        said["CUDA_VISIBLE_DEVICES"] = ",".join(visible[slot::jobs][:per] if per else [visible[slot % len(visible)]])
    return said
