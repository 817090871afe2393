"""How far a build is, what it kept and what it has cost: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType

from tqdm import tqdm

from datamodules.vlir.endpoint import Caller

LINE_SECONDS = 15.0


class Meter:
    """Counts questions.

    Args:
        total: how many there are.
        callers: who pays.
    """

    def __init__(self, total: int, callers: Sequence[Caller]) -> None:
        self.total, self.callers = total, callers
        self.done = self.kept = 0
        self._plain = not sys.stderr.isatty()
        self._bar = tqdm(total=total, unit="question", disable=self._plain)
        self._due = 0.0

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._plain:
            self._line()

    def add(self, kept: bool) -> None:
        """One more question, and whether it became a sample."""
        self.done += 1
        self.kept += kept
        self._bar.set_postfix_str(self._numbers(), refresh=False)
        self._bar.update()
        if self._plain and time.monotonic() > self._due:
            self._due = time.monotonic() + LINE_SECONDS
            self._line()

    def _numbers(self) -> str:
        spent = sum(caller.spent for caller in self.callers)
        share = self.kept / self.done if self.done else 0.0
        return f"kept {self.kept} ({share:.0%}), cost of this run {spent:.2f}"

    def _line(self) -> None:
        print(f"{self.done} of {self.total} questions, {self._numbers()}", file=sys.stderr, flush=True)
