"""What a build leaves on disk: one file a split, the images, what was rejected and why, what it cost."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from datamodules.vlir.draft import Draft, Rejected
from datamodules.vlir.endpoint import Caller
from datamodules.vlir.fingerprints import read_bytes
from datamodules.vlir.rules import Question
from datamodules.vlir.schema import DataError, to_row

FORM = 1  # of the manifest


@dataclass(frozen=True)
class Splits:
    """How the corpus is divided: by image, so that no image is in two splits.

    An image's split depends on the image and the seed alone: it keeps it when the corpus grows. So shares are met on
    average, not exactly.

    Args:
        shares: of the images, by the split's name; they sum to 1.
        seed: another one, another division.
    """

    shares: dict[str, float] = field(default_factory=lambda: {"train": 0.95, "val": 0.05})
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.shares or any(share <= 0 for share in self.shares.values()):
            raise ValueError(f"Expected `shares` to be positive, but got {self.shares}.")
        if abs(sum(self.shares.values()) - 1) > 1e-6:
            raise ValueError(f"Expected `shares` to sum to 1, but got {sum(self.shares.values()):g}.")
        if wrong := [name for name in self.shares if not name.isidentifier() or name == "rejected"]:
            raise ValueError(f"Expected `shares` to name splits like train or val, but got {wrong[0]!r}.")

    def of(self, images: Sequence[Sequence[str]]) -> list[str]:
        """The split of each question.

        Args:
            images: the digests of each question's images; questions that share one, directly or through others, go
                together.
        """
        number = {digest: k for k, digest in enumerate(dict.fromkeys(d for digests in images for d in digests))}
        links = [(number[digests[0]], number[other]) for digests in images for other in digests]
        ones, (rows, columns) = [1] * len(links), zip(*links, strict=True) if links else ((), ())
        _, part = connected_components(coo_array((ones, (rows, columns)), shape=(len(number),) * 2), directed=False)
        first: dict[int, str] = {}
        for digest, k in number.items():
            first[part[k]] = min(digest, first.get(part[k], digest))
        return [self._split(first[part[number[digests[0]]]]) for digests in images]

    def _split(self, digest: str) -> str:
        draw = int(hashlib.sha256(f"{self.seed} {digest}".encode()).hexdigest()[:12], 16) / 16**12
        for name, share in self.shares.items():
            draw -= share
            if draw < 0:
                return name
        return name


@dataclass(frozen=True, eq=False)
class Refusal:
    """One reason why there is no sample: of a row, or of one attempt at it."""

    id: str
    source: str
    file: str
    row: int
    attempt: int  # from 1; 0: before anything was written
    error: Rejected


def write_corpus(
    folder: Path,
    kept: Sequence[tuple[Question, Draft]],
    refusals: Sequence[Refusal],
    questions: int,
    teacher: str,
    splits: Splits,
    callers: Mapping[str, Caller],
) -> None:
    """Write everything; a file is there as a whole or not at all, and the manifest is the last.

    Args:
        folder: of the corpus.
        kept: questions with the rationale that passed.
        refusals: why others did not.
        questions: how many were put to the teacher.
        teacher: who wrote.
        splits: how the corpus is divided.
        callers: who was paid.

    Raises:
        DataError: the disk is full, or the folder cannot be written.
    """
    try:
        paths = _copy_images(folder, [question for question, _ in kept])
        lines: dict[str, list[dict[str, Any]]] = {name: [] for name in splits.shares}
        names = splits.of([[f.digest for f in question.prints] for question, _ in kept])
        for (question, draft), name in zip(kept, names, strict=True):
            sample = question.sample
            written = {**sample.provenance, "teacher": teacher}
            sample = replace(sample, rationale=draft.steps, provenance=written)
            lines[name].append(to_row(sample, [paths[f.digest] for f in question.prints]))
        for name, rows in lines.items():
            write_lines(folder / f"{name}.jsonl", rows)
        passed = {question.sample.id for question, _ in kept}
        write_lines(folder / "rejected.jsonl", [_refusal_row(refusal, passed) for refusal in refusals])
        for stale in set(read_manifest(folder).get("splits", {})) - set(lines):
            (folder / f"{stale}.jsonl").unlink(missing_ok=True)
        manifest = {
            "form": FORM,
            "teacher": teacher,
            "questions": questions,
            "kept": len(kept),
            "splits": {name: len(rows) for name, rows in lines.items()},
            "cost": {name: cost_of(caller) for name, caller in callers.items()},
        }
        _replace(folder / "corpus.json", json.dumps(manifest, indent=2) + "\n")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error}).") from error


def cost_of(caller: Caller) -> dict[str, Any]:
    """What an endpoint was paid for the replies that are kept, over all runs."""
    total: Counter[str] = Counter()
    for value in caller.store.values():
        counted = [value.get("input_tokens"), value.get("output_tokens")]
        total["replies"] += 1
        total["uncounted"] += None in counted
        total["input_tokens"] += counted[0] or 0
        total["output_tokens"] += counted[1] or 0
    names = ("replies", "uncounted", "input_tokens", "output_tokens")
    cost = caller.endpoint.cost(total["input_tokens"], total["output_tokens"])
    return {"model": caller.endpoint.model, **{name: total[name] for name in names}, "cost": cost}


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the last complete build wrote of itself; empty if there was none."""
    try:
        found = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines, there as a whole or not at all."""
    _replace(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _copy_images(folder: Path, questions: Sequence[Question]) -> dict[str, str]:
    """Copy the images into the corpus, byte for byte; their paths in it by digest."""
    (folder / "images").mkdir(exist_ok=True)
    there = {path.stem: path for path in (folder / "images").iterdir() if path.suffix != ".part"}
    paths: dict[str, str] = {}
    for question in questions:
        for image, fingerprint in zip(question.images, question.prints, strict=True):
            if fingerprint.digest in paths:
                continue
            stem = fingerprint.digest[:24]
            if stem not in there:
                data = read_bytes(image)
                with Image.open(BytesIO(data)) as opened:
                    kind = {"JPEG": "jpg"}.get(opened.format or "", (opened.format or "image").lower())
                there[stem] = folder / "images" / f"{stem}.{kind}"
                part = there[stem].with_suffix(".part")
                part.write_bytes(data)
                os.replace(part, there[stem])
            paths[fingerprint.digest] = f"images/{there[stem].name}"
    return paths


def _refusal_row(refusal: Refusal, passed: set[str]) -> dict[str, Any]:
    found = {key: value for key, value in vars(refusal).items() if key != "error"}
    found |= {"reason": str(refusal.error.reason), "detail": refusal.error.detail}
    found |= {"passed_later": refusal.attempt > 0 and refusal.id in passed}
    return found | ({"text": refusal.error.text} if refusal.error.text else {})
