"""A chat completions endpoint: many prompts side by side, repeated where that helps, kept on disk."""

from __future__ import annotations

import email.utils
import http.client
import json
import logging
import math
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import IO, Any, Protocol

from modules.store import Store

logger = logging.getLogger(__name__)

Content = str | list[dict[str, Any]]  # of a message: text, or OpenAI's parts of text and images

RETRIED = frozenset({408, 409, 425, 429})  # and 5xx
MAX_BYTES = 2**20  # of a reply
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


class ChatError(RuntimeError):
    """A request that got no reply; the message never holds the key."""

    def __init__(self, message: str, repeat: bool = False, wait: float = 0.0, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status  # HTTP's, if the endpoint answered
        self.repeat = repeat  # whether another attempt may do better
        self.wait = wait  # seconds that the server asks for before it


class Gate(Protocol):
    """What stands between a request and its endpoint, such as a limit on requests a minute."""

    def enter(self) -> None:
        """Wait until another attempt may be made."""

    def hold(self, seconds: float) -> None:
        """Let nobody in for so long: the endpoint asked for it."""


@dataclass(frozen=True)
class Reply:
    """What an endpoint replied, and what it counted; None where it did not say."""

    text: str
    finish: str | None = None  # "stop", or "length" where the limit of new tokens cut it
    input_tokens: int | None = None
    output_tokens: int | None = None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to somebody else."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class ChatClient:
    """A model behind an endpoint that speaks OpenAI's chat completions.

    Args:
        model: its name at the endpoint.
        base_url: of the endpoint, such as ``http://localhost:8000/v1``.
        key_variable: the environment variable that holds the key; None for an endpoint without one. The key is read
            whenever a request is made, and held nowhere else.
        cache: folder of replies of `ask`, which runs may share; None keeps nothing.
        options: what else stands in a request, such as ``temperature`` and ``max_tokens``.
        concurrency: requests of `ask` at a time.
        timeout: seconds for one request.
        attempts: for one request, the first included.
        backoff: seconds before the first repetition; each later one waits twice as long, give or take a half.
        deadline: seconds for one call of `ask`; what has no reply by then has none.
        max_wait: longest pause in seconds that a server can ask for (Retry-After).

    Raises:
        ValueError: if a field has no meaning.
    """

    model: str
    base_url: str
    key_variable: str | None = None
    cache: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    timeout: float = 60.0
    attempts: int = 5
    backoff: float = 1.0
    deadline: float = 600.0
    max_wait: float = 60.0

    def __post_init__(self) -> None:
        if self.key_variable is not None and not _VARIABLE.fullmatch(self.key_variable):
            # not shown, for it may be the key itself
            raise ValueError("Expected `key_variable` to be the name of an environment variable, as in OPENAI_API_KEY.")
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"Expected `base_url` to begin with http:// or https://, but got {self.base_url!r}.")
        for name, value in (("concurrency", self.concurrency), ("attempts", self.attempts)):
            if value < 1:
                raise ValueError(f"Expected `{name}` to be at least 1, but got {value}.")
        for name, seconds in (("timeout", self.timeout), ("deadline", self.deadline)):
            if not seconds > 0:
                raise ValueError(f"Expected `{name}` to be positive, but got {seconds}.")
        for name, seconds in (("backoff", self.backoff), ("max_wait", self.max_wait)):
            if not seconds >= 0:
                raise ValueError(f"Expected `{name}` to be at least 0, but got {seconds}.")

    def check(self) -> None:
        """Whether the key is there and the endpoint answers.

        Raises:
            ChatError: if not; says which.
        """
        url = f"{self.base_url.rstrip('/')}/models"
        try:
            self._send(urllib.request.Request(url, headers=self._headers()), self.timeout)
        except ChatError as error:
            if error.status in (None, 401, 403):  # not every endpoint lists its models
                raise

    def ask(self, prompts: Sequence[str], accept: Callable[[str], bool]) -> list[str | None]:
        """Replies in the order of the prompts; None where there is none, or none that is accepted.

        Args:
            prompts: equal ones are asked once.
            accept: whether a reply is one; others are not kept.
        """
        different = list(dict.fromkeys(prompts))
        end = time.monotonic() + self.deadline
        with ThreadPoolExecutor(min(self.concurrency, max(len(different), 1))) as pool:
            replies = list(pool.map(lambda prompt: self._reply(prompt, accept, end), different))
        failures = [reply for reply in replies if isinstance(reply, ChatError)]
        if failures:
            logger.warning("%d of %d requests failed; the first: %s", len(failures), len(different), failures[0])
        found = {p: None if isinstance(r, ChatError) else r for p, r in zip(different, replies, strict=True)}
        return [found[prompt] for prompt in prompts]

    def complete(self, content: Content, end: float = math.inf, gate: Gate | None = None) -> Reply:
        """A reply after as many attempts as it takes and may take; nothing is looked up or kept.

        Args:
            content: of the user's message.
            end: when to give up, in seconds of `time.monotonic`.
            gate: passed before each attempt.

        Raises:
            ChatError: if there is none.
        """
        for attempt in range(self.attempts):
            if gate is not None:
                gate.enter()
            left = end - time.monotonic()
            if left <= 0:
                raise ChatError(f"{self.base_url}: no time left of `deadline` {self.deadline:g} s")
            try:
                return self._complete(content, min(self.timeout, left))
            except ChatError as error:
                asked = min(error.wait, self.max_wait)
                if gate is not None and asked:
                    gate.hold(asked)
                wait = max(self.backoff * 2**attempt * random.uniform(0.5, 1.5), asked)
                if not error.repeat or attempt + 1 == self.attempts or time.monotonic() + wait > end:
                    raise
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _reply(self, prompt: str, accept: Callable[[str], bool], end: float) -> str | ChatError:
        """One reply, from disk or from the endpoint, or why there is none."""
        store = None if self.cache is None else Store(self.cache)
        key = json.dumps([self.model, self.options, prompt], sort_keys=True)
        kept = (store.read(key) or {}).get("reply") if store is not None else None
        if isinstance(kept, str) and accept(kept):
            return kept
        try:
            reply = self.complete(prompt, end).text
        except ChatError as error:
            return error
        if not accept(reply):
            return ChatError(f"{self.model} replied with no verdict: {reply[-80:]!r}")
        if store is not None:
            try:
                store.write(key, {"model": self.model, "prompt": prompt, "reply": reply})
            except OSError as error:  # a full disk costs the cache, not the verdict
                logger.warning("could not keep a verdict in %s: %s", self.cache, error)
        return reply

    def _complete(self, content: Content, timeout: float) -> Reply:
        """One request."""
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], **self.options}
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        raw = self._send(urllib.request.Request(url, json.dumps(body).encode(), self._headers()), timeout)
        try:
            value = json.loads(raw)
            choice = value["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise ChatError(f"{url}: replied with no chat completion")
        usage, finish = value.get("usage"), choice.get("finish_reason")
        return Reply(
            text,
            finish if isinstance(finish, str) else None,
            *(_count(usage, name) for name in ("prompt_tokens", "completion_tokens")),
        )

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self.key_variable is not None:
            headers["Authorization"] = f"Bearer {self._key()}"
        return headers

    def _key(self) -> str:
        key = os.environ.get(self.key_variable or "", "").strip()
        if not key:
            raise ChatError(f"Expected the environment to hold {self.key_variable}, the key of {self.base_url}.")
        return key

    def _send(self, request: urllib.request.Request, timeout: float) -> bytes:
        """What the endpoint says; for ChatError see `_complete`."""
        url, opener = request.full_url, urllib.request.build_opener(_NoRedirect)
        end = time.monotonic() + timeout
        try:
            with opener.open(request, timeout=timeout) as response:
                return _read(response, end)
        except urllib.error.HTTPError as error:
            with error:
                repeat = error.code in RETRIED or error.code >= 500
                raise ChatError(
                    f"{url}: HTTP {error.code} {error.reason}", repeat, _seconds(error), error.code
                ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            # a refused connection may be a server that is starting; ValueError: a header that cannot be sent
            why = getattr(error, "reason", None) or type(error).__name__
            raise ChatError(f"{url}: cannot be reached: {why}", not isinstance(error, ValueError)) from None


def read_template(path: Path, fields: Sequence[str], needed: Sequence[str] = ()) -> Template:
    """A prompt's file.

    Args:
        path: a text file, in which ``$name`` is filled and ``$$`` is a dollar sign.
        fields: what can be filled.
        needed: those that have to be there, of ``fields``.

    Raises:
        ValueError: if there is no such file, a placeholder that nothing fills, or one missing.
    """
    if not path.is_file():
        raise ValueError(f"Expected `prompt` to be a text file, but there is no file {str(path)!r}.")
    template = Template(path.read_text(encoding="utf-8"))
    if not template.is_valid():
        raise ValueError(f"Expected dollar signs in {str(path)!r} to begin placeholders or to be doubled ($$).")
    found = template.get_identifiers()
    if not found or set(found) - set(fields):
        unknown = sorted(set(found) - set(fields))
        raise ValueError(
            f"Expected {str(path)!r} to hold placeholders out of {_listed(fields)}, "
            f"but got {_listed(unknown) or 'none'}."
        )
    if missing := [name for name in needed if name not in found]:
        raise ValueError(f"Expected {str(path)!r} to hold {_listed(missing)}, but got {_listed(found)}.")
    return template


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"${name}" for name in names)


def _count(usage: object, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if type(value) is int and value >= 0 else None


def _read(response: IO[bytes], end: float) -> bytes:
    """The body, unless it is too long or trickles in for too long."""
    body = b""
    while chunk := response.read1(65536):  # type: ignore[attr-defined]
        body += chunk
        if len(body) > MAX_BYTES:
            raise OSError(f"a reply of more than {MAX_BYTES} bytes")
        if time.monotonic() > end:
            raise TimeoutError("timed out")
    return body


def _seconds(error: urllib.error.HTTPError) -> float:
    """What the server's Retry-After asks for: a number of seconds, or a date; 0 if it is neither."""
    asked = error.headers.get("Retry-After", "0")
    try:
        seconds = float(asked)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(asked).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
