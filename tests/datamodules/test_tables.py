"""Files of rows: encodings, damage, and places that are found again."""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from datamodules.images import BadImage
from datamodules.pictures import ImageFile, StoredImage
from datamodules.tables import CsvRows, JsonLines, JsonRows, open_table
from datamodules.vlir.reader import read_records
from datamodules.vlir.schema import DataError, Invalid

BOM = b"\xef\xbb\xbf"


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def base64_png(tmp_path: Path) -> str:
    Image.new("RGB", (4, 3), (9, 8, 7)).save(tmp_path / "one.png")
    return base64.b64encode((tmp_path / "one.png").read_bytes()).decode()


@pytest.mark.parametrize("bom", [b"", BOM])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_every_row_is_found_again_at_its_place(tmp_path: Path, bom: bytes, end: bytes) -> None:
    rows = [{"a": "é"}, {"a": "b\u2028c"}, {"a": '"quoted", with\nlines'}]
    jsonl = end.join(json.dumps(row, ensure_ascii=False).encode() for row in rows)
    quoted = ["é", "b\u2028c", '"""quoted"", with\nlines"']
    tables = {
        "rows.jsonl": bom + jsonl,
        "lines.json": bom + jsonl,
        "list.json": bom + json.dumps(rows, indent=1).encode(),
        "data.json": bom + json.dumps({"version": 1, "data": rows}).encode(),
        "rows.csv": bom + b"a" + end + end.join(value.encode() for value in quoted) + end,
    }
    for name, data in tables.items():
        table = open_table(write(tmp_path / name, data))
        entries = list(table.entries())
        assert [entry.value for entry in entries] == rows, name
        again = pickle.loads(pickle.dumps(table))
        assert [again.row(entry.at) for entry in reversed(entries)] == rows[::-1], name
        assert [table.cell(entry.at, "a") for entry in entries] == [row["a"] for row in rows], name


def test_rows_are_numbered_as_people_count(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", b'{"a": 1}\n\n{"a": 2}\n')
    assert [entry.number for entry in JsonLines(lines).entries()] == [1, 3]  # by line
    cells = write(tmp_path / "a.csv", b'a,b\n1,"two\nlines"\n\n3,4\n')
    assert [(e.number, e.value) for e in CsvRows(cells).entries()] == [
        (2, {"a": "1", "b": "two\nlines"}),
        (5, {"a": "3", "b": "4"}),
    ]
    by_id = write(tmp_path / "a.json", b'{"07": {"a": 1}, "x": {"a": 2, "id": "own"}}')
    assert [entry.value for entry in JsonRows(by_id, key="id").entries()] == [
        {"id": "07", "a": 1},
        {"id": "own", "a": 2},
    ]


def test_a_damaged_row_does_not_spoil_the_others(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n{"a": \n' + b"[" * 100_000 + b'\n{"a": 5}')
    reasons = [str(e.value) if isinstance(e.value, Invalid) else e.value for e in JsonLines(lines).entries()]
    assert [reasons[0], reasons[4]] == [{"a": 1}, {"a": 5}]
    assert reasons[1] == "not UTF-8 (byte 0xe9 at position 7)"
    assert str(reasons[2]).startswith("not JSON (Expecting value at column")
    assert reasons[3] == "not JSON (nested too deeply)"
    cells = write(tmp_path / "a.csv", b"a,b\n1\n\xe9,2\n3,4\n")
    found = [str(e.value) if isinstance(e.value, Invalid) else e.value for e in CsvRows(cells).entries()]
    assert found == [
        "the row: expected 2 cells as in the header, found 1",
        "not UTF-8 (byte 0xe9 at position 0)",
        {"a": "3", "b": "4"},
    ]


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("a.jsonl", b"", "found no rows, it is empty"),
        ("a.json", b"", "found no rows, it is empty"),
        ("a.csv", b"", "found no rows, it is empty"),
        ("a.csv", b"\n\n", "expected a header and rows"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "expected UTF-8 text, found UTF-16"),
        ("a.json", b'[{"a": "\xe9"}]', "expected UTF-8 text, found byte 0xe9"),
        ("a.json", b"<html>404</html>", "expected JSON, found none"),
        ("a.json", b"7", "expected a list of rows, or rows by id, found int 7"),
        ("a.json", b'{"a": 1, "b": 2}', "expected a list of rows, or rows by id, found dict"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.txt", b"a", "expected a file that ends in .parquet, .json, .jsonl, .csv or .tsv"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, data: bytes, why: str) -> None:
    path = write(tmp_path / name, data)
    with pytest.raises(DataError) as error:
        list(open_table(path).entries())
    assert str(error.value).startswith(f"{path}: ")
    assert why in str(error.value)
    assert str(error.value).endswith(".")


def test_base64_images_stay_in_the_file(tmp_path: Path) -> None:
    data = base64_png(tmp_path)
    listed = [{"index": k, "image": image} for k, image in ((1, data), (2, ""), (3, "%%"))]
    for name, text in (
        ("a.tsv", f"index\timage\n1\t{data}\n2\t\n3\tnot base64!\n"),
        (
            "a.jsonl",
            "\n".join(json.dumps(row) for row in listed),
        ),
        ("a.json", json.dumps([{"image": "data:image/png;base64," + data}, {"image": ""}, {"image": "%%"}])),
    ):
        table = open_table(write(tmp_path / name, text.encode()), base64=("image",))
        good, blank, wrong = (entry.value["image"] for entry in table.entries())  # type: ignore[index]
        assert isinstance(good, StoredImage)
        assert good.load()[:, 0, 0].tolist() == [9, 8, 7]
        assert blank == ""
        with pytest.raises(BadImage, match="expected an image in base64"):
            wrong.load()


def test_links_may_not_leave_the_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root, outside):
        folder.mkdir()
        Image.new("RGB", (4, 3)).save(folder / "a.png")
    (root / "inside.png").symlink_to(root / "a.png")
    (root / "file.png").symlink_to(outside / "a.png")
    (root / "folder").symlink_to(outside)
    (tmp_path / "alias").symlink_to(root)
    assert ImageFile(root, "inside.png").load().shape == (3, 3, 4)
    assert ImageFile(tmp_path / "alias", "a.png").load().shape == (3, 3, 4)  # the root itself may be a link
    for path in ("file.png", "folder/a.png"):
        with pytest.raises(Invalid, match=r"expected an image inside .*, found a link to .*outside/a\.png"):
            ImageFile(root, path).load()


def test_half_a_character_makes_a_bad_row(tmp_path: Path) -> None:
    row = {"id": "1", "images": [], "question": "Why \ud83d?", "answers": ["a"], "source": "s"}
    path = write(tmp_path / "a.jsonl", f"{json.dumps(row)}\n{json.dumps(row | {'question': 'Why?'})}".encode())
    records, bad = read_records(path)
    assert [record.row for record in records] == [2]
    assert "half a surrogate pair" in bad[0].why
