"""How images and crops are brought to the size that a backbone takes."""

from __future__ import annotations

from dataclasses import dataclass

from modules.crop import CropAndScale


@dataclass(frozen=True)
class ScalerConfig:
    """How an image or a crop is brought to the encoder's patch grid.

    Args:
        size: (height, width); None: the zoom rule (crops) within the limits below.
        min_pixels: smallest area after scaling, in pixels.
        max_pixels: largest area after scaling, in pixels.
    """

    size: tuple[int, int] | None = None
    min_pixels: int = 64 * 64
    max_pixels: int = 1024 * 1024

    def build(self, grid: int) -> CropAndScale:
        """The layer, for an encoder whose sides must be multiples of ``grid``."""
        if self.size is not None:
            return CropAndScale(size=self.size)
        return CropAndScale(grid=grid, min_pixels=self.min_pixels, max_pixels=self.max_pixels)


@dataclass(frozen=True)
class TokenLimits:
    """How many visual tokens an image or a crop comes to, for encoders that give one token to a cell of their grid.

    Args:
        min_tokens: smaller images are enlarged.
        max_tokens: larger ones are shrunk.
    """

    min_tokens: int
    max_tokens: int

    def build(self, grid: int) -> CropAndScale:
        """The layer, for cells of ``grid`` x ``grid`` pixels."""
        return CropAndScale(grid=grid, min_pixels=self.min_tokens * grid**2, max_pixels=self.max_tokens * grid**2)
