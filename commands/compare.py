"""Two runs on the same questions, question by question.

    python train.py compare runs/sft/test runs/rgrpo/test
    python train.py compare runs/rgrpo/test runs/rgrpo/test --mode greedy --against blank

Prints JSON: for each data set both means, their difference (the first minus the second) with a clustered interval and a
bootstrapped one, how many questions each run alone has right, and the exact p-value of McNemar's test of these two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from commands.suggest import Parser
from modules.evaluation import ScoreError
from modules.evaluation.results import Answers, gather, read_run
from modules.evaluation.statistics import compare
from modules.evaluation.statistics import mean as average


def main(args: Sequence[str]) -> None:
    """Parse the command line and print the comparison.

    Raises:
        SystemExit: with code 2 after a message if it is wrong, or the runs cannot be compared.
    """
    parser = Parser(prog="train.py compare", description="Compare two runs, question by question.", allow_abbrev=False)
    parser.add_function_arguments(compared, as_positional=True)
    given = parser.parse_args(list(args))
    try:
        print(compared(given.run_a, given.run_b, given.mode, given.against))
    except ScoreError as error:
        parser.error(str(error))


def compared(run_a: str, run_b: str, mode: str = "greedy", against: str | None = None) -> str:
    """The comparison as JSON.

    Args:
        run_a: folder of a test, with its predictions.
        run_b: folder of the other.
        mode: which of the evaluations is compared.
        against: which of those of the second; null: the same.

    Raises:
        ScoreError: a run has no predictions of that evaluation, or the two are not of the same questions.
    """
    against = mode if against is None else against
    first, second = of_mode(Path(run_a), mode), of_mode(Path(run_b), against)
    if set(first) != set(second):
        only = sorted(set(first) ^ set(second))
        raise ScoreError(f"Expected both runs to be of the same data sets, but {', '.join(only)} is in one alone.")
    head = {"a": f"{run_a} ({mode})", "b": f"{run_b} ({against})"}
    return json.dumps({**head, **{name: pair(first[name], second[name]) for name in first}}, indent=2)


def of_mode(folder: Path, mode: str) -> dict[str, Answers]:
    """What a run answered in one evaluation, by data set.

    Raises:
        ScoreError: there is nothing of that evaluation.
    """
    found = gather(read_run(folder))
    kept = {each.source: each for each in found if each.mode == mode}
    if not kept:
        modes = sorted({each.mode for each in found})
        raise ScoreError(f"Expected predictions of the evaluation {mode!r} in {str(folder)!r}, but got {modes}.")
    return kept


def pair(a: Answers, b: Answers) -> dict[str, Any]:
    """Two runs on one data set.

    Raises:
        ScoreError: they are not of the same questions, are not measured alike, or nothing in them was judged.
    """
    first, second, clusters = a.values(), b.values(), a.clusters()
    if set(first) != set(second):
        lonely = sorted(set(first) ^ set(second))
        raise ScoreError(
            f"Expected both runs to answer the same questions of {a.source}, but {len(lonely)} are in one of them "
            f"alone, {lonely[0]!r} first."
        )
    if a.measure != b.measure or (a.scores is None) != (b.scores is None):
        raise ScoreError(f"Expected both runs to be scored alike on {a.source}, but got {a.unscored or b.unscored}")
    if differing := [k for k, cluster in b.clusters().items() if clusters.get(k) != cluster]:
        raise ScoreError(f"Expected question {differing[0]!r} of {a.source} to be about one image, but it is not.")
    if not first:
        raise ScoreError(f"Expected judged answers of {a.source}, but there are none.")
    ids = sorted(first)
    mine, other = ([average(run[k]) or 0.0 for k in ids] for run in (first, second))
    result = compare(mine, other, [clusters[k] for k in ids])
    return {
        "measure": a.measure,
        "a": average(mine),
        "b": average(other),
        **asdict(result),
        "clusters": len({clusters[k] for k in ids}),
        "clustered_by": a.clustered_by,
    }
