"""The table of a grid: means over seeds, and differences from the base row, with two kinds of intervals.

Every value of a cell is a mean over the questions of its test, and that of a question over its draws. Of these values,
over n seeds:

- ``ci95`` is Student's interval of their mean, with n - 1 degrees of freedom. It tells what other seeds would give,
  on the same questions. Of a difference it is paired by seed, and within a seed by question. One seed has none.
- ``ci95_questions`` is the interval of a mean over questions, clustered by image (`commands.report.mean_ci95`), of
  each question's mean over the seeds. It tells what other questions would give, from the very same runs.

Neither covers what the other one covers.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from commands.cli import write_json
from commands.grid import Cell, Grid, cells
from commands.hparams import write_hparams
from commands.report import Interval, ReportError, drawn, mean, mean_ci95, number, read_seconds

SECONDS = "seconds"
HEAD = ("accuracy", "sampled_accuracy", "mean_iou", "zoom_rate", "crops")  # then what else there is, then seconds


Values = Mapping[str, float]  # question -> value; a question that a metric does not apply to is not in it


@dataclass(frozen=True)
class Tested:
    """What one cell's predictions come to.

    Args:
        values: metric -> question -> value; seconds of training stand there as the answer to the question "".
        images: question -> its image.
        asked: what tells whether another test asked the same.
    """

    values: Mapping[str, Values]
    images: Mapping[str, str]
    asked: frozenset[str]


def write_table(grid: Grid) -> list[str]:
    """Write ``table.md``, ``table.csv``, ``results.json`` and the folder ``hparams`` of what has ended.

    Returns:
        The cells that have ended but cannot be read, as they are called on the command line.
    """
    folder = Path(grid.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "table.lock"):  # the tasks of an array end when they like
        every = {(cell.name, cell.seed): cell for seed in grid.seed_list for cell in cells(grid, seed)}
        states = {key: cell.states() for key, cell in every.items() if cell.name in grid.rows}
        tested: dict[tuple[str, int], Tested] = {}
        unread: list[str] = []
        for key in [key for key, said in states.items() if said[-1] == "ended"]:
            try:
                tested[key] = read(grid, every[key])
            except ReportError as error:  # of one cell: the others are still worth a table
                states[key] = [f"failed: {error}"]
                unread.append(every[key].id)
        results = build(grid, states, tested)
        write_json(folder / "results.json", results)
        for name, text in (("table.md", markdown(grid, results)), ("table.csv", comma_separated(results))):
            part = folder / f"{name}.part"
            part.write_text(text, encoding="utf-8")
            part.replace(folder / name)
        write_hparams(grid, every, results, folder / "hparams")
    print(f"ablate: {len(tested)} of {len(states)} cells are in {folder / 'table.md'}", flush=True)
    return unread


def read(grid: Grid, cell: Cell) -> Tested:
    """The predictions of a cell that has ended.

    Raises:
        ReportError: if there are none of the row's mode, or a line is broken or there twice.
    """
    folder = cell.root / cell.name / "test"
    mode = grid.rows[cell.name].mode
    sampled = grid.sampled_mode if mode == "greedy" else None
    draws: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))  # metric -> question -> values
    images: dict[str, str] = {}
    asked: set[str] = set()
    for _, line in drawn(folder):
        name = line["id"]
        images[name] = line["image_id"]
        if line["mode"] == mode:
            asked.add(json.dumps([line.get(key) for key in ("id", "image_id", "question", "answers")]))
            for metric, value in numbers(line, grid.by).items():
                draws[metric][name].append(value)
        if line["mode"] == sampled and "correct" in line:
            draws["sampled_accuracy"][name].append(float(line["correct"]))
    if not asked:
        raise ReportError(f"Expected predictions of mode {mode!r} in {folder}, but there are none.")
    draws[SECONDS][""].append(read_seconds(cell.weights))
    values = {metric: {name: math.fsum(each) / len(each) for name, each in of.items()} for metric, of in draws.items()}
    return Tested(values, {**images, "": ""}, frozenset(asked))


def numbers(line: Mapping[str, Any], by: str | None) -> dict[str, float]:
    """Metric -> value of one prediction; what was not measured is not in it."""
    zoomed = float(line["crops"] > 0)
    found = {"zoom_rate": zoomed, "crops": float(line["crops"])}
    if "correct" in line:  # else the judgement failed
        found["accuracy"] = float(line["correct"])
    if line["iou"] is not None:
        found["mean_iou"] = float(line["iou"])
    rewards = line.get("rewards") or {}
    found |= {f"reward/{name}": value for name, value in rewards.items() if name != "accuracy" and value is not None}
    if by is not None and line.get(by) is not None:
        found |= {f"{name}/{line[by]}": found[name] for name in ("accuracy", "zoom_rate") if name in found}
    return found


def build(grid: Grid, states: Mapping[tuple[str, int], Sequence[str]], tested: Mapping[tuple[str, int], Tested]) -> Any:
    """The contents of ``results.json``.

    Returns:
        ``base``; ``seeds``; ``rows``, name -> ``cells`` (seed -> how it stands), ``same_questions`` (as the base row's;
        null if there is nothing to compare with) and ``metrics``, name -> `summary`, and in it that of the
        ``difference`` from the base row, null where there is none.
    """
    rows: dict[str, Any] = {}
    for name in grid.rows:
        own = {seed: tested[name, seed] for seed in grid.seed_list if (name, seed) in tested}
        pairs = {seed: (each, tested[grid.base, seed]) for seed, each in own.items() if (grid.base, seed) in tested}
        same = all(a.asked == b.asked for a, b in pairs.values()) if pairs else None
        metrics = {}
        for metric in metrics_of([*own.values()]):
            images = {name: image for each in own.values() for name, image in each.images.items()}
            compared = {
                seed: minus(a.values.get(metric, {}), b.values.get(metric, {})) for seed, (a, b) in pairs.items()
            }
            change = summary(compared, images) if same and name != grid.base else None
            if found := summary({seed: each.values.get(metric, {}) for seed, each in own.items()}, images):
                metrics[metric] = {**found, "difference": change}
        rows[name] = {
            "cells": {str(seed): outcome(states[name, seed]) for seed in grid.seed_list},
            "same_questions": same,
            "metrics": metrics,
        }
    return {"base": grid.base, "seeds": grid.seed_list, "rows": rows}


def metrics_of(tested: Sequence[Tested]) -> list[str]:
    """The names of what was measured, in the order of the table."""
    there = {metric for each in tested for metric in each.values}
    return [m for m in (*HEAD, *sorted(there - {*HEAD, SECONDS}), SECONDS) if m in there]


def minus(a: Values, b: Values) -> Values:
    """Question by question, of those that both have."""
    return {name: a[name] - b[name] for name in a if name in b}


def summary(values: Mapping[int, Values], images: Mapping[str, str]) -> dict[str, Any] | None:
    """What is said of a metric.

    Args:
        values: seed -> question -> value.
        images: question -> image, the cluster that it is of.

    Returns:
        ``values`` (seed -> mean over its questions), their ``mean``, ``ci95`` and ``ci95_questions``, see the top of
        this file, null where there is none; None if there is no value.
    """
    means = {seed: math.fsum(each.values()) / len(each) for seed, each in values.items() if each}
    if not means:
        return None
    shared = set.intersection(*(set(values[seed]) for seed in means))
    averages = [math.fsum(values[seed][name] for seed in means) / len(means) for name in sorted(shared)]
    return {
        "values": {str(seed): value for seed, value in means.items()},
        "mean": mean([*means.values()]),
        "ci95": mean_ci95([*means.values()], [str(seed) for seed in means]),  # clusters of one: Student's interval
        "ci95_questions": mean_ci95(averages, [images[name] for name in sorted(shared)]),
    }


def outcome(states: Sequence[str]) -> str:
    """How a cell stands: as its last stage, or the first that failed."""
    return next((said for said in states if said.startswith("failed")), states[-1])


def markdown(grid: Grid, results: Mapping[str, Any]) -> str:
    """``table.md``: accuracy first, then every metric in a table of its own."""
    rows = results["rows"]
    metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row["metrics"]))
    metrics.sort(key=lambda metric: metric == SECONDS)  # stable
    seeds = ", ".join(map(str, results["seeds"]))
    text = [
        f"Means over seeds {seeds}. In brackets, 95% intervals: **seeds**: Student's, over seeds, on the same",
        "questions; **questions**: over questions, clustered by image, from the same runs. Neither covers the other.",
        "In the first table they are over seeds.",
        f"Differences are from row `{grid.base}`, paired by seed and question.",
        "",
    ]
    others = [metric for metric in metrics if metric in (*HEAD[1:], SECONDS)]  # the rest has tables of its own
    head = ["row", "seeds", "accuracy", f"minus `{grid.base}`", *others]
    text += table_of(head, [overview(name, row, others) for name, row in rows.items()])
    for metric in metrics:
        head = ["row", metric, "seeds", "questions", f"minus `{grid.base}`", "seeds", "questions"]
        body = []
        for name, row in rows.items():
            found = row["metrics"].get(metric)
            body.append([f"`{name}`", *whole(metric, found), *whole(metric, (found or {}).get("difference"), "+")])
        text += ["", f"### {metric}", "", *table_of(head, body)]
    missing = [
        f"- `seed_{seed}/{name}`: {said}"
        for name, row in rows.items()
        for seed, said in row["cells"].items()
        if said != "ended"
    ]
    other = [
        f"- `{name}` was asked other questions than `{grid.base}`"
        for name in rows
        if rows[name]["same_questions"] is False
    ]
    text += ["", "### Not in the table", "", *missing, *other] if missing or other else []
    return "\n".join(text) + "\n"


def overview(name: str, row: Mapping[str, Any], others: Sequence[str]) -> list[str]:
    """One line of the first table."""
    measured = row["metrics"]
    accuracy = measured.get("accuracy")
    change = (accuracy or {}).get("difference")
    ended = sum(said == "ended" for said in row["cells"].values())
    return [
        f"`{name}`",
        f"{ended} of {len(row['cells'])}",
        spanned("accuracy", accuracy),
        spanned("accuracy", change, "+"),
        *(whole(metric, measured.get(metric))[0] for metric in others),
    ]


def whole(metric: str, found: Mapping[str, Any] | None, sign: str = "") -> list[str]:
    """Mean, interval over seeds and interval over questions as text; dashes where there is none."""
    if found is None:
        return ["-"] * 3
    digits = 0 if metric == SECONDS else 3
    spans: list[Interval | None] = [found["ci95"], found["ci95_questions"]]
    return [
        number(found["mean"], digits, sign),
        *("-" if span is None else f"[{', '.join(number(end, digits, sign) for end in span)}]" for span in spans),
    ]


def spanned(metric: str, found: Mapping[str, Any] | None, sign: str = "") -> str:
    """Mean and interval over seeds in one cell of the table."""
    value, span, _ = whole(metric, found, sign)
    return value if span == "-" else f"{value} {span}"


def table_of(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]


def comma_separated(results: Mapping[str, Any]) -> str:
    """``table.csv``: a line for every row, metric and kind (``mean`` or ``difference``), a column for every seed."""
    seeds = [str(seed) for seed in results["seeds"]]
    ends = ["ci95_low", "ci95_high", "ci95_questions_low", "ci95_questions_high"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["row", "metric", "kind", "n_seeds", "mean", *ends, *(f"seed_{seed}" for seed in seeds)])
    for name, row in results["rows"].items():
        for metric, found in row["metrics"].items():
            for kind, each in (("mean", found), ("difference", found["difference"])):
                if each is None:
                    continue
                spans = [*(each["ci95"] or ("", "")), *(each["ci95_questions"] or ("", ""))]
                values = [each["values"].get(seed, "") for seed in seeds]
                writer.writerow([name, metric, kind, len(each["values"]), each["mean"], *spans, *values])
    return file.getvalue()
