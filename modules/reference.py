"""The reference policy: frozen, log-probabilities only."""

from __future__ import annotations

import copy

import lightning as L
import torch
from torch import Tensor

from modules.backbones.base import Backbone
from modules.lora import adapted_layers, without_lora
from modules.scoring import token_log_probs
from modules.trajectory import TrajectoryBatch


class ReferenceModule(L.LightningModule):
    """The policy as training finds it; it changes only where `synchronise` is called.

    Built only when something uses it: a KL penalty, or a ratio over the reference. Of a policy with adapters it is
    that policy without them, and costs nothing; no weights of it are saved. Else it is a copy, which shares
    what is frozen with the policy: a checkpoint names those weights twice, but holds them once.

    Args:
        backbone: the policy. Its frozen parameters must stay frozen.
    """

    backbone: Backbone

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        if adapted_layers(backbone):
            self.__dict__["backbone"] = backbone  # past nn.Module, which would list and save it a second time
        else:
            self.backbone = frozen_copy(backbone)

    def train(self, mode: bool = True) -> ReferenceModule:
        """The reference is never in training mode."""
        return self

    @torch.no_grad()
    def synchronise(self, backbone: Backbone) -> None:
        """Become the policy as it is now (TR-DPO's hard update, arXiv 2404.09656). Not with adapters."""
        for own, new in zip(self.backbone.parameters(), backbone.parameters(), strict=True):
            if own is not new:  # what is frozen is shared
                own.copy_(new)
        if backbone.encoder_trains():
            self.backbone.encoded.clear()  # features of the tower as it was
        if backbone.tower_trains():
            self.backbone.seen.clear()

    @torch.no_grad()
    def forward(self, batch: TrajectoryBatch, chunk: int) -> Tensor:
        """Log-probabilities (T,) of the sampled tokens."""
        with without_lora(self.backbone):
            return token_log_probs(self.backbone, batch, chunk)[0]


def frozen_copy(backbone: Backbone) -> Backbone:
    """A copy in evaluation mode that shares the parameters which are frozen, and holds its own of the others."""
    shared: dict[int, object] = {id(p): p for p in backbone.parameters() if not p.requires_grad}
    if not backbone.encoder_trains():
        shared[id(backbone.encoded)] = backbone.encoded  # features of the one tower that both have
    if not backbone.tower_trains():
        shared[id(backbone.seen)] = backbone.seen
    return copy.deepcopy(backbone, shared).requires_grad_(False).eval()
