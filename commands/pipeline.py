"""Several runs after one another, each from the weights of an earlier one; then a report.

    python train.py pipeline --config configs/quickstart/pipeline.yaml [--seed 3] [--run_dir DIR]

Each stage is the command line of `commands.cli`, run in this process, in a folder of its own. A stage
that has ended is not run again; one that was interrupted goes on from its ``last.ckpt``. Both hold only
as long as its fingerprint stays the same: of its arguments, its configuration files and the stage that
it starts from. Otherwise its folder is moved aside and the stage is run anew.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from callbacks.predictions import RECORD as EVALUATION
from commands.cli import cli, first_rank, write_json
from commands.report import Report, ReportError, build, table
from commands.suggest import Parser

RECORD = "stage.json"  # fingerprint of a stage, and whether it has ended
FINAL = "final.ckpt"  # what a fit stage leaves to the stages that start from it
WAIT = 60.0  # seconds in which the first rank has to prepare a folder


class PipelineError(Exception):
    """A pipeline that cannot be run as it is written."""


@dataclass(frozen=True)
class Stage:
    """One run.

    Args:
        name: of the stage and of its folder.
        command: what is run.
        configs: YAML files, later ones over earlier ones.
        start_from: an earlier fit stage, whose final weights are this one's first.
        args: further arguments of the command line, such as ``--trainer.max_steps=100``.
    """

    name: str
    command: Literal["fit", "test"] = "fit"
    configs: list[str] = field(default_factory=list)
    start_from: str | None = None
    args: list[str] = field(default_factory=list)


def main(args: Sequence[str]) -> None:
    """Parse the command line of a pipeline and run it.

    Raises:
        SystemExit: with code 2 after a message if it is wrong, with that of a stage that fails.
    """
    parser = Parser(prog="train.py pipeline", description="Run stage after stage, then a report.", allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="YAML of the pipeline.")
    parser.add_function_arguments(pipeline)
    config = parser.parse_args(list(args))
    try:
        values = parser.instantiate(config)
        pipeline(values.stages, values.run_dir, values.seed, values.report)
    except (PipelineError, ReportError) as error:
        parser.error(str(error))


def pipeline(stages: list[Stage], run_dir: str, seed: int = 0, report: Report | None = None) -> None:
    """Run what has not ended yet.

    Args:
        stages: in the order in which they are run.
        run_dir: folder of the stages' folders and of ``results.json``.
        seed: of every stage.
        report: made of the test stages at the end.

    Raises:
        PipelineError: if stages or report do not fit together, or a configuration file is missing.
        ReportError: if the predictions do not give the report.
    """
    check(stages, report)
    root = Path(run_dir)
    prints: dict[str, str] = {}
    for stage in stages:
        prints[stage.name] = fingerprint(stage, seed, prints.get(stage.start_from or ""))
        run_stage(stage, root, seed, prints[stage.name])
    if report is not None and first_rank():
        results = build(report, root)
        write_json(root / "results.json", results)
        print(f"\n{table(report, results)}\n\nwritten to {root / 'results.json'}")


def check(stages: Sequence[Stage], report: Report | None) -> None:
    """Find the mistakes that would otherwise end the pipeline after hours.

    Raises:
        PipelineError: see `pipeline`.
    """
    fits: list[str] = []
    tests: list[str] = []
    for stage in stages:
        if stage.name in fits + tests:
            raise PipelineError(f"Expected stages to have names of their own, but two are called {stage.name!r}.")
        if stage.start_from is not None and stage.start_from not in fits:
            raise PipelineError(
                f"Expected `start_from` of stage {stage.name!r} to be an earlier fit stage "
                f"({', '.join(fits) or 'there is none'}), but got {stage.start_from!r}."
            )
        for config in stage.configs:
            if not Path(config).is_file():
                raise PipelineError(
                    f"Expected stage {stage.name!r} to have a configuration file {config}, but there is none."
                )
        (fits if stage.command == "fit" else tests).append(stage.name)
    if report is not None:
        check_report(report, fits, tests)


def check_report(report: Report, fits: Sequence[str], tests: Sequence[str]) -> None:
    """Whether everything that the report names is there.

    Raises:
        PipelineError: if not.
    """
    named = [(f"`test` of row {name!r}", row.test, tests) for name, row in report.rows.items()]
    named += [
        (f"`seconds_from` of row {name!r}", fit, fits) for name, row in report.rows.items() for fit in row.seconds_from
    ]
    named += [(f"comparison {name!r}", row, list(report.rows)) for name, pair in report.compare.items() for row in pair]
    for what, got, known in named:
        if got not in known:
            raise PipelineError(f"Expected {what} to be one of {', '.join(known) or 'none'}, but got {got!r}.")
    if both := sorted(set(report.rows) & set(report.compare)):
        raise PipelineError(f"Expected rows and comparisons to have names of their own, but both have {both[0]!r}.")


def fingerprint(stage: Stage, seed: int, parent: str | None) -> str:
    """What decides a stage's result, as far as it is written down, in 16 hexadecimal digits.

    Args:
        stage: its arguments and the text of its configuration files count, not their names.
        seed: of the run.
        parent: fingerprint of the stage that it starts from.
    """
    texts = [Path(config).read_text(encoding="utf-8") for config in stage.configs]
    said = json.dumps([stage.command, stage.args, texts, seed, parent])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def run_stage(stage: Stage, root: Path, seed: int, mark: str) -> None:
    """Run one stage unless it has ended, and say so in a line."""
    folder = root / stage.name
    if ended(folder, mark):
        say(stage, folder, "done before")
        return
    prepare(folder, mark)
    start = time.perf_counter()
    try:
        trainer = cli(arguments(stage, root, seed)).trainer
        if stage.command == "fit":
            trainer.save_checkpoint(folder / FINAL, weights_only=False)  # atomic, and all ranks wait for it
    except (Exception, SystemExit) as error:
        stopped = (
            f"pipeline: stage {stage.name!r} in {folder} did not end; run the same command again to go on from there"
        )
        if not isinstance(error, SystemExit):
            error.add_note(stopped)  # below the traceback
        elif error.code:  # a job that puts itself back into the queue exits with 0
            print(stopped, file=sys.stderr)
        raise
    write_json(folder / RECORD, {"fingerprint": mark, "ended": True, "stage": asdict(stage), "seed": seed})
    say(stage, folder, f"{time.perf_counter() - start:.1f} s")


def arguments(stage: Stage, root: Path, seed: int) -> list[str]:
    """The command line of a stage."""
    folder = root / stage.name
    argv = [stage.command, *(f"--config={config}" for config in stage.configs)]
    argv += [f"--run_dir={folder}", f"--seed_everything={seed}"]
    if stage.start_from is not None:
        argv.append(f"--model.init_args.init_from={root / stage.start_from / FINAL}")
    if stage.command == "fit" and (folder / "last.ckpt").exists():
        argv.append("--ckpt_path=last")
    return argv + stage.args


def recorded(folder: Path) -> dict[str, object]:
    """What the folder says of its stage; empty if it says nothing."""
    file = folder / RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def ended(folder: Path, mark: str) -> bool:
    """Whether the same stage has ended here."""
    record = recorded(folder)
    return record.get("fingerprint") == mark and record.get("ended") is True


def prepare(folder: Path, mark: str) -> None:
    """A folder in which the stage can start or go on; what is of no use to it is moved aside.

    Only the first rank does it. The others come here on their own and wait, so that none of them goes on
    from a checkpoint that is about to be moved.

    Raises:
        PipelineError: if the first rank has not done it in time.
    """
    if first_rank():
        same = recorded(folder).get("fingerprint") == mark
        useful = any((folder / name).exists() for name in ("last.ckpt", EVALUATION))  # to a fit, to a test
        if not (same and useful) and folder.exists() and any(folder.iterdir()):
            move_aside(folder)
        write_json(folder / RECORD, {"fingerprint": mark, "ended": False})
        return
    deadline = time.monotonic() + WAIT
    while recorded(folder).get("fingerprint") != mark:
        if time.monotonic() > deadline:
            raise PipelineError(f"Expected the first rank to prepare {folder} within {WAIT:.0f} s.")
        time.sleep(0.1)


def move_aside(folder: Path) -> None:
    """Rename ``folder`` to ``folder.old-<k>``, k the first that is free."""
    k = 1
    while (old := folder.with_name(f"{folder.name}.old-{k}")).exists():
        k += 1
    folder.rename(old)
    print(f"pipeline: {folder} was of another run, moved to {old}")


def say(stage: Stage, folder: Path, what: str) -> None:
    """One line a stage."""
    if first_rank():
        print(f"pipeline: {stage.name:<16} {stage.command:<4} {folder}  {what}", flush=True)
