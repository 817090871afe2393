"""A paid endpoint: limited in its rate, and nothing that was answered is ever paid for again."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from datamodules.vlir.limits import MinuteLimit, Ticket
from modules.chat import ChatClient, ChatError, Content, Reply
from modules.store import Store

FATAL = frozenset({401, 402, 403, 404})  # no other request would fare better: key, credit, model
LETTERS = 3.0  # characters to a token, for the guess before a request is counted; few, so that it is not too small
PIXELS = 28 * 28  # to a token, likewise
QUALITY = 95  # of JPEG


class Unpaid(RuntimeError):
    """A request that got no reply; another run may ask again."""


class Fatal(RuntimeError):
    """A failure that every other request would meet as well."""


@dataclass(frozen=True)
class Endpoint(ChatClient):
    """A model that is asked, how often it may be asked, and what it costs.

    The arguments are those of `ChatClient`, and these:

    Args:
        requests_per_minute: at most so many, repetitions included; None: any number.
        tokens_per_minute: at most so many, of prompts and replies; None: any number.
        input_price: of a million tokens of prompts, in any currency.
        output_price: of a million tokens of replies.
    """

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    input_price: float = 0.0
    output_price: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Expected `{name}` to be positive, but got {value}.")
        for name in ("input_price", "output_price"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"Expected `{name}` to be at least 0, but got {getattr(self, name)}.")
        if self.cache is not None:
            raise ValueError("Expected no `cache`: replies are kept in the corpus's own folder.")

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """What so many tokens cost."""
        return (input_tokens * self.input_price + output_tokens * self.output_price) / 1e6


@dataclass(frozen=True, eq=False)
class Picture:
    """An image that goes with a prompt; decoded only if the prompt was not answered before."""

    identity: str  # equal ones show the same pixels
    size: tuple[int, int]  # (H, W)
    pixels: Callable[[], Tensor]  # (3, H, W) float in [0, 1]

    def url(self) -> str:
        """The picture as a data URL."""
        array = (self.pixels() * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
        buffer = BytesIO()
        Image.fromarray(array).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


class Caller:
    """Asks an endpoint from many threads; every reply is on disk before anybody sees it.

    Args:
        endpoint: what is asked.
        folder: where its replies are kept. What is in it is not asked again, by any later run.
    """

    def __init__(self, endpoint: Endpoint, folder: Path) -> None:
        self.endpoint = endpoint
        self.store = Store(folder)
        self.limit = MinuteLimit(endpoint.requests_per_minute, endpoint.tokens_per_minute)
        self.spent = 0.0  # by this object
        self._lock = threading.Lock()
        self._checked = False
        self._asking: dict[int, threading.Lock] = {}

    def ask(self, prompt: str, pictures: Sequence[Picture] = (), nth: int = 0) -> Reply:
        """The reply to a prompt.

        Args:
            prompt: text.
            pictures: shown behind it.
            nth: which answer to this very prompt is wanted, from 0.

        Raises:
            Unpaid: there is none.
            Fatal: there will be none to others either.
        """
        key = json.dumps(
            [self.endpoint.model, self.endpoint.options, prompt, [p.identity for p in pictures], nth], sort_keys=True
        )
        with self._alone(key):
            if (kept := self._kept(key)) is not None:
                return kept
            reply = self._pay(prompt, pictures)
            try:
                self.store.write(key, {"model": self.endpoint.model, "prompt": prompt, **asdict(reply)})
            except OSError as error:
                raise Fatal(f"{self.store.folder}: a reply that was paid for cannot be kept ({error}).") from error
        return reply

    def _pay(self, prompt: str, pictures: Sequence[Picture]) -> Reply:
        with self._lock:
            if not self._checked:  # not before: what is on disk needs no endpoint
                try:
                    self.endpoint.check()
                except ChatError as error:
                    raise Fatal(str(error)) from None
                self._checked = True
        content: Content = prompt
        if pictures:
            shown = ({"type": "image_url", "image_url": {"url": p.url()}} for p in pictures)
            content = [{"type": "text", "text": prompt}, *shown]
        gate = _Gate(self.limit, self._guess(prompt, pictures))
        try:
            reply = self.endpoint.complete(content, gate=gate)
        except ChatError as error:
            if error.status in FATAL:
                raise Fatal(str(error)) from None
            raise Unpaid(str(error)) from None
        counted = (reply.input_tokens, reply.output_tokens)
        if counted[0] is not None and counted[1] is not None:
            gate.settle(counted[0] + counted[1])
        with self._lock:
            self.spent += self.endpoint.cost(counted[0] or 0, counted[1] or 0)
        return reply

    def _guess(self, prompt: str, pictures: Sequence[Picture]) -> float:
        """About how many tokens a request comes to, its longest reply included."""
        longest = self.endpoint.options.get("max_tokens", self.endpoint.options.get("max_completion_tokens", 0))
        shown = sum(p.size[0] * p.size[1] for p in pictures) / PIXELS
        return len(prompt) / LETTERS + shown + (longest if isinstance(longest, int) else 0)

    def _kept(self, key: str) -> Reply | None:
        found = self.store.read(key)
        return None if found is None or not isinstance(found.get("text"), str) else reply_of(found)

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """Two threads with one question: the second finds the first one's answer."""
        with self._lock:
            lock = self._asking.setdefault(hash(key), threading.Lock())
        with lock:
            yield


class _Gate:
    """The limit, as one request's attempts meet it."""

    def __init__(self, limit: MinuteLimit, guess: float) -> None:
        self.limit, self.guess = limit, guess
        self._ticket: Ticket | None = None

    def enter(self) -> None:
        if self._ticket is not None:
            self.limit.settle(self._ticket, 0.0)  # the attempt before failed
        self._ticket = self.limit.enter(self.guess)

    def hold(self, seconds: float) -> None:
        self.limit.hold(seconds)

    def settle(self, tokens: float) -> None:
        assert self._ticket is not None
        self.limit.settle(self._ticket, tokens)


def reply_of(value: dict[str, Any]) -> Reply:
    """A reply as it was kept."""
    return Reply(value["text"], *(value.get(name) for name in ("finish", "input_tokens", "output_tokens")))
