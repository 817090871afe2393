"""The project's own form of interleaved rationales (VLIR): one JSON object a line or parquet row, a question each.

    {"id": str, "image": "images/000001.png",        or "images": [...], none to many, relative to the file's folder
     "question": str, "answers": [str], "source": str,
     "choices": [str],                  optional: the options of a multiple-choice question
     "answer_kind": "anls",             optional: how answers are compared, one of `modules.functional.graders.Kind`
     "regions": [Region],               optional: annotated evidence
     "rationale": [{"text": str, "region": Region}],            optional: a written trajectory
     "meta": {...},                     optional: anything
     "provenance": {...}}               optional: where the row is from and who wrote what

    Region = {"box": [x1, y1, x2, y2], "image": 0, "why": "the label is too small to read", "zoom": 2}

Boxes are xyxy in pixels of the original image, x2 and y2 exclusive; "image" counts from 0 and may be left out;
so may "why", what it is looked at for, and "zoom", by which the sides of the crop are enlarged in place of the zoom
rule.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, TypeVar, get_args

from modules.functional.graders import Kind
from modules.functional.grammar import LEAST_ZOOM, MOST_ZOOM
from modules.trajectory import Box, Region, Sample, Step

T = TypeVar("T")

REQUIRED = ("id", "question", "answers", "source")
OPTIONAL = ("image", "images", "choices", "answer_kind", "regions", "rationale", "meta", "provenance")
REGION = ("box", "image", "why", "zoom")
STEP = ("text", "region")


class DataError(Exception):
    """The data as a whole cannot be used; the message is one sentence for the user, no traceback needed."""


class Invalid(ValueError):
    """Something in a row is not as expected; says the key, what was expected and what was found, in one line."""

    def __init__(self, why: str) -> None:
        super().__init__(printable(why))


class BadRow(ValueError):
    """A row that is left out; names the file, the 1-based row and why."""

    def __init__(self, file: str, row: int, why: str) -> None:
        super().__init__(f"{file}:{row}: {why}")
        self.file = file
        self.row = row
        self.why = why


def to_row(sample: Sample, image_paths: Sequence[str]) -> dict[str, Any]:
    """One line of the file; the inverse of `from_row`.

    Args:
        sample: its images are not looked at.
        image_paths: one for each of the sample's images, relative to the file's folder.
    """
    row: dict[str, Any] = {"id": sample.id}
    row |= {"image": image_paths[0]} if len(image_paths) == 1 else {"images": list(image_paths)}
    row |= {"question": sample.question, "answers": list(sample.answers), "source": sample.source}
    optional = {
        "choices": list(sample.choices),
        "answer_kind": sample.answer_kind,
        "regions": [_region_row(region) for region in sample.regions],
        "rationale": [_step_row(step) for step in sample.rationale],
        "meta": sample.meta,
        "provenance": sample.provenance,
    }
    return row | {key: value for key, value in optional.items() if value}


def from_row(row: object) -> tuple[Sample, tuple[str, ...]]:
    """A sample without its images, and the relative paths of these.

    Whether a box lies inside its image is only known once that is loaded: `check_boxes`.

    Raises:
        Invalid: a missing or unknown key, a value of the wrong type, a degenerate box, a region on an image
            that the row does not have, or a path that leaves the folder.
    """
    row = _known(expect(row, dict, "the row", "an object"), "", (*REQUIRED, *OPTIONAL))
    paths = _image_paths(row)
    sample = Sample(
        id=text(row, "id"),
        question=text(row, "question"),
        answers=strings(row, "answers"),
        source=text(row, "source"),
        choices=strings(row, "choices") if "choices" in row else (),
        regions=tuple(
            _region(value, f"regions[{i}]", len(paths)) for i, value in enumerate(_optional_list(row, "regions"))
        ),
        rationale=tuple(
            _step(value, f"rationale[{i}]", len(paths)) for i, value in enumerate(_optional_list(row, "rationale"))
        ),
        meta=expect(row.get("meta", {}), dict, "key `meta`", "an object"),
        answer_kind=_kind(row),
        provenance=expect(row.get("provenance", {}), dict, "key `provenance`", "an object"),
    )
    return sample, paths


def check_boxes(sample: Sample) -> Sample:
    """The sample itself, if every box lies inside its (loaded) image.

    Raises:
        Invalid: a box reaches outside.
    """
    named = [(f"regions[{i}]", region) for i, region in enumerate(sample.regions)]
    named += [(f"rationale[{i}].region", step.region) for i, step in enumerate(sample.rationale) if step.region]
    for name, region in named:
        height, width = sample.images[region.image].shape[-2:]
        x1, y1, x2, y2 = region.box
        if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
            raise Invalid(f"key `{name}.box`: expected a box inside the {width} x {height} image, found {region.box}")
    return sample


def expect(value: object, kind: type[T], name: str, expected: str) -> T:
    """`value` if it is of `kind`, else Invalid."""
    if not isinstance(value, kind):
        raise Invalid(f"{name}: expected {expected}, found {describe(value)}")
    return value


def required(row: dict[str, Any], key: str) -> Any:
    """The value of a key that every row has."""
    if key not in row:
        raise Invalid(f"key `{key}`: missing (found {', '.join(sorted(map(str, row))) or 'no keys'})")
    return row[key]


def text(row: dict[str, Any], key: str) -> str:
    """A string that is not blank."""
    value = expect(required(row, key), str, f"key `{key}`", "a string")
    if not value.strip():
        raise Invalid(f"key `{key}`: expected a string that is not blank, found {value!r}")
    return _whole(value, f"key `{key}`")


def strings(row: dict[str, Any], key: str) -> tuple[str, ...]:
    """A list of strings."""
    values = expect(required(row, key), list, f"key `{key}`", "a list of strings")
    names = (f"key `{key}[{i}]`" for i in range(len(values)))
    return tuple(_whole(expect(v, str, name, "a string"), name) for v, name in zip(values, names, strict=True))


def _whole(value: str, name: str) -> str:
    """The string itself, if it can be written: JSON's escapes can name half a character, which no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Invalid(f"{name}: expected whole characters, found half a surrogate pair in {value[:60]!r}") from None
    return value


def relative_path(value: object, name: str) -> str:
    """A path that stays inside its root."""
    path = expect(value, str, name, "a path")
    parts = PurePosixPath(path.replace("\\", "/"))
    if not path or parts.is_absolute() or ".." in parts.parts or path[1:2] == ":" or "\0" in path:
        raise Invalid(f"{name}: expected a path inside the data folder, found {path[:200]!r}")
    return _whole(path, name)


def printable(text: str) -> str:
    """The text in one line that any terminal and log takes: what cannot be printed is written as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_number(value: object) -> bool:
    """Whether it is a finite number that a float can hold."""
    # compared, not converted: an integer of JSON may have any number of digits
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def describe(value: object) -> str:
    """Type and value, short enough for one line."""
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _known(row: dict[str, Any], within: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """The row itself, if it has no other keys."""
    if unknown := sorted(set(row) - set(keys)):
        raise Invalid(f"key `{within}{unknown[0]}`: expected one of {', '.join(keys)}")
    return row


def _kind(row: dict[str, Any]) -> str | None:
    if "answer_kind" not in row:
        return None
    if row["answer_kind"] not in get_args(Kind):
        raise Invalid(
            f"key `answer_kind`: expected one of {', '.join(get_args(Kind))}, found {describe(row['answer_kind'])}"
        )
    return str(row["answer_kind"])


def _image_paths(row: dict[str, Any]) -> tuple[str, ...]:
    if ("image" in row) == ("images" in row):
        raise Invalid(f"key `image`: expected either `image` or `images`, found {'both' if 'image' in row else 'none'}")
    if "image" in row:
        return (relative_path(row["image"], "key `image`"),)
    paths = expect(row["images"], list, "key `images`", "a list of paths")
    return tuple(relative_path(path, f"key `images[{i}]`") for i, path in enumerate(paths))


def _optional_list(row: dict[str, Any], key: str) -> list[object]:
    return expect(row.get(key, []), list, f"key `{key}`", "a list of objects")


def _region(value: object, name: str, num_images: int) -> Region:
    row = _known(expect(value, dict, f"key `{name}`", "an object"), f"{name}.", REGION)
    image = row.get("image", 0)
    if isinstance(image, bool) or not isinstance(image, int) or not 0 <= image < num_images:
        raise Invalid(f"key `{name}.image`: expected one of the row's {num_images} images, found {describe(image)}")
    why = expect(row.get("why", ""), str, f"key `{name}.why`", "a string")
    return Region(_box(required(row, "box"), f"{name}.box"), image, _zoom(row, f"{name}.zoom"), why)


def _box(value: object, name: str) -> Box:
    numbers = expect(value, list, f"key `{name}`", "[x1, y1, x2, y2]")
    if len(numbers) != 4 or not all(is_number(number) for number in numbers):
        raise Invalid(f"key `{name}`: expected four numbers, found {describe(value)}")
    x1, y1, x2, y2 = (float(number) for number in numbers)
    if x2 <= x1 or y2 <= y1:
        raise Invalid(f"key `{name}`: expected x1 < x2 and y1 < y2, found {numbers}")
    return x1, y1, x2, y2


def _step(value: object, name: str, num_images: int) -> Step:
    row = _known(expect(value, dict, f"key `{name}`", "an object"), f"{name}.", STEP)
    words = _whole(expect(required(row, "text"), str, f"key `{name}.text`", "a string"), f"key `{name}.text`")
    return Step(words, _region(row["region"], f"{name}.region", num_images) if "region" in row else None)


def _zoom(region: dict[str, Any], name: str) -> float | None:
    zoom = region.get("zoom", LEAST_ZOOM)
    if not is_number(zoom) or not LEAST_ZOOM <= zoom <= MOST_ZOOM:
        raise Invalid(
            f"key `{name}`: expected a number from {LEAST_ZOOM:g} to {MOST_ZOOM:g}, found {describe(region['zoom'])}"
        )
    return float(zoom) if "zoom" in region else None


def _region_row(region: Region) -> dict[str, Any]:
    zoom = {} if region.zoom is None else {"zoom": region.zoom}
    why = {"why": region.why} if region.why else {}
    return {"box": list(region.box), "image": region.image} | why | zoom


def _step_row(step: Step) -> dict[str, Any]:
    return {"text": step.text} | ({"region": _region_row(step.region)} if step.region else {})
