"""Tiny files in the forms that users bring."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image


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
