"""Tiny files in the forms that users bring."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features
from PIL import Image
from torch.utils.data import Dataset as Dataset_


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (objects, or raw lines) and two 40 x 30 images `a.png`, `b.png`; returns the file."""

    def write(rows: list[Any], name: str = "data.jsonl") -> Path:
        for shade, image in enumerate(("a.png", "b.png")):
            Image.new("RGB", (40, 30), (100 * shade, 10, 20)).save(tmp_path / image)
        path = tmp_path / name
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return path

    return write


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., Path]:
    """Write an image of one colour below `tmp_path`; returns its path."""

    def write(name: str, size: tuple[int, int] = (40, 30), colour: tuple[int, int, int] = (10, 20, 30)) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, colour).save(path)
        return path

    return write


@pytest.fixture
def write_hub(tmp_path: Path) -> Callable[..., Path]:
    """Write a parquet file as the hub has it: rows, and the Hugging Face type of each column."""

    def write(rows: list[dict[str, Any]], types: dict[str, Any], name: str = "data.parquet") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows, features=Features(types)).to_parquet(path)
        return path

    return write


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a network."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


class Numbers(Dataset_[list[int]]):
    """Hands back the indices of a batch."""

    def __getitems__(self, indices: list[int]) -> list[int]:
        return indices
