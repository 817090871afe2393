"""Published data sets in their published forms: hub columns as parquet, and the authors' own files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from datasets import Image, List, Value
from PIL import Image as Pillow

from datamodules.pictures import StoredImage
from datamodules.sources import (
    GQA,
    VSR,
    DocVQA,
    InfographicVQA,
    RefCOCO,
    ScienceQA,
    Source,
    TextVQA,
    VisualCoT,
)
from datamodules.vlir.reader import Record
from datamodules.vlir.schema import DataError
from modules.trajectory import Region, Sample

TEXT, INT, FLOAT = Value("string"), Value("int64"), Value("float64")


def dumped(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def only(source: Source) -> Record:
    """The record of a source with one row, whose image can be decoded."""
    (record,), bad = source.read()
    assert bad == []
    assert all(image.load().shape[0] == 3 for image in record.images)
    return record


def seen(record: Record) -> tuple[int, int, int]:
    """The first pixel of the record's image."""
    r, g, b = record.images[0].load()[:, 0, 0].tolist()
    return r, g, b


def shade(colour: tuple[int, int, int]) -> Any:
    return Pillow.new("RGB", (40, 30), colour)


class TestTextVQA:
    ROW: ClassVar[dict[str, Any]] = {  # huggingface.co/datasets/lmms-lab/textvqa; answers: ten people
        "image_id": "0054c91397f2fe05",
        "question_id": 34602,
        "question": "what is the brand of this camera?",
        "answers": ["nous les gosses", "dakota", "clos culombu", "dakota digital", *["dakota"] * 6],
        "set_name": "train",
    }

    def test_hub(self, write_hub: Callable[..., Path]) -> None:
        types = dict.fromkeys(("image_id", "question", "set_name"), TEXT) | {"question_id": Value("int32")}
        path = write_hub(
            [self.ROW | {"image": shade((9, 8, 7))}], types | {"answers": List(TEXT), "image": Image()}, "t.parquet"
        )
        record = only(TextVQA(str(path)))
        assert (record.sample.id, record.sample.source, record.sample.answer_kind) == ("34602", "textvqa", "vqa")
        assert record.sample.answers == tuple(self.ROW["answers"])  # each of ten counts, repetitions too
        assert record.sample.provenance == {"dataset": "lmms-lab/textvqa", "file": str(path), "row": 1}
        assert seen(record) == (9, 8, 7)

    @pytest.mark.parametrize("folder", ["train_images", ""])
    def test_the_authors_json(self, tmp_path: Path, picture: Callable[..., Path], folder: str) -> None:
        picture(str(Path(folder, "0054c91397f2fe05.jpg")))
        path = dumped(tmp_path / "TextVQA_0.5.1_train.json", {"dataset_type": "train", "data": [self.ROW]})
        assert only(TextVQA(str(path))).sample.question == self.ROW["question"]

    @pytest.mark.parametrize("answers", [[""] * 10, None])
    def test_the_test_split_has_no_answers(
        self, tmp_path: Path, picture: Callable[..., Path], answers: list[str] | None
    ) -> None:
        # the data set card: "for test set, 10 empty strings are contained in the answers field"
        picture("test_images/0054c91397f2fe05.jpg")
        row = self.ROW | {"set_name": "test", "answers": answers}
        assert only(TextVQA(str(dumped(tmp_path / "t.json", {"data": [row]})))).sample.answers == ()


class TestDocVQA:
    ROW: ClassVar[dict[str, Any]] = {  # rrc.cvc.uab.es, task 1: train_v1.0.json
        "questionId": 337,
        "question": "what is the date mentioned in this letter?",
        "image": "documents/xnbl0037_1.png",
        "docId": 279,
        "ucsf_document_id": "xnbl0037",
        "ucsf_document_page_no": "1",
        "answers": ["1/8/93"],
        "data_split": "train",
    }

    def test_the_challenges_json(self, tmp_path: Path, picture: Callable[..., Path]) -> None:
        picture("documents/xnbl0037_1.png")
        path = dumped(tmp_path / "train_v1.0.json", {"dataset_name": "docvqa", "data": [self.ROW]})
        sample = only(DocVQA(str(path))).sample
        assert sample.answers == ("1/8/93",)  # a date, not three alternatives
        assert (sample.id, sample.answer_kind, sample.meta["image_id"]) == ("337", "anls", "279")

    def test_hub(self, write_hub: Callable[..., Path]) -> None:
        row = self.ROW | {"questionId": "337", "question_types": ["handwritten"], "image": shade((1, 2, 3))}
        types = dict.fromkeys(
            ("questionId", "question", "ucsf_document_id", "ucsf_document_page_no", "data_split"), TEXT
        )
        types |= {"docId": INT, "question_types": List(TEXT), "answers": List(TEXT), "image": Image()}
        path = write_hub([row, row | {"questionId": "338", "answers": None}], types)
        (first, test), bad = DocVQA(str(path)).read()
        assert bad == []
        assert seen(first) == (1, 2, 3)
        assert test.sample.answers == ()  # of the test split

    def test_infographics(self, tmp_path: Path, picture: Callable[..., Path]) -> None:
        picture("infographicsvqa_images/70302.jpeg")
        row = {  # infographicsVQA_train_v1.0.json
            "questionId": 98313,
            "question": "Which social platform has heavy female audience?",
            "answers": ["pinterest"],
            "image_local_name": "70302.jpeg",
            "image_url": "http://example.org/a.jpg",
            "ocr_output_file": "70302.json",
            "data_split": "train",
        }
        path = dumped(tmp_path / "infographicsVQA_train_v1.0.json", {"data": [row]})
        record = only(InfographicVQA(str(path)))
        assert (record.sample.source, record.sample.answer_kind) == ("infographicvqa", "anls")


class TestGQA:
    ROW: ClassVar[dict[str, Any]] = {
        "imageId": "2354786",
        "question": "Is the sky dark?",
        "answer": "yes",
        "isBalanced": True,
    }

    def test_the_authors_json_is_an_object_by_question_id(self, tmp_path: Path, picture: Callable[..., Path]) -> None:
        picture("images/2354786.jpg")
        path = dumped(tmp_path / "train_balanced_questions.json", {"02930152": self.ROW})
        record = only(GQA(str(path)))
        assert record.sample.id == "02930152"  # with its leading zero
        assert record.sample.answers == ("yes",)

    def test_images_are_a_second_configuration(self, tmp_path: Path, write_hub: Callable[..., Path]) -> None:
        questions = [self.ROW | {"id": str(k), "imageId": image} for k, image in enumerate(("b", "a", "b", "none"))]
        types = dict.fromkeys(("id", "imageId", "question", "answer"), TEXT) | {"isBalanced": Value("bool")}
        write_hub(questions, types, "gqa/train_balanced_instructions/train-00000-of-00001.parquet")
        images = [{"id": name, "image": shade(colour)} for name, colour in (("a", (1, 1, 1)), ("b", (2, 2, 2)))]
        write_hub(images, {"id": TEXT, "image": Image()}, "gqa/train_balanced_images/train-00000-of-00001.parquet")
        records, bad = GQA(str(tmp_path / "gqa"), "train", config="train_balanced_instructions").read()
        assert [seen(record)[0] for record in records] == [2, 1, 2]
        assert records[0].images == records[2].images  # one image, decoded once a batch
        assert "key `imageId`: expected one of 2 images, found 'none'" in bad[0].why
        alone = tmp_path / "gqa/train_balanced_instructions/train-00000-of-00001.parquet"
        given = GQA(str(alone), images=str(tmp_path / "gqa/train_balanced_images"))
        assert [seen(record)[0] for record in given.read()[0]] == [2, 1, 2]


class TestVSR:
    ROW: ClassVar[
        dict[str, Any]
    ] = {  # github.com/cambridgeltl/visual-spatial-reasoning, data/splits/random/train.jsonl
        "image": "000000119360.jpg",
        "image_link": "http://images.cocodataset.org/train2017/000000119360.jpg",
        "caption": "The cat is behind the laptop.",
        "label": 1,
        "relation": "behind",
        "annotator_id": 4,
        "vote_true_validator_id": [1, 2],
        "vote_false_validator_id": [],
    }

    def test_lines(self, tmp_path: Path, picture: Callable[..., Path]) -> None:
        picture("images/000000119360.jpg")
        path = lines(tmp_path / "train.jsonl", [self.ROW, self.ROW | {"label": 0}, self.ROW | {"label": 2}])
        (true, false), bad = VSR(str(path)).read()
        assert '"The cat is behind the laptop."' in true.sample.question
        assert (true.sample.answers, false.sample.answers) == (("yes",), ("no",))
        assert true.sample.id != false.sample.id  # the rows have none
        assert bad[0].why == "key `label`: expected 0 or 1, found 2"

    def test_csv_has_the_label_as_text(self, tmp_path: Path, picture: Callable[..., Path]) -> None:
        picture("000000119360.jpg")
        path = tmp_path / "vsr.csv"
        path.write_text('image,caption,label,relation\n000000119360.jpg,"The cat, it is behind.",0,behind\n')
        record = only(VSR(str(path)))
        assert record.sample.answers == ("no",)
        assert "The cat, it is behind." in record.sample.question

    def test_hub_with_embedded_images(self, write_hub: Callable[..., Path]) -> None:
        path = write_hub(
            [{"image": shade((5, 5, 5)), "caption": "A.", "label": 1}],
            {"image": Image(), "caption": TEXT, "label": INT},
        )
        assert seen(only(VSR(str(path)))) == (5, 5, 5)


class TestRefCOCO:
    def test_hub_boxes_are_corner_width_height(self, write_hub: Callable[..., Path]) -> None:
        row = {
            "question_id": "469306",
            "image": shade((1, 2, 3)),
            "question": "Please carefully observe the area circled in the image and come up with a caption for it.",
            "answer": ["guy petting elephant", "foremost person"],
            "bbox": [10.0, 5.0, 20.0, 15.0],
        }
        types = {"question_id": TEXT, "image": Image(), "question": TEXT, "answer": List(TEXT), "bbox": List(FLOAT)}
        records, bad = RefCOCO(str(write_hub([row], types)), limit=5).read()
        assert bad == []
        assert [record.sample.id for record in records] == ["469306-0", "469306-1"]
        assert all(record.sample.regions == (Region((10.0, 5.0, 30.0, 20.0)),) for record in records)
        assert records[1].sample.question.endswith(": foremost person")
        assert records[1].sample.answers == ()  # the region is the answer
        assert records[0].images == records[1].images

    def test_visual_cots_lines_are_two_corners(self, tmp_path: Path, picture: Callable[..., Path]) -> None:
        # deepcs233/Visual-CoT, llava/eval/REC/REC_refcoco_unc_val.jsonl
        picture("coco/a.jpg")
        row = {"img_path": "coco/a.jpg", "expression": "lady in blue", "bbox": [10.5, 5, 30, 20], "height": 30}
        assert only(RefCOCO(str(lines(tmp_path / "r.jsonl", [row])))).sample.regions == (
            Region((10.5, 5.0, 30.0, 20.0)),
        )


class TestScienceQA:
    ROW: ClassVar[dict[str, Any]] = {
        "question": "Which of these states is farthest north?",
        "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
        "answer": 0,
        "hint": "",
        "task": "closed choice",
        "grade": "grade2",
        "subject": "social science",
        "topic": "geography",
        "category": "Geography",
        "skill": "Read a map: cardinal directions",
        "lecture": "Maps have four cardinal directions.",
        "solution": "To find the answer, look at the compass rose.",
    }

    def test_hub(self, write_hub: Callable[..., Path]) -> None:
        types = dict.fromkeys(self.ROW, TEXT) | {"choices": List(TEXT), "answer": Value("int8"), "image": Image()}
        rows = [self.ROW | {"image": shade((3, 3, 3))}, self.ROW | {"image": None, "hint": "Look.", "answer": 3}]
        (seeing, blind), bad = ScienceQA(str(write_hub(rows, types))).read()
        assert bad == []
        assert (len(seeing.images), len(blind.images)) == (1, 0)
        assert (seeing.sample.answers, blind.sample.answers) == (("A",), ("D",))
        assert blind.sample.question.startswith("Context: Look.\nWhich of")
        assert "(D) Oklahoma" in blind.sample.question  # what is not in the question is not seen
        assert (blind.sample.answer_kind, blind.sample.choices[3]) == ("choice", "Oklahoma")

    def test_the_authors_problems_hold_all_splits(self, tmp_path: Path, picture: Callable[..., Path]) -> None:
        picture("images/test/7/image.png")
        rows = {
            "1": self.ROW | {"split": "train", "image": "image.png"},
            "7": self.ROW | {"split": "test", "image": "image.png"},
            "8": self.ROW | {"split": "test", "image": None},
        }
        path = dumped(tmp_path / "problems.json", rows)
        records, bad = ScienceQA(str(path), split="test").read()
        assert bad == []
        assert [record.sample.id for record in records] == ["7", "8"]
        assert seen(records[0]) == (10, 20, 30)
        assert [r.sample.id for r in ScienceQA(str(path)).read()[0]] == ["1", "7", "8"]

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            ({"choices": []}, "key `choices`: expected at least one, found an empty list"),
            ({"choices": ["a"]}, "key `choices`: expected at least two options"),
            ({"answer": 4}, "key `answer`: expected the index of one of 4 options, found 4"),
            ({"answer": "A"}, "key `answer`: expected a whole number, found str 'A'"),
            ({"answer": -1}, "key `answer`: expected the index of one of 4 options, found -1"),
            ({"question": "  "}, "key `question`: expected a string that is not blank"),
        ],
    )
    def test_bad_rows(self, tmp_path: Path, change: dict[str, Any], why: str) -> None:
        path = dumped(tmp_path / "p.json", {"1": self.ROW | change, "2": self.ROW})
        records, bad = ScienceQA(str(path)).read()
        assert [record.sample.id for record in records] == ["2"]
        assert (bad[0].file, bad[0].row) == (str(path), 1)
        assert bad[0].why.startswith(why)


class TestVisualCoT:
    def test_train_lines(self, tmp_path: Path, picture: Callable[..., Path]) -> None:
        # metadata/*_cot_train.jsonl, as tools/convert_data_to_llava_format.py reads them
        picture("cot/textvqa/a.jpg")
        row = {
            "question": "What does the sign say?",
            "answer": "STOP",
            "image": "a.jpg",
            "width": 40,
            "height": 30,
            "bboxs": [[1, 2, 10, 12], [3, 4, 20, 20]],
            "dataset": "textcap",  # whose images are textvqa's
            "split": "train",
        }
        path = lines(tmp_path / "textcap_cot_train.jsonl", [row, row | {"bboxs": [[9, 9, 9, 12]]}])
        (record,), bad = VisualCoT(str(path)).read()
        assert record.sample.regions == (Region((1.0, 2.0, 10.0, 12.0)), Region((3.0, 4.0, 20.0, 20.0)))
        assert record.images[0].exists()
        assert bad[0].why.startswith("key `bboxs[0]`: expected a box of some size")

    def test_train_lines_without_folders(self, tmp_path: Path, picture: Callable[..., Path]) -> None:
        picture("2354786.jpg")
        row = {"question": "Dark?", "answer": "Yes", "image": "2354786.jpg", "bboxs": [[1, 2, 3, 4]], "dataset": "gqa"}
        assert only(VisualCoT(str(lines(tmp_path / "t.jsonl", [row])))).sample.answers == ("Yes",)

    def test_detection_lines(self, tmp_path: Path, picture: Callable[..., Path]) -> None:
        picture("cot/vsr/000000015391.jpg", (640, 480))
        row = {  # viscot_benchmark/benchmark_det/vsr.jsonl
            "img_path": "cot/vsr/000000015391.jpg",
            "expression": "Is the bear facing the person?",
            "bbox": [237.3, 108.61, 413.12, 359.94],
            "height": 480,
            "width": 640,
            "question_id": 907,
            "split": "val",
        }
        record = only(VisualCoT(str(lines(tmp_path / "vsr.jsonl", [row]))))
        assert record.sample.regions == (Region((237.3, 108.61, 413.12, 359.94)),)
        assert (record.sample.id, record.sample.answers) == ("907", ())

    def test_the_box_of_a_conversation_is_of_the_padded_square_and_not_taken(
        self, tmp_path: Path, picture: Callable[..., Path]
    ) -> None:
        # viscot_benchmark/benchmark/sroie.json, question 684. The image is 619 x 2173: its box [223, 415, 357, 442] in
        # the square of 2173, shifted by (2173 - 619) // 2 = 777, is [0.460, 0.191, 0.522, 0.203].
        box, side, shift = (223, 415, 357, 442), 2173, (2173 - 619) // 2
        written = [round(c / side, 3) for c in (box[0] + shift, box[1], box[2] + shift, box[3])]
        assert written == [0.46, 0.191, 0.522, 0.203]
        picture("cot/sroie/X51005337867.jpg", (619, 2173))
        row = {
            "dataset": "sroie",
            "split": "val",
            "question_id": 684,
            "image": ["cot/sroie/X51005337867.jpg", "cot/sroie/X51005337867.jpg###[223, 415, 357, 442]"],
            "conversations": [
                {
                    "from": "human",
                    "value": "<image>\nWhat is the address in the invoice shown in the picture? Please provide the "
                    "bounding box coordinate of the region that can help you answer the question better.",
                },
                {"from": "gpt", "value": "[0.460, 0.191, 0.522, 0.203]"},
                {"from": "human", "value": "<image>"},
                {"from": "gpt", "value": "SRI RAMPAI"},
            ],
        }
        record = only(VisualCoT(str(dumped(tmp_path / "sroie.json", [row]))))
        assert record.sample.regions == (Region((223.0, 415.0, 357.0, 442.0)),)
        assert record.sample.question == "What is the address in the invoice shown in the picture?"
        assert record.sample.answers == ("SRI RAMPAI",)
        (one,), bad = VisualCoT(
            str(dumped(tmp_path / "bad.json", [row, row | {"question_id": 1, "image": ["a.jpg", "a.jpg###[1, 2"]}]))
        ).read()
        assert "expected [x1, y1, x2, y2] after ###" in bad[0].why
        assert one.sample.id == "684"


def test_a_data_set_of_another_benchmark_is_named(tmp_path: Path, write_hub: Callable[..., Path]) -> None:
    path = dumped(tmp_path / "problems.json", {"1": TestScienceQA.ROW, "2": TestScienceQA.ROW})
    with pytest.raises(DataError) as error:
        DocVQA(str(path)).read()
    assert str(error.value).startswith(f"{path}: expected rows of DocVQA, found no usable row among 2 (row 1: key `qu")
    columns = write_hub([{"image": shade((1, 2, 3)), "label": 3}], {"image": Image(), "label": INT})
    with pytest.raises(DataError, match=r"expected rows of TextVQA.*key `question_id`: missing \(found image, label\)"):
        TextVQA(str(columns)).read()


def test_what_is_no_data_set_ends_in_one_sentence(tmp_path: Path) -> None:
    for path in ("somebody/absent-data-set", "absent", "/no/such/folder", "a/b/c/d", str(tmp_path)):
        with pytest.raises(DataError) as error:
            TextVQA(path, split="train").read()
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)
        assert str(error.value).endswith(".")


def test_a_folder_with_several_splits_asks_for_one(tmp_path: Path, write_hub: Callable[..., Path]) -> None:
    types = {"image": Image(), "caption": TEXT, "label": INT}
    for split, label in (("train", 1), ("test", 0)):
        row = {"image": shade((label, 5, 5)), "caption": "A.", "label": label}
        write_hub([row], types, f"vsr/data/{split}-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"vsr: it has the splits train, test: say which by `split`\."):
        VSR(str(tmp_path / "vsr")).read()
    assert only(VSR(str(tmp_path / "vsr"), split="test")).sample.answers == ("no",)
    with pytest.raises(DataError, match="Unknown split"):
        VSR(str(tmp_path / "vsr"), split="dev").read()


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"image": [shade((7, 7, 7))], "caption": ["A."], "label": [1]}).save_to_disk(tmp_path / "saved")
    assert seen(only(VSR(str(tmp_path / "saved")))) == (7, 7, 7)


def test_embedded_images_stay_on_disk_until_they_are_needed(
    write_hub: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    types = {"image": Image(), "caption": TEXT, "label": INT}
    path = write_hub([{"image": shade((k, 5, 5)), "caption": f"{k}.", "label": 1} for k in range(3)], types)
    monkeypatch.setattr("datamodules.arrow.ArrowRows.cell", lambda *_: pytest.fail("an image was read"))
    records, _ = VSR(str(path)).read()
    assert [type(record.images[0]) for record in records] == [StoredImage] * 3
    with pytest.raises(pytest.fail.Exception, match="was read"):
        records[0].images[0].load()


def test_limits_and_bad_arguments(tmp_path: Path, picture: Callable[..., Path]) -> None:
    picture("000000119360.jpg")
    path = lines(tmp_path / "v.jsonl", [TestVSR.ROW] * 5)
    records, _ = VSR(str(path), limit=2).read()
    assert len(records) == 2
    assert isinstance(records[0].sample, Sample)
    assert [record.row for record in records[::-1]] == [2, 1]
    with pytest.raises(ValueError, match="Expected `limit` to be at least 1 but got 0"):
        VSR(str(path), limit=0)


@pytest.mark.parametrize("name", ["../000000119360.jpg", "/etc/passwd", "C:\\a.jpg", ""])
def test_images_stay_below_the_root(tmp_path: Path, name: str) -> None:
    path = lines(tmp_path / "v.jsonl", [TestVSR.ROW, TestVSR.ROW | {"image": name}])
    records, bad = VSR(str(path)).read()
    assert (len(records), len(bad)) == (1, 1)
    assert bad[0].row == 2
