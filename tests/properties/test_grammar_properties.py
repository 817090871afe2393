"""Whatever a policy writes: the grammar takes it, and a turn means the same however it arrives."""

from __future__ import annotations

import math

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from modules.crop import CropAndScale
from modules.environment import OF_ZOOM, REFUSALS, Done, Look, Refuse, respond
from modules.functional.boxes import BoxSpace, check
from modules.functional.grammar import (
    Answer,
    BadRequest,
    BoxRequest,
    answer_spans,
    ends_in_one_answer,
    format_box,
    last_answer,
    may_end_turn,
    parse_turn,
    segments_between_boxes,
    well_formed,
)
from modules.trajectory import Sample, Visual
from tests.properties.hostile import quick, texts

finite = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**60), 2**60).map(float)
boxes = st.tuples(finite, finite, finite, finite)
SPACES = [BoxSpace("pixels"), BoxSpace("resized"), BoxSpace("unit"), BoxSpace("thousand")]
sides = st.integers(1, 400) | st.sampled_from([1, 2, 5_000, 70_000, 178_000_000])


@given(texts)
@quick(150)
def test_any_text_has_one_meaning(text: str) -> None:
    meaning = parse_turn(text)
    assert meaning is None or isinstance(meaning, BoxRequest | BadRequest | Answer)
    if isinstance(meaning, BoxRequest):
        assert all(math.isfinite(c) for c in meaning.coords)
        assert parse_turn(format_box(meaning.coords, meaning.image, meaning.zoom)) == meaning
    if isinstance(meaning, Answer):
        assert meaning.text == answer_spans(text)[-1].strip()
        assert last_answer(text) == meaning.text
    if ends_in_one_answer(text):
        assert isinstance(parse_turn(text), Answer | BoxRequest | BadRequest)
    assert not well_formed(text) or ends_in_one_answer(text)
    assert "".join(segments_between_boxes(text)) in text or "bbox_2d" in text


@given(texts, boxes, st.none() | st.integers(0, 9), st.none() | st.floats(0.25, 8))
@quick(80)
def test_a_box_that_was_formatted_is_read_behind_any_text(
    text: str, coords: tuple[float, float, float, float], image: int | None, zoom: float | None
) -> None:
    assume('"' not in text)
    assert parse_turn(text + "." + format_box(coords, image, zoom)) == BoxRequest(coords, image or 0, zoom)


@given(texts, st.integers(1, 5))
@quick(80)
def test_a_turn_that_streams_in_ends_where_the_whole_text_says(text: str, size: int) -> None:
    """An engine looks after each token that may end a turn; a text that it never looked at must not have ended one."""
    written = ""
    for start in range(0, len(text), size):
        token = text[start : start + size]
        written += token
        asked = may_end_turn(token)
        if not asked and token.strip() and any(c.isalnum() for c in token):
            assert parse_turn(written) is None
        if asked and parse_turn(written) is not None:
            return  # where an engine stops: what was written so far is the turn
    # Never stopped: no beginning of the text that ends in a token is a turn, but for marks behind its end.
    assert parse_turn(text) is None or not may_end_turn(text)


@given(texts, st.integers(1, 5))
@quick(80)
def test_the_token_that_ends_a_turn_is_one_that_may(text: str, size: int) -> None:
    """Whatever is not looked at behind a token can wait for ever: nothing has ended there for the first time."""
    for stop in range(size, len(text) + size, size):
        if parse_turn(text[:stop]) is not None:
            assert may_end_turn(text[stop - size : stop])
            return


def sight(height: int, width: int, seen: tuple[int, int]) -> tuple[Sample, tuple[Visual, ...]]:
    """An image of this size, which takes no memory, and the size that it is seen at."""
    image = torch.zeros(1, dtype=torch.uint8).expand(3, height, width)
    return Sample("", "", (image,)), (Visual(torch.zeros(1).expand(3, *seen), 1),)


@given(texts, sides, sides, st.tuples(st.integers(1, 99), st.integers(1, 99)), st.sampled_from(SPACES), st.booleans())
@quick(100)
def test_any_turn_has_an_answer_of_the_environment(
    text: str, height: int, width: int, seen: tuple[int, int], space: BoxSpace, zooms: bool
) -> None:
    outcome(text, height, width, seen, space, zooms)


@given(
    st.tuples(*[st.floats(-0.01, 1.01) | st.sampled_from([0.0, 0.5, 0.5000001, 1.0])] * 4) | boxes,
    st.none() | st.floats(0.25, 8),
    sides,
    sides,
    st.tuples(st.integers(1, 99), st.integers(1, 99)),
    st.sampled_from(SPACES),
    st.booleans(),
)
@quick(150)
def test_a_box_is_shown_or_refused(
    share: tuple[float, float, float, float],
    zoom: float | None,
    height: int,
    width: int,
    seen: tuple[int, int],
    space: BoxSpace,
    zooms: bool,
) -> None:
    """What the environment calls valid can be cut out, on images of any size; the rest has a sentence."""
    of = {"pixels": (height, width), "resized": seen, "unit": (1, 1), "thousand": (1000, 1000)}
    tall, wide = of[space.kind]
    coords = (share[0] * wide, share[1] * tall, share[2] * wide, share[3] * tall)
    assume(all(map(math.isfinite, coords)))
    outcome(format_box(coords, zoom=zoom), height, width, seen, space, zooms)


def outcome(text: str, height: int, width: int, seen: tuple[int, int], space: BoxSpace, zooms: bool) -> None:
    sample, visuals = sight(height, width, seen)
    reply = respond(text, sample, visuals, space, zooms)
    assert (reply is None) == (parse_turn(text) is None)
    if isinstance(reply, Refuse):
        assert reply.fault in REFUSALS
        assert zooms or reply.fault not in OF_ZOOM or "zoom" in text
    if isinstance(reply, Done):
        assert reply.answer == reply.answer.strip()
    if isinstance(reply, Look):
        box = reply.region.box
        assert check(box, (height, width), 0.0) is None
        if (box[2] - box[0]) * (box[3] - box[1]) < 1e5:
            scaler = CropAndScale(grid=4, min_pixels=64, max_pixels=256)
            (crop,) = scaler([sample.images[0]], torch.tensor([box], dtype=torch.float32))
            assert min(crop.shape[-2:]) >= 4
            assert crop.isfinite().all()
