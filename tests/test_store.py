"""Objects on disk are whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modules.store import Store


def test_what_is_written_is_read_back_and_nothing_else_lies_around(tmp_path: Path) -> None:
    store = Store(tmp_path / "made")
    assert store.read("a") is None
    store.write("a", {"n": 1})
    store.write("b", {"n": 2})
    store.write("a", {"n": 3})
    assert store.read("a") == {"n": 3}
    assert sorted(value["n"] for value in store.values()) == [2, 3]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2


@pytest.mark.parametrize("damage", ["", '{"n": ', "[1]", "\x00"])
def test_what_somebody_damaged_is_not_there(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    store.write("a", {"n": 1})
    store.path("a").write_text(damage)
    assert store.read("a") is None
    assert list(store.values()) == []


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.write("a", {"n": 1})

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="no space"):
        store.write("a", {"n": 2})
    assert store.read("a") == {"n": 1}
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1
