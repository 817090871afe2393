"""Two kills of two processes; ``python -m tests.kills --kills 20`` is the same with more of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kills import kill_and_compare, parted


@pytest.mark.slow
def test_runs_that_were_killed_end_as_if_nobody_had(tmp_path: Path) -> None:
    said = list(kill_and_compare(tmp_path, kills=2, seed=0, strategy="ddp"))
    assert sum(line.startswith("kill ") for line in said) == 2
    assert said[-1].startswith("2 kills of ")


def test_curves_that_part_are_named() -> None:
    nan = float("nan")
    assert parted({0: 1.0, 1: nan}, {0: 1.0, 1: nan}) == []
    assert parted({0: 1.0, 1: 1.0, 2: 2.0}, {0: 1.0, 2: 2.0}) == []  # repeated, not measured
    assert parted({0: 1.0, 1: 1.5}, {0: 1.0}) == ["step 1: 1.5 and None"]
    assert parted({0: 1.0}, {0: 1.0, 1: 1.0}) == ["step 1: None and 1.0"]
    assert parted({0: 1.0}, {0: 1.0000001}) == ["step 0: 1.0 and 1.0000001"]
