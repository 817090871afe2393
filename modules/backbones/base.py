"""What the rest of the project asks of a vision-language model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from modules.backbones.cache import RaggedCache
from modules.backbones.kept import KeptFeatures
from modules.crop import CropAndScale
from modules.functional.boxes import BoxSpace, from_original
from modules.functional.grammar import format_box, may_end_turn
from modules.trajectory import Region, Sample, TrajectoryBatch, Visual

Part = Literal["vision", "projector", "language"]
PARTS: tuple[Part, ...] = get_args(Part)
RUN, BUSY = 8192, 1024  # positions; see `row_runs`
PADDING = 1.05  # positions over tokens up to which rows stay together; likewise


class Backbone(nn.Module, ABC):
    """A policy network: text and images in, hidden states and logits out.

    Positions and caches are explicit: whoever calls `forward` says where each token stands and what
    it may attend to. That makes an incremental pass equal to a full one.

    Attributes set by subclasses:
        tokenizer: the Hugging Face tokenizer.
        image_token_id: the placeholder that visual features replace.
        banned: (V,) bool, ids that the policy must never sample (placeholders, padding, unknown).
        eos_ids: ids that end a trajectory.
        box_space: the space in which it writes boxes.
        coordinate_bins: (F, K) long, families of coordinate tokens in the order of their values, or
            None where coordinates are strings of digits.
        bin_size: distance of two coordinate bins, in units of the box space.
        context_length: how many tokens a sequence may have.
        position_axes: 1, or more for multi-axis rotary positions.
        bidirectional_visuals: whether the tokens of one visual attend to each other in both directions.
    """

    tokenizer: PreTrainedTokenizerBase
    image_token_id: int
    banned: Tensor
    eos_ids: frozenset[int]
    box_space: BoxSpace
    coordinate_bins: Tensor | None
    bin_size: float = 1.0
    context_length: int
    position_axes: int = 1
    bidirectional_visuals: bool = False
    image_scaler: CropAndScale
    crop_scaler: CropAndScale

    def __init__(self) -> None:
        super().__init__()
        self.encoded = KeptFeatures()  # see `features`
        self.seen = KeptFeatures()  # what the vision tower alone makes, for backbones that project it apart

    @abstractmethod
    def prompt_ids(self, sample: Sample, visuals: Sequence[Visual]) -> Tensor:
        """(P,) ids of the prompt, with placeholders for ``visuals`` (the sample's images)."""

    @abstractmethod
    def following_ids(self, sample: Sample, visuals: Sequence[Visual]) -> Tensor:
        """(n,) ids behind a written answer: what closes it, and this question as `prompt_ids` would ask it next."""

    @abstractmethod
    def visual_ids(self, height: int, width: int) -> Tensor:
        """(n,) ids by which a visual of this size, as scaled, is shown: placeholders and what stands around them."""

    @abstractmethod
    def encode(self, visuals: Sequence[Visual]) -> list[Tensor]:
        """Features of each visual, (tokens, D'): one row for each of its placeholders; see `merge`."""

    @abstractmethod
    def part(self, parameter: str) -> Part:
        """Which part of the model a parameter of this name belongs to; the projector joins vision and language."""

    @abstractmethod
    def embed(self, token_ids: Tensor) -> Tensor:
        """Embeddings (..., D) of ids (...)."""

    @abstractmethod
    def forward(
        self, embeddings: Tensor, position_ids: Tensor, attention_mask: Tensor, cache: RaggedCache | None = None
    ) -> Tensor:
        """Hidden states (B, L, D) after the last norm.

        Args:
            embeddings: (B, L, D'), as `merge` returns them.
            position_ids: (A, B, L) long.
            attention_mask: (B, 1, L, K) bool, True where a query may attend.
            cache: keys and values of what came before; K is then its length with this chunk.
        """

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""

    @property
    def linear_head(self) -> nn.Linear | None:
        """The layer whose outputs the logits are, if they are nothing but that; see `modules.scoring`."""
        return None

    def positions(self, token_ids: Tensor, visuals: Sequence[Visual], start: int) -> tuple[Tensor, int]:
        """Positions (A, n) of a chunk (n,) whose first token stands at ``start``, and where the next one stands."""
        n = len(token_ids)
        return torch.arange(start, start + n).expand(self.position_axes, n), start + n

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.banned.device

    @cached_property
    def ending_tokens(self) -> Tensor:
        """(V,) bool: tokens behind which a turn may have ended; the text is parsed only there."""
        ending = torch.zeros(len(self.banned), dtype=torch.bool)
        texts = self.tokenizer.batch_decode([[k] for k in range(len(self.tokenizer))])
        ending[: len(texts)] = torch.tensor([may_end_turn(text) for text in texts])
        ending[sorted(self.eos_ids)] = True
        return ending.to(self.device)

    def tokenize(self, text: str) -> Tensor:
        """(n,) ids of a text. What looks like a special token in it is text: data cannot forge a placeholder."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    def detokenize(self, token_ids: Tensor | list[int]) -> str:
        """The text of (n,) ids."""
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def see(self, images: Sequence[Tensor]) -> list[Visual]:
        """Whole images (3, H, W) as the vision tower takes them."""
        boxes = torch.tensor([[0.0, 0.0, x.shape[-1], x.shape[-2]] for x in images], dtype=torch.float32).view(-1, 4)
        scaled = self.image_scaler([image.to(self.device) for image in images], boxes.to(self.device))
        return self._visuals(scaled, "image")

    def look(self, images: Sequence[Tensor], regions: Sequence[Region]) -> list[Visual]:
        """Zoomed crops: the n-th of ``regions`` on the n-th of ``images`` (repeats are one tensor, not copies)."""
        if not regions:
            return []
        distinct = list({id(image): image for image in images}.values())
        place = {id(image): k for k, image in enumerate(distinct)}
        crops = self.crop_scaler(
            [image.to(self.device) for image in distinct],
            torch.tensor([region.box for region in regions], dtype=torch.float32, device=self.device),
            torch.tensor([place[id(image)] for image in images], device=self.device),
            [self.crop_size(image, region) for image, region in zip(images, regions, strict=True)],
        )
        return self._visuals(crops, "crop")

    def _visuals(self, scaled: Sequence[Tensor], role: Literal["image", "crop"]) -> list[Visual]:
        sizes = [(pixels.shape[-2], pixels.shape[-1]) for pixels in scaled]
        tokens = {size: int((self.visual_ids(*size) == self.image_token_id).sum()) for size in set(sizes)}
        return [Visual(pixels, tokens[size], role) for pixels, size in zip(scaled, sizes, strict=True)]

    def features(self, visuals: Sequence[Visual]) -> list[Tensor]:
        """`encode`, and each visual once only while neither the vision tower nor the projector trains; pixels that
        carry gradient are encoded each time."""
        if self.encoder_trains():
            return self.encode(visuals)
        weights = [p for name, p in self.named_parameters() if self.part(name) != "language"]
        return self.encoded.of(visuals, weights, self.encode)

    def encoder_trains(self) -> bool:
        """Whether the features of a visual change from step to step."""
        return any(p.requires_grad and self.part(name) != "language" for name, p in self.named_parameters())

    def tower_trains(self) -> bool:
        """Whether what the vision tower alone makes of a visual changes from step to step."""
        return any(p.requires_grad and self.part(name) == "vision" for name, p in self.named_parameters())

    def learn(self) -> None:
        """Be ready for a learner's pass: evaluation mode, for dropout would make its distribution another one than
        the sampler's, but layers that are to recompute their activations do."""
        self.eval()
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = module.gradient_checkpointing

    def crop_size(self, image: Tensor, region: Region) -> tuple[int, int]:
        """(height, width) of the crop of ``region`` on an image (3, H, W)."""
        return self.crop_scaler.output_size(region.box, (image.shape[-2], image.shape[-1]), region.zoom)

    @property
    def zooms(self) -> bool:
        """Whether how much a crop is enlarged can be chosen: not where all crops have one size."""
        return self.crop_scaler.size is None

    def write(
        self, text: str, region: Region | None, sample: Sample, visuals: Sequence[Visual]
    ) -> tuple[Tensor, Tensor]:
        """What the policy would have written to say ``text`` and then ask for ``region``.

        Returns:
            ids (n,) long, and (n,) float32 exact coordinates in bins behind coordinate tokens, else NaN.
        """
        if region is None:
            ids = self.tokenize(text)
            return ids, torch.full(ids.shape, torch.nan, dtype=torch.float32)
        height, width = sample.images[region.image].shape[-2:]
        resized = visuals[region.image].pixels.shape[-2:]
        coords = from_original(region.box, self.box_space, (height, width), (resized[0], resized[1]))
        bins = torch.tensor(coords, dtype=torch.float32) / self.bin_size
        rounded = [round(round(k) * self.bin_size, 6) for k in bins.tolist()]  # 9 * 0.001 is 0.009000000000000001
        image = region.image if len(sample.images) > 1 else None
        ids = self.tokenize(text + format_box(rounded, image, region.zoom))
        coordinates = torch.full(ids.shape, torch.nan, dtype=torch.float32)
        if self.coordinate_bins is not None:
            known = torch.isin(ids, self.coordinate_bins.cpu())
            if int(known.sum()) == len(bins):  # else it has no words for this box, and the replay says so
                coordinates[known] = bins
        return ids, coordinates

    def merge(self, embeddings: Tensor, is_visual: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Put the features, in row-major order, where the placeholders (B, L) are.

        A backbone whose deeper layers take features as well returns wider embeddings than it was given.
        """
        if not features:
            return embeddings
        return embeddings.masked_scatter(is_visual[..., None], torch.cat(list(features)).to(embeddings.dtype))

    def hidden_states(self, batch: TrajectoryBatch) -> Tensor:
        """(R, L, D) of a packed batch, the learner's full pass; what stands where there is padding means nothing."""
        features = self.features(batch.visuals) if batch.visuals else []
        placed = [features[k] for k in batch.visual_order.tolist()]
        embeddings = self.merge(self.embed(batch.token_ids), batch.is_visual, placed)
        blocks = visual_blocks(batch.is_visual) if self.bidirectional_visuals else None
        runs = row_runs(batch.segment_ids)
        if len(runs) == 1:
            return self(embeddings, batch.position_ids, packed_mask(batch.segment_ids, blocks))
        parts = []
        for rows, length in runs:
            own = None if blocks is None else blocks[rows, :length]
            mask = packed_mask(batch.segment_ids[rows, :length], own)
            hidden = self(embeddings[rows, :length], batch.position_ids[:, rows, :length], mask)
            parts.append(nn.functional.pad(hidden, (0, 0, 0, embeddings.shape[1] - length)))
        return torch.cat(parts)[torch.cat([rows for rows, _ in runs]).argsort()]


def see_images(backbone: Backbone, samples: Sequence[Sample]) -> list[tuple[Visual, ...]]:
    """The images of each sample as the vision tower takes them; an image that several share is one visual."""
    distinct = list({id(image): image for sample in samples for image in sample.images}.values())
    visuals = dict(zip(map(id, distinct), backbone.see(distinct) if distinct else [], strict=True))
    return [tuple(visuals[id(image)] for image in sample.images) for sample in samples]


def visual_blocks(is_visual: Tensor) -> Tensor:
    """(B, L) long, a number for each run of placeholders (B, L) in a row; -1 where there is none."""
    starts = is_visual & ~torch.cat([torch.zeros_like(is_visual[:, :1]), is_visual[:, :-1]], 1)
    return torch.where(is_visual, starts.cumsum(1), -1)


def row_runs(segment_ids: Tensor) -> list[tuple[Tensor, int]]:
    """Packed rows (R, L) by length, in runs that go through the layers together, so that little is computed of padding.

    A run ends where a further row would make more than `PADDING` of it, once it has `BUSY` positions, which keep a
    machine busy. Up to `RUN` positions are one run, and so are rows that hardly differ in length.

    Returns:
        of each run its rows (r,) long, and the length of the longest.
    """
    lengths = (segment_ids >= 0).sum(1)
    whole = torch.arange(len(lengths), device=lengths.device), segment_ids.shape[1]
    if segment_ids.numel() <= max(RUN, PADDING * int(lengths.sum())):
        return [whole]
    order = lengths.argsort(descending=True, stable=True)
    ranked = lengths[order].tolist()
    runs, start, tokens = [], 0, 0
    for stop, length in enumerate(ranked):
        positions = (stop - start) * ranked[start]
        if positions >= BUSY and positions + ranked[start] > PADDING * (tokens + length):
            runs.append((order[start:stop], ranked[start]))
            start, tokens = stop, 0
        tokens += length
    runs.append((order[start:], ranked[start]))
    return runs


def packed_mask(segment_ids: Tensor, blocks: Tensor | None = None) -> Tensor:
    """Who may attend to whom in packed rows: (R, 1, L, L) bool from (R, L) segment ids.

    Causal; a completion sees the shared prefix (segment 0) and itself. Padding (-1) sees itself
    only, since a row of the mask with nothing in it gives NaN. With ``blocks`` (R, L), tokens of one
    block see each other in both directions.
    """
    length = segment_ids.shape[1]
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    if blocks is not None:
        causal = causal | ((blocks[:, :, None] == blocks[:, None, :]) & (blocks >= 0)[:, None, :])
    itself = torch.eye(length, dtype=torch.bool, device=segment_ids.device)
    return (causal & ((key == 0) | (key == query)) & (key >= 0) | itself)[:, None]
