"""A trajectory as a page: what is on it, and that nothing on it runs."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from callbacks.answers import Teller, file_name, told
from callbacks.webpage import POLICY, printable, trajectory_page
from modules.engine import Request
from modules.trajectory import Region, Sample, StopReason, Trajectory, Turn, Visual

HOSTILE = '</div><script>alert(1)</script><img src=x onerror="alert(2)">\' " & \x1b[2J\u202e'
NONE = torch.zeros(0)


class Tags(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def trajectory(text: str = "look", answer: str | None = "7") -> Trajectory:
    """It looks at (10, 20, 30, 60) of an image of 100 x 80, is refused a box, looks at the other image and answers."""
    images = (torch.zeros(3, 80, 100, dtype=torch.uint8), torch.full((3, 4, 4), 255, dtype=torch.uint8))
    crop = Visual(torch.rand(3, 8, 8), 1, "crop")
    turns = (
        Turn(f'{text} {{"bbox_2d": [10, 20, 30, 60]}}', 0, 2, region=Region((10, 20, 30, 60)), crop=crop),
        Turn("again {", 2, 3, fault="arity"),
        Turn("and", 3, 4, region=Region((0, 0, 2, 2), 1), crop=crop),
        Turn(f"<answer>{answer}</answer>", 4, 6),
    )
    sample = Sample("id", "Which?", images, ("7", "seven"), choices=("a", "b"), regions=(Region((1, 2, 3, 4)),))
    written = torch.ones(6, dtype=torch.bool)
    return Trajectory(
        sample, NONE, NONE, written, NONE, NONE, (), turns, StopReason.ANSWER, answer, "".join(t.text for t in turns)
    )


def test_what_is_on_the_page() -> None:
    page = Tags(trajectory_page(trajectory(), 0.1234))
    for text in ("Which?", "A. a", "7 | seven", "0.123", "with an answer", "crop 1: 20 x 40 pixels at 10, 20", "arity"):
        assert text in page.text
    boxes = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert [box["viewbox"] for box in boxes] == ["0 0 100 80", "0 0 4 4"]
    drawn = [(a["x"], a["y"], a["width"], a["height"]) for t, a in page.tags if t == "rect" and a.get("fill") == "none"]
    assert drawn == [
        ("1", "2", "2", "2"),
        ("10", "20", "20", "40"),
        ("0", "0", "2", "2"),
    ]  # annotated, chosen; 2nd image
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 2  # the crops, where they were shown
    assert page.text.index("look") < page.text.index("crop 1") < page.text.index("again") < page.text.index("crop 2")


def test_the_page_needs_and_runs_nothing() -> None:
    told = trajectory(HOSTILE, HOSTILE)
    sample = replace(told.sample, id=HOSTILE, question=HOSTILE, answers=(HOSTILE,), choices=(HOSTILE, HOSTILE))
    raw = trajectory_page(replace(told, sample=sample), None)
    plain = Tags(trajectory_page(trajectory(), 0.5))
    page = Tags(raw)
    # a title holds text only; a browser ends it at its own closing tag, which is escaped
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert not {name for _, attributes in page.tags for name in attributes if name.startswith("on")}
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:image/").startswith("data:image/")
    policy = [attributes for tag, attributes in page.tags if tag == "meta" and "http-equiv" in attributes]
    assert [each["content"] for each in policy] == [POLICY]
    assert "alert(1)" in page.text  # shown, as text
    assert "\x1b" not in raw
    assert "\u202e" not in raw


def test_what_steers_a_terminal_is_spelt_out() -> None:
    assert printable("a\tb\nc\x1b[31m\x07é 中") == "a\tb\nc\\x1b[31m\\x07é 中"
    assert printable("a\ud83d\u2066b\u200f") == "a\\ud83d\\u2066b\\u200f"
    # words and emoji need their joiners
    joined = "\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \U0001f469\u200d\U0001f52c"
    assert printable(joined) == joined


def test_the_telling_only_grows_and_ends_as_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    whole = trajectory()
    other = replace(whole, sample=replace(whole.sample, id="other"))
    teller = Teller()
    for done, turn in enumerate(whole.turns):
        for end in range(1, len(turn.text) + 1):
            teller(Request(whole.sample, 0), whole.turns[:done], turn.text[:end])
            teller(Request(other.sample, 0), whole.turns[:done], turn.text[:end])  # waits
    teller(Request(whole.sample, 0), whole.turns, "")
    streamed = capsys.readouterr().out
    assert streamed == "--- id: Which?\n" + told(whole.turns, "")
    teller.finish(whole, 0.25, Path("a.html"))
    assert capsys.readouterr().out == "\n\nanswer: 7   (probability of its tokens 0.250)\na.html\n\n"
    teller.finish(other, None, Path("b.html"))
    said = capsys.readouterr().out
    assert said.startswith("--- other: Which?\n" + told(whole.turns, "") + "\n\nanswer: 7\n")


def test_names_of_files() -> None:
    assert "/" not in file_name("../../etc/passwd")
    assert file_name("photo.JPG") == "photo"
    assert file_name("v1.2-question") == "v1.2-question"
    assert file_name("中文") == "_"
    assert file_name("...") == "question"
