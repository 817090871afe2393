"""Boxes as expectations under the policy, differentiable in its logits.

Conventions:

- A box is written with tokens. Some of them decide a number: a coordinate token, or one that holds digits. A coordinate
  is the sum of what these tokens add to it, so that its expectation, each token's taken with all tokens before it as
  they were written, is the sum of theirs: `expectation`, added up by `teacher_forced_expectation`.
- ``choices`` are the ids that could have stood in a token's place, ``values`` what each of them adds.
- As everywhere, a box is (x1, y1, x2, y2) and a size (height, width).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from modules.functional.boxes import giou
from modules.functional.checks import check_tensor
from modules.trajectory import Box

_NUMBER = r"(-?[0-9]+(?:\.[0-9]+)?)"  # a plain one: no exponent
_BOX = re.compile(r"bbox_2d[\"']?\s*:\s*\[\s*" + r"\s*,\s*".join([_NUMBER] * 4) + r"\s*\]")
_DIGIT = re.compile("[0-9]")

Shapes = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class WrittenBox:
    """Where the numbers of a box stand, and what else could have been written there; n tokens, K choices."""

    coords: Box  # as written
    positions: Tensor  # (n,) long, of the tokens
    axes: Tensor  # (n,) long, the coordinate that each adds to: 0 x1, 1 y1, 2 x2, 3 y2
    choices: Tensor  # (n, K) long ids, -1 where a token has fewer
    values: Tensor  # (n, K) float32 in the units of `coords`


def bin_box(ids: Tensor, bins: Tensor, bin_size: float) -> WrittenBox | None:
    """The last box of a turn whose coordinates are tokens of their own.

    Args:
        ids: (n,) long, of the turn.
        bins: (F, K) long, families of coordinate tokens, each in the order of its values 0, bin_size, 2 bin_size, …
        bin_size: distance of two coordinates.

    Returns:
        A token's choices are its family; None with fewer than four coordinate tokens.
    """
    check_tensor("ids", ids, ("n",), "long")
    check_tensor("bins", bins, ("F", "K"), "long")
    positions = torch.isin(ids, bins).nonzero()[-4:, 0]
    if len(positions) < 4:
        return None
    _, family, index = (ids[positions, None, None] == bins).nonzero().T
    x1, y1, x2, y2 = (index * bin_size).tolist()
    values = torch.arange(bins.shape[1], dtype=torch.float32) * bin_size
    return WrittenBox((x1, y1, x2, y2), positions, torch.arange(4), bins[family], values.expand(4, -1))


def digit_shapes(texts: Sequence[str], usable: Sequence[bool]) -> Shapes:
    """The tokens with digits by shape, which is their text with 0 for each digit: ``"42, "`` is a ``"00, "``.

    Args:
        texts: of all ids.
        usable: which of them can be sampled.

    Returns:
        For each shape with d digits: ids (K,) long, and their digits (K, d) float32.
    """
    found: dict[str, list[tuple[int, list[int]]]] = defaultdict(list)
    for k, (text, sampled) in enumerate(zip(texts, usable, strict=True)):
        if sampled and _DIGIT.search(text):
            found[_DIGIT.sub("0", text)].append((k, [int(digit) for digit in _DIGIT.findall(text)]))
    return {
        shape: (torch.tensor([k for k, _ in tokens]), torch.tensor([d for _, d in tokens], dtype=torch.float32))
        for shape, tokens in found.items()
    }


def digit_box(ids: Tensor, texts: Sequence[str], shapes: Shapes) -> WrittenBox | None:
    """The last box of a turn whose coordinates are strings of digits.

    A token with digits could have held other ones: its choices have its shape, and each adds its digits times their
    places. How many digits a number has, its point and its sign stay as they are written.

    Args:
        ids: (n,) long, of the turn.
        texts: of all ids.
        shapes: of the same vocabulary, by `digit_shapes`.

    Returns:
        None without four plain numbers (JSON's ``1e2`` is none), or if a token holds digits of two of them.
    """
    check_tensor("ids", ids, ("n",), "long")
    pieces = [texts[k] for k in ids.tolist()]
    starts = list(accumulate(map(len, pieces), initial=0))
    box = None
    for match in _BOX.finditer("".join(pieces)):
        box = match
    if box is None:
        return None
    tokens: list[tuple[int, int, Tensor, Tensor]] = []
    for axis in range(4):
        first, stop = box.span(axis + 1)
        places = _places(box[axis + 1])
        for position in range(bisect_right(starts, first) - 1, len(pieces)):
            if starts[position] >= stop:
                break
            at = [starts[position] + digit.start() - first for digit in _DIGIT.finditer(pieces[position])]
            if not at:
                continue
            shape = _DIGIT.sub("0", pieces[position])
            if shape not in shapes or min(at) < 0 or max(at) >= stop - first:
                return None
            choices, digits = shapes[shape]
            tokens.append((position, axis, choices, digits @ torch.tensor([places[k] for k in at])))
    x1, y1, x2, y2 = map(float, box.groups())
    return WrittenBox(
        (x1, y1, x2, y2),
        torch.tensor([position for position, *_ in tokens]),
        torch.tensor([axis for _, axis, *_ in tokens]),
        pad([choices for *_, choices, _ in tokens], -1),
        pad([values for *_, values in tokens], 0),
    )


def _places(number: str) -> list[float]:
    """What a one is worth in each place of a plain number; 0 at its sign and point."""
    sign = -1.0 if number.startswith("-") else 1.0
    point = number.find(".") if "." in number else len(number)
    powers = [point - k - 1 if k < point else point - k for k in range(len(number))]
    return [sign * 10.0**p if c.isdigit() else 0.0 for c, p in zip(number, powers, strict=True)]


def pad(rows: Sequence[Tensor], value: float) -> Tensor:
    """(n, K) of n rows (k,) or blocks (m, k) with K the widest, filled up with ``value``."""
    width = max(row.shape[-1] for row in rows)
    blocks = [row if row.ndim == 2 else row[None] for row in rows]
    return torch.cat([torch.nn.functional.pad(block, (0, width - block.shape[-1]), value=value) for block in blocks])


def expectation(logits: Tensor, choices: Tensor, values: Tensor, temperature: float = 1.0) -> Tensor:
    """What each token is expected to add: ``sum_k softmax(logits[choices] / temperature)_k values_k``.

    Args:
        logits: (n, V) float.
        choices: (n, K) long, -1 where there are fewer; the softmax is over the others.
        values: (n, K) float.
        temperature: of the distribution.

    Returns:
        (n,), in float32 or, if the logits are wider, in their type.
    """
    check_tensor("logits", logits, ("n", "V"), "float")
    check_tensor("choices", choices, (logits.shape[0], "K"), "long")
    check_tensor("values", values, tuple(choices.shape), "float")
    scaled = logits.gather(1, choices.clamp(min=0))
    scaled = scaled.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    probabilities = scaled.masked_fill(choices < 0, -torch.inf).softmax(-1)
    return (probabilities * values).sum(-1)


def teacher_forced_expectation(added: Tensor, owners: Tensor, axes: Tensor, boxes: int) -> Tensor:
    """(N, 4) coordinates as the sums of what their tokens are expected to add, given the tokens written before each.

    With one coordinate token a number it is the mean of that coordinate. With digits it is not: once a leading digit
    is written, the others are expected as if it stood, and the length stays.

    Args:
        added: (n,) float, `expectation` of each token.
        owners: (n,) long, the box that it belongs to.
        axes: (n,) long, the coordinate of that box.
        boxes: N.
    """
    return added.new_zeros(boxes * 4).index_add(0, owners * 4 + axes, added).view(boxes, 4)


def fit_boxes(boxes: Tensor, sizes: Tensor, least: float = 1.0) -> tuple[Tensor, Tensor]:
    """Boxes that can be cropped: coordinates moved into the image, a side below ``least`` widened about its middle.

    A coordinate that was moved has no gradient, for beyond the border the crop does not change. A side that was
    widened, also one whose ends are the wrong way round, has the gradient of its middle.

    Args:
        boxes: (N, 4) float in original pixels.
        sizes: (N, 2) of their images, which are not smaller than ``least``.
        least: shortest side, pixels.

    Returns:
        boxes (N, 4), and (N,) bool, which of them were changed.
    """
    check_tensor("boxes", boxes, ("N", 4), "float")
    check_tensor("sizes", sizes, (len(boxes), 2), "float")
    zero, limits = torch.zeros_like(sizes), sizes.flip(1)
    low, high = boxes[:, :2].clamp(zero, limits), boxes[:, 2:].clamp(zero, limits)
    middle = ((low + high) / 2).clamp(zero + least / 2, limits - least / 2)
    thin = high - low < least
    fitted = torch.cat([torch.where(thin, middle - least / 2, low), torch.where(thin, middle + least / 2, high)], 1)
    return fitted, (fitted.detach() != boxes.detach()).any(1)


def box_distance(a: Tensor, b: Tensor, sizes: Tensor) -> Tensor:
    """(N,) mean absolute difference of the four coordinates, x as a share of the image's width, y of its height.

    Args:
        a: (N, 4) float in original pixels.
        b: likewise.
        sizes: (N, 2) of their images.
    """
    return ((a - b).abs() / sizes.flip(1).repeat(1, 2)).mean(1)


def box_losses(boxes: Tensor, targets: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The two losses of boxes (N, 4) against targets (N, 4), (N,) each: `box_distance`, and 1 - GIoU, as in DETR
    (arXiv 2005.12872; its L1 is a sum over the coordinates, this one their mean)."""
    return box_distance(boxes, targets, sizes), 1 - giou(boxes, targets)
