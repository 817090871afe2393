"""Plain page layout on PIL images: wrapped coloured text, stacks, grids, framed panels.

Every block is an RGB image on `PAPER`; pages are made by pasting blocks. Text is set in the scalable font
that comes with PIL, so that pictures look the same on every machine; it has little beyond ASCII.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Run = tuple[str, Colour]  # a piece of text in one colour
Line = list[tuple[float, str, Colour]]  # x, word, colour

PAPER: Colour = (255, 255, 255)
PANEL: Colour = (246, 248, 250)
RULE: Colour = (216, 222, 228)
INK: Colour = (31, 35, 40)
MUTED: Colour = (110, 119, 129)

MARGIN, GAP = 20, 14
MAX_ENLARGE = 8.0  # beyond this a small image is only more blurred
REPLACED = {0x9: "    ", 0xD: None, 0xD7: "x", 0xF7: "/", 0x2013: "-", 0x2014: "-", 0x2192: "->", 0x2212: "-"}


def paragraph(
    runs: Sequence[Run], width: int, size: int, background: Colour = PAPER, max_lines: int | None = None
) -> Image.Image:
    """Text wrapped to ``width``; of more than ``max_lines`` lines, some in the middle are left out."""
    lines = _wrapped(runs, width, size)
    if max_lines is not None and len(lines) > max_lines:
        head = (max_lines - 1) * 2 // 3
        tail = max_lines - 1 - head
        note = f"… {len(lines) - head - tail} lines left out …"
        lines = [*lines[:head], [(0.0, note, MUTED)], *(lines[-tail:] if tail else [])]
    height = round(size * 1.4)
    picture = Image.new("RGB", (width, max(1, len(lines)) * height), background)
    draw = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        for x, word, colour in line:
            draw.text((x, row * height + size), word, font=font(size), fill=colour, anchor="ls")
    return picture


def _wrapped(runs: Sequence[Run], width: int, size: int) -> list[Line]:
    lines: list[Line] = [[]]
    x = 0.0
    for text, colour in runs:
        for word in re.findall(r"\n|[^\S\n]+|\S+", _drawable(text)):
            if word == "\n":
                lines.append([])
                x = 0.0
                continue
            for piece in _pieces(word, width, size):
                length = font(size).getlength(piece)
                if x > 0 and x + length > width:
                    lines.append([])
                    x = 0.0
                if x > 0 or not piece.isspace():
                    lines[-1].append((x, piece, colour))
                    x += length
    while len(lines) > 1 and not lines[-1]:
        lines.pop()
    return lines


def _pieces(word: str, width: int, size: int) -> list[str]:
    """The word, cut where it is wider than a line."""
    if font(size).getlength(word) <= width:
        return [word]
    pieces = [""]
    for letter in word:
        if pieces[-1] and font(size).getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _drawable(text: str) -> str:
    """The text in characters that the font has: accents are dropped, what is left over becomes a question mark."""
    text = text.translate(REPLACED)
    if text.isascii():
        return text
    return "".join(c if _has_glyph(c) else _without_accent(c) or "?" for c in text)


def _without_accent(letter: str) -> str:
    return unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()


@cache
def _has_glyph(letter: str) -> bool:
    """A font draws all characters that it lacks alike; U+FFFF is never a character."""
    drawn, missing = font(16).getmask(letter), font(16).getmask("\uffff")
    return letter.isascii() or (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))


def shortened(text: str, length: int) -> str:
    """The text in one line of at most ``length`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """PIL's own scalable font.

    Raises:
        RuntimeError: if PIL was built without FreeType and only has a bitmap font.
    """
    loaded = ImageFont.load_default(size=size)
    if not isinstance(loaded, ImageFont.FreeTypeFont):
        raise RuntimeError("Expected pillow with FreeType support but it has none: install a wheel of pillow")
    return loaded


def fitted(width: int, height: int, limit: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the same shape within ``limit``, enlarged `MAX_ENLARGE` times at most."""
    scale = min(limit[0] / width, limit[1] / height, MAX_ENLARGE)
    return max(4, round(width * scale)), max(4, round(height * scale))


def resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Pixels of tiny images stay visible as such; others are interpolated."""
    tiny = size[0] >= 4 * picture.width
    return picture.resize(size, Image.Resampling.NEAREST if tiny else Image.Resampling.BICUBIC)


def stack(blocks: Sequence[Image.Image], width: int, gap: int = GAP) -> Image.Image:
    """Blocks under each other."""
    picture = Image.new("RGB", (width, sum(b.height for b in blocks) + gap * (len(blocks) - 1)), PAPER)
    y = 0
    for block in blocks:
        picture.paste(block, (0, y))
        y += block.height + gap
    return picture


def beside(left: Image.Image, right: Image.Image, gap: int) -> Image.Image:
    """Two blocks side by side, aligned at the top."""
    picture = Image.new("RGB", (left.width + gap + right.width, max(left.height, right.height)), PAPER)
    picture.paste(left, (0, 0))
    picture.paste(right, (left.width + gap, 0))
    return picture


def grid(blocks: Sequence[Image.Image], columns: int, cell: int) -> Image.Image:
    """Blocks of at most ``cell`` pixels' width, row after row."""
    rows = [blocks[k : k + columns] for k in range(0, len(blocks), columns)]
    width = columns * cell + (columns - 1) * GAP
    pictures = []
    for row in rows:
        picture = Image.new("RGB", (width, max(b.height for b in row)), PAPER)
        for column, block in enumerate(row):
            picture.paste(block, (column * (cell + GAP), 0))
        pictures.append(picture)
    return stack(pictures, width)


def boxed(block: Image.Image, width: int, edge: Colour = RULE) -> Image.Image:
    """A block of ``width`` - 24 pixels' width on a framed panel of ``width``."""
    picture = Image.new("RGB", (width, block.height + 20), PANEL)
    ImageDraw.Draw(picture).rectangle((0, 0, width - 1, picture.height - 1), outline=edge)
    picture.paste(block, (12, 10))
    return picture


def cells(items: Sequence[tuple[str, str, Colour]], width: int) -> Image.Image:
    """Small titles with values under them, as many a row as fit."""
    cells = []
    for title, value, colour in items:
        value = shortened(_drawable(value), 44)
        wide = min(width, 24 + int(max(font(17).getlength(value), font(12).getlength(title))))
        cells.append(stack([paragraph([(title, MUTED)], wide, 12), paragraph([(value, colour)], wide, 17)], wide, 0))
    rows: list[list[Image.Image]] = [[]]
    for cell in cells:
        if rows[-1] and sum(c.width for c in rows[-1]) + cell.width > width:
            rows.append([])
        rows[-1].append(cell)
    pictures = []
    for row in rows:
        picture = Image.new("RGB", (width, max(c.height for c in row)), PAPER)
        x = 0
        for cell in row:
            picture.paste(cell, (x, 0))
            x += cell.width
        pictures.append(picture)
    return stack(pictures, width, 6)


def page(blocks: Sequence[Image.Image], width: int) -> Image.Image:
    """Blocks under each other with a margin around."""
    body = stack(blocks, width - 2 * MARGIN)
    page = Image.new("RGB", (width, body.height + 2 * MARGIN), PAPER)
    page.paste(body, (MARGIN, MARGIN))
    return page
