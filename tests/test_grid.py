"""A grid's stages: what their command lines say, and which grids are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from commands.grid import Fit, Grid, Part, Row, cells, check_grid
from commands.pipeline import PipelineError, Stage

REWARDS = {"accuracy": {"class_path": "Accuracy"}, "format": {"class_path": "Format"}, "region": {"class_path": "R"}}


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with the files that grids name."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(yaml.safe_dump({"rollout": {"rewards": {"accuracy": {"class_path": "Old"}}}}))
    Path("rl.yaml").write_text(yaml.safe_dump({"rollout": {"rewards": REWARDS}}))
    for name in ("sft.yaml", "test.yaml", "more.yaml"):
        Path(name).write_text("trainer: {max_steps: 3}\n")


def grid(**rows: Row) -> Grid:
    return Grid(
        rows={"rl": Row(), **rows},
        base="rl",
        run_dir="runs",
        seeds=1,
        config=["base.yaml"],
        stages={"sft": Fit(configs=["sft.yaml"]), "other": Fit(configs=["sft.yaml"], start_from="sft")},
        fit=Fit(configs=["rl.yaml"], set={"trainer.max_steps": 7, "model.std": False}, start_from="sft"),
        test=Part(configs=["test.yaml"], set={"data.images": 250}),
    )


def stages(of: Grid, name: str, seed: int = 0) -> list[Stage]:
    check_grid(of)
    return list(next(cell for cell in cells(of, seed) if cell.name == name).stages)


def test_a_row_is_a_fit_and_a_test_over_what_all_have_in_common() -> None:
    row = Row(configs=["more.yaml"], set={"model.std": True, "model.name": "a b"}, test=Part(set={"data.images": 1}))
    sft, fit, test = stages(grid(x=row), "x")
    assert (sft.name, sft.configs, sft.start_from, sft.args) == ("sft", ["base.yaml", "sft.yaml"], None, [])
    assert (fit.name, fit.start_from, fit.configs) == ("x/fit", "sft", ["base.yaml", "rl.yaml", "more.yaml"])
    assert fit.args == ["--trainer.max_steps=7", "--model.std=true", "--model.name=a b"]
    assert (test.name, test.command, test.start_from) == ("x/test", "test", "x/fit")
    assert (test.configs, test.args) == (["base.yaml", "test.yaml"], ["--data.images=1"])


def test_a_row_can_start_elsewhere_and_brings_what_it_starts_from() -> None:
    assert [stage.name for stage in stages(grid(x=Row(start_from="other")), "x")] == ["sft", "other", "x/fit", "x/test"]


def test_a_row_can_start_from_nothing() -> None:
    fit, test = stages(grid(x=Row(start_from="none")), "x")
    assert (fit.name, fit.start_from, test.start_from) == ("x/fit", None, "x/fit")


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("sft", ["sft", "x/test"]), ("rl", ["sft", "rl/fit", "x/test"]), ("y", ["sft", "y/fit", "x/test"])],
)
def test_a_row_can_be_a_test_alone_even_of_a_later_row(weights: str, expected: list[str]) -> None:
    found = stages(grid(x=Row(test_of=weights), y=Row()), "x")
    assert [stage.name for stage in found] == expected
    assert found[-1].start_from == expected[-2]


def test_an_entry_is_removed_from_the_last_file_that_has_the_mapping() -> None:
    fit = stages(grid(x=Row(remove=["rollout.rewards.format"], set={"rollout.rewards.region.weight": 2})), "x")[1]
    given, *others = fit.args
    key, _, value = given.partition("=")
    assert key == "--rollout.rewards"
    assert json.loads(value) == {"accuracy": {"class_path": "Accuracy"}, "region": {"class_path": "R"}}
    assert others[-1] == "--rollout.rewards.region.weight=2"  # after it: it acts on what is left


def test_two_entries_of_one_mapping_are_removed_together() -> None:
    fit = stages(grid(x=Row(remove=["rollout.rewards.format", "rollout.rewards.region"])), "x")[1]
    assert [json.loads(arg.partition("=")[2]) for arg in fit.args if "rewards=" in arg] == [
        {"accuracy": {"class_path": "Accuracy"}}
    ]


def test_an_entry_that_the_last_file_lacks_already_is_no_mistake() -> None:
    Path("more.yaml").write_text("rollout: {rewards: {accuracy: {class_path: New}}}\n")
    fit = stages(grid(x=Row(configs=["more.yaml"], remove=["rollout.rewards.format"])), "x")[1]
    assert json.loads(fit.args[0].partition("=")[2]) == {"accuracy": {"class_path": "New"}}


def test_seeds_have_folders_of_their_own() -> None:
    two = replace(grid(), seeds=[3, 5])
    assert [cells(two, seed)[0].id for seed in two.seed_list] == ["seed_3/sft", "seed_5/sft"]
    assert replace(two, seeds=2).seed_list == [0, 1]


WRONG = {
    "base": (lambda: replace(grid(), base="lr"), ["`base`", "rl", "'lr'"]),
    "seeds": (lambda: replace(grid(), seeds=0), ["`seeds`", "0"]),
    "same seeds": (lambda: replace(grid(), seeds=[1, 1]), ["`seeds`", "[1, 1]"]),
    "folder": (lambda: grid(**{"a/b": Row()}), ["names of folders", "'a/b'"]),
    "both": (lambda: grid(sft=Row()), ["both have 'sft'"]),
    "none": (lambda: replace(grid(), stages={"sft": Fit(), "none": Fit()}), ["'none'", "no stage"]),
    "test_of": (lambda: grid(x=Row(test_of="stf")), ["`test_of` of row 'x'", "sft, other, rl", "'stf'"]),
    "test of a test": (lambda: grid(x=Row(test_of="y"), y=Row(test_of="sft")), ["`test_of` of row 'x'", "'y'"]),
    "no fit": (lambda: grid(x=Row(test_of="rl", set={"a": 1})), ["row 'x'", "no `set`", "`test`"]),
    "start_from": (lambda: grid(x=Row(start_from="stf")), ["`start_from`", "sft, other", "'stf'"]),
    "from a row": (lambda: grid(x=Row(start_from="rl")), ["'x/fit'", "'rl'"]),
    "file": (lambda: grid(x=Row(configs=["no.yaml"])), ["'x/fit'", "no.yaml"]),
    "remove": (
        lambda: grid(x=Row(remove=["rollout.rewards.fromat"])),
        ["`remove` of 'x'", "rollout.rewards.format", "'rollout.rewards.fromat'"],
    ),
    "remove where nothing is": (lambda: grid(x=Row(remove=["roll.rewards.format"])), ["'roll.rewards.format'"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_grid_is_refused(name: str) -> None:
    make, expected = WRONG[name]
    with pytest.raises(PipelineError) as refusal:
        check_grid(make())
    assert [each for each in expected if each not in str(refusal.value)] == [], str(refusal.value)
