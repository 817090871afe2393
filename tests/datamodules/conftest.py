"""Tiny files in the forms that users bring."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from modules.functional.boxes import BoxSpace, fit_to_grid, from_original

CARDS = Path(__file__).parents[1] / "data" / "cards"
QUESTION = "What is the rank of the left-most card?"


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


@pytest.fixture
def write_list(tmp_path: Path) -> Callable[..., Path]:
    """Write a JSON list; returns the file."""

    def write(rows: list[Any], name: str = "data.json", encoding: str = "utf-8") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(rows), encoding=encoding)
        return path

    return write


@pytest.fixture
def left_cards() -> list[dict[str, Any]]:
    """The left-most card of each photograph: `image_path`, `rank`, `box` in original pixels, `size` (H, W)."""
    with (CARDS / "train_labels.csv").open() as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["filename"])
    found = []
    for name, group in groupby(rows, key=lambda row: row["filename"]):
        row = min(group, key=lambda row: int(row["xmin"]))
        box = tuple(float(row[side]) for side in ("xmin", "ymin", "xmax", "ymax"))
        size = (int(row["height"]), int(row["width"]))
        found.append({"image_path": name, "rank": row["class"], "box": box, "size": size})
    return found


@pytest.fixture
def authors_rgrpo(left_cards: list[dict[str, Any]], write_list: Callable[..., Path]) -> Path:
    """An R-GRPO file of the authors' form about the photographs in `CARDS`."""
    rows = [
        {"image_path": card["image_path"], "question": QUESTION, "answer": card["rank"], "source": "cards"}
        for card in left_cards
    ]
    return write_list(rows, "rgrpo.json")


@pytest.fixture
def authors_sft(left_cards: list[dict[str, Any]], write_list: Callable[..., Path]) -> Path:
    """A warm-up file of the authors' form about the photographs in `CARDS`; boxes in whole resized pixels."""
    rows = []
    for card in left_cards:
        resized = fit_to_grid(*card["size"], 28, 4 * 784, 2048 * 784)
        box = [round(c) for c in from_original(card["box"], BoxSpace("resized"), card["size"], resized)]
        segments = [
            f'<think>The left-most card is here: {{"bbox_2d": {box}}}\n',
            f"It is a {card['rank']}.</think><answer>{card['rank']}</answer>\n",
        ]
        rows.append(
            {
                "image_path": card["image_path"],
                "question": QUESTION,
                "response_list": segments,
                "img_crop_list": [f"crops/{card['image_path']}"],
            }
        )
    return write_list(rows, "sft.json")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
