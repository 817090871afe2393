"""A grid of ablations: what is the same for all, the rows, and the stages that they come to.

A row is a set of overrides of one fit and one test, or a test of weights that are there already. Row and
seed make a cell. A cell's stages are ordinary `commands.pipeline.Stage`: each can be run by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from commands.pipeline import PipelineError, Stage, check, fingerprint, recorded

NOTHING = "none"  # as `start_from` of a row: its fit starts from no shared stage
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")  # of a row: it is the name of a folder


@dataclass(frozen=True)
class Part:
    """Configuration files and what is changed in them.

    Args:
        configs: YAML files, later ones over earlier ones.
        set: dotted key -> value, over the files: ``model.init_args.objective.scale_by_std: true``.
        remove: dotted keys of entries that are left out of a mapping of names, such as ``rollout.rewards.format``.
    """

    configs: list[str] = field(default_factory=list)
    set: dict[str, Any] = field(default_factory=dict)
    remove: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Fit(Part):
    """A fit.

    Args:
        start_from: shared stage, whose final weights are this one's first; null: none.
    """

    start_from: str | None = None


@dataclass(frozen=True)
class Row(Part):
    """One row of the table: what differs from the grid's `fit` and `test`.

    Args:
        start_from: another shared stage than the grid's; ``none``: no stage at all; null: the grid's.
        test_of: row or shared stage whose weights are tested; this row then has no fit of its own.
        test: what differs from the grid's test.
        mode: which predictions of the test are counted; sampled accuracy is counted in ``greedy`` rows only.
    """

    start_from: str | None = None
    test_of: str | None = None
    test: Part = Part()
    mode: str = "greedy"


@dataclass(frozen=True)
class Grid:
    """Everything that `commands.ablate` is told.

    Args:
        rows: name -> row, in the order of the table.
        base: the row that all are compared with.
        run_dir: folder of all that is written.
        seeds: so many, from 0 on, or the seeds themselves.
        config: YAML files of every stage, before its own.
        stages: name -> fit that rows start from or test; run once a seed. Later ones can start from earlier ones.
        fit: what the fits of all rows have in common.
        test: what the tests of all rows have in common.
        sampled_mode: mode of the predictions that give ``sampled_accuracy``; null: not measured.
        by: key of the predictions, such as ``source``, by whose values accuracies and zoom rates are also broken down.
    """

    rows: dict[str, Row]
    base: str
    run_dir: str = "runs/ablations"
    seeds: int | list[int] = 3
    config: list[str] = field(default_factory=list)
    stages: dict[str, Fit] = field(default_factory=dict)
    fit: Fit = Fit()
    test: Part = Part()
    sampled_mode: str | None = "sampled"
    by: str | None = None

    @property
    def seed_list(self) -> list[int]:
        """The seeds themselves."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    def root(self, seed: int) -> Path:
        """Folder of a seed."""
        return Path(self.run_dir) / f"seed_{seed}"


@dataclass(frozen=True)
class Cell:
    """What is run as one: a row with a seed, or a shared stage with a seed.

    Args:
        name: of the row or shared stage.
        root: folder of the seed.
        seed: of all its stages.
        own: how many of `stages` are its own, at the end.
        stages: those whose weights it takes, then its own; the last one last.
        needs: the cells of the same seed, by name, that these are of.
    """

    name: str
    root: Path
    seed: int
    own: int
    stages: tuple[Stage, ...]
    needs: tuple[str, ...]

    @property
    def id(self) -> str:
        """As it is called on the command line: ``seed_0/rgrpo``."""
        return f"{self.root.name}/{self.name}"

    @property
    def weights(self) -> Path:
        """Folder of the fit whose weights it is about."""
        return self.root / [stage.name for stage in self.stages if stage.command == "fit"][-1]

    def marks(self) -> list[str]:
        """The fingerprint of each stage."""
        marks: dict[str, str] = {}
        for stage in self.stages:
            marks[stage.name] = fingerprint(stage, self.seed, marks.get(stage.start_from or ""))
        return list(marks.values())

    def states(self) -> list[str]:
        """Of each stage: ``ended``, ``failed: <why>``, ``not ended`` or ``not run``, by its present configuration."""
        return [state(self.root / stage.name, mark) for stage, mark in zip(self.stages, self.marks(), strict=True)]

    def has_ended(self) -> bool:
        """Whether all of its stages have ended."""
        return set(self.states()) == {"ended"}


def state(folder: Path, mark: str) -> str:
    """See `Cell.states`."""
    record = recorded(folder)
    if record.get("fingerprint") != mark:
        return "not run"
    if record.get("ended"):
        return "ended"
    return f"failed: {record['failed']}" if "failed" in record else "not ended"


def check_grid(grid: Grid) -> None:
    """Find the mistakes that would otherwise be found after hours.

    Raises:
        PipelineError: naming row and key.
    """
    if grid.base not in grid.rows:
        raise PipelineError(f"Expected `base` to be one of the rows ({', '.join(grid.rows)}), but got {grid.base!r}.")
    if not grid.seed_list or min(grid.seed_list) < 0 or len(set(grid.seed_list)) < len(grid.seed_list):
        raise PipelineError(f"Expected `seeds` to be different and at least one, none below 0, but got {grid.seeds!r}.")
    for name in (*grid.stages, *grid.rows):
        if not NAME.fullmatch(name):
            raise PipelineError(f"Expected names of rows and stages to be names of folders, but got {name!r}.")
    if NOTHING in grid.stages:
        raise PipelineError(f"Expected no stage to be called {NOTHING!r}: it is what a row that has none starts from.")
    if both := sorted(set(grid.rows) & set(grid.stages)):
        raise PipelineError(f"Expected rows and stages to have names of their own, but both have {both[0]!r}.")
    for name, row in grid.rows.items():
        if row.test_of is None:
            continue
        fitted = [*grid.stages, *(other for other, each in grid.rows.items() if each.test_of is None)]
        if row.test_of not in fitted:
            raise PipelineError(
                f"Expected `test_of` of row {name!r} to be one of {', '.join(fitted)}, but got {row.test_of!r}."
            )
        if given := [key for key in ("configs", "set", "remove", "start_from") if getattr(row, key)]:
            raise PipelineError(
                f"Expected row {name!r} to have no `{given[0]}`: with `test_of` it has no fit; "
                "what changes the test stands below `test`."
            )
    check([stage for each in cells(grid, 0) for stage in each.stages[-each.own :]], None)


def cells(grid: Grid, seed: int) -> list[Cell]:
    """Shared stages, then rows, with one seed, each after those that it needs.

    Raises:
        PipelineError: if an entry that is to be removed is not there, or a file with it cannot be read.
    """
    made: dict[str, Cell] = {}
    first = Part(configs=grid.config)

    def add(name: str, stages: list[Stage], after: str | None) -> None:
        before = () if after is None else fits(made, after)
        needs = () if after is None else (after, *made[after].needs)
        made[name] = Cell(name, grid.root(seed), seed, len(stages), (*before, *stages), needs)

    for name, fit in grid.stages.items():
        add(name, [_fit(name, name, merged(first, fit), fit.start_from)], fit.start_from)
    for name, row in sorted(grid.rows.items(), key=lambda item: item[1].test_of in grid.rows):  # stable
        test = merged(first, grid.test, row.test)
        said = row.start_from or grid.fit.start_from
        start = None if said == NOTHING else said
        if row.test_of is None:
            trained = _fit(name, f"{name}/fit", merged(first, grid.fit, row), start)
            add(name, [trained, _test(name, test, trained.name)], start)
        else:
            add(name, [_test(name, test, fits(made, row.test_of)[-1].name)], row.test_of)
    return list(made.values())


def fits(made: Mapping[str, Cell], name: str) -> tuple[Stage, ...]:
    """The fits that a cell's weights come from, in order.

    Raises:
        PipelineError: if there is no such cell yet.
    """
    if name not in made:
        raise PipelineError(
            f"Expected `start_from` to be an earlier shared stage ({', '.join(made) or 'there is none'}), "
            f"but got {name!r}."
        )
    return tuple(stage for stage in made[name].stages if stage.command == "fit")


def merged(*parts: Part) -> Part:
    """Parts over one another, later ones over earlier ones."""
    return Part(
        configs=[config for part in parts for config in part.configs],
        set={key: value for part in parts for key, value in part.set.items()},
        remove=list(dict.fromkeys(key for part in parts for key in part.remove)),
    )


def arguments(where: str, part: Part) -> list[str]:
    """What `set` and `remove` are on a command line.

    A mapping of names is replaced by a later one as a whole, so that an entry is removed by giving the last of
    the files' mappings again without it.

    Args:
        where: that says so, for messages.
        part: its files are read if anything is to be removed.

    Raises:
        PipelineError: see `cells`.
    """
    left: dict[str, dict[str, Any]] = {}
    for key in part.remove:
        parent, _, entry = key.rpartition(".")
        found = _mappings(part.configs, parent)
        known = [f"{parent}.{name}" for name in dict.fromkeys(name for each in found for name in each)]
        there = f" ({', '.join(known)})" if known else ""
        if key not in known:
            raise PipelineError(
                f"Expected `remove` of {where} to name entries of its configuration files{there}, but got {key!r}."
            )
        left.setdefault(parent, dict(found[-1])).pop(entry, None)  # perhaps another file lacks it already
    return [
        *(f"--{parent}={json.dumps(mapping)}" for parent, mapping in left.items()),
        *(f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in part.set.items()),
    ]


def _fit(where: str, name: str, part: Part, start_from: str | None) -> Stage:
    return Stage(name, "fit", part.configs, start_from, arguments(repr(where), part))


def _test(where: str, part: Part, start_from: str) -> Stage:
    return Stage(f"{where}/test", "test", part.configs, start_from, arguments(f"the test of {where!r}", part))


def _mappings(configs: Sequence[str], key: str) -> list[Mapping[str, Any]]:
    """What the files that have a key say of it."""
    said = []
    for config in configs:
        try:
            found = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise PipelineError(f"Expected {config} to be a YAML file, but: {error}") from error
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping):
            said.append(found)
    return said
