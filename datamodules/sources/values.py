"""Values of rows, as data sets write them; each function raises `Invalid` for what it cannot read."""

from __future__ import annotations

import ast
import math
from typing import Any

from datamodules.vlir.schema import Invalid, describe, expect, required
from modules.trajectory import Box


def phrase(value: object, name: str) -> str:
    """A string that is not blank, or a finite number as its text ("7", "2.5"): the files of many have both."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    found = expect(value, str, name, "a string or a number").strip()
    if not found:
        raise Invalid(f"{name}: expected a string that is not blank, found {value!r}")
    return found


def answer(row: dict[str, Any], key: str) -> str:
    """An answer that is there: a string that is not blank, or a number."""
    return phrase(required(row, key), f"key `{key}`")


def phrases(row: dict[str, Any], key: str) -> tuple[str, ...]:
    """A list of at least one answer, each a string that is not blank, or a number."""
    values = expect(required(row, key), list, f"key `{key}`", "a list of strings")
    if not values:
        raise Invalid(f"key `{key}`: expected at least one, found an empty list")
    return tuple(phrase(value, f"key `{key}[{i}]`") for i, value in enumerate(values))


def options(row: dict[str, Any], key: str) -> tuple[str, ...]:
    """The options of a multiple-choice question: at least two, also where the list is written as a string."""
    value = required(row, key)
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise Invalid(f"key `{key}`: expected a list of options, found {describe(row[key])}") from None
    found = phrases({key: value}, key)
    if len(found) < 2:
        raise Invalid(f"key `{key}`: expected at least two options, found {describe(value)}")
    return found


def chosen(row: dict[str, Any], key: str, choices: tuple[str, ...]) -> str:
    """The option that an index from 0 names."""
    index = whole(required(row, key), f"key `{key}`")
    if not 0 <= index < len(choices):
        raise Invalid(f"key `{key}`: expected the index of one of {len(choices)} options, found {index}")
    return choices[index]


def identity(row: dict[str, Any], key: str) -> str:
    """An id: a string that is not blank, or a whole number."""
    value = required(row, key)
    if isinstance(value, float) and not value.is_integer():
        raise Invalid(f"key `{key}`: expected an id, found {describe(value)}")
    return phrase(int(value) if isinstance(value, float) else value, f"key `{key}`")


def whole(value: object, name: str) -> int:
    """A whole number, also as text: CSV has nothing else."""
    try:
        if isinstance(value, str):
            return int(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and value == int(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise Invalid(f"{name}: expected a whole number, found {describe(value)}")


def box(value: object, name: str, form: str = "xyxy") -> Box:
    """A box in pixels of the original image.

    Args:
        value: a list of four numbers.
        name: what messages call it.
        form: "xyxy", or "xywh": corner, width and height.

    Returns:
        (x1, y1, x2, y2), float; not yet known to lie inside its image.
    """
    numbers = expect(value, list, name, f"four numbers ({form})")
    if len(numbers) != 4 or not all(
        isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers
    ):
        raise Invalid(f"{name}: expected four numbers ({form}), found {describe(value)}")
    x, y, c, d = (float(n) for n in numbers)
    x2, y2 = (x + c, y + d) if form == "xywh" else (c, d)
    if x2 <= x or y2 <= y:
        raise Invalid(f"{name}: expected a box of some size ({form}), found {numbers}")
    return x, y, x2, y2
