"""Checkpoints that are there as a whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from modules.errors import PolicyError
from modules.store import synchronise

PART = ".checkpoint.part"  # one name in a folder: what a kill leaves of it is written over by the next checkpoint


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, has it put on disk, then renames it: the one before it stays until then.

    (Lightning writes to the folder of temporary files, and moves from there: between two file systems, such as a node's
    and a shared one, that is a copy, and whatever ends it leaves half a checkpoint in the place of a whole one.)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a file; addresses of object stores are left to Lightning.

        Raises:
            PolicyError: the disk is full, the folder cannot be written, or the like.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        part = file.with_name(PART)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as out:
                torch.save(checkpoint, out)
                out.flush()
                os.fsync(out.fileno())
            part.replace(file)
            synchronise(file.parent)
        except (OSError, RuntimeError) as error:  # torch makes the latter of what its file raises
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise PolicyError(unwritten(file, error)) from error


def unwritten(file: Path, error: Exception) -> str:
    """What to do where a checkpoint could not be written."""
    cause = error if isinstance(error, OSError) else (error.__context__ or error)
    last = file.with_name("last.ckpt")
    left = (
        f"{last} is the last whole one: make room, or make the folder writable, and run the same command with "
        "`--ckpt_path=last`"
        if last.exists()
        else "There is no earlier one: make room, or give another `--run_dir`, and run the same command"
    )
    return f"Expected to write the checkpoint {str(file)!r}, but it fails: {cause}. {left}."


def others(file: Path) -> str:
    """What to give in place of a checkpoint that is damaged: the newest other one of its folder that is not cut off."""
    found = [other for other in file.parent.glob("*.ckpt") if other != file and zipfile.is_zipfile(other)]
    if not found:
        return "There is no other one in its folder: start again without `--ckpt_path`, in another `--run_dir`."
    newest = max(found, key=lambda other: other.stat().st_mtime)
    return f"The newest other one is {str(newest)!r}: give it as `--ckpt_path`."
