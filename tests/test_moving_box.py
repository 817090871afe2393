"""The answer's gradient alone moves a box onto an object, and the figure of it can be drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.moving_box import STEPS, main, move


@pytest.mark.parametrize("seed", [5, 7])
def test_a_box_moves_onto_the_object(seed: int) -> None:
    run = move(seed)
    assert run.overlap(0) < 0.6
    assert run.overlap(-1) > 0.8
    assert run.losses[-1] < 0.1 * run.losses[0]
    assert len(run.path) == STEPS + 1


def test_the_command_reports_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "1", "--figure", str(tmp_path / "new" / "box.png")]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[1].split()[1:3] == rows[-1].split()[1:]  # the mean of one
    with Image.open(tmp_path / "new" / "box.png") as image:
        assert min(image.size) > 100
