"""Image files to tensors: one way of decoding for every source."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 2 * 89_478_485  # Pillow's own error level for decompression bombs, about 179 megapixels

Image.init()  # register the decoders once, before threads or workers open files


class BadImage(Exception):
    """A picture that cannot be used; names the file and why."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.path = path
        self.why = why


def load_image(path: Path) -> Tensor:
    """Decode one image file.

    EXIF orientation is applied, transparency is laid on white, 16-bit grey is scaled to 8 bits, and of an
    animation the first frame is taken.

    Args:
        path: any format that Pillow reads.

    Returns:
        (3, H, W) uint8, RGB.

    Raises:
        BadImage: no such file, empty, not an image, truncated, or more than `MAX_PIXELS` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns at half its limit, and about odd EXIF; the limit is ours
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImage(path, _too_large(image.width, image.height))
                oriented = ImageOps.exif_transpose(image)
            pixels = np.array(_to_rgb(oriented), dtype=np.uint8)
    except FileNotFoundError:
        raise BadImage(path, "no such file") from None
    except UnidentifiedImageError:
        raise BadImage(path, _unidentified(path)) from None
    except Image.DecompressionBombError:
        raise BadImage(path, _too_large()) from None
    # Pillow's decoders raise whatever a damaged file leads them into.
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, MemoryError) as error:
        raise BadImage(path, f"cannot be decoded ({error})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB of the current frame; `image` may be of any Pillow mode."""
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow would clip 16-bit grey at 255, which turns most of such pictures white.
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _unidentified(path: Path) -> str:
    head = path.read_bytes()[:256].lstrip().lower()
    if not head:
        return "the file is empty"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "expected an image, found an HTML or XML page (a failed download?)"
    return "not an image of a known format"


def _too_large(width: int = 0, height: int = 0) -> str:
    found = f"found {width} x {height}" if width else "found more"
    return f"expected at most {MAX_PIXELS // 10**6} megapixels, {found}"
