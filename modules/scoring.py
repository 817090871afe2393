"""Log-probabilities of packed trajectories under a backbone: the learner's and the reference's pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modules.backbones.base import Backbone
from modules.functional.linear_head import Terms, linear_log_probs, linear_loss
from modules.functional.losses import in_chunks, selected_log_probs
from modules.functional.packing import pack
from modules.trajectory import Trajectory, TrajectoryBatch

AT_ONCE = 1 << 25  # logits that are computed the ordinary way; of more, `linear_log_probs` keeps a chunk at a time


def collate(backbone: Backbone, trajectories: Sequence[Trajectory], row_tokens: int = 2048) -> TrajectoryBatch:
    """Pack trajectories with the positions that this backbone gives them, on its device; see `pack`."""
    positions = [backbone.positions(torch.cat([t.prompt_ids, t.completion_ids]), t.visuals, 0)[0] for t in trajectories]
    batch = pack(
        trajectories,
        positions,
        image_token_id=backbone.image_token_id,
        pad_id=backbone.tokenizer.pad_token_id or 0,  # padding is masked, any id does
        row_tokens=row_tokens,
    )
    return batch.to(backbone.device)


def predicting(backbone: Backbone, batch: TrajectoryBatch) -> Tensor:
    """(T, D) hidden states that the sampled tokens are predicted from."""
    return backbone.hidden_states(batch).flatten(0, 1)[batch.predictors]


def token_log_probs(
    backbone: Backbone,
    batch: TrajectoryBatch,
    chunk: int,
    entropy_gradient: bool = False,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (T,) of the sampled tokens and entropies (T,) of the distributions they were drawn from.

    Logits are computed at sampled positions only, ``chunk`` tokens at a time. Entropies carry gradient if asked to.
    ``hidden`` are `predicting` states, if they are known already.
    """
    if hidden is None:
        hidden = predicting(backbone, batch)
    layer, size = large_head(backbone, hidden, chunk)
    if layer is not None:
        log_probs, entropy = linear_log_probs(
            hidden, layer.weight, layer.bias, batch.targets, batch.temperature, backbone.banned, size
        )
        return log_probs, entropy if entropy_gradient else entropy.detach()

    def select(h: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return selected_log_probs(backbone.head(h), targets, batch.temperature, backbone.banned, entropy_gradient)

    log_probs, entropy = in_chunks(select, hidden, batch.targets, size=chunk)
    return log_probs, entropy


def token_loss(
    backbone: Backbone,
    batch: TrajectoryBatch,
    chunk: int,
    terms: Terms,
    entropy_gradient: bool = False,
    hidden: Tensor | None = None,
    whole: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """A loss over sampled tokens, their log-probabilities (T,) and entropies (T,), without gradient.

    ``terms(log_probs, entropy, own)`` is what the tokens ``own``, a slice of T, add to the loss. It is called once for
    all, or, where there are many logits, for a chunk at a time (see `linear_loss`); with ``whole``, once in any case,
    for a loss that is no sum over tokens. Others: see `token_log_probs`.
    """
    if hidden is None:
        hidden = predicting(backbone, batch)
    layer, size = large_head(backbone, hidden, chunk)
    if layer is not None and not whole:
        return linear_loss(
            hidden, layer.weight, layer.bias, batch.targets, batch.temperature, backbone.banned, size, terms
        )
    log_probs, entropy = token_log_probs(backbone, batch, chunk, entropy_gradient, hidden)
    return terms(log_probs, entropy, slice(0, len(log_probs))), log_probs.detach(), entropy.detach()


def large_head(backbone: Backbone, hidden: Tensor, chunk: int) -> tuple[nn.Linear | None, int]:
    """The output layer, if (T, D) hidden states have too many logits to hold at once, and tokens a chunk then."""
    size = max(AT_ONCE // len(backbone.banned), 1)
    large = len(hidden) > size and not torch.is_autocast_enabled(hidden.device.type)
    return backbone.linear_head if large else None, min(chunk, size)
