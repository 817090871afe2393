"""CV-Bench, HR-Bench and MME-RealWorld: multiple choice with breakdowns of their own.

CV-Bench's rule: README of the data set nyu-visionx/CV-Bench (cambrian-mllm/cambrian): half of the mean of the
accuracies on ADE20K and COCO, half of that on Omni3D. HR-Bench's: hrbench_score and report_acc_hrbench of
DreamMr/HR-Bench and open-compass/VLMEvalKit: the mean over cycles (the same question with its options turned), by
category. Neither has an official reader of text that runs without a language model; `common.choice` reads here.
MME-RealWorld's: evaluation/eval_your_results.py of yfzhang114/MME-RealWorld, its reader included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from modules.evaluation.common import Row, Score, ScoreError, annotated, choice, earned, letter_index, mean, shares

SOURCES = ("ADE20K", "COCO", "Omni3D")
PREFIXES = (  # two pairs have grown together in the official list, for want of a comma
    *("The best answer is", "The correct answer is", "The answer is", "The answer"),
    *("The best option isThe correct option is", "Best answer:Best option:"),
)
TASKS = ("Reasoning", "Perception")


def cvbench(predictions: Sequence[Row], annotations: Sequence[Row] | None) -> Score:
    """Score rows with ``response``, or with ``result`` (1 or 0), as the benchmark's own table has it.

    ``2D`` and ``score`` are means over sources, not over questions; they are there only if all three sources are.
    """
    rows = annotated(predictions, annotations)
    right = [_cvbench_right(row) for row in rows]
    breakdown = shares(right, [_cvbench_groups(row) for row in rows])
    extra = {}
    if all(name in breakdown for name in SOURCES):
        ade, coco, omni = (breakdown[name] for name in SOURCES)
        breakdown |= {"2D": (ade + coco) / 2, "3D": omni}
        extra = {"score": ((ade + coco) / 2 + omni) / 2}
    return Score(len(rows), mean(right), breakdown, extra, earned(right))


def hrbench(predictions: Sequence[Row], annotations: Sequence[Row] | None) -> Score:
    """Score rows with ``prediction`` or ``response``, options ``A`` to ``D``, ``category`` and ``cycle_category``."""
    rows = annotated(predictions, annotations)
    picks = [choice(row.text("prediction", "response"), _lettered(row)) for row in rows]
    right = [pick == _label(row) for pick, row in zip(picks, rows, strict=True)]
    cycles: dict[str, list[int]] = {}
    for k, row in enumerate(rows):
        cycles.setdefault(str(row.value("cycle_category")), []).append(k)
    by_cycle = [
        {"all": mean(right[k] for k in members)}
        | shares([right[k] for k in members], [[rows[k].text("category")] for k in members])
        for members in cycles.values()
    ]
    names = sorted({name for values in by_cycle for name in values})
    # a category that a cycle lacks counts 0 there, for the official sum is divided by all cycles
    means = {name: sum(values.get(name, 0.0) for values in by_cycle) / len(by_cycle) for name in names}
    extra = {"score": means.pop("all"), "unparsed": picks.count(None)}
    return Score(len(rows), mean(right), means, extra, earned(right))


def mme_realworld(predictions: Sequence[Row], annotations: Sequence[Row] | None) -> Score:
    """Score rows with ``Output`` (or ``response``), by task, subtask and category."""
    rows = annotated(predictions, annotations)
    said = [read_letter(_output(row), _options(row)) for row in rows]
    right = [letter == row.text("Ground truth", "answer") for letter, row in zip(said, rows, strict=True)]
    groups = [realworld_groups(row) for row in rows]
    extra = {"unparsed": said.count(""), "chose_E": said.count("E")}
    return Score(len(rows), mean(right), shares(right, groups), extra, earned(right))


def read_letter(text: str, options: Sequence[str]) -> str:
    """The first capital letter from A to E behind the usual beginnings, wherever it stands; empty if none.

    Without one, the first option in which the text stands. An empty text stands in all of them, and so is "A".
    """
    text = text.strip()
    for prefix in PREFIXES:
        text = text.replace(prefix, "")
    if found := re.search("[ABCDE]", text):
        return found.group()
    if len(text.split()) > 10:
        return ""
    return next((option[1:2] for option in options if text.lower() in option.lower()), "")


def _cvbench_right(row: Row) -> bool:
    if "result" in row.fields and "response" not in row.fields:
        result = str(row.value("result"))
        if result not in ("0", "1"):
            raise ScoreError(f"Expected `result` of {row.where} to be 0 or 1, but got {result!r}.")
        return result == "1"
    choices = row.value("choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(text, str) for text in choices):
        raise ScoreError(f"Expected `choices` of {row.where} to be a list of options, but got {choices!r}.")
    return choice(row.text("response"), choices) == _label(row)


def _cvbench_groups(row: Row) -> list[str]:
    source = row.text("source")
    if source not in SOURCES:
        raise ScoreError(f"Expected `source` of {row.where} to be one of {list(SOURCES)}, but got {source!r}.")
    return [source, row.text("task")]


def _lettered(row: Row) -> list[str]:
    options = [row.text(letter) for letter in "ABCD" if row.fields.get(letter) not in (None, "")]
    if not options:
        raise ScoreError(f"Expected options `A` to `D` in {row.where}, but got none.")
    return options


def _label(row: Row) -> int:
    index = letter_index(row.text("answer"))
    if index is None:
        raise ScoreError(f"Expected `answer` of {row.where} to be an option's letter, but got {row.value('answer')!r}.")
    return index


def _output(row: Row) -> str:
    return row.text("Output", "output", "response")


def _options(row: Row) -> list[str]:
    options = row.value("Answer choices", "multi-choice options")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ScoreError(f"Expected `Answer choices` of {row.where} to be a list of texts, but got {options!r}.")
    return options


def realworld_groups(row: Row) -> list[str]:
    """Task, task/subtask and task/subtask/category; the data set on the hub names them otherwise than the JSON."""
    if "Task" in row.fields:
        task, subtask, category = row.text("Task"), row.text("Subtask"), row.text("Category")
    else:
        joined, category = row.text("category"), row.text("l2-category")
        task = "Perception" if "perception" in joined.lower() else "Reasoning"
        subtask = joined.split("/")[-1]
    if task not in TASKS:
        raise ScoreError(f"Expected `Task` of {row.where} to be one of {list(TASKS)}, but got {task!r}.")
    category = category.lower()
    if "attribute" in category:
        category = category.split("/")[0] + "/attribute"
    return [task, f"{task}/{subtask}", f"{task}/{subtask}/{category}"]
