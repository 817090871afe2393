"""What a run of ours answered, as results: official scores with intervals, by data set and evaluation.

A data set that is a benchmark is scored by its official rule, any other by the reward ``accuracy`` (right if above 0).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.evaluation import BENCHMARKS, told
from modules.evaluation.common import Row, Score, ScoreError, mean
from modules.evaluation.files import own_row
from modules.evaluation.formats import Files
from modules.evaluation.statistics import clipped, mean_ci95, pass_at_k
from modules.evaluation.statistics import mean as average

Line = dict[str, Any]
CLUSTERS = {"image_id": "image", "pair": "pair", "set_of_figures": "set of figures"}
NEEDED = ("id", "image_id", "mode", "question", "answers", "answer", "crops", "stop")
RIGHT = 1.0  # what a draw has to earn to count in pass@k
MAIN = "all"  # the name of a source that has none


@dataclass(frozen=True)
class Answers:
    """What was answered to the questions of one data set in one evaluation.

    Attributes:
        source: the data set.
        mode: the evaluation.
        draws: lines by draw, each in the order of the questions.
        scores: the official score of each draw; None for a data set that has none.
        unscored: why there is no score, though the data set is a benchmark.
    """

    source: str
    mode: str
    draws: tuple[tuple[Line, ...], ...]
    scores: tuple[Score, ...] | None
    unscored: str | None = None

    @property
    def measure(self) -> str:
        """What is averaged."""
        return self.scores[0].measure if self.scores else "accuracy"

    def values(self) -> dict[str, list[float]]:
        """What each question earned, draw by draw; a draw that could not be judged is left out."""
        found: dict[str, list[float]] = {}
        for k, lines in enumerate(self.draws):
            earned = self.scores[k].values if self.scores else [line.get("correct") for line in lines]
            for line, value in zip(lines, earned, strict=True):
                if value is not None:
                    found.setdefault(line["id"], []).append(float(value))
        return found

    def clusters(self) -> dict[str, str]:
        """What each question shares with others."""
        return {line["id"]: str(line.get("cluster", line["image_id"])) for line in self.draws[0]}

    @property
    def clustered_by(self) -> str:
        """In words."""
        named = any("cluster" in line for line in self.draws[0])
        return CLUSTERS[BENCHMARKS[self.source].cluster] if named else CLUSTERS["image_id"]


def read_run(folder: Path) -> list[Line]:
    """The lines of ``predictions.jsonl`` that a test has left, of all ranks.

    Raises:
        ScoreError: there are none, or one is broken or there twice; names file and row.
    """
    files = sorted(folder.glob("predictions*.jsonl"))
    if not files:
        raise ScoreError(f"Expected {str(folder)!r} to hold predictions.jsonl, which a test leaves, but it has none.")
    lines: list[Line] = []
    seen: dict[tuple[str, str, int], str] = {}
    for file in files:
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            where = f"{str(file)!r}, row {number}"
            line = _parsed(text, where)
            key = (line["mode"], line["id"], line.get("draw", 0))
            if key in seen:
                raise ScoreError(
                    f"Expected every answer once, but that of {line['id']!r} is in {seen[key]} and {where}."
                )
            seen[key] = where
            lines.append(line | {"where": where})
    if not lines:
        raise ScoreError(f"Expected {str(folder)!r} to hold predictions, but its files have no rows.")
    return lines


def _parsed(text: str, where: str) -> Line:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ScoreError(f"Expected JSON in {where}, but got none: {error}.") from error
    if not isinstance(line, dict) or any(name not in line for name in NEEDED):
        raise ScoreError(f"Expected {where} to have {', '.join(NEEDED)}, but got {str(line)[:80]}.")
    return line


def gather(lines: Sequence[Line]) -> list[Answers]:
    """Lines by data set and evaluation, scored."""
    kinds: dict[tuple[str, str], dict[int, list[Line]]] = {}
    for line in lines:
        draws = kinds.setdefault((line.get("source") or MAIN, line["mode"]), {})
        draws.setdefault(line.get("draw", 0), []).append(line)
    found = []
    for (source, mode), draws in sorted(kinds.items()):
        by_draw = tuple(tuple(sorted(draws[k], key=lambda line: in_order(str(line["id"])))) for k in sorted(draws))
        found.append(_scored(source, mode, by_draw))
    return found


def in_order(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts numbers in ids as numbers: 2 before 10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def rows_of(lines: Sequence[Line]) -> list[Row]:
    """Lines as the scorers take them."""
    return [own_row(Row(line["where"], str(line["id"]), line)) for line in lines]


def _scored(source: str, mode: str, draws: tuple[tuple[Line, ...], ...]) -> Answers:
    if source not in BENCHMARKS:
        return Answers(source, mode, draws, None)
    try:
        scores = tuple(BENCHMARKS[source].score(rows_of(lines), None) for lines in draws)
    except ScoreError as error:  # a part of the benchmark: half a pair, say
        return Answers(source, mode, draws, None, unscored=str(error))
    return Answers(source, mode, draws, scores)


def results(answers: Sequence[Answers]) -> dict[str, dict[str, Any]]:
    """The contents of ``results.json``: data set -> evaluation -> `measured`."""
    found: dict[str, dict[str, Any]] = {}
    for each in answers:
        found.setdefault(each.source, {})[each.mode] = measured(each)
    return found


def measured(answers: Answers) -> dict[str, Any]:
    """Numbers of one data set in one evaluation.

    With several draws of each question, scores are means over draws, ``avg@n`` is what a question earns on average,
    and ``pass@k`` the chance that one of k draws is wholly right. ``<measure>_ci95`` is clustered.
    """
    values, clusters = answers.values(), answers.clusters()
    names = [clusters[question] for question in values]
    per_question = [average(earned) or 0.0 for earned in values.values()]
    n = len(answers.draws)
    lines = [line for draw in answers.draws for line in draw]
    ious = [line["iou"] for line in lines if line.get("iou") is not None]
    scores = answers.scores
    entry: dict[str, Any] = {"n": len(answers.draws[0]), "draws": n}
    if scores is None:
        entry["accuracy"] = average(per_question)
    else:
        entry |= _means([told(score) for score in scores])
    entry[f"{answers.measure}_ci95"] = clipped(mean_ci95(per_question, names), 0.0)
    entry |= {"clusters": len(set(names)), "clustered_by": answers.clustered_by}
    if n > 1:
        entry[f"avg@{n}"] = average(per_question)
        whole = [(len(earned), sum(value >= RIGHT for value in earned)) for earned in values.values()]
        for k in sorted({2**j for j in range(n.bit_length()) if 2**j <= n} | {n}):
            chances = [pass_at_k(draws, right, k) for draws, right in whole if draws >= k]
            entry[f"pass@{k}"] = average(chances)
    entry |= {
        "unjudged": sum(len(draw) for draw in answers.draws) - sum(map(len, values.values())),
        "unanswered": sum(line["answer"] is None for line in lines),
        "zoom_rate": mean(line["crops"] > 0 for line in lines),
        "mean_iou": average(ious),
    }
    if scores is not None:
        entry["breakdown"] = _means([dict(score.breakdown) for score in scores])
    if answers.unscored is not None:
        entry["not_scored"] = answers.unscored
    return entry


def _means(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of each number over tables of the same names; what is no number is the first's."""
    if len(tables) == 1:
        return dict(tables[0])
    found: dict[str, Any] = {}
    for name, first in tables[0].items():
        numbers = [table[name] for table in tables if isinstance(table.get(name), int | float)]
        found[name] = average(numbers) if numbers and name != "n" else first
    return found


def official(answers: Sequence[Answers]) -> Files:
    """Files for the benchmarks' own tools, ``<source>/<mode>/<name>``; of several draws the first."""
    files: Files = {}
    for each in answers:
        if each.scores is not None:
            written = BENCHMARKS[each.source].write(rows_of(each.draws[0]))
            files |= {f"{each.source}/{each.mode}/{name}": text for name, text in written.items()}
    return files


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Results as a Markdown table, a row a data set and evaluation."""
    head = ["data set", "evaluation", "n", "measure", "value", "95% interval", "by", "further", "zoom rate", "mean IoU"]
    rows = [head, ["---"] * len(head)]
    for source, modes in found.items():
        for mode, entry in modes.items():
            measure = next(name.removesuffix("_ci95") for name in entry if name.endswith("_ci95"))
            further = [f"{k} {_number(v)}" for k, v in entry.items() if k == "score" or k.startswith(("pass@", "avg@"))]
            interval = entry[f"{measure}_ci95"]
            cells = [source, mode, str(entry["n"]), measure, _number(entry.get(measure))]
            cells += ["-" if interval is None else f"[{_number(interval[0])}, {_number(interval[1])}]"]
            cells += [entry["clustered_by"], "; ".join(further) or "-"]
            rows.append([*cells, _number(entry["zoom_rate"]), _number(entry["mean_iou"])])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def scalars(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Results as curves: ``results/<source>/<evaluation>/<name>``, the breakdown below ``breakdown/``."""
    flat: dict[str, float] = {}
    for source, modes in found.items():
        for mode, entry in modes.items():
            numbers = {k: v for k, v in entry.items() if isinstance(v, int | float)}
            numbers |= {f"breakdown/{k}": v for k, v in entry.get("breakdown", {}).items()}
            for name, (low, high) in ((k, v) for k, v in entry.items() if k.endswith("_ci95") and v):
                numbers |= {f"{name}/low": low, f"{name}/high": high}
            flat |= {f"results/{source}/{mode}/{name}": float(value) for name, value in numbers.items()}
    return flat


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
