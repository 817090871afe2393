"""Which images are one image: exactly, nearly, or in a benchmark."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from datamodules.images import BadImage
from datamodules.pictures import ImageFile, ImageRef
from datamodules.sources.base import Source
from datamodules.vlir.schema import DataError, Invalid

HASH_SIDE = 16  # 256 bits: with the usual 64, pages of text are all alike
FORMATS = frozenset(Image.registered_extensions())


@dataclass(frozen=True)
class Fingerprint:
    """What there is to know of an image without decoding it again."""

    digest: str  # of the file's bytes
    size: tuple[int, int]  # (H, W), upright
    bits: str  # perceptual hash, hexadecimal


class Bits:
    """Perceptual hashes that can be searched."""

    def __init__(self) -> None:
        self._rows: NDArray[np.uint8] = np.zeros((64, HASH_SIDE * HASH_SIDE // 8), dtype=np.uint8)
        self._names: list[str] = []

    def add(self, bits: str, name: str) -> None:
        """Put a hash in under a name."""
        if len(self._names) == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        self._rows[len(self._names)] = _row(bits)
        self._names.append(name)

    def nearest(self, bits: str) -> tuple[str, int] | None:
        """The first name with the fewest differing bits, and how many these are; None if nothing is in."""
        if not self._names:
            return None
        differing = np.bitwise_count(self._rows[: len(self._names)] ^ _row(bits)).sum(axis=1, dtype=np.int64)
        best = int(differing.argmin())
        return self._names[best], int(differing[best])


def perceptual_hash(pixels: Tensor) -> str:
    """256 bits that barely change when an image is scaled or compressed: `imagehash.phash` with a side of 16.

    Args:
        pixels: (3, H, W) uint8.
    """
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return str(_imagehash().phash(image, hash_size=HASH_SIDE))


def check_installed() -> None:
    """Whether what images are compared with is there.

    Raises:
        DataError: if not.
    """
    try:
        _imagehash()
    except ImportError:
        raise DataError("Building a corpus needs the package ImageHash: pip install imagehash.") from None


def _imagehash() -> Any:
    return importlib.import_module("imagehash")


def fingerprint(image: ImageRef) -> Fingerprint:
    """Read and decode an image once.

    Raises:
        BadImage: it cannot be decoded.
        Invalid: it is a link out of its folder.
    """
    pixels = image.load()
    return Fingerprint(
        hashlib.sha256(read_bytes(image)).hexdigest(),
        (pixels.shape[-2], pixels.shape[-1]),
        perceptual_hash(pixels),
    )


def read_bytes(image: ImageRef) -> bytes:
    """The file of an image, as it is."""
    opened = image.open()
    return opened.read_bytes() if isinstance(opened, Path) else opened.read()


def fingerprints(
    images: Sequence[ImageRef], remembered: Path, workers: int, tick: Callable[[], None] = lambda: None
) -> dict[ImageRef, Fingerprint | str]:
    """Fingerprints of many images, side by side; why not where there is none.

    Args:
        images: equal ones are decoded once.
        remembered: a JSON file of those that were made before, by path, length and time of the file; it is brought up
            to date.
        workers: threads.
        tick: called after each.
    """
    known = _remembered(remembered)
    new: dict[str, Any] = {}

    def one(image: ImageRef) -> Fingerprint | str:
        key = _key(image)
        try:
            found = known[key] if key in known else fingerprint(image)
        except (BadImage, Invalid) as error:
            return str(error)
        finally:
            tick()
        if key is not None:
            new[key] = asdict(found)
        return found

    different = list(dict.fromkeys(images))
    with ThreadPoolExecutor(workers) as pool:
        found = dict(zip(different, pool.map(one, different), strict=True))
    part = remembered.with_name(remembered.name + ".part")
    part.write_text(json.dumps(dict(sorted(new.items()))), encoding="utf-8")
    os.replace(part, remembered)
    return found


def benchmark_images(sources: Sequence[Source], folders: Sequence[str]) -> list[ImageRef]:
    """The images of benchmarks.

    Args:
        sources: data sets.
        folders: of which every image counts, however deep.

    Raises:
        DataError: a data set that cannot be read, or a folder that is not there or holds no image.
    """
    images: list[ImageRef] = [image for source in sources for record in source.read()[0] for image in record.images]
    for folder in map(Path, folders):
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in FORMATS and path.is_file())
        if not files:
            raise DataError(f"{folder}: expected images of a benchmark, found none.")
        images += [ImageFile(folder, path.relative_to(folder).as_posix()) for path in files]
    return images


def _key(image: ImageRef) -> str | None:
    """What tells a file from another and from a later version of itself; None for what is not a file."""
    if not isinstance(image, ImageFile):
        return None
    path = image.root / image.path
    try:
        stat = path.stat()
    except OSError:
        return None
    return json.dumps([str(path.absolute()), stat.st_size, stat.st_mtime_ns])


def _remembered(path: Path) -> dict[str | None, Fingerprint]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {key: Fingerprint(e["digest"], (e["size"][0], e["size"][1]), e["bits"]) for key, e in entries.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}  # made anew


def _row(bits: str) -> NDArray[np.uint8]:
    return np.frombuffer(bytes.fromhex(bits), dtype=np.uint8)
