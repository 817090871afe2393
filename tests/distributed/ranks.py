"""Several real processes of one run, with gloo on this machine: started fast, watched, and ended when they hang.

Each process runs the real command line (`train.main`) with the environment that a launcher gives its ranks. They are
forked from a server that has imported everything once, so that a run of a second takes about a second.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from tests.distributed import stand_ins

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([stand_ins.__name__])
TIMEOUT = 120.0  # seconds


class Hung(AssertionError):
    """Ranks that were still running when their time was up; the message has their stacks."""


@dataclass(frozen=True)
class Rank:
    """How one process ended."""

    code: int  # exit code; minus a signal's number
    said: str  # its output and its errors


@dataclass(frozen=True)
class Started:
    """Processes that run; `wait` for them, or `kill` some."""

    processes: list[ForkServerProcess]
    logs: list[Path]
    until: float  # of time.monotonic

    def kill(self, ranks: Sequence[int]) -> None:
        """SIGKILL."""
        for rank in ranks:
            self.processes[rank].kill()

    def wait(self, after_death: float | None = None) -> list[Rank]:
        """How they ended.

        Args:
            after_death: seconds after which the others are killed when one has ended with an error, as a launcher
                would; None: they have to end by themselves.

        Raises:
            Hung: they took too long; they are killed.
        """
        dead: float | None = None
        while any(process.is_alive() for process in self.processes):
            if dead is None and any(process.exitcode not in (None, 0) for process in self.processes):
                dead = time.monotonic()
            if after_death is not None and dead is not None and time.monotonic() > dead + after_death:
                self.kill(range(len(self.processes)))
            if time.monotonic() > self.until + 10:  # each dumps its stacks when its time is up, and ends
                break
            time.sleep(0.02)
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill(late)
        for process in self.processes:
            process.join()
        ended = [
            Rank(process.exitcode or 0, log.read_text(errors="replace"))
            for process, log in zip(self.processes, self.logs, strict=True)
        ]
        if late or any("Timeout (" in rank.said for rank in ended):
            raise Hung("\n".join(f"--- rank {k}, exit code {r.code}:\n{r.said}" for k, r in enumerate(ended)))
        return ended


def start(
    arguments: Sequence[str],
    folder: Path,
    ranks: int = 2,
    timeout: float = TIMEOUT,
    prepare: Callable[[int], None] | None = None,
) -> Started:
    """Start the ranks of ``train.py <arguments>``.

    Args:
        arguments: of the command line.
        folder: where they work, and leave what they say.
        ranks: how many; one runs by itself, as without a launcher.
        timeout: seconds after which each writes the stacks of its threads and ends.
        prepare: called in each process with its rank, before anything else; a function of a module.
    """
    port = free_port()
    logs = [folder / f"rank{rank}.of{ranks}.txt" for rank in range(ranks)]
    processes = [
        SERVER.Process(target=_run, args=(list(arguments), folder, log, rank, ranks, port, timeout, prepare))
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    return Started(processes, logs, time.monotonic() + timeout)


def run(
    arguments: Sequence[str],
    folder: Path,
    ranks: int = 2,
    timeout: float = TIMEOUT,
    prepare: Callable[[int], None] | None = None,
) -> list[str]:
    """What the ranks said; all of them have to end well, and in time."""
    ended = start(arguments, folder, ranks, timeout, prepare).wait(after_death=20)
    bad = [f"--- rank {k}, exit code {rank.code}:\n{rank.said}" for k, rank in enumerate(ended) if rank.code]
    assert not bad, "\n".join(bad)
    return [rank.said for rank in ended]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _run(
    arguments: list[str],
    folder: Path,
    log: Path,
    rank: int,
    ranks: int,
    port: int,
    timeout: float,
    prepare: Callable[[int], None] | None,
) -> None:
    """One rank."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  the parent's are not this process's
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.dump_traceback_later(timeout, exit=True)
    os.chdir(folder)
    torch.set_num_threads(1)  # several processes on few cores; more threads would only wait for each other
    if ranks > 1:
        told = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in told.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    if prepare is not None:
        prepare(rank)
    stand_ins.main(arguments)
