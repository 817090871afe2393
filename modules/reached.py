"""Which parameters a loss depends on, and the same over all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor


def reached(loss: Tensor, parameters: Mapping[str, Tensor]) -> set[str]:
    """The names of the parameters that a backward pass from the loss would come to, whatever gradient it brings them.

    Zeros are a gradient too: that of a LoRA adapter's first matrix is exactly 0 as long as the second one is.

    (Checkpointed passes have to be of ``use_reentrant=False``, as all here are: others hide their parameters.)

    Args:
        loss: of any shape; before anything is added to it that depends on all parameters.
        parameters: leaves, by name.
    """
    waiting = [] if loss.grad_fn is None else [loss.grad_fn]
    seen, leaves = set(waiting), set()
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)  # of `AccumulateGrad` alone
        if leaf is not None:
            leaves.add(id(leaf))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return {name for name, parameter in parameters.items() if id(parameter) in leaves}


def reached_by_any(names: set[str], of: list[str], strategy: Strategy, device: torch.device) -> set[str]:
    """Those of the names ``of``, the same on all ranks, that are among the ``names`` of any rank; one reduction."""
    flags = torch.tensor([float(name in names) for name in of], device=device)
    counts: list[float] = strategy.reduce(flags, reduce_op="sum").tolist()
    return {name for name, count in zip(of, counts, strict=True) if count}
