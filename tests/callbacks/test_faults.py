"""Faults that a run survives, and those that end it in a sentence."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from callbacks.faults import Faults, survived
from callbacks.rollout import RolloutCallback
from callbacks.watchdog import EXIT_CODE, Watchdog
from commands.postmortem import FaultError, report
from commands.postmortem import main as postmortem
from datamodules.sampler import EpochOrder, SampleLoader
from modules import engine as engines
from modules.backbones.timm_lm import TimmLMBackbone
from modules.engine import Decoding, GroupSampler, LocalEngine, Request
from modules.objective import Objective
from modules.policy import PolicyError
from modules.rgrpo import RGRPOModule
from modules.sft import SFTModule
from modules.trajectory import SampleBatch
from tests.conftest import make_backbone, make_samples
from tests.fitting import Batches, fit, fresh, furthest, trainer, weights
from tests.learning import ADAM, LIMITS, Wordiness

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")


class Breaks(SFTModule):
    """Warm-up whose loss is not a number in some batches."""

    def __init__(self, backbone: TimmLMBackbone, at: tuple[int, ...], value: float = math.nan, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.at, self.value, self.batch = at, value, -1

    def training_step(self, batch: SampleBatch, batch_idx: int) -> dict[str, int]:
        self.batch += 1
        return super().training_step(batch, batch_idx)

    def _loss(self, part: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, sums = super()._loss(part)
        return (loss * self.value if self.batch in self.at else loss), sums


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_without_a_finite_loss_changes_nothing_and_is_counted(value: float, tmp_path: Path) -> None:
    batches = [SampleBatch(make_samples(2, seed=k)) for k in range(4)]
    module = Breaks(make_backbone(), (1, 2), value, optimizer=ADAM)
    rows = fit(module, batches, Faults(), default_root_dir=tmp_path).rows
    assert [row["health/nonfinite_steps"] for row in rows] == [0, 1, 2, 2]
    assert module.trainer.global_step == 2
    # as if the batches had not come
    plain = SFTModule(make_backbone(), optimizer=ADAM)
    fit(plain, [batches[0], batches[3]])
    assert furthest(weights(module), weights(plain)) == 0
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert len(list((tmp_path / "faults").iterdir())) == 2


def test_a_run_that_does_not_recover_ends_in_a_sentence(tmp_path: Path) -> None:
    batches = [SampleBatch(make_samples(2))] * 6
    module = Breaks(make_backbone(), (1, 2, 3, 4, 5), optimizer=ADAM)
    with pytest.raises(PolicyError, match=r"at most 2 steps in a row .* but got 3; the last: step 1: loss nan"):
        fit(module, batches, Faults(max_nonfinite=2, dumps=1), default_root_dir=tmp_path)
    assert [path.name for path in (tmp_path / "faults").iterdir()] == ["step1-batch1-rank0.pt"]


def test_a_policy_that_cannot_step_ends_without_the_callback_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.policy.PATIENCE", 3)
    module = Breaks(make_backbone(), (1, 2, 3, 4), optimizer=ADAM)
    with pytest.raises(PolicyError, match=r"3 batches in a row had nothing to learn from: .* losses were not finite"):
        fit(module, [SampleBatch(make_samples(1))] * 6)
    assert module.trainer.global_step == 1


def test_what_is_kept_can_be_looked_into(tmp_path: Path) -> None:
    samples = make_samples(3)
    module = Breaks(make_backbone(), (0,), optimizer=ADAM)
    fit(module, [SampleBatch(samples)], Faults(), default_root_dir=tmp_path)
    (file,) = (tmp_path / "faults").iterdir()
    kept = torch.load(file, weights_only=True)
    assert torch.equal(kept["images"][kept["samples"][2]["images"][0]], samples[2].images[0])
    said = report(str(file), texts=1)
    trained = sum(p.requires_grad for p in module.backbone.parameters())
    for text in ("step 0, batch 0", "loss nan", f"not finite: {trained}: ", "before the step: none", "3 questions"):
        assert text in said
    assert f"--- sample-0: {samples[0].question}" in said
    assert "sample-1" not in said


def test_the_trajectory_that_broke_the_step_is_named(tmp_path: Path, zooming: TimmLMBackbone) -> None:
    class Broken(RolloutCallback):
        """The sampler's log-probability of one token is not a number."""

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: SampleBatch, batch_idx: int) -> None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            batch.groups[1].trajectories[2].log_probs[0] = math.nan

    rollout = Broken(sampler=GroupSampler(4), rewards={"reward": Wordiness()}, decoding=Decoding(3.0, **LIMITS))
    module = RGRPOModule(fresh(zooming), optimizer=ADAM)
    before = weights(module)
    fit(module, [SampleBatch(make_samples(2))], rollout, Faults(), default_root_dir=tmp_path)
    assert furthest(before, weights(module)) == 0
    (file,) = (tmp_path / "faults").iterdir()
    said = report(str(file), texts=1)
    lines = [line for line in said.splitlines() if line.startswith("  ")]
    assert [line.partition(";")[0].strip() for line in lines] == [lines[0].strip()]
    assert lines[0].startswith("  sample-1 #3: 1 of ")
    assert "--- sample-1 #3, ended: " in said


def test_a_batch_of_several_steps_counts_once_and_the_rest_is_left_out(tmp_path: Path, zooming: TimmLMBackbone) -> None:
    class Broken(RolloutCallback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: SampleBatch, batch_idx: int) -> None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            batch.groups[1].trajectories[2].log_probs[0] = math.nan

    rollout = Broken(sampler=GroupSampler(4), rewards={"reward": Wordiness()}, decoding=Decoding(3.0, **LIMITS))
    module = RGRPOModule(fresh(zooming), optimizer=ADAM, objective=Objective(inner_epochs=4, mini_batches=2))
    fit(module, [SampleBatch(make_samples(2))], rollout, Faults(max_nonfinite=1), default_root_dir=tmp_path)
    assert (module.nonfinite, module.nonfinite_in_a_row) == (1, 1)
    assert module.trainer.global_step == 1  # the half before it


@pytest.mark.parametrize("turns", [None, torch.tensor([[0.0, math.nan]])])
def test_advantages_of_turns_are_looked_at(
    turns: Tensor | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"log_probs": torch.zeros(1), "sampled": torch.ones(1, dtype=torch.bool), "text": "a", "stop": "end\x1b"}
    told |= {"prompt_ids": torch.zeros(1), "completion_ids": torch.zeros(1)}
    group = {"id": "one\x1b[2J", "advantages": torch.zeros(1), "trajectories": [told], "turn_advantages": turns}
    details = {"loss": math.nan, "grad_norm": 1.0, "gradients": [], "weights": []}
    whole = {"version": 1, "step": 0, "batch": 0, "rank": 0, "details": details, "images": [], "samples": []}
    torch.save({**whole, "groups": [group]}, tmp_path / "x.pt")
    said = report(str(tmp_path / "x.pt"), 1)
    assert ("#1: 1 advantages of turns, first that of turn 2" in said) == (turns is not None)
    assert "\x1b" not in said
    del whole["details"]
    torch.save({**whole, "groups": [group]}, tmp_path / "x.pt")
    with pytest.raises(SystemExit) as end:
        postmortem([str(tmp_path / "x.pt")])
    assert end.value.code == 2
    assert "parts of it are missing: KeyError('details')" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"junk", "other"])
def test_a_file_that_is_no_dump_is_one_sentence(content: bytes | str | None, tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    if content == "other":
        torch.save({"weights": torch.zeros(1)}, file)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    with pytest.raises(FaultError, match=r"x\.pt: (no such file|expected a batch)"):
        report(str(file), 1)


def test_a_dump_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"version": 1, "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(FaultError, match="reading it fails"):
        report(str(tmp_path / "evil.pt"), 1)
    assert not (tmp_path / "ran").exists()


# --- memory ---


def heavy(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on four trajectories fit into memory, noticed in the middle; returns with how many each flight began."""
    flown: list[int] = []

    class Heavy(engines.Flight):
        def _sample(self) -> Tensor:
            if len(self.rows) > 4 and max(len(row.ids) for row in self.rows) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super()._sample()

        def run(self) -> Any:
            flown.append(len(self.rows))
            return super().run()

    monkeypatch.setattr(engines, "Flight", Heavy)
    return flown


def test_a_rollout_that_runs_out_of_memory_is_flown_in_halves(
    zooming: TimmLMBackbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    requests = GroupSampler(3).requests(make_samples(4), seed=5)
    decoding = Decoding(**LIMITS)
    expected = LocalEngine().rollout(zooming, requests, decoding)
    flown = heavy(monkeypatch)
    engine = LocalEngine()
    found = engine.rollout(zooming, requests, decoding)
    assert flown == [12, 6, 3]  # from then on three at once, each place taken by the next
    assert engine.halved == 2
    assert "12 trajectories ran out of memory; from now on 6 at once" in caplog.text
    assert [t.completion_ids.tolist() for t in found] == [t.completion_ids.tolist() for t in expected]
    flown.clear()
    engine.rollout(zooming, requests, decoding)
    assert flown == [3]  # it is not tried again


def test_a_few_that_run_out_of_memory_halve_their_own_rollout_only(
    zooming: TimmLMBackbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    requests = GroupSampler(3).requests(make_samples(4), seed=5)
    expected = LocalEngine().rollout(zooming, requests, Decoding(**LIMITS))
    engine = LocalEngine(max_batch=16)
    engine.rollout(zooming, GroupSampler(4).requests(make_samples(4), seed=5), Decoding(**LIMITS))
    flown = heavy(monkeypatch)
    for _ in range(2):
        found = engine.rollout(zooming, requests, Decoding(**LIMITS))
        assert flown == [12, 6, 3]
        assert [t.completion_ids.tolist() for t in found] == [t.completion_ids.tolist() for t in expected]
        flown.clear()
    assert (engine.fits, engine.halved) == ({}, 4)
    assert "12 trajectories ran out of memory; in this rollout 6 at once" in caplog.text


def test_a_larger_validation_that_fits_does_not_have_training_run_out_of_memory_each_time(
    zooming: TimmLMBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = GroupSampler(3).requests(make_samples(4), seed=5)
    engine = LocalEngine()
    engine.rollout(zooming, GroupSampler(4).requests(make_samples(4), seed=5), Decoding(0.0, **LIMITS))
    flown = heavy(monkeypatch)
    engine.rollout(zooming, requests, Decoding(**LIMITS))
    engine.rollout(zooming, requests, Decoding(**LIMITS))
    assert flown == [12, 6, 3, 3]


def test_what_ends_in_the_round_that_runs_out_of_memory_stays(
    zooming: TimmLMBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = GroupSampler(4).requests(make_samples(3), seed=5)
    expected = LocalEngine().rollout(zooming, requests, Decoding(**LIMITS))
    staying: list[int] = []  # when memory ran out
    started: list[int] = []

    class Heavy(engines.Flight):
        """The pass behind the first trajectories that end does not fit."""

        def __init__(self, backbone: Any, asked: Any, *rest: Any) -> None:
            started.append(len(asked))
            super().__init__(backbone, asked, *rest)

        def advance(self, ids: Tensor, shown: Any) -> None:
            if not staying and len(self.rows) < len(requests):
                staying.extend(row.number for row in self.rows)
                raise torch.OutOfMemoryError("CUDA out of memory.")
            super().advance(ids, shown)

    monkeypatch.setattr(engines, "Flight", Heavy)
    found = LocalEngine().rollout(zooming, requests, Decoding(**LIMITS))
    assert started == [12, len(staying)]
    assert [t.completion_ids.tolist() for t in found] == [t.completion_ids.tolist() for t in expected]
    # a group that was torn apart still shows one visual: packed, it is one prompt
    assert any(0 < sum(k <= number < k + 4 for number in staying) < 4 for k in (0, 4, 8))
    assert [len({t.visuals[0] for t in found[k : k + 4]}) for k in (0, 4, 8)] == [1, 1, 1]


def test_out_of_memory_frees_images_and_only_those_that_start_are_scaled(
    zooming: TimmLMBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_samples(8)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    scaled: list[tuple[int, int]] = []
    see = TimmLMBackbone.see

    def watched(self: TimmLMBackbone, images: Any) -> Any:
        scaled.append((len(alive), len(images)))
        visuals = see(self, images)
        alive.update(visuals)
        return visuals

    def fail(self: engines.Flight) -> Tensor:
        if len(self.rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sample(self)

    sample = engines.Flight._sample
    monkeypatch.setattr(TimmLMBackbone, "see", watched)
    monkeypatch.setattr(engines.Flight, "_sample", fail)
    LocalEngine(max_batch=4).rollout(zooming, [Request(s, 0) for s in samples], Decoding(**LIMITS))
    assert scaled[:2] == [(0, 4), (0, 2)]  # already there, new
    assert sum(new for _, new in scaled) == 4 + 8


def test_one_trajectory_that_does_not_fit_ends_the_run(
    zooming: TimmLMBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: engines.Flight) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(engines.Flight, "_sample", fail)
    with pytest.raises(torch.OutOfMemoryError):
        LocalEngine().rollout(zooming, [Request(s, 0) for s in make_samples(4)], Decoding(**LIMITS))


# --- data workers ---


class Deadly(torch.utils.data.Dataset[Any]):
    """Kills its worker at one index, once or always."""

    def __init__(self, at: int, mark: Path | None) -> None:
        self.at, self.mark = at, mark

    def __getitems__(self, indices: list[int]) -> list[int]:
        if self.at in indices and (self.mark is None or not self.mark.exists()):
            if self.mark is not None:
                self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return indices


def loader(dataset: Any, workers: int = 2) -> SampleLoader:
    return SampleLoader(dataset, EpochOrder([[k] for k in range(8)], batch_size=2, shuffle=False), workers)


def test_a_data_worker_that_dies_costs_no_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = loader(Deadly(4, tmp_path / "died"))
    assert list(made) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert made.restarts == 1
    assert "DataLoader worker (pid" in caplog.text
    assert made.state_dict()["position"] == 4


def test_a_batch_that_kills_every_worker_is_an_error() -> None:
    # the first one: of a later one a worker may die before the batches in front of it were handed on
    made = loader(Deadly(0, None))
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(made)
    assert made.restarts == 1


def test_an_error_of_the_data_is_not_an_accident() -> None:
    class Wrong(torch.utils.data.Dataset[Any]):
        def __getitems__(self, indices: list[int]) -> list[int]:
            raise RuntimeError("a mistake")

    made = loader(Wrong(), 1)
    with pytest.raises(RuntimeError, match="a mistake"):
        list(made)
    assert made.restarts == 0


def test_what_was_survived_is_counted_from_all_places(zooming: TimmLMBackbone) -> None:
    module = SFTModule(fresh(zooming), optimizer=ADAM)
    rollout = RolloutCallback()
    made = trainer(None, rollout, max_steps=1)
    made.fit(module, Batches([SampleBatch(make_samples(1))]))
    assert isinstance(rollout.engine, LocalEngine)
    rollout.engine.halved, module.nonfinite = 3, 2
    assert survived(made, module) == {"nonfinite_steps": 2, "out_of_memory": 3, "worker_restarts": 0}


# --- a rank that hangs ---


def test_a_process_that_hangs_says_where_and_ends(tmp_path: Path) -> None:
    script = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import lightning as L
from callbacks.watchdog import Watchdog
from modules.sft import SFTModule
from modules.trajectory import SampleBatch
from tests.conftest import make_backbone, make_samples
from tests.fitting import Batches, trainer

class Hangs(SFTModule):
    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            self.waits_for_its_peers()
        return super().training_step(batch, batch_idx)
    def waits_for_its_peers(self):
        time.sleep(600)

made = trainer({str(tmp_path)!r}, Watchdog(timeout=5.0), max_epochs=1)
made.fit(Hangs(make_backbone()), Batches([SampleBatch(make_samples(1))] * 2))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert ended.returncode == EXIT_CODE
    file = tmp_path / "hang.rank0.txt"
    for said in (ended.stderr, file.read_text()):
        assert "error: rank 0 of 1 has hung: nothing happened for 5 s" in said
        assert "after batch 1 of training, step 1, began" in said
        assert "waits_for_its_peers" in said


def test_a_run_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    class Slow(SFTModule):
        def training_step(self, batch: SampleBatch, batch_idx: int) -> dict[str, int]:
            time.sleep(0.3)
            return super().training_step(batch, batch_idx)

    watchdog = Watchdog(timeout=3.0)  # less than the run takes, much more than a batch
    ended: list[int] = []
    watchdog.end = ended.append
    fit(Slow(make_backbone()), [SampleBatch(make_samples(1))] * 12, watchdog, default_root_dir=tmp_path)
    time.sleep(0.1)
    assert ended == []
    assert not list(tmp_path.glob("hang*"))


def test_settings_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match="`timeout` to be above 0"):
        Watchdog(timeout=0)
    with pytest.raises(ValueError, match="`max_nonfinite` to be at least 0"):
        Faults(max_nonfinite=-1)


def test_a_warning_names_the_step(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.WARNING):
        fit(Breaks(make_backbone(), (0,)), [SampleBatch(make_samples(1))], Faults(dumps=0), default_root_dir=tmp_path)
    assert "step 0: loss nan, gradient norm nan; the step is left out, its batch not kept" in caplog.text
