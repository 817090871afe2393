"""Where a run's pictures, histograms and layouts go, and at which step."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
from PIL import Image


def batches_done(trainer: L.Trainer) -> int:
    """The x-axis of Lightning's own curves: batches, not optimizer steps."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def writers(trainer: L.Trainer, method: str) -> list[Any]:
    """The loggers' experiments that have ``method``; none on other ranks, where every attribute exists."""
    if not trainer.is_global_zero:
        return []
    experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    return [experiment for experiment in experiments if hasattr(experiment, method)]


def add_image(writers: list[Any], tag: str, picture: Image.Image, step: int) -> None:
    """Write a picture."""
    pixels = np.asarray(picture)
    for writer in writers:
        writer.add_image(tag, pixels, step, dataformats="HWC")
