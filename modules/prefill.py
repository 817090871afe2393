"""Passes that append to a cache, and the prompts of a rollout: each is computed once, whoever goes on from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modules.backbones.base import Backbone, visual_blocks
from modules.backbones.cache import RaggedCache
from modules.prompts import Part, Prompt, solve
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
    """The prompts of questions, each made when it is first asked for; an image or examples that several have are one.

    What was made is kept until `keep` is told that nobody needs it.

    Args:
        backbone: the policy.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._prompts: dict[Sample, Prompt] = {}
        self._seen: dict[int, Visual] = {}  # by the image's id
        self._solved: dict[int, Part] = {}  # by the examples' id

    def make(self, samples: Sequence[Sample]) -> list[Prompt]:
        """The prompt of each question.

        Raises:
            PolicyError: an example that the policy could not have written, see `modules.prompts.solve`.
        """
        new = [sample for sample in dict.fromkeys(samples) if sample not in self._prompts]
        images = {id(image): image for sample in new for image in sample.images if id(image) not in self._seen}
        if images:
            self._seen |= zip(images, self.backbone.see(list(images.values())), strict=True)
        for sample in new:
            if sample.examples and id(sample.examples) not in self._solved:
                self._solved[id(sample.examples)] = solve(self.backbone, sample.examples)
            before = self._solved.get(id(sample.examples))
            seen = tuple(self._seen[id(image)] for image in sample.images)
            ask = self.backbone.prompt_ids if before is None else self.backbone.following_ids
            self._prompts[sample] = Prompt(before, Part(ask(sample, seen), seen))
        return [self._prompts[sample] for sample in samples]

    def made(self, samples: Iterable[Sample]) -> set[Visual | Part]:
        """As far as they exist: what the images of questions are seen as, and their examples."""
        questions = set(samples)
        seen = {self._seen.get(id(image)) for sample in questions for image in sample.images}
        solved = {self._solved.get(id(sample.examples)) for sample in questions}
        return {part for part in seen | solved if part is not None}

    def keep(self, samples: Iterable[Sample]) -> None:
        """Forget what none of these questions needs."""
        questions = set(samples)
        needed = self.made(questions)
        self._prompts = {sample: prompt for sample, prompt in self._prompts.items() if sample in questions}
        self._seen = {key: visual for key, visual in self._seen.items() if visual in needed}
        self._solved = {key: part for key, part in self._solved.items() if part in needed}


class Prefill:
    """Computes prompts.

    An image is encoded with the first prompt that shows it, and examples are computed before the first question that
    has them; both are kept here while questions wait that need them. Of a frozen tower, `Backbone.features` keeps an
    image's features longer: for as long as its visual lives, thus with every trajectory that shows it.

    Args:
        backbone: the policy.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._features: dict[Visual, Tensor] = {}
        self._solved: dict[Part | None, Prefix] = {}

    def compute(self, prompts: Sequence[Prompt], needed: Set[Visual | Part]) -> list[Prefix]:
        """Prompts, those of one length and with the same examples together; of what they share, ``needed`` is kept."""
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
        self._features = {visual: feature for visual, feature in self._features.items() if visual in needed}
        self._solved = {part: prefix for part, prefix in self._solved.items() if part in needed}
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
