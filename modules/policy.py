"""The policy as a LightningModule: what trains, with which optimizer, divided by what."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import get_scheduler

from modules.backbones.base import PARTS, Backbone
from modules.checkpoints import WholeCheckpointIO
from modules.errors import PolicyError as PolicyError
from modules.lora import LoRA, add_lora, merge_lora
from modules.reached import reached, reached_by_any
from modules.resume import begin_next_epoch, forget_restart
from modules.sharding import own, shard, whole, without_reduction
from modules.trajectory import SampleBatch

M = TypeVar("M")
PATIENCE = 200  # so many batches in a row may pass without an optimizer step
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the optimizer steps of a run.

    Args:
        name: as `transformers.get_scheduler` has them: constant_with_warmup, cosine, cosine_with_min_lr, linear, …
        warmup: share of the steps in which it rises from 0.
        options: further arguments of that schedule, such as ``min_lr_rate``.
    """

    name: str = "constant_with_warmup"
    warmup: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


class PolicyModule(L.LightningModule):
    """What supervised warm-up and R-GRPO have in common.

    Optimization is manual: one batch is one iteration, and a loss is divided once, by what it says it
    divides by, over all micro-batches and ranks of an optimizer step.

    Args:
        backbone: the policy network.
        optimizer: from the parameters that train.
        schedule: of the learning rate.
        freeze: what stays as it is: parts of the backbone (vision, projector, language), or regular expressions, of
            which a parameter's name contains a match.
        lora: adapters that train in place of the backbone's own weights.
        init_from: checkpoint whose policy weights are the start (R-GRPO from SFT). Adapters of that run are merged
            into them: whoever starts from it, with new adapters, other ones or none, starts from that policy.
        clip_norm: largest norm of the gradient.
        micro_batch: trajectories in one forward and backward pass; None: all of a step.
        row_tokens: longest row in which trajectories share their prompt; see `functional.packing.pack`.
        head_chunk: sampled tokens whose logits exist at a time.

    Raises:
        PolicyError: if a pattern of ``freeze`` matches nothing, an adapter or everything, or
            ``init_from`` is not there or does not hold this backbone's weights.
        ValueError: if ``lora`` matches nothing, or peft is not installed.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule = Schedule(),
        freeze: Sequence[str] = (),
        lora: LoRA = LoRA(),
        init_from: str | None = None,
        clip_norm: float = 1.0,
        micro_batch: int | None = None,
        row_tokens: int = 2048,
        head_chunk: int = 4096,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.backbone = backbone
        self.optimizer = optimizer
        self.schedule = schedule
        self.lora = lora
        self.init_from = init_from
        self.clip_norm = clip_norm
        self.micro_batch = micro_batch
        self.row_tokens = row_tokens
        self.head_chunk = head_chunk
        self.learning_rate = 0.0  # of the latest step
        self.idle = 0  # batches in a row without an optimizer step
        self.nonfinite = 0  # steps that were left out, for their loss or gradient was not finite
        self.nonfinite_in_a_row = 0
        self.nonfinite_details: dict[str, Any] = {}  # of the latest such step
        self.refused: dict[str, None] = {}  # an ordered set of "id: why"
        if micro_batch is not None and micro_batch < 1:
            raise PolicyError(f"Expected `micro_batch` to be at least 1, but got {micro_batch}.")
        if init_from is not None:
            load_policy(backbone, init_from)
        if lora.rank:
            add_lora(backbone, lora)
        freeze_matching(backbone, freeze)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over what trains, and its schedule, stepped by `update`."""
        trained = [p for p in self.backbone.parameters() if p.requires_grad]
        half = sorted({str(p.dtype).removeprefix("torch.") for p in trained if p.dtype.itemsize < 4})
        if half:
            logger.warning(
                "Weights of %s train: a step of less than about a 256th of a weight is lost in their rounding. Train "
                "float32 (`trainer.precision: bf16-mixed`), or adapters (`lora.rank`).",
                ", ".join(half),
            )
        optimizer = self.optimizer(trained)
        if self.trainer.estimated_stepping_batches == float("inf"):
            raise PolicyError("Expected `trainer.max_steps` or `trainer.max_epochs` to say how long training is.")
        steps = int(self.trainer.estimated_stepping_batches) * self.steps_per_batch  # Lightning counts one a batch
        if self.trainer.max_steps > 0:
            steps = min(steps, self.trainer.max_steps)
        scheduler = get_scheduler(
            self.schedule.name,
            optimizer,
            num_warmup_steps=round(self.schedule.warmup * steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(self.schedule.options),
        )
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def configure_model(self) -> None:
        """Shard the weights, if the strategy is to (see `modules.sharding`), and have checkpoints written whole.

        Raises:
            PolicyError: the project was not run with this strategy.
        """
        if self._trainer is None:  # Lightning only loads a checkpoint
            return
        shard(self, self.trainer.strategy)
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # else somebody has asked for another one
            self.trainer.strategy.checkpoint_io = WholeCheckpointIO()

    def on_train_start(self) -> None:
        """Go on within an epoch: the number of batches, which `configure_optimizers` asks for, makes Lightning set its
        loader up before a checkpoint is read, and then it does not hand the loader's state back."""
        self.trainer.fit_loop._load_combined_loader_states()
        forget_restart(self.trainer.fit_loop.epoch_loop)

    def on_train_batch_start(self, batch: SampleBatch, batch_idx: int) -> None:
        """Dropout draws the same after a resume: its noise is of the batch and the rank, and checkpoints need none."""
        batches = self.trainer.fit_loop.epoch_loop.total_batch_idx
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        torch.manual_seed((seed * 1_000_003 + batches) * self.trainer.world_size + self.trainer.global_rank)

    @property
    def steps_per_batch(self) -> int:
        """How many optimizer steps a batch comes to at most."""
        return 1

    def update(
        self, micro_batches: Sequence[M], loss: Callable[[M], tuple[Tensor, dict[str, Tensor]]], count: float
    ) -> dict[str, Tensor]:
        """One optimizer step.

        Args:
            micro_batches: of this rank; may be none, its peers then go on without waiting.
            loss: the SUM of a micro-batch's losses, and sums to be added up.
            count: what this rank contributes to the number that the sum is divided by.

        Returns:
            ``loss`` as divided, ``grad_norm``, and the added-up sums of this rank; nothing where there was nothing to
            learn from, or the loss or the gradient of any rank was not finite: then no weight is changed.
        """
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        world = self.trainer.world_size
        total = self._sum_over_ranks(count)
        if total == 0:
            self._wait()
            return {}
        optimizer.zero_grad()
        touched: set[str] | None = set() if world > 1 else None
        sums: dict[str, Tensor] = {"loss": torch.zeros((), device=self.device)}
        for k, micro_batch in enumerate(micro_batches):
            last = k == len(micro_batches) - 1
            with nullcontext() if last or world == 1 else without_reduction(self):
                loss_sum, more = self(loss, micro_batch, last and world > 1, touched)
                # data-parallel strategies average gradients over ranks: undone here, the sum is divided once
                self.manual_backward(loss_sum * (world / total))
            sums["loss"] += loss_sum.detach() / total
            for name, value in more.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach()
        if not micro_batches:
            self.manual_backward(self(lambda _: (torch.zeros((), device=self.device), {}), None, True, None)[0])
        trained = self._trained()
        if touched is not None:
            self._drop_untouched(trained, touched)
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in trained.values() if p.grad is not None]))
        if self._scaler is not None:  # until its step, gradients are as many times too large
            norm = norm / self._scaler.get_scale()
        if not self._finite(sums["loss"], norm, trained):
            optimizer.zero_grad()
            return {}
        torch.nn.utils.clip_grads_with_norm_(list(trained.values()), self.clip_norm, norm)
        sums["grad_norm"] = norm
        self.learning_rate = float(optimizer.param_groups[0]["lr"])
        self.idle = 0
        optimizer.step()
        scheduler = self.lr_schedulers()
        assert scheduler is not None
        assert not isinstance(scheduler, list)
        scheduler.step()
        return sums

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        """Of `16-mixed`."""
        scaler: torch.amp.GradScaler | None = getattr(self.trainer.precision_plugin, "scaler", None)
        return scaler

    def _finite(self, loss: Tensor, norm: Tensor, trained: Mapping[str, torch.nn.Parameter]) -> bool:
        """Whether loss and gradient are numbers on every rank; if not, the step is left out, counted and remembered."""
        if self._scaler is not None:  # it leaves such steps out itself
            return True
        bad = not (bool(loss.isfinite()) and bool(norm.isfinite()))
        if not self.trainer.strategy.reduce_boolean_decision(bad, all=False):
            self.nonfinite_in_a_row = 0
            return True
        self.nonfinite += 1
        self.nonfinite_in_a_row += 1
        gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
        self.nonfinite_details = {
            "loss": float(loss),
            "grad_norm": float(norm),
            "gradients": [name for name, grad in gradients.items() if not bool(own(grad).isfinite().all())],
            "weights": [name for name, p in trained.items() if not bool(own(p).isfinite().all())],
        }
        self._wait()
        return False

    def forward(
        self,
        loss: Callable[[M], tuple[Tensor, dict[str, Tensor]]],
        micro_batch: M,
        waited_for: bool,
        touched: set[str] | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A learner's pass: sharded weights are whole within it, and what they are sharded by hangs on its output.

        Args:
            loss: see `update`.
            micro_batch: what it is of.
            waited_for: whether other ranks wait for the gradients of this pass.
            touched: takes the names of the parameters that the loss depends on.
        """
        loss_sum, sums = loss(micro_batch)
        if touched is not None:
            touched |= reached(loss_sum, self._trained())
        return (loss_sum + self._nothing() if waited_for else loss_sum), sums

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.backbone.named_parameters() if p.requires_grad}

    def _drop_untouched(self, trained: Mapping[str, torch.nn.Parameter], touched: set[str]) -> None:
        """Leave parameters alone that no rank's loss depended on, as one process would: a gradient of zeros moves them,
        by weight decay and by what the optimizer remembers."""
        by_any = reached_by_any(touched, list(trained), self.trainer.strategy, self.device)
        for name, parameter in trained.items():
            if name not in by_any:
                parameter.grad = None

    def _nothing(self) -> Tensor:
        """Zero, with a gradient for every parameter: data-parallel ranks wait for each, also for those of the
        parts that this rank did not need, such as the crops' where nobody zoomed."""
        return torch.stack([0.0 * p.sum() for p in self.backbone.parameters() if p.requires_grad]).sum()

    def _wait(self) -> None:
        """Steps end a run; one that never steps would never end."""
        self.idle += 1
        if self.idle >= PATIENCE:
            raise PolicyError(
                f"{PATIENCE} batches in a row had nothing to learn from: every sample was skipped, or (R-GRPO) the "
                "rewards of every group were all the same, or losses were not finite. Look at `data/skipped`, "
                "`train/reward/*` and `health/nonfinite_steps`."
            )

    def _sum_over_ranks(self, count: float) -> float:
        if self.trainer.world_size == 1:
            return count
        # of one type on all ranks: the sum of nothing is an integer
        own_count = torch.tensor(count, dtype=torch.float64, device=self.device)
        return float(self.trainer.strategy.reduce(own_count, reduce_op="sum"))

    def log_now(self, metrics: Callable[[], Mapping[str, Tensor | float]], size: int) -> None:
        """Log metrics of this step if the trainer writes its logs at it; else do not even compute them."""
        if self.trainer._logger_connector.should_update_logs:
            self.log_dict(dict(metrics()), batch_size=max(size, 1))

    def refuse(self, samples: Sequence[str]) -> None:
        """Count samples that cannot be trained on, and name them; once each, however many epochs they come in."""
        for why in samples:
            if why not in self.refused:
                logger.warning("skipped %s", why)
            self.refused[why] = None

    @property
    def skipped(self) -> float:
        """Rows that the data module left out and samples that were refused, so far."""
        return float(getattr(self.trainer.datamodule, "skipped_total", 0) + len(self.refused))  # type: ignore[attr-defined]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what adapters the weights have, which whoever merges them has to know; see `read_policy`."""
        checkpoint["lora"] = asdict(self.lora)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with the adapters of a run that scales them otherwise, or has them elsewhere; go on where it
        was."""
        begin_next_epoch(checkpoint)
        saved = LoRA(**checkpoint.get("lora", {}))
        here, there = (asdict(replace(lora, dropout=0.0)) if lora.rank else "none" for lora in (self.lora, saved))
        if here != there:
            raise PolicyError(
                f"Expected `ckpt_path` to be of a run with the adapters of this one, {here}, but its are {there}; "
                "`init_from` starts from its policy, with these adapters."
            )

    def validation_step(self, batch: SampleBatch, batch_idx: int) -> None:
        """Trajectories are rolled out, measured and logged by the rollout callback."""

    def test_step(self, batch: SampleBatch, batch_idx: int) -> None:
        """See `validation_step`."""

    def predict_step(self, batch: SampleBatch, batch_idx: int) -> None:
        """See `validation_step`."""


def load_policy(backbone: Backbone, path: str, argument: str = "init_from") -> None:
    """Load the policy's weights out of a training checkpoint, its adapters merged into them.

    Args:
        backbone: without adapters.
        path: of the checkpoint.
        argument: what the user gave the path as.

    Raises:
        PolicyError: if it is no such checkpoint, or of another backbone.
    """
    own, lora = read_policy(path, argument)
    if lora.rank:
        own = merge_lora(own, lora.scaling)
    check_weights(own, backbone.state_dict(), path, argument)
    backbone.load_state_dict(own)


def read_policy(path: str, argument: str) -> tuple[dict[str, Tensor], LoRA]:
    """The weights of the backbone in a training checkpoint, adapters among them, and what adapters they are.

    Raises:
        PolicyError: if it is no such checkpoint.
    """
    if not Path(path).is_file():
        hint = "; a Hugging Face folder is the backbone's `model`" if Path(path).is_dir() else ""
        raise PolicyError(f"Expected `{argument}` to be a checkpoint, but there is no file {path!r}{hint}.")
    try:
        # mapped: the optimizer's state in it, often twice the weights, is not read
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state, lora = checkpoint["state_dict"], LoRA(**checkpoint.get("lora", {}))
    except Exception as error:  # whatever a damaged or hostile file leads the reader into
        raise PolicyError(
            f"Expected `{argument}` {path!r} to be a training checkpoint, but reading it fails: {error!r}."
        ) from error
    return {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}, lora


def check_weights(own: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str, argument: str) -> None:
    """Whether a checkpoint has the weights that a backbone has.

    Raises:
        PolicyError: if not; names one.
    """
    wrong = sorted(set(own) ^ set(expected)) or sorted(k for k in own if own[k].shape != expected[k].shape)
    if wrong:
        raise PolicyError(
            f"Expected `{argument}` {path!r} to hold the weights of this backbone, but {len(wrong)} tensors are "
            f"missing, unknown or of another shape, {wrong[0]!r} first."
        )


def freeze_matching(backbone: Backbone, patterns: Sequence[str]) -> None:
    """Freeze parts of the backbone (`PARTS`), and parameters whose name contains a match of a regular expression."""
    for pattern in patterns:
        matched = {
            name: p
            for name, p in backbone.named_parameters()
            if (backbone.part(name) == pattern if pattern in PARTS else re.search(pattern, name))
        }
        if not matched:
            names = sorted({name.split(".")[0] for name, _ in backbone.named_parameters()})
            raise PolicyError(
                f"Expected `freeze` {pattern!r} to be one of {PARTS} or to match a parameter, "
                f"but names begin with {names}."
            )
        adapter = next((name for name, p in matched.items() if p.requires_grad and ".lora_" in name), None)
        if adapter is not None:
            raise PolicyError(
                f"Expected `freeze` to leave the adapters of `lora.targets` alone, but {pattern!r} matches {adapter!r}."
            )
        for parameter in matched.values():
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in backbone.parameters()):
        raise PolicyError(f"Expected `freeze` to leave something to train, but {list(patterns)} match everything.")
