"""Weights that are spread over ranks (FSDP2), and how all ranks come to the same collective calls, whatever they do.

The weights are one unit: gathered once for an iteration, rolled out and learned with as they lie, and let go behind the
optimizer step, whose state is spread like them. Layers are not gathered one by one: then every pass would wait for all
ranks, and ranks whose trajectories differ in number or length would wait forever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from modules.errors import PolicyError


def shard(module: L.LightningModule, strategy: Strategy) -> None:
    """Spread the weights of a module over the ranks, if the strategy is `ModelParallelStrategy`; once.

    Raises:
        PolicyError: it is one that was not tried, or cannot do without a layout of its own.
    """
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy):
        raise PolicyError(
            "Expected `trainer.strategy` to be auto, ddp or ModelParallelStrategy, with which this project was run, "
            f"but got {type(strategy).__name__}; docs/distributed.md says how each is given."
        )
    if not isinstance(strategy, ModelParallelStrategy) or isinstance(module, FSDPModule):
        return
    mesh = strategy.device_mesh
    if mesh["tensor_parallel"].size() > 1:
        raise PolicyError(
            "Expected `trainer.strategy.init_args.data_parallel_size` to be the number of all ranks and "
            f"`tensor_parallel_size` to be 1, but got {mesh['data_parallel'].size()} and "
            f"{mesh['tensor_parallel'].size()}."
        )
    if strategy._save_distributed_checkpoint:
        raise PolicyError(
            "Expected `trainer.strategy.init_args.save_distributed_checkpoint` to be false, but got true: a checkpoint "
            "is one file, which `init_from`, `export` and one process read."
        )
    fully_shard(module, mesh=mesh["data_parallel"], reshard_after_forward=False)


def gather(module: torch.nn.Module) -> None:
    """Have the whole weights, until the next optimizer step or `scatter`; all ranks have to ask."""
    if isinstance(module, FSDPModule):
        module.unshard()


def scatter(module: torch.nn.Module) -> None:
    """Keep this rank's share only; nothing is waited for."""
    if isinstance(module, FSDPModule):
        module.reshard()


@contextmanager
def gathered(module: torch.nn.Module) -> Iterator[None]:
    """Have the whole weights for a while; all ranks have to ask."""
    gather(module)
    try:
        yield
    finally:
        scatter(module)


@contextmanager
def without_reduction(module: L.LightningModule) -> Iterator[None]:
    """Gradients add up on this rank, and weights stay gathered: backward passes wait for nobody."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(False)
        module.set_reshard_after_backward(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
            module.set_reshard_after_backward(True)
    else:
        with module.trainer.strategy.block_backward_sync():  # type: ignore[attr-defined]
            yield


def own(tensor: Tensor) -> Tensor:
    """This rank's share, or all of what is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it; all ranks have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
