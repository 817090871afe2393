"""One row a ratio, measured side by side: how it is timed, what it has to reach, how it is printed.

A module that measures offers ``ROWS: dict[str, Callable[[], Row]]``, the name of each row and the function that
measures it; `benchmarks.run` runs them and makes one table. A row is a ratio, never seconds: seconds are of a machine
and of its load, a ratio of two sides that took turns is of the code. Seconds and counts stand in ``detail``.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One ratio, and what it is to reach.

    Args:
        name: what was measured, over what; as it stands in the table.
        value: the ratio.
        target: what it is held against.
        at_most: whether the value is to be at most the target; else at least.
        spread: the smallest and the largest ratio of a single round; twice the value for what is counted, not timed.
        detail: what the ratio came from: seconds of each side, counts, sizes. Has to fit into JSON.

    Raises:
        ValueError: a number that is not finite, or a value outside its own spread.
    """

    name: str
    value: float
    target: float
    at_most: bool
    spread: tuple[float, float]
    detail: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(math.isfinite(number) for number in (self.value, self.target, *self.spread)):
            raise ValueError(f"Expected the numbers of row {self.name!r} to be finite, but got {self}.")
        if not self.spread[0] <= self.value <= self.spread[1]:
            raise ValueError(
                f"Expected the value of row {self.name!r} to lie in its spread {self.spread}, but got {self.value}."
            )

    @property
    def met(self) -> bool:
        """Whether the value reaches the target."""
        return self.value <= self.target if self.at_most else self.value >= self.target


def interleaved(sides: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each side, round by round: in a round each side runs once, so that all see the same load.

    Every second round goes backwards: whoever follows a side that heats caches or fills memory is not always the same.

    Args:
        sides: what to time, by name.
        repeats: how many rounds count.
        warm_up: how many rounds are run before, and not counted.

    Returns:
        For each side ``repeats`` times, the k-th of one side beside the k-th of the others.

    Raises:
        ValueError: no rounds.
    """
    if repeats < 1:
        raise ValueError(f"Expected `repeats` to be at least 1, but got {repeats}.")
    order = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for number in range(-warm_up, repeats):
        for name in reversed(order) if number % 2 else order:
            start = time.perf_counter()
            sides[name]()
            took = time.perf_counter() - start
            if number >= 0:
                seconds[name].append(took)
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The median over rounds of ``above / below``, and its spread.

    A round's two times are close together, so their ratio holds where the load changes from round to round; the ratio
    of two medians would mix rounds.

    Args:
        above: a positive number a round.
        below: as many.

    Returns:
        The median, and the smallest and the largest ratio of a round.

    Raises:
        ValueError: different numbers of rounds, none, or a number that is not positive.
    """
    if len(above) != len(below) or not above:
        raise ValueError(
            f"Expected as many rounds above as below, at least one, but got {len(above)} and {len(below)}."
        )
    if min(*above, *below) <= 0:
        raise ValueError(f"Expected positive numbers, but got {list(above)} over {list(below)}.")
    rounds = [a / b for a, b in zip(above, below, strict=True)]
    return statistics.median(rounds), (min(rounds), max(rounds))


def seconds_of(times: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """For ``detail``: of each side the median, and every round."""
    return {
        name: {"median_s": round(statistics.median(taken), 4), "rounds_s": [round(second, 4) for second in taken]}
        for name, taken in times.items()
    }


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch while the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def markdown(rows: Sequence[Row], not_run: Mapping[str, str] | None = None) -> str:
    """The rows as a Markdown table; those that were not run (name and why) stand below, without a number."""
    lines = ["| measured | ratio | smallest - largest | target | reached |", "|---|---|---|---|---|"]
    for row in rows:
        low, high = (_number(end) for end in row.spread)
        spread = "counted" if row.spread[0] == row.spread[1] else f"{low} - {high}"
        target = f"{'≤' if row.at_most else '≥'} {_number(row.target)}"
        lines.append(f"| {row.name} | {_number(row.value)} | {spread} | {target} | {'yes' if row.met else 'NO'} |")
    lines += [f"| {name} | not run: {why} | | | |" for name, why in (not_run or {}).items()]
    return "\n".join(lines)


def _number(value: float) -> str:
    """Three significant digits at least, and what stands before the point."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.4g}" if 1 <= abs(value) < 1.1 else f"{value:#.3g}"
