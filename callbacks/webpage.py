"""A trajectory as one web page that needs nothing else: what was asked, where it looked, what it wrote.

Everything that a model, a file or a user wrote is escaped, and the page may load nothing and run nothing.
"""

from __future__ import annotations

import base64
import html
import io
import unicodedata

from PIL import Image
from torch import Tensor

from callbacks.drawing import BOX_TEXT, CHOSEN, ENDED, GOOD, Look, looks
from callbacks.layout import Colour
from modules.trajectory import Trajectory, Turn

LARGEST = 1600  # pixels of the longer side of an image on the page
TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # Bidi_Control
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; margin: 0 auto; max-width: 1240px; padding: 24px; }
h1 { font-size: 22px; margin: 0 0 4px; } .muted { color: #6e7781; font-size: 14px; }
.columns { display: flex; gap: 28px; align-items: flex-start; flex-wrap: wrap; margin: 18px 0; }
.images { flex: 1 1 460px; position: sticky; top: 16px; } .images svg { width: 100%; height: auto; display: block; }
.told { flex: 1 1 460px; min-width: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.told .box { font-family: ui-monospace, monospace; font-size: 14px; font-weight: 600; }
figure { margin: 10px 0; } figure img { display: block; border: 3px solid; max-width: 100%; box-sizing: border-box; }
figcaption { font-size: 14px; } .small { image-rendering: pixelated; min-width: 160px; }
.refused { color: #cf222e; } dl { display: flex; flex-wrap: wrap; gap: 8px 40px; margin: 14px 0 0; }
dt { color: #6e7781; font-size: 14px; } dd { margin: 0; font-size: 19px; overflow-wrap: anywhere; }
"""


def trajectory_page(trajectory: Trajectory, confidence: float | None) -> str:
    """The page.

    Args:
        trajectory: of one question.
        confidence: the probability of the answer's tokens; None: there is no answer.

    Returns:
        HTML, images included.
    """
    sample = trajectory.sample
    panels = looks(trajectory)
    facts = [
        ("answer", "none" if trajectory.answer is None else trajectory.answer),
        ("probability of the answer's tokens", "none" if confidence is None else f"{confidence:.3f}"),
        ("ended", ENDED[trajectory.stop]),
        ("tokens written", str(int(trajectory.sampled.sum()))),
    ]
    if sample.answers:
        facts.insert(1, ("right answer", " | ".join(sample.answers)))
    options = "".join(f"<div>{chr(65 + k)}. {escaped(choice)}</div>" for k, choice in enumerate(sample.choices))
    images = "".join(_image(trajectory, panels, index) for index in range(len(sample.images)))
    cells = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in facts)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>{escaped(sample.id)}</title>'
        f"<style>{STYLE}</style></head><body>"
        f'<h1>{escaped(sample.question)}</h1>{options}<div class="muted">{escaped(sample.id)}</div>'
        f'<dl>{cells}</dl><div class="columns"><div class="images">{images}</div>'
        f'<div class="told">{_told(trajectory, panels)}</div></div></body></html>\n'
    )


def escaped(text: str) -> str:
    """Text for HTML, in an attribute too."""
    return html.escape(printable(text))


def printable(text: str) -> str:
    """Text without what would steer a terminal or a page, or cannot be written: control characters but line ends and
    tabs, marks that turn the direction of writing, and halves of surrogate pairs are spelt out."""
    return "".join(
        ascii(c)[1:-1] if c in TURNING or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") else c
        for c in text
    )


def _image(trajectory: Trajectory, panels: list[Look], index: int) -> str:
    """One image of the question with the boxes on it, in original pixels."""
    pixels = trajectory.sample.images[index]
    height, width = pixels.shape[1:]
    line = max(height, width) / 200
    marks = [
        _mark(look.turn.region.box, _css(look.colour), str(look.number), line)
        for look in panels
        if look.number is not None and look.turn.region is not None and look.turn.region.image == index
    ]
    annotated = [
        f'<rect {_corners(region.box)} fill="none" stroke="{_css(GOOD)}" stroke-width="{line / 2:g}" '
        f'stroke-dasharray="{2 * line:g}"/>'
        for region in trajectory.sample.regions
        if region.image == index
    ]
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img"><image width="{width}" height="{height}" '
        f'href="{_jpeg(pixels)}"/>{"".join(annotated)}{"".join(marks)}</svg>'
    )


def _mark(box: tuple[float, float, float, float], colour: str, number: str, line: float) -> str:
    x1, y1, _, _ = box
    size = 9 * line
    top = max(y1 - size, 0)
    return (
        f'<rect {_corners(box)} fill="none" stroke="{colour}" stroke-width="{line:g}"/>'
        f'<rect x="{x1:g}" y="{top:g}" width="{size:g}" height="{size:g}" fill="{colour}"/>'
        f'<text x="{x1 + size / 2:g}" y="{top + size * 0.75:g}" font-size="{size * 0.75:g}" fill="#fff" '
        f'text-anchor="middle" font-family="sans-serif">{number}</text>'
    )


def _corners(box: tuple[float, float, float, float]) -> str:
    x1, y1, x2, y2 = box
    return f'x="{x1:g}" y="{y1:g}" width="{x2 - x1:g}" height="{y2 - y1:g}"'


def _told(trajectory: Trajectory, panels: list[Look]) -> str:
    """What was written, each crop where it was shown."""
    by_turn = {id(look.turn): look for look in panels}
    parts = []
    for turn in trajectory.turns:
        look = by_turn.get(id(turn))
        start = 0
        for match in BOX_TEXT.finditer(turn.text):
            colour = _css(look.colour) if look else "inherit"
            parts.append(escaped(turn.text[start : match.start()]))
            parts.append(f'<span class="box" style="color:{colour}">{escaped(match.group())}</span>')
            start = match.end()
        parts.append(escaped(turn.text[start:]))
        parts.append(_shown(turn, look))
    return "".join(parts)


def _shown(turn: Turn, look: Look | None) -> str:
    """What the environment gave back."""
    if turn.fault is not None:
        return f'<div class="refused">refused: {escaped(turn.fault)}</div>'
    if look is None or turn.region is None:
        return ""
    x1, y1, x2, y2 = turn.region.box
    place = f"crop {look.number}: {x2 - x1:.0f} x {y2 - y1:.0f} pixels at {x1:.0f}, {y1:.0f}"
    if turn.crop is None:
        return f'<div class="refused">{place}, not shown</div>'
    pixels = turn.crop.pixels.detach().float().clamp(0, 1).mul(255).round().byte().cpu()
    kind = ' class="small"' if pixels.shape[2] < 100 else ""
    colour = _css(CHOSEN[((look.number or 1) - 1) % len(CHOSEN)])
    return (
        f'<figure><img{kind} alt="{place}" style="border-color:{colour}" src="{_png(pixels)}">'
        f'<figcaption style="color:{colour}">{place}</figcaption></figure>'
    )


def _css(colour: Colour) -> str:
    return f"rgb{colour}"


def _png(pixels: Tensor) -> str:
    """(3, H, W) uint8 as a data URI, exactly."""
    return _uri(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), "PNG")


def _jpeg(pixels: Tensor) -> str:
    """(3, H, W) uint8 as a data URI, small enough for a page."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
    picture.thumbnail((LARGEST, LARGEST))
    return _uri(picture, "JPEG")


def _uri(picture: Image.Image, form: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, form, quality=90)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
