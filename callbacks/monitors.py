"""Is the policy collapsing, and which reward did it? Rules on logged metrics, and the curves that only they need."""

from __future__ import annotations

import difflib
import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from callbacks.crop_audit import MEASURED as AUDITED
from callbacks.crop_audit import CropAudit
from callbacks.rollout import RolloutCallback
from modules.functional.kinds import KINDS, token_kinds
from modules.metrics import MEASURED
from modules.policy import PolicyError, PolicyModule
from modules.rgrpo import RGRPOModule
from modules.trajectory import Group, SampleBatch, Trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SetWeight:
    """An action: a reward component weighs something else from the next iteration on.

    Args:
        reward: its name among ``rollout.rewards``.
        to: the weight.
    """

    reward: str
    to: float


@dataclass(frozen=True)
class Rule:
    """What a metric may not be for long, and what is done about it.

    Args:
        metric: as it is called in TensorBoard, such as ``train/zoom_rate``.
        below: a value below this is out of bounds.
        above: a value above this is out of bounds.
        patience: so many logged values in a row have to be out of bounds.
        action: ``warn`` in the log, ``stop`` the run, or set the weight of a reward.

    Raises:
        ValueError: no bound, bounds that leave no value between them, or a patience below 1.
    """

    metric: str
    below: float | None = None
    above: float | None = None
    patience: int = 1
    action: Literal["warn", "stop"] | SetWeight = "warn"

    def __post_init__(self) -> None:
        if self.below is None and self.above is None:
            raise ValueError(f"Expected the rule on {self.metric!r} to have `below` or `above`, but it has neither.")
        if self.below is not None and self.above is not None and self.below > self.above:
            raise ValueError(f"Expected `below` <= `above`, but got {self.below} and {self.above} ({self.metric!r}).")
        if self.patience < 1:
            raise ValueError(f"Expected `patience` to be at least 1, but got {self.patience} ({self.metric!r}).")

    def forbids(self, value: float) -> bool:
        """Whether a value is out of bounds."""
        low = self.below is not None and value < self.below
        return low or (self.above is not None and value > self.above)


@dataclass
class Progress:
    """How a rule stands."""

    streak: int = 0  # values out of bounds in a row, up to the latest
    breaches: int = 0  # times that a streak has reached the rule's patience


class Monitors(L.Callback):
    """Watches logged metrics and acts when one stays out of bounds; says which reward the advantage follows.

    Rules are judged when the trainer writes its logs. A value counts once, when it is logged: where a metric is not
    logged (the area of crops where there were none) or is NaN, its rule waits. On several ranks the first one judges,
    whose curves TensorBoard shows, and all act.

    Logged of training, together with all else:

    - ``train/monitor/<rule>``: breaches so far;
    - ``train/correlation/<a>-<b>``: Pearson correlation of two components over the trajectories of the latest
      iterations, unweighted and not gated; ``train/correlation/advantage/<a>``: of one with the advantage. Trajectories
      that could not be judged are left out, and so is a correlation with what does not vary;
    - ``train/surprisal/text``, ``/box``, ``/answer``: mean negative log-probability (nats) that the sampler gave to the
      tokens that it wrote of this kind: an estimate of their entropy, from the sampled tokens alone.

    Args:
        rules: by name.
        window: iterations that correlations are over.

    Raises:
        ValueError: a window that is not at least 1.
    """

    def __init__(self, rules: dict[str, Rule] | None = None, window: int = 20) -> None:
        if window < 1:
            raise ValueError(f"Expected `window` to be at least 1, but got {window}.")
        self.rules = rules or {}
        self.progress = {name: Progress() for name in self.rules}
        self._acted: list[str] = []  # rules that have set a weight, the latest last
        self._window: deque[dict[str, Tensor]] = deque(maxlen=window)
        self._latest: dict[str, Tensor] = {}  # the value of each rule's metric that was judged last
        self._steps = 0  # optimizer steps before the batch
        self._trained = self._validated = False
        self._missing = set(self.rules)  # rules whose metric was not seen yet

    def state_dict(self) -> dict[str, Any]:
        """How the rules stand, and what correlations are over."""
        progress = {name: asdict(progress) for name, progress in self.progress.items()}
        return {"progress": progress, "acted": list(self._acted), "window": list(self._window)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`; rules that are new begin anew, and those that are gone are forgotten."""
        for name in self.rules.keys() & state_dict["progress"].keys():
            self.progress[name] = Progress(**state_dict["progress"][name])
        self._acted = [name for name in state_dict["acted"] if name in self.rules]
        self._window.extend(state_dict["window"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Miss a reward that a rule changes now.

        Raises:
            PolicyError: it is not there.
        """
        rewards = sorted(name for rollout in rollouts(trainer) for name in rollout.rewards)
        for name, rule in self.rules.items() if stage == "fit" else ():
            if isinstance(rule.action, SetWeight) and rule.action.reward not in rewards:
                raise PolicyError(
                    f"Expected `rules.{name}.action.reward` to be one of `rollout.rewards` {rewards}, "
                    f"but got {rule.action.reward!r}."
                )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the weights again that were set before a resume; sharded runs have read no checkpoint before this."""
        for action in (self.rules[name].action for name in self._acted):
            if isinstance(action, SetWeight):
                set_weight(trainer, action)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: SampleBatch, batch_idx: int
    ) -> None:
        """All callbacks have logged by now: miss metrics that there are not."""
        self._steps = trainer.global_step
        if self._missing and trainer.is_global_zero:  # other ranks may have had no questions
            self._check_names(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From now on, what validation logs is known."""
        self._validated = self._validated or not trainer.sanity_checking

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: SampleBatch, batch_idx: int
    ) -> None:
        """Measure, judge and act."""
        assert isinstance(pl_module, PolicyModule)
        self._remember(batch.groups)
        if not trainer._logger_connector.should_update_logs:
            return
        self._trained = self._trained or trainer.global_step > self._steps
        trajectories = [t for group in batch.groups for t in group.trajectories]
        measured = {**correlations(self._window), **surprisal(trajectories, pl_module.backbone.detokenize)}
        pl_module.log_dict(measured, on_step=True, on_epoch=False)
        for name, message in trainer.strategy.broadcast(self._judge(trainer.callback_metrics)):
            self._act(trainer, name, message)
        counts = {f"train/monitor/{name}": float(progress.breaches) for name, progress in self.progress.items()}
        pl_module.log_dict(counts, on_step=True, on_epoch=False)

    def _remember(self, groups: Sequence[Group]) -> None:
        if not groups:
            return
        rows = columns(groups)
        if self._window and self._window[-1].keys() != rows.keys():  # resumed with other rewards
            self._window.clear()
        self._window.append(rows)

    def _judge(self, metrics: Mapping[str, Tensor]) -> list[tuple[str, str]]:
        """Rules whose patience is at an end, each with what there is to say: nothing if it was said already."""
        found = []
        for name, rule in self.rules.items():
            metric, latest = metrics.get(rule.metric), self._latest.get(name)
            # what was not logged again is still there, in the same place; holding it keeps the place from being reused
            if metric is None or (latest is not None and metric.data_ptr() == latest.data_ptr()):
                continue
            self._latest[name], value = metric, float(metric)
            if math.isnan(value):
                continue
            progress = self.progress[name]
            progress.streak = progress.streak + 1 if rule.forbids(value) else 0
            if progress.streak >= rule.patience:
                first = progress.streak == rule.patience
                progress.breaches += first
                found.append((name, described(name, rule, value) if first else ""))
        return found

    def _act(self, trainer: L.Trainer, name: str, message: str) -> None:
        if message and trainer.is_global_zero:
            logger.warning(message)
        action = self.rules[name].action
        if action == "stop":  # as long as it goes on: a run that is resumed into it stops again
            trainer.should_stop = True
        elif isinstance(action, SetWeight) and message:
            self._acted = [*(other for other in self._acted if other != name), name]
            set_weight(trainer, action)

    def _check_names(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise PolicyError if a rule is on a metric that there is not, by now or ever."""
        names = trainer.callback_metrics.keys() | sometimes(trainer, isinstance(pl_module, RGRPOModule))
        self._missing = {name for name in self._missing if self.rules[name].metric not in names}
        for name in sorted(self._missing):
            metric = self.rules[name].metric
            if self._validated if metric.startswith("val/") else self._trained:
                near = difflib.get_close_matches(metric, names, n=5, cutoff=0.5) or sorted(names)
                raise PolicyError(
                    f"Expected `rules.{name}.metric` to be a logged metric, but there is no {metric!r}; "
                    f"the nearest are {near}."
                )


def rollouts(trainer: L.Trainer) -> list[RolloutCallback]:
    """The callbacks that roll out."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, RolloutCallback)]


def set_weight(trainer: L.Trainer, action: SetWeight) -> None:
    """Act."""
    for rollout in rollouts(trainer):
        rollout.rewards[action.reward].weight = action.to


def sometimes(trainer: L.Trainer, rolling: bool) -> set[str]:
    """Metrics that are logged only where there is something to count.

    Args:
        trainer: with its callbacks.
        rolling: whether training rolls out.
    """
    stages = {"train"} if rolling else set()
    names: set[str] = set()
    for rollout in rollouts(trainer):
        stages |= {"val" if mode == "greedy" else f"val/{mode}" for mode in rollout.evaluations}
        names |= {f"train/correlation/{name}" for name in pairs(list(rollout.rewards))} if rolling else set()
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for audit in (callback for callback in callbacks if isinstance(callback, CropAudit)):
        names |= {f"val/audit/{how}/{name}" for how in audit.replacements for name in AUDITED}
    if rolling:
        names |= {f"train/{what}/{kind}" for what in ("surprisal", "entropy") for kind in KINDS}
        names |= {"train/advantage/turn_mean", "train/advantage/turn_std"}
    return names | {f"{stage}/{name}" for stage in stages for name in MEASURED}


def described(name: str, rule: Rule, value: float) -> str:
    """A breach in a sentence, and what is done."""
    sides = {"below": rule.below, "above": rule.above}
    bounds = " or ".join(f"{side} {bound:g}" for side, bound in sides.items() if bound is not None)
    times = "once" if rule.patience == 1 else f"{rule.patience} times in a row"
    match rule.action:
        case "warn":
            done = ""
        case "stop":
            done = " The run stops."
        case SetWeight(reward, to):
            done = f" The reward `{reward}` weighs {to:g} from now on."
    return f"Monitor `{name}`: {rule.metric} is {value:.4g}; it was {bounds} {times}.{done}"


def columns(groups: Sequence[Group]) -> dict[str, Tensor]:
    """Of every trajectory each component, (n,) by name, and the advantage under ``""``; NaN where it is not known."""
    table = {name: torch.cat([group.rewards[name] for group in groups]) for name in groups[0].rewards}
    totals, advantages = (torch.cat([getattr(group, name) for group in groups]) for name in ("totals", "advantages"))
    return {**table, "": advantages.masked_fill(totals.isnan(), math.nan)}


def pairs(rewards: Sequence[str]) -> dict[str, tuple[str, str]]:
    """What is correlated: the name of the curve -> two columns."""
    found = {f"{a}-{b}": (a, b) for a, b in itertools.combinations(rewards, 2)}
    return {**found, **{f"advantage/{name}": (name, "") for name in rewards}}


def correlations(window: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Curves of the correlations over iterations that have the same columns, those that are not known left out."""
    if not window:
        return {}
    table = {name: torch.cat([rows[name] for rows in window]) for name in window[-1]}
    named = pairs([name for name in table if name])
    found = {f"train/correlation/{name}": pearson(table[a], table[b]) for name, (a, b) in named.items()}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def pearson(x: Tensor, y: Tensor) -> float:
    """Correlation of (n,) with (n,) where neither is NaN; NaN where one of them does not vary."""
    known = ~(x.isnan() | y.isnan())
    both = torch.stack([x[known], y[known]]).double()
    if both.shape[1] < 2 or bool((both.amax(1) == both.amin(1)).any()):
        return math.nan
    return float(torch.corrcoef(both)[0, 1])


def surprisal(trajectories: Sequence[Trajectory], detokenize: Callable[[Tensor], str]) -> dict[str, float]:
    """Mean negative log-probability of the sampled tokens of each kind that there is."""
    told = [(trajectory, token_kinds(trajectory, detokenize)) for trajectory in trajectories]
    tokens = {kind: torch.cat([t.log_probs[kinds[kind]] for t, kinds in told]) for kind in KINDS if told}
    return {f"train/surprisal/{kind}": -float(found.mean()) for kind, found in tokens.items() if len(found)}
