"""What docs/data.md shows is what the code reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser
from PIL import Image

import datamodules
from datamodules import sources
from datamodules.images import MAX_PIXELS
from datamodules.vlir.authors import SFT_MAX_PIXELS, SFT_MIN_PIXELS
from datamodules.vlir.reader import read_records
from datamodules.vlir.schema import OPTIONAL, REQUIRED, to_row

DOCS = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS, flags=re.DOTALL)


def test_the_example_row_is_read_and_written(tmp_path: Path) -> None:
    (block,) = blocks("json")
    row: dict[str, Any] = json.loads(block)
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (192, 192)).save(tmp_path / row["image"])
    data = datamodules.VLIRDataModule(predict=str(path))
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    (sample,) = batch.samples  # its boxes lie inside the image
    assert data.skipped == []
    row["regions"][0]["image"] = 0  # the default, left out in the example
    assert to_row(sample, [row["image"]]) == row


def test_the_python_example_writes_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "a.png")
    row = {"id": "1", "image": "a.png", "question": "What?", "answers": ["a"], "source": "s"}
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(row))
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python")
    exec(block, {})
    (record,), _ = read_records(Path("data/train.parquet"))
    assert record.images[0].load().shape == (3, 8, 8)


def test_every_source_for_training_is_in_the_table() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", DOCS, flags=re.MULTILINE))
    trains = {name for name in sources.__all__ if getattr(getattr(sources, name), "trains", False)} - {"Source"}
    assert trains <= listed


def test_every_key_is_explained() -> None:
    table = set(re.findall(r"`(\w+)`", " ".join(line for line in DOCS.splitlines() if line.startswith("| `"))))
    assert {*REQUIRED, *OPTIONAL} <= table


def test_the_yaml_examples_are_accepted() -> None:
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    made: list[Any] = [parser.instantiate(parser.parse_object(yaml.safe_load(block))).data for block in blocks("yaml")]
    assert [type(each).__name__ for each in made] == ["VLIRDataModule", "AuthorsDataModule", "SourcesDataModule"]
    assert made[1].files["train"] == [Path("vlir/part1.json"), Path("vlir/part2.json")]


def test_limits_are_those_of_the_code() -> None:
    assert f"{SFT_MIN_PIXELS:,} and {SFT_MAX_PIXELS:,}" in DOCS
    assert f"up to {MAX_PIXELS // 10**6} megapixels" in DOCS
