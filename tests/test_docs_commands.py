"""Every command that README.md and docs/ show is one that there is, with arguments that it takes."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jsonargparse
import pytest

import train
from tests.docs_check import FILES, NOT_RUN, ROOT, SHORT, Command, commands, not_run

COMMANDS = {str(command): command for command in commands()}
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
MODULES = {"lmms_eval"}  # of others, not installed for the tests


class Parsed(BaseException):
    """The arguments were understood; nothing is to be run."""


@pytest.fixture(autouse=True)
def _only_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for kind in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
        genuine = kind.parse_args

        def parse_args(self: Any, *args: Any, genuine: Any = genuine, **kwargs: Any) -> None:
            genuine(self, *args, **kwargs)
            raise Parsed

        monkeypatch.setattr(kind, "parse_args", parse_args)


def check(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command.

    Raises:
        SystemExit: with code 2, if it is none.
        AssertionError: it names a file or a target that there is not.
    """
    match words:
        case ["make", target, *values]:
            assert target in TARGETS, f"no target {target} in the Makefile"
            assert all(re.fullmatch(r"[A-Z_]+=.*", value) for value in values)
        case ["python", "train.py", *args]:
            parse(train.main, args)
        case ["python", "-m", "pytest", "-m", _, *places]:
            assert all((ROOT / place).exists() for place in places)
        case ["python", "-m", name, *args]:
            if name not in MODULES:
                module = "datamodules.vlir.__main__" if name == "datamodules.vlir" else name
                monkeypatch.setattr(sys, "argv", [name, *args])
                main = importlib.import_module(module).main
                parse(main if main.__code__.co_argcount else lambda _: main(), args)
        case ["sbatch", *args]:
            at = next(k for k, arg in enumerate(args) if not arg.startswith("--"))  # before it: sbatch's own
            file, rest = args[at], args[at + 1 :]
            if file.startswith("slurm/"):
                assert (ROOT / file).is_file()
                parse(train.main, ["ablate", *rest] if "ablations" in file else rest)
        case ["bash", script, file, *stages]:
            assert (ROOT / script).is_file()
            assert (ROOT / file).is_file()
            for stage in stages:
                parse(train.main, shlex.split(stage))
        case _:
            raise AssertionError(f"an unknown kind of command: {words}")


def parse(main: Any, args: Sequence[str]) -> None:
    try:
        main(list(args))
    except Parsed:
        return
    except SystemExit as end:
        if end.code == 0 and "--help" in args:
            return
        raise
    raise AssertionError("the command ran")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_shown_is_understood(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command: Command = COMMANDS[name]
    try:
        check(command.words, monkeypatch)
    except SystemExit:
        pytest.fail(f"{command.where}: {command}\n{capsys.readouterr().err[-1500:]}")


def test_a_command_that_is_none_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = ["python train.py fit --config configs/none.yaml", "python train.py fit --confgi a.yaml"]
    wrong += ["python train.py rescore --benchmark x --prediction y", "python -m benchmarks.parity --backbones x"]
    wrong += ["sbatch slurm/one_node.sbatch fit --run_dri a"]
    for line in wrong:
        with pytest.raises(SystemExit) as end:
            check(shlex.split(line), monkeypatch)
        assert end.value.code == 2
    for line in ["make dinner", "sbatch slurm/none.sbatch", "python train.py"]:
        with pytest.raises((AssertionError, IndexError, SystemExit)):
            check(shlex.split(line), monkeypatch)


def test_every_file_with_commands_is_read() -> None:
    shown = {command.file for command in COMMANDS.values()}
    for file in FILES:
        has = re.search(r"^(    |srun |)\.venv/bin/python train\.py", file.read_text(), flags=re.MULTILINE)
        assert not has or file.relative_to(ROOT).as_posix() in shown
    assert len(COMMANDS) > 30


def test_what_is_not_run_has_a_reason_and_what_has_none_is_run() -> None:
    """`make docs-check` passes over nothing silently, and keeps no reason for what is no longer shown."""
    for begins in (*NOT_RUN, *SHORT):
        target = begins.removeprefix("make ") in TARGETS
        assert target or any(name.startswith(begins) for name in COMMANDS), f"no command begins with {begins}"
    assert any(not_run(name) is None for name in COMMANDS)
