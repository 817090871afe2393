"""One optimizer step of R-GRPO, single turn: this project against TRL's `GRPOTrainer` with Hugging Face generation.

    python -m benchmarks.step --steps 4

Both train the same tiny random Qwen2.5-VL (hidden 128, 4 layers, 4 heads, vocabulary 152,064) on one image of
224 x 224 a question: 2 questions x 8 completions of 64 tokens, a random reward, no KL, one batch, float32, vision
tower frozen. Prints JSON: seconds of each step (rollout, reward, update), and the ratio of the medians without the
first step. The two run one after the other: on a machine that does other things besides, look at the spread first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.utils import logging as transformers_logging

from benchmarks.families import FAMILIES, tokenizer_of
from callbacks.rollout import RolloutCallback
from modules.backbones.qwen_vl import QwenVLBackbone
from modules.engine import Decoding, GroupSampler
from modules.objective import Objective
from modules.rewards import Reward
from modules.rgrpo import RGRPOModule
from modules.trajectory import Sample, SampleBatch, Trajectory

QUESTIONS, GROUP, NEW_TOKENS, SIDE = 2, 8, 64, 224
VOCABULARY = 152_064
TEXT = "What is this?"


class RandomReward(Reward):
    """A number drawn anew for each trajectory."""

    def __call__(self, trajectory: Trajectory) -> float:
        """See `Reward`."""
        return float(torch.rand(()))


class Same(L.LightningDataModule):
    """The same questions in every batch."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        images = [torch.from_numpy(pixels).permute(2, 0, 1) for pixels in pictures()]
        self.samples = [Sample(id=str(k), question=TEXT, images=(image,)) for k, image in enumerate(images)]

    def train_dataloader(self) -> DataLoader[int]:
        """As many batches as steps."""
        return DataLoader(range(self.steps), collate_fn=lambda _: SampleBatch(list(self.samples)))  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: SampleBatch, device: torch.device, dataloader_idx: int) -> SampleBatch:
        """Images stay at rest."""
        return batch


class Clock(L.Callback):
    """Seconds of whole iterations; stands before the callback that rolls out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """End."""
        self.seconds.append(time.perf_counter() - self.start)


def pictures() -> list[NDArray[np.uint8]]:
    """One image a question."""
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(QUESTIONS)]


def build_model(folder: Path) -> None:
    """Write the model and its processor; the tower is small, too."""
    family = FAMILIES["qwen2_5_vl"]
    tokenizer = tokenizer_of(family, None)
    arguments, processor = family.make(tokenizer, family.template)
    arguments["text_config"] |= {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    }
    arguments["vision_config"] |= {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 128}
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**arguments))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def ours(folder: Path, steps: int) -> list[float]:
    """Seconds a step of `RGRPOModule` and `RolloutCallback`."""
    policy = RGRPOModule(
        QwenVLBackbone(str(folder), dtype="float32", instruction=""),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, fused=True),
        freeze=["vision"],
        objective=Objective(drop_zero_variance=False),
    )
    rollout = RolloutCallback(
        sampler=GroupSampler(GROUP),
        rewards={"random": RandomReward()},
        decoding=Decoding(max_turns=1, max_turn_tokens=NEW_TOKENS),
    )
    clock = Clock()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, rollout],
    )
    trainer.fit(policy, Same(steps))
    return clock.seconds


def theirs(folder: Path, steps: int) -> list[float]:
    """Seconds a step of TRL's trainer: generation, reward and update are all in its `training_step`."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    asked = [{"role": "user", "content": TEXT}]
    rows = [{"prompt": asked, "image": Image.fromarray(pixels)} for pixels in pictures()] * steps
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=QUESTIONS * GROUP,
        num_generations=GROUP,
        max_completion_length=NEW_TOKENS,
        generation_kwargs={"min_new_tokens": NEW_TOKENS},
        max_steps=steps,
        beta=0.0,
        gradient_checkpointing=False,
        learning_rate=1e-6,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    model.model.visual.requires_grad_(False)
    seconds: list[float] = []

    class Timed(GRPOTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = super().training_step(*args, **kwargs)
            seconds.append(time.perf_counter() - start)
            return result

    Timed(
        model=model,
        reward_funcs=lambda completions, **_: torch.rand(len(completions)).tolist(),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=Qwen2_5_VLProcessor.from_pretrained(folder),
    ).train()
    return seconds


def main() -> None:
    """Run both and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="of each; the first is not counted")
    steps = parser.parse_args().steps
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_model(folder)
        mine, peer = ours(folder, steps), theirs(folder, steps)
    ratio = statistics.median(peer[1:]) / statistics.median(mine[1:])
    print(json.dumps({"seconds": mine, "trl_seconds": peer, "times_as_fast": round(ratio, 2)}))


if __name__ == "__main__":
    main()
