"""Whatever a data file holds: rows that can be used, rows left out by name, or one sentence on the file.

Nothing else reaches a user, and nothing is lost: questions that come through and rows that are left out are all rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from datamodules import AuthorsDataModule, VLIRDataModule
from datamodules.vlir.schema import DataError, from_row, to_row
from modules.trajectory import Sample
from tests.properties.hostile import BOX, almost, dumped, quick, texts

REGION = {"box": [1, 2, 30, 20], "image": 0, "why": "small", "zoom": 2}
VLIR: dict[str, Any] = {
    "id": "1",
    "image": "a.png",
    "question": "Which?",
    "answers": ["7"],
    "source": "cards",
    "choices": ["7", "8"],
    "answer_kind": "choice",
    "regions": [REGION],
    "rationale": [{"text": "I look ", "region": REGION}, {"text": "<answer>7</answer>"}],
    "meta": {"a": [1]},
    "provenance": {"by": "hand"},
}
SFT: dict[str, Any] = {
    "image_path": "a.png",
    "question": "Which?",
    "response_list": [f"I look {BOX}\n", "<answer>7</answer>\n"],
    "img_crop_list": ["crop.png"],
}
RGRPO: dict[str, Any] = {"image_path": "a.png", "question": "Which?", "answer": "7/8", "source": "textvqa"}


@pytest.fixture(scope="module", autouse=True)
def silent() -> Iterator[None]:
    """Thousands of rows are left out, each with a warning."""
    logger = logging.getLogger("datamodules")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


def outcome(text: bytes, name: str, make: Callable[[Path], VLIRDataModule], rows: int | None) -> None:
    """Read a file as a run does, to the last image; check that every row is there or named."""
    with TemporaryDirectory() as folder:
        Image.new("RGB", (60, 40)).save(Path(folder) / "a.png")
        path = Path(folder) / name
        path.write_bytes(text)
        data = make(path)
        try:
            data.setup("fit")
        except DataError as error:
            readable(str(error))
            return
        samples: list[Sample] = []
        skipped: list[str] = list(data.skipped)
        for batch in data.train_dataloader():
            samples += batch.samples
            skipped += batch.skipped
        for line in skipped:
            readable(line)
            assert line.startswith(str(path))
        assert rows is None or len(samples) + len(skipped) == rows
        for sample in samples:
            sample.question.encode()
            assert all(image.shape == (3, 40, 60) for image in sample.images)
            assert all(0 <= r.box[0] < r.box[2] <= 60 and 0 <= r.box[1] < r.box[3] <= 40 for r in sample.regions)
            assert all(isinstance(answer, str) for answer in sample.answers)


def readable(message: str) -> None:
    """One line that any terminal and log takes."""
    assert "\n" not in message
    assert message.isprintable(), repr(message)


@given(st.lists(almost(VLIR), min_size=1, max_size=4))
@quick(120)
@example([VLIR, VLIR | {"image": "\x00"}, VLIR | {"image": "\ud800"}, VLIR | {"image": "a" * 5000}])
@example([VLIR, VLIR | {"regions": [{"box": [0, 0, 10**400, 1]}]}, VLIR | {"meta": {"a": "@huge"}}, "@deep"])
@example([VLIR, VLIR | {"\n\ud800": 1}])
def test_rows_of_vlir_are_read_or_named(rows: list[Any]) -> None:
    for number, row in enumerate(rows):
        if isinstance(row, dict) and row.get("id") == "1":
            row["id"] = str(number)
    text = "\n".join(map(dumped, rows)).encode()
    outcome(text, "data.jsonl", lambda path: VLIRDataModule(str(path), batch_size=2), len(rows))


@given(st.lists(almost(SFT), min_size=1, max_size=4))
@quick(80)
def test_rows_of_the_authors_warm_up_are_read_or_named(rows: list[Any]) -> None:
    outcome(dumped(rows).encode(), "data.json", lambda path: AuthorsDataModule(str(path), "sft"), len(rows))


@given(st.lists(almost(RGRPO), min_size=1, max_size=4))
@quick(80)
@example([RGRPO, RGRPO | {"answer": 10**400}])
@example([RGRPO, "@huge"])
@example([RGRPO, "@deep"])
def test_rows_of_the_authors_questions_are_read_or_named(rows: list[Any]) -> None:
    outcome(dumped(rows).encode(), "data.json", lambda path: AuthorsDataModule(str(path), "rgrpo"), len(rows))


@given(st.lists(texts, min_size=1, max_size=3), st.sampled_from(["sft"]))
@quick(80)
def test_any_rationale_of_the_authors_is_read_or_named(segments: list[str], kind: Any) -> None:
    row = SFT | {"response_list": segments, "img_crop_list": ["crop.png"] * (len(segments) - 1)}
    outcome(dumped([row]).encode(), "data.json", lambda path: AuthorsDataModule(str(path), kind), 1)


@given(st.binary(max_size=200), st.sampled_from(["data.jsonl", "data.json"]))
@quick(60)
def test_any_bytes_are_a_file_or_a_sentence(data: bytes, name: str) -> None:
    make = (lambda p: VLIRDataModule(str(p))) if name == "data.jsonl" else (lambda p: AuthorsDataModule(str(p), "sft"))
    outcome(data, name, make, None)


@given(almost(VLIR))
@quick(60)
def test_what_was_read_is_written_as_it_was(row: Any) -> None:
    try:
        sample, paths = from_row(row)
    except ValueError:
        return
    written = to_row(sample, paths)
    again, same_paths = from_row(written)
    assert same_paths == paths
    assert to_row(again, paths) == written
    # numbers may be NaN in `meta`, which is not equal to itself
    assert repr((again.regions, again.rationale, again.choices)) == repr(
        (sample.regions, sample.rationale, sample.choices)
    )
