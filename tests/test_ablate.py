"""Cells of a grid through the real entry point, with a policy of one weight."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from lightning_utilities.core.rank_zero import rank_zero_only

import commands.ablate
import train
from commands.ablate import alone, check_ranks, in_order
from commands.grid import Grid, Row, cells
from commands.pipeline import PipelineError
from tests.cli_stand_ins import CONFIG, TinyPolicy

ROOT = Path(train.__file__).parent
GRID = """\
run_dir: runs
seeds: 2
base: rl
stages:
  sft: {}
fit: {start_from: sft, set: {model.init_args.goal: 2.0}}
rows:
  sft_only: {test_of: sft}
  rl: {}
  far: {set: {model.goal: 3}, test: {set: {model.right: 3}}}
  few: {test_of: far, test: {set: {model.right: 1}}}
"""
GRID_OF_FEW = Grid(rows={"far": Row(), "few": Row(test_of="far")}, base="far")
CELLS = ["seed_0/sft_only", "seed_0/rl", "seed_0/far", "seed_0/few"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with the files of a grid; no step has been taken."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(CONFIG)
    Path("grid.yaml").write_text(GRID)
    TinyPolicy.taken.clear()


def run(*args: str) -> None:
    train.main(["ablate", "--config", "base.yaml", "--grid=grid.yaml", *args])


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 2
    return capsys.readouterr().err


def final_weight(stage: str) -> float:
    return float(torch.load(f"runs/{stage}/final.ckpt", weights_only=True)["state_dict"]["backbone.weight"])


def results() -> dict[str, dict[str, object]]:
    rows: dict[str, dict[str, object]] = json.loads(Path("runs/results.json").read_text())["rows"]
    return rows


def test_a_cell_is_an_ordinary_run_with_what_it_starts_from() -> None:
    run("--cell=seed_1/far")
    # as in test_pipeline: 0.875 after the four steps of the warm-up, then four of 0.25 towards 3
    assert final_weight("seed_1/sft") == pytest.approx(0.875, abs=1e-4)
    assert final_weight("seed_1/far/fit") == pytest.approx(1.875, abs=1e-4)
    assert float(Path("runs/seed_1/far/test/weight.txt").read_text()) == pytest.approx(1.875, abs=1e-4)
    config = yaml.safe_load(Path("runs/seed_1/far/fit/config.yaml").read_text())
    assert (config["seed_everything"], config["model"]["init_args"]["goal"]) == (1, 3.0)
    assert {each.name for each in Path("runs/seed_1").iterdir() if each.is_dir()} == {"sft", "far"}
    assert results()["far"]["cells"] == {"0": "not run", "1": "ended"}


def test_what_has_ended_is_not_run_again_and_what_changed_is() -> None:
    for index in range(4):
        run(f"--cell={index}")
    assert len(TinyPolicy.taken) == 3 * 4  # one warm-up for all rows, two rows with a fit
    accuracies = {name: row["metrics"]["accuracy"]["mean"] for name, row in results().items()}  # type: ignore[index]
    assert accuracies == {"sft_only": 0.5, "rl": 0.5, "far": 0.75, "few": 0.25}
    assert results()["few"]["metrics"]["accuracy"]["difference"]["mean"] == -0.25  # type: ignore[index]
    run("--cell=seed_0/rl")
    assert len(TinyPolicy.taken) == 3 * 4
    Path("grid.yaml").write_text(GRID.replace("model.goal: 3", "model.goal: -3"))
    run("--table")
    assert [row["cells"]["0"] for row in results().values()] == ["ended", "ended", "not run", "not run"]  # type: ignore[index]
    run("--cell=seed_0/few")  # far's fit is run anew for it
    assert len(TinyPolicy.taken) == 4 * 4
    assert Path("runs/seed_0/far/fit.old-1").is_dir()
    assert [row["cells"]["0"] for row in results().values()] == ["ended", "ended", "not run", "ended"]  # type: ignore[index]


def test_an_interrupted_cell_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("--cell=seed_0/sft_only")
    TinyPolicy.taken.clear()
    with monkeypatch.context() as patch:
        patch.setattr(TinyPolicy, "fail_at", 2)  # after the checkpoint at the end of the first epoch
        with pytest.raises(RuntimeError, match="told to fail"):
            run("--cell=1")
    failed = "failed: RuntimeError: the stand-in was told to fail"
    assert results()["rl"]["cells"] == {"0": failed, "1": "not run"}
    assert f"- `seed_0/rl`: {failed}" in Path("runs/table.md").read_text()
    capsys.readouterr()
    run("--list")
    assert f"seed_0/rl {failed}" in " ".join(capsys.readouterr().out.split())
    run("--cell=1")
    assert TinyPolicy.taken == [0, 1, 2, 3]
    assert results()["rl"]["cells"]["0"] == "ended"  # type: ignore[index]


def test_a_test_without_predictions_fails_alone() -> None:
    Path("grid.yaml").write_text(GRID.replace("model.right: 3", "model.questions: 0"))
    for args in ("--cell=2", "--table"):
        with pytest.raises(SystemExit) as end:
            run(args)
        assert end.value.code == 1
    run("--cell=1")  # another one's fault
    assert "no predictions" in str(results()["far"]["cells"]) or "there are none" in str(results()["far"]["cells"])
    assert results()["rl"]["cells"]["0"] == "ended"  # type: ignore[index]


def test_the_list_numbers_the_cells_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    run("--cell=seed_0/sft")
    capsys.readouterr()
    run("--list")
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["-", "seed_0/sft", "ended"]
    assert [line[:2] for line in lines[1:5]] == [[str(k), cell] for k, cell in enumerate(CELLS)]
    assert [line[0] for line in lines[5:]] == ["-", "4", "5", "6", "7"]
    assert {line[2] for line in lines[1:]} == {"not run"}


def test_an_array_task_runs_its_cell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "SLURM_ARRAY_TASK_ID is not set" in refused(capsys, "--cell=array")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    run("--cell=array")
    assert Path("runs/seed_1/rl/test/predictions.jsonl").is_file()


def test_a_stage_that_somebody_else_runs_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands.ablate, "POLL", 0.02)
    Path("runs/seed_0").mkdir(parents=True)
    held = FileLock("runs/seed_0/sft.lock")
    held.acquire()
    cell = threading.Thread(target=run, args=("--cell=seed_0/sft",))
    cell.start()
    while "being run by another process" not in capsys.readouterr().out:
        time.sleep(0.02)
        assert cell.is_alive()
    assert TinyPolicy.taken == []
    held.release()
    cell.join()
    assert TinyPolicy.taken == [0, 1, 2, 3]


def test_what_somebody_else_has_run_meanwhile_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    run("--cell=seed_0/sft")
    monkeypatch.setattr(commands.ablate, "ended", lambda *_: False)  # as it was before the lock was waited for
    TinyPolicy.taken.clear()
    run("--cell=seed_0/sft")
    assert TinyPolicy.taken == []


def test_other_ranks_take_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with alone(tmp_path / "stage"):
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        with alone(tmp_path / "stage"):
            pass


def test_a_cell_of_several_ranks_needs_its_shared_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (rl,) = (cell for cell in cells(Grid(rows={"rl": Row(), "of": Row(test_of="rl")}, base="rl"), 0) if cell.own == 2)
    check_ranks(rl, {"SLURM_NTASKS": "4"})  # nothing is shared with it
    monkeypatch.setenv("SLURM_NTASKS", "4")
    message = refused(capsys, "--cell=seed_0/rl")
    assert "'sft'" in message
    assert "4 ranks" in message
    assert "`--cell=seed_0/sft`" in message
    assert not Path("runs").exists()
    monkeypatch.delenv("SLURM_NTASKS")
    run("--cell=seed_0/sft")
    (few,) = (c for c in cells(GRID_OF_FEW, 0) if c.name == "few")
    several = {"RANK": "1", "WORLD_SIZE": "2"}
    with pytest.raises(PipelineError, match="`--cell=seed_0/far`"):  # a row that a row tests is shared as well
        check_ranks(few, several)
    check_ranks(few, {"RANK": "0", "WORLD_SIZE": "1"})
    check_ranks(few, {"LOCAL_RANK": "1", "WORLD_SIZE": "2"})  # of Lightning's own: within a stage of the first rank


def test_configurations_of_the_command_line_come_after_the_grid_s() -> None:
    said = ["--config", "a.yaml", "--grid=g.yaml", "--config=b.yaml", "--jobs", "2"]
    assert in_order(said) == ["--grid=g.yaml", "--jobs", "2", "--config+=a.yaml", "--config+=b.yaml"]


WRONG = {
    "key": (("base: rl", "bass: rl"), [], ["bass", "base"]),
    "base": (("base: rl", "base: lr"), [], ["`base`", "'lr'"]),
    "row": (("test_of: sft", "testof: sft"), [], ["testof"]),
    "override": (("model.goal: 3", "model.gaol: 3"), [], ["model.gaol", "'far/fit'"]),
    "index": (("", ""), ["--cell=8"], ["0 to 7", "8"]),
    "name": (("", ""), ["--cell=seed_0/lr"], ["--list", "'seed_0/lr'"]),
    "jobs": (("", ""), ["--jobs=0"], ["`jobs`", "0"]),
    "option": (("", ""), ["--seed=2"], ["--seed", "--seeds"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_grid_or_command_line_is_refused_before_anything_runs(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (old, new), args, expected = WRONG[name]
    Path("grid.yaml").write_text(GRID.replace(old, new))
    message = refused(capsys, *args)
    assert message.startswith("error: ")
    assert [each for each in expected if each not in message] == [], message
    assert not Path("runs").exists()


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "ablations").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_shipped_grid_is_understood_by_the_command_that_it_opens_with(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    name = file.relative_to(ROOT).as_posix()
    command = next(line for line in file.read_text().splitlines() if "python train.py" in line)
    _, _, given = command.partition("python train.py ablate ")
    assert given.split()[:2] == ["--grid", name]
    checked: list[str] = []
    monkeypatch.setattr(
        commands.ablate, "run_all", lambda cells, *_: [checked.append(cell.id) or True for cell in cells]
    )
    train.main(["ablate", *given.split(), f"--run_dir={tmp_path}"])  # every command line is parsed before
    assert "seed_2/rgrpo" in checked


@pytest.mark.slow
def test_processes_run_the_whole_grid(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = CONFIG
    for name in ("TinyPolicy", "TinyBackbone", "TinyData"):
        text = text.replace(f"class_path: {name}", f"class_path: tests.cli_stand_ins.{name}")
    Path("base.yaml").write_text(text)
    Path("grid.yaml").write_text(GRID + "  bad: {set: {trainer.accelerator: mps}}\n")  # refused by the trainer alone
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(SystemExit) as end:
        run("--seeds=1", "--jobs=2")
    assert end.value.code == 1
    assert "FAILED (exit code 1), see runs/seed_0/bad.log" in capsys.readouterr().out
    found = results()
    assert [row["cells"]["0"] for row in found.values()][:4] == ["ended"] * 4  # type: ignore[index]
    assert found["bad"]["cells"]["0"].startswith("failed: ")  # type: ignore[index]
    with pytest.raises(SystemExit):
        run("--seeds=1", "--jobs=2")
    assert capsys.readouterr().out.count("done before") == 5
