"""MME: accuracy and accuracy+ by category, and their sums over perception and cognition.

Rule: calculation.py of the eval_tool of BradyFU/Awesome-Multimodal-Large-Language-Models (branch Evaluation). Two lines
after one another are the questions on one image; accuracy+ is the share of images with both right. A category's score
is the sum of both in percent. "yes", then "no", is looked for in the first four characters of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modules.evaluation.common import Row, Score, ScoreError, earned, mean
from modules.evaluation.files import read_rows, read_text

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
CELLS = ("image", "question", "answer", "response")


def read(path: Path) -> list[Row]:
    """A folder of ``<category>.txt``, or one such file: image, question, answer and response between tabs.

    Or our own predictions.
    """
    if path.suffix == ".jsonl":
        return read_rows(path)
    files = [path]
    if path.is_dir():
        files = [path / f"{name}.txt" for name in PERCEPTION + COGNITION]
        files = [file for file in files if file.exists()]
        if not files:
            raise ScoreError(f"Expected {str(path)!r} to hold existence.txt and its kin, but there is none.")
    return [row for file in files for row in _read_category(file)]


def says(response: str) -> str:
    """yes, no, or other."""
    start = response.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def score(predictions: Sequence[Row], annotations: Sequence[Row] | None) -> Score:
    """Score rows of `read`; answers stand in them, so that there are no annotations."""
    if annotations is not None:
        raise ScoreError("Expected no --annotations, for MME's result files hold the answers.")
    responses = [says(row.text("response")) for row in predictions]
    right = [response == _truth(row) for row, response in zip(predictions, responses, strict=True)]
    categories: dict[str, list[list[bool]]] = {}
    for pair in _pairs(predictions):
        categories.setdefault(predictions[pair[0]].text("category"), []).append([right[k] for k in pair])
    breakdown: dict[str, float] = {}
    points: dict[str, float] = {}
    for name, images in categories.items():
        share, plus = mean(correct for image in images for correct in image), mean(map(all, images))
        points[name] = 100 * (share + plus)
        breakdown |= {f"{name}/accuracy": share, f"{name}/accuracy_plus": plus, f"{name}/score": points[name]}
    sums = {part: _sum(points, names) for part, names in (("perception", PERCEPTION), ("cognition", COGNITION))}
    extra: dict[str, object] = {"score": sum(points.values()), "other": responses.count("other")}
    if lacking := [name for name in PERCEPTION + COGNITION if name not in points]:
        extra["categories_missing"] = lacking
    return Score(len(right), mean(right), {**sums, **breakdown}, extra, earned(right))


def _pairs(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """The two questions on each image: lines after one another, or equal ``question_id`` in our own predictions."""
    if not any("question_id" in row.fields for row in rows):
        return [(k, k + 1) for k in range(0, len(rows), 2)]
    images: dict[tuple[str, str], list[int]] = {}
    for k, row in enumerate(rows):
        images.setdefault((row.text("category"), row.text("question_id")), []).append(k)
    for (_, name), members in images.items():
        if len(members) != 2:
            where = rows[members[-1]].where
            raise ScoreError(f"Expected two questions on the image {name!r}, but {where} is one of {len(members)}.")
    return [(a, b) for a, b in images.values()]


def _read_category(path: Path) -> list[Row]:
    text = read_text(path)
    if path.stem not in PERCEPTION + COGNITION:
        raise ScoreError(f"Expected a file of MME to be named as its category (existence.txt), but got {str(path)!r}.")
    rows = []
    for number, line in enumerate(text.rstrip("\r\n").split("\n"), 1):
        cells = line.removesuffix("\r").split("\t")
        where = f"{str(path)!r}, row {number}"
        if len(cells) != len(CELLS):
            raise ScoreError(f"Expected {where} to be {', '.join(CELLS)} between tabs, but got {len(cells)} cells.")
        rows.append(Row(where, None, {"category": path.stem, **dict(zip(CELLS, cells, strict=True))}))
    if len(rows) % 2:
        raise ScoreError(f"Expected two questions an image, but {str(path)!r} ends after row {len(rows)}.")
    return rows


def _truth(row: Row) -> str:
    answer = row.text("answer").lower()
    if answer not in ("yes", "no"):
        raise ScoreError(f"Expected the answer of {row.where} to be Yes or No, but got {answer!r}.")
    return answer


def _sum(points: dict[str, float], names: Sequence[str]) -> float:
    return sum(points.get(name, 0.0) for name in names)
