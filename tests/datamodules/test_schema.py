"""Rows of the VLIR form: round trip, and every way in which one can be wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from datamodules.vlir.schema import BadRow, Invalid, check_boxes, from_row, to_row
from modules.trajectory import Region, Sample, Step

ROW: dict[str, Any] = {
    "id": "1",
    "image": "images/1.png",
    "question": "Which?",
    "answers": ["7"],
    "source": "cards",
    "regions": [{"box": [1, 2, 30, 20]}],
    "rationale": [{"text": "<think>Look ", "region": {"box": [1, 2, 30.5, 20], "image": 0}}, {"text": "7"}],
}


def test_round_trip_through_json() -> None:
    sample = Sample(
        id="x",
        question="Which?",
        answers=("7", "seven"),
        source="cards",
        choices=("6", "7"),
        regions=(Region((1.0, 2.0, 3.5, 4.0), image=1),),
        rationale=(
            Step("look ", Region((0.0, 0.0, 5.0, 5.0))),
            Step("closer ", Region((0.0, 0.0, 5.0, 5.0), 1, zoom=2.5)),
            Step("done"),
        ),
        meta={"image_id": "000001"},
    )
    read, paths = from_row(json.loads(json.dumps(to_row(sample, ["a.png", "b/c.png"]))))
    assert paths == ("a.png", "b/c.png")
    for name in ("id", "question", "answers", "source", "choices", "regions", "rationale", "meta"):
        assert getattr(read, name) == getattr(sample, name)
    assert read.images == ()


def test_minimal_rows() -> None:
    minimal = {"id": "1", "question": "2 + 2?", "answers": [], "source": "math", "images": []}
    sample, paths = from_row(minimal)
    assert (paths, sample.regions, sample.rationale, sample.choices) == ((), (), (), ())
    assert to_row(sample, ()) == minimal
    assert from_row(ROW)[0].regions == (Region((1.0, 2.0, 30.0, 20.0), 0),)


@pytest.mark.parametrize("key", ["id", "image", "question", "answers", "source"])
def test_missing_field_is_named(key: str) -> None:
    with pytest.raises(Invalid, match=f"key `{key}`"):
        from_row({name: value for name, value in ROW.items() if name != key})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"answers": "7"}, "key `answers`: expected a list of strings, found str '7'"),
        ({"answers": [7]}, r"key `answers\[0\]`: expected a string, found int 7"),
        ({"answers": None}, "key `answers`: .* found NoneType"),
        ({"question": 3}, "key `question`: expected a string, found int 3"),
        ({"question": "  "}, "key `question`: .* not blank"),
        ({"id": 5}, "key `id`"),
        ({"choices": "AB"}, "key `choices`"),
        ({"choices": None}, "key `choices`"),
        ({"meta": []}, "key `meta`: expected an object"),
        ({"rational": []}, "key `rational`: expected one of .*rationale"),
        ({"images": ["a.png"]}, "either `image` or `images`, found both"),
        ({"image": 1}, "key `image`: expected a path, found int"),
        ({"image": "/etc/a.png"}, "inside the data folder, found '/etc/a.png'"),
        ({"image": "images/../../a.png"}, "inside the data folder"),
        ({"image": "..\\a.png"}, "inside the data folder"),
        ({"image": "C:/a.png"}, "inside the data folder"),
        ({"image": ""}, "inside the data folder"),
        ({"regions": [{"box": [1, 2, 3]}]}, r"key `regions\[0\].box`: expected four numbers, found list"),
        ({"regions": [{"box": [1, 2, 3, "4"]}]}, "four numbers"),
        ({"regions": [{"box": [0, 0, True, 4]}]}, "four numbers"),
        ({"regions": [{"box": [0, 0, float("nan"), 4]}]}, "four numbers"),
        ({"regions": [{"box": [5, 0, 5, 4]}]}, "x1 < x2 and y1 < y2"),
        ({"regions": [{"box": [0, 4, 5, 3]}]}, "x1 < x2 and y1 < y2"),
        ({"regions": [{}]}, "key `box`: missing"),
        ({"regions": [[1, 2, 3, 4]]}, r"key `regions\[0\]`: expected an object"),
        ({"regions": [{"box": [0, 0, 1, 1], "image": 1}]}, r"regions\[0\].image`: expected one of the row's 1 images"),
        ({"regions": [{"box": [0, 0, 1, 1], "image": -1}]}, r"regions\[0\].image"),
        ({"regions": [{"box": [0, 0, 1, 1], "image": False}]}, r"regions\[0\].image"),
        ({"rationale": "text"}, "key `rationale`: expected a list"),
        ({"rationale": [{"text": 1}]}, r"key `rationale\[0\].text`: expected a string, found int 1"),
        ({"rationale": [{"text": "a", "region": {"box": [0, 0, 1, 1], "image": 2}}]}, r"rationale\[0\].region.image"),
        (
            {"rationale": [{"text": "a", "region": {"box": [0, 0, 1, 1], "zoom": 0.1}}]},
            r"key `rationale\[0\].region.zoom`: expected a number from 0.25 to 8, found float 0.1",
        ),
        (
            {"rationale": [{"text": "a", "region": {"box": [0, 0, 1, 1], "zoom": "2"}}]},
            r"region.zoom`: .* found str '2'",
        ),
        ({"rationale": [{"text": "a", "region": {"box": [0, 0, 1, 1], "zoom": None}}]}, r"region.zoom`: .* NoneType"),
    ],
)
def test_bad_rows_say_key_expected_and_found(change: dict[str, Any], why: str) -> None:
    with pytest.raises(Invalid, match=why):
        from_row(ROW | change)


@pytest.mark.parametrize("row", [[], "text", None, 3])
def test_a_row_is_an_object(row: object) -> None:
    with pytest.raises(Invalid, match="the row: expected an object"):
        from_row(row)


@pytest.mark.parametrize("where", ["regions", "rationale"])
@pytest.mark.parametrize("box", [(-0.5, 0, 5, 5), (0, -1, 5, 5), (0, 0, 40.5, 5), (0, 0, 5, 31)])
def test_boxes_outside_the_image(where: str, box: tuple[float, float, float, float]) -> None:
    inside, outside = Region((0.0, 0.0, 40.0, 30.0)), Region(box)
    changed = {"regions": (inside, outside)} if where == "regions" else {"rationale": (Step("a"), Step("b", outside))}
    image = torch.zeros(3, 30, 40, dtype=torch.uint8)
    with pytest.raises(Invalid, match=rf"key `{where}\[1\].*box`: expected a box inside the 40 x 30 image"):
        check_boxes(Sample("1", "Which?", (image,), **changed))
    exact = Sample("1", "Which?", (image,), regions=(inside,))
    assert check_boxes(exact) is exact


def test_bad_row_names_file_and_row() -> None:
    error = BadRow("data.jsonl", 3, "key `id`: missing")
    assert str(error) == "data.jsonl:3: key `id`: missing"
