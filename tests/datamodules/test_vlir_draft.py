"""Teachers write what they like: what can mean one thing only is understood, the rest is refused with its reason."""

from __future__ import annotations

import pytest

from datamodules.vlir.draft import Draft, Reason, Rejected, read_draft
from modules.functional.boxes import BoxSpace, SpaceKind
from modules.functional.grammar import well_formed
from modules.trajectory import Region, Step

SIZE = (400, 800)  # (H, W)
SENT = (200, 400)  # half of it
BOX = '{"bbox_2d": [100, 50, 200, 150]}'
PLACE = (200.0, 100.0, 400.0, 300.0)  # in original pixels
GOOD = f"<think>I look at the sign. {BOX} It says EXIT.</think><answer>EXIT</answer>"


def read(text: str, space: SpaceKind = "resized", images: int = 1) -> Draft:
    return read_draft(text, [SIZE] * images, [SENT] * images, BoxSpace(space))


def test_a_draft_is_steps_with_boxes_in_original_pixels() -> None:
    draft = read(GOOD)
    assert draft.steps == (
        Step("<think>I look at the sign. ", Region(PLACE)),
        Step("It says EXIT.</think><answer>EXIT</answer>"),
    )
    assert draft.answer == "EXIT"
    assert well_formed("".join(step.text for step in draft.steps))


@pytest.mark.parametrize(
    "text",
    [
        f"```\n{GOOD}\n```",
        f"```xml\n{GOOD}\n```\n",
        GOOD.replace("150]}", "150,]}"),
        GOOD.replace("150]}", "150],}"),
        GOOD.replace('"', "'"),
        GOOD.replace("[100, 50, 200, 150]", "[[100, 50, 200, 150]]"),
        GOOD.replace("[100, 50, 200, 150]", '"100, 50, 200, 150"'),
        GOOD.replace("[100, 50, 200, 150]", "[100 50 200 150]"),
        GOOD.replace("[100, 50, 200, 150]", "[100.0, 5e1, 200., 150]"),
        GOOD.replace(BOX, f"[{BOX}]"),
        GOOD.replace(BOX, f"```json\n[{BOX}]\n```"),
        GOOD.replace(BOX, '{"bbox_2d": [100, 50, 200, 150], "label": "the sign"}'),
        GOOD.replace(BOX, '{"label": "the [sign]", "bbox_2d": [100, 50, 200, 150]}'),
        GOOD.replace("[100, 50, 200, 150]", "[0.25, 0.25, 0.5, 0.75]"),  # of one, where pixels were asked for
        GOOD.replace("<think>", ""),
        GOOD.replace("</think>", ""),
        GOOD.replace("<think>", "").replace("</think>", ""),
        GOOD.replace("</think>", "</think>\n\n"),
        GOOD + "\nI hope this helps!",
    ],
)
def test_slips_that_leave_no_doubt_are_mended(text: str) -> None:
    assert read(text).steps == read(GOOD).steps


@pytest.mark.parametrize(
    ("text", "reason", "why"),
    [
        ("", Reason.MALFORMED, "one answer"),
        ("I cannot see any image.", Reason.MALFORMED, "one answer"),
        (GOOD.replace("<answer>EXIT</answer>", "EXIT"), Reason.MALFORMED, "one answer"),
        (GOOD.replace("EXIT</answer>", " </answer>"), Reason.MALFORMED, "one answer"),
        (GOOD + "<answer>ENTRY</answer>", Reason.MALFORMED, "found 2"),
        ("<answer>EXIT</answer>" + GOOD.split("<answer>")[0], Reason.MALFORMED, "after the last box"),
        (GOOD.replace("It says EXIT.", ""), Reason.MALFORMED, "words before the answer"),
        (GOOD.replace("I look at the sign.", ""), Reason.MALFORMED, "words before box 1"),
        (GOOD.replace(BOX, f"{BOX}, {BOX}"), Reason.MALFORMED, "words before box 2"),
        (GOOD.replace(BOX, BOX[:-1]), Reason.MALFORMED, "cannot be read"),
        (GOOD.replace("sign.", "sign.</think>"), Reason.MALFORMED, "middle"),
        ("Sure: " + GOOD, Reason.MALFORMED, "middle"),
        (GOOD.replace(", 150]", "]"), Reason.BAD_BOX, "four numbers"),
        (GOOD.replace("150]", "150, 9]"), Reason.BAD_BOX, "four numbers"),
        (GOOD.replace("150]", "bottom]"), Reason.BAD_BOX, "four numbers"),
        (GOOD.replace("150]", "NaN]"), Reason.BAD_BOX, "four numbers"),
        (GOOD.replace("[100, 50, 200, 150]", "[200, 50, 100, 150]"), Reason.BAD_BOX, "order"),  # or width and height
        (GOOD.replace("200, 150]", "500, 150]"), Reason.BAD_BOX, "outside"),  # or thousandths, or original pixels
        (GOOD.replace("150]", '150], "image": 1'), Reason.BAD_BOX, "image 1"),
        (GOOD.replace("150]", '150], "zoom": 9'), Reason.BAD_BOX, "zoom from 0.25 to 8"),
        (GOOD.replace("150]", '150], "zoom": "close"'), Reason.BAD_BOX, "zoom from 0.25 to 8"),
    ],
)
def test_what_could_mean_two_things_is_refused(text: str, reason: Reason, why: str) -> None:
    with pytest.raises(Rejected, match=why) as error:
        read(text)
    assert error.value.reason is reason


@pytest.mark.parametrize(
    ("space", "coords"),
    [("resized", [100, 50, 200, 150]), ("thousand", [250, 250, 500, 750]), ("unit", [0.25, 0.25, 0.5, 0.75])],
)
def test_boxes_are_converted_from_the_space_that_was_asked_for(space: SpaceKind, coords: list[float]) -> None:
    assert read(GOOD.replace("[100, 50, 200, 150]", str(coords)), space).regions == (Region(PLACE),)


def test_a_box_may_name_another_image_and_touch_the_border() -> None:
    text = GOOD.replace(BOX, '{"bbox_2d": [0, 0, 400, 201], "image": 1}')  # one unit of rounding beyond it
    assert read(text, images=2).regions == (Region((0.0, 0.0, 800.0, 400.0), 1),)


@pytest.mark.parametrize("written", ['"zoom": 2.5', "'zoom': '2.5'", '"zoom": "2.5", "label": "the sign"'])
def test_a_zoom_that_was_written_is_kept(written: str) -> None:
    draft = read(GOOD.replace("150]", f"150], {written}"))
    assert draft.regions == (Region(PLACE, zoom=2.5),)
