"""Predictions in the format that a benchmark's own repository or server takes: rows of ours in, texts of files out.

A row is one of `files.own`: what the run kept of the benchmark's own row, with ``response`` for the final answer.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from modules.evaluation import choices, mathvision, mmmu, scienceqa
from modules.evaluation.common import Row, ScoreError

Files = dict[str, str]  # relative path -> text
OURS = ("response", "extraction")  # fields that are not the benchmark's


def scienceqa_results(rows: Sequence[Row]) -> Files:
    """models/run_gpt3.py of lupantech/ScienceQA: ``results`` and ``outputs`` by problem id; read with problems.json."""
    outputs = {_id(row): row.text("response") for row in rows}
    results = {_id(row): scienceqa.parse(row.text("response"), len(row.value("choices"))) for row in rows}
    return {"results.json": _json({"results": results, "outputs": outputs})}


def mathvista_output(rows: Sequence[Row]) -> Files:
    """evaluation/extract_answer.py of lupantech/MathVista: problems by pid, with ``response`` and ``extraction``."""
    return {"output.json": _json({_id(row): {**row.fields} for row in rows})}


def mathvision_lines(rows: Sequence[Row]) -> Files:
    """evaluation/evaluate.py of mathllm/MATH-V: JSON lines with ``id``, ``response`` and ``model_answer``."""
    lines = [{**_given(row), "response": row.text("response")} for row in rows]
    lines = [{**line, "model_answer": mathvision.extract(line["response"])} for line in lines]
    return {"outputs.jsonl": _lines(lines)}


def mmmu_predictions(rows: Sequence[Row]) -> Files:
    """eval/main_eval_only.py of MMMU-Benchmark/MMMU: ``{id: prediction}``, letters and open answers."""
    found = {}
    for row in rows:
        letters = row.text("question_type") == "multiple-choice"
        found[_id(row)] = mmmu.letter(row) if letters else row.text("response")
    return {"predictions.json": _json(found)}


def vstar_lines(rows: Sequence[Row]) -> Files:
    """JSON lines of the data set craigwu/vstar_bench's test_questions.jsonl, with ``response``."""
    names = ("question_id", "image", "text", "category", "label")
    return {"answers.jsonl": _lines([_some(row, names) | {"response": row.text("response")} for row in rows])}


def mmvp_lines(rows: Sequence[Row]) -> Files:
    """scripts/evaluate_mllm.py of tsb0601/MMVP: ``question_id``, ``prompt``, the right ``answer``, ``response``."""
    lines = [
        {
            "question_id": row.value("Index"),
            "prompt": f"{row.text('Question')} {row.text('Options')}",
            "answer": row.text("Correct Answer"),
            "response": row.text("response"),
        }
        for row in rows
    ]
    return {"answers.jsonl": _lines(lines)}


def pope_lines(rows: Sequence[Row]) -> Files:
    """evaluate.py of AoiDragon/POPE: ``question`` and ``answer`` in the order of the questions, a file a category."""
    files: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        line = _some(row, ("question_id",)) | {"question": row.text("question", "text"), "answer": row.text("response")}
        files.setdefault(f"answers_{_file_name(row.fields.get('category') or 'all')}.jsonl", []).append(line)
    return {name: _lines(lines) for name, lines in files.items()}


def mme_tables(rows: Sequence[Row]) -> Files:
    """calculation.py of MME's eval_tool: a file a category; image, question, answer and response between tabs."""
    files: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        image, answer = row.text("question_id"), row.text("answer")
        cells = [image.split("/")[-1], row.text("question"), answer, row.text("response")]
        line = "\t".join(" ".join(cell.split()) for cell in cells)
        files.setdefault(f"{_file_name(row.text('category'))}.txt", {}).setdefault(image, []).append(line)
    joined = {name: [line for lines in images.values() for line in lines] for name, images in files.items()}
    return {name: "".join(f"{line}\n" for line in lines) for name, lines in joined.items()}


def hallusionbench_list(rows: Sequence[Row]) -> Files:
    """evaluation.py of tianyi-lab/HallusionBench: the benchmark's list with ``model_prediction``."""
    lines = [{**_given(row), "model_prediction": row.text("response")} for row in rows]
    return {"HallusionBench_result.json": _json(lines)}


def cvbench_table(rows: Sequence[Row]) -> Files:
    """The table that the README of nyu-visionx/CV-Bench computes its accuracy from: ``source`` and ``result``."""
    right = choices.cvbench(rows, None).values
    names = ("idx", "type", "task", "source", "answer")
    lines = [
        _some(row, names) | {"prediction": row.text("response"), "result": int(correct)}
        for row, correct in zip(rows, right, strict=True)
    ]
    return {"cv_bench_results.csv": _table(lines, ",")}


def hrbench_table(rows: Sequence[Row]) -> Files:
    """The table of open-compass/VLMEvalKit, which HR-Bench is evaluated with: its own columns and ``prediction``."""
    names = ("index", "question", "A", "B", "C", "D", "answer", "category", "cycle_category")
    lines = [_some(row, names) | {"prediction": row.text("response")} for row in rows]
    return {"predictions.tsv": _table(lines, "\t")}


def mme_realworld_list(rows: Sequence[Row]) -> Files:
    """evaluation/eval_your_results.py of yfzhang114/MME-RealWorld: a list with ``Output``."""
    lines = []
    for row in rows:
        task, joined = choices.realworld_groups(row)[:2]
        lines.append(
            {
                "Question_id": _id(row),
                "Text": row.value("Text", "question"),
                "Answer choices": row.value("Answer choices", "multi-choice options"),
                "Ground truth": row.text("Ground truth", "answer"),
                "Task": task,
                "Subtask": joined.partition("/")[2],
                "Category": row.text("Category", "l2-category") if "Task" not in row.fields else row.text("Category"),
                "Output": row.text("response"),
            }
        )
    return {"results.json": _json(lines)}


def textvqa_list(rows: Sequence[Row]) -> Files:
    """TextVQA's challenge server: a list of ``question_id`` and ``answer``."""
    return {"submission.json": _json([{"question_id": _whole(row), "answer": row.text("response")} for row in rows])}


def docvqa_list(rows: Sequence[Row]) -> Files:
    """The Robust Reading Competition's server: a list of ``questionId`` and ``answer``."""
    return {"submission.json": _json([{"questionId": _whole(row), "answer": row.text("response")} for row in rows])}


def _id(row: Row) -> str:
    if row.id is None:
        raise ScoreError(f"Expected {row.where} to have an id, but it has none.")
    return row.id


def _whole(row: Row) -> int | str:
    """The id as servers have it: a number if it is one."""
    text = _id(row)
    return int(text) if text.isdecimal() else text


def _given(row: Row) -> dict[str, Any]:
    """The benchmark's own row."""
    return {name: value for name, value in row.fields.items() if name not in OURS}


def _some(row: Row, names: Sequence[str]) -> dict[str, Any]:
    return {name: row.fields[name] for name in names if name in row.fields}


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]", "_", text)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _table(rows: Sequence[Mapping[str, Any]], delimiter: str) -> str:
    text = io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
