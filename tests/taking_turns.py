"""Sides of a comparison, for `benchmarks.elsewhere`; alone in a file, for a new process imports it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def counting(turn: Callable[[Any], None], start: int, turns: int) -> None:
    """Tells start, start + 1, ..., and fails after so many turns."""
    turn(None)
    for number in range(start, start + turns):
        turn(number)
    raise ValueError("no more numbers")


def dying(turn: Callable[[Any], None]) -> None:
    """Ends in the middle of a turn, without a word."""
    turn(None)
    os._exit(7)
