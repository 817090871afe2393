"""The commands that the documentation shows: found, and run one after another in a copy of the project.

    python -m tests.docs_check                 # all that this machine can run, minutes; a line each
    python -m tests.docs_check --list

What is not run is listed with its reason in `NOT_RUN`, what would take long is shortened by `SHORT`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_BEFORE = r"^\s*(?:\$ |[A-Z_]+=\S* |srun |\w+=\$\(|mkdir -p \S+ && )*"  # of a command in a block
_KINDS = r"(?:\.venv/bin/)?python (?:train\.py\b|-m )|make |sbatch |bash slurm/"
_BLOCK = re.compile(rf"{_BEFORE}((?:{_KINDS}).*)")
_INLINE = re.compile(r"`((?:\.venv/bin/)?(?:python (?:train\.py|-m)|make) [^`]+)`")
_ENDS = ("&", "&&", "|", ";", ">")

GPU = "needs the weights of a model on the hub, and a GPU"
CLUSTER = "needs a SLURM cluster; `tests/test_slurm.py` submits these files to one of its own"
NOT_RUN = {  # how a command begins -> why
    "make quickstart": "takes a quarter of an hour; two stages of its pipeline are run, a step each",
    "make test": "are the tests, which are run by themselves",
    "python -m pytest": "likewise",
    "make bench": "measures for long",
    "make docs-check": "is this",
    "make fuzz": "takes ten minutes",
    "sbatch": CLUSTER,
    "bash slurm/chain.sh": CLUSTER,
    "python train.py fit --config configs/rgrpo.yaml": GPU,
    "python train.py test --config configs/eval/mathvista.yaml": GPU,
    "python train.py export": "needs the checkpoint of a model of the hub",
    "python train.py pipeline": "takes hours; `tests/test_pipeline.py` runs a short one",
    "python train.py postmortem": "needs a batch of a run that failed; `tests/callbacks/test_faults.py` makes one",
    "python -m datamodules.vlir": "needs a teacher behind an endpoint, or a policy of the hub",
    "python -m lmms_eval": "needs the hub's data sets",
}
_STEP = "--trainer.max_steps 1 --trainer.limit_val_batches 1 --trainer.num_sanity_val_steps 0"
SHORT = {  # how a command begins -> what is put behind it
    "python train.py fit --config": _STEP,
    "python train.py test": "--trainer.limit_test_batches 1",
    "python train.py audit": "--trainer.limit_test_batches 1",
    "python train.py ablate": "--list",
    "python -m benchmarks.vlir_rows": "--rows 1000",
    "python -m benchmarks.moving_box": "--seeds 1",
}
_BASE = "--config configs/quickstart/base.yaml"
_TEST = f"python train.py test {_BASE} --config configs/eval/quickstart.yaml --trainer.limit_test_batches 1"
FIRST = (  # what the others start from
    "python train.py pipeline --config short.yaml",
    f"{_TEST} --model.init_args.init_from runs/quickstart/sft/final.ckpt --run_dir runs/eval/sft",
    f"{_TEST} --model.init_args.init_from runs/quickstart/rgrpo/final.ckpt --run_dir runs/eval/rgrpo",
)
_PROBLEM = {"question_type": "multi_choice", "answer_type": "text", "choices": ["a", "b"], "precision": None}
_PROBLEM |= {"answer": "b", "metadata": {"task": "counting"}}
GIVEN: dict[str, Any] = {  # files that a user brings
    "output.json": {"1": {"extraction": "B"}},
    "testmini.json": {"1": _PROBLEM},
}
_STEPS = [option.replace(" ", "=") for option in re.findall(r"--\S+ \S+", _STEP)]
GIVEN["short.yaml"] = {  # the first two stages of the quickstart's pipeline, a step each; JSON is YAML
    "run_dir": "runs/quickstart",
    "stages": [
        {"name": name, "configs": [f"configs/quickstart/{file}.yaml" for file in ("base", name)], "args": _STEPS} | more
        for name, more in (("sft", {}), ("rgrpo", {"start_from": "sft"}))
    ],
}
PICTURE = "photo.png"  # that `predict` is shown


@dataclass(frozen=True)
class Command:
    """One command as it is shown."""

    file: str
    line: int
    words: tuple[str, ...]  # without what sets the environment, and without the folder of python

    def __str__(self) -> str:
        return shlex.join(self.words)

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.file}:{self.line}"


def commands() -> list[Command]:
    """Every command of the README and of docs/, once for each place."""
    return [command for file in FILES for command in _commands_of(file)]


def _commands_of(file: Path) -> Iterator[Command]:
    name = file.relative_to(ROOT).as_posix()
    for number, text, is_code in _logical_lines(file.read_text(encoding="utf-8")):
        block = _BLOCK.match(text)
        for shown in [block[1]] if is_code and block else [] if is_code else _INLINE.findall(text):
            if is_code and "$(" in text:
                shown = shown.rstrip().removesuffix(")")
            words = shlex.split(re.sub(r"[\[\]]", "", shown) if "[--" in shown else shown, comments=True)
            stop = next((k for k, word in enumerate(words) if word in _ENDS), len(words))
            words[0] = words[0].removeprefix(".venv/bin/")
            yield Command(name, number, tuple(words[:stop]))


def _logical_lines(text: str) -> Iterator[tuple[int, str, bool]]:
    r"""Lines, those that end in \ joined with the next ones; and whether each is in a block of code."""
    fenced, joined, first = False, "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
            continue
        first = first if joined else number
        joined += line
        if joined.endswith("\\"):
            joined = joined[:-1]
            continue
        yield first, joined, fenced or joined.startswith("    ")
        joined = ""


def left_behind(folder: str, names: list[str]) -> set[str]:
    """What a copy of the project does without: what was installed, made or fetched."""
    own = {".venv", ".git", "runs", "data"} if Path(folder) == ROOT else set()
    return {name for name in names if name in own or name.endswith(("_cache", "__pycache__"))}


def not_run(command: str) -> str | None:
    """Why a command is not run; None if it is."""
    return next((why for begins, why in NOT_RUN.items() if command.startswith(begins)), None)


def shortened(command: str) -> str:
    """The command with what makes it short."""
    return " ".join([command, *(more for begins, more in SHORT.items() if command.startswith(begins))])


def run(command: str, folder: Path) -> tuple[int, str]:
    """Run one command in a folder; its exit status, and the end of what it printed."""
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    return done.returncode, "\n".join((done.stdout + done.stderr).splitlines()[-15:])


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.docs_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--list", action="store_true", help="say what would be run, and what not and why")
    given = parser.parse_args()
    found = list(dict.fromkeys(map(str, commands())))
    left_out = {command: why for command in found if (why := not_run(command)) is not None}
    todo = [*FIRST, *(shortened(command) for command in found if command not in left_out)]
    for command, why in left_out.items():
        print(f"not run  {command}\n         {why}")
    if given.list:
        print("\n".join(f"run      {command}" for command in todo))
        return 0
    failed = 0
    with TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        shutil.copytree(ROOT, copy, ignore=left_behind)
        Image.new("RGB", (192, 192), "cyan").save(copy / PICTURE)
        for name, content in GIVEN.items():
            (copy / name).write_text(json.dumps(content))
        for command in todo:
            began = time.monotonic()
            status, said = run(command, copy)
            failed += status != 0
            print(f"{'failed' if status else 'ran':<8} {command}  ({time.monotonic() - began:.0f} s)", flush=True)
            if status:
                print(said, flush=True)
    print(f"{len(todo) - failed} of {len(todo)} commands ran, {len(left_out)} were not tried")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
