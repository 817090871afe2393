"""Killed at any moment and run again: no sample is lost, and nothing that was answered is paid for twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.vlir_service import DATA, KEY, Service, rationale, replies_in, run, serving, settings

pytest.importorskip("imagehash")

WORKERS = 4
QUESTIONS = 12
FILES = ("train.jsonl", "val.jsonl", "rejected.jsonl", "corpus.json")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("VLIR_KEY", KEY)

    def trouble(digest: str, nth: int) -> Any:
        """Slow; failing, limited or slower still at first. By the request, so that every run meets the same."""
        kind = int(digest, 16) % 5
        if nth == 0 and kind < 2:
            return [(500, {}), (429, {"Retry-After": "0.1"})][kind]
        return 0.3 if kind == 2 else 0.05

    def write(answer: str, box: str, nth: int) -> str:
        """Some questions get nothing that can be used."""
        if "$" in answer:
            return "```json\n{}\n```"
        return rationale(answer, box.replace("]", ",]") if answer == "EXIT" else box)

    with serving(Service(trouble=trouble, write=write)) as found:
        yield found


@pytest.fixture(scope="module")
def context() -> Any:
    """Processes that find everything imported, and are otherwise as good as new."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["datamodules.vlir.__main__", "tests.vlir_service"])
    return found


def start(context: Any, service: Service, out: Path, limit: int = 6) -> BaseProcess:
    config = out.parent / f"{out.name}.yaml"
    given = settings(service, out, workers=WORKERS, limit=limit)
    given["teacher"]["init_args"]["drafts"] = 1  # a second draft is the same request once more, on purpose
    config.write_text(yaml.safe_dump(given))
    process: BaseProcess = context.Process(target=run, args=(str(config),))
    process.start()
    return process


def settle(service: Service) -> None:
    """Wait until the server has nothing left to do for clients that are gone."""
    end = time.monotonic() + 20
    while service.busy and time.monotonic() < end:
        time.sleep(0.02)
    assert not service.busy


def test_killed_at_random_moments_nothing_is_lost_and_nothing_paid_twice(
    context: Any, service: Service, tmp_path: Path
) -> None:
    whole = start(context, service, tmp_path / "undisturbed", QUESTIONS)
    whole.join(timeout=120)
    assert whole.exitcode == 0
    needed = set(service.answered)
    assert set(service.answered.values()) == {1}
    assert replies_in(tmp_path / "undisturbed") == len(needed)

    service.asked.clear()
    service.answered.clear()
    out, seed = tmp_path / "killed", random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    moments = sorted(draw.sample(range(1, len(needed) - 5), 3))  # so many replies, then a little more
    lost = 0
    for moment in moments:
        process = start(context, service, out, QUESTIONS)
        end = time.monotonic() + 60
        while sum(service.answered.values()) < moment + lost and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1))
        assert process.is_alive(), f"seed {seed}: it ended before it was killed"
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join(timeout=20)
        assert process.exitcode == -signal.SIGKILL
        settle(service)
        in_flight = sum(service.answered.values()) - replies_in(out) - lost
        assert 0 <= in_flight <= WORKERS, f"seed {seed}"
        lost += in_flight
    last = start(context, service, out, QUESTIONS)
    last.join(timeout=120)
    assert last.exitcode == 0
    assert set(service.answered) == needed, f"seed {seed}"
    assert replies_in(out) == len(needed)
    # every reply that was sent twice was on its way when the process was killed
    assert sum(service.answered.values()) == len(needed) + lost, f"seed {seed}"
    for name in FILES:
        assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), f"seed {seed}"
    rows = (DATA / "documents" / "questions.jsonl").read_text().splitlines()[:QUESTIONS]
    kept = [json.loads(line) for name in FILES[:2] for line in (out / name).read_text().splitlines()]
    assert {row["id"] for row in kept} == {row["id"] for row in map(json.loads, rows) if "$" not in row["answers"][0]}


def test_interrupted_by_the_user_every_answer_that_is_on_its_way_is_waited_for(
    context: Any, service: Service, tmp_path: Path
) -> None:
    process = start(context, service, tmp_path / "corpus")
    end = time.monotonic() + 60
    while sum(service.answered.values()) < 4 and time.monotonic() < end:
        time.sleep(0.002)
    os.kill(process.pid or 0, signal.SIGINT)
    process.join(timeout=60)
    assert process.exitcode == 130
    settle(service)
    assert set(service.answered.values()) == {1}
    assert sum(service.answered.values()) == replies_in(tmp_path / "corpus")
    assert not (tmp_path / "corpus" / "corpus.json").exists()


def test_two_runs_do_not_build_one_corpus(context: Any, service: Service, tmp_path: Path) -> None:
    first = start(context, service, tmp_path / "corpus")
    end = time.monotonic() + 60
    while not service.answered and time.monotonic() < end:
        time.sleep(0.002)
    second = start(context, service, tmp_path / "corpus")
    second.join(timeout=60)
    first.join(timeout=60)
    assert (first.exitcode, second.exitcode) == (0, 2)
    assert set(service.answered.values()) == {1}
