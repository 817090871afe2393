"""Rewards of what was written: its form, its length, and how often it says the same."""

from __future__ import annotations

import re
from typing import Literal

from modules.functional import grammar
from modules.rewards.base import Reward
from modules.trajectory import Trajectory

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")  # Chinese has no spaces


class Format(Reward):
    """1 if the text has the form asked for.

    Args:
        form: ``tags``: thinking and answer tags in order, once each (paper); ``final_answer``: the
            text ends in exactly one answer span (the authors' code).
        weight: see `Reward`.
        requires: see `Reward`.
    """

    def __init__(
        self, form: Literal["tags", "final_answer"] = "tags", weight: float = 1.0, requires: str | None = None
    ) -> None:
        super().__init__(weight, requires)
        self.form = form

    def __call__(self, trajectory: Trajectory) -> float:
        """See `Reward`."""
        check = grammar.well_formed if self.form == "tags" else grammar.ends_in_one_answer
        return float(check(trajectory.text))


class Length(Reward):
    """Pays for characters of reasoning, up to a cap.

    Args:
        per_character: 0.001 in the paper, 0.01 in the authors' code.
        cap: 0.25 in the paper, 0.10 in the authors' code.
        of: ``text``: all that was written (paper); ``shortest_segment``: the shortest piece of text
            between boxes (code).
        weight: see `Reward`.
        requires: see `Reward`.
    """

    def __init__(
        self,
        per_character: float,
        cap: float,
        of: Literal["text", "shortest_segment"] = "text",
        weight: float = 1.0,
        requires: str | None = None,
    ) -> None:
        super().__init__(weight, requires)
        self.per_character, self.cap, self.of = per_character, cap, of

    def __call__(self, trajectory: Trajectory) -> float:
        """See `Reward`."""
        text = trajectory.text
        segments = [text] if self.of == "text" else grammar.segments_between_boxes(text)
        return min(self.per_character * min(map(len, segments), default=0), self.cap)


class Repetition(Reward):
    """Minus the share of word n-grams that have occurred before: 0 for a text that never repeats itself, else below.

    Boxes do not count as text. The penalty of arXiv 2502.03373, with ``weight`` as its largest.

    Args:
        n: words in an n-gram.
        weight: see `Reward`.
        requires: see `Reward`.
    """

    def __init__(self, n: int = 4, weight: float = 1.0, requires: str | None = None) -> None:
        super().__init__(weight, requires)
        if n < 1:
            raise ValueError(f"Expected `n` to be at least 1, but got {n}.")
        self.n = n

    def __call__(self, trajectory: Trajectory) -> float:
        """See `Reward`."""
        words = _WORD.findall(" ".join(grammar.segments_between_boxes(trajectory.text)).lower())
        grams = list(zip(*(words[k:] for k in range(self.n)), strict=False))
        return len(set(grams)) / len(grams) - 1 if grams else 0.0
