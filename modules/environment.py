"""What happens when the policy stops writing: it is shown a crop, told why not, or is done.

Pure decisions on text and numbers (arXiv 2505.16192, the interactive loop). The engine and the replay of written
rationales both ask here, so that warm-up, R-GRPO and evaluation know one environment.
"""

from __future__ import annotations

from dataclasses import dataclass

from modules.functional import grammar
from modules.functional.boxes import BoxSpace, Fault, check, clip, to_original
from modules.functional.grammar import RequestFault
from modules.trajectory import Region, Sample, Visual

# What the environment writes where a crop would stand. The policy reads it and may try again.
REFUSALS: dict[str, str] = {
    RequestFault.JSON: " [The box is not valid JSON.] ",
    RequestFault.ARITY: " [A box has four numbers.] ",
    RequestFault.NUMBER: " [A box has four finite numbers.] ",
    RequestFault.IMAGE: " [There is no such image.] ",
    RequestFault.ZOOM: f" [A zoom is a number from {grammar.LEAST_ZOOM:g} to {grammar.MOST_ZOOM:g}.] ",
    Fault.ORDER: " [x2 must be greater than x1, and y2 greater than y1.] ",
    Fault.OUTSIDE: " [The box lies outside the image.] ",
    Fault.SMALL: " [The box is smaller than a pixel.] ",
    Fault.NOT_FINITE: " [A box has four finite numbers.] ",
    "zoom_fixed": " [The zoom cannot be chosen.] ",
    "context": " [There is no room for another crop.] ",
}
OF_ZOOM = frozenset({RequestFault.ZOOM, "zoom_fixed"})  # not for policies that have no word for a zoom


@dataclass(frozen=True)
class Look:
    """The policy asked for a valid region: show it."""

    region: Region


@dataclass(frozen=True)
class Refuse:
    """The policy asked for a box that cannot be shown; ``fault`` is a key of `REFUSALS`."""

    fault: str


@dataclass(frozen=True)
class Done:
    """The policy answered."""

    answer: str


def respond(
    text: str, sample: Sample, visuals: tuple[Visual, ...], space: BoxSpace, zooms: bool = True
) -> Look | Refuse | Done | None:
    """The environment's answer to a turn.

    Args:
        text: everything that the policy wrote in this turn so far.
        sample: the question; a box means its only image unless it names another.
        visuals: what the policy saw of ``sample.images``, one each, in their order.
        space: the space that the policy writes boxes in.
        zooms: whether the policy may choose how much a crop is enlarged; crops of one size for all cannot obey.

    Returns:
        None while the turn goes on.
    """
    parsed = grammar.parse_turn(text)
    if parsed is None:
        return None
    if isinstance(parsed, grammar.Answer):
        return Done(parsed.text)
    if isinstance(parsed, grammar.BadRequest):
        return Refuse(parsed.reason)
    if not 0 <= parsed.image < len(sample.images):
        return Refuse(RequestFault.IMAGE)
    height, width = sample.images[parsed.image].shape[-2:]
    resized = visuals[parsed.image].pixels.shape[-2:]
    box = to_original(parsed.coords, space, (height, width), (resized[0], resized[1]))
    # What the policy writes may round to one pixel of what it sees beyond the border; more is a wrong box.
    tolerance = max(height / resized[0], width / resized[1], 1.0)
    fault = check(box, (height, width), tolerance)
    if fault is not None:
        return Refuse(fault)
    if parsed.zoom is not None and not zooms:
        return Refuse("zoom_fixed")
    return Look(Region(clip(box, (height, width)), parsed.image, parsed.zoom))
