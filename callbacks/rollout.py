"""Rolls the policy out: groups to train on, and single trajectories to measure it by."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from callbacks.predictions import Predictions, decided_by, kept, key, measured_of, sources_of, told
from modules.comparison import advantage_metrics
from modules.engine import Decoding, GroupSampler, LocalEngine, Request, RolloutEngine
from modules.functional.confidence import confidence
from modules.metrics import MEASURED, Tally, measure
from modules.policy import PolicyError, PolicyModule
from modules.rewards import Reward, check_failures, check_gates, credited_by_turn, score, score_turns
from modules.rgrpo import RGRPOModule
from modules.sharding import gather
from modules.trajectory import Group, Sample, SampleBatch, StopReason, Trajectory

BY_SOURCE = ("accuracy", "zoom_rate")  # logged of each data set, if asked for


class RolloutCallback(L.Callback):
    """R-GRPO's rollouts before every training step; trajectories for validation, test and prediction.

    Args:
        engine: what generates.
        sampler: how questions become groups.
        rewards: components by name; the name is the metric's (``train/reward/<name>``). One that is
            called ``accuracy`` is also the metric ``val/accuracy``.
        decoding: of training rollouts.
        evaluations: decodings of validation and test by name. Metrics of the one called ``greedy`` are
            ``val/<metric>``, of the others ``val/<name>/<metric>``.
        seed: of the rollouts.
        max_failed: share of an iteration's trajectories on this rank that may go unjudged; more ends the run.
        samples: of which evaluations how many trajectories a question are drawn; 1 where it is not named.
        resume: whether a test goes on where one of the same policy, decoding and questions was interrupted; what it
            answered is read from ``predictions.jsonl`` and not asked again.
        by_source: log `BY_SOURCE` of the questions of each data set as well, as ``val/<source>/<metric>``.
    """

    def __init__(
        self,
        engine: RolloutEngine | None = None,
        sampler: GroupSampler = GroupSampler(),
        rewards: dict[str, Reward] | None = None,
        decoding: Decoding = Decoding(),
        evaluations: dict[str, Decoding] | None = None,
        seed: int = 0,
        max_failed: float = 1.0,
        samples: dict[str, int] | None = None,
        resume: bool = False,
        by_source: bool = False,
    ) -> None:
        self.engine = engine or LocalEngine()
        self.sampler = sampler
        self.rewards = rewards or {}
        check_gates(self.rewards)
        self.decoding = decoding
        self.evaluations = evaluations or {"greedy": replace(self.decoding, temperature=0.0)}
        self.seed = seed
        if not 0 <= max_failed <= 1:
            raise ValueError(f"Expected `max_failed` to be a share, from 0 to 1, but got {max_failed}.")
        self.max_failed = max_failed
        self.iteration = 0
        self.samples = dict(samples or {})
        self.resume, self.by_source = resume, by_source
        for name, draws in self.samples.items():
            if name not in self.evaluations or draws < 1:
                known = sorted(self.evaluations)
                raise ValueError(f"Expected `samples` to be at least 1 for some of {known}, but got {self.samples}.")
        self._predictions: Predictions | None = None
        self._tallies: dict[str, Tally] = {}
        self._by_source: dict[tuple[str, str], Tally] = {}  # (mode, source)

    def state_dict(self) -> dict[str, Any]:
        """The seed of the next rollout depends on the iteration."""
        return {"iteration": self.iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.iteration = state_dict["iteration"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """A service that a reward needs is missed now, not after the first rollout; predictions are not judged."""
        for reward in self.rewards.values() if stage != "predict" else ():
            reward.setup(cast(PolicyModule, pl_module))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """R-GRPO learns from rewards only."""
        if isinstance(pl_module, RGRPOModule) and not any(reward.weight for reward in self.rewards.values()):
            raise PolicyError("Expected `rollout.rewards` to hold a reward with a weight, for R-GRPO learns from them.")
        by_turn = isinstance(pl_module, RGRPOModule) and pl_module.objective.credit == "turn"
        if by_turn and not credited_by_turn(self.rewards):
            raise PolicyError(
                "Expected `rollout.rewards` to hold a turn reward with a weight (such as IoU) with `objective.credit: "
                f"turn`, but got { ({name: type(reward).__name__ for name, reward in self.rewards.items()}) }."
            )
        if isinstance(pl_module, RGRPOModule) and pl_module.learns_from_answers:
            self._check_answers()

    def _check_answers(self) -> None:
        """What `grounding.answer` needs: to be told which answers are right, and crops that are what they seem."""
        if "accuracy" not in self.rewards:
            raise PolicyError(
                "Expected `rollout.rewards` to hold one called `accuracy` with `grounding.answer`, which learns from "
                f"right answers, but got {sorted(self.rewards)}."
            )
        if self.decoding.crops != "zoom":
            raise PolicyError(
                "Expected `rollout.decoding.crops` to be zoom with `grounding.answer`, which reads the crops once "
                f"more, but got {self.decoding.crops!r}."
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: SampleBatch, batch_idx: int
    ) -> None:
        """Roll out, judge and compare the groups of this iteration."""
        if not isinstance(pl_module, RGRPOModule):
            return
        seed = (self.seed * 1_000_003 + self.iteration) * trainer.world_size + trainer.global_rank
        self.iteration += 1  # on every rank alike, whatever it has: checkpoints hold one rank's count
        gather(pl_module)  # likewise, and the only time that a rollout meets other ranks
        if not batch.samples:
            return
        requests = self.sampler.requests(batch.samples, seed)
        trajectories = self._rollout(trainer, pl_module, requests, self.decoding)
        with trainer.precision_plugin.forward_context():  # some rewards ask the policy
            components, totals, pay = (
                score_turns(self.rewards, trajectories)
                if pl_module.objective.credit == "turn"
                else (*score(self.rewards, trajectories), None)
            )
        check_failures(self.rewards, components, totals, self.max_failed)
        size = self.sampler.size
        for n, sample in enumerate(batch.samples):
            members = slice(n * size, (n + 1) * size)
            group = Group(
                sample=sample,
                trajectories=tuple(trajectories[members]),
                rewards={name: values[members] for name, values in components.items()},
                totals=totals[members],
                advantages=pl_module.advantages(totals[members]),
                turn_pay=None if pay is None else pay.of(members),
            )
            batch.groups.append(pl_module.credited(group))
        pl_module.log_now(lambda: training_metrics(batch.groups), len(trajectories))

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        self._begin(trainer, "val")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the means."""
        self._log(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        self._begin(trainer, "test")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the means."""
        self._log(trainer, pl_module, "test")

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: SampleBatch, *_: Any
    ) -> None:
        """Measure the policy."""
        self._evaluate(trainer, pl_module, batch)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Predictions are saved as they come."""
        assert isinstance(pl_module, PolicyModule)
        parts = (pl_module.backbone, self.evaluations, self.samples, self.seed)
        self._predictions = Predictions(trainer, decided_by(trainer, *parts) if self.resume else None)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: SampleBatch, *_: Any
    ) -> None:
        """Measure the policy and save what it wrote."""
        self._evaluate(trainer, pl_module, batch)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the file of predictions."""
        self._close()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Predictions are saved as they come."""
        self._tallies = {}
        self._predictions = Predictions(trainer)

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: SampleBatch, *_: Any
    ) -> None:
        """Write trajectories for questions without answers."""
        self._evaluate(trainer, pl_module, batch)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the file of predictions."""
        self._close()

    def _rollout(
        self, trainer: L.Trainer, pl_module: L.LightningModule, requests: list[Request], decoding: Decoding
    ) -> list[Trajectory]:
        assert isinstance(pl_module, PolicyModule)
        # callback hooks run outside autocast; the learner's pass runs inside
        with trainer.precision_plugin.forward_context(), casts_kept():
            return self.engine.rollout(pl_module.backbone, requests, decoding)

    def _begin(self, trainer: L.Trainer, split: str) -> None:
        self._tallies = {mode: Tally([*MEASURED, *map(curve, self.rewards)]) for mode in self.evaluations}
        names = [name for name in BY_SOURCE if name in [*MEASURED, *map(curve, self.rewards)]]
        sources = sources_of(trainer, split) if self.by_source else []
        self._by_source = {(mode, source): Tally(names) for mode in self.evaluations for source in sources}

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for mode, tally in self._tallies.items():
            prefix = stage if mode == "greedy" else f"{stage}/{mode}"
            # one reduction, of the same names on every rank
            means = tally.means(lambda sums: trainer.strategy.reduce(sums.to(pl_module.device), reduce_op="sum"))
            pl_module.log_dict({f"{prefix}/{name}": value for name, value in means.items()})
        for (mode, source), tally in self._by_source.items():
            prefix = f"{stage}/{source}" if mode == "greedy" else f"{stage}/{mode}/{source}"
            means = tally.means(lambda sums: trainer.strategy.reduce(sums.to(pl_module.device), reduce_op="sum"))
            pl_module.log_dict({f"{prefix}/{name}": value for name, value in means.items()})

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: SampleBatch) -> None:
        assert isinstance(pl_module, PolicyModule)
        gather(pl_module)
        if not batch.samples:
            return
        for mode, decoding in self.evaluations.items():
            draws = self.samples.get(mode, 1)
            asked = [(s, draw) for s in batch.samples for draw in range(draws)]
            known = [] if self._predictions is None else self._predictions.known(mode, asked)
            asked = [pair for pair in asked if (mode, pair[0].id, pair[1]) not in {key(line) for line in known}]
            # the same noise for a question in every evaluation, whatever batch it comes in
            requests = [Request(s, _stable_seed(s, self.seed, draw)) for s, draw in asked]
            trajectories = self._rollout(trainer, pl_module, requests, decoding) if requests else []
            with trainer.precision_plugin.forward_context():
                rewards = self.rewards if self._tallies else {}  # predictions are not judged
                components, totals = score(rewards, trajectories)
            batch.evaluations[mode] = [
                Group(
                    sample=t.sample,
                    trajectories=(t,),
                    rewards={name: values[k : k + 1] for name, values in components.items()},
                    totals=totals[k : k + 1],
                    advantages=torch.zeros(1),
                )
                for k, t in enumerate(trajectories)
            ]
            self._count(mode, [(group.sample.source, numbers(group)) for group in batch.evaluations[mode]])
            self._count(mode, [(line["source"], measured_of(line)) for line in known])
            if self._predictions is not None:
                for group, (sample, draw) in zip(batch.evaluations[mode], asked, strict=True):
                    sure = confidence(group.trajectories[0], pl_module.backbone.detokenize)
                    line = {**prediction(mode, group), "confidence": sure, **kept(sample)}
                    line |= {"draw": draw} if draws > 1 else {}
                    line |= {"measured": told(numbers(group))} if self.resume else {}
                    self._predictions.write([line])

    def _count(self, mode: str, rows: list[tuple[str, dict[str, float]]]) -> None:
        if mode not in self._tallies:  # in prediction
            return
        self._tallies[mode].add(row for _, row in rows)
        for source, row in rows:
            if (mode, source) in self._by_source:
                self._by_source[mode, source].add([row])

    def _close(self) -> None:
        if self._predictions is not None:
            self._predictions.close()
            self._predictions = None


@contextmanager
def casts_kept() -> Iterator[None]:
    """Let autocast keep the weights that it has cast, which Lightning forbids; nothing steps during a rollout, and
    casting all weights for every token would take longer than computing with them."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(True)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(before)


def training_metrics(groups: list[Group]) -> dict[str, Tensor | float]:
    """Everything worth a curve about the groups of one iteration."""
    trajectories = [t for g in groups for t in g.trajectories]
    means = Tally(MEASURED).add(map(measure, trajectories)).means()
    metrics: dict[str, Tensor | float] = {f"train/{name}": value for name, value in means.items()}
    for name in groups[0].rewards:
        values = torch.cat([g.rewards[name] for g in groups])
        metrics[f"train/reward/{name}"] = float(values.nanmean())
        metrics[f"train/reward/failed/{name}"] = float(values.isnan().float().mean())
    totals = torch.stack([g.totals for g in groups])
    metrics["train/reward/total"] = float(totals.nanmean())
    metrics["train/reward/failed"] = float(totals.isnan().float().mean())
    spreads = [t[~t.isnan()].std() for t in totals if int((~t.isnan()).sum()) > 1]
    metrics["train/reward/group_std"] = float(torch.stack(spreads).mean()) if spreads else 0.0
    for reason in StopReason:
        metrics[f"train/stop/{reason.value}"] = sum(t.stop is reason for t in trajectories) / len(trajectories)
    return {**metrics, **advantage_metrics(groups)}


def curve(reward: str) -> str:
    """The name of a component's curve in evaluation, below ``val/`` or ``test/``."""
    return "accuracy" if reward == "accuracy" else f"reward/{reward}"


def numbers(group: Group) -> dict[str, float]:
    """What is counted of one evaluated trajectory: the components, and what `measure` tells."""
    rewards = {curve(name): float(value[0]) for name, value in group.rewards.items()}
    return {**measure(group.trajectories[0]), **rewards}


def prediction(mode: str, group: Group) -> dict[str, Any]:
    """One line of ``predictions.jsonl``."""
    trajectory = group.trajectories[0]
    sample: Sample = trajectory.sample
    measured = measure(trajectory)
    line: dict[str, Any] = {
        "id": sample.id,
        "image_id": str(sample.meta.get("image_id", sample.id)),
        "source": sample.source,
        "mode": mode,
        "question": sample.question,
        "answers": list(sample.answers),
        "answer": trajectory.answer,
        "text": trajectory.text,
        "boxes": [list(region.box) for region in trajectory.regions],
        "zooms": [region.zoom for region in trajectory.regions],  # None: the zoom rule
        "crops": int(measured["crops"]),
        "iou": None if math.isnan(measured["iou"]) else measured["iou"],
        "stop": trajectory.stop.value,
    }
    rewards = {name: float(value[0]) for name, value in group.rewards.items()}
    line["rewards"] = {name: None if math.isnan(value) else value for name, value in rewards.items()}
    if not math.isnan(rewards.get("accuracy", math.nan)):  # a failed judgement is neither right nor wrong
        line["correct"] = int(rewards["accuracy"] > 0)
    return line


def _stable_seed(sample: Sample, seed: int, draw: int = 0) -> int:
    """A seed that depends on the question, which of its draws it is, and on nothing else that changes between runs."""
    said = f"{seed}/{sample.id}" + (f"/{draw}" if draw else "")
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:7], "big")
