"""The command line, through its real entry point, with a policy of one weight."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger

import modules.backbones.timm_lm
import modules.sft  # noqa: F401  classes that a typo is near to
import train
from callbacks.rollout import RolloutCallback
from commands.cli import CLI, cli, without_false_alarms
from commands.suggest import Parser, explain, leaves, nearest, stray
from tests.cli_stand_ins import CONFIG, TinyBackbone, TinyData, TinyPolicy

FIT = ["fit", "--config=base.yaml", "--run_dir=run"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with ``base.yaml``."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(CONFIG)
    return tmp_path


def weight(run: CLI) -> float:
    assert isinstance(run.model, TinyPolicy)
    return float(run.model.backbone.weight.detach())


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run what must be refused; what it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(args)
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert said.startswith("error: ")
    assert len(said.splitlines()) <= 2
    return said


def test_a_fit_writes_everything_into_its_run_dir() -> None:
    run = cli(FIT)
    # the gradient 2 (w - 1) is clipped to 1 for w = 0, 0.25 and 0.5: 3 steps of 0.25, then one of 0.125
    assert weight(run) == pytest.approx(0.875, abs=1e-5)
    names = {path.name for path in Path("run").iterdir()}
    assert {"config.yaml", "last.ckpt", "fit.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert {path.name for path in Path().iterdir()} == {"base.yaml", "run"}
    record = json.loads(Path("run/fit.json").read_text())
    assert record["steps"] == 4
    assert 0 < record["seconds"] < 60


def test_a_fit_goes_on_where_it_stopped() -> None:
    cli([*FIT, "--trainer.max_steps=2"])
    checkpoint = torch.load("run/last.ckpt", weights_only=True)
    checkpoint["callbacks"]["Throughput"]["seconds"] = 1000.0  # of the first attempt
    torch.save(checkpoint, "run/last.ckpt")
    TinyPolicy.taken.clear()
    run = cli([*FIT, "--ckpt_path=last"])
    record = json.loads(Path("run/fit.json").read_text())
    assert TinyPolicy.taken == [2, 3]
    assert weight(run) == pytest.approx(0.875, abs=1e-5)
    assert record["steps"] == 4
    assert 1000 < record["seconds"] < 1060


def test_a_checkpoint_never_overrules_the_command_line() -> None:
    cli([*FIT, "--model.goal=3"])
    assert torch.load("run/last.ckpt", weights_only=True)["hyper_parameters"]["goal"] == 3
    run = cli([*FIT, "--ckpt_path=run/last.ckpt", "--trainer.max_steps=6", "--model.goal=5"])
    assert isinstance(run.model, TinyPolicy)
    assert run.model.goal == 5


def test_a_policy_starts_from_the_weights_of_another() -> None:
    cli([*FIT, "--run_dir=first"])
    run = cli([*FIT, "--model.init_args.init_from=first/last.ckpt", "--trainer.max_steps=1", "--model.goal=3"])
    assert weight(run) == pytest.approx(0.875 + 0.25, abs=1e-5)


def test_a_saved_config_runs_in_another_folder_and_leaves_the_old_one_alone() -> None:
    cli(FIT)
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    run = cli(["fit", "--config=run/config.yaml", "--run_dir=other"])
    assert weight(run) == pytest.approx(0.875, abs=1e-5)
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before
    assert {"config.yaml", "last.ckpt"} <= {path.name for path in Path("other").iterdir()}


def test_run_dir_reaches_logger_and_checkpoints() -> None:
    run = cli([*FIT, "--trainer.max_steps=1"])
    assert isinstance(run.trainer.logger, TensorBoardLogger)
    assert Path(run.trainer.logger.log_dir) == Path("run")
    assert run.trainer.default_root_dir == "run"
    assert Path(run.trainer.checkpoint_callback.dirpath).name == "run"  # type: ignore[union-attr,attr-defined]


def test_a_run_without_logger() -> None:
    cli([*FIT, "--trainer.logger=false"])
    assert {"config.yaml", "last.ckpt", "fit.json"} <= {path.name for path in Path("run").iterdir()}


def test_a_test_run_keeps_the_config_of_the_fit() -> None:
    cli(FIT)
    before = Path("run/config.yaml").read_bytes()
    cli(["test", *FIT[1:], "--ckpt_path=run/last.ckpt", "--model.goal=7"])
    assert Path("run/config.yaml").read_bytes() == before
    assert yaml.safe_load(Path("run/config.test.yaml").read_text())["model"]["init_args"]["goal"] == 7
    assert float(Path("run/weight.txt").read_text()) == pytest.approx(0.875, abs=1e-5)


def test_variables_and_the_seed_can_be_interpolated() -> None:
    Path("more.yaml").write_text(
        "vars: {goal: 2.0}\n"
        "model: {init_args: {goal: '${vars.goal}'}}\n"
        "data: {init_args: {seed: '${seed_everything}'}}\n"
    )
    args = [*FIT, "--config=more.yaml", "--trainer.max_steps=1"]
    run = cli([*args, "--seed_everything=7"])
    assert isinstance(run.model, TinyPolicy)
    assert isinstance(run.datamodule, TinyData)
    assert (run.model.goal, run.datamodule.seed) == (2.0, 7)
    run = cli([*args, "--vars.goal=4"])
    assert isinstance(run.model, TinyPolicy)
    assert run.model.goal == 4.0


def test_the_rollout_callback_is_always_there_and_within_reach() -> None:
    run = cli([*FIT, "--trainer.max_steps=1", "--rollout.seed=3", "--trainer.callbacks+=LearningRateMonitor"])
    found = [each for each in run.trainer.callbacks if isinstance(each, RolloutCallback)]  # type: ignore[attr-defined]
    assert [each.seed for each in found] == [3]


def test_the_same_seed_is_taken_when_none_is_given() -> None:
    cli([*FIT, "--trainer.max_steps=1"])
    assert yaml.safe_load(Path("run/config.yaml").read_text())["seed_everything"] == 0


def test_no_warning_about_arguments_given_in_process(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "pipeline"])
    cli([*FIT, "--trainer.max_steps=1"])
    assert not [each for each in recwarn if "args parameter" in str(each.message)]


def test_other_warnings_pass() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with without_false_alarms():
            warnings.warn("The `srun` command is available on your system but is not used. HINT", stacklevel=1)
            warnings.warn("The `srun` command failed", stacklevel=1)
    assert [str(each.message) for each in seen] == ["The `srun` command failed"]


COMMAND_LINES = {
    "--trainer.max_step=5": ["'--trainer.max_step'", "--trainer.max_steps"],
    "--rollout.engin=x": ["'--rollout.engin'", "--rollout.engine"],
    "--seed=1": ["'--seed'", "--seed_everything"],
    "--trainerr.max_steps=1": ["'--trainerr.max_steps'", "--trainer"],
    "--model.gaol=1": ["'model.gaol'", "TinyPolicy", "did you mean goal"],
    "--model.lrr=1": ["'model.lrr'", "TinyPolicy accepts backbone, goal, init_from"],
    "--model.backbone.strat=1": ["'model.backbone.strat'", "TinyBackbone", "did you mean start"],
    "--model=SFTModul": ["'SFTModul' for 'model'", "SFTModule"],
    "--model=modules.sft.SFTModul": ["'SFTModul'", "SFTModule"],
    "--model.backbone=TimmLMBackbon": ["'TimmLMBackbon' for 'model.backbone'"],
    "--model.goal=big": ["'model.goal'", "float", "big"],
    "--data=TinyDat": ["'TinyDat' for 'data'", "TinyData"],
    "--trainer.callbacks+=Foo": ["'Foo' for 'trainer.callbacks'", "EarlyStopping", "RolloutCallback"],
    "--trainer.callbacks+=EarlyStoping": ["'EarlyStoping'", "did you mean EarlyStopping?"],
    "--trainer.logger.save_dirr=x": ["'trainer.logger.save_dirr'", "TensorBoardLogger", "save_dir"],
    "--config=none.yaml": ["none.yaml", "not exist"],
}


@pytest.mark.parametrize("argument", COMMAND_LINES)
def test_a_typo_on_the_command_line_is_named(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused([*FIT, argument], capsys)
    assert [each for each in COMMAND_LINES[argument] if each not in said] == [], said
    assert "base.yaml" not in said
    assert not Path("run").exists()


def test_candidates_are_those_of_the_class_that_asks(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused([*FIT, "--model=SFTModule", "--model.backbone=TimmLMBackbon"], capsys)
    assert "did you mean TimmLMBackbone" in said


FILES = {
    "key of the trainer": ("max_steps", "max_step", ["'trainer.max_step'", "trainer.max_steps", "(bad.yaml:10)"]),
    "group": ("trainer:", "trianer:", ["'trianer.", "did you mean trainer?", "(bad.yaml:8)"]),
    "key of a class": ("  init_args:\n", "  init_args:\n    gaol: 3\n", ["'model.gaol'", "goal", "(bad.yaml:4)"]),
    "key of an inner class": (
        "TinyBackbone",
        "TinyBackbone\n      init_args: {strat: 1}",
        ["'model.backbone.strat'", "start", "(bad.yaml:6)"],
    ),
    "inner class": (
        "TinyBackbone",
        "TinyBackbon",
        ["'TinyBackbon' for 'model.backbone'", "TinyBackbone?", "(bad.yaml:5)"],
    ),
    "class of the data": ("TinyData", "TinyDat", ["'TinyDat' for 'data'", "TinyData?", "(bad.yaml:7)"]),
    "indentation": ("data:", "  data:", ["'model'", "class_path and init_args", "bad.yaml:1)"]),
    "value": ("max_steps: 4", "max_steps: four", ["'trainer.max_steps'", "int", "four", "(bad.yaml:10)"]),
    "variable": ("max_steps: 4", "max_steps: ${vars.nope}", ["${vars.nope}", "(bad.yaml:10)"]),
    "syntax": ("  max_steps: 4", "  max_steps: [4", ["bad.yaml:11:", "not valid YAML"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_mistake_in_a_file_is_named_with_the_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    old, new, expected = FILES[name]
    assert CONFIG.count(old) == 1
    Path("bad.yaml").write_text(CONFIG.replace(old, new))
    said = refused(["fit", "--config=base.yaml", "--config", "bad.yaml", "--run_dir=run"], capsys)
    assert [each for each in expected if each not in said] == [], said


REFUSED_VALUES = {  # argument -> what is said
    "--rollout.decoding.top_p=2": "error: Expected `top_p` to be in (0, 1], but got 2.0.",
    "--model.init_args.init_from=none.ckpt": "there is no file 'none.ckpt'",
}


@pytest.mark.parametrize("argument", REFUSED_VALUES)
def test_a_value_that_an_object_refuses_ends_the_run_in_a_sentence(
    argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert REFUSED_VALUES[argument] in refused([*FIT, argument], capsys)


@pytest.mark.parametrize(("word", "meant"), [("fitt", "fit"), ("pipelin", "pipeline"), ("tset", "test")])
def test_an_unknown_command_is_named(word: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused([word, "--config=base.yaml"], capsys)
    assert f"unknown command {word!r}" in said
    assert f"did you mean {meant}?" in said


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["--help"])
    said = capsys.readouterr().out
    assert [name for name in (*train.RUNS, *train.COMMANDS) if name not in said] == []


UNUSABLE_DATA = {
    "no such file": (None, "rows.json: no such file."),
    "not JSON": ("<html>", "rows.json: expected a JSON list of objects, found no JSON"),
    "no rows": ("[]", "rows.json: expected a JSON list of objects, found no rows"),
    "only bad rows": ('[{"question": "?"}]', "no usable row among 1"),
}


@pytest.mark.parametrize("name", UNUSABLE_DATA)
def test_data_that_cannot_be_used_end_the_run_in_a_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, expected = UNUSABLE_DATA[name]
    if content is not None:
        Path("rows.json").write_text(content)
    data = ["--data=AuthorsDataModule", "--data.train=rows.json", "--data.kind=rgrpo"]
    said = refused([*FIT, *data], capsys)
    assert expected in said
    assert "Traceback" not in said


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "data" in refused(["fit"], capsys)
    assert "'model': the following arguments are required: backbone" in refused(
        ["fit", "--model=TinyPolicy", "--data=TinyData"], capsys
    )


def test_nearest_names() -> None:
    assert nearest("seed", ["seed_everything", "config"]) == ["seed_everything"]
    assert nearest("tinybackbone", ["TinyBackbone", "TinyData"])[0] == "TinyBackbone"
    assert nearest("xyz", ["TinyBackbone"]) == []


def test_a_key_is_compared_at_the_level_where_it_goes_wrong() -> None:
    accepted = ["trainer.max_steps", "trainer.devices", "model", "max_step"]
    assert stray("trainer.max_step", accepted) == ("max_step", ["trainer.max_steps"])
    assert stray("trainr.devices", accepted) == ("trainr", ["trainer"])


def test_the_leaves_of_an_error_tree() -> None:
    message = (
        'Parser key "model":\n'
        "  Errors:\n"
        "    - Problem with given class_path 'a.B':\n"
        '        Parser key "inner":\n'
        "          Problem with given class_path 'c.D':\n"
        "            Option 'dims' is not accepted\n"
        "    - Expected a <class 'str'>\n"
    )
    inner, outer = leaves(message)
    assert (inner.key, inner.owner, inner.text) == ("model.inner", "c.D", "Option 'dims' is not accepted")
    assert (outer.key, outer.owner) == ("model", None)
    assert inner.weight > outer.weight


def test_a_message_of_unknown_shape_is_kept() -> None:
    assert explain("Something new: 3", Parser(), []) == ["Something new: 3"]


def test_the_stand_in_is_what_the_tests_think_it_is() -> None:
    assert TinyBackbone(start=2.0).weight.item() == 2.0
