"""No minute has more than it may; minutes last half a second here."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left

import pytest

from datamodules.vlir import limits
from datamodules.vlir.limits import MinuteLimit


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PERIOD", 0.5)


def times(limit: MinuteLimit, tokens: list[float]) -> list[float]:
    """When each of so many threads is let in, in the order in which they are."""
    found: list[float] = []
    lock = threading.Lock()

    def go(n: float) -> None:
        ticket = limit.enter(n)
        with lock:
            found.append(ticket.time)

    threads = [threading.Thread(target=go, args=(n,)) for n in tokens]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return sorted(found)


def test_no_minute_has_more_requests_than_it_may() -> None:
    found = times(MinuteLimit(requests=5), [1.0] * 17)
    assert len(found) == 17
    assert max(k + 1 - bisect_left(found, found[k] - 0.5 + 1e-9) for k in range(17)) <= 5
    assert found[-1] - found[0] < 0.5 * 3 + 3.0  # and nobody waits longer than the limit asks for


def test_no_minute_has_more_tokens_than_it_may_and_what_is_larger_goes_alone() -> None:
    found = times(MinuteLimit(tokens=10), [4.0, 4.0, 4.0, 4.0])
    assert max(k + 1 - bisect_left(found, found[k] - 0.5 + 1e-9) for k in range(4)) <= 2
    assert len(times(MinuteLimit(tokens=10), [100.0, 100.0])) == 2


def test_a_guess_that_was_too_large_makes_room_when_it_is_settled() -> None:
    limit = MinuteLimit(tokens=10)
    ticket = limit.enter(10)
    threading.Timer(0.1, limit.settle, (ticket, 1.0)).start()
    begin = time.monotonic()
    limit.enter(9)
    assert 0.05 < time.monotonic() - begin < 0.4  # before the minute is over


def test_nobody_is_let_in_while_the_endpoint_asks_for_a_pause() -> None:
    limit = MinuteLimit()
    limit.hold(0.3)
    begin = time.monotonic()
    limit.enter(1)
    assert time.monotonic() - begin >= 0.3
