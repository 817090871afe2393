"""Examples are drawn by seed, from outside of what is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from callbacks.few_shot import FewShot
from datamodules.module import VLIRDataModule
from modules.evaluation.results import read_run
from modules.policy import PolicyError
from tests.evaluating import GREEDY, Mortal, evaluate, write_questions

ONLY_GREEDY: dict[str, Any] = {"evaluations": {"greedy": GREEDY}, "samples": {}}


def renamed(file: Path, count: int, prefix: str, seed: int) -> Path:
    """Questions with ids of their own."""
    write_questions(file, count, seed)
    file.write_text(file.read_text().replace('"id": "sample-', f'"id": "{prefix}-'))
    return file


def shots(file: Path, count: int = 2, seed: int = 0) -> FewShot:
    return FewShot(VLIRDataModule(train=str(file)), count=count, seed=seed)


def test_the_same_examples_stand_before_every_question(tmp_path: Path) -> None:
    data, pool = write_questions(tmp_path / "test.jsonl", 4), renamed(tmp_path / "pool.jsonl", 6, "pool", seed=7)
    drawn = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        callback, engine = shots(pool, seed=seed), Mortal()
        evaluate(tmp_path / name, data, engine, callback, **ONLY_GREEDY)
        drawn.append([example.id for example in callback.examples])
        assert all(example.images and example.rationale for example in callback.examples)
    assert drawn[0] == drawn[1] != drawn[2]
    evaluate(tmp_path / "zero", data, **ONLY_GREEDY)
    texts = [[line["text"] for line in read_run(tmp_path / name)] for name in ("a", "b", "zero")]
    assert texts[0] == texts[1] != texts[2]


def test_other_examples_are_another_evaluation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, pool = write_questions(tmp_path / "test.jsonl", 2), renamed(tmp_path / "pool.jsonl", 6, "pool", seed=7)
    evaluate(tmp_path / "run", data, None, shots(pool), **ONLY_GREEDY)
    engine = Mortal()
    evaluate(tmp_path / "run", data, engine, shots(pool, seed=1), **ONLY_GREEDY)
    assert len(engine.asked) == 2
    assert "(changed: examples)" in caplog.text


def test_an_example_whose_id_or_image_is_asked_about_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_questions(tmp_path / "test.jsonl", 4)
    same_ids = write_questions(tmp_path / "ids" / "pool.jsonl", 6, seed=7)  # sample-4 and -5 are not asked
    callback = shots(same_ids)
    evaluate(tmp_path / "a", data, None, callback, **ONLY_GREEDY)
    assert {example.id for example in callback.examples} == {"sample-4", "sample-5"}
    assert "its id" in caplog.text
    same_images = renamed(tmp_path / "images-too" / "pool.jsonl", 6, "pool", seed=0)
    callback = shots(same_images)
    evaluate(tmp_path / "b", data, None, callback, **ONLY_GREEDY)
    assert {example.id for example in callback.examples} == {"pool-4", "pool-5"}
    assert "its image" in caplog.text
    with pytest.raises(PolicyError, match=r"Expected 3 examples .* but got 2 of 6; refused: .*\(its image\)"):
        evaluate(tmp_path / "c", data, None, shots(same_images, count=3), **ONLY_GREEDY)


def test_a_copy_in_another_format_is_found_when_it_comes(tmp_path: Path) -> None:
    data = write_questions(tmp_path / "test.jsonl", 2)
    pool = renamed(tmp_path / "copies" / "pool.jsonl", 2, "pool", seed=0)
    for image in (tmp_path / "copies" / "images").glob("*.png"):
        Image.open(image).save(image, compress_level=0)  # other bytes, the same pixels
    with pytest.raises(PolicyError, match=r"'pool-[01]' shows that of 'sample-0'"):
        evaluate(tmp_path / "run", data, None, shots(pool, count=1), **ONLY_GREEDY)
