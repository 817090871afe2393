"""A corpus of receipts and scene texts, built against a server that writes and judges, and makes trouble."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.vlir.__main__ import main, parser
from datamodules.vlir.build import Build, build
from datamodules.vlir.corpus import Splits
from datamodules.vlir.endpoint import Endpoint
from datamodules.vlir.reader import read_records
from datamodules.vlir.schema import check_boxes
from modules.functional.grammar import well_formed
from tests.vlir_service import DATA, KEY, Service, rationale, replies_in, serving, settings

pytest.importorskip("imagehash")

QUESTIONS = [json.loads(line) for line in (DATA / "documents" / "questions.jsonl").read_text().splitlines()]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("VLIR_KEY", KEY)
    with serving(Service()) as found:
        yield found


def plan(service: Service, out: Path, **changes: Any) -> Build:
    """A build as YAML describes it."""
    config = out.parent / f"{out.name}.yaml"
    config.write_text(yaml.safe_dump(settings(service, out, **changes)))
    line = parser()
    found = line.instantiate(line.parse_args(["build", "--config", str(config)])).build
    return Build(**{key: value for key, value in vars(found).items() if key != "config"})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def samples(out: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for name in ("train", "val") for row in lines(out / f"{name}.jsonl")}


def width(prompt: str) -> int:
    """Of the crop that a prompt is about."""
    found = re.search(r"(\d+) x \d+ pixels", prompt)
    assert found is not None
    return int(found[1])


def source(path: Path, root: Path) -> dict[str, Any]:
    return {"class_path": "VLIR", "init_args": {"path": str(path), "root": str(root)}}


def test_a_corpus_is_built_although_everything_fails_now_and_then(service: Service, tmp_path: Path) -> None:
    def trouble(digest: str, nth: int) -> Any:
        return [0.0, (500, {}), (429, {"Retry-After": "0.2"}), 0.2][int(digest, 16) % 4] if nth == 0 else 0.0

    service.trouble = trouble
    out = tmp_path / "corpus"
    assert build(plan(service, out))
    built = samples(out)
    assert set(built) == {row["id"] for row in QUESTIONS}
    assert len(service.asked) == len(service.answered) == replies_in(out) == 3 * len(QUESTIONS)
    assert set(service.answered.values()) == {1}
    assert max(service.asked.values()) == 2  # some had to be asked again
    assert service.keys == {f"Bearer {KEY}"}
    for row in QUESTIONS:
        steps = built[row["id"]]["rationale"]
        assert well_formed("".join(step["text"] for step in steps))
        # the teacher copied the annotated box in whole pixels of the image it was shown
        assert steps[0]["region"]["box"] == pytest.approx(row["regions"][0]["box"], abs=1.0)
        assert steps[1]["text"].endswith(f"<answer>{row['answers'][0]}</answer>")
    for name in ("train", "val"):
        records, bad = read_records(out / f"{name}.jsonl")
        assert not bad
        for record in records[:3]:
            check_boxes(replace(record.sample, images=tuple(image.load() for image in record.images)))
    images = {name: {row["image"] for row in lines(out / f"{name}.jsonl")} for name in ("train", "val")}
    assert images["train"]
    assert not images["train"] & images["val"]
    cost = json.loads((out / "corpus.json").read_text())["cost"]["teacher"]
    assert cost["cost"] == pytest.approx(len(QUESTIONS) * (1000 * 2.0 + 100 * 10.0) / 1e6)
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_what_is_sent_is_what_the_prompt_says(service: Service, tmp_path: Path) -> None:
    assert build(plan(service, tmp_path / "corpus", limit=6))
    shown = [(size, prompt) for size, prompt in service.sizes if "The image is" in prompt]
    crops = [(size, prompt) for size, prompt in service.sizes if "was cut out" in prompt]
    assert len(shown) == len(crops) == 6
    for (width, height), prompt in shown:
        assert f"The image is {width} pixels wide and {height} pixels high." in prompt
        assert width % 28 == height % 28 == 0
    for (width, height), prompt in crops:
        told = re.search(r"(\d+) x (\d+) pixels", prompt)
        assert told is not None
        assert width / height == pytest.approx(int(told[1]) / int(told[2]), rel=0.6)  # but for the grid of 28
    judged = [prompt for prompt in service.prompts if "lines of dashes" in prompt]
    assert len(judged) == 6
    assert all("[crop 1]" in prompt and "bbox_2d" not in prompt for prompt in judged)


def test_every_filter_rejects_what_it_is_for_and_says_why(service: Service, tmp_path: Path) -> None:
    """By the answer: what the teacher or the judges do wrong with it."""
    good = rationale

    def write(answer: str, box: str, nth: int) -> str:
        return {
            "Safeway": good("Walmart", box),
            "703-777-5833": good(answer, ""),
            "$60.44": good(answer, '{"bbox_2d": [1, 2, 3]}'),
            "$4.48": good(answer, '{"bbox_2d": [0, 0, 20, 3]}'),
            "$8.99": good(answer, f"{box} and once more {box}"),
            "EXIT": "I am sorry, I cannot help with that.",
            "Carpark": good(answer, f"{box} one {box} two {box} three {box} four {box}"),
            "CAUTION": good(answer, box) if nth else "at first nothing",
        }.get(answer, good(answer, box))

    service.write = write
    service.recognise = lambda prompt: "Words.\nyes" if width(prompt) < 250 else "It is blurred.\n0"
    service.cohere = lambda prompt: "Step two contradicts step one.\n0" if "fusionopolis" in prompt else "1"
    out = tmp_path / "corpus"
    assert build(plan(service, out))
    rejected = lines(out / "rejected.jsonl")
    reasons: dict[str, set[str]] = {}
    for row in rejected:
        reasons.setdefault(row["reason"], set()).add(row["id"])
    by_answer = {row["answers"][0]: row["id"] for row in QUESTIONS}
    expected = {
        "wrong_answer": {by_answer["Safeway"]},
        "few_crops": {by_answer["703-777-5833"]},
        "bad_box": {by_answer["$60.44"]},
        "box_size": {by_answer["$4.48"]},
        "repeated_box": {by_answer["$8.99"]},
        "malformed": {by_answer["EXIT"], by_answer["CAUTION"]},
        "many_crops": {by_answer["Carpark"]},
        "semantic_unit": {by_answer["Dulce de Leche"]},
        "incoherent": {by_answer["fusionopolis"]},
    }
    assert reasons == expected
    assert by_answer["CAUTION"] in samples(out)  # its second draft
    assert {row["id"] for row in rejected if row["passed_later"]} == {by_answer["CAUTION"]}
    lost = set.union(*reasons.values()) - {by_answer["CAUTION"]}
    assert set(samples(out)) == {row["id"] for row in QUESTIONS} - lost
    sentence = next(row for row in rejected if row["reason"] == "wrong_answer")
    assert sentence["detail"] == "'Walmart' is 0 by anls, right is 'Safeway'"
    assert "<answer>Walmart</answer>" in sentence["text"]


def test_images_that_are_in_a_benchmark_or_there_already_are_left_out_before_anybody_is_paid(
    service: Service, tmp_path: Path
) -> None:
    benchmark, more = tmp_path / "benchmark" / "deep", tmp_path / "more"
    benchmark.mkdir(parents=True)
    more.mkdir()
    with Image.open(DATA / "documents" / "icdar15_img_3.jpg") as image:
        image.resize((320, 180)).save(benchmark / "q.png")
    with Image.open(DATA / "documents" / "wildreceipt_2.jpg") as image:
        image.convert("RGB").save(more / "again.jpg", quality=50)
    (more / "same.jpg").write_bytes((DATA / "documents" / "icdar15_img_8.jpg").read_bytes())
    (more / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    rows = [
        {"id": "receipt-04", "image": "again.jpg", "question": "How many items?", "answers": ["4"], "source": "x"},
        {"id": "same", "image": "same.jpg", "question": "Who pays?", "answers": ["nobody"], "source": "x"},
        {"id": "twice", "image": "same.jpg", "question": " Who PAYS?", "answers": ["me"], "source": "x"},
        {"id": "broken", "image": "broken.jpg", "question": "What?", "answers": ["that"], "source": "x"},
        {"id": "unknown", "image": "same.jpg", "question": "Why?", "answers": [], "source": "x"},
        {"id": "blind", "images": [], "question": "Why?", "answers": ["so"], "source": "x"},
        {"id": "bad"},
    ]
    for row in rows[:2]:
        row["regions"] = [{"box": [10, 10, 90, 60]}]
    (more / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "corpus"
    both = [source(DATA / "documents" / "questions.jsonl", DATA), source(more / "rows.jsonl", more)]
    images = {"benchmark_folders": [str(tmp_path / "benchmark")]}
    assert build(plan(service, out, sources=both, images=images))
    rejected = {row["id"]: row for row in lines(out / "rejected.jsonl")}
    assert {key: row["reason"] for key, row in rejected.items()} == {
        "scene-12": "contaminated",
        "x-receipt-04": "near_duplicate",  # its id was taken
        "twice": "duplicate_question",
        "broken": "bad_image",
        "unknown": "no_answer",
        "blind": "no_image",
        "row 7": "bad_row",
    }
    assert re.search(r"icdar15_img_3.jpg: \d+ of 256 bits differ from .*q.png", rejected["scene-12"]["detail"])
    assert not any("How many items" in prompt or "wall on the left" in prompt for prompt in service.prompts)
    built = samples(out)
    assert built["same"]["image"] == built["scene-15"]["image"]  # one image, byte for byte
    split = {row["id"]: name for name in ("train", "val") for row in lines(out / f"{name}.jsonl")}
    assert split["same"] == split["scene-15"]


def test_who_gets_no_reply_is_asked_again_by_the_next_run_and_nobody_else(service: Service, tmp_path: Path) -> None:
    silent: set[str] = set()

    def trouble(digest: str, nth: int) -> Any:
        if len(silent) < 2:
            silent.add(digest)
        return (503, {}) if digest in silent else 0.0

    service.trouble = trouble
    out = tmp_path / "corpus"
    assert not build(plan(service, out, limit=5))
    rejected = [row for row in lines(out / "rejected.jsonl") if row["reason"] == "no_reply"]
    assert len(rejected) == 2
    assert "HTTP 503" in rejected[0]["detail"]
    assert all(service.asked[digest] == 5 for digest in silent)  # `attempts`
    service.trouble = lambda digest, nth: 0.0
    before = service.asked.copy()
    assert build(plan(service, out, limit=5))
    assert set(service.asked - before) >= silent
    assert set(service.answered.values()) == {1}
    assert not lines(out / "rejected.jsonl")
    assert len(samples(out)) == 5


def test_a_prompt_that_is_edited_is_paid_for_and_nothing_else(service: Service, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    assert build(plan(service, out, limit=5))
    assert sum(service.answered.values()) == 15
    assert build(plan(service, out, limit=5))
    assert sum(service.answered.values()) == 15
    changed = settings(service, out)["checks"]
    edited = tmp_path / "coherence.txt"
    edited.write_text("Is this good? $text\nWrite 1 or 0.")
    changed[1]["init_args"]["prompt"] = str(edited)
    assert build(plan(service, out, checks=changed, limit=5))
    assert sum(service.answered.values()) == 20
    assert build(plan(service, out, boxes={"min_side": 5000.0}, limit=5))  # now every second draft is wanted
    assert sum(service.answered.values()) == 25


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"key": None}, "hold VLIR_KEY"),
        ({"status": 401}, "HTTP 401"),
        ({"status": 500}, "in a row got no reply"),
        ({"sources": []}, "Expected `sources` to name at least one"),
        ({"prompt": "Question: $qestion"}, "got \\$qestion"),
        ({"prompt": "Question: $question"}, "to hold \\$space, \\$size"),
        ({"drafts": 2, "options": {"temperature": 0}}, "At temperature 0"),
        ({"splits": {"shares": {"train": 0.5}}}, "to sum to 1"),
    ],
)
def test_mistakes_end_in_one_sentence(
    service: Service,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    said: str,
) -> None:
    given = settings(service, tmp_path / "corpus", patience=3)
    teacher = given["teacher"]["init_args"]
    teacher["endpoint"] |= {"attempts": 1, "options": change.get("options", {})}
    if "key" in change:
        monkeypatch.delenv("VLIR_KEY")
    if "status" in change:
        service.trouble = lambda digest, nth: (change["status"], {})
    if "prompt" in change:
        (tmp_path / "p.txt").write_text(change["prompt"])
        teacher["prompt"] = str(tmp_path / "p.txt")
    given |= {key: change[key] for key in ("sources", "splits") if key in change}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(given))
    try:
        code: object = main(["build", "--config", str(tmp_path / "c.yaml")])
    except SystemExit as end:
        code = end.code
    assert code == 2
    error = capsys.readouterr().err
    assert re.search(said, error), error
    assert "Traceback" not in error
    assert not (tmp_path / "corpus" / "corpus.json").exists()


def test_the_report_has_the_corpus_s_numbers_in_the_page_and_in_tensorboard(service: Service, tmp_path: Path) -> None:
    service.write = lambda answer, box, nth: (
        rationale("<script>alert(1)</script>", box) if answer == "EXIT" else rationale(answer, box)
    )
    out = tmp_path / "corpus"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings(service, out)))
    assert main(["build", "--config", str(tmp_path / "c.yaml")]) == 0
    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page  # among what was rejected
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)  # nothing is fetched
    assert page.count('<div class="sample">') == len(QUESTIONS) - 1
    assert page.count('alt="crop 1"') == len(QUESTIONS) - 1
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    scalars = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    built = list(samples(out).values())
    shares = []
    for row in built:
        x1, y1, x2, y2 = row["rationale"][0]["region"]["box"]
        with Image.open(out / row["image"]) as image:
            shares.append((x2 - x1) * (y2 - y1) / (image.width * image.height))
    assert scalars["vlir/samples"] == len(QUESTIONS) - 1
    assert scalars["vlir/crop_area_share"] == pytest.approx(math.fsum(shares) / len(shares))
    assert scalars["vlir/yield"] == pytest.approx((len(QUESTIONS) - 1) / len(QUESTIONS))
    assert scalars["vlir/rejected/wrong_answer"] == 2  # both drafts
    assert scalars["vlir/cost"] == pytest.approx((len(QUESTIONS) + 1) * 0.003)  # prices are the teacher's alone
    assert len([name for name in events.Tags()["images"] if name.startswith("vlir/sample/")]) == 8
    assert "vlir/crop_width" in events.Tags()["histograms"]
    assert main(["report", "--data", str(out / "train.jsonl"), "--out", str(tmp_path / "r"), "--samples", "2"]) == 0
    assert (tmp_path / "r" / "report.html").read_text().count('<div class="sample">') == 2


def test_splits_are_by_image_stable_and_of_the_size_that_was_asked_for() -> None:
    splits = Splits({"train": 0.8, "val": 0.15, "test": 0.05})
    digests = [hashlib.sha256(str(k).encode()).hexdigest() for k in range(4000)]
    alone = splits.of([[digest] for digest in digests])
    assert alone.count("train") / 4000 == pytest.approx(0.8, abs=0.03)  # five standard deviations
    assert alone.count("test") / 4000 == pytest.approx(0.05, abs=0.02)
    assert splits.of([[digest] for digest in digests[:50]]) == alone[:50]
    assert Splits({"train": 0.8, "val": 0.15, "test": 0.05}, seed=1).of([[d] for d in digests]) != alone
    chain = splits.of([[digests[k], digests[k + 1]] for k in range(100)] + [[digests[100]]])
    assert len(set(chain)) == 1  # each shares an image with the next


def test_prices_and_limits_that_mean_nothing_are_refused() -> None:
    for option in ("requests_per_minute", "tokens_per_minute", "input_price"):
        with pytest.raises(ValueError, match=f"`{option}`"):
            Endpoint("m", "http://x", **{option: -1})
