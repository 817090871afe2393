"""The grammar of turns: what ends one, what does not, and that no text breaks it."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.functional.grammar import (
    Answer,
    BadRequest,
    BoxRequest,
    RequestFault,
    answer_spans,
    ends_in_one_answer,
    format_box,
    last_answer,
    may_end_turn,
    parse_turn,
    segments_between_boxes,
    well_formed,
)

BOX = '{"bbox_2d": [1, 2, 30, 40]}'
COORDS = (1.0, 2.0, 30.0, 40.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOX, BoxRequest(COORDS)),
        (f"<think>Look at the sign: {BOX}", BoxRequest(COORDS)),
        (f"{BOX} \n\n", BoxRequest(COORDS)),
        ('{"bbox_2d":[1,2,30,40]}', BoxRequest(COORDS)),
        ('{\n  "bbox_2d" : [1.0, 2e0, 30, 40]\n}', BoxRequest(COORDS)),
        ('{"bbox_2d": [-0.5, 0, 0.25, 1]}', BoxRequest((-0.5, 0.0, 0.25, 1.0))),
        ('{"bbox_2d": [9, 9, 1, 1]}', BoxRequest((9.0, 9.0, 1.0, 1.0))),  # order is not grammar's business
        ('{"label": "a sign", "bbox_2d": [1, 2, 30, 40], "image": 2}', BoxRequest(COORDS, 2)),
        ('{"bbox_2d": [1, 2, 30, 40], "zoom": 2}', BoxRequest(COORDS, zoom=2.0)),
        ('{"zoom": 0.25, "bbox_2d": [1, 2, 30, 40], "image": 2}', BoxRequest(COORDS, 2, 0.25)),
        ('{"bbox_2d": [1, 2, 30, 40], "zoom": 8e0}', BoxRequest(COORDS, zoom=8.0)),
        # Braces and quotes in strings, and in the prose before.
        ('{"bbox_2d": [1, 2, 30, 40], "label": "a } b { c }}"}', BoxRequest(COORDS)),
        ('{"bbox_2d": [1, 2, 30, 40], "label": "say \\"}\\" \\\\"}', BoxRequest(COORDS)),
        (f'The 5" pipe in \\frac{{1}}{{2}} and {{x | x > "y}}: {BOX}', BoxRequest(COORDS)),
        (f"an open brace {{ and {BOX}", BoxRequest(COORDS)),
        # Qwen's list style: the first object ends the turn.
        ('```json\n[{"bbox_2d": [1, 2, 30, 40], "label": "x"}', BoxRequest(COORDS)),
        # What one closing token of Qwen's vocabulary may bring along.
        (f"{BOX}</", BoxRequest(COORDS)),
        (f"[{BOX},{{", BoxRequest(COORDS)),
        (f"({BOX}).\n", BoxRequest(COORDS)),
        (f'{{"tool": {BOX}}}', BoxRequest(COORDS)),
        ("<answer>4</answer>", Answer("4")),
        ("so <answer>\n 4 \n</answer>\n", Answer("4")),
        ("<answer>4</answer></", Answer("4")),
        ("<answer></answer>", Answer("")),
        ("write <answer> then: <answer>4</answer>", Answer("4")),
        (f"{BOX} and then <answer>4</answer>", Answer("4")),
    ],
)
def test_turn_ends(text, expected):
    assert parse_turn(text) == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('"bbox_2d": [1, 2, 3, 4', RequestFault.JSON),
        ('"bbox_2d": [x1, y1, x2, y2]', RequestFault.JSON),
        ('"bbox_2d": [1, 2, 3, 4,]', RequestFault.JSON),
        ('"bbox_2d": [1, 2, 3, 4,], "label": "a}b"', RequestFault.JSON),
        ("'bbox_2d': [1, 2, 3, 4]", RequestFault.JSON),
        ("bbox_2d: [1, 2, 3, 4]", RequestFault.JSON),
        ('"bbox_2d": {"x1": 1,}', RequestFault.JSON),
        ('"bbox_2d": ' + "[" * 5000 + "]" * 5000, RequestFault.JSON),
        ('"bbox_2d": [1, 2, 3]', RequestFault.ARITY),
        ('"bbox_2d": [1, 2, 3, 4, 5]', RequestFault.ARITY),
        ('"bbox_2d": []', RequestFault.ARITY),
        ('"bbox_2d": [[1, 2, 3, 4]]', RequestFault.ARITY),
        ('"bbox_2d": "1, 2, 3, 4"', RequestFault.ARITY),
        ('"bbox_2d": {"x1": 1}', RequestFault.ARITY),
        ('"bbox_2d": null', RequestFault.ARITY),
        ('"bbox_2d": [1, 2, 3, "4"]', RequestFault.NUMBER),
        ('"bbox_2d": [1, 2, 3, true]', RequestFault.NUMBER),
        ('"bbox_2d": [1, 2, 3, null]', RequestFault.NUMBER),
        ('"bbox_2d": [1, 2, 3, NaN]', RequestFault.NUMBER),
        ('"bbox_2d": [1, 2, 3, -Infinity]', RequestFault.NUMBER),
        ('"bbox_2d": [1, 2, 3, 1e999]', RequestFault.NUMBER),
        ('"bbox_2d": [1, 2, 3, ' + "9" * 5000 + "]", RequestFault.NUMBER),
        ('"bbox_2d": [1, 2, 3, 4], "image": -1', RequestFault.IMAGE),
        ('"bbox_2d": [1, 2, 3, 4], "image": 1.0', RequestFault.IMAGE),
        ('"bbox_2d": [1, 2, 3, 4], "image": true', RequestFault.IMAGE),
        ('"bbox_2d": [1, 2, 3, 4], "image": "1"', RequestFault.IMAGE),
        ('"bbox_2d": [1, 2, 3, 4], "zoom": "2"', RequestFault.ZOOM),
        ('"bbox_2d": [1, 2, 3, 4], "zoom": true', RequestFault.ZOOM),
        ('"bbox_2d": [1, 2, 3, 4], "zoom": null', RequestFault.ZOOM),
        ('"bbox_2d": [1, 2, 3, 4], "zoom": [2, 2]', RequestFault.ZOOM),
        ('"bbox_2d": [1, 2, 3, 4], "zoom": NaN', RequestFault.ZOOM),
        ('"bbox_2d": [1, 2, 3, 4], "zoom": 1e999', RequestFault.ZOOM),
        ('"bbox_2d": [1, 2, 3, 4], "zoom": 0', RequestFault.ZOOM),
        ('"bbox_2d": [1, 2, 3, 4], "zoom": -2', RequestFault.ZOOM),
        ('"bbox_2d": [1, 2, 3, 4], "zoom": 0.249', RequestFault.ZOOM),
        ('"bbox_2d": [1, 2, 3, 4], "zoom": 8.001', RequestFault.ZOOM),
    ],
)
def test_malformed_box_is_refused(content, reason):
    assert parse_turn(f"See {{{content}}}") == BadRequest(reason)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain text",
        r"\frac{a}{b} and \{x \in [0, 1]}",
        "the set {[1, 2]}",
        '{"tool": "zoom", "box": [1, 2, 3, 4]}',
        '{"note": "write \\"bbox_2d\\": here"}',
        'a "bbox_2d": [1, 2, 3, 4]} without its opening',
        '"bbox_2d": {1, 2}',  # the key stands outside the braces
        '{"bbox_2d": [1, 2, 3, 4]',
        '{"bbox_2d": [1, 2, 3, 4], "label": "a}',  # the brace is still inside the string
        '{"bbox_2d": [1, 2, 3, 4], "meta": {"a": 1}',  # only the inner object is closed
        '{"bbox_2d": {"x1": 1}',
        f"{BOX} is where",
        f"{BOX}" + "." * 9,  # more than one token can bring along
        "<answer>4",
        "4</answer>",
        "<answer>4</answer> is what I think",
        "<answer>4</answer> and 5</answer>",
        "<answer>4</think>",
    ],
)
def test_turn_goes_on(text):
    assert parse_turn(text) is None


def test_only_the_end_of_a_box_ends_the_turn():
    text = 'Let $S = \\{x_{1}\\}$, {"a": {"b": [1]}}. I look {"label": "}", "bbox_2d": [1, 2, 30, 40]}'
    ends = [stop for stop in range(len(text) + 1) if parse_turn(text[:stop]) is not None]
    assert ends == [len(text)]


def test_may_end_turn():
    assert all(map(may_end_turn, ["]}", "}\n", ">", "</answer>", "]}</"]))
    assert all(map(may_end_turn, ["7</answer>", "> ,", "</answer>!\n", "48]}", "}" + ")" * 8]))
    assert not any(map(may_end_turn, ["]", "{", "</", "answer", ""]))
    # behind these nothing can have ended: text goes on, another tag was closed
    assert not any(map(may_end_turn, ["<think>I zoom in on ", "</think><answer>", "<answer>", "} and", "}" + ")" * 9]))


finite = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53)


@given(
    st.tuples(finite, finite, finite, finite),
    st.none() | st.integers(0, 9),
    st.none() | st.floats(0.25, 8) | st.integers(1, 8),
    st.sampled_from(["", "look: ", "{ "]),
)
@settings(max_examples=100, deadline=None)
def test_format_round_trip(coords, image, zoom, before):
    written = format_box(coords, image, zoom)
    assert parse_turn(before + written) == BoxRequest(coords, image or 0, zoom)
    assert json.loads(written)["bbox_2d"] == list(coords)


def test_format():
    assert format_box((1, 2.0, 30, 40)) == BOX
    assert format_box((0.5, 0, 1, 1), image=0) == '{"bbox_2d": [0.5, 0, 1, 1], "image": 0}'
    assert format_box((1, 2, 30, 40), zoom=2.0) == '{"bbox_2d": [1, 2, 30, 40], "zoom": 2}'
    assert format_box((1, 2, 30, 40), 1, 1.5) == '{"bbox_2d": [1, 2, 30, 40], "image": 1, "zoom": 1.5}'
    for zoom in (0, 8.5, float("nan")):
        with pytest.raises(ValueError, match=r"`zoom` to be from 0.25 to 8"):
            format_box((1, 2, 30, 40), zoom=zoom)
    with pytest.raises(ValueError, match="four finite"):
        format_box((1, 2, 3))
    with pytest.raises(ValueError, match="four finite"):
        format_box((1, 2, 3, float("nan")))


PIECES = ['"', "{", "}", "[", "]", "\\", "'", ":", ",", " ", "\n", "1", "-1e9", "NaN", "bbox_2d", '"bbox_2d": [']
PIECES += ["<answer>", "</answer>", "<think>", "</think>", BOX, "é", "\ud800", "\x1c"]
hostile = st.lists(st.sampled_from(PIECES), max_size=40).map("".join) | st.text(max_size=60)


@given(hostile)
@settings(max_examples=150, deadline=None)
def test_no_text_breaks_it(text):
    parse_turn(text)
    well_formed(text)
    spans = answer_spans(text)
    assert not any("<answer>" in span or "</answer>" in span for span in spans)
    assert not ends_in_one_answer(text) or len(spans) == 1
    assert (last_answer(text) is None) == (not text.strip())
    segments = segments_between_boxes(text)
    assert text.startswith(segments[0])
    assert text.endswith(segments[-1])


@given(hostile.filter(lambda text: '"' not in text))
@settings(max_examples=100, deadline=None)
def test_a_box_is_found_behind_any_text(text):
    # The format of a box does not depend on what stood before it.
    assert parse_turn(f"{text} x {BOX}") == BoxRequest(COORDS)
    assert parse_turn(f"{text} x <answer>7</answer>") == Answer("7")


@pytest.mark.parametrize(
    "text",
    [
        '{"bbox_2d": ' + "{" * 20_000 + "}" * 20_000,
        "bbox_2d" + "{" * 20_000 + "}" * 20_000,
        '{"bbox_2d": "' + '\\"' * 20_000 + "}",
        "{" + "bbox_2d: " * 30_000 + "}" * 9,
        "{" + "bbox_2d: " * 30_000,
        "bbox_2d" + " " * 40_000 + "}",
        "<answer>" * 30_000 + "</answer>" * 9,
        "<think>" * 30_000 + "\\" * 20_000 + '"}',
    ],
    ids=range(8),
)
def test_hostile_text_takes_linear_time(text):
    start = time.process_time()
    for function in (parse_turn, well_formed, last_answer, segments_between_boxes):
        function(text)
    assert time.process_time() - start < 10  # quadratic time would be a minute


def test_last_answer():
    assert last_answer("<answer>1</answer> no, <answer> 2 </answer> bye") == "2"
    assert last_answer("first\n the last line \n\n") == "the last line"
    assert last_answer("<answer></answer>") == ""
    assert last_answer(" \n ") is None
    assert answer_spans("<answer>1</answer><answer> 2\n</answer><answer>3") == ["1", " 2\n"]


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("<think>a</think><answer>b</answer>", True, True),
        (f"\n<think>a {BOX} c</think>\n\n<answer>b</answer>\n", True, True),
        ("<answer>b</answer>", False, True),
        ("a <think>a</think><answer>b</answer>", False, True),
        ("<think>a</think> so <answer>b</answer>", False, True),
        ("<think>a<answer>b</answer>", False, True),
        ("<think>a</think></think><answer>b</answer>", False, True),
        ("<think>a <think>b</think></think><answer>b</answer>", False, True),
        ("<think>a<answer>b</answer></think>", False, False),
        ("<think>a</think><answer>b</answer>.", False, False),
        ("<think>a</think><answer>b</answer><answer>b</answer>", False, False),
        ("<think>a</think><answer>b", False, False),
        ("<think>a</think>b</answer>", False, False),
        ("", False, False),
    ],
)
def test_formats(text, strict, lenient):
    assert well_formed(text) is strict
    assert ends_in_one_answer(text) is lenient


def test_segments():
    assert segments_between_boxes(f"ab {BOX}cd{BOX}") == ["ab ", "cd", ""]
    assert segments_between_boxes('a {"bbox_2d": [1,} b {"label": 1} c') == ["a ", ' b {"label": 1} c']
    assert segments_between_boxes("none") == ["none"]
    assert segments_between_boxes(f"a {{ b {BOX} c }} d") == ["a { b ", " c } d"]
