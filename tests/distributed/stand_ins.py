"""A small policy that looks again, questions of all kinds, and who gets which: for runs of several processes."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lightning.pytorch import LightningDataModule
from torch.utils.data import Dataset

import train
from datamodules.sampler import EpochOrder, Order, SampleLoader
from modules.engine import GroupSampler, Request
from modules.policy import PolicyModule
from modules.rewards import Reward
from modules.sft import SFTModule
from modules.trajectory import Sample, SampleBatch, Step, Trajectory
from tests.conftest import FRAGMENTS, make_samples
from tests.fitting import ragged_samples

NO_IMAGE, SKIPPED, TIED = 6, 7, 8  # places in `questions`; before them are six whose rationales differ in length
# (rank 0, rank 1): the questions of each batch
UNEVEN = (
    ([0, 1, 2], [3]),  # trajectories of different lengths, and not as many of them
    ([4], [NO_IMAGE]),
    ([5, 1], []),
    ([SKIPPED, TIED], [2, 3]),
    ([SKIPPED, TIED], []),  # nothing to learn from on either
    ([], [0, 4, NO_IMAGE, SKIPPED, TIED]),
)
CONFIG = f"""\
model:
  class_path: SFTModule
  init_args:
    backbone:
      class_path: TimmLMBackbone
      init_args:
        vision:
          name: vit_tiny_patch16_224
          options: {{img_size: 16, patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2, class_token: false,
                    global_pool: "", dynamic_img_size: true}}
        language:
          config: {{model_type: qwen2, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
                   num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 128,
                   initializer_range: 0.3, tie_word_embeddings: false}}
        tokenizer:
          vocabulary: {{coordinates: 17, step: 4, fragments: {FRAGMENTS!r}}}
        image: {{size: [16, 16]}}
        crop: {{size: [16, 16]}}
    optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.1, weight_decay: 0.01}}}}
data: {{class_path: Questions}}
rollout:
  sampler: {{size: 3}}
  decoding: {{max_turns: 3, max_turn_tokens: 10}}
  rewards: {{accuracy: {{class_path: Written}}}}
trainer:
  accelerator: cpu
  max_epochs: 1
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  limit_val_batches: 0
preflight: {{budget: false}}
"""


def main(arguments: list[str]) -> None:
    """The real command line."""
    train.main(arguments)


def questions() -> list[Sample]:
    """Six with rationales of different lengths, one without an image, one without a rationale, one for which all
    trajectories are worth the same, if it is learned from at all."""
    samples = ragged_samples()
    words = replace(samples[0], id="words", images=(), regions=(), rationale=(Step("7</answer>"),))
    untold = [replace(samples[k], id=name, rationale=()) for k, name in ((1, "tied-1"), (2, "tied-2"))]
    return [*samples, words, *untold]


class Listed(Dataset[SampleBatch]):
    """Samples, a batch at a time."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: Sequence[int]) -> SampleBatch:
        return SampleBatch([self.samples[k] for k in indices])


@dataclass
class Uneven:
    """An `Order` in which ranks have unequal work; one process alone has what two have together."""

    rank: int
    world_size: int
    epoch: int = field(default=0, init=False)

    @property
    def sampler(self) -> Uneven:
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(UNEVEN)

    def batches(self) -> list[list[int]]:
        if self.world_size == 1:
            return [[*first, *second] for first, second in UNEVEN]
        return [batches[self.rank] for batches in UNEVEN]


class Questions(LightningDataModule):
    """Questions for training.

    Args:
        plan: uneven: those of `questions`, as `UNEVEN` says; even: a dozen others, two a batch and rank.
    """

    def __init__(self, plan: Literal["uneven", "even"] = "uneven") -> None:
        super().__init__()
        self.plan = plan

    def train_dataloader(self) -> SampleLoader:
        assert self.trainer is not None
        own = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        if self.plan == "uneven":
            return SampleLoader(Listed(questions()), Uneven(**own))
        order: Order = EpochOrder([[k] for k in range(12)], batch_size=2, shuffle=True, seed=3, **own)
        return SampleLoader(Listed(make_samples(12)), order)

    def val_dataloader(self) -> SampleLoader:
        assert self.trainer is not None
        order = EpochOrder([[k] for k in range(3)], 1, False, 0, self.trainer.global_rank, self.trainer.world_size)
        return SampleLoader(Listed(make_samples(3)), order)


class Written(Reward):
    """Depends on what was written, to the letter; nothing for a question that is called tied."""

    def __call__(self, trajectory: Trajectory) -> float:
        if trajectory.sample.id.startswith("tied"):
            return 0.0
        return float(int(trajectory.completion_ids[trajectory.sampled].sum()) % 5)


def seeds_by_question(rank: int) -> None:
    """Make a question's trajectories the same on whichever rank, and of however many, it is asked."""

    def requests(self: GroupSampler, samples: Sequence[Sample], seed: int) -> list[Request]:
        return [Request(s, _stable(f"{s.id}/{g}")) for s in samples for g in range(self.size)]

    GroupSampler.requests = requests  # type: ignore[method-assign]


def in_float64(rank: int) -> None:
    """Compute in double, from the images on: what is left of a difference is none of rounding."""

    def doubled() -> list[Sample]:
        return [replace(s, images=tuple(image.double() / 255 for image in s.images)) for s in own()]

    def configure_model(self: PolicyModule) -> None:
        self.backbone.double()
        configure(self)

    own, configure = questions, PolicyModule.configure_model
    globals()["questions"] = doubled
    PolicyModule.configure_model = configure_model  # type: ignore[method-assign]


def _stable(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def is_asked_to_end(rank: int) -> None:
    """Send SIGTERM to the second rank alone, in its second batch."""

    def hears(self: SFTModule, batch: SampleBatch, batch_idx: int) -> dict[str, int]:
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    step = SFTModule.training_step
    if rank == 1:
        SFTModule.training_step = hears  # type: ignore[method-assign]


def hang(rank: int) -> None:
    """Let the second rank sleep in its second batch, while the first waits for it."""

    def sleeps_like_a_log(self: SFTModule, batch: SampleBatch, batch_idx: int) -> dict[str, int]:
        if batch_idx == 1:
            time.sleep(600)
        return step(self, batch, batch_idx)

    step = SFTModule.training_step
    if rank == 1:
        SFTModule.training_step = sleeps_like_a_log  # type: ignore[method-assign]
