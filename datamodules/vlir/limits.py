"""So many requests and tokens a minute, over all threads of a process."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

PERIOD = 60.0  # seconds


@dataclass(eq=False)
class Ticket:
    """One request that was let in."""

    time: float
    tokens: float  # as guessed, then as counted


class MinuteLimit:
    """Lets requests in so that no minute has more of them, or of their tokens, than is allowed.

    A request that is larger than what a minute allows goes alone.

    Args:
        requests: a minute; None: any number.
        tokens: a minute, of prompts and replies; None: any number.
        clock: seconds, of a clock that never goes back.
    """

    def __init__(
        self, requests: float | None = None, tokens: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.requests, self.tokens, self.clock = requests, tokens, clock
        self._let_in: deque[Ticket] = deque()  # of the last minute
        self._closed_until = -1.0
        self._changed = threading.Condition()

    def enter(self, tokens: float) -> Ticket:
        """Wait for a place.

        Args:
            tokens: what the request is guessed to come to; corrected by `settle`.
        """
        with self._changed:
            while (wait := self._wait(tokens)) > 0:
                self._changed.wait(wait)
            ticket = Ticket(self.clock(), tokens)
            self._let_in.append(ticket)
            return ticket

    def settle(self, ticket: Ticket, tokens: float) -> None:
        """Put what a request really came to in place of the guess."""
        with self._changed:
            ticket.tokens = tokens
            self._changed.notify_all()

    def hold(self, seconds: float) -> None:
        """Let nobody in for so long."""
        with self._changed:
            self._closed_until = max(self._closed_until, self.clock() + seconds)

    def _wait(self, tokens: float) -> float:
        """Seconds until it is worth looking again; 0: go."""
        now = self.clock()
        while self._let_in and self._let_in[0].time <= now - PERIOD:
            self._let_in.popleft()
        if now < self._closed_until:
            return self._closed_until - now
        if not self._let_in:
            return 0.0
        many = self.requests is not None and len(self._let_in) + 1 > self.requests
        much = self.tokens is not None and sum(t.tokens for t in self._let_in) + tokens > self.tokens
        return self._let_in[0].time + PERIOD - now if many or much else 0.0
