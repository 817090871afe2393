"""Rollouts: the policy writes, the environment shows crops, until an answer.

Token in, token out: the ids that are sampled are the ids that are trained. No token is computed
twice: a prompt is prefilled once per group, every crop is encoded once and appended to the cache.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.backbones.base import Backbone
from modules.counterfactual import images_of
from modules.decoding import Decoding, Listener, Request
from modules.flight import Flight
from modules.prefill import Prompts
from modules.trajectory import Sample, Trajectory

__all__ = ["Decoding", "Flight", "GroupSampler", "Listener", "LocalEngine", "Request", "RolloutEngine"]
logger = logging.getLogger(__name__)

Watcher = Callable[[int, int, float], None]  # trajectories that have ended, of how many, seconds since the first began


class RolloutEngine(ABC):
    """Turns requests into trajectories."""

    @abstractmethod
    def rollout(self, backbone: Backbone, requests: Sequence[Request], decoding: Decoding) -> list[Trajectory]:
        """One trajectory a request, in order. Equal neighbouring samples share their prompt's computation."""


class LocalEngine(RolloutEngine):
    """Rolls out in this process with the policy's own weights.

    The place of a trajectory that has ended goes to the next request. What runs out of memory goes on with half as many
    at once: in all rollouts of this decoding from then on, or to the end of this one if it was of fewer (a few unusual
    ones) than others before. Those that had ended stay, the rest of their group begins again behind the same prompt: a
    trajectory depends on its own seed alone, so that it is the same in any company.

    Args:
        max_batch: trajectories in flight at once.
    """

    def __init__(self, max_batch: int = 256) -> None:
        if max_batch < 1:
            raise ValueError(f"Expected `max_batch` to be at least 1, but got {max_batch}.")
        self.max_batch = max_batch
        # by decoding, for short answers of a validation say nothing about the memory of training
        self.fits: dict[Decoding, int] = {}  # so many may fly at once, where more have run out of memory
        self.most: dict[Decoding, int] = {}  # requests of a rollout so far
        self.halved = 0  # times that memory has run out
        self._started = 0.0
        self.listener: Listener | None = None  # slow: it is told after every token
        self.watcher: Watcher | None = None  # told at every trajectory that ends

    @torch.no_grad()
    def rollout(self, backbone: Backbone, requests: Sequence[Request], decoding: Decoding) -> list[Trajectory]:
        """See `RolloutEngine.rollout`."""
        was_training = backbone.training
        backbone.eval()
        try:
            found: dict[int, Trajectory] = {}
            others = images_of(request.sample for request in requests)
            prompts, fits = Prompts(backbone), self.fits.get(decoding, self.max_batch)
            self.most[decoding] = max(self.most.get(decoding, 0), len(requests))
            self._started = time.monotonic()
            while len(found) < len(requests):
                fits = self._fly(backbone, requests, decoding, others, found, prompts, fits)
            return [found[number] for number in range(len(requests))]
        finally:
            backbone.train(was_training)

    def _fly(
        self,
        backbone: Backbone,
        requests: Sequence[Request],
        decoding: Decoding,
        others: Sequence[Tensor],
        found: dict[int, Trajectory],
        prompts: Prompts,
        fits: int,
    ) -> int:
        """Add the trajectories that are not found yet, up to where memory runs out; returns how many fit then."""
        left = [number for number in range(len(requests)) if number not in found]
        places = min(fits, len(left))
        asked = [requests[number] for number in left]
        try:
            for number, trajectory in Flight(backbone, asked, decoding, others, self.listener, places, prompts).run():
                found[left[number]] = trajectory
                if self.watcher is not None:
                    self.watcher(len(found), len(requests), time.monotonic() - self._started)
            return fits
        except torch.OutOfMemoryError:
            if places == 1:
                raise
        # behind the handler: within it, the traceback holds on to what the flight had in memory; a name would, too
        fits = places // 2
        how_long = "in this rollout"
        if places == min(self.fits.get(decoding, self.max_batch), self.most[decoding]):
            self.fits[decoding], how_long = fits, "from now on"
        self.halved += 1
        logger.warning("A rollout of %d trajectories ran out of memory; %s %d at once.", places, how_long, fits)
        prompts.keep(requests[number].sample for number in found)  # ended trajectories hold on to these anyway
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return fits


@dataclass(frozen=True)
class GroupSampler:
    """Repeats every question G times and gives each repeat a seed of its own.

    Args:
        size: G (VLM-R3: 5).
    """

    size: int = 5

    def requests(self, samples: Sequence[Sample], seed: int) -> list[Request]:
        """G requests a sample, neighbours; the n-th sample's g-th has a seed that depends on (seed, n, g) only."""
        return [
            Request(sample, seed * 1_000_003 + n * self.size + g)
            for n, sample in enumerate(samples)
            for g in range(self.size)
        ]
