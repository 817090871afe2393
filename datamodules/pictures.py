"""Where a record's images are: references that stay small until a batch needs the pixels.

A reference can be pickled, hashed and compared: equal ones are one image, decoded once a batch.
"""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol

from torch import Tensor

from datamodules.images import BadImage, load_image
from datamodules.vlir.schema import Invalid


class Cells(Protocol):
    """What holds images in its rows; see `datamodules.tables.Table`."""

    @property
    def name(self) -> str:
        """The file or data set, for messages."""

    def cell(self, at: int, column: str, index: int | None = None) -> object:
        """What stands in a row's column, or in one element of the list there."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file below a folder that it may not leave."""

    root: Path
    path: str  # relative to root, without ".."

    def __str__(self) -> str:
        return str(self.root / self.path)

    def exists(self) -> bool:
        """Whether there is such a file, wherever it leads."""
        return os.path.exists(self.root / self.path)  # pathlib's raises where a name is too long

    def open(self) -> Path:
        """What Pillow can open.

        Raises:
            Invalid: a symbolic link leads out of the folder.
        """
        path = self.root / self.path
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise Invalid(
                f"{path}: expected an image inside {self.root}, found a link to {path.resolve()} "
                "(set `root` to the folder that holds the images)"
            )
        return path

    def load(self) -> Tensor:
        """Decode it: (3, H, W) uint8.

        Raises:
            BadImage: it cannot be decoded.
            Invalid: as `open`.
        """
        return load_image(self.open())


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image inside a table's row: its bytes, or base64 text."""

    table: Cells
    at: int  # the row's place in its table
    column: str
    index: int | None = None  # where the column holds a list

    def __str__(self) -> str:
        return f"{self.table.name} column `{self.column}`" + ("" if self.index is None else f"[{self.index}]")

    def exists(self) -> bool:
        """True: that there is something in the cell was seen when the row was read."""
        return True

    def open(self) -> BytesIO:
        """What Pillow can open.

        Raises:
            BadImage: the cell holds no bytes and no base64.
        """
        return BytesIO(self._bytes())

    def load(self) -> Tensor:
        """Decode it: (3, H, W) uint8.

        Raises:
            BadImage: it cannot be decoded.
        """
        return load_image(self._bytes(), str(self))

    def _bytes(self) -> bytes:
        value = self.table.cell(self.at, self.column, self.index)
        if isinstance(value, str):
            try:
                return base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
            except (binascii.Error, ValueError):
                raise BadImage(str(self), f"expected an image in base64, found {value[:40]!r}") from None
        if not isinstance(value, bytes):
            raise BadImage(str(self), f"expected the bytes of an image, found {type(value).__name__}")
        return value


@dataclass(frozen=True, slots=True)
class ImageBytes:
    """An image that came with a streamed row; lives as long as its batch."""

    data: bytes
    name: str

    def __str__(self) -> str:
        return self.name

    def exists(self) -> bool:
        """True: it is here."""
        return True

    def open(self) -> BytesIO:
        """What Pillow can open."""
        return BytesIO(self.data)

    def load(self) -> Tensor:
        """Decode it: (3, H, W) uint8.

        Raises:
            BadImage: it cannot be decoded.
        """
        return load_image(self.data, self.name)


ImageRef = ImageFile | StoredImage | ImageBytes
