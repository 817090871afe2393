"""``train.py rescore``: JSON on stdout, and one sentence for every file that cannot be scored."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import train

ROW = {"index": 0, "text": "Which? (A) red (B) blue", "label": "B", "category": "direct_attributes", "response": "B"}
LINE = json.dumps(ROW)


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        train.main(["rescore", *args])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert not captured.out
    return captured.err


def test_json_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "v.jsonl").write_text(LINE + "\n" + json.dumps({**ROW, "index": 1, "response": "A"}) + "\n\n")

    train.main(["rescore", "--benchmark", "vstar", "--predictions", str(tmp_path / "v.jsonl")])

    assert json.loads(capsys.readouterr().out) == {
        "benchmark": "vstar", "n": 2, "accuracy": 0.5, "unparsed": 0, "breakdown": {"direct_attributes": 0.5},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b"\xef\xbb\xbf" + LINE.encode(), "byte order mark"),
        (LINE.encode() + b'\n{"index": 1, "response": "\xff"}', "row 2 is not"),
        (LINE.encode() + b"\n" + LINE[:-1].encode() + b",}", "row 2 has none"),  # a trailing comma
        (b'[\n{"index": 0},\n]', "row [23] has none"),
        (LINE.encode() + b"\n" + LINE.encode(), "every id once, but got '0' in .*row 1 and in .*row 2"),
        (b'{"1": {"response": "A"}, "1": {"response": "B"}}', "row '1', but it is there twice"),
        (LINE.replace('"response": "B"', '"response": 2').encode(), "`response` of .*row 1 to be a text, but got 2"),
        (LINE.replace('"label": "B"', '"label": 1').encode(), "row 1 to be a text, but got 1"),
        (LINE.replace('"response"', '"answer"').encode(), "row 1 to have `response`"),
        (b'{"1": {"extraction": "A", "pid": "1"}}', "row 1 to have `Options` or `text`"),  # of another benchmark
        (b"[]", "it has no rows"),
        (b"[1]", "row 1 to be an object, but got 1"),
        (b"3", "to hold rows"),
        (b'{"index": 1.5, "text": "?"}', "id of .*row 1"),
        (b"<html>not found</html>", "row 1 has none"),
    ],
)
def test_bad_files_end_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, words: str
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)

    said = refused(["--benchmark=vstar", f"--predictions={tmp_path / 'bad.jsonl'}"], capsys)

    assert "bad.jsonl" in said
    assert re.search(words, said), said
    assert said.startswith("error: Expected ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ["scienceqa", "mathvista", "vstar", "mmvp", "pope", "mme", "mmmu", "hallusionbench"])
def test_every_benchmark_refuses_the_file_of_another(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text(json.dumps([{"question_id": "1", "caption": "a dog"}]))
    args = [f"--benchmark={name}", f"--predictions={tmp_path / 'other.json'}"]

    assert refused(args, capsys).startswith("error: Expected ")


def test_a_question_that_is_not_annotated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.json").write_text('{"validation_Art_1": "A"}')
    (tmp_path / "a.json").write_text('{"validation_Art_2": {"question_type": "multiple-choice", "ground_truth": "A"}}')

    said = refused(["--benchmark=mmmu", f"--predictions={tmp_path}/p.json", f"--annotations={tmp_path}/a.json"], capsys)

    assert "p.json" in said
    assert "a.json" in said


def test_no_such_file_and_no_such_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such file" in refused(["--benchmark=pope", f"--predictions={tmp_path / 'none.json'}"], capsys)
    assert "scienceqa, mathvista" in refused(["--benchmark=popes", "--predictions=x"], capsys)


def test_several_modes_need_a_greedy_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"id": "a", "question": ROW["text"], "answers": ["B"], "answer": "blue", "stop": "end"}
    lines = [json.dumps({**own, "mode": mode}) for mode in ("sampled", "warm")]
    file = tmp_path / "predictions.jsonl"
    args = ["--benchmark=vstar", f"--predictions={file}"]
    file.write_text("\n".join(lines))
    assert "['sampled', 'warm']" in refused(args, capsys)

    file.write_text(lines[0])
    train.main(["rescore", *args])

    assert json.loads(capsys.readouterr().out)["accuracy"] == 1
