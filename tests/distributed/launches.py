"""How the command line is told of several processes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

SHARDED = "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy"
STRATEGIES: dict[str, list[str]] = {
    "one": [],
    "ddp": ["--trainer.strategy=ddp", "--trainer.devices=2"],
    "fsdp": [
        SHARDED,
        "--trainer.strategy.data_parallel_size=2",
        "--trainer.strategy.tensor_parallel_size=1",
        "--trainer.strategy.save_distributed_checkpoint=false",
        "--trainer.devices=2",
    ],
}


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """What a checkpoint says the policy is."""
    found: dict[str, Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return found


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference between two policies."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
