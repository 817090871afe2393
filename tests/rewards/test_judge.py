"""A judge against a server on this machine that is slow, broken, talks nonsense, or is not there."""

from __future__ import annotations

import json
import logging
import math
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from callbacks.rollout import RolloutCallback
from modules.policy import PolicyError
from modules.rewards import Accuracy, Judge, score
from modules.rewards.judge import verdict
from tests.test_rewards import say, trajectory

KEY = "sk-secret-of-this-test"
Reply = tuple[int, str]  # status, body
NOBODY: Any = None  # the policy, which a judge does not ask


def completion(text: str) -> Reply:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@dataclass
class Service:
    """A stub of an endpoint: answers the n-th request about a prompt as it is told."""

    reply: Callable[[str, int], Reply] = lambda prompt, nth: completion("1")
    delay: float = 0.0
    trickle: float = 0.0  # seconds between the bytes of a reply
    headers: dict[str, str] = field(default_factory=dict)
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    busy: int = 0
    busiest: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def prompts(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.requests]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    found = Service()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            found.keys.append(self.headers["Authorization"])
            self.send(*found.reply("", 0))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][0]["content"]
            with found.lock:
                nth = found.prompts().count(prompt)
                found.requests.append(body)
                found.keys.append(self.headers["Authorization"])
                found.times.append(time.monotonic())
                found.busy += 1
                found.busiest = max(found.busiest, found.busy)
            time.sleep(found.delay)
            with found.lock:
                found.busy -= 1
            self.send(*found.reply(prompt, nth))

        def send(self, status: int, text: str) -> None:
            try:
                self.send_response(status)
                for name, value in found.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                for byte in text.encode():
                    self.wfile.write(bytes([byte]))
                    time.sleep(found.trickle)
            except OSError:
                pass  # the client has given up

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_port}/v1"
    monkeypatch.setenv("JUDGE_KEY", KEY)
    yield found
    server.shutdown()
    server.server_close()


def judge(service: Service, **options: Any) -> Judge:
    return Judge("m", service.url, **{"key_variable": "JUDGE_KEY", "backoff": 0.01, "timeout": 20.0, **options})


def answers(*texts: str) -> list[Any]:
    return [trajectory(say(f"<answer>{text}</answer>")) for text in texts]


def test_verdicts_come_in_order_and_requests_run_side_by_side(service: Service) -> None:
    service.reply = lambda prompt, nth: completion("1" if "-----\nseven\n" in prompt else "0")
    service.delay = 0.3
    given = ["seven" if k % 3 == 0 else f"eight {k}" for k in range(12)]
    values = judge(service, concurrency=4).batch(answers(*given))
    assert values == [1.0 if k % 3 == 0 else 0.0 for k in range(12)]
    assert len(service.requests) == 1 + 8  # equal prompts are asked once
    assert 1 < service.busiest <= 4
    request = service.requests[0]
    assert (request["model"], request["temperature"]) == ("m", 0)
    assert "Question: ?\n" in request["messages"][0]["content"]
    assert "would do: 7\n" in request["messages"][0]["content"]
    assert set(service.keys) == {f"Bearer {KEY}"}


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_repeated_and_waits_longer_each_time(service: Service, status: int) -> None:
    service.reply = lambda prompt, nth: completion("0.5") if nth == 3 else (status, "busy")
    assert judge(service, attempts=4, backoff=0.2).batch(answers("x")) == [0.5]
    first, second, third = (b - a for a, b in zip(service.times, service.times[1:], strict=False))
    assert all(wait >= least for wait, least in ((first, 0.1), (second, 0.2), (third, 0.4)))  # half of 0.2, 0.4, 0.8


def test_the_server_may_ask_for_a_longer_wait(service: Service) -> None:
    service.headers = {"Retry-After": "0.6"}
    service.reply = lambda prompt, nth: completion("1") if nth else (429, "")
    assert judge(service, backoff=0.0).batch(answers("x")) == [1]
    assert service.times[1] - service.times[0] >= 0.6


@pytest.mark.parametrize(
    ("reply", "attempts"),
    [
        ((500, "down"), 3),
        ((400, "no such parameter"), 1),  # it would be refused again
        ((401, "bad key"), 1),
        ((302, ""), 1),
        ((200, "not JSON"), 1),
        ((200, "[]"), 1),
        ((200, '{"choices": []}'), 1),
        ((200, '{"choices": [{"message": {"content": null}}]}'), 1),
        (completion("I cannot say."), 1),
        (completion(""), 1),
        (completion("7"), 1),
        (completion("-1"), 1),
        (completion("nan"), 1),
    ],
)
def test_what_is_no_verdict_is_left_out_and_never_scored(
    service: Service, tmp_path: Path, reply: Reply, attempts: int
) -> None:
    service.reply = lambda prompt, nth: completion("1") if "\ngood\n" in prompt else reply
    service.headers = {"Location": service.url + "/elsewhere"} if reply[0] == 302 else {}
    judged = judge(service, attempts=3, cache=str(tmp_path))
    values = judged.batch(answers("good", "bad"))
    assert values[0] == 1
    assert math.isnan(values[1])
    assert sum("\nbad\n" in prompt for prompt in service.prompts()) == attempts
    _, totals = score({"judge": judged}, answers("good", "bad"))
    assert totals.isnan().tolist() == [False, True]
    assert len(list(tmp_path.rglob("*.json"))) == 1  # only verdicts are kept
    assert len(service.keys) == len(service.requests)  # a redirect does not get the key


def test_a_slow_server_is_given_up_in_time(service: Service) -> None:
    service.delay = 30.0
    values = judge(service, timeout=0.3, attempts=2).batch(answers("x"))
    assert math.isnan(values[0])
    assert len(service.requests) == 2
    begin = time.monotonic()
    values = judge(service, timeout=60.0, attempts=50, deadline=0.5, concurrency=1).batch(answers("a", "b", "c"))
    assert all(math.isnan(value) for value in values)
    assert time.monotonic() - begin < 10
    service.delay, service.trickle = 0.0, 0.1  # each byte is in time, the whole is not
    begin = time.monotonic()
    assert math.isnan(judge(service, timeout=0.5, attempts=1).batch(answers("y"))[0])
    assert time.monotonic() - begin < 4


def test_an_absent_server_judges_nothing_and_says_so(service: Service, caplog: Any) -> None:
    absent = Judge("m", "http://127.0.0.1:9/v1", key_variable=None, attempts=2, backoff=0.01)
    with caplog.at_level(logging.WARNING):
        assert all(math.isnan(value) for value in absent.batch(answers("a", "b")))
    assert "2 of 2 requests failed; the first: http://127.0.0.1:9/v1/chat/completions: cannot be" in caplog.text


def test_verdicts_are_kept_on_disk_for_the_same_model_options_and_prompt(service: Service, tmp_path: Path) -> None:
    def asked(**options: Any) -> int:
        before = len(service.requests)
        assert judge(service, cache=str(tmp_path), **options).batch(answers("x")) == [1]
        return len(service.requests) - before

    other = tmp_path / "other.txt"
    other.write_text("Is $answer right?")
    assert [asked(), asked(), asked(options={"temperature": 1}), asked(prompt=str(other)), asked()] == [1, 0, 1, 1, 0]
    for path in tmp_path.rglob("*.json"):
        assert KEY not in path.read_text()
        path.write_text('{"reply": ')  # half of one, as from a disk that was full
    assert [asked(), asked()] == [1, 0]


def test_processes_may_share_a_cache(service: Service, tmp_path: Path) -> None:
    judges = [judge(service, cache=str(tmp_path)) for _ in range(6)]
    given = answers(*(f"answer {k}" for k in range(10)))
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda one: one.batch(given), judges)) == [[1.0] * 10] * 6
    kept = list(tmp_path.rglob("*"))
    assert sum(path.is_file() for path in kept) == 10  # and no temporary files
    assert all(json.loads(path.read_text())["reply"] == "1" for path in kept if path.is_file())


def test_nothing_is_asked_where_the_value_is_known(service: Service) -> None:
    known = judge(service).batch([trajectory(say("")), trajectory(say("<answer>7</answer>"), answers=())])
    assert known[0] == 0  # no answer
    assert math.isnan(known[1])  # nothing to compare with
    assert service.requests == []


def test_the_start_says_what_is_missing(service: Service, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    judge(service).setup(NOBODY)
    service.reply = lambda prompt, nth: (404, "no such page")  # an endpoint that does not list its models
    judge(service).setup(NOBODY)
    service.reply = lambda prompt, nth: (401, "bad key")
    with pytest.raises(PolicyError, match="HTTP 401"):
        judge(service).setup(NOBODY)
    absent = Judge("m", "http://127.0.0.1:9/v1", key_variable="JUDGE_KEY", timeout=5.0)
    with pytest.raises(PolicyError, match=r"127\.0\.0\.1:9/v1/models: cannot be reached"):
        absent.setup(NOBODY)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(PolicyError, match="Expected the environment to hold JUDGE_KEY"):
        judge(service).setup(NOBODY)
    with pytest.raises(PolicyError, match="JUDGE_KEY"):  # through whatever asks it
        RolloutCallback(rewards={"accuracy": Accuracy(judge=judge(service))}).setup(None, None, "fit")  # type: ignore[arg-type]
    RolloutCallback(rewards={"judge": judge(service)}).setup(None, None, "predict")  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        judge(service, fail_fast=False).setup(NOBODY)
    assert "JUDGE_KEY" in caplog.text


def test_the_key_is_nowhere_but_in_the_request(service: Service, caplog: Any) -> None:
    service.reply = lambda prompt, nth: (401, f"Incorrect key {KEY}")
    judged = judge(service)
    with caplog.at_level(logging.DEBUG):
        score({"judge": judged}, answers("x"))
    assert service.keys == [f"Bearer {KEY}"]
    assert "HTTP 401" in caplog.text
    assert KEY not in caplog.text
    assert KEY.encode() not in pickle.dumps(judged)
    with pytest.raises(ValueError, match="name of an environment variable") as error:
        judge(service, key_variable=KEY)  # somebody put the key itself into the config
    assert KEY not in str(error.value)


def test_an_endpoint_may_want_no_key(service: Service) -> None:
    assert judge(service, key_variable=None).batch(answers("x")) == [1]
    assert service.keys == [None]


def test_accuracy_asks_it_where_the_rules_find_nothing(service: Service) -> None:
    service.reply = lambda prompt, nth: completion("1" if "septem" in prompt else "what?")
    accuracy = Accuracy(by_source={"Math": "exact"}, judge=judge(service))
    values = accuracy.batch(answers("7", "septem", "octo"))
    assert values[:2] == [1, 1]
    assert math.isnan(values[2])  # it failed: neither wrong nor right
    assert len(service.requests) == 2  # "7" is right without it
    (one,) = answers("septem")
    object.__setattr__(one.sample, "source", "math")
    assert accuracy(one) == 0  # a source that has a rule


def test_templates_are_checked_and_filled(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("$$5: ${question} $text")
    (one,) = answers(r"\frac{1}{2} $x$ ${answer}")
    assert judge(service, prompt=str(path)).fill(one) == r"$5: ? <answer>\frac{1}{2} $x$ ${answer}</answer>"
    for text, why in [("$qestion", r"got \$qestion"), ("costs $5", r"doubled"), ("no placeholder", "got none")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=why):
            judge(service, prompt=str(path))
    with pytest.raises(ValueError, match="there is no file"):
        judge(service, prompt=str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("option", "value"),
    [("base_url", "localhost:8000"), ("attempts", 0), ("concurrency", 0), ("timeout", 0), ("backoff", -1)],
)
def test_meaningless_options_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{option}`"):
        Judge(**{"model": "m", "base_url": "http://x", option: value})


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("1", 1),
        (" 0.25\n", 0.25),
        (".5", 0.5),
        ("Score: 1", 1),
        ("**Yes.**", 1),
        ("no", 0),
        ("They agree.\n\n1", 1),
        ("1.5", math.nan),
        ("1\nbecause it is", math.nan),
        ("not 1", math.nan),
        ("11", math.nan),
    ],
)
def test_verdicts(reply: str, expected: float) -> None:
    assert verdict(reply) == pytest.approx(expected, nan_ok=True)
