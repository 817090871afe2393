"""The authors' files, written in their exact schemas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datamodules import AuthorsDataModule, DataError
from datamodules.pictures import ImageFile
from datamodules.vlir.authors import read_rgrpo, read_sft, split_segment
from modules.functional.grammar import BoxRequest, format_box, parse_turn
from modules.trajectory import Sample

CARDS = Path(__file__).parents[1] / "data" / "cards"
BOX = '{"bbox_2d": [147, 134, 619, 407]}'


def _sft(**changes: Any) -> dict[str, Any]:
    row = {
        "image_path": "a.png",
        "question": "Which?",
        "response_list": [f"<think>Look {BOX}\n", "Seven.</think><answer>7</answer>\n"],
        "img_crop_list": ["crops/a_0.png"],
    }
    return row | changes


def _rgrpo(**changes: Any) -> dict[str, Any]:
    return {"image_path": "a.png", "question": "Which?", "answer": "7", "source": "MMK12"} | changes


@pytest.fixture
def samples(tmp_path: Path) -> Callable[[Path], list[Sample]]:
    """All samples of a warm-up file about `a.png`, 640 x 428; fails if one is left out."""
    Image.new("RGB", (640, 428)).save(tmp_path / "a.png")

    def read(path: Path) -> list[Sample]:
        data = AuthorsDataModule(str(path), "sft", predict=str(path))
        data.setup("predict")
        (batch,) = data.predict_dataloader()
        assert (batch.skipped, data.skipped) == ([], [])
        return batch.samples

    return read


def test_boxes_become_original_pixels(write_list: Callable[..., Path], samples: Callable[[Path], list[Sample]]) -> None:
    """[147, 134, 619, 407] in Qwen2.5-VL's resized pixels is [146, 137, 615, 415] on a 428 x 640 image.

    By hand: 428 x 640 goes to 15 x 23 patches of 28 = 420 x 644, so x * 640 / 644 and y * 428 / 420; both boxes are
    rounded to whole pixels.
    """
    (sample,) = samples(write_list([_sft()]))
    look, read = sample.rationale
    assert look.text == "<think>Look "
    assert look.region is not None
    assert look.region.box == pytest.approx((146, 137, 615, 415), abs=1.0)
    assert (read.text, read.region) == ("Seven.</think><answer>7</answer>", None)
    assert (sample.answers, sample.source, sample.id) == (("7",), "vlir", "data-1")


def test_a_zoom_that_was_written_is_kept(
    write_list: Callable[..., Path], samples: Callable[[Path], list[Sample]]
) -> None:
    zoomed = BOX.replace("407]", '407], "zoom": 4')
    (sample,) = samples(write_list([_sft(response_list=[f"<think>Look {zoomed}", "<answer>7</answer>"])]))
    assert sample.rationale[0].region is not None
    assert sample.rationale[0].region.zoom == 4.0


def test_limits_decide_how_boxes_are_read(write_list: Callable[..., Path], tmp_path: Path) -> None:
    Image.new("RGB", (640, 428)).save(tmp_path / "a.png")
    path = str(write_list([_sft(response_list=['Look {"bbox_2d": [0, 0, 28, 28]}\n', "7"])]))
    # at most 4 x 28 x 28 pixels: 640 x 428 becomes 56 x 28 (2 x 1 patches)
    data = AuthorsDataModule(path, "sft", predict=path, min_pixels=1, max_pixels=4 * 784)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    region = batch.samples[0].rationale[0].region
    assert region is not None
    assert region.box == pytest.approx((0, 0, 320, 428))


def test_photographs_and_boxes_of_the_fixture(authors_sft: Path, left_cards: list[dict[str, Any]]) -> None:
    data = AuthorsDataModule(str(authors_sft), "sft", root=str(CARDS), test=str(authors_sft), batch_size=9)
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert batch.skipped == []
    for sample, card in zip(batch.samples, left_cards, strict=True):
        assert sample.answers == (card["rank"],)
        assert sample.images[0].shape[1:] == card["size"]
        region = sample.rationale[0].region
        assert region is not None
        assert region.box == pytest.approx(card["box"], abs=1.0)


def test_rgrpo_fixture(authors_rgrpo: Path, left_cards: list[dict[str, Any]]) -> None:
    data = AuthorsDataModule(str(authors_rgrpo), "rgrpo", root=str(CARDS), batch_size=9)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert sorted(sample.answers[0] for sample in batch.samples) == sorted(card["rank"] for card in left_cards)
    assert all(sample.rationale == () and sample.regions == () for sample in batch.samples)


def test_what_closes_around_a_box_follows_the_crop(
    write_list: Callable[..., Path], samples: Callable[[Path], list[Sample]]
) -> None:
    segments = [f"Look ```json\n[{BOX}]\n```\n", f"And {BOX}\n", "Done."]
    (sample,) = samples(write_list([_sft(response_list=segments, img_crop_list=["1", "2"])]))
    assert [step.text for step in sample.rationale] == ["Look ```json\n[", "]\n```And ", "Done."]
    assert sample.answers == ()


@pytest.mark.parametrize(
    ("segment", "parts"),
    [
        (f"a {BOX}\n", ("a ", BOX, "\n")),
        ("no box", None),
        (f"{BOX} and much more text behind it", None),
        ('broken {"bbox_2d": [1, 2, 3]}', None),
        ('a {"bbox_2d": [1, 2, 3, 4], "label": "{x"}]', ("a ", '{"bbox_2d": [1, 2, 3, 4], "label": "{x"}', "]")),
        ('a {"b": {"bbox_2d": [1, 2, 3, 4]}}', ('a {"b": ', '{"bbox_2d": [1, 2, 3, 4]}', "}")),
        (f"{BOX} twice {BOX}", (f"{BOX} twice ", BOX, "")),
    ],
)
def test_split_segment(segment: str, parts: tuple[str, str, str] | None) -> None:
    found = split_segment(segment)
    if parts is None:
        assert found is None
    else:
        assert found == (parts[0], parse_turn(parts[1]), parts[2])


@settings(max_examples=100, deadline=None)
@given(
    before=st.text(alphabet='ab{}[]", \n\\', max_size=12),
    label=st.none() | st.text(alphabet='a{}"[', max_size=5),
    after=st.text(alphabet="}]` \n", max_size=4),
)
def test_split_segment_loses_nothing(before: str, label: str | None, after: str) -> None:
    box = json.dumps({"bbox_2d": [1, 2, 3, 4]} | ({} if label is None else {"label": label}))
    found = split_segment(before + box + after)
    if found is not None:
        start, request, end = found
        segment = before + box + after
        assert segment.startswith(start)
        assert segment.endswith(end)
        assert parse_turn(segment[len(start) : len(segment) - len(end)]) == request == BoxRequest((1.0, 2.0, 3.0, 4.0))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"response_list": ["Look\n", "7"]}, r"key `response_list\[0\]`: expected it to end in a box"),
        ({"response_list": [f"Look {BOX}\n"]}, r"one segment more than there are crops \(1\), found 1"),
        ({"response_list": [f"a {BOX}", f"b {BOX}"]}, r"response_list\[1\]`: expected no box where no crop"),
        ({"response_list": "text"}, "key `response_list`: expected a list of strings"),
        ({"response_list": [1, 2]}, r"key `response_list\[0\]`: expected a string, found int 1"),
        ({"response_list": ['{"bbox_2d": [1, 2, 3, 4], "image": 1}', "7"]}, "the only image, found image 1"),
        ({"img_crop_list": None}, "key `img_crop_list`"),
        ({"image_path": "/secret/a.png"}, "inside the data folder"),
        ({"image_path": "../a.png"}, "inside the data folder"),
    ],
)
def test_bad_sft_rows(write_list: Callable[..., Path], change: dict[str, Any], why: str) -> None:
    records, bad = read_sft(write_list([_sft(), _sft(**change)]))
    assert len(records) == 1
    assert bad[0].row == 2
    with pytest.raises(ValueError, match=why):
        raise bad[0]


@pytest.mark.parametrize("box", [[10, 10, 10, 20], [0, 0, 700, 100], [-9, 0, 10, 10]])
def test_boxes_that_do_not_fit_are_left_out_with_their_rows(
    write_list: Callable[..., Path], tmp_path: Path, box: list[int]
) -> None:
    Image.new("RGB", (640, 428)).save(tmp_path / "a.png")
    path = str(write_list([_sft(response_list=[f"a {format_box(box)}", "7"])]))
    data = AuthorsDataModule(path, "sft", predict=path)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch.samples == []
    assert "key `response_list[0]`: expected a box inside the 644 x 420 resized image" in batch.skipped[0]


@pytest.mark.parametrize(
    ("answer", "source", "answers"),
    [
        ("cat / kitten", "textvqa", ("cat", "kitten")),
        ("cat/cat/", "TextVQA", ("cat",)),
        ("/", "textvqa", ("/",)),
        ("3/4", "MMK12", ("3/4",)),
        ("1/2/2020", "docvqa", ("1/2/2020",)),
        (7, "MMK12", ("7",)),
        (2.5, "MMK12", ("2.5",)),
    ],
)
def test_answers_are_split_only_where_the_source_says_so(
    write_list: Callable[..., Path], answer: object, source: str, answers: tuple[str, ...]
) -> None:
    records, _ = read_rgrpo(write_list([_rgrpo(answer=answer, source=source)]))
    assert records[0].sample.answers == answers
    assert records[0].sample.source == source


def test_sources_with_alternatives_can_be_named(write_list: Callable[..., Path]) -> None:
    path = write_list([_rgrpo(answer="a/b", source="mine"), _rgrpo(answer="a/b", source="textvqa")])
    records, _ = read_rgrpo(path, alternatives=["mine"])
    assert [record.sample.answers for record in records] == [("a", "b"), ("a/b",)]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"answer": None}, "key `answer`: expected a string or a number, found NoneType"),
        ({"answer": True}, "key `answer`: .* found bool True"),
        ({"answer": ["7"]}, "key `answer`: .* found list"),
        ({"answer": " "}, "key `answer`: expected an answer"),
        ({"source": 3}, "key `source`"),
        ({"question": ""}, "key `question`"),
    ],
)
def test_bad_rgrpo_rows(write_list: Callable[..., Path], change: dict[str, Any], why: str) -> None:
    _, bad = read_rgrpo(write_list([_rgrpo(**change), _rgrpo()]))
    with pytest.raises(ValueError, match=why):
        raise bad[0]


@pytest.mark.parametrize("key", ["image_path", "question", "answer", "source"])
def test_missing_field_is_named(write_list: Callable[..., Path], key: str) -> None:
    path = write_list([_rgrpo(), {name: value for name, value in _rgrpo().items() if name != key}, "text"])
    _, bad = read_rgrpo(path)
    assert str(bad[0]).startswith(f"{path}:2: key `{key}`: missing")
    assert "expected an object" in str(bad[1])


def test_byte_order_mark_and_several_files(write_list: Callable[..., Path], tmp_path: Path) -> None:
    Image.new("RGB", (640, 428)).save(tmp_path / "a.png")
    paths = [write_list([_rgrpo(question=name)], f"{name}.json", encoding="utf-8-sig") for name in "xy"]
    joined = ":".join(map(str, paths))
    data = AuthorsDataModule(joined, "rgrpo", val=joined)
    data.setup("fit")
    (val,) = data.val_dataloader()
    assert [(sample.id, sample.question) for batch in val for sample in batch.samples] == [("x-1", "x"), ("y-1", "y")]


def test_absolute_paths_under_the_root(write_list: Callable[..., Path], tmp_path: Path) -> None:
    path = write_list([_rgrpo(image_path=str(tmp_path / "images/a.png"))])
    assert read_rgrpo(path, root=tmp_path)[0][0].images == (ImageFile(tmp_path, "images/a.png"),)
    with pytest.raises(DataError, match="inside the data folder"):
        read_rgrpo(path, root=tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "found no JSON"),
        ("<html>", "found no JSON"),
        ('{"a": 1}\n{"a": 2}', r"found no JSON \(Extra data at line 2"),
        ('{"a": 1}', "expected a JSON list of objects, found dict"),
        ("[]", "found no rows"),
        ("[1]", "no usable row among 1"),
    ],
)
def test_unusable_files(tmp_path: Path, content: str, why: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(DataError, match=why):
        read_rgrpo(path)


def test_limit(write_list: Callable[..., Path]) -> None:
    records, _ = read_sft(write_list([_sft()] * 3), limit=2)
    assert len(records) == 2
