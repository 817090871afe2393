"""Supervised warm-up on interleaved rationales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modules.functional.losses import coordinate_cross_entropy, in_chunks
from modules.grounding import UNGROUNDED, Grounder, Grounding, grounding_metrics
from modules.located import Located, share, step_box
from modules.policy import PolicyModule
from modules.replay import Replayer
from modules.scoring import collate, predicting
from modules.trajectory import SampleBatch, TrajectoryBatch


class SFTModule(PolicyModule):
    """Cross-entropy on everything that the teacher wrote, none on prompt and crops (arXiv 2505.16192, the warm-up).

    With `grounding`, losses of the expected boxes are added: against the region of the teacher's own step, and of the
    teacher's answer.

    Args:
        sigma: width, in bins, of the soft targets of coordinate tokens; None: plain cross-entropy.
            Only for backbones with coordinate tokens.
        grounding_weight: of a coordinate token's loss, where any other token's is 1. A box is four
            tokens and the answer often one: equal weights make the box most of the loss.
        grounding: weights of further losses, of the boxes that the policy is expected to write.
        kwargs: see `PolicyModule`.

    Raises:
        ValueError: if ``sigma`` is given and the backbone writes coordinates as digits; see `Grounder`.
    """

    def __init__(
        self,
        *args: Any,
        sigma: float | None = None,
        grounding_weight: float = 1.0,
        grounding: Grounding = UNGROUNDED,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if sigma is not None and self.backbone.coordinate_bins is None:
            raise ValueError(
                f"Expected `sigma` to be null for {type(self.backbone).__name__}, which writes coordinates as digits, "
                f"but got {sigma}."
            )
        self.sigma = sigma
        self.grounding_weight = grounding_weight
        self.replay = Replayer(self.backbone)
        self.grounder = (
            Grounder(self.backbone, grounding, self.row_tokens, self.head_chunk) if grounding.active else None
        )

    def training_step(self, batch: SampleBatch, batch_idx: int) -> dict[str, int]:
        """One optimizer step on one batch."""
        self.backbone.train()  # loaded weights come in evaluation mode, in which no layer recomputes its activations
        trajectories, refused = self.replay(batch.samples)
        self.refuse(refused)
        size = self.micro_batch or max(len(trajectories), 1)
        parts = [trajectories[k : k + size] for k in range(0, len(trajectories), size)]
        packed = [collate(self.backbone, part, self.row_tokens) for part in parts]
        count = sum(len(b.targets) for b in packed)
        located: list[Located | None] = [None] * len(packed)
        if self.grounder is not None:
            found = [self.grounder.locate(part, step_box, [True] * len(part)) for part in parts]
            located = [*share(found, count, self._sum_over_ranks)]
        sums = self.update(list(zip(packed, located, strict=True)), self._loss, count)
        if packed and sums:  # else this rank only stepped with its peers, if at all
            self.log_now(lambda: self._metrics(sums), len(trajectories))
        return {"tokens": sum(len(t.prompt_ids) + len(t.completion_ids) for t in trajectories)}

    def _loss(self, part: tuple[TrajectoryBatch, Located | None]) -> tuple[Tensor, dict[str, Tensor]]:
        batch, located = part
        hidden = predicting(self.backbone, batch)
        bins = self.backbone.coordinate_bins
        graded = batch.coordinates if self.sigma is not None else torch.full_like(batch.coordinates, torch.nan)

        def cross_entropy(h: Tensor, targets: Tensor, coordinates: Tensor) -> tuple[Tensor]:
            families = targets.new_zeros(0, 0) if bins is None else bins
            return (coordinate_cross_entropy(self.backbone.head(h), targets, coordinates, families, self.sigma or 1.0),)

        (losses,) = in_chunks(cross_entropy, hidden, batch.targets, graded, size=self.head_chunk)
        boxes = batch.coordinates.isfinite()
        parts = {
            "grounding": losses.detach()[boxes].sum(),
            "text": losses.detach()[~boxes].sum(),
            "grounding_tokens": boxes.sum(),
            "text_tokens": (~boxes).sum(),
        }
        loss = (losses * torch.where(boxes, self.grounding_weight, 1.0)).sum()
        if self.grounder is not None and located is not None:
            grounding, sums = self.grounder.loss(hidden, located, batch.temperature)
            loss, parts = loss + grounding, parts | sums
        return loss, parts

    def _metrics(self, sums: dict[str, Tensor]) -> dict[str, Tensor | float]:
        metrics: dict[str, Tensor | float] = {
            "train/loss": sums["loss"],
            "train/loss/text": sums["text"] / sums["text_tokens"],
            "train/grad_norm": sums["grad_norm"],
            "train/learning_rate": self.learning_rate,
            "data/skipped": self.skipped,
            **grounding_metrics([sums]),
        }
        if sums["grounding_tokens"]:
            metrics["train/loss/grounding"] = sums["grounding"] / sums["grounding_tokens"]
        return metrics
