"""The score of predictions that anyone saved, by the benchmark's official rule.

    python train.py rescore --benchmark mathvista --predictions output.json [--annotations testmini.json]

Prints JSON. Which formats are read: docs/evaluation.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from commands.suggest import Parser
from modules.evaluation import ScoreError, rescore


def main(args: Sequence[str]) -> None:
    """Parse the command line and print the score.

    Raises:
        SystemExit: with code 2 after a message if it is wrong, or a file cannot be scored.
    """
    parser = Parser(prog="train.py rescore", description="Score saved predictions.", allow_abbrev=False)
    parser.add_function_arguments(scored)
    given = parser.parse_args(list(args))
    try:
        print(scored(given.benchmark, given.predictions, given.annotations))
    except ScoreError as error:
        parser.error(str(error))


def scored(benchmark: str, predictions: str, annotations: str | None = None) -> str:
    """The score as JSON.

    Args:
        benchmark: a key of `modules.evaluation.BENCHMARKS`, such as mathvista; another word lists them all.
        predictions: the file of predictions; for mme, the folder of files by category or one of them.
        annotations: the benchmark's own file of questions, where the predictions do not hold the answers.

    Raises:
        ScoreError: if a file cannot be scored.
    """
    values = rescore(benchmark, Path(predictions), None if annotations is None else Path(annotations))
    return json.dumps(values, indent=2)
