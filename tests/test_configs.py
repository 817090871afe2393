"""Every shipped file is read by the command that it opens with, and says what it claims to."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from commands.cli import cli
from commands.pipeline import arguments, check, pipeline

ROOT = Path(__file__).parents[1]
FILES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.yaml"))
OTHERS = ("/ablations/", "/vlir/")  # read by other commands, and tested with these
RUNS = [name for name in FILES if not name.endswith("/pipeline.yaml") and not any(part in name for part in OTHERS)]


def command_of(name: str) -> list[str]:
    """The arguments of the first command in a file's opening comment."""
    comment = [line[1:].strip() for line in (ROOT / name).read_text().splitlines() if line.startswith("#")]
    joined = re.sub(r"\\\s*\n", " ", "\n".join(comment))
    line = next(line for line in joined.splitlines() if "python train.py" in line)
    return shlex.split(line.partition("python train.py ")[2])  # what stands before it sets the environment


def printed(args: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The configuration that a command comes to."""
    with pytest.raises(SystemExit) as end:
        cli([*args, "--print_config"])
    said = capsys.readouterr()
    assert end.value.code == 0, said.err
    config: dict[str, Any] = yaml.safe_load(said.out)
    return config


@pytest.mark.parametrize("name", RUNS)
def test_the_command_that_a_file_opens_with_is_understood(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    args = command_of(name)
    assert any(name in arg for arg in args), f"the command of {name} does not read it"
    assert printed(args, capsys)["model"]["class_path"]


PIPELINES = [name for name in FILES if name.endswith("/pipeline.yaml")]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_stage_of_a_pipeline_is_understood(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    command, *args = command_of(name)
    assert (command, args[:2]) == ("pipeline", ["--config", name])
    parser = ArgumentParser()
    parser.add_argument("-c", "--config", action="config")
    parser.add_function_arguments(pipeline)
    values = parser.instantiate(parser.parse_args(args))
    check(values.stages, values.report)
    for stage in values.stages:
        given = arguments(stage, Path(values.run_dir), values.seed)
        assert printed(given, capsys)["model"]["class_path"]


@pytest.mark.parametrize("other", ["gemma3", "timm_lm", "qwen3_vl"])
def test_a_recipe_takes_another_backbone_by_one_file(
    other: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipe, swapped = "configs/vlm_r3_7b_rgrpo.yaml", f"configs/backbones/{other}.yaml"
    config = printed(["fit", "--config", recipe, "--config", swapped], capsys)
    wanted = yaml.safe_load((ROOT / swapped).read_text())["model"]["init_args"]["backbone"]
    backbone = config["model"]["init_args"]["backbone"]
    assert backbone["class_path"].endswith(wanted["class_path"])
    given = wanted["init_args"]
    assert backbone["init_args"].get("model") == given.get("model")
    assert config["rollout"]["sampler"]["size"] == 5


def test_recipes_have_the_papers_numbers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sft = printed(["fit", "--config", "configs/vlm_r3_7b_sft.yaml"], capsys)
    assert sft["data"]["init_args"]["batch_size"] == 64
    assert sft["trainer"]["max_epochs"] == 3
    assert sft["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 2e-7
    assert sft["model"]["init_args"]["freeze"] == ["vision", "projector"]
    rgrpo = printed(["fit", "--config", "configs/vlm_r3_7b_rgrpo.yaml"], capsys)
    assert (rgrpo["rollout"]["sampler"]["size"], rgrpo["data"]["init_args"]["batch_size"]) == (5, 16)
    assert rgrpo["trainer"]["max_steps"] == 300
    assert rgrpo["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-6
    assert rgrpo["model"]["init_args"]["freeze"] == ["vision", "projector"]
