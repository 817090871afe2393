"""Rollouts: the policy writes, the environment shows crops, until an answer.

Token in, token out: the ids that are sampled are the ids that are trained. No token is computed
twice: a prompt is prefilled once per group, every crop is encoded once and appended to the cache.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modules.backbones.base import Backbone, visual_blocks
from modules.backbones.cache import RaggedCache
from modules.counterfactual import images_of, replace_crops
from modules.environment import REFUSALS, Done, Look, Refuse, respond
from modules.functional.grammar import last_answer
from modules.functional.sampling import UniformStream, sample_tokens
from modules.prompts import Part, Prompt, make_prompts
from modules.trajectory import Region, Sample, StopReason, Trajectory, Turn, Visual

logger = logging.getLogger(__name__)


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


class RolloutEngine(ABC):
    """Turns requests into trajectories."""

    @abstractmethod
    def rollout(self, backbone: Backbone, requests: Sequence[Request], decoding: Decoding) -> list[Trajectory]:
        """One trajectory a request, in order. Equal neighbouring samples share their prompt's computation."""


class LocalEngine(RolloutEngine):
    """Rolls out in this process with the policy's own weights.

    A wave that runs out of memory is flown again in halves, and so are those after it: a trajectory depends on its own
    seed alone, so that it is the same in any company.

    Args:
        max_batch: trajectories in flight at once.
    """

    def __init__(self, max_batch: int = 256) -> None:
        if max_batch < 1:
            raise ValueError(f"Expected `max_batch` to be at least 1, but got {max_batch}.")
        self.max_batch = max_batch
        self.fits = max_batch  # so many at once have not run out of memory
        self.halved = 0  # times that a wave has
        self.listener: Listener | None = None  # slow: it is told after every token

    @torch.no_grad()
    def rollout(self, backbone: Backbone, requests: Sequence[Request], decoding: Decoding) -> list[Trajectory]:
        """See `RolloutEngine.rollout`."""
        was_training = backbone.training
        backbone.eval()
        try:
            trajectories: list[Trajectory] = []
            others = images_of(request.sample for request in requests)
            while len(trajectories) < len(requests):
                wave = waves(requests[len(trajectories) :], self.fits)[0]
                trajectories += self._fly(backbone, wave, decoding, others)
            return trajectories
        finally:
            backbone.train(was_training)

    def _fly(
        self, backbone: Backbone, wave: Sequence[Request], decoding: Decoding, others: Sequence[Tensor]
    ) -> list[Trajectory]:
        """The trajectories of a wave; none where they do not fit into memory, half as many then come next."""
        try:
            return Flight(backbone, wave, decoding, others, self.listener).run()
        except torch.OutOfMemoryError:
            if len(wave) == 1:
                raise
        # behind the handler: within it, the traceback holds on to what the flight had in memory
        self.fits = len(wave) // 2
        self.halved += 1
        logger.warning("A rollout of %d trajectories ran out of memory; from now on %d at once.", len(wave), self.fits)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return []


@dataclass(eq=False)
class Row:
    """What is known of a trajectory in flight besides its tokens."""

    request: Request
    prompt: Tensor
    visuals: list[Visual]  # the prompt's, then its crops
    uniforms: UniformStream
    next_position: int
    turns: list[Turn] = field(default_factory=list)
    turn_start: int = 0
    stop: StopReason | None = None


class Flight:
    """A batch of trajectories that advance together, whatever their turn.

    ``active[b]`` is the trajectory in row b of the cache; finished ones leave it.
    """

    def __init__(
        self,
        backbone: Backbone,
        requests: Sequence[Request],
        decoding: Decoding,
        others: Sequence[Tensor] = (),
        listener: Listener | None = None,
    ) -> None:
        self.backbone, self.decoding, self.others, self.listener = backbone, decoding, others, listener
        self.device = backbone.device
        self.cache = RaggedCache()
        self.rows, self.hidden = self._prefill(requests)
        n = len(requests)
        self.active = torch.arange(n, device=self.device)
        self.lengths = torch.zeros(n, dtype=torch.long, device=self.device)  # of the completions
        self.tokens = torch.zeros(n, 64, dtype=torch.long, device=self.device)
        self.sampled = torch.zeros(n, 64, dtype=torch.bool, device=self.device)
        self.log_probs = torch.zeros(n, 64, dtype=torch.float32, device=self.device)

    def run(self) -> list[Trajectory]:
        """Write until every trajectory has ended."""
        while len(self.active):
            ids = self._sample()
            chunks = self._react(ids)
            if self.listener is not None:
                for k in self.active.tolist():
                    row = self.rows[k]
                    self.listener(row.request, row.turns, "" if row.stop else self._turn_text(k))
            staying = torch.tensor([self.rows[k].stop is None for k in self.active.tolist()], device=self.device)
            if not bool(staying.all()):
                self.active, ids = self.active[staying], ids[staying]
                self.cache.select(staying.nonzero()[:, 0])
            if len(self.active):
                self.advance(ids, chunks)
        return [self._trajectory(k) for k in range(len(self.rows))]

    def _prefill(self, requests: Sequence[Request]) -> tuple[list[Row], Tensor]:
        """Each distinct prompt once; its cache and last hidden state repeated for its trajectories."""
        samples = [requests[0].sample]
        repeats = [0]
        for request in requests:
            if request.sample is not samples[-1]:
                samples.append(request.sample)
                repeats.append(0)
            repeats[-1] += 1
        prompts = make_prompts(self.backbone, samples)
        parts, starts = self._prefill_examples(prompts)
        placed = [self.backbone.positions(p.ids, p.visuals, start) for p, start in zip(parts, starts, strict=True)]
        hidden = self._extend([p.ids for p in parts], [p for p, _ in placed], [p.visuals for p in parts])
        copies = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(repeats))
        self.cache.select(copies.to(self.device))
        rows = [
            Row(request, prompts[k].ids, list(prompts[k].visuals), UniformStream(request.seed), placed[k][1])
            for request, k in zip(requests, copies.tolist(), strict=True)
        ]
        return rows, hidden[copies.to(self.device)]

    def _prefill_examples(self, prompts: Sequence[Prompt]) -> tuple[list[Part], list[int]]:
        """Each distinct set of examples once, in a row of the cache for each prompt.

        Returns:
            what is left of each prompt, and where it begins; all of it where some have no examples.
        """
        solved = [prompt.solved for prompt in prompts if prompt.solved is not None]
        if len(solved) < len(prompts):
            return [Part(prompt.ids, prompt.visuals) for prompt in prompts], [0] * len(prompts)
        distinct = list(dict.fromkeys(solved))
        placed = [self.backbone.positions(part.ids, part.visuals, 0) for part in distinct]
        self._extend([part.ids for part in distinct], [p for p, _ in placed], [part.visuals for part in distinct])
        rows = [distinct.index(part) for part in solved]
        self.cache.select(torch.tensor(rows, device=self.device))
        return [prompt.asked for prompt in prompts], [placed[k][1] for k in rows]

    def _extend(
        self, chunks: Sequence[Tensor], positions: Sequence[Tensor], visuals: Sequence[Sequence[Visual]]
    ) -> Tensor:
        """Append a chunk of ids (n_b,) to each row of the cache; returns (B, D), the last hidden state of each."""
        counts = torch.tensor([len(chunk) for chunk in chunks], device=self.device)
        ids = pad_sequence(list(chunks), batch_first=True).to(self.device)
        places = pad_sequence([p.T for p in positions], batch_first=True).permute(2, 0, 1).to(self.device)
        real = torch.arange(ids.shape[1], device=self.device) < counts[:, None]
        is_visual = (ids == self.backbone.image_token_id) & real
        embeddings = self.backbone.embed(ids)
        flat = list({id(v): v for row in visuals for v in row}.values())
        if flat:
            features = dict(zip(map(id, flat), self.backbone.features(flat), strict=True))
            embeddings = self.backbone.merge(embeddings, is_visual, [features[id(v)] for row in visuals for v in row])
        blocks = visual_blocks(is_visual) if self.backbone.bidirectional_visuals else None
        return self._forward(embeddings, places, counts, blocks)

    def _forward(self, embeddings: Tensor, positions: Tensor, counts: Tensor, blocks: Tensor | None = None) -> Tensor:
        mask = self.cache.prepare(counts, embeddings.shape[1], blocks)
        hidden = self.backbone(embeddings, positions, mask, self.cache)
        self.cache.commit()
        return hidden[torch.arange(len(counts), device=self.device), counts - 1]

    def _sample(self) -> Tensor:
        """Sample one token for each active row and record it; returns ids (B,)."""
        logits = self.backbone.head(self.hidden).float()
        uniforms = torch.tensor([self.rows[k].uniforms.next() for k in self.active.tolist()], dtype=torch.float64)
        ids, log_probs = sample_tokens(
            logits, uniforms.to(self.device), self.decoding.temperature, self.decoding.top_p, self.backbone.banned
        )
        at = self.lengths[self.active]
        self._reserve(int(at.max()) + 1)
        self.tokens[self.active, at] = ids
        self.sampled[self.active, at] = True
        self.log_probs[self.active, at] = log_probs
        self.lengths[self.active] += 1
        return ids

    def _reserve(self, length: int) -> None:
        while self.tokens.shape[1] < length:
            for name in ("tokens", "sampled", "log_probs"):
                buffer = getattr(self, name)
                setattr(self, name, torch.cat([buffer, torch.zeros_like(buffer)], 1))

    def _react(self, ids: Tensor) -> dict[int, tuple[Tensor, list[Visual]]]:
        """Let the environment answer the rows whose turn may have ended.

        Returns:
            For each row that goes on with more than its own token: what is appended behind it.
        """
        room = self.backbone.context_length - torch.tensor([len(self.rows[k].prompt) for k in self.active.tolist()])
        written = self.lengths[self.active] - torch.tensor(
            [self.rows[k].turn_start for k in self.active.tolist()], device=self.device
        )
        full = (written >= self.decoding.max_turn_tokens) | (self.lengths[self.active] >= room.to(self.device))
        looks: dict[int, Region] = {}
        refusals: dict[int, str] = {}
        for b in (self.backbone.ending_tokens[ids] | full).nonzero()[:, 0].tolist():
            k = int(self.active[b])
            row = self.rows[k]
            text = self._turn_text(k)
            shown = row.request.sample.prompt_visuals  # of the examples first, then its own images
            seen = tuple(row.visuals[shown - len(row.request.sample.images) : shown])
            reply = respond(text, row.request.sample, seen, self.backbone.box_space, self.backbone.zooms)
            if isinstance(reply, Done):
                self._end(k, text, StopReason.ANSWER)
            elif int(ids[b]) in self.backbone.eos_ids:
                self._end(k, text, StopReason.EOS)
            elif isinstance(reply, Look | Refuse) and len(row.turns) + 1 >= self.decoding.max_turns:
                self._end(k, text, StopReason.MAX_TURNS, reply)
            elif isinstance(reply, Look):
                looks[k] = reply.region
            elif isinstance(reply, Refuse):
                refusals[k] = reply.fault
            elif bool(full[b]):
                fits = int(self.lengths[k]) < int(room[b])
                self._end(k, text, StopReason.TURN_LENGTH if fits else StopReason.CONTEXT)
        return self._show(looks, refusals)

    def _show(self, looks: dict[int, Region], refusals: dict[int, str]) -> dict[int, tuple[Tensor, list[Visual]]]:
        """Cut all crops of this step together; refuse in text what is invalid or does not fit."""
        images = [self.rows[k].request.sample.images[region.image] for k, region in looks.items()]
        crops = self.backbone.look(images, list(looks.values()))
        if self.decoding.crops != "zoom":
            seeds = [self.rows[k].request.seed * 1_000_003 + len(self.rows[k].turns) for k in looks]
            regions = list(looks.values())
            crops = replace_crops(self.backbone, self.decoding.crops, crops, images, regions, self.others, seeds)
        chunks: dict[int, tuple[Tensor, list[Visual]]] = {}
        for (k, region), crop in zip(looks.items(), crops, strict=True):
            ids = self.backbone.visual_ids(*crop.pixels.shape[-2:])
            if not self._fits(k, len(ids)):
                refusals[k] = "context"
                continue
            self._turn(k, Turn(self._turn_text(k), 0, 0, region=region, crop=crop))
            self.rows[k].visuals.append(crop)
            chunks[k] = (ids, [crop])
        for k, fault in refusals.items():
            ids = self.backbone.tokenize(REFUSALS[fault])
            if not self._fits(k, len(ids)):
                self._end(k, self._turn_text(k), StopReason.CONTEXT, Refuse(fault))
                continue
            self._turn(k, Turn(self._turn_text(k), 0, 0, fault=fault))
            chunks[k] = (ids, [])
        for k, (ids, _) in chunks.items():
            start, stop = int(self.lengths[k]), int(self.lengths[k]) + len(ids)
            self._reserve(stop)
            self.tokens[k, start:stop] = ids.to(self.device)
            self.lengths[k] = stop
            self.rows[k].turn_start = stop
        return chunks

    def _fits(self, k: int, extra: int) -> bool:
        """Whether ``extra`` tokens and one more to write fit into the context."""
        return len(self.rows[k].prompt) + int(self.lengths[k]) + extra < self.backbone.context_length

    def advance(self, ids: Tensor, chunks: dict[int, tuple[Tensor, list[Visual]]]) -> None:
        """Append to every active row its token, and what the environment put behind it."""
        active = self.active.tolist()
        rows = [self.rows[k] for k in active]
        if not chunks:
            positions = torch.tensor([row.next_position for row in rows], device=self.device)
            for row in rows:
                row.next_position += 1
            embeddings = self.backbone.embed(ids[:, None])
            axes = positions[None, :, None].expand(self.backbone.position_axes, -1, 1)
            self.hidden = self._forward(embeddings, axes, torch.ones_like(ids))
            return
        nothing = torch.zeros(0, dtype=torch.long)
        own = ids.cpu()
        parts, places, visuals = [], [], []
        for b, (k, row) in enumerate(zip(active, rows, strict=True)):
            extra, shown = chunks.get(k, (nothing, []))
            chunk = torch.cat([own[b : b + 1], extra])
            place, row.next_position = self.backbone.positions(chunk, shown, row.next_position)
            parts.append(chunk)
            places.append(place)
            visuals.append(shown)
        self.hidden = self._extend(parts, places, visuals)

    def _turn_text(self, k: int) -> str:
        return self.backbone.detokenize(self.tokens[k, self.rows[k].turn_start : int(self.lengths[k])])

    def _turn(self, k: int, turn: Turn) -> None:
        row = self.rows[k]
        span = (row.turn_start, int(self.lengths[k]))
        row.turns.append(Turn(turn.text, *span, turn.region, turn.fault, turn.crop))

    def _end(self, k: int, text: str, stop: StopReason, reply: Look | Refuse | None = None) -> None:
        """Close a trajectory; a last request that is not fulfilled keeps its region or fault, without a crop."""
        region = reply.region if isinstance(reply, Look) else None
        fault = reply.fault if isinstance(reply, Refuse) else None
        self._turn(k, Turn(text, 0, 0, region=region, fault=fault))
        self.rows[k].stop = stop

    def _trajectory(self, k: int) -> Trajectory:
        row, length = self.rows[k], int(self.lengths[k])
        assert row.stop is not None
        text = "".join(turn.text for turn in row.turns)
        return Trajectory(
            sample=row.request.sample,
            prompt_ids=row.prompt,
            completion_ids=self.tokens[k, :length].cpu(),
            sampled=self.sampled[k, :length].cpu(),
            log_probs=self.log_probs[k, :length].cpu(),
            coordinates=torch.full((length,), torch.nan, dtype=torch.float32),
            visuals=tuple(row.visuals),
            turns=tuple(row.turns),
            stop=row.stop,
            answer=last_answer(text),
            text=text,
            temperature=self.decoding.temperature or 1.0,
        )


def waves(requests: Sequence[Request], size: int) -> list[Sequence[Request]]:
    """Cut requests into runs of at most ``size``, between questions wherever one question's requests fit."""
    runs: list[Sequence[Request]] = []
    start = 0
    while start < len(requests):
        stop = min(start + size, len(requests))
        cut = stop
        while start < cut < len(requests) and requests[cut].sample is requests[cut - 1].sample:
            cut -= 1
        stop = cut if cut > start else stop
        runs.append(requests[start:stop])
        start = stop
    return runs


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
