"""Whether two mathematical expressions are equal, judged by math-verify in a process that may be killed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

from modules.functional.graders import MAX_LENGTH
from modules.policy import PolicyError

START_SECONDS = 120.0  # sympy is slow to import, more so from a cold network disk


class MathWorkerError(RuntimeError):
    """The process that compares expressions does not start."""


class MathWorker:
    """A process that compares expressions, one at a time; started when first asked, and anew after a timeout.

    Works in any thread and in forked processes, each of which gets a process of its own.

    Args:
        timeout: seconds that a comparison may take.
    """

    def __init__(self, timeout: float = 10.0) -> None:
        self.timeout = timeout
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None

    def equal(self, prediction: str, answer: str) -> bool:
        """Whether two expressions are equal; not if it cannot be said in time.

        Raises:
            MathWorkerError: if the process does not start.
        """
        if prediction.split() == answer.split():
            return bool(answer.strip())
        if max(len(prediction), len(answer)) > MAX_LENGTH:
            return False
        if self._owner != os.getpid():  # a fork has its parent's pipes and perhaps a lock that nobody will release
            self._owner, self._process, self._lock = os.getpid(), None, threading.Lock()
        with self._lock:
            process = self._process if self._process is not None and self._process.poll() is None else self._start()
            verdict = _ask(process, json.dumps([prediction, answer]), self.timeout)
            if verdict is None:
                _end(process)
            return verdict == "true"

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None and self._owner == os.getpid():
            _end(self._process)

    def _start(self) -> subprocess.Popen[bytes]:
        script = Path(__file__).with_name("math_worker.py")
        process = subprocess.Popen(  # -P: the files beside the script are no modules of their own
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        if _read(process, START_SECONDS) != "ready":
            _end(process)
            raise MathWorkerError(f"Expected {script.name} to start within {START_SECONDS:.0f} s, but it did not.")
        self._process = process
        return process


def _ask(process: subprocess.Popen[bytes], line: str, timeout: float) -> str | None:
    assert process.stdin is not None
    try:
        process.stdin.write(line.encode() + b"\n")
    except OSError:
        return None
    return _read(process, timeout)


def _read(process: subprocess.Popen[bytes], timeout: float) -> str | None:
    """The next line that a process writes; None if it does not come in time."""
    assert process.stdout is not None
    end, line = time.monotonic() + timeout, b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
        chunk = os.read(process.stdout.fileno(), 64) if ready else b""
        if not chunk:  # too late, or the process is gone
            return None
        line += chunk
    return line.decode().strip()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def check_installed() -> None:
    """Raise PolicyError if math-verify is not there."""
    if importlib.util.find_spec("math_verify") is None:
        raise PolicyError(
            "Expected math-verify, which compares mathematical answers: pip install 'math-verify[antlr4_9_3]'."
        )


WORKER = MathWorker()
"""Shared by all rewards of a process; it ends when its input does, which is when this process ends."""
