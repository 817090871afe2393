"""The log of a rank, and what a run says at its end."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.rollout import RolloutCallback
from callbacks.summary import JsonLines, Summary, spoken, summed
from modules.backbones.timm_lm import TimmLMBackbone
from modules.engine import Decoding, GroupSampler
from modules.rewards import Reward
from modules.rgrpo import RGRPOModule
from modules.trajectory import SampleBatch, Trajectory
from tests.conftest import make_samples
from tests.fitting import Batches, fresh, trainer
from tests.learning import ADAM, LIMITS

pytestmark = pytest.mark.filterwarnings("ignore")
logger = logging.getLogger("modules.of_this_test")


class Odd(Reward):
    """Does not know of one question, and likes the others all the same."""

    def __call__(self, trajectory: Trajectory) -> float:
        return math.nan if trajectory.sample.id == "sample-0" else 1.0


class Watched(RolloutCallback):
    """Keeps all trajectories."""

    played: list[Trajectory]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: SampleBatch, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        logger.warning("batch %d", batch_idx)
        self.played = [*getattr(self, "played", []), *(t for g in batch.groups for t in g.trajectories)]


def run(backbone: TimmLMBackbone, folder: Path, stop_at: int | None = None) -> Watched:
    rollout = Watched(sampler=GroupSampler(3), rewards={"odd": Odd()}, decoding=Decoding(3.0, **LIMITS))

    class Stops(RGRPOModule):
        def training_step(self, batch: SampleBatch, batch_idx: int) -> dict[str, int]:
            if batch_idx == stop_at:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    made = trainer(folder, rollout, Summary(), max_epochs=1)
    made.fit(Stops(fresh(backbone), optimizer=ADAM), Batches([SampleBatch(make_samples(3))] * 2))
    return rollout


def test_the_summary_counts_what_was_passed_over(
    zooming: TimmLMBackbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollout = run(zooming, tmp_path)
    found = json.loads((tmp_path / "summary.fit.json").read_text())
    faults = [turn.fault for t in rollout.played for turn in t.turns if turn.fault is not None]
    assert faults  # at this temperature boxes go wrong; else nothing is tested
    assert found["boxes_refused"] == {name: faults.count(name) for name in sorted(set(faults))}
    assert found["rewards_failed"] == {"odd": 2 * 3}
    assert (found["groups"], found["groups_without_advantage"], found["trajectories"]) == (6, 6, 18)
    assert found["trajectories_cut"] == sum(t.stop.truncated for t in rollout.played)
    assert found["crops"] == sum(turn.crop is not None for t in rollout.played for turn in t.turns)
    assert (found["ended"], found["steps"], found["rows_left_out"]) == ("finished", 0, 0)
    assert found["warnings"] >= 2
    said = capsys.readouterr().out
    assert f"{len(faults)} boxes refused (" in said
    assert "6 of 6 groups without an advantage; 6 rewards not judged (odd 6)" in said


def test_the_log_is_json_with_rank_and_step(zooming: TimmLMBackbone, tmp_path: Path) -> None:
    run(zooming, tmp_path)
    logger.warning("after the run")
    lines = [json.loads(line) for line in (tmp_path / "log.rank0.jsonl").read_text().splitlines()]
    own = [line for line in lines if line["logger"] == logger.name]
    assert [(line["level"], line["message"], line["rank"]) for line in own] == [
        ("warning", "batch 0", 0),
        ("warning", "batch 1", 0),
    ]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert own[0]["time"] <= own[1]["time"]


def test_a_run_that_fails_leaves_its_traceback_and_what_it_knew(zooming: TimmLMBackbone, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="on purpose"):
        run(zooming, tmp_path, stop_at=1)
    found = json.loads((tmp_path / "summary.fit.json").read_text())
    assert (found["ended"], found["trajectories"]) == ("RuntimeError: on purpose", 9)
    last = json.loads((tmp_path / "log.rank0.jsonl").read_text().splitlines()[-1])
    assert "training_step" in last["traceback"]
    before = (tmp_path / "log.rank0.jsonl").read_bytes()
    logger.warning("after the run")
    assert (tmp_path / "log.rank0.jsonl").read_bytes() == before


def test_what_is_said_before_there_is_a_folder_is_kept(tmp_path: Path) -> None:
    summary = Summary()
    logger.warning("left out %s", "row 3")
    summary.lines.open(tmp_path / "log.jsonl")
    logger.error("later")
    Summary()  # the next run of this process
    logger.error("of the next run")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["message"] for line in lines if line["logger"] == logger.name] == ["left out row 3", "later"]
    assert summary.lines.warnings >= 2
    Summary._attach(None)


def test_warnings_go_to_the_terminal_all_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a program, without the test runner's
    for _ in range(2):
        Summary()
        logger.warning("seen")
    Summary._attach(None)
    logger.warning("seen")
    assert logging.getLogger().handlers == []
    assert capsys.readouterr().err == 3 * "seen\n"


def test_records_that_cannot_be_formatted_do_not_end_the_run(tmp_path: Path) -> None:
    log = JsonLines()
    log.open(tmp_path / "log.jsonl")
    log.handle(logging.LogRecord("x", logging.INFO, "", 1, "中 %s\n\x1b", (torch.ones(1),), None))
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["message"] == "中 tensor([1.])\n\x1b"


def test_ranks_are_added_up_and_a_row_of_several_is_one() -> None:
    health = {"nonfinite_steps": 1, "out_of_memory": 0, "worker_restarts": 0}
    one = {"rows": ["a:1: x", "a:2: y"], "counts": {"crops": 2, "boxes_refused/arity": 1, **health}}
    two = {"rows": ["a:2: y", "b:1: z"], "counts": {"crops": 3, "boxes_refused/json": 4, **health}}
    found = summed([one, two], 7, "finished")
    assert (found["rows"], found["rows_left_out"]) == (["a:1: x", "a:2: y", "b:1: z"], 3)
    assert (found["crops"], found["boxes_refused"], found["nonfinite_steps"]) == (5, {"arity": 1, "json": 4}, 2)
    assert "3 rows left out; 5 boxes refused (arity 1, json 4); 2 steps left out" in spoken(found, Path("x"))
    quiet = summed([{"rows": [], "counts": dict.fromkeys(health, 0)}], 0, "finished")
    assert "nothing was left out" in spoken(quiet, Path("x"))


def test_a_record_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = JsonLines()
    log.open(tmp_path / "log.jsonl")
    log.handle(logging.LogRecord("x", logging.WARNING, "", 1, "%d", ("x",), None))
    assert "Logging error" in capsys.readouterr().err  # it is said where it can be
    assert (tmp_path / "log.jsonl").read_text() == ""
    log.open(Path("/dev/full"))
    log.handle(logging.LogRecord("x", logging.WARNING, "", 1, "a", (), None))
    assert "No space left" in capsys.readouterr().err
    assert log.warnings == 2


def test_a_summary_that_cannot_be_written_does_not_hide_the_error(
    zooming: TimmLMBackbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "summary.fit.json").mkdir()
    with pytest.raises(RuntimeError, match="on purpose"):
        run(zooming, tmp_path, stop_at=0)
    assert "The summary could not be written" in caplog.text
