"""Cells as processes: their order, their failures, their end. The processes are stand-ins that write records."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

import commands.jobs
from commands.grid import Cell, Fit, Grid, Row, cells
from commands.jobs import run_all, shares

SCRIPT = """\
import json, pathlib, subprocess, sys, time
cell = sys.argv[-1].removeprefix("--cell=")
plan = json.loads(pathlib.Path("plan.json").read_text())
began = time.time()
if cell in plan["hang"]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    pathlib.Path("child").write_text(str(child.pid))
    time.sleep(60)
time.sleep(0.3)
for folder, mark in [] if cell in plan["fail"] else plan["stages"][cell]:
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stage.json").write_text(json.dumps({"fingerprint": mark, "ended": True}))
with open("history.txt", "a") as file:
    file.write(f"{cell} {began} {time.time()}\\n")
print("said", sys.argv[1:-1])
sys.exit(3 if cell in plan["fail"] else 0)
"""
GRID = Grid(
    rows={"a": Row(), "b": Row(set={"x": 1}), "of_a": Row(test_of="a")},
    base="a",
    run_dir="runs",
    stages={"sft": Fit()},
    fit=Fit(start_from="sft"),
)


@pytest.fixture(autouse=True)
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text(SCRIPT)
    monkeypatch.setattr(commands.jobs, "TRAIN", tmp_path / "script.py")
    monkeypatch.setattr(commands.jobs, "LOOK", 0.02)


def plan(seeds: int, fail: tuple[str, ...] = (), hang: tuple[str, ...] = ()) -> list[Cell]:
    """The cells, and what their processes will do."""
    every = [cell for seed in range(seeds) for cell in cells(GRID, seed)]
    stages = {
        cell.id: [(str(cell.root / s.name), mark) for s, mark in zip(cell.stages, cell.marks(), strict=True)]
        for cell in every
    }
    Path("plan.json").write_text(json.dumps({"stages": stages, "fail": fail, "hang": hang}))
    return every


def history() -> dict[str, tuple[float, float]]:
    lines = [line.split() for line in Path("history.txt").read_text().splitlines()]
    return {cell: (float(began), float(ended)) for cell, began, ended in lines}


def test_cells_run_after_those_that_they_need_and_no_more_at_once_than_told() -> None:
    every = plan(seeds=2)
    assert run_all(every, ["--grid=g.yaml"], 2) == [True] * 8
    ran = history()
    assert len(ran) == 8
    for seed in (0, 1):
        for after, before in (("a", "sft"), ("b", "sft"), ("of_a", "a")):
            assert ran[f"seed_{seed}/{after}"][0] >= ran[f"seed_{seed}/{before}"][1]
    at_once = [sum(began <= moment < ended for began, ended in ran.values()) for moment, _ in ran.values()]
    assert max(at_once) == 2
    assert "['ablate', '--grid=g.yaml']" in Path("runs/seed_1/of_a.log").read_text()


def test_what_has_ended_has_no_process() -> None:
    every = plan(seeds=1)
    run_all(every, [], 4)
    Path("history.txt").write_text("")
    assert run_all(every, [], 4) == [True] * 4
    assert history() == {}


def test_a_failure_stops_what_needs_it_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    every = plan(seeds=2, fail=("seed_0/a", "seed_1/sft"))
    ended = dict(zip([cell.id for cell in every], run_all(every, [], 2), strict=True))
    assert sorted(name for name, well in ended.items() if well) == ["seed_0/b", "seed_0/sft"]
    assert set(history()) == {"seed_0/sft", "seed_0/a", "seed_0/b", "seed_1/sft"}
    said = capsys.readouterr().out
    assert "FAILED (exit code 3), see runs/seed_0/a.log" in said
    assert "seed_0/of_a" in said
    assert "not run, for it needs seed_0/a" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all_processes_and_their_children(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    every = plan(seeds=1, hang=("seed_0/sft",))

    def interrupt() -> None:
        while not Path("child").exists() or not Path("child").read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SystemExit) as end:
        run_all(every, [], 2)
    assert end.value.code == 130
    assert "stopping 1 cells" in capsys.readouterr().out
    assert_gone(int(Path("child").read_text()))


def test_any_other_exception_ends_them_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    every = plan(seeds=2, hang=("seed_0/sft",))

    def broken(job: commands.jobs.Job) -> bool:
        while not Path("child").exists() or not Path("child").read_text():
            time.sleep(0.02)
        raise OSError("no space left")

    monkeypatch.setattr(commands.jobs, "finished", broken)  # of seed_1/sft, which does not hang
    with pytest.raises(OSError, match="no space left"):
        run_all(every, [], 2)
    assert_gone(int(Path("child").read_text()))


def assert_gone(child: int) -> None:
    for _ in range(100):  # an orphan is reaped by whoever inherits it: gone, or a zombie until then
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the child of a cell outlived it")


def test_processes_share_the_machine() -> None:
    assert shares({}, jobs=2, slot=0, cores=8, gpus=0) == {"OMP_NUM_THREADS": "4"}
    assert shares({}, jobs=9, slot=0, cores=8, gpus=0) == {"OMP_NUM_THREADS": "1"}
    assert shares({"OMP_NUM_THREADS": "3"}, jobs=2, slot=1, cores=8, gpus=1) == {}
    threads = {"OMP_NUM_THREADS": "1"}
    assert [shares(threads, 2, k, 8, 4)["CUDA_VISIBLE_DEVICES"] for k in range(2)] == ["0,2", "1,3"]
    # the same number for each: two cells with other numbers of GPUs would have other batches
    assert [shares(threads, 2, k, 8, 3)["CUDA_VISIBLE_DEVICES"] for k in range(2)] == ["0", "1"]
    assert [shares(threads, 2, k, 8, 5)["CUDA_VISIBLE_DEVICES"] for k in range(2)] == ["0,2", "1,3"]
    seen = {**threads, "CUDA_VISIBLE_DEVICES": "5,GPU-a"}
    assert [shares(seen, 3, k, 8, 2)["CUDA_VISIBLE_DEVICES"] for k in range(3)] == ["5", "GPU-a", "5"]
    assert shares(threads, 1, 0, 8, 4) == {}  # alone, it sees all of them
