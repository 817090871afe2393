"""Each benchmark from its own file to its own output: questions, official scores, files that give the same again."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

import datamodules.sources as sources
from callbacks.predictions import kept
from datamodules.vlir.reader import Record
from datamodules.vlir.schema import DataError
from modules.evaluation import BENCHMARKS, ScoreError, rescore
from modules.evaluation.results import gather, measured, official
from modules.trajectory import Sample


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


def embedded(*names: str) -> list[dict[str, Any]]:
    return [{"bytes": png(name), "path": None} for name in names]


@dataclass(frozen=True)
class Case:
    """A tiny file in a benchmark's own schema.

    Args:
        rows: what it holds.
        file: its name; the ending says how it is written.
        images: files beside it.
        said: final answers, in the order of the questions.
        values: what they earn.
        question: the whole text of the first question.
        read: which of the official files is scored again.
        annotated: whether the benchmark's own file is given with it.
    """

    rows: Any
    file: str
    said: tuple[str, ...]
    values: tuple[float, ...]
    question: str
    read: str
    images: tuple[str, ...] = ()
    annotated: bool = False


def sqa(number: int, **fields: Any) -> dict[str, Any]:
    known = {"question": "Which?", "choices": ["dog", "cat"], "answer": 1, "hint": "", "image": None, "task": "closed"}
    known |= {"grade": "grade2", "subject": "natural science", "topic": "biology", "category": "c", "skill": "s"}
    return {**known, "lecture": "", "solution": "", "split": "test", **fields}


def vista(pid: str, **fields: Any) -> dict[str, Any]:
    known = {"pid": pid, "question": "How long?", "image": "images/1.png", "choices": None, "unit": None}
    known |= {"precision": None, "answer": "12", "question_type": "free_form", "answer_type": "integer"}
    known |= {"metadata": {"split": "testmini", "category": "math", "skills": ["arithmetic"]}, "query": "Hint: x\nHow?"}
    return {**known, **fields}


def vision(name: str, **fields: Any) -> dict[str, Any]:
    known = {"id": name, "question": "How many?\n<image1>", "options": [], "image": "images/1.png", "answer": "12"}
    return {**known, "solution": None, "level": 2, "subject": "counting", **fields}


def hallusion(question: int, figure: str, truth: str, **fields: Any) -> dict[str, Any]:
    known = {"category": "VD", "subcategory": "chart", "visual_input": "1", "set_id": "0", "figure_id": figure}
    known |= {"question_id": str(question), "question": "Is it?", "gt_answer": truth, "filename": "./images/1.png"}
    return {**known, "sample_note": "n", "gt_answer_details": "d", **fields}


def realworld(number: int, **fields: Any) -> dict[str, Any]:
    known = {"Question_id": f"q/{number}", "Image": "images/1.png", "Text": "What colour?", "Ground truth": "B"}
    known |= {"Answer choices": ["(A) red", "(B) blue", "(E) none"], "Task": "Perception", "Category": "color"}
    return {**known, "Subtask": "Remote Sensing", **fields}


def cv(number: int, source: str, **fields: Any) -> dict[str, Any]:
    known = {"idx": number, "type": "2D", "task": "Count", "question": "How many?", "choices": ["1", "2"]}
    known |= {"answer": "(B)", "prompt": "How many? (A) 1 (B) 2", "filename": "2D/1.png", "source": source}
    return {**known, **fields}


def hr(number: int, cycle: int, **fields: Any) -> dict[str, Any]:
    known = {"index": number, "question": "What is it?", "A": "red", "B": "blue", "C": "green", "D": "white"}
    known |= {"answer": "B", "category": "single", "cycle_category": cycle}
    return {**known, "image": base64.b64encode(png()).decode(), **fields}


STAR = "What is it?\n(A) red\n(B) blue\nAnswer with the option's letter from the given choices directly."
CASES = {
    "scienceqa": Case(
        {"1": sqa(1), "2": sqa(2, image="image.png", hint="Look."), "3": sqa(3, split="train"), "4": sqa(4, answer=0)},
        "problems.json",
        said=("B", "A", "dunno"),
        values=(1.0, 0.0, 0.0),
        question="Which?\n(A) dog\n(B) cat",
        read="results.json",
        images=("test/2/image.png",),
        annotated=True,
    ),
    "mathvista": Case(
        {
            "1": vista("1"),
            "2": vista(
                "2", question_type="multi_choice", choices=["a cat", "a dog"], answer="a dog", answer_type="text"
            ),
            "3": vista("3", answer_type="float", precision=1.0, answer="1.2"),
        },
        "testmini.json",
        said=("12.0", "(B)", "1.3"),
        values=(1.0, 1.0, 0.0),
        question="Hint: x\nHow?",
        read="output.json",
        images=("images/1.png",),
    ),
    "mathvision": Case(
        [vision("1"), vision("2", options=["red", "blue"], answer="B")],
        "test.jsonl",
        said=("\\frac{24}{2}", "red"),
        values=(1.0, 0.0),
        question="How many?",
        read="outputs.jsonl",
        images=("images/1.png",),
    ),
    "mmmu": Case(
        {
            "id": ["validation_Art_1", "validation_Music_2"],
            "question": ["<image 1> Who?", "<image 1> How many?"],
            "options": ["['Monet', 'Manet']", "[]"],
            "answer": ["B", "12"],
            "question_type": ["multiple-choice", "open"],
            "image_1": embedded("red", "blue"),
            "image_2": [None, *embedded("green")],
        },
        "validation.parquet",
        said=("Manet", "It is 12."),
        values=(1.0, 1.0),
        question="<image 1> Who?\n(A) Monet\n(B) Manet",
        read="predictions.json",
        annotated=True,
    ),
    "hallusionbench": Case(
        [hallusion(0, "1", "1"), hallusion(0, "2", "0"), hallusion(1, "0", "1", category="VS", filename=None)],
        "HallusionBench.json",
        said=("Yes, it is.", "Yes", "I am not sure"),
        values=(1.0, 0.0, 1.0),
        question="Is it?",
        read="HallusionBench_result.json",
        images=("images/1.png",),
    ),
    "mme": Case(
        {
            "question_id": ["count/1.png", "count/1.png", "count/2.png", "count/2.png"],
            "image": embedded("red", "red", "blue", "blue"),
            "question": ["Is it 1? Please answer yes or no.", "Is it 2?", "Is it 1?", "Is it 2?"],
            "answer": ["Yes", "No", "Yes", "No"],
            "category": ["count"] * 4,
        },
        "test.parquet",
        said=("Yes", "No", "Yes.", "Yes\tor no"),
        values=(1.0, 1.0, 1.0, 0.0),
        question="Is it 1? Please answer yes or no.",
        read=".",
    ),
    "mme_realworld": Case(
        [realworld(1), realworld(2, Task="Reasoning", Category="person/attribute/3")],
        "MME_RealWorld.json",
        said=("B", "The best answer is A"),
        values=(1.0, 0.0),
        question="What colour? The choices are listed below:\n(A) red\n(B) blue\n(E) none",
        read="results.json",
        images=("images/1.png",),
    ),
    "pope": Case(
        [
            {"question_id": 1, "image": "1.png", "text": "Is there a dog?", "label": "yes"},
            {"question_id": 2, "image": "1.png", "text": "Is there a cat?", "label": "no"},
            {"question_id": 3, "image": "1.png", "text": "Is there a cow?", "label": "no"},
        ],
        "coco_pope_random.json",
        said=("Yes", "No, there is not.", "Yes"),
        values=(1.0, 1.0, 0.0),
        question="Is there a dog?",
        read="answers_all.jsonl",
        images=("1.png",),
        annotated=True,
    ),
    "vstar": Case(
        [
            {"question_id": 0, "image": "direct/1.png", "text": STAR, "label": "B", "category": "direct_attributes"},
            {"question_id": 1, "image": "direct/1.png", "text": STAR, "label": "A", "category": "relative_position"},
        ],
        "test_questions.jsonl",
        said=("blue", "(B)"),
        values=(1.0, 0.0),
        question=STAR,
        read="answers.jsonl",
        images=("direct/1.png",),
    ),
    "mmvp": Case(
        [
            {"Index": k, "Question": "Is it open?", "Options": "(a) Open (b) Closed", "Correct Answer": f"({right})"}
            for k, right in enumerate("abba", 1)
        ],
        "Questions.csv",
        said=("A", "Closed", "(b)", "B"),
        values=(1.0, 1.0, 1.0, 0.0),
        question="Is it open? (a) Open (b) Closed",
        read="answers.jsonl",
        images=tuple(f"MMVP Images/{k}.jpg" for k in (1, 2, 3, 4)),
    ),
    "cvbench": Case(
        [cv(0, "ADE20K"), cv(1, "COCO"), cv(2, "Omni3D", type="3D", task="Depth")],
        "test_2d.jsonl",
        said=("2", "A", "(B)"),
        values=(1.0, 0.0, 1.0),
        question="How many? (A) 1 (B) 2",
        read="cv_bench_results.csv",
        images=("img/2D/1.png",),
    ),
    "hrbench": Case(
        [hr(0, 0), hr(1, 1, A="blue", B="red", answer="A")],
        "hr_bench_4k.tsv",
        said=("B. blue", "red"),
        values=(1.0, 0.0),
        question="Question: What is it?\nOptions:\nA. red\nB. blue\nC. green\nD. white",
        read="predictions.tsv",
    ),
    "textvqa": Case(
        {"data": [{"question_id": 7, "question": "what brand?", "image_id": "1", "answers": ["dell"] * 10}]},
        "TextVQA_0.5.1_val.json",
        said=("The Dell",),
        values=(1.0,),
        question="what brand?",
        read="submission.json",
        images=("train_images/1.jpg",),
        annotated=True,
    ),
    "docvqa": Case(
        {"data": [{"questionId": 9, "question": "Which page?", "image": "1.png", "answers": ["pages"], "docId": 3}]},
        "val_v1.0.json",
        said=("page1",),
        values=(0.8,),
        question="Which page?",
        read="submission.json",
        images=("1.png",),
        annotated=True,
    ),
}


def write(case: Case, folder: Path) -> Path:
    """The file of a case, and its images."""
    for image in case.images:
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        (folder / image).write_bytes(png())
    path = folder / case.file
    if path.suffix == ".parquet":
        parquet.write_table(pa.table(case.rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(case.rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            table.writeheader()
            table.writerows(case.rows)
    elif path.suffix == ".jsonl" or case.file.startswith("coco_pope"):
        path.write_text("".join(json.dumps(row) + "\n" for row in case.rows))
    else:
        path.write_text(json.dumps(case.rows))
    return path


def records(name: str, path: Path) -> list[Record]:
    kind: Callable[..., Any] = getattr(sources, BENCHMARKS[name].source)
    found, bad = kind(str(path), **({"split": "test"} if name == "scienceqa" else {})).read()
    assert not bad
    return list(found)


def line(sample: Sample, said: str) -> dict[str, Any]:
    """What a run leaves of an answer."""
    told = {"id": sample.id, "image_id": str(sample.meta.get("image_id", sample.id)), "source": sample.source}
    told |= {"mode": "greedy", "question": sample.question, "answers": list(sample.answers), "answer": said}
    return {**told, "text": said, "crops": 0, "iou": None, "stop": "answer", **kept(sample)}


@pytest.mark.parametrize("name", CASES)
def test_from_the_benchmarks_file_to_its_own_output(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = write(case, tmp_path)
    found = records(name, path)
    assert found[0].sample.question == case.question
    assert {record.sample.source for record in found} == {name}
    images = [image.load() for record in found for image in record.images]
    assert images
    assert all(image.shape == (3, 6, 8) for image in images)
    lines = [line(record.sample, said) for record, said in zip(found, case.said, strict=True)]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    answers = gather([{**each, "where": f"line {k}"} for k, each in enumerate(lines)])[0]
    by_id = {each["id"]: value for each, value in zip(lines, case.values, strict=True)}
    assert answers.values() == {k: [pytest.approx(v)] for k, v in by_id.items()}
    own = rescore(name, tmp_path / "predictions.jsonl")
    for written, text in official([answers]).items():
        file = tmp_path / "official" / written
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    labels = path
    if name == "mmmu":  # the benchmark's evaluation has a file of answers, not of questions
        rows = case.rows
        kinds = zip(rows["id"], rows["question_type"], rows["answer"], strict=True)
        labels = tmp_path / "answer_dict_val.json"
        labels.write_text(json.dumps({k: {"question_type": kind, "ground_truth": right} for k, kind, right in kinds}))
    again = rescore(name, tmp_path / "official" / name / "greedy" / case.read, labels if case.annotated else None)
    assert again == own
    entry = measured(answers)
    assert entry["breakdown"] == own["breakdown"]
    assert entry["accuracy"] == own["accuracy"]


def test_the_registry_has_a_source_and_a_case_for_every_benchmark() -> None:
    assert set(CASES) == set(BENCHMARKS)
    for name, benchmark in BENCHMARKS.items():
        assert getattr(sources, benchmark.source).name == name


def test_parquet_serves_as_annotations(tmp_path: Path) -> None:
    path = write(CASES["mmmu"], tmp_path)
    predictions = tmp_path / "predictions.json"
    predictions.write_text(json.dumps({"validation_Art_1": "B", "validation_Music_2": "13"}))
    assert rescore("mmmu", predictions, path)["accuracy"] == 0.5


BAD = {  # what a row is changed by, and what is said of it
    "mathvista": (
        {"question_type": "multi_choice", "choices": []},
        r"testmini.json:2: key `choices`: expected at least",
    ),
    "mathvision": ({"options": ["red"], "answer": "C"}, r"test.jsonl:2: key `answer`: expected the letter of one of 1"),
    "hallusionbench": ({"gt_answer": 2}, r"HallusionBench.json:2: key `gt_answer`: expected 0 or 1, found int 2"),
    "mme_realworld": ({"Answer choices": []}, r"MME_RealWorld.json:2: key `Answer choices`: expected at least one"),
    "pope": ({"label": 1}, r"coco_pope_random.json:2: key `label`: expected a string, found int 1"),
    "vstar": ({"text": "What is it?"}, r"test_questions.jsonl:2: key `text`: expected options such as"),
    "cvbench": ({"answer": "(E)"}, r"test_2d.jsonl:2: key `answer`: expected the letter of one of the choices"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_left_out_and_named(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = write(case, tmp_path)
    change, message = BAD[name]
    rows = list(case.rows.values()) if isinstance(case.rows, dict) else list(case.rows)
    rows[1] = {**rows[1], **change}
    as_lines = path.suffix == ".jsonl" or name == "pope"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if as_lines else json.dumps(rows))
    found, bad = getattr(sources, BENCHMARKS[name].source)(str(path)).read()
    assert len(found) == len(rows) - 1
    assert len(bad) == 1
    assert re.search(message, str(bad[0])), str(bad[0])


def test_answers_as_numbers_are_answers(tmp_path: Path) -> None:
    path = tmp_path / "testmini.json"
    path.write_text(json.dumps([vista("1", answer=12), vista("2", answer=1.5)]))
    assert [record.sample.answers for record in sources.MathVista(str(path)).read()[0]] == [("12",), ("1.5",)]


def test_an_id_that_is_there_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(vision(name)) + "\n" for name in ("1", "1")))
    found, bad = sources.MathVision(str(path)).read()
    assert len(found) == 1
    assert "test.jsonl:2: key `id`: expected one of its own, found '1' of row 1" in str(bad[0])


@pytest.mark.parametrize("name", ["mathvista", "vstar", "mmvp"])
def test_the_file_of_another_benchmark_ends_with_a_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps(realworld(1)) + "\n")
    with pytest.raises(DataError, match=r"other.jsonl: expected rows of \w+, found no usable row"):
        getattr(sources, BENCHMARKS[name].source)(str(path)).read()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b'[{"pid": "1",}]', "row 1 has none"), (b'{"id": "a", "mode": "greedy",}\n', "row 1 has none")],
)
def test_files_of_predictions_that_are_none_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "output.json"
    path.write_bytes(content)
    with pytest.raises(ScoreError, match=rf"output.json.*{message}"):
        rescore("mathvista", path)


def test_predictions_of_another_benchmark_are_named(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(line(Sample("1", "?", answers=("yes",), source="pope"), "yes")) + "\n")
    with pytest.raises(ScoreError, match="to hold predictions of mathvista, but they are of pope"):
        rescore("mathvista", path)
