"""The reference policy: frozen, log-probabilities only."""

from __future__ import annotations

import copy

import lightning as L
import torch
from torch import Tensor

from modules.backbones.base import Backbone
from modules.scoring import token_log_probs
from modules.trajectory import TrajectoryBatch


class ReferenceModule(L.LightningModule):
    """A copy of the policy as it is now, which never changes.

    Built only when something uses it: a KL penalty, or a ratio over the reference.

    Args:
        backbone: the policy to be copied.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> ReferenceModule:
        """The reference is never in training mode."""
        return self

    @torch.no_grad()
    def forward(self, batch: TrajectoryBatch, chunk: int) -> Tensor:
        """Log-probabilities (T,) of the sampled tokens."""
        return token_log_probs(self.backbone, batch, chunk)[0]
