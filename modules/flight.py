"""Trajectories in flight: they write, the environment shows them crops, until each has ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modules.backbones.base import Backbone
from modules.backbones.cache import RaggedCache
from modules.counterfactual import replace_crops
from modules.decoding import Decoding, Listener, Request
from modules.environment import REFUSALS, Done, Look, Refuse, respond
from modules.functional.grammar import last_answer
from modules.functional.sampling import UniformStream, sample_tokens
from modules.prefill import Chunk, Prefill, Prefix, Prompts, buckets, extend, forward
from modules.trajectory import Region, StopReason, Trajectory, Turn, Visual

REFILL = 8  # an eighth of the places has to be free before the next trajectories start

Shown = tuple[Tensor, list[Visual]]  # what the environment puts behind a token: (n,) ids, and the visuals in them


@dataclass(eq=False)
class Row:
    """A trajectory in flight."""

    number: int  # of its request
    request: Request
    prompt: Tensor  # (P,) long
    visuals: list[Visual]  # the prompt's, then its crops
    uniforms: UniformStream
    next_position: int
    slot: int  # which row of the cache is its own
    room: int  # tokens of completion that the context has room for
    ids: list[int] = field(default_factory=list)  # of the completion
    sampled: list[bool] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    turn_start: int = 0
    stop: StopReason | None = None

    def add(self, ids: Sequence[int], sampled: bool, log_probs: Sequence[float]) -> None:
        """Append to the completion."""
        self.ids += ids
        self.sampled += [sampled] * len(ids)
        self.log_probs += log_probs

    def fits(self, extra: int) -> bool:
        """Whether ``extra`` tokens and one more to write fit into the context."""
        return len(self.ids) + extra < self.room

    def close(self, turn: Turn) -> None:
        """End the turn that is being written; ``turn`` says all of it but its place."""
        span = (self.turn_start, len(self.ids))
        self.turns.append(Turn(turn.text, *span, turn.region, turn.fault, turn.crop))

    def end(self, text: str, stop: StopReason, reply: Look | Refuse | None = None) -> None:
        """End the trajectory; a last request that is not fulfilled keeps its region or fault, without a crop."""
        region = reply.region if isinstance(reply, Look) else None
        fault = reply.fault if isinstance(reply, Refuse) else None
        self.close(Turn(text, 0, 0, region=region, fault=fault))
        self.stop = stop

    def trajectory(self, temperature: float) -> Trajectory:
        """What came of it."""
        assert self.stop is not None
        text = "".join(turn.text for turn in self.turns)
        return Trajectory(
            sample=self.request.sample,
            prompt_ids=self.prompt,
            completion_ids=torch.tensor(self.ids),
            sampled=torch.tensor(self.sampled),
            log_probs=torch.tensor(self.log_probs, dtype=torch.float32),
            coordinates=torch.full((len(self.ids),), torch.nan, dtype=torch.float32),
            visuals=tuple(self.visuals),
            turns=tuple(self.turns),
            stop=self.stop,
            answer=last_answer(text),
            text=text,
            temperature=temperature or 1.0,
        )


class Flight:
    """Trajectories that advance together, whatever their turn; the place of one that has ended goes to the next.

    ``rows`` are those in flight, in the order of their requests, ``hidden`` (B, D) what each of them has come to. Their
    rows in the cache are the first B, in another order: what leaves is replaced by what lies last.

    Args:
        backbone: the policy.
        requests: what to roll out, at least one; equal neighbouring samples share their prompt's computation.
        decoding: how.
        others: images to show in place of crops, see `modules.counterfactual.replace_crops`.
        listener: slow: it is told after every token.
        places: trajectories in flight at once; None: all.
        prompts: those that exist already, and where those that are made are kept.
    """

    def __init__(
        self,
        backbone: Backbone,
        requests: Sequence[Request],
        decoding: Decoding,
        others: Sequence[Tensor] = (),
        listener: Listener | None = None,
        places: int | None = None,
        prompts: Prompts | None = None,
    ) -> None:
        self.backbone, self.decoding, self.others, self.listener = backbone, decoding, others, listener
        self.device = backbone.device
        self.places = len(requests) if places is None else places
        self.ending = frozenset(backbone.ending_tokens.nonzero()[:, 0].tolist())
        samples = [requests[0].sample]
        self.waiting: deque[tuple[int, Request, int]] = deque()  # with the numbers of request and prompt
        for number, request in enumerate(requests):
            if request.sample is not samples[-1]:
                samples.append(request.sample)
            self.waiting.append((number, request, len(samples) - 1))
        self.samples = samples  # by number of the prompt
        self.prompts = Prompts(backbone) if prompts is None else prompts
        self.prefill = Prefill(backbone)
        self.prefixes: dict[int, Prefix] = {}  # of the prompt that some of its trajectories have not started from
        self.cache = RaggedCache()
        self.rows: list[Row] = []
        self.hidden = torch.zeros(0, 0, device=self.device)
        self.slots = torch.zeros(0, dtype=torch.long, device=self.device)  # (B,) of the rows
        self._board()

    def run(self) -> Iterator[tuple[int, Trajectory]]:
        """Write until every trajectory has ended.

        Yields:
            the number of a request and its trajectory, as they end: before anything further is computed.
        """
        while self.rows:
            ids = self._sample()
            shown = self._react()
            if self.listener is not None:
                for row in self.rows:
                    self.listener(row.request, row.turns, "" if row.stop else self._turn_text(row))
            ended = [row for row in self.rows if row.stop is not None]
            if ended:
                ids = self._leave(ids)
            for row in ended:  # here: what follows may run out of memory
                yield row.number, row.trajectory(self.decoding.temperature)
            if self.rows:
                self.advance(ids, shown)
            free = self.places - len(self.rows)
            if self.waiting and (not self.rows or free * REFILL >= self.places):
                self._board()

    def _board(self) -> None:
        """Start as many trajectories as there are places; a prompt is computed once for all that start from it."""
        count = min(self.places - len(self.rows), len(self.waiting))
        starting = [self.waiting.popleft() for _ in range(count)]
        needed = list(dict.fromkeys(prompt for *_, prompt in starting))
        prompts = dict(zip(needed, self.prompts.make([self.samples[prompt] for prompt in needed]), strict=True))
        new = [prompt for prompt in needed if prompt not in self.prefixes]
        waiting = {request.sample for _, request, _ in self.waiting}
        prefixes = dict(self.prefixes)
        if new:
            computed = self.prefill.compute([prompts[prompt] for prompt in new], self.prompts.made(waiting))
            prefixes |= zip(new, computed, strict=True)
        last = needed[-1]
        later = bool(self.waiting) and self.waiting[0][-1] == last
        self.prefixes = {last: prefixes[last] if last in self.prefixes else prefixes[last].apart()} if later else {}

        start = len(self.rows)
        parts: dict[RaggedCache, list[int]] = {}  # those that start from rows of one cache
        for k, (*_, prompt) in enumerate(starting):
            parts.setdefault(prefixes[prompt].cache, []).append(k)
        slots = {k: start + slot for slot, k in enumerate(k for members in parts.values() for k in members)}
        taken = [
            (cache, torch.tensor([prefixes[starting[k][-1]].row for k in members], device=self.device))
            for cache, members in parts.items()
        ]
        self.cache.append(taken, release=not later)
        for k, (number, request, prompt) in enumerate(starting):
            told, position = prompts[prompt], prefixes[prompt].position
            stream, room = UniformStream(request.seed), self.backbone.context_length - len(told.ids)
            self.rows.append(Row(number, request, told.ids, list(told.visuals), stream, position, slots[k], room))
        hidden = torch.stack([prefixes[prompt].hidden for *_, prompt in starting])
        self.hidden = torch.cat([self.hidden, hidden]) if start else hidden
        self.prompts.keep(waiting | {row.request.sample for row in self.rows})
        self._arrange()

    def _arrange(self) -> None:
        """Note which row lies where in the cache."""
        self.slots = torch.tensor([row.slot for row in self.rows], dtype=torch.long, device=self.device)
        self.by_slot = sorted(range(len(self.rows)), key=lambda b: self.rows[b].slot)
        self.lying = torch.tensor(self.by_slot, dtype=torch.long, device=self.device)  # (B,) the same, for every token

    def _leave(self, ids: Tensor) -> Tensor:
        """Take the trajectories that have ended out; returns the (B',) ids of those that stay."""
        staying = [b for b, row in enumerate(self.rows) if row.stop is None]
        self.rows = [self.rows[b] for b in staying]
        count = len(staying)
        order = list(range(count))  # for each row of the cache, where it has been
        holes = iter(set(order) - {row.slot for row in self.rows})
        for row in self.rows:
            if row.slot >= count:
                hole = next(holes)
                order[hole], row.slot = row.slot, hole
        self.cache.select(torch.tensor(order, dtype=torch.long, device=self.device))
        self._arrange()
        kept = torch.tensor(staying, dtype=torch.long, device=self.device)
        self.hidden = self.hidden[kept]
        return ids[kept]

    def _sample(self) -> Tensor:
        """Sample one token for each row and record it; returns ids (B,)."""
        logits = self.backbone.head(self.hidden).float()
        uniforms = torch.tensor([row.uniforms.next() for row in self.rows], dtype=torch.float64)
        ids, log_probs = sample_tokens(
            logits, uniforms.to(self.device), self.decoding.temperature, self.decoding.top_p, self.backbone.banned
        )
        for row, token, log_prob in zip(self.rows, ids.tolist(), log_probs.tolist(), strict=True):
            row.add([token], True, [log_prob])
        return ids

    def _react(self) -> dict[int, Shown]:
        """Let the environment answer the rows whose turn may have ended.

        Returns:
            By number of the request, for each row that goes on with more than its own token: what follows it.
        """
        looks: dict[Row, tuple[str, Region]] = {}  # what was written, and asked for
        refusals: dict[Row, tuple[str, str]] = {}  # likewise, and what is wrong with it
        for row in self.rows:
            fits = row.fits(0)
            full = len(row.ids) - row.turn_start >= self.decoding.max_turn_tokens or not fits
            if not full and row.ids[-1] not in self.ending:
                continue
            text = self._turn_text(row)
            sample = row.request.sample
            images = sample.prompt_visuals  # of the examples first, then its own
            seen = tuple(row.visuals[images - len(sample.images) : images])
            reply = respond(text, sample, seen, self.backbone.box_space, self.backbone.zooms)
            if isinstance(reply, Done):
                row.end(text, StopReason.ANSWER)
            elif row.ids[-1] in self.backbone.eos_ids:
                row.end(text, StopReason.EOS)
            elif isinstance(reply, Look | Refuse) and len(row.turns) + 1 >= self.decoding.max_turns:
                row.end(text, StopReason.MAX_TURNS, reply)
            elif isinstance(reply, Look):
                looks[row] = text, reply.region
            elif isinstance(reply, Refuse):
                refusals[row] = text, reply.fault
            elif full:
                row.end(text, StopReason.TURN_LENGTH if fits else StopReason.CONTEXT)
        return self._show(looks, refusals)

    def _show(self, looks: dict[Row, tuple[str, Region]], refusals: dict[Row, tuple[str, str]]) -> dict[int, Shown]:
        """Cut all crops of this step together; refuse in text what is invalid or does not fit."""
        regions = [region for _, region in looks.values()]
        images = [row.request.sample.images[region.image] for row, region in zip(looks, regions, strict=True)]
        crops = self.backbone.look(images, regions)
        if self.decoding.crops != "zoom":
            seeds = [row.request.seed * 1_000_003 + len(row.turns) for row in looks]
            crops = replace_crops(self.backbone, self.decoding.crops, crops, images, regions, self.others, seeds)
        shown: dict[int, Shown] = {}
        for (row, (text, region)), crop in zip(looks.items(), crops, strict=True):
            ids = self.backbone.visual_ids(*crop.pixels.shape[-2:])
            if not row.fits(len(ids)):
                refusals[row] = text, "context"
                continue
            row.close(Turn(text, 0, 0, region=region, crop=crop))
            row.visuals.append(crop)
            shown[row.number] = (ids, [crop])
        for row, (text, fault) in refusals.items():
            ids = self.backbone.tokenize(REFUSALS[fault])
            if not row.fits(len(ids)):
                row.end(text, StopReason.CONTEXT, Refuse(fault))
                continue
            row.close(Turn(text, 0, 0, fault=fault))
            shown[row.number] = (ids, [])
        for row in self.rows:
            if row.number in shown:
                forced = shown[row.number][0].tolist()
                row.add(forced, False, [0.0] * len(forced))
                row.turn_start = len(row.ids)
        return shown

    def advance(self, ids: Tensor, shown: dict[int, Shown]) -> None:
        """Append to every row its token, and what the environment put behind it.

        Where some rows have nothing but their token, all append their token in one pass and those that were shown
        something append that in others: nobody is padded to the length of a crop.

        Args:
            ids: (B,) long.
            shown: by number of the request.
        """
        alone = len(shown) < len(self.rows)
        if alone:
            self._append(ids)
        members = [b for b, row in enumerate(self.rows) if row.number in shown]
        chunks = []
        for b in members:
            row, (behind, visuals) = self.rows[b], shown[self.rows[b].number]
            new = behind if alone else torch.cat([ids[b : b + 1].cpu(), behind])
            place, row.next_position = self.backbone.positions(new, visuals, row.next_position)
            chunks.append(Chunk(new, place, visuals))
        visuals = [visual for chunk in chunks for visual in chunk.visuals]
        features = dict(zip(visuals, self.backbone.features(visuals), strict=True)) if visuals else {}
        for bucket in buckets([len(chunk.ids) for chunk in chunks]):
            if len(bucket) == len(self.rows):  # as they lie in the cache: nothing has to be gathered
                hidden = extend(self.backbone, self.cache, [chunks[b] for b in self.by_slot], features)
                self.hidden = hidden[self.slots]
                continue
            own = torch.tensor([members[k] for k in bucket], device=self.device)
            hidden = extend(self.backbone, self.cache, [chunks[k] for k in bucket], features, self.slots[own])
            self.hidden = self.hidden.index_copy(0, own, hidden)

    def _append(self, ids: Tensor) -> None:
        """Append one token to every row."""
        positions = torch.tensor([self.rows[b].next_position for b in self.by_slot], device=self.device)
        for row in self.rows:
            row.next_position += 1
        lying = ids[self.lying]
        axes = positions[None, :, None].expand(self.backbone.position_axes, -1, 1)
        hidden = forward(self.backbone, self.cache, self.backbone.embed(lying[:, None]), axes, torch.ones_like(lying))
        self.hidden = hidden[self.slots]

    def _turn_text(self, row: Row) -> str:
        return self.backbone.detokenize(row.ids[row.turn_start :])
