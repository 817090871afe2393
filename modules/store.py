"""Small JSON objects by key, on disk: each is there as a whole or not at all, also after a crash."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Store:
    """A folder of JSON objects, one file each; processes may share it.

    Args:
        folder: made when the first object is written.
    """

    folder: Path

    def path(self, key: str) -> Path:
        """The file of a key, which may be any text."""
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.json"

    def read(self, key: str) -> dict[str, Any] | None:
        """What was written under a key; None if nothing was, or somebody damaged it."""
        return _read(self.path(key))

    def write(self, key: str, value: dict[str, Any]) -> None:
        """Put an object on disk; when this returns, it outlives the process and the machine's next crash.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            try:
                json.dump(value, file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(file.name)
                raise
        synchronise(path.parent)

    def values(self) -> Iterator[dict[str, Any]]:
        """Everything that is kept, in the order of the files' names."""
        for path in sorted(self.folder.glob("??/*.json")):
            if (value := _read(path)) is not None:
                yield value


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def synchronise(folder: Path) -> None:
    """Let a rename outlive a crash of the machine, where folders can be synchronised."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
