"""One's own pictures and questions: what is read, what is left out, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from datamodules.asked import AskedDataModule, pictures
from datamodules.vlir.schema import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.JPG"):
        Image.new("RGB", (8, 6)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"junk")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "below").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "below" / "c.png")
    return tmp_path


def asking(**given: str) -> AskedDataModule:
    data = AskedDataModule()
    data.ask(**given)  # type: ignore[arg-type]
    return data


def asked(data: AskedDataModule) -> tuple[list[str], list[str]]:
    """The ids that come, and what is left out."""
    data.setup("predict")
    batches = list(data.predict_dataloader())
    return [s.id for b in batches for s in b.samples], [*data.skipped, *(line for b in batches for line in b.skipped)]


def test_a_folder_gives_its_pictures_by_name_and_names_the_broken_one(folder: Path) -> None:
    ids, left_out = asked(asking(image=str(folder), question="?"))
    assert ids == ["a.JPG", "b.png"]
    assert len(left_out) == 1
    assert "broken.png: not an image" in left_out[0]


def test_one_picture_is_taken_whatever_its_name(folder: Path) -> None:
    named = folder / "photo"
    (folder / "b.png").rename(named)
    data = asking(image=str(named), question="What?")
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert (batch.samples[0].question, batch.samples[0].images[0].shape) == ("What?", (3, 6, 8))


def test_a_link_that_the_user_names_may_lead_anywhere(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "below" / "link.png"
    link.symlink_to(folder / "b.png")
    assert asked(asking(image=str(link), question="?")) == (["link.png"], [])


def test_a_file_of_questions_needs_only_these_and_stays_in_its_folder(folder: Path) -> None:
    rows = [
        {"image": "a.JPG", "question": "first?"},
        {"id": "mine", "question": "no picture?", "choices": ["x", "y"]},
        {"image": "../secret.png", "question": "out?"},
        {"image": "b.png"},
    ]
    lines = [*map(json.dumps, rows), "not JSON", "7"]
    (folder / "q.jsonl").write_text("\n".join(lines))
    ids, left_out = asked(asking(file=str(folder / "q.jsonl")))
    assert ids == ["q-1", "mine"]
    assert [line.partition("q.jsonl:")[2].partition(":")[0] for line in left_out] == ["3", "4", "5", "6"]
    assert "inside the data folder" in left_out[0]


def test_what_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such image or folder"):
        pictures(tmp_path / "none.png")
    with pytest.raises(DataError, match="expected images in the folder, found none"):
        pictures(tmp_path)


@pytest.mark.parametrize("given", [{}, {"image": "a"}, {"image": "a", "question": "?", "file": "b"}])
def test_half_a_question_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="Expected an image"):
        asking(**given)
