"""What the functional core asks of its tensors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int | str, ...], kind: Literal["float", "long", "bool"]
) -> None:
    """Raise ValueError unless ``tensor`` has that type and shape; a letter stands for any size."""
    of_kind = tensor.is_floating_point() if kind == "float" else tensor.dtype == getattr(torch, kind)
    of_shape = tensor.dim() == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not (of_kind and of_shape):
        wanted = ", ".join(map(str, shape))
        raise ValueError(
            f"Expected `{name}` to be a {kind} tensor of shape ({wanted}) but got {tensor.dtype} "
            f"of shape {tuple(tensor.shape)}"
        )
