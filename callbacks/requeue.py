"""A SLURM job whose time is up goes back into the queue, and goes on from its checkpoint when it runs again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from types import FrameType

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

SIGNAL = signal.SIGUSR1  # as in `#SBATCH --signal=SIGUSR1@600`
TRIES, PAUSE = 3, 5.0  # of scontrol, whose server may be busy; seconds between them


class PutBack(SystemExit):
    """The end of a process whose job is to run again; its code is 0 until `settle` finds that it will not.

    Args:
        job: its name.
        number: the signal that asked for the end.
        kept: what has been saved, for the user.
        first: whether this process speaks to SLURM.
    """

    def __init__(self, job: str, number: int, kept: str, first: bool) -> None:
        super().__init__(0)
        self.job, self.number, self.kept, self.first = job, number, kept, first

    def settle(self) -> int:
        """Put the job back into the queue, and say so or why not.

        To be called when everything else is done: SLURM then ends what still runs, and leaves it some seconds to do so
        by itself.

        Returns:
            The exit code: 0, or 128 and the signal's number if the job will not run again by itself.
        """
        for number in (signal.SIGTERM, SIGNAL):
            signal.signal(number, signal.SIG_IGN)
        if not self.first:
            return 0
        problem = put_back(self.job)
        if problem is None:
            print(f"SLURM job {self.job} is back in the queue; {self.kept}", flush=True)
            return 0
        print(
            f"SLURM job {self.job} is not put back into the queue: {problem}; {self.kept}, submitted again",
            file=sys.stderr,
            flush=True,
        )
        return 128 + self.number


class Notice:
    """Whether SLURM has announced the end of the job, at whatever time: one for all runs of a process."""

    def __init__(self) -> None:
        self.came = False
        self.runs = 0  # that have begun in this process
        self._process = 0  # whose handler it is

    def listen(self) -> None:
        """From now on the signal no longer ends the process; nothing is done outside of a job."""
        if job_name(os.environ) is None or threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(SIGNAL) == signal.SIG_DFL:
            self._process = os.getpid()
            signal.signal(SIGNAL, self._hear)

    def _hear(self, number: int, _: FrameType | None) -> None:
        if os.getpid() == self._process and not self.came:  # in a fork nobody would ask
            self.came = True
            print(f"{signal.Signals(number).name}: SLURM is about to end this job", flush=True)


NOTICE = Notice()


def job_name(environment: Mapping[str, str]) -> str | None:
    """The job that this process is a task of, as scontrol takes it; None: none, or an interactive one.

    Args:
        environment: variables of SLURM.
    """
    if "SLURM_NTASKS" not in environment or environment.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None  # as Lightning tells them
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def leave_to_us(trainer: L.Trainer) -> None:
    """Turn Lightning's own requeuing off.

    It saves in the signal's handler, in the middle of a step, and on each rank at another place.
    """
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment):
        environment.auto_requeue = False


def put_back(job: str) -> str | None:
    """Put a job back into the queue.

    A job that its user cancelled is left alone, although SLURM would take it; one that is at its time limit, and has
    the last seconds of its tasks, is not.

    Returns:
        Why not; None: it is back.
    """
    problem = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE)
        shown, problem = scontrol("--oneliner", "show", "job", job)
        state, reason = (found(name, shown) for name in ("JobState", "Reason"))
        if problem:
            continue
        if state != "RUNNING" and reason != "TimeLimit":
            return f"SLURM is ending it by itself (state {state})"
        _, problem = scontrol("requeue", job)
        if not problem:
            return None
    return f"scontrol says {problem!r}"


def scontrol(*words: str) -> tuple[str, str]:
    """What the command prints, and what went wrong with it; the latter is empty if nothing did."""
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    return done.stdout, "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"


def found(name: str, shown: str) -> str:
    """The value of a field in what scontrol shows of a job."""
    match = re.search(rf"\b{name}=(\S+)", shown)
    return match[1] if match else "unknown"
