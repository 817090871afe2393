"""Stages after one another, through the real entry point, with a policy of one weight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning_utilities.core.rank_zero import rank_zero_only

import commands.pipeline
import train
from commands.pipeline import PipelineError, prepare
from tests.cli_stand_ins import CONFIG, TinyPolicy

PIPELINE = """\
run_dir: runs
stages:
  - {name: sft, configs: [base.yaml]}
  - {name: longer, configs: [base.yaml], start_from: sft, args: [--model.goal=2]}
  - {name: rl, configs: [base.yaml, rl.yaml], start_from: sft}
  - {name: test_longer, command: test, configs: [base.yaml], start_from: longer}
  - {name: test_rl, command: test, configs: [base.yaml], start_from: rl, args: [--model.right=3]}
report:
  rows:
    longer: {test: test_longer, seconds_from: [sft, longer]}
    rl: {test: test_rl, seconds_from: [sft, rl]}
  compare: {rl_minus_longer: [rl, longer]}
"""
SHORT = "run_dir: runs\nstages:\n  - {name: sft, configs: [base.yaml]}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files of a pipeline; no step has been taken."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(CONFIG)
    Path("rl.yaml").write_text("model: {init_args: {goal: 3.0}}\n")
    Path("pipeline.yaml").write_text(PIPELINE)
    TinyPolicy.taken.clear()
    return tmp_path


def run(*args: str) -> None:
    train.main(["pipeline", "--config=pipeline.yaml", *args])


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Stage -> what its line says at the end."""
    lines = [each.split() for each in capsys.readouterr().out.splitlines() if each.startswith("pipeline: ")]
    return {words[1]: " ".join(words[4:]) for words in lines if words[2] in ("fit", "test")}


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 2
    return capsys.readouterr().err


def final_weight(stage: str) -> float:
    return float(torch.load(f"runs/{stage}/final.ckpt", weights_only=True)["state_dict"]["backbone.weight"])


def test_stages_start_from_one_another_and_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    # 0.875 after the first four steps (see test_cli); then four steps of the clipped gradient, 0.25 each,
    # to goal 2 (w = 1.625 is 0.375 away: the fourth is 0.5 * 0.375) and to goal 3
    assert final_weight("sft") == pytest.approx(0.875, abs=1e-4)
    assert final_weight("longer") == pytest.approx(1.625 + 0.1875, abs=1e-4)
    assert final_weight("rl") == pytest.approx(1.875, abs=1e-4)
    for stage in ("longer", "rl"):
        assert float(Path(f"runs/test_{stage}/weight.txt").read_text()) == pytest.approx(final_weight(stage))
    printed = capsys.readouterr().out
    results = json.loads(Path("runs/results.json").read_text())
    assert list(results) == ["longer", "rl", "rl_minus_longer"]
    assert (results["longer"]["accuracy"], results["rl"]["accuracy"]) == (0.5, 0.75)
    spent = [json.loads(Path(f"runs/{name}/fit.json").read_text())["seconds"] for name in ("sft", "rl")]
    assert results["rl"]["seconds"] == pytest.approx(sum(spent))
    assert "rl_minus_longer" in printed
    assert "runs/sft" in printed


def test_what_has_ended_is_not_run_again(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    Path("runs/results.json").unlink()
    TinyPolicy.taken.clear()
    capsys.readouterr()
    run()
    assert TinyPolicy.taken == []
    assert set(said(capsys).values()) == {"done before"}
    assert Path("runs/results.json").is_file()


def test_a_changed_file_redoes_what_depends_on_it_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    old = Path("runs/rl/final.ckpt").read_bytes()
    Path("rl.yaml").write_text("model: {init_args: {goal: -3.0}}\n")
    capsys.readouterr()
    run()
    lines = said(capsys)
    assert [name for name, what in lines.items() if what != "done before"] == ["rl", "test_rl"]
    assert Path("runs/rl.old-1/final.ckpt").read_bytes() == old
    assert Path("runs/test_rl.old-1/predictions.jsonl").is_file()
    assert final_weight("rl") == pytest.approx(0.875 - 1, abs=1e-4)


def test_a_changed_first_stage_redoes_all_of_its_children(capsys: pytest.CaptureFixture[str]) -> None:
    two = SHORT + "  - {name: longer, configs: [base.yaml], start_from: sft}\n"
    for text in (two, two.replace("{name: sft,", "{name: sft, args: [--model.goal=0],"), two):
        Path("pipeline.yaml").write_text(text)
        capsys.readouterr()
        run()
        assert all(what.endswith(" s") for what in said(capsys).values())
    assert Path("runs/sft.old-1").is_dir()
    assert Path("runs/longer.old-2").is_dir()


def test_seed_and_run_dir_are_taken_from_the_command_line() -> None:
    Path("pipeline.yaml").write_text(SHORT)
    run("--seed", "3", "--run_dir=elsewhere")
    assert yaml.safe_load(Path("elsewhere/sft/config.yaml").read_text())["seed_everything"] == 3
    assert not Path("runs").exists()
    run("--seed=4", "--run_dir=elsewhere")
    assert Path("elsewhere/sft.old-1").is_dir()


def test_an_interrupted_stage_goes_on_from_its_last_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("pipeline.yaml").write_text(SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(TinyPolicy, "fail_at", 2)  # a checkpoint is written at the end of the epoch, after two steps
        with pytest.raises(RuntimeError, match="told to fail") as failure:
            run()
    assert any("stage 'sft' in runs/sft did not end" in note for note in failure.value.__notes__)
    assert not Path("runs/sft/final.ckpt").exists()
    run()
    assert TinyPolicy.taken == [0, 1, 2, 3]
    assert final_weight("sft") == pytest.approx(0.875, abs=1e-4)
    assert not Path("runs/sft.old-1").exists()


def test_a_stage_that_was_interrupted_too_early_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("pipeline.yaml").write_text(SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(TinyPolicy, "fail_at", 1)
        with pytest.raises(RuntimeError, match="told to fail"):
            run()
    run()
    assert TinyPolicy.taken == [0, 0, 1, 2, 3]
    assert Path("runs/sft.old-1/config.yaml").is_file()


def test_an_interrupted_stage_does_not_go_on_with_other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("pipeline.yaml").write_text(SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(TinyPolicy, "fail_at", 2)
        with pytest.raises(RuntimeError, match="told to fail"):
            run()
    run("--seed=5")
    assert TinyPolicy.taken == [0, 1, 0, 1, 2, 3]
    assert Path("runs/sft.old-1/last.ckpt").exists()


def test_a_stage_with_a_wrong_argument_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("pipeline.yaml").write_text(PIPELINE.replace("model.goal", "model.gaol"))
    message = refused(capsys)
    assert "'model.gaol'" in message
    assert "stage 'longer' in runs/longer did not end" in message


WRONG = {
    "key": ("start_from: rl", "start_fro: rl", ["start_fro", "start_from", "(pipeline.yaml:7)"]),
    "command": ("command: test, configs: [base.yaml], start_from: rl", "command: tset", ["stages.command", "tset"]),
    "parent": ("start_from: longer", "start_from: test_longer", ["'test_longer'", "sft, longer, rl"]),
    "file": ("rl.yaml", "no.yaml", ["stage 'rl'", "no.yaml"]),
    "twice": ("name: rl,", "name: sft,", ["two are called 'sft'"]),
    "tested": ("test: test_rl", "test: rl", ["`test` of row 'rl'", "test_longer, test_rl"]),
    "seconds": ("[sft, rl]}", "[sft, test_rl]}", ["`seconds_from` of row 'rl'", "'test_rl'"]),
    "compared": ("[rl, longer]", "[rl, shorter]", ["comparison 'rl_minus_longer'", "'shorter'"]),
    "same name": ("rl_minus_longer", "rl", ["both have 'rl'"]),
    "report": ("rows:", "rowss:", ["rowss", "rows"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_pipeline_is_refused_before_anything_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    old, new, expected = WRONG[name]
    assert PIPELINE.count(old) == 1
    Path("pipeline.yaml").write_text(PIPELINE.replace(old, new))
    message = refused(capsys)
    assert message.startswith("error: ")
    assert [each for each in expected if each not in message] == [], message
    assert not Path("runs").exists()


def test_a_wrong_argument_of_the_pipeline_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'--sed'; did you mean --seed?" in refused(capsys, "--sed=3")


def test_other_ranks_wait_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = tmp_path / "stage"
    prepare(stage, "old")
    (stage / "last.ckpt").write_text("of other settings")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.setattr(commands.pipeline, "WAIT", 0.2)
    with pytest.raises(PipelineError, match="first rank"):
        prepare(stage, "new")
    assert (stage / "last.ckpt").exists()
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    prepare(stage, "new")
    assert not (stage / "last.ckpt").exists()
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    prepare(stage, "new")


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights(folder: Path) -> None:
    script = folder / "entry.py"
    script.write_text("import sys, train, tests.cli_stand_ins\nif __name__ == '__main__': train.main(sys.argv[1:])\n")
    Path("base.yaml").write_text(CONFIG.replace("trainer:\n", "trainer:\n  devices: 2\n  strategy: ddp\n"))
    root = Path(train.__file__).parent
    done = subprocess.run(
        [sys.executable, str(script), "pipeline", "--config=pipeline.yaml"],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pipeline: rl ") == 1
    assert final_weight("rl") == pytest.approx(1.875, abs=1e-4)
    assert json.loads(Path("runs/results.json").read_text())["rl"]["accuracy"] == 0.75
