"""Accuracy by kind of answer, and math-verify in a process that may be killed."""

from __future__ import annotations

import math
import multiprocessing
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.rewards import Accuracy
from modules.rewards.mathematics import MathWorker, MathWorkerError
from tests.test_rewards import say, trajectory


def said(answer: str, *right: str, source: str = "", choices: tuple[str, ...] = ()) -> Any:
    played = trajectory(say(f"<think>x</think><answer>{answer}</answer>"), answers=right)
    return replace(played, sample=replace(played.sample, source=source, choices=choices))


@pytest.fixture(scope="module")
def worker() -> Iterator[MathWorker]:
    found = MathWorker(timeout=60.0)
    yield found
    found.close()


def test_the_kind_is_named_or_decided_by_the_sample() -> None:
    near = said("10.2", "10", source="charts")
    assert Accuracy()(near) == 0
    assert Accuracy(kind="number")(near) == 1
    assert Accuracy(kind="number", tolerance=0.01)(near) == 0
    assert Accuracy(by_source={"Charts": "number"})(near) == 1  # case does not count
    assert Accuracy(kind="exact", by_source={"charts": "number"})(near) == 1  # the source goes first
    assert Accuracy(by_source={"tables": "number"})(near) == 0
    assert Accuracy()(said("10.2", "10", source="ChartQA")) == 1
    typo = said("hello worl", "hello world")
    assert Accuracy(kind="anls")(typo) == pytest.approx(10 / 11)
    assert Accuracy(kind="anls", threshold=0.95)(typo) == 0
    assert Accuracy()(said("B", "blue", choices=("red", "blue"))) == 1
    assert Accuracy()(said("(B)", "B")) == 1
    assert Accuracy()(said("Yes, of course.", "yes")) == 1
    assert Accuracy()(said("2 dogs", "two dogs", source="textvqa")) == 1


def test_a_sample_may_say_how_it_is_judged() -> None:
    near = said("10.2", "10", source="charts")
    own = replace(near, sample=replace(near.sample, answer_kind="number"))
    assert Accuracy()(own) == 1
    assert Accuracy(kind="exact")(own) == 1  # it goes before `kind`
    assert Accuracy(by_source={"charts": "exact"})(own) == 0  # and after what is said of its data set
    assert Accuracy(by_source={"tables": "exact"})(own) == 1
    typo = said("hello worl", "hello world", source="textvqa")  # a source with a kind of its own
    assert Accuracy()(replace(typo, sample=replace(typo.sample, answer_kind="anls"))) == pytest.approx(10 / 11)
    listed = said("blue", "B", choices=("red", "blue"))
    assert Accuracy()(listed) == 1
    assert Accuracy()(replace(listed, sample=replace(listed.sample, answer_kind="exact"))) == 0


def test_what_is_not_known_or_not_said() -> None:
    assert math.isnan(Accuracy()(trajectory(say("<answer>7</answer>"), answers=())))
    assert Accuracy()(trajectory(say(""))) == 0


@pytest.mark.parametrize("options", [{"tolerance": -0.1}, {"tolerance": math.nan}, {"threshold": 1.5}])
def test_meaningless_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        Accuracy(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("0.5", r"\frac{1}{2}", True),
        ("1/2", r"$\frac{1}{2}$", True),
        (r"\boxed{12}", "12", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("(x-1)^2", "x^2+2x+1", False),
        ("12 cm", "12", True),
        (r"\sqrt2", r"\sqrt{2}", True),
        ("1.41", r"\sqrt{2}", False),
        (r"\{2, 1\}", r"\{1, 2\}", True),
        ("12/05/2022", "12/05/2021", False),
        ("12", "12/05/2021", False),
        ("3", "3/4", False),
        ("7", "8", False),
        ("$5", "5", True),
        ("", "8", False),
        ("", "", False),
        ("no formula at all", "8", False),
    ],
)
def test_mathematical_answers(worker: MathWorker, prediction: str, answer: str, right: bool) -> None:
    assert worker.equal(prediction, answer) is right


def test_the_math_kind_takes_alternatives() -> None:
    assert Accuracy(by_source={"MMK12": "math"})(said("0.5", "7", r"\frac{1}{2}", source="MMK12")) == 1
    assert Accuracy(kind="math")(said("0.5", "7", "8")) == 0
    assert Accuracy()(said("0.25", r"\frac{1}{2}")) == 0


def test_an_algebra_that_does_not_start_leaves_only_its_answers_unjudged(monkeypatch: pytest.MonkeyPatch) -> None:
    from modules.rewards import accuracy

    def broken() -> None:
        raise MathWorkerError("no start")

    worker = MathWorker()
    monkeypatch.setattr(worker, "_start", broken)
    monkeypatch.setattr(accuracy, "WORKER", worker)
    values = Accuracy(by_source={"MMK12": "math"}).batch(
        [said("7", "8", source="MMK12"), said("7", "7", source="MMK12"), said("7", "8")]
    )
    assert math.isnan(values[0])
    assert values[1:] == [1, 0]


def test_what_takes_for_ever_is_given_up_and_the_next_is_answered() -> None:
    worker = MathWorker(timeout=60.0)
    assert worker.equal("2", "2.0")
    first = worker._process
    worker.timeout = 1.0
    begin = time.monotonic()
    assert not worker.equal("9^{9^{9^{9^{9}}}}", "9^{9^{9^{9^{8}}}}")
    assert not worker.equal("(" * 400, "7" * 900)
    assert time.monotonic() - begin < 60
    worker.timeout = 60.0
    assert worker.equal("3", "3.0")
    assert first is not None
    assert first.poll() is not None  # it was killed, and another one answered
    worker.close()
    assert worker.equal("4", "4.0")  # it starts anew
    worker.close()


def test_it_may_die_between_questions(worker: MathWorker) -> None:
    assert worker.equal("2", "2.0")
    assert worker._process is not None
    worker._process.kill()
    worker._process.wait()
    assert worker.equal("3", "3.0")


def test_threads_may_share_it(worker: MathWorker) -> None:
    found: dict[int, bool] = {}

    def ask(k: int) -> None:
        found[k] = worker.equal(f"{k}.0", str(k if k % 2 else k + 1))

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {k: bool(k % 2) for k in range(8)}


class Graded(torch.utils.data.Dataset[float]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> float:
        assert multiprocessing.current_process().daemon  # may have no children by multiprocessing
        return Accuracy(kind="math")(said("0.5", r"\frac{1}{2}" if index else "7"))


def test_workers_of_a_data_loader_have_their_own() -> None:
    assert Accuracy(kind="math")(said("0.5", "1/2")) == 1  # this process has one already
    loader = torch.utils.data.DataLoader(Graded(), batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert list(loader) == [0, 1]
    assert Accuracy(kind="math")(said("0.5", "1/2")) == 1  # and keeps it


@given(st.text(max_size=40))
@settings(max_examples=40, deadline=None)
def test_no_text_breaks_the_math_kind(worker: MathWorker, text: str) -> None:
    assert worker.equal(text, "7") in (True, False)
    assert worker._process is not None
    assert worker._process.poll() is None


def test_texts_that_are_too_long_are_not_compared() -> None:
    worker = MathWorker()
    assert not worker.equal("1+" * 1000 + "1", "1001")
    assert worker._process is None
