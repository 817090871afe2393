"""VLIR rows in parquet: the same as in JSON lines, images as paths or embedded."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Image as HubImage
from datasets import load_dataset

from datamodules import DataError, VLIRDataModule
from datamodules.images import BadImage, load_image
from datamodules.pictures import StoredImage
from datamodules.vlir.parquet import features, write_parquet
from datamodules.vlir.reader import read_records
from datamodules.vlir.schema import Invalid, to_row

ROWS: list[dict[str, Any]] = [
    {"id": "bare", "image": "a.png", "question": "Which?", "answers": [], "source": "cards"},
    {
        "id": "whole",
        "images": ["a.png", "b.png"],
        "question": "Which é?",
        "answers": ["7", "seven"],
        "source": "cards",
        "choices": ["7", "8"],
        "answer_kind": "choice",
        "regions": [{"box": [1, 2, 30, 20], "image": 1}],
        "rationale": [
            {"text": "I look ", "region": {"box": [0.5, 1, 10, 12.25], "image": 1, "why": "too small", "zoom": 2.0}},
            {"text": "<answer>7</answer>"},
        ],
        "meta": {"image_id": "1", "nested": {"a": [1, None]}},
        "provenance": {"dataset": "cards", "row": 3, "writer": "someone"},
    },
    {"id": "text", "images": [], "question": "Why?", "answers": ["x"], "source": "words"},
]


@pytest.fixture
def both(write_rows: Callable[..., Path]) -> Callable[[bool], tuple[Path, Path]]:
    """The rows as JSON lines and as parquet, with or without the images' bytes."""

    def write(embed: bool) -> tuple[Path, Path]:
        lines = write_rows(ROWS)
        columns = lines.with_suffix(".parquet")
        write_parquet(columns, ROWS, embed=lines.parent if embed else None)
        return lines, columns

    return write


@pytest.mark.parametrize("embed", [False, True])
def test_both_forms_hold_the_same(both: Callable[[bool], tuple[Path, Path]], embed: bool) -> None:
    lines, columns = both(embed)
    of_lines, of_columns = read_records(lines), read_records(columns)
    assert of_lines[1] == of_columns[1] == []
    for row, one, other in zip(ROWS, of_lines[0], of_columns[0], strict=True):
        paths = row.get("images", [row.get("image")])
        assert to_row(one.sample, paths) == to_row(other.sample, paths)
        assert one.sample.regions == other.sample.regions
        assert [image.load().tolist() for image in one.images] == [image.load().tolist() for image in other.images]
        assert all(isinstance(image, StoredImage) for image in other.images) is embed or not paths
    kept = of_columns[0][1].sample
    assert (kept.answer_kind, kept.provenance["writer"]) == ("choice", "someone")
    assert kept.rationale[0].region is not None
    assert kept.rationale[0].region.why == "too small"


def test_the_hub_library_reads_the_file_with_its_image_type(both: Callable[[bool], tuple[Path, Path]]) -> None:
    _, columns = both(True)
    found = load_dataset("parquet", data_files=str(columns), split="train")
    assert found.features == features()
    assert isinstance(found.features["images"].feature, HubImage)
    assert found[1]["images"][1].size == (40, 30)


def test_the_data_module_reads_parquet_and_workers_decode(both: Callable[[bool], tuple[Path, Path]]) -> None:
    _, columns = both(True)
    columns.with_name("a.png").unlink()  # the file is enough
    for workers in (0, 1):
        data = VLIRDataModule(predict=str(columns), num_workers=workers)
        data.setup("predict")
        (batch,) = data.predict_dataloader()
        assert [sample.id for sample in batch.samples] == ["bare", "whole", "text"]
        assert batch.samples[0].images[0].shape == (3, 30, 40)


def test_a_reference_is_small_and_survives_pickling(both: Callable[[bool], tuple[Path, Path]], tmp_path: Path) -> None:
    _, columns = both(True)
    image = read_records(columns)[0][0].images[0]
    data = pickle.dumps(image)
    assert (tmp_path / "a.png").read_bytes() not in data  # the picture stays on disk
    assert torch.equal(pickle.loads(data).load(), load_image(tmp_path / "a.png"))


def test_bad_rows_of_parquet_are_named(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    write_rows([])
    bad = [
        ROWS[0] | {"id": "kind", "answer_kind": "guess"},
        ROWS[0] | {"id": "box", "regions": [{"box": [5, 5, 5, 9]}]},
        ROWS[0] | {"id": "path", "image": "../a.png"},
        ROWS[0],
    ]
    path = tmp_path / "bad.parquet"
    write_parquet(path, [*bad, ROWS[0], ROWS[2]])
    records, named = read_records(path)
    assert [record.sample.id for record in records] == ["bare", "text"]
    assert [record.row for record in records] == [4, 6]
    assert [str(error).removeprefix(f"{path}:") for error in named] == [
        "1: key `answer_kind`: expected one of choice, exact, vqa, anls, number, math, list, yesno, found str 'guess'",
        "2: key `regions[0].box`: expected x1 < x2 and y1 < y2, found [5.0, 5.0, 5.0, 9.0]",
        "3: key `images[0]`: expected a path inside the data folder, found '../a.png'",
        "5: key `id`: expected one of its own, found 'bare' of row 4",
    ]


def test_files_that_are_no_vlir_parquet_end_in_one_sentence(tmp_path: Path) -> None:
    for name, data in (("empty", b""), ("page", b"<!DOCTYPE html><html>404</html>"), ("cut", b"PAR1abc")):
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"{path}: cannot be read as a data set .*\)\.$"):
            read_records(path)
    with pytest.raises(DataError, match=r"none\.parquet: no such file or folder\.$"):
        read_records(tmp_path / "none.parquet")


def test_embedded_pages_are_refused_like_files(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    write_rows([])
    (tmp_path / "a.png").write_text("<html>Not found</html>")
    path = tmp_path / "data.parquet"
    write_parquet(path, [ROWS[0], ROWS[0] | {"id": "fine", "image": "b.png"}], embed=tmp_path)
    with pytest.raises(BadImage, match="HTML"):
        read_records(path)[0][0].images[0].load()
    data = VLIRDataModule(predict=str(path))
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert [sample.id for sample in batch.samples] == ["fine"]
    assert batch.skipped[0].startswith(f"{path}:1: ")
    assert "found an HTML or XML page" in batch.skipped[0]


def test_what_is_embedded_stays_in_its_folder(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    write_rows([])
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "out.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(Invalid, match="expected an image inside"):
        write_parquet(tmp_path / "x.parquet", [ROWS[0] | {"image": "out.png"}], embed=inner)


def test_meta_that_is_no_json_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    write_parquet(path, [ROWS[2], ROWS[2] | {"id": "other"}])
    found = load_dataset("parquet", data_files=str(path), split="train").to_list()
    found[1]["meta"] = "{"
    from datasets import Dataset

    Dataset.from_list(found, features=features()).to_parquet(path)
    records, bad = read_records(path)
    assert len(records) == 1
    assert "key `meta`: expected an object as JSON text" in bad[0].why
    assert json.loads(found[0]["meta"] or "{}") == {}
