"""Pictures of what a policy did: the question, where it looked, what it was shown, what it got for it.

Pure functions from the types of `modules.trajectory` to PIL images. On a drawn image, a solid numbered
frame is a box that the policy chose (number and colour are those of the crop beside it and of the box in
the text) and a dashed green frame is an annotated region.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw
from torch import Tensor

from callbacks.layout import (
    GAP,
    INK,
    MARGIN,
    MUTED,
    PANEL,
    PAPER,
    Colour,
    Run,
    beside,
    boxed,
    cells,
    fitted,
    font,
    grid,
    page,
    paragraph,
    resized,
    shortened,
    stack,
)
from modules.trajectory import Box, Group, Sample, StopReason, Trajectory, Turn

GOOD: Colour = (26, 127, 55)
BAD: Colour = (207, 34, 46)
ANNOTATED: Colour = (46, 204, 64)
CHOSEN: tuple[Colour, ...] = (  # the k-th box has colour k, then from the first again
    (9, 105, 218),
    (230, 97, 0),
    (130, 80, 223),
    (191, 57, 137),
    (0, 140, 149),
    (154, 103, 0),
)

FRAME = 3  # thickness of a chosen box, pixels of the drawing
BADGE = 20  # height of its number
MAX_LINES = 40  # of a long text, the beginning and the end are shown
BOX_TEXT = re.compile(r"\{[^{}]*bbox_2d[^{}]*\}?")
TAG_TEXT = re.compile(r"(</?(?:think|answer)>)")
ENDED = {
    StopReason.ANSWER: "with an answer",
    StopReason.EOS: "by itself, unanswered",
    StopReason.TURN_LENGTH: "cut: turn too long",
    StopReason.MAX_TURNS: "cut: too many turns",
    StopReason.CONTEXT: "cut: context full",
}


@dataclass(frozen=True)
class Look:
    """One request for a region, as it is drawn."""

    number: int | None  # 1, 2, ... over the valid requests; None where the box was refused
    turn: Turn

    @property
    def colour(self) -> Colour:
        """Of the frame, the crop's border and the box in the text."""
        return BAD if self.number is None else _chosen(self.number)


def looks(trajectory: Trajectory) -> list[Look]:
    """The regions that were asked for, in order; the valid ones numbered from 1."""
    found: list[Look] = []
    number = 0
    for turn in trajectory.turns:
        if turn.region is not None:
            number += 1
            found.append(Look(number, turn))
        elif turn.fault is not None:
            found.append(Look(None, turn))
    return found


def member_rewards(group: Group, index: int) -> dict[str, float]:
    """What each component gave to one trajectory of a group."""
    return {name: float(values[index]) for name, values in group.rewards.items()}


def draw_trajectory(
    trajectory: Trajectory,
    rewards: dict[str, float],
    *,
    total: float | None = None,
    advantage: float | None = None,
    width: int = 900,
) -> Image.Image:
    """One trajectory on one page.

    Args:
        trajectory: what was rolled out.
        rewards: component -> value, unweighted; NaN is shown as "n/a". "accuracy" colours the answer.
        total: the weighted sum, when there is one.
        advantage: what the group made of it, when there is one.
        width: of the picture in pixels; its height follows from what there is to show.

    Returns:
        An RGB image, ``width`` pixels wide.
    """
    inner = width - 2 * MARGIN
    panels = looks(trajectory)
    text = _text_runs(trajectory)
    blocks = [_question(trajectory.sample, inner)]
    if trajectory.sample.images:
        blocks.append(_figure(trajectory.sample, panels, text, inner))
    if panels or not trajectory.sample.images:  # else the text stands beside the image
        blocks.append(_text_panel(text, inner))
    facts: list[tuple[str, str, Colour]] = [
        ("answer", "none" if trajectory.answer is None else trajectory.answer, _verdict(rewards)),
        ("right answer", " | ".join(trajectory.sample.answers) or "not known", INK),
        ("ended", ENDED[trajectory.stop], BAD if trajectory.stop.truncated else INK),
    ]
    blocks.append(cells(facts, inner))
    scores = [(name, _number(value), INK) for name, value in rewards.items()]
    scores += [("total", _number(total), INK)] if total is not None else []
    scores += [("advantage", f"{advantage:+.2f}", _sign(advantage))] if advantage is not None else []
    if scores:
        blocks.append(cells(scores, inner))
    return page(blocks, width)


def draw_group(group: Group, *, width: int = 1000) -> Image.Image:
    """All trajectories of one question side by side: where each looked, its answer, reward and advantage.

    Args:
        group: G trajectories, shown in their order.
        width: of the picture in pixels.

    Returns:
        An RGB image, ``width`` pixels wide.
    """
    inner = width - 2 * MARGIN
    count = len(group.trajectories)
    columns = count if count <= 4 else math.ceil(count / math.ceil(count / 4))
    cell = min((inner - GAP * (columns - 1)) // columns, 400)
    cards = [_card(group, index, cell) for index in range(count)]
    answers = " | ".join(group.sample.answers) or "not known"
    header = paragraph([("right answer ", MUTED), (answers, INK)], inner, 15)
    return page([_question(group.sample, inner), header, grid(cards, columns, cell)], width)


def draw_boxes(
    image: Tensor,
    size: tuple[int, int],
    chosen: Sequence[tuple[int, Box]] = (),
    annotated: Sequence[Box] = (),
) -> Image.Image:
    """An image at another size, with boxes on it.

    Args:
        image: (3, H, W) uint8.
        size: (width, height) to draw at.
        chosen: (number from 1, box in image pixels), solid frames in ``CHOSEN`` colours.
        annotated: boxes in image pixels, dashed frames in ``ANNOTATED``.

    Returns:
        An RGB image of ``size``. A frame's outer edge is the scaled box, rounded to whole pixels.
    """
    picture = resized(Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()), size)
    draw = ImageDraw.Draw(picture)
    scale = (size[0] / image.shape[2], size[1] / image.shape[1])
    for number, box in chosen:
        x1, y1, x2, y2 = _scaled(box, scale, size)
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=PAPER)  # tells the frame from any background
        draw.rectangle((x1, y1, x2, y2), outline=_chosen(number), width=FRAME)
    for box in annotated:  # after the frames: a box that was chosen exactly shows both
        _dashes(draw, _scaled(box, scale, size))
    for number, box in chosen:  # after all frames, so that none runs through a number
        x1, y1, _, y2 = _scaled(box, scale, size)
        within = y1 if y2 - y1 > 2 * BADGE else y2 + 1
        _badge(draw, (x1, y1 - BADGE if y1 >= BADGE else within), number)
    return picture


def _chosen(number: int) -> Colour:
    return CHOSEN[(number - 1) % len(CHOSEN)]


def _scaled(box: Box, scale: tuple[float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """First and last pixel (both inclusive, as PIL draws) that a box covers in the drawing; at least 2 by 2."""
    x1 = min(max(round(box[0] * scale[0]), 0), size[0] - 2)
    y1 = min(max(round(box[1] * scale[1]), 0), size[1] - 2)
    x2 = min(max(round(box[2] * scale[0]) - 1, x1 + 1), size[0] - 1)
    y2 = min(max(round(box[3] * scale[1]) - 1, y1 + 1), size[1] - 1)
    return x1, y1, x2, y2


def _dashes(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], dash: int = 8) -> None:
    x1, y1, x2, y2 = box
    for start in range(x1, x2 + 1, 2 * dash):
        for y in (y1, y2 - 1):
            draw.rectangle((start, y, min(start + dash - 1, x2), y + 1), fill=ANNOTATED)
    for start in range(y1, y2 + 1, 2 * dash):
        for x in (x1, x2 - 1):
            draw.rectangle((x, start, x + 1, min(start + dash - 1, y2)), fill=ANNOTATED)


def _badge(draw: ImageDraw.ImageDraw, corner: tuple[int, int], number: int) -> None:
    width = max(BADGE, int(font(14).getlength(str(number))) + 10)
    draw.rectangle((*corner, corner[0] + width - 1, corner[1] + BADGE - 1), fill=_chosen(number))
    draw.text((corner[0] + width / 2, corner[1] + BADGE / 2), str(number), font=font(14), fill=PAPER, anchor="mm")


# --- the figure: images on the left (or above), crops in order beside them ---


def _figure(sample: Sample, panels: list[Look], text: list[Run], width: int) -> Image.Image:
    """A sample's images with the boxes; beside or under them the crops or, without any, the text."""
    height, breadth = sample.images[0].shape[1:]
    if len(sample.images) == 1 and breadth <= 1.8 * height:
        picture = _marked(sample, panels, 0, (int(width * 0.56), 520))
        rest = width - picture.width - 3 * GAP
        right = _crops(panels, rest, picture.height) if panels else _text_panel(text, rest)
        return beside(picture, right, 3 * GAP)
    columns = min(len(sample.images), 3)
    cell = (width - GAP * (columns - 1)) // columns
    pictures = [_marked(sample, panels, index, (cell, 360)) for index in range(len(sample.images))]
    below = _crops(panels, width, 300) if panels else _text_panel(text, width)
    return stack([grid(pictures, columns, cell), below], width)


def _crops(panels: list[Look], width: int, height: int) -> Image.Image:
    """What came back, in order; as large as fits into ``height``; it grows rather than show stamps."""
    for columns in range(1, 5):
        cell = (width - GAP * (columns - 1)) // columns
        block = grid([_panel(look, cell) for look in panels], columns, cell)
        if block.height <= height or cell < 130:
            break
    return block


def _text_panel(text: list[Run], width: int) -> Image.Image:
    return boxed(paragraph(text, width - 24, 14, PANEL, MAX_LINES), width)


def _marked(sample: Sample, panels: list[Look], index: int, limit: tuple[int, int]) -> Image.Image:
    """Image ``index`` of a sample with its boxes, as large as ``limit`` allows."""
    image = sample.images[index]
    asked = [(look.number, look.turn.region) for look in panels]
    chosen = [(number, region.box) for number, region in asked if number and region and region.image == index]
    annotated = [region.box for region in sample.regions if region.image == index]
    return draw_boxes(image, fitted(image.shape[2], image.shape[1], limit), chosen, annotated)


def _panel(look: Look, width: int) -> Image.Image:
    """What came back for one request: the crop in its colour, or why the box was refused."""
    turn = look.turn
    if turn.region is None:
        return boxed(paragraph([("refused: ", BAD), (str(turn.fault), INK)], width - 24, 13, PANEL), width, BAD)
    x1, y1, x2, y2 = turn.region.box
    extent = f"   {x2 - x1:.0f} x {y2 - y1:.0f}" + (f" at {x1:.0f}, {y1:.0f}" if width >= 180 else "")
    extent += "" if turn.region.zoom is None else f"   zoom {turn.region.zoom:g}"
    caption = paragraph([(f"crop {look.number}", look.colour), (extent, MUTED)], width, 13)
    if turn.crop is None:
        return stack([caption, boxed(paragraph([("not shown", MUTED)], width - 24, 13, PANEL), width)], width, 4)
    pixels = turn.crop.pixels.detach().float().clamp(0, 1).mul(255).round().byte().cpu()
    size = fitted(pixels.shape[2], pixels.shape[1], (width - 2 * FRAME, 260))
    crop = resized(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), size)
    framed = Image.new("RGB", (crop.width + 2 * FRAME, crop.height + 2 * FRAME), look.colour)
    framed.paste(crop, (FRAME, FRAME))
    return stack([caption, framed], width, 4)


def _card(group: Group, index: int, width: int) -> Image.Image:
    """One member of a group."""
    trajectory = group.trajectories[index]
    rewards = member_rewards(group, index)
    advantage = float(group.advantages[index])
    blocks = []
    if trajectory.sample.images:
        panels = looks(trajectory)
        shown = panels[0].turn.region.image if panels and panels[0].turn.region else 0
        blocks.append(_marked(trajectory.sample, panels, shown, (width, 300)))
    else:
        blocks.append(boxed(paragraph(_text_runs(trajectory), width - 24, 13, PANEL, 8), width))
    answer = "none" if trajectory.answer is None else trajectory.answer
    blocks.append(paragraph([(f"#{index + 1}  answer ", MUTED), (shortened(answer, 60), _verdict(rewards))], width, 16))
    scores = [(f"reward {_number(float(group.totals[index]))}   ", INK), (f"adv. {advantage:+.2f}", _sign(advantage))]
    blocks.append(paragraph(scores, width, 14))
    detail = "   ".join(f"{name} {_number(value)}" for name, value in rewards.items())
    blocks.append(paragraph([(detail, MUTED)], width, 12))
    return stack(blocks, width, 6)


# --- text ---


def _question(sample: Sample, width: int) -> Image.Image:
    blocks = [paragraph([(sample.question, INK)], width, 19, max_lines=12)]
    if sample.choices:
        options = [(f"{chr(65 + k)}. {choice}    ", INK) for k, choice in enumerate(sample.choices)]
        blocks.append(paragraph(options, width, 15, max_lines=8))
    label = " · ".join(filter(None, (sample.source, sample.id)))
    legend = [("    - - - annotated region", GOOD)] if sample.regions else []
    blocks.append(paragraph([(label, MUTED), *legend], width, 12))
    return stack(blocks, width, 4)


def _text_runs(trajectory: Trajectory) -> list[Run]:
    """The text as written; boxes in their colours, ``[crop k]`` where the environment put crop k."""
    colours = {id(look.turn): look for look in looks(trajectory)}
    runs: list[Run] = []
    for turn in trajectory.turns:
        look = colours.get(id(turn))
        start = 0
        for match in BOX_TEXT.finditer(turn.text):
            runs += _tagged(turn.text[start : match.start()])
            runs.append((match.group(), look.colour if look else INK))
            start = match.end()
        runs += _tagged(turn.text[start:])
        if look and look.number and turn.crop is not None:
            runs.append((f" [crop {look.number}]\n", look.colour))
        elif turn.fault is not None:
            runs.append((f" [refused: {turn.fault}]\n", BAD))
    return runs


def _tagged(text: str) -> list[Run]:
    return [(part, MUTED if TAG_TEXT.fullmatch(part) else INK) for part in TAG_TEXT.split(text) if part]


def _verdict(rewards: dict[str, float]) -> Colour:
    """An answer's colour: right, wrong, or not judged."""
    accuracy = rewards.get("accuracy", math.nan)
    return INK if math.isnan(accuracy) else GOOD if accuracy > 0.5 else BAD


def _number(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value + 0.0:.2f}"  # no minus before a zero


def _sign(value: float) -> Colour:
    return GOOD if value > 0 else BAD if value < 0 else INK
