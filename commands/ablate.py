"""Ablations: every row of a grid with every seed, each an ordinary run in a folder of its own; then a table.

    python train.py ablate --grid configs/ablations/quickstart.yaml --seeds 3 --jobs 2
    python train.py ablate --grid configs/ablations/quickstart.yaml --list            # the cells and their indices
    python train.py ablate --grid configs/ablations/quickstart.yaml --cell 7          # one of them, in this process
    python train.py ablate --grid configs/ablations/quickstart.yaml --cell array      # the one of this SLURM array task
    python train.py ablate --grid configs/ablations/quickstart.yaml --table           # the table of what is there

A row with a seed is a cell. Its stages are those of a pipeline: what has ended is not run again unless its
configuration or what it starts from has changed, what was interrupted goes on from its last checkpoint. A
cell that fails does not stop the others; it stands in the table as failed, and the exit code is 1.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from pathlib import Path

from filelock import FileLock, Timeout

from callbacks.requeue import NOTICE, SIGNAL, PutBack, job_name
from commands.cli import cli, first_rank, write_json
from commands.grid import Cell, Grid, cells, check_grid
from commands.jobs import run_all
from commands.pipeline import RECORD, PipelineError, arguments, ended, recorded, run_stage
from commands.report import ReportError
from commands.suggest import Parser
from commands.table import outcome, write_table

POLL = 5.0  # seconds between two looks at a lock


def main(args: Sequence[str]) -> None:
    """Parse the command line of a grid and do what it says.

    Raises:
        SystemExit: with code 2 after a message if it is wrong, 1 if a cell has not ended or cannot be read.
    """
    parser = Parser(
        prog="train.py ablate", description="Run the cells of a grid and tabulate them.", allow_abbrev=False
    )
    parser.add_argument("--grid", action="config", help="YAML of the grid.")
    parser.add_argument("--jobs", type=int, default=1, help="Cells that run at once on this machine.")
    parser.add_argument("--cell", type=str, default=None, help="Only this cell: index, name, or array (SLURM).")
    parser.add_argument("--list", action="store_true", help="Print the cells and their state.")
    parser.add_argument("--table", action="store_true", help="Only write the table of what is there.")
    parser.add_class_arguments(Grid)
    values = parser.instantiate(parser.parse_args(in_order(args)))
    grid = Grid(**{each.name: values[each.name] for each in fields(Grid)})
    try:
        if values.jobs < 1:
            raise PipelineError(f"Expected `jobs` to be at least 1, but got {values.jobs}.")
        check_grid(grid)
        if values.list:
            print(listing(grid))
        elif values.table:
            if write_table(grid):
                sys.exit(1)
        elif values.cell is not None:
            run_cell(grid, chosen(grid, values.cell))
        else:
            check_lines(grid)
            well = run_all([*every(grid)], args, values.jobs)
            unread = write_table(grid)
            if unread or not all(well):
                sys.exit(1)
    except (PipelineError, ReportError) as error:
        parser.error(str(error))


def in_order(args: Sequence[str]) -> list[str]:
    """Every ``--config FILE`` as ``--config+=FILE``, behind the grid, whose own files come first."""
    others: list[str] = []
    configs: list[str] = []
    words = iter(args)
    for word in words:
        if word == "--config" and (file := next(words, None)) is not None:
            configs.append(f"--config+={file}")
        elif word.startswith("--config="):
            configs.append(f"--config+={word.partition('=')[2]}")
        else:
            others.append(word)
    return others + configs


def every(grid: Grid) -> Iterator[Cell]:
    """All cells, shared stages included, each after those that it needs; seed after seed."""
    for seed in grid.seed_list:
        yield from cells(grid, seed)


def indexed(grid: Grid) -> list[Cell]:
    """The cells of the table, in the order of their indices: all rows with the first seed, then with the next."""
    return [cell for cell in every(grid) if cell.name in grid.rows]


def chosen(grid: Grid, said: str) -> Cell:
    """The cell that the command line asks for.

    Raises:
        PipelineError: if there is none.
    """
    if said == "array":
        if (task := os.environ.get("SLURM_ARRAY_TASK_ID")) is None:
            raise PipelineError("Expected `--cell array` to run in a SLURM array, but SLURM_ARRAY_TASK_ID is not set.")
        said = task
    if said.isdecimal():
        numbered = indexed(grid)
        if int(said) >= len(numbered):
            raise PipelineError(f"Expected `cell` to be an index from 0 to {len(numbered) - 1}, but got {said}.")
        return numbered[int(said)]
    for cell in every(grid):
        if cell.id == said:
            return cell
    raise PipelineError(f"Expected `cell` to be an index, array, or a name that `--list` prints, but got {said!r}.")


def listing(grid: Grid) -> str:
    """One line a cell: index (shared stages have none), name, state."""
    index = {cell.id: str(k) for k, cell in enumerate(indexed(grid))}
    return "\n".join(f"{index.get(cell.id, '-'):>4}  {cell.id:<40}  {outcome(cell.states())}" for cell in every(grid))


def check_lines(grid: Grid) -> None:
    """Parse the command line of every stage that is to be run, with the first seed: a slip is found now.

    Raises:
        PipelineError: naming the first that is wrong; why was printed before.
    """
    seed = grid.seed_list[0]
    waiting = [cell for cell in cells(grid, seed) if not cell.has_ended()]
    # tests that differ in nothing but their weights need one look
    different = {
        (stage.command, *stage.configs, *stage.args): (stage, cell.root)
        for cell in waiting
        for stage in cell.stages[-cell.own :]
    }
    for stage, root in different.values():
        try:
            with redirect_stdout(io.StringIO()):
                cli([*arguments(stage, root, seed), "--print_config"])
        except SystemExit as end:
            if end.code:
                raise PipelineError(f"Expected {stage.name!r} to be a run, but its command line is wrong.") from end


def run_cell(grid: Grid, cell: Cell) -> None:
    """Run a cell and what it takes weights from, in this process; then write the table.

    Raises:
        PipelineError: see `check_ranks`.
        SystemExit: as that of the stage that failed, see `run_stage`; with code 1 if its predictions cannot be read.
    """
    check_ranks(cell, os.environ)
    try:
        for stage, mark in zip(cell.stages, cell.marks(), strict=True):
            folder = cell.root / stage.name
            if ended(folder, mark):
                continue
            with alone(folder):
                try:
                    run_stage(stage, cell.root, cell.seed, mark)
                except (Exception, SystemExit) as error:
                    note_failure(folder, error)
                    raise
    finally:
        unread = write_table(grid) if first_rank() else []
    if cell.id in unread:
        sys.exit(1)


def check_ranks(cell: Cell, environment: Mapping[str, str]) -> None:
    """Whether all ranks of a cell will agree on which stages there are to run.

    Ranks that a scheduler started come here on their own, and only the first one waits for a lock: a stage that another
    task runs meanwhile would be over for some of them and not for others. (Ranks that Lightning starts join the first
    one within a stage; they have no RANK.)

    Args:
        cell: that they are to run.
        environment: variables of SLURM and torchrun.

    Raises:
        PipelineError: if there are several and a stage that other cells may run as well has not ended.
    """
    started = environment.get("WORLD_SIZE", "1") if "RANK" in environment else environment.get("SLURM_NTASKS", "1")
    if int(started) == 1:
        return
    shared = len(cell.stages) - cell.own
    for stage, mark in zip(cell.stages[:shared], cell.marks()[:shared], strict=True):
        if not ended(cell.root / stage.name, mark):
            raise PipelineError(
                f"Expected the shared stage {stage.name!r} to have ended before {started} ranks run {cell.id}, but it "
                f"has not: run the same command with `--cell={cell.root.name}/{stage.name.removesuffix('/fit')}` first."
            )


def note_failure(folder: Path, error: BaseException) -> None:
    """Put into a stage's record why it failed; a run that puts itself back into the queue has not."""
    if isinstance(error, SystemExit):
        reason = f"exit code {error.code}" if error.code else ""
    else:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if reason and (record := recorded(folder)):
        write_json(folder / RECORD, {**record, "failed": reason})


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a stage's folder; wait for whoever runs the stage now. Other ranks follow the first.

    Raises:
        SystemExit: SLURM has announced the end of a job that waits.
    """
    NOTICE.listen()
    if not first_rank():
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"ablate: {folder} is being run by another process; waiting for it", flush=True)
        while not taken(lock):
            if NOTICE.came and (job := job_name(os.environ)) is not None:
                sys.exit(PutBack(job, SIGNAL, "it has only waited", first=True).settle())
    try:
        yield
    finally:
        lock.release()


def taken(lock: FileLock) -> bool:
    """Whether a lock could be had within `POLL` seconds."""
    try:
        lock.acquire(timeout=POLL)
    except Timeout:
        return False
    return True
