"""What strangers send: texts, rows of JSON and image files, mostly almost right; and how often they are tried.

`quick` is for the tests: few examples, the same ones each time. `python -m tests.properties.fuzz` puts a profile of its
own in its place.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from io import BytesIO
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image

FUZZ = "fuzz"


def quick(examples: int) -> settings:
    """The settings of a property."""
    if settings.get_current_profile_name() == FUZZ:
        return settings.get_profile(FUZZ)
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=SLOW)


SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]  # images are large, and this machine may be busy

# --- text ---

BOX = '{"bbox_2d": [1, 2, 30, 40]}'
_PIECES = [
    *['"', "{", "}", "[", "]", "\\", "'", ":", ",", " ", "\n", "1", "-1e9", "1e999", "NaN", "9" * 30, "9" * 5000],
    *["bbox_2d", '"bbox_2d": [', '"image": 1', '"zoom": 2', '"zoom": 1e400', "null", "true", "<answer>", "</answer>"],
    *[
        "<think>",
        "</think>",
        BOX,
        "é",
        "\ud800",
        "\x1c",
        "\x00",
        "²",
        "٣",
        "(A)",
        "\\boxed{",
        "The answer is B.",
        "is ",
    ],
]
texts = st.lists(st.sampled_from(_PIECES), max_size=30).map("".join) | st.text(st.characters(), max_size=60)

# --- JSON ---

_HUGE, _DEEP = "@huge", "@deep"  # stand for what `json.dumps` would not write
_HOSTILE = [0, -1, 1.5, 10**400, float("nan"), float("inf"), "", " ", "\x00", "\ud800", "../a.png", "/etc/passwd", "²"]
_HOSTILE += ["9" * 30, "9" * 5000, "a" * 5000, True, None, [], {}, [[]], {"\ud800\n": 1}, _HUGE, _DEEP]
_leaves = st.sampled_from(_HOSTILE) | st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    _leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
)


def dumped(value: object) -> str:
    """JSON, with integers of more digits than Python reads and lists nested deeper than it can."""
    text = json.dumps(value)
    return text.replace(f'"{_HUGE}"', "9" * 5000).replace(f'"{_DEEP}"', "[" * 100_000 + "]" * 100_000)


def _places(value: object) -> Iterator[tuple[Any, Any]]:
    """Every container with every key in it, from the outside inwards."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from _places(inner)


@st.composite
def almost(draw: st.DrawFn, row: dict[str, Any]) -> Any:
    """The row, with up to three things in it left out, put in or replaced; or anything else."""
    if draw(st.integers(0, 9)) == 0:
        return deepcopy(draw(values))
    row = json.loads(json.dumps(row))
    for _ in range(draw(st.integers(0, 3))):
        container, key = draw(st.sampled_from(list(_places(row)) or [({}, "")]))
        match draw(st.sampled_from(["replace", "leave out", "put in"])):
            case "replace":
                container[key] = deepcopy(draw(values))  # some are the same objects each time
            case "leave out" if key in container or isinstance(container, list):
                del container[key]
            case _ if isinstance(container, dict):
                container[draw(st.text(max_size=5))] = deepcopy(draw(values))
    return row


# --- images ---


def _file(mode: str, kind: str, width: int, height: int, **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    picture = Image.fromarray(pixels, "RGBA").convert("RGB")
    picture = Image.fromarray(pixels, "RGBA") if mode in ("RGBA", "LA", "PA") else picture
    file = BytesIO()
    picture.convert("L" if mode == "I;16" else mode).convert(mode).save(file, kind, **options)
    return file.getvalue()


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


FILES: dict[str, Callable[[], bytes]] = {
    **{
        f"png {mode}": lambda mode=mode: _file(mode, "PNG", 9, 7)
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
    },
    **{f"jpeg {mode}": lambda mode=mode: _file(mode, "JPEG", 40, 24) for mode in ("L", "RGB", "CMYK")},
    "jpeg on its side": lambda: _file("RGB", "JPEG", 16, 24, exif=_exif(6)),
    "jpeg in passes": lambda: _file("RGB", "JPEG", 16, 24, progressive=True),
    "png animated": lambda: _file("RGB", "PNG", 8, 8, save_all=True, append_images=[Image.new("RGB", (8, 8))]),
    "webp": lambda: _file("RGB", "WEBP", 16, 16),
    "webp lossless": lambda: _file("RGBA", "WEBP", 16, 16, lossless=True),
    "avif": lambda: _file("RGB", "AVIF", 16, 16),
    "jpeg 2000": lambda: _file("RGB", "JPEG2000", 16, 16),
    **{kind: lambda kind=kind: _file("RGB", kind, 9, 7) for kind in ("BMP", "GIF", "TIFF", "PPM", "TGA", "ICO", "PCX")},
    **{kind: lambda kind=kind: _file("RGB", kind, 9, 7) for kind in ("SGI", "IM", "DDS", "QOI", "EPS", "ICNS")},
    "tiff packed": lambda: _file("RGB", "TIFF", 9, 7, compression="tiff_lzw"),
    "tiff float": lambda: _file("F", "TIFF", 9, 7),
    "xbm": lambda: _file("1", "XBM", 9, 7),
    "msp": lambda: _file("1", "MSP", 9, 7),
}
_WORDS = [
    b"\x00",
    b"\xff",
    b"\x00\x00\x00\x00",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\x00\x01",
]


@st.composite
def images(draw: st.DrawFn) -> bytes:
    """A real file, cut off or changed in a few places, its check sums made right again; or any bytes."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=300))
    data = bytearray(FILES[draw(st.sampled_from(sorted(FILES)))]())
    for _ in range(draw(st.integers(0, 4))):
        near = draw(st.booleans())  # headers stand in front, and hold what is worth changing
        at = draw(st.integers(0, max(0, min(len(data), 64) - 1 if near else len(data) - 1)))
        match draw(st.sampled_from(["cut", "word", "bytes", "leave out", "twice"])):
            case "cut":
                del data[at:]
            case "word":
                word = draw(st.sampled_from(_WORDS))
                data[at : at + len(word)] = word
            case "bytes":
                some = draw(st.binary(min_size=1, max_size=4))
                data[at : at + len(some)] = some
            case "leave out":
                del data[at : at + draw(st.integers(1, 8))]
            case "twice":
                data[at:at] = data[at : at + 32]
    return sealed(bytes(data)) if draw(st.booleans()) else bytes(data)


def sealed(data: bytes) -> bytes:
    """A PNG file with right check sums and lengths as they are, so that a decoder reads on; others as they are."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + length]
        parts.append(data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + length
    return b"".join(parts)


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG file of a few bytes that says it is so large."""
    data = bytearray(FILES["png RGB"]())
    data[16:24] = struct.pack(">II", width, height)
    return sealed(bytes(data))
