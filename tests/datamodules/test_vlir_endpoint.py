"""Every reply is on disk before anybody sees it, and endpoints get the rest that they ask for."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.vlir.endpoint import Caller, Endpoint, Fatal, Picture, Unpaid
from modules.store import Store
from tests.vlir_service import Service, serving


@pytest.fixture
def service() -> Iterator[Service]:
    with serving(Service(cohere=lambda prompt: f"{prompt}!")) as found:
        yield found


@pytest.fixture
def caller(service: Service, tmp_path: Path) -> Callable[..., Caller]:
    def make(**options: Any) -> Caller:
        return Caller(Endpoint("m", service.url, **{"backoff": 0.01, **options}), tmp_path / "replies")

    return make


def test_a_reply_is_paid_for_once_by_threads_and_by_later_callers(
    service: Service, caller: Callable[..., Caller]
) -> None:
    service.trouble = lambda digest, nth: 0.2
    one = caller(input_price=1.0, output_price=2.0)
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(one.ask, ["a", "a", "b", "a"]))
    assert [reply.text for reply in replies] == ["a!", "a!", "b!", "a!"]
    assert (replies[0].finish, replies[0].input_tokens, replies[0].output_tokens) == ("stop", 1000, 100)
    assert sum(service.answered.values()) == 2
    assert one.spent == pytest.approx(2 * (1000 * 1.0 + 100 * 2.0) / 1e6)
    later = caller()
    assert later.ask("a") == replies[0]
    assert later.spent == 0
    assert sum(service.answered.values()) == 2
    later.ask("a", nth=1)  # another answer to the same question
    caller(options={"temperature": 1}).ask("a")
    assert sum(service.answered.values()) == 4


def test_a_picture_is_decoded_only_if_it_is_sent(service: Service, caller: Callable[..., Caller]) -> None:
    service.recognise = lambda prompt: "seen"
    picture = Picture("p", (20, 30), lambda: torch.rand(3, 20, 30))
    assert caller().ask("what?", [picture]).text == "seen"
    assert service.sizes == [((30, 20), "what?")]
    assert caller().ask("what?", [Picture("p", (20, 30), lambda: pytest.fail("decoded"))]).text == "seen"
    assert caller().ask("what?", [Picture("q", (20, 30), lambda: torch.rand(3, 20, 30))]).text == "seen"
    assert sum(service.answered.values()) == 2


def test_one_limited_request_pauses_all_of_them(service: Service, caller: Callable[..., Caller]) -> None:
    one = caller()
    with ThreadPoolExecutor(1) as pool:
        service.trouble = lambda digest, nth: (429, {"Retry-After": "0.6"}) if nth == 0 else 0.0
        limited = pool.submit(one.ask, "a")
        while not service.asked or service.busy:
            time.sleep(0.005)
        time.sleep(0.1)  # its answer arrives
        service.trouble = lambda digest, nth: 0.0
        begin = time.monotonic()
        assert one.ask("b").text == "b!"
        assert time.monotonic() - begin > 0.3
        assert limited.result().text == "a!"


@pytest.mark.parametrize(("ahead", "most", "least"), [(2.5, 60.0, 1.0), (3600.0, 0.3, 0.3)])
def test_a_pause_may_be_a_date_and_has_an_end(
    service: Service, caller: Callable[..., Caller], ahead: float, most: float, least: float
) -> None:
    until = email.utils.formatdate(time.time() + ahead, usegmt=True)  # whole seconds
    service.trouble = lambda digest, nth: (503, {"Retry-After": until}) if nth == 0 else 0.0
    begin = time.monotonic()
    assert caller(max_wait=most).ask("a").text == "a!"
    assert least <= time.monotonic() - begin < least + 5


def test_failures_are_told_apart_and_nothing_is_kept_of_them(
    service: Service, caller: Callable[..., Caller], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    service.trouble = lambda digest, nth: (500, {})
    with pytest.raises(Unpaid, match="HTTP 500"):
        caller(attempts=2).ask("a")
    assert sum(service.asked.values()) == 2
    service.trouble = lambda digest, nth: (404, {})
    with pytest.raises(Fatal, match="HTTP 404"):
        caller().ask("a")
    assert list(Store(tmp_path / "replies").values()) == []
    service.trouble = lambda digest, nth: 0.0

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Store, "write", full)
    with pytest.raises(Fatal, match="paid for cannot be kept"):
        caller().ask("a")
