"""Features of visuals that are made once: for as long as the visual lives and what makes them stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from modules.trajectory import Visual


class KeptFeatures(WeakKeyDictionary[Visual, Tensor]):
    """What weights that do not train made of visuals.

    All of it is dropped once a weight was written to in place, replaced, or changed its type or device, and where
    autocast is not what it was. What torch does not count (fused optimizers, `.data`, the shares of FSDP2) is not
    noticed: who writes so calls `clear`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._weights: list[Tensor] = []
        self._state: list[object] = []  # of the weights, and of autocast

    def of(
        self, visuals: Sequence[Visual], weights: Sequence[Tensor], make: Callable[[Sequence[Visual]], Iterable[Tensor]]
    ) -> list[Tensor]:
        """The features of each visual; what there is not yet is made, repeats once.

        Pixels that carry gradient are nobody's to keep: their features are made each time.

        Args:
            visuals: n of them.
            weights: that features depend on.
            make: features of some visuals.
        """
        self._drop_unless_made_with(list(weights))
        new = [v for v in dict.fromkeys(visuals) if v not in self]
        live = [v for v in new if v.pixels.requires_grad]
        fresh = dict(zip(live, make(live) if live else [], strict=True))
        still = [v for v in new if v not in fresh]
        if still:
            # copies: a row of what was made together would keep all of it alive
            self.update((v, f.clone()) for v, f in zip(still, make(still), strict=True))
        return [fresh[v] if v in fresh else self[v] for v in visuals]

    def _drop_unless_made_with(self, weights: list[Tensor]) -> None:
        kind = weights[0].device.type if weights else "cpu"
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        # a version counts what is written to a weight; `Module.to` puts other data into it, which does not count
        versions = [(weight._version, weight.dtype, weight.device) for weight in weights]
        state: list[object] = [cast, *versions]
        same = len(weights) == len(self._weights) and all(
            new is old for new, old in zip(weights, self._weights, strict=True)
        )
        if not same or state != self._state:
            self.clear()
        self._weights, self._state = weights, state
