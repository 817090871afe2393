"""A small real HTTP server that writes rationales and judges them, with all the troubles that real ones make."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

DATA = Path(__file__).parent / "data"
PROMPTS = Path(__file__).parents[1] / "configs" / "vlir" / "prompts"
KEY = "sk-secret-of-these-tests"
Trouble = Callable[[str, int], "float | tuple[int, dict[str, str]]"]


@dataclass
class Service:
    """What the server was asked and has answered.

    Args:
        trouble: of the n-th request with this digest (from 0): seconds to wait before a reply, or a status and headers.
        write: the teacher's text from its right answer and its box.
    """

    trouble: Trouble = lambda digest, nth: 0.0
    write: Callable[[str, str, int], str] = lambda answer, box, nth: rationale(answer, box)
    recognise: Callable[[str], str] = lambda prompt: "Printed words.\n1"
    cohere: Callable[[str], str] = lambda prompt: "Nothing is wrong.\n1"
    url: str = ""
    asked: Counter[str] = field(default_factory=Counter)  # requests by digest of their body
    answered: Counter[str] = field(default_factory=Counter)  # replies that were sent to their last byte
    busy: int = 0  # requests that are being worked on
    prompts: list[str] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    sizes: list[tuple[tuple[int, int], str]] = field(default_factory=list)  # of pictures (W, H), and their prompts
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, body: dict[str, Any], nth: int) -> dict[str, Any]:
        """A completion by whoever the model is."""
        parts = body["messages"][0]["content"]
        prompt = parts if isinstance(parts, str) else parts[0]["text"]
        pictures = [] if isinstance(parts, str) else [_picture(part) for part in parts[1:]]
        with self.lock:
            self.prompts.append(prompt)
            self.sizes += [(picture.size, prompt) for picture in pictures]
        if body["model"] == "teacher":
            answer = re.search(r"would do\): (.*)", prompt)
            box = re.search(r"\{\"bbox_2d\": \[\d.*?\]\}", prompt)
            assert answer is not None
            assert box is not None
            text = self.write(answer[1].split(" | ")[0], box[0], nth)
        else:
            text = self.recognise(prompt) if pictures else self.cohere(prompt)
        usage = {"prompt_tokens": 1000, "completion_tokens": 100}
        return {
            "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": usage,
        }


def rationale(answer: str, box: str) -> str:
    """What a good teacher writes."""
    return (
        f"<think>The words that the question is about are small, so I look closer at them. {box} Now the print can be "
        f"read: it says {answer}. That is what was asked for.</think><answer>{answer}</answer>"
    )


def _picture(part: dict[str, Any]) -> Image.Image:
    kind, data = part["image_url"]["url"].split(",", 1)
    assert kind == "data:image/jpeg;base64"
    picture = Image.open(BytesIO(base64.b64decode(data)))
    picture.load()
    return picture


@contextmanager
def serving(service: Service) -> Iterator[Service]:
    """Run the server for as long as it is needed."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            self.send(200, b"{}", {})

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            digest = hashlib.sha256(raw).hexdigest()
            with service.lock:
                nth = service.asked[digest]
                service.asked[digest] += 1
                service.busy += 1
                service.keys.add(self.headers["Authorization"])
            try:
                self.respond(raw, digest, nth)
            finally:
                with service.lock:
                    service.busy -= 1

        def respond(self, raw: bytes, digest: str, nth: int) -> None:
            trouble = service.trouble(digest, nth)
            if isinstance(trouble, tuple):
                self.send(trouble[0], b"{}", trouble[1])
                return
            time.sleep(trouble)
            if self.send(200, json.dumps(service.reply(json.loads(raw), service.answered[digest])).encode(), {}):
                with service.lock:
                    service.answered[digest] += 1

        def send(self, status: int, text: bytes, headers: dict[str, str]) -> bool:
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)
                self.wfile.flush()
            except OSError:
                return False  # the client is gone
            return True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    service.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()


def settings(service: Service, out: Path, **changes: Any) -> dict[str, Any]:
    """The settings of a build against the server."""

    def endpoint(model: str, **more: Any) -> dict[str, Any]:
        return {"model": model, "base_url": service.url, "key_variable": "VLIR_KEY", "backoff": 0.02, **more}

    def check(name: str, prompt: str) -> dict[str, Any]:
        return {"class_path": name, "init_args": {"prompt": str(PROMPTS / prompt), "endpoint": endpoint(name)}}

    return {
        "out": str(out),
        "sources": [
            {
                "class_path": "VLIR",
                "init_args": {"path": str(DATA / "documents" / "questions.jsonl"), "root": str(DATA)},
            }
        ],
        "teacher": {
            "class_path": "ChatTeacher",
            "init_args": {
                "prompt": str(PROMPTS / "teacher.txt"),
                "endpoint": endpoint("teacher", input_price=2.0, output_price=10.0),
                "drafts": 2,
            },
        },
        "checks": [check("SemanticUnits", "semantic_unit.txt"), check("Coherence", "coherence.txt")],
        "splits": {"shares": {"train": 0.7, "val": 0.3}},
        "workers": 4,
        **changes,
    }


def run(config: str) -> None:
    """What `python -m datamodules.vlir build` does, for a process of its own."""
    from datamodules.vlir.__main__ import main

    raise SystemExit(main(["build", "--config", config]))


def replies_in(folder: Path) -> int:
    """How many replies are on disk."""
    return sum(1 for _ in (folder / "replies").glob("*/??/*.json"))
