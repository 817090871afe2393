"""What a rollout is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from modules.trajectory import Sample, Turn


@dataclass(frozen=True)
class Decoding:
    """How trajectories are sampled.

    Args:
        temperature: 0 is greedy.
        top_p: the smallest set of tokens with this much probability is sampled from.
        max_turns: how many times the policy may write (VLM-R3's published code: 8, 12 in one evaluation).
        max_turn_tokens: new tokens a turn (there: 2,048).
        crops: what is shown behind a valid box: the crop, or another visual of its size (an audit; see
            `modules.counterfactual.replace_crops`).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_turns: int = 8
    max_turn_tokens: int = 2048
    crops: Literal["zoom", "blank", "random", "swap"] = "zoom"

    def __post_init__(self) -> None:
        for name, least in (("temperature", 0), ("max_turns", 1), ("max_turn_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"Expected `{name}` to be at least {least}, but got {getattr(self, name)}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Expected `top_p` to be in (0, 1], but got {self.top_p}.")


@dataclass(frozen=True, eq=False)
class Request:
    """One trajectory to be rolled out."""

    sample: Sample
    seed: int


# Told after every token of a trajectory in flight: its request, the turns that are closed, and what is being written.
Listener = Callable[[Request, Sequence[Turn], str], None]
