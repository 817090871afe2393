"""Many prompts to a chat completions endpoint: side by side, repeated where that helps, kept on disk."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import random
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

RETRIED = frozenset({408, 409, 425, 429})  # and 5xx
MAX_BYTES = 2**20  # of a reply
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
MAX_WAIT = 60.0  # seconds, whatever the server asks for


class ChatError(RuntimeError):
    """A request that got no reply; the message never holds the key."""

    def __init__(self, message: str, repeat: bool = False, wait: float = 0.0, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status  # HTTP's, if the endpoint answered
        self.repeat = repeat  # whether another attempt may do better
        self.wait = wait  # seconds that the server asks for before it


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to somebody else."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class ChatClient:
    """See `modules.rewards.judge.Judge` for the fields.

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
        if not self.backoff >= 0:
            raise ValueError(f"Expected `backoff` to be at least 0, but got {self.backoff}.")

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

    def _reply(self, prompt: str, accept: Callable[[str], bool], end: float) -> str | ChatError:
        """One reply, from disk or from the endpoint, or why there is none."""
        kept = self._kept(prompt)
        if kept is not None and accept(kept):
            return kept
        try:
            reply = self._repeat(prompt, end)
        except ChatError as error:
            return error
        if not accept(reply):
            return ChatError(f"{self.model} replied with no verdict: {reply[-80:]!r}")
        self._keep(prompt, reply)
        return reply

    def _repeat(self, prompt: str, end: float) -> str:
        """A reply after as many attempts as it takes and may take."""
        for attempt in range(self.attempts):
            left = end - time.monotonic()
            if left <= 0:
                raise ChatError(f"{self.base_url}: no time left of `deadline` {self.deadline:g} s")
            try:
                return self._complete(prompt, min(self.timeout, left))
            except ChatError as error:
                wait = max(self.backoff * 2**attempt * random.uniform(0.5, 1.5), min(error.wait, MAX_WAIT))
                if not error.repeat or attempt + 1 == self.attempts or time.monotonic() + wait > end:
                    raise
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _complete(self, prompt: str, timeout: float) -> str:
        """One request."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], **self.options}
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        raw = self._send(urllib.request.Request(url, json.dumps(body).encode(), self._headers()), timeout)
        try:
            content = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            content = None
        if not isinstance(content, str):
            raise ChatError(f"{url}: replied with no chat completion")
        return content

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

    def _path(self, prompt: str) -> Path | None:
        if self.cache is None:
            return None
        key = json.dumps([self.model, self.options, prompt], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self.cache / digest[:2] / f"{digest}.json"

    def _kept(self, prompt: str) -> str | None:
        path = self._path(prompt)
        if path is None:
            return None
        try:
            reply = json.loads(path.read_text(encoding="utf-8"))["reply"]
        except (OSError, ValueError, LookupError, TypeError):  # none, or one that somebody damaged
            return None
        return reply if isinstance(reply, str) else None

    def _keep(self, prompt: str, reply: str) -> None:
        """Write a reply so that no other process ever reads half of it."""
        path = self._path(prompt)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
                json.dump({"model": self.model, "prompt": prompt, "reply": reply}, file)
            os.replace(file.name, path)
        except OSError as error:  # a full disk costs the cache, not the verdict
            logger.warning("could not keep a verdict in %s: %s", self.cache, error)


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
    """What the server's Retry-After asks for, if it is a number of seconds."""
    try:
        return max(0.0, float(error.headers.get("Retry-After", 0)))
    except (ValueError, TypeError):
        return 0.0
