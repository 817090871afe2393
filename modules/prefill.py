"""Passes that append to a cache, and the prompts of a rollout: each is computed once, whoever goes on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modules.backbones.base import Backbone, visual_blocks
from modules.backbones.cache import RaggedCache
from modules.prompts import Part, make_prompts
from modules.trajectory import Sample, Visual

SLACK = 0.02  # padded positions that are computed, at most, for each real one


@dataclass(frozen=True, eq=False)
class Chunk:
    """What is appended to a row of a cache."""

    ids: Tensor  # (n,) long
    positions: Tensor  # (A, n) long
    visuals: Sequence[Visual]  # in the order of their placeholders


def buckets(lengths: Sequence[int], slack: float = SLACK) -> list[list[int]]:
    """Which chunks go through the model together, each padded to the longest of its bucket.

    Args:
        lengths: of the chunks.
        slack: padded positions of all buckets together, at most, for each real one.

    Returns:
        Indices of ``lengths``; the longest first.
    """
    found: list[list[int]] = []
    real = padding = 0
    for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        real += lengths[k]
        extra = lengths[found[-1][0]] - lengths[k] if found else 0
        if found and padding + extra <= slack * real:
            found[-1].append(k)
            padding += extra
        else:
            found.append([k])
    return found


def extend(
    backbone: Backbone,
    cache: RaggedCache,
    chunks: Sequence[Chunk],
    features: Mapping[Visual, Tensor],
    rows: Tensor | None = None,
) -> Tensor:
    """Append a chunk to each of n rows of a cache, in one pass.

    Args:
        backbone: what computes.
        cache: grows.
        chunks: n.
        features: of their visuals, see `Backbone.features`.
        rows: (n,) long, which rows of the cache; None: all of them.

    Returns:
        (n, D), the hidden state behind each chunk's last token.
    """
    device = backbone.device
    counts = torch.tensor([len(chunk.ids) for chunk in chunks], device=device)
    ids = pad_sequence([chunk.ids for chunk in chunks], batch_first=True).to(device)
    places = pad_sequence([chunk.positions.T for chunk in chunks], batch_first=True).permute(2, 0, 1).to(device)
    embeddings, blocks = backbone.embed(ids), None
    shown = [features[visual] for chunk in chunks for visual in chunk.visuals]
    if shown:
        real = torch.arange(ids.shape[1], device=device) < counts[:, None]
        is_visual = (ids == backbone.image_token_id) & real
        embeddings = backbone.merge(embeddings, is_visual, shown)
        blocks = visual_blocks(is_visual) if backbone.bidirectional_visuals else None
    return forward(backbone, cache, embeddings, places, counts, blocks, rows)


def forward(
    backbone: Backbone,
    cache: RaggedCache,
    embeddings: Tensor,
    positions: Tensor,
    counts: Tensor,
    blocks: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """One pass over embedded, right-padded chunks; returns (n, D), see `extend`."""
    mask = cache.prepare(counts, embeddings.shape[1], blocks, rows)
    hidden = backbone(embeddings, positions, mask, cache)
    cache.commit()
    last: Tensor = hidden[torch.arange(len(counts), device=counts.device), counts - 1]
    return last


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt, or its beginning, that has been computed."""

    cache: RaggedCache  # its keys and values are
    row: int  # this one
    hidden: Tensor  # (D,) behind its last token
    position: int  # of the next token

    def apart(self) -> Prefix:
        """A copy in a cache of its own."""
        cache = RaggedCache()
        cache.append([(self.cache, torch.tensor([self.row], device=self.hidden.device))])
        return Prefix(cache, 0, self.hidden, self.position)


class Prompts:
    """The prompts of a rollout's questions.

    An image is encoded when the first prompt that shows it is computed, and examples are computed before the first
    question that has them; both are kept for as long as later prompts need them.

    Args:
        backbone: the policy.
        samples: the questions, in the order in which they will be computed.

    Raises:
        PolicyError: see `make_prompts`.
    """

    def __init__(self, backbone: Backbone, samples: Sequence[Sample]) -> None:
        self.backbone = backbone
        self.prompts = make_prompts(backbone, samples)
        self._last: dict[Visual | Part, int] = {}  # the last prompt that needs it
        for number, prompt in enumerate(self.prompts):
            self._last |= dict.fromkeys(prompt.visuals, number)
            if prompt.solved is not None:
                self._last[prompt.solved] = number
        self._features: dict[Visual, Tensor] = {}
        self._solved: dict[Part | None, Prefix] = {}

    def compute(self, numbers: Sequence[int]) -> list[Prefix]:
        """The n-th of ``numbers`` of the prompts; those of one length and with the same examples go together."""
        prompts = [self.prompts[number] for number in numbers]
        examples = list(dict.fromkeys(p.solved for p in prompts if p.solved is not None))
        new = [part for part in examples if part not in self._solved]
        visuals = [visual for part in [*new, *(p.asked for p in prompts)] for visual in part.visuals]
        unseen = [visual for visual in dict.fromkeys(visuals) if visual not in self._features]
        if unseen:
            self._features |= zip(unseen, self.backbone.features(unseen), strict=True)
        for part, prefix in zip(new, self._prefixes(new, None), strict=True):
            self._solved[part] = prefix.apart()
        found: dict[int, Prefix] = {}
        for before in dict.fromkeys(prompt.solved for prompt in prompts):
            members = [k for k, prompt in enumerate(prompts) if prompt.solved is before]
            parts = [prompts[k].asked for k in members]
            found |= zip(members, self._prefixes(parts, self._solved.get(before)), strict=True)
        for prompt in prompts:
            for visual in prompt.visuals:
                if self._last[visual] <= numbers[-1]:
                    self._features.pop(visual, None)
            if prompt.solved is not None and self._last[prompt.solved] <= numbers[-1]:
                self._solved.pop(prompt.solved, None)
        return [found[k] for k in range(len(prompts))]

    def _prefixes(self, parts: Sequence[Part], before: Prefix | None) -> list[Prefix]:
        """Each part behind what all of them begin with."""
        start = 0 if before is None else before.position
        placed = [self.backbone.positions(part.ids, part.visuals, start) for part in parts]
        found: dict[int, Prefix] = {}
        for bucket in buckets([len(part.ids) for part in parts]):
            cache = RaggedCache()
            if before is not None:
                cache.append([(before.cache, torch.full((len(bucket),), before.row, device=self.backbone.device))])
            chunks = [Chunk(parts[k].ids, placed[k][0], parts[k].visuals) for k in bucket]
            hidden = extend(self.backbone, cache, chunks, self._features)
            found |= {k: Prefix(cache, row, hidden[row], placed[k][1]) for row, k in enumerate(bucket)}
        return [found[k] for k in range(len(parts))]
