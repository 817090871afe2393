"""A grid's cells on TensorBoard's HParams page."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter

from commands.grid import Cell, Grid

ABSENT = "-"  # no such key in this cell's configuration


def write_hparams(grid: Grid, every: Mapping[tuple[str, int], Cell], results: Mapping[str, Any], folder: Path) -> None:
    """One run a cell that has ended, in place of those that were there.

    The page takes its columns from whichever run it meets first: all runs here have the same ones, and single runs
    are to be looked at apart.

    Args:
        grid: its rows.
        every: (name, seed) -> cell.
        results: see `commands.table.build`.
        folder: of the event files; nothing else is kept there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    rows = results["rows"]
    metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row["metrics"]))
    for name, row in rows.items():
        for seed in (int(seed) for seed, said in row["cells"].items() if said == "ended"):
            found = {metric: (row["metrics"].get(metric) or {}).get("values", {}).get(str(seed)) for metric in metrics}
            with SummaryWriter(folder / f"seed_{seed}" / name) as writer:
                writer.add_hparams(
                    hyperparameters(grid, every[name, seed]),
                    {metric: math.nan if value is None else value for metric, value in found.items()},
                    run_name=".",  # else a folder within, named by the time
                )


def hyperparameters(grid: Grid, cell: Cell) -> dict[str, Any]:
    """``row``, ``seed``, and every key that some row changes, as the run's own saved configuration has it.

    Keys of a test begin with ``test.``. Values are JSON, for one column must not mix types; entries that a
    row removes are ``kept`` or ``removed``.
    """
    parts = (
        ("", list(grid.rows.values()), saved(cell.weights / "config.yaml")),
        ("test.", [row.test for row in grid.rows.values()], saved(cell.root / cell.name / "test" / "config.test.yaml")),
    )
    found: dict[str, Any] = {"row": cell.name, "seed": cell.seed}
    for prefix, changed, config in parts:
        for key in dict.fromkeys(key for part in changed for key in part.set):
            found[prefix + key] = json.dumps(look_up(config, key)) if has(config, key) else ABSENT
        for key in dict.fromkeys(key for part in changed for key in part.remove):
            found[prefix + key] = "kept" if has(config, key) else "removed"
    own = grid.rows[cell.name]
    return {**found, "mode": own.mode, "configs": " ".join([*own.configs, *own.test.configs]) or ABSENT}


def saved(file: Path) -> Mapping[str, Any]:
    """A run's configuration; empty if it has left none."""
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}


def has(config: Any, key: str) -> bool:
    """Whether a dotted key is there."""
    for part in key.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return False
        config = config[part]
    return True


def look_up(config: Any, key: str) -> Any:
    """The value of a dotted key that is there."""
    for part in key.split("."):
        config = config[part]
    return config
