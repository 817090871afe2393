"""VLIR files: which rows come through, which are named, and when a file is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datamodules.pictures import ImageFile
from datamodules.vlir.reader import read_records
from datamodules.vlir.schema import DataError


def _row(number: int, **changes: Any) -> dict[str, Any]:
    return {"id": str(number), "image": "a.png", "question": "Which?", "answers": ["7"], "source": "cards"} | changes


def test_bad_rows_are_named_and_the_others_read(write_rows: Callable[..., Path]) -> None:
    path = write_rows([_row(1), "{not json", "", _row(4, answers=7), "[1, 2]", _row(6)])
    records, bad = read_records(path)
    assert [(record.sample.id, record.row, record.file) for record in records] == [
        ("1", 1, str(path)),
        ("6", 6, str(path)),
    ]
    assert [error.row for error in bad] == [2, 4, 5]
    assert str(bad[0]).startswith(f"{path}:2: not JSON")
    assert "key `answers`: expected a list of strings, found int 7" in str(bad[1])
    assert "expected an object" in str(bad[2])


def test_image_paths_start_at_the_file_or_the_root(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    path = write_rows([_row(1, image="images/a.png")])
    assert read_records(path)[0][0].images == (ImageFile(tmp_path, "images/a.png"),)
    assert read_records(path, root=Path("elsewhere"))[0][0].images == (ImageFile(Path("elsewhere"), "images/a.png"),)


def test_byte_order_mark_line_ends_and_separators(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(_row(n, question="a\u2028b"), ensure_ascii=False) for n in (1, 2)]  # no line end in JSON
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    records, bad = read_records(path)
    assert [record.sample.question for record in records] == ["a\u2028b"] * 2
    assert bad == []


def test_limit_counts_usable_rows(write_rows: Callable[..., Path]) -> None:
    path = write_rows([_row(1), "bad", _row(3), _row(4)])
    records, bad = read_records(path, limit=2)
    assert [record.sample.id for record in records] == ["1", "3"]
    assert len(bad) == 1


def test_unusable_files_end_in_one_sentence(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    def refuse(path: Path) -> str:
        with pytest.raises(DataError) as error:
            read_records(path)
        message = str(error.value)
        assert message.startswith(str(path))
        assert message.endswith(".")
        assert "\n" not in message
        return message

    assert "no such file" in refuse(tmp_path / "none.jsonl")
    assert "cannot be read" in refuse(tmp_path)
    assert "found no rows" in refuse(write_rows([]))
    assert "found no rows" in refuse(write_rows(["", "  "]))
    assert "no usable row among 2 (row 1: not JSON" in refuse(write_rows(["<html>", "404"]))
    assert "no usable row among 1 (row 1: key `answers`" in refuse(write_rows([_row(1, answers=None)]))
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}')
    assert "row 1: not UTF-8 (byte 0xe9 at position 8)" in refuse(tmp_path / "latin.jsonl")
