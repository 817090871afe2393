"""What comes from outside runs no code, and what is secret stays inside (docs/security.md)."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from commands.cli import cli
from modules.policy import PolicyError, read_policy
from tests.cli_stand_ins import CONFIG, TinyPolicy  # noqa: F401  named in the configuration

ROOT = Path(__file__).parents[1]
PACKAGES = ("modules", "datamodules", "callbacks", "commands", "benchmarks")
SOURCES = [*(p for top in PACKAGES for p in sorted((ROOT / top).rglob("*.py"))), ROOT / "train.py"]
SECRET = "sk-0123456789-never-to-be-seen"

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(CONFIG)
    return tmp_path


class Evil:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("ran",))


def calls(source: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def named(call: ast.Call) -> str:
    return ast.unparse(call.func)


def test_the_sources_load_and_run_nothing_that_could_be_code() -> None:
    found = []
    for source in SOURCES:
        where = source.relative_to(ROOT)
        tree = ast.parse(source.read_text(encoding="utf-8"))
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        whole = {n.module: {a.name for a in n.names} for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        imported |= {module for module, parts in whole.items() if module and parts != {"UnpicklingError"}}
        found += [f"{where}: import {name}" for name in imported & {"pickle", "dill", "joblib", "marshal", "shelve"}]
        for call in calls(source):
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            if named(call) == "torch.load" and given.get("weights_only") != "True":
                found.append(f"{where}:{call.lineno}: torch.load without weights_only")
            if given.get("trust_remote_code", "False") != "False" or given.get("allow_pickle", "False") != "False":
                found.append(f"{where}:{call.lineno}: {given}")
            if named(call) in {"eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load"}:
                found.append(f"{where}:{call.lineno}: {named(call)}")
            if given.get("shell", "False") != "False":
                found.append(f"{where}:{call.lineno}: a shell")
    assert found == []


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_checkpoint_with_code_in_it_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli(["fit", "--config=base.yaml", "--run_dir=run"])
    checkpoint = torch.load("run/last.ckpt", weights_only=True)
    torch.save({**checkpoint, "extra": Evil()}, "evil.ckpt")
    with pytest.raises(SystemExit) as end:
        cli([command, "--config=base.yaml", "--run_dir=other", "--ckpt_path=evil.ckpt", "--trainer.max_steps=8"])
    assert end.value.code == 2
    assert "hold weights and plain values" in capsys.readouterr().err
    assert not Path("ran").exists()
    # the test can fail: it would have run
    torch.load("evil.ckpt", weights_only=False)
    assert Path("ran").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "foreign"])
@pytest.mark.parametrize("name", ["run/last.ckpt", "last"])
def test_a_damaged_checkpoint_is_one_sentence(damage: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli(["fit", "--config=base.yaml", "--run_dir=run"])
    file = Path("run/last.ckpt")
    if damage == "foreign":
        torch.save({"weights": torch.zeros(1)}, file)
    else:
        whole = file.read_bytes()
        file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"text\n"}[damage])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli(["fit", "--config=base.yaml", "--run_dir=run", f"--ckpt_path={name}", "--trainer.max_steps=8"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "Expected `ckpt_path` 'run/last.ckpt' to be a checkpoint of training, but it is damaged" in said
    assert "weights_only" not in said


def test_weights_to_start_from_with_code_in_them_are_refused() -> None:
    torch.save({"state_dict": {}, "extra": Evil()}, "evil.ckpt")
    with pytest.raises(PolicyError, match="reading it fails"):
        read_policy("evil.ckpt", "init_from")
    assert not Path("ran").exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [ran]", "!!python/object/new:os.mkdir [ran]"])
@pytest.mark.parametrize("key", ["trainer: {max_steps: VALUE}", "vars: {x: VALUE}", "VALUE"])
def test_yaml_with_code_in_it_is_refused(tag: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("evil.yaml").write_text(key.replace("VALUE", tag) + "\n")
    with pytest.raises(SystemExit) as end:
        train.main(["fit", "--config=base.yaml", "--config=evil.yaml", "--run_dir=run"])
    assert end.value.code == 2
    assert not Path("ran").exists()
    assert not Path("run").exists()


def test_a_key_is_in_no_file_no_log_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    quickstart = [f"--config={ROOT}/configs/quickstart/{name}.yaml" for name in ("base", "rgrpo")]
    small = ["--data.root=cards", "--data.train.images=1", "--data.val.images=1", "--data.init_args.batch_size=1"]
    judge = {"model": "judge", "base_url": "http://127.0.0.1:9/v1", "attempts": 1, "fail_fast": "false"}
    judged = ["--rollout.rewards.judge=modules.Judge", *(f"--rollout.rewards.judge.{k}={v}" for k, v in judge.items())]
    judged += ["--rollout.rewards.judge.weight=0", "--rollout.rewards.judge.cache=verdicts"]
    caplog.set_level("DEBUG")
    cli(["fit", *quickstart, *small, *judged, "--run_dir=run", "--trainer.max_steps=1", "--rollout.sampler.size=8"])
    assert "judge" in caplog.text  # it was asked, and could not be reached
    files = [path for path in Path().rglob("*") if path.is_file()]
    assert {"run/config.yaml", "run/last.ckpt"} <= {path.as_posix() for path in files}
    assert [str(path) for path in files if SECRET.encode() in path.read_bytes()] == []
    said = capfd.readouterr()
    assert SECRET not in caplog.text + said.out + said.err


def test_a_key_in_the_place_of_its_name_is_refused_and_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    judge = {"model": "m", "base_url": "http://x/v1", "key_variable": SECRET}
    judged = ["--rollout.rewards.judge=modules.Judge", *(f"--rollout.rewards.judge.{k}={v}" for k, v in judge.items())]
    with pytest.raises(SystemExit) as end:
        cli(["fit", "--config=base.yaml", *judged])
    assert end.value.code == 2
    said = capsys.readouterr()
    assert "`key_variable` to be the name" in said.err
    assert SECRET not in said.err + said.out
