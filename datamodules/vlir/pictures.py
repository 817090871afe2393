"""Samples as pictures: the image with its numbered boxes, and the crops."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from io import BytesIO

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from datamodules.vlir.statistics import Entry
from modules.crop import CropAndScale

COLOURS = ("#0969da", "#e66100", "#8250df", "#bf3989", "#008c95", "#9a6700")  # of box k, then from the first again
SIDE = 560  # longest side of a drawn image
CROP = CropAndScale(grid=1, min_pixels=48 * 48, max_pixels=240 * 240)


def colour(k: int) -> str:
    """Of the k-th box, from 0."""
    return COLOURS[k % len(COLOURS)]


@dataclass(frozen=True, eq=False)
class Drawn:
    """What is shown of a sample."""

    images: tuple[Image.Image, ...]  # without boxes, no longer than `SIDE`
    crops: tuple[Image.Image, ...]  # one a look


def draw(entry: Entry) -> Drawn:
    """Decode the images of a sample and cut its crops.

    Raises:
        BadImage: one of them cannot be decoded.
    """
    pixels = [image.load() for image in entry.images]
    shown = tuple(_fitted(_to_image(image), SIDE) for image in pixels)
    crops = []
    for region in entry.regions:
        cut = CROP([pixels[region.image]], torch.tensor([region.box], dtype=torch.float64))[0]
        crops.append(_to_image((cut * 255).round().clamp(0, 255).byte()))
    return Drawn(shown, tuple(crops))


def page(entry: Entry, drawn: Drawn) -> Image.Image:
    """One picture of a sample: its images with boxes, the crops under them."""
    framed = [_framed(entry, k, image) for k, image in enumerate(drawn.images)]
    crops = [_badge(image, k) for k, image in enumerate(drawn.crops)]
    rows = [row for row in (framed, crops) if row]
    width = max(sum(image.width + 8 for image in row) for row in rows)
    sheet = Image.new("RGB", (width, sum(max(image.height for image in row) + 8 for row in rows)), "white")
    top = 0
    for row in rows:
        left = 0
        for image in row:
            sheet.paste(image, (left, top))
            left += image.width + 8
        top += max(image.height for image in row) + 8
    return sheet


def data_url(image: Image.Image) -> str:
    """An image as part of a page."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _to_image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _fitted(image: Image.Image, side: int) -> Image.Image:
    fitted = image.copy()
    fitted.thumbnail((side, side), Image.Resampling.LANCZOS)
    return fitted


def _framed(entry: Entry, number: int, image: Image.Image) -> Image.Image:
    framed = image.copy()
    pen = ImageDraw.Draw(framed)
    height, width = entry.sizes[number]
    for k, region in enumerate(entry.regions):
        if region.image == number:
            x1, y1, x2, y2 = region.box
            sx, sy = image.width / width, image.height / height
            pen.rectangle((x1 * sx, y1 * sy, max(x2 * sx, x1 * sx), max(y2 * sy, y1 * sy)), outline=colour(k), width=3)
    return framed


def _badge(image: Image.Image, k: int) -> Image.Image:
    badged = image.copy()
    pen = ImageDraw.Draw(badged)
    pen.rectangle((0, 0, image.width - 1, image.height - 1), outline=colour(k), width=3)
    pen.rectangle((0, 0, 18, 18), fill=colour(k))
    pen.text((5, 2), str(k + 1), fill="white", font=ImageFont.load_default(14))
    return badged
