"""A box that was written, mapped to the original image and written again has the same text, in every box space."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, reject, settings
from hypothesis import strategies as st

from benchmarks.families import build
from modules.backbones.qwen_vl import QwenVLBackbone
from modules.environment import Look, respond
from modules.functional.boxes import SpaceKind
from modules.functional.grammar import format_box
from modules.trajectory import Box, Region, Sample, Visual

SPACES: tuple[SpaceKind, ...] = ("pixels", "resized", "unit", "thousand")
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
LIMITS = (4, 64)  # tokens: 3,136 to 50,176 pixels
Get = Callable[[SpaceKind], QwenVLBackbone]

sides = st.one_of(st.integers(1, 100), st.integers(1, 4000))
shares = st.tuples(*[st.floats(0, 1)] * 4)
# odd sides, portrait and landscape, below and above the limits; a single pixel; longer than the grid's limits allow
sizes = [
    (37, 53),
    (53, 37),
    (301, 403),
    (403, 301),
    (2999, 4001),
    (4001, 2999),
    (1, 1),
    (29, 2900),
    (2900, 29),
    (3, 4000),
]


@pytest.fixture(scope="module")
def get(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """A backbone that speaks a space; made once."""
    folder = str(build("qwen2_5_vl", tmp_path_factory.mktemp("qwen")))
    made = {kind: QwenVLBackbone(folder, LIMITS, box_space=kind) for kind in SPACES}
    return made.__getitem__


def seen(backbone: QwenVLBackbone, height: int, width: int) -> tuple[Sample, tuple[Visual, ...]]:
    """An image of this size and the size that it is seen at, without pixels."""
    resized = backbone.image_scaler.output_size((0.0, 0.0, float(width), float(height)), (height, width))
    image = torch.zeros(1, dtype=torch.uint8).expand(3, height, width)
    return Sample("", "", (image,)), (Visual(torch.zeros(1).expand(3, *resized), 1),)


def extent(backbone: QwenVLBackbone, size: tuple[int, int], visual: Visual) -> tuple[float, float]:
    """(height, width) of the whole image in the backbone's space."""
    of = {"pixels": size, "resized": visual.pixels.shape[-2:], "unit": (1, 1), "thousand": (1000, 1000)}
    height, width = of[backbone.box_space.kind]
    return height, width


@pytest.mark.parametrize("kind", SPACES)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(height=sides, width=sides, share=shares)
def test_text_to_pixels_to_text(kind: SpaceKind, get: Get, height: int, width: int, share: Box) -> None:
    texts = text_again(get(kind), height, width, share)
    if texts is None:
        reject()
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("size", sizes)
@pytest.mark.parametrize("share", [WHOLE, (0.123, 0.4, 0.77, 0.987), (0.009, 0.018, 1.0, 0.999)])
def test_text_to_pixels_to_text_at_known_sizes(kind: SpaceKind, get: Get, size: tuple[int, int], share: Box) -> None:
    texts = text_again(get(kind), *size, share)
    assert (texts is None) == (min(size) == 1 and share != WHOLE)
    assert texts is None or texts[0] == texts[1]


def text_again(backbone: QwenVLBackbone, height: int, width: int, share: Box) -> tuple[str, str] | None:
    """A box as text, and the text that asks for the region which it means; None if it is smaller than a pixel."""
    sample, visuals = seen(backbone, height, width)
    tall, wide = extent(backbone, (height, width), visuals[0])
    step = backbone.bin_size
    x1, x2 = sorted(round(s * wide / step) for s in share[::2])
    y1, y2 = sorted(round(s * tall / step) for s in share[1::2])
    if share != WHOLE and min((x2 - x1) * width / wide, (y2 - y1) * height / tall) * step < 1.001:
        return None
    coords = [float(f"{k * step:.3f}") for k in (x1, y1, x2, y2)]
    text = format_box(coords)
    reply = respond(text, sample, visuals, backbone.box_space)
    assert isinstance(reply, Look), reply
    return text, backbone.detokenize(backbone.write("", reply.region, sample, visuals)[0])


@pytest.mark.parametrize("kind", SPACES)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(height=st.integers(1, 4000), width=st.integers(1, 4000), share=shares)
@example(height=3001, width=4001, share=(0.1, 0.2, 0.3, 0.9))
def test_pixels_to_text_to_pixels_loses_half_a_unit(
    kind: SpaceKind, get: Get, height: int, width: int, share: Box
) -> None:
    backbone = get(kind)
    sample, visuals = seen(backbone, height, width)
    tall, wide = extent(backbone, (height, width), visuals[0])
    unit = (backbone.bin_size * width / wide, backbone.bin_size * height / tall)  # pixels a unit, along x and y
    x1, x2 = sorted(s * width for s in share[::2])
    y1, y2 = sorted(s * height for s in share[1::2])
    assume(x2 - x1 >= 2 * max(unit[0], 1))
    assume(y2 - y1 >= 2 * max(unit[1], 1))
    ids, _ = backbone.write("", Region((x1, y1, x2, y2)), sample, visuals)
    reply = respond(backbone.detokenize(ids), sample, visuals, backbone.box_space)
    assert isinstance(reply, Look), reply
    for k, (before, after) in enumerate(zip((x1, y1, x2, y2), reply.region.box, strict=True)):
        assert abs(before - after) <= unit[k % 2] * 0.501
