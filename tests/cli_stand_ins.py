"""A policy, a backbone and data of a few numbers, for tests of the command line and of what drives it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from modules.policy import PolicyModule
from modules.trajectory import SampleBatch

CONFIG = """\
model:
  class_path: TinyPolicy
  init_args:
    backbone:
      class_path: TinyBackbone
data:
  class_path: TinyData
trainer:
  accelerator: cpu
  max_steps: 4
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
"""


class TinyBackbone(nn.Module):
    """One weight.

    Args:
        start: its value before training.
    """

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(start))


class TinyPolicy(PolicyModule):
    """Pulls the weight to ``goal``; under test, answers ``questions`` of which ``right`` are right."""

    fail_at: ClassVar[int | None] = None  # the optimizer step at which something goes wrong
    taken: ClassVar[list[int]] = []  # every optimizer step that was taken, of all runs

    def __init__(
        self,
        backbone: TinyBackbone,
        goal: float = 1.0,
        right: int = 2,
        questions: int = 4,
        init_from: str | None = None,
    ) -> None:
        super().__init__(backbone, init_from=init_from)  # type: ignore[arg-type]
        self.save_hyperparameters()  # so that a checkpoint has something to overrule the command line with
        self.goal, self.right, self.questions = goal, right, questions

    def configure_optimizers(self) -> dict[str, object]:  # type: ignore[override]
        """Plain gradient descent on (w - goal)^2: with the gradient clipped to 1, at most 0.25 a step."""
        optimizer = torch.optim.SGD(self.backbone.parameters(), lr=0.25)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)}

    def training_step(self, batch: SampleBatch, batch_idx: int) -> None:
        """One optimizer step."""
        if self.global_step == self.fail_at:
            raise RuntimeError("the stand-in was told to fail")
        self.taken.append(self.global_step)

        def loss(_: object) -> tuple[Tensor, dict[str, Tensor]]:
            return (self.backbone.weight - self.goal) ** 2, {}

        self.log("train/loss", self.update([None], loss, 1)["loss"], batch_size=1)

    def on_test_end(self) -> None:
        """Write what the rollout callback would have written, and the weight that was tested."""
        folder = Path(self.trainer.default_root_dir)
        lines = [
            {"id": f"q{k}", "image_id": f"i{k // 2}", "mode": "greedy", "correct": int(k < self.right), "iou": 0.5}
            | {"crops": k % 2}
            for k in range(self.questions)
        ]
        (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "weight.txt").write_text(str(self.backbone.weight.item()))


class TinyData(LightningDataModule):
    """Batches of nothing.

    Args:
        seed: kept, for tests of interpolation.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def train_dataloader(self) -> DataLoader[int]:
        """Two batches an epoch."""
        return DataLoader(range(2), batch_size=1, collate_fn=lambda _: SampleBatch(samples=[]))  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[int]:
        """See `train_dataloader`."""
        return self.train_dataloader()

    def test_dataloader(self) -> DataLoader[int]:
        """See `train_dataloader`."""
        return self.train_dataloader()
