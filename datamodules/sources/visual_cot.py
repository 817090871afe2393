"""Visual-CoT (arXiv 2403.16999; annotations Apache-2.0): questions with the region that answers them."""

from __future__ import annotations

import json
from typing import Any

from datamodules.pictures import ImageRef
from datamodules.sources.base import Parsed, Source
from datamodules.sources.values import answer, box, identity
from datamodules.tables import Row
from datamodules.vlir.schema import Invalid, describe, expect, required, strings, text
from modules.trajectory import Region, Sample

ASKS_FOR_BOX = (" Please provide the bounding box", " Please think step by step and provide the bounding box")
IMAGES = "cot"  # the folder of all images, by data set


class VisualCoT(Source):
    """Any of its three forms, told apart by their keys; boxes become annotated regions, in pixels of the image.

    - ``bboxs`` (*_cot_train.jsonl): ``question``, ``answer``, ``image``, ``bboxs`` of two corners each. With
      ``dataset``, and a folder ``cot`` below `root`, the image is cot/<dataset>/<image>; textcap's are textvqa's.
    - ``expression`` (benchmark_det/*.jsonl): ``img_path``, ``bbox`` of two corners; no answer.
    - ``conversations`` (benchmark/*.json, viscot_363k.json): ``image`` is a path, and the path with "###" and the box.
      The box in the conversation is not read: it is a share of the image padded to a square. A conversation without
      "###" has no region.
    """

    name = "visual_cot"
    hub = "deepcs233/Visual-CoT"

    def parse(self, row: Row) -> Parsed:
        """See `Source.parse`."""
        if "conversations" in row:
            return self._conversation(row)
        return self._located(row) if "expression" in row else self._question(row)

    def _question(self, row: Row) -> Parsed:
        boxes = expect(required(row, "bboxs"), list, "key `bboxs`", "a list of boxes")
        sample = Sample(
            id="",
            question=text(row, "question"),
            answers=(answer(row, "answer"),),
            regions=tuple(Region(box(value, f"key `bboxs[{k}]`")) for k, value in enumerate(boxes)),
            meta=_meta(row),
        )
        if isinstance(row.get("image"), str | int) and row.get("dataset"):
            folder = "textvqa" if row["dataset"] == "textcap" else text(row, "dataset")
            return Parsed(sample, (self.file(answer(row, "image"), f"{IMAGES}/{folder}"),))
        return Parsed(sample, (self.image(row, "image"),))

    def _located(self, row: Row) -> Parsed:
        region = Region(box(required(row, "bbox"), "key `bbox`"))
        sample = Sample(_id(row), text(row, "expression"), regions=(region,), meta=_meta(row))
        return Parsed(sample, (self.image(row, "img_path"),))

    def _conversation(self, row: Row) -> Parsed:
        turns = expect(row["conversations"], list, "key `conversations`", "a list of turns")
        asked, said = _said(turns, 0, "human"), _said(turns, len(turns) - 1, "gpt")
        question = asked.replace("<image>", "").strip()
        for phrase in ASKS_FOR_BOX:
            question = question.partition(phrase)[0]
        path, _, region = _paths(row)[-1].partition("###")
        regions = (Region(box(_listed(region), "key `image[1]`")),) if region else ()
        if not question.strip() or not said.strip():
            raise Invalid("key `conversations`: expected a question and an answer, found a blank one")
        sample = Sample(_id(row), question, answers=(said.strip(),), regions=regions, meta=_meta(row))
        images: tuple[ImageRef, ...] = (self.image_of(path, "key `image`"),)
        return Parsed(sample, images)


def _id(row: Row) -> str:
    return identity(row, "question_id") if "question_id" in row else ""


def _meta(row: Row) -> dict[str, Any]:
    return {key: row[key] for key in ("dataset", "split", "image_id") if row.get(key)}


def _paths(row: Row) -> tuple[str, ...]:
    if isinstance(row.get("image"), str):
        return (row["image"],)
    paths = strings(row, "image")
    if not paths or len(paths) > 2:
        raise Invalid(f"key `image`: expected a path, and perhaps one with a box, found {describe(row['image'])}")
    return paths


def _listed(region: str) -> object:
    try:
        value: object = json.loads(region)
    except (ValueError, RecursionError):
        raise Invalid(f"key `image[1]`: expected [x1, y1, x2, y2] after ###, found {region[:60]!r}") from None
    return value


def _said(turns: list[Any], index: int, who: str) -> str:
    turn = turns[index] if turns else None
    if not isinstance(turn, dict) or turn.get("from") != who or not isinstance(turn.get("value"), str):
        raise Invalid(f"key `conversations[{index}]`: expected a turn of `{who}`, found {describe(turn)}")
    return str(turn["value"])
