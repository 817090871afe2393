"""The other side of a comparison in a process of its own, with threads and memory for itself."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

Turn = Callable[[Any], None]  # says what has come of the turn that ends, and waits for the next


class Elsewhere:
    """Runs ``side(turn, *args)`` in another process, a turn at a time; it does nothing while this process works.

    ``side`` calls ``turn(None)`` where its first turn is to begin, and ``turn(told)`` at the end of each.

    Args:
        side: a function of a module, as other processes start anew.
        args: what else it is given.
    """

    def __init__(self, side: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, torch.get_num_threads(), side, args), name=side.__name__, daemon=True
        )
        self._process.start()
        theirs.close()  # the other process has its own: without it, this one hears when that one dies

    def __enter__(self) -> Elsewhere:
        """Wait until its first turn may begin."""
        self._answer()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The other process ends; what it has left to do is of no interest."""
        self._process.kill()
        self._process.join()

    def step(self) -> Any:
        """One turn; returns what it told."""
        return self._answer(ask=True)

    def _answer(self, ask: bool = False) -> Any:
        try:
            if ask:
                self._connection.send(None)
            failed, told = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise RuntimeError(
                f"Expected {self._process.name} to take its turn, but it ended with {self._process.exitcode}."
            ) from None
        if failed:
            raise RuntimeError(f"Expected {self._process.name} to take its turn, but it failed:\n{told}")
        return told


def _serve(connection: Connection, threads: int, side: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)

    def turn(told: Any) -> None:
        connection.send((False, told))
        connection.recv()

    try:
        side(turn, *args)
        raise RuntimeError("it has no further turn")
    except Exception:
        connection.send((True, traceback.format_exc()))
