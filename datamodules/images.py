"""Image files, and the bytes of such, to tensors: one way of decoding for every source."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from datamodules.vlir.schema import printable

MAX_PIXELS = 2 * 89_478_485  # Pillow's own error level for decompression bombs, about 179 megapixels
STRIP = 256  # rows that are converted at a time

Image.init()  # register the decoders once, before threads or workers open files
FORMATS = sorted(set(Image.OPEN) - {"EPS"})  # PostScript is a program, which Pillow would have Ghostscript run


class BadImage(Exception):
    """A picture that cannot be used; names the file and why, in one line."""

    def __init__(self, name: Path | str, why: str) -> None:
        super().__init__(printable(f"{name}: {why}"))
        self.name = name
        self.why = why


def load_image(source: Path | bytes, name: str = "") -> Tensor:
    """Decode one image file.

    =====================================  ================================================================
    in the file                            what comes of it
    =====================================  ================================================================
    EXIF orientation                       turned upright; width and height are those of the upright picture
    transparency (alpha, palette, colour)  laid on white
    palette, CMYK, 1 bit, grey             RGB
    grey of 16 bits                        scaled to 8 bits: 65535 is white
    colours of 16 bits                     their upper 8 bits
    an animation, several pages            the first frame
    floats, integers beyond 16 bits        refused: the file does not say which value is white
    a truncated or damaged picture         refused, also where some of it could be shown
    more than `MAX_PIXELS` pixels          refused before anything is decoded
    PostScript                             refused: it is a program
    =====================================  ================================================================

    At its peak it takes twice to three times the memory of what it returns.

    Args:
        source: the path of a file of any format that Pillow reads, or what is in one.
        name: what messages call it; its path by default.

    Returns:
        (3, H, W) uint8, RGB.

    Raises:
        BadImage: no such file, empty, not an image, or one of those that are refused.
    """
    file: Path | BinaryIO = BytesIO(source) if isinstance(source, bytes) else source
    called = name or ("bytes" if isinstance(source, bytes) else source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns at half its limit, and about odd EXIF; the limit is ours
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImage(called, _too_large(image.width, image.height))
                ImageOps.exif_transpose(image, in_place=True)
                return _pixels(_to_rgb(image))
    except BadImage:
        raise
    except FileNotFoundError:
        raise BadImage(called, "no such file") from None
    except UnidentifiedImageError:
        raise BadImage(called, _unidentified(source)) from None
    except Image.DecompressionBombError:
        raise BadImage(called, _too_large()) from None
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them into
        raise BadImage(called, f"cannot be decoded ({error})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB of the current frame; `image` may be of any Pillow mode."""
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if image.mode == "I" and not 0 <= grey.min() <= grey.max() <= 65535:  # 32 bits, but some are of 16-bit files
            raise ValueError("its pixels are integers of more than 16 bits")
        # Pillow would clip 16-bit grey at 255, which turns most of such pictures white.
        return Image.fromarray((grey // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating point numbers")
    if image.has_transparency_data:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        paper = Image.new("RGB", image.size, "white")
        paper.paste(layer, mask=layer.getchannel("A"))
        return paper
    return image if image.mode == "RGB" else image.convert("RGB")


def _pixels(image: Image.Image) -> Tensor:
    """(3, H, W) uint8 of an RGB image; strip by strip, for Pillow hands out copies."""
    pixels = torch.empty(3, image.height, image.width, dtype=torch.uint8)
    for top in range(0, image.height, STRIP):
        strip = image.crop((0, top, image.width, min(top + STRIP, image.height)))
        pixels[:, top : top + STRIP] = torch.from_numpy(np.array(strip)).permute(2, 0, 1)
    return pixels


def _unidentified(source: Path | bytes) -> str:
    head = (source if isinstance(source, bytes) else source.read_bytes())[:256].lstrip().lower()
    if not head:
        return "the file is empty"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "expected an image, found an HTML or XML page (a failed download?)"
    return "not an image of a known format"


def _too_large(width: int = 0, height: int = 0) -> str:
    found = f"found {width} x {height}" if width else "found more"
    return f"expected at most {MAX_PIXELS // 10**6} megapixels, {found}"
