"""``predictions.jsonl``: a line a trajectory, written as it comes; what an interrupted run has answered is kept."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback
from torch import nn

from callbacks.few_shot import FewShot
from modules.engine import Decoding
from modules.evaluation import BENCHMARKS
from modules.policy import PolicyError
from modules.trajectory import Sample

logger = logging.getLogger(__name__)

RECORD = "evaluation.json"  # what decided the predictions beside it
Line = dict[str, Any]
Key = tuple[str, str, int]  # mode, question, draw


class Predictions:
    """The lines of one rank, in a file of its own.

    Args:
        trainer: whose ``default_root_dir`` is the folder, and whose ranks share it.
        decided_by: what decides the predictions, by name; lines that stand there already are kept if it is the same,
            else moved aside. None: nothing is kept.
    """

    def __init__(self, trainer: L.Trainer, decided_by: Mapping[str, str] | None = None) -> None:
        self.folder = Path(trainer.default_root_dir)
        self.answered: dict[Key, Line] = {}
        if decided_by is not None:
            if trainer.is_global_zero:
                prepare(self.folder, decided_by)
            trainer.strategy.barrier("predictions")
            self.answered = {key(line): line for file in files(self.folder) for line in whole_lines(file)}
            trainer.strategy.barrier("predictions are read")
        self.folder.mkdir(parents=True, exist_ok=True)
        name = "predictions.jsonl" if trainer.world_size == 1 else f"predictions.{trainer.global_rank}.jsonl"
        self._file: TextIO = (self.folder / name).open("w" if decided_by is None else "a", encoding="utf-8")
        if self.answered and trainer.is_global_zero:
            logger.warning("%d answers of an interrupted run are kept.", len(self.answered))

    def known(self, mode: str, asked: Sequence[tuple[Sample, int]]) -> list[Line]:
        """The lines that are there already of these questions and draws."""
        found = (self.answered.get((mode, sample.id, draw)) for sample, draw in asked)
        return [line for line in found if line is not None]

    def write(self, lines: Iterable[Line]) -> None:
        """Write lines, and see to it that they are on disk if this process dies."""
        for line in lines:
            self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def key(line: Line) -> Key:
    """What a line is the answer of."""
    return line["mode"], line["id"], line.get("draw", 0)


def files(folder: Path) -> list[Path]:
    """The files of all ranks."""
    return sorted(folder.glob("predictions*.jsonl"))


def whole_lines(file: Path) -> Iterator[Line]:
    """The lines of a file that `mended` has seen."""
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def prepare(folder: Path, decided_by: Mapping[str, str]) -> None:
    """Leave lines that may be gone on with, and nothing else."""
    record = folder / RECORD
    before = read_record(record)
    found = files(folder)
    if found and before != decided_by:
        changed = sorted(name for name in {*before, *decided_by} if before.get(name) != decided_by.get(name))
        aside = move_aside(folder, found)
        logger.warning(
            "The predictions in %s are of another evaluation (changed: %s); they are now in %s, and all questions are "
            "asked anew.",
            folder,
            ", ".join(changed),
            aside,
        )
    else:
        for file in found:
            mend(file)
    folder.mkdir(parents=True, exist_ok=True)
    part = record.with_name(record.name + ".part")
    part.write_text(json.dumps(dict(decided_by), indent=2) + "\n", encoding="utf-8")
    part.replace(record)


def read_record(record: Path) -> dict[str, str]:
    """What decided earlier predictions; empty if nobody knows."""
    try:
        value = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def move_aside(folder: Path, found: Iterable[Path]) -> Path:
    """Move files into ``predictions.old-<k>`` of their folder, k the first that is free."""
    k = 1
    while (aside := folder / f"predictions.old-{k}").exists():
        k += 1
    aside.mkdir()
    for file in found:
        file.rename(aside / file.name)
    return aside


def mend(file: Path) -> None:
    """Cut a file off behind its last whole line: a process that is killed leaves a torn one."""
    good = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                key(json.loads(line))
            except (ValueError, TypeError, KeyError):
                logger.warning("%s:%d: a line that was not written to its end is dropped.", file, number)
                break
            if not line.endswith(b"\n"):
                break
            good += len(line)
    with file.open("r+b") as whole:
        whole.truncate(good)


def kept(sample: Sample) -> Line:
    """What a line keeps of a benchmark's own row, for the official scorers: the row, and what its intervals draw."""
    found = {"annotation": sample.meta["annotation"]} if "annotation" in sample.meta else {}
    benchmark = BENCHMARKS.get(sample.source)
    if benchmark is not None and benchmark.cluster in sample.meta:
        found["cluster"] = str(sample.meta[benchmark.cluster])
    return found


def decided_by(
    trainer: L.Trainer, policy: nn.Module, evaluations: Mapping[str, Decoding], samples: Mapping[str, int], seed: int
) -> dict[str, str]:
    """What the predictions of a test depend on, each part as a digest.

    Weights, not the names of files: a checkpoint that was trained on since is another one. Of the configuration the
    policy's backbone and the rollout; batch sizes, devices and folders may change.

    Raises:
        PolicyError: two test questions have one id; names both.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    config = next((c.config for c in callbacks if isinstance(c, SaveConfigCallback)), None)
    parts: dict[str, Any] = {
        "decoding": [{name: asdict(decoding) for name, decoding in evaluations.items()}, dict(samples), seed],
        "questions": list(questions(trainer)),
        "examples": [example_of(e) for c in callbacks if isinstance(c, FewShot) for e in c.examples],
    }
    if config is not None:
        parts |= {"backbone": config.get("model.init_args.backbone"), "rewards": config.get("rollout.rewards")}
    digests = {name: digest(json.dumps(plain(part), sort_keys=True)) for name, part in parts.items()}
    return {"weights": weights(policy), **digests}


def told(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """What was measured, as JSON has it; the inverse of `measured_of`."""
    return {name: None if math.isnan(value) else value for name, value in numbers.items()}


def measured_of(line: Line) -> dict[str, float]:
    """What was measured of a line that an interrupted run has left."""
    return {name: math.nan if value is None else value for name, value in line["measured"].items()}


def sources_of(trainer: L.Trainer, split: str) -> list[str]:
    """The data sets of a split, in the order of their names, where the data module reads records."""
    found = getattr(getattr(trainer, "datamodule", None), "records", None)
    records = found.get(split, []) if isinstance(found, dict) else []
    return sorted({record.sample.source for record in records})


def questions(trainer: L.Trainer) -> Iterator[list[object]]:
    """What is asked; nothing where the data module does not say.

    Raises:
        PolicyError: see `decided_by`.
    """
    found = getattr(getattr(trainer, "datamodule", None), "records", None)
    seen: dict[str, str] = {}
    for record in found.get("test", []) if isinstance(found, dict) else []:
        sample, where = record.sample, f"{record.file}:{record.row}"
        if sample.id in seen:
            both = f"{seen[sample.id]} and in {where}"
            raise PolicyError(f"Expected every test question once, but {sample.id!r} is in {both}.")
        seen[sample.id] = where
        yield [sample.id, sample.question, sample.choices, sample.answers, *map(str, record.images)]


def example_of(example: Sample) -> list[object]:
    """What a solved example shows."""
    images = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in example.images]
    return [example.id, example.question, example.answers, [str(step) for step in example.rationale], *images]


def weights(policy: nn.Module) -> str:
    """A digest of all parameters: sums, and some of the values themselves."""
    known = hashlib.sha256()
    for name, parameter in policy.state_dict().items():
        flat = parameter.detach().reshape(-1)
        few = flat[:: max(1, len(flat) // 16)][:16].double().tolist()
        total = float(flat.double().sum()) if len(flat) < 2**20 else float(flat.sum().double())
        known.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {total:.6g} {few}".encode())
    return known.hexdigest()[:16]


def digest(text: str) -> str:
    """16 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plain(value: Any) -> Any:
    """A configuration as JSON can hold it."""
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
