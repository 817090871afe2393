"""From the features of a vision encoder to the embeddings of a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class ProjectorConfig:
    """What joins the encoder to the language model.

    Args:
        kind: one linear layer, two with a GELU between them, or those two behind a pixel shuffle, which puts
            ``ratio`` x ``ratio`` neighbouring patches into one token.
        ratio: of the pixel shuffle, at least 2; the others have none.
    """

    kind: Literal["linear", "mlp", "pixel_shuffle"] = "linear"
    ratio: int | None = None

    def __post_init__(self) -> None:
        if self.kind == "pixel_shuffle" and (self.ratio is None or self.ratio < 2):
            raise ValueError(f"Expected `projector.ratio` to be at least 2, but got {self.ratio}.")
        if self.kind != "pixel_shuffle" and self.ratio is not None:
            raise ValueError(
                f"Expected `projector.ratio` with pixel_shuffle only, but got {self.ratio} with {self.kind}."
            )

    def build(self, inputs: int, outputs: int) -> nn.Module:
        """The layers, for features of width ``inputs`` and embeddings of width ``outputs``."""
        inputs *= (self.ratio or 1) ** 2
        if self.kind == "linear":
            return nn.Linear(inputs, outputs)
        return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


def pixel_shuffle(tokens: Tensor, rows: int, columns: int, ratio: int) -> Tensor:
    """Put squares of ``ratio`` x ``ratio`` tokens into one: (B, rows * columns, C) -> (B, …, C * ratio²), row-major.

    Args:
        tokens: row-major.
        rows: of the grid, a multiple of ``ratio``.
        columns: likewise.
        ratio: side of the squares.
    """
    squares = tokens.unflatten(1, (rows // ratio, ratio, columns // ratio, ratio))
    return squares.transpose(2, 3).flatten(3).flatten(1, 2)
