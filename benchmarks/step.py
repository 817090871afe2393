"""One optimizer step of R-GRPO, single turn: this project against TRL's `GRPOTrainer` with Hugging Face generation.

    python -m benchmarks.run --rows step

Both train the same tiny random Qwen2.5-VL (hidden 128, 4 layers, 4 heads, vocabulary 152,064) on one image of
224 x 224 a question: 2 questions x 8 completions of 64 tokens, a random reward, no KL, one batch, float32, vision
tower frozen, fused AdamW. The two take turns, step by step, each in a process of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
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

from benchmarks.alternating import Alternating
from benchmarks.elsewhere import Elsewhere, Turn
from benchmarks.families import FAMILIES, tokenizer_of
from benchmarks.table import Row, ratio, seconds_of
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


def our_policy(folder: Path) -> RGRPOModule:
    """The same model, optimizer and frozen tower as the peer's."""
    return RGRPOModule(
        QwenVLBackbone(str(folder), dtype="float32", instruction=""),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, fused=True),
        freeze=["vision"],
        objective=Objective(drop_zero_variance=False),
    )


def fit(policy: RGRPOModule, steps: int, callbacks: list[L.Callback]) -> None:
    """Our side: so many optimizer steps on the same questions, without logs or checkpoints."""
    L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    ).fit(policy, Same(steps))


def trl(turn: Turn, folder: Path, steps: int) -> None:
    """TRL's trainer, which waits for its turn where a step is to begin.

    A step is all of it: generation, reward, loss, gradient, clipping, optimizer (`transformers`' default, the fused
    AdamW).
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turn(None)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            turn(None)

    transformers_logging.set_verbosity_error()
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
    GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: torch.rand(len(completions)).tolist(),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=Qwen2_5_VLProcessor.from_pretrained(folder),
        callbacks=[Turns()],
    ).train()


def against_trl(steps: int = 3, warm_up: int = 1) -> Row:
    """Trajectories a second of a whole optimizer step of ours over TRL's, in turns within one run.

    Args:
        steps: of each side that count.
        warm_up: steps of each side before that.
    """
    transformers_logging.set_verbosity_error()
    all_steps = steps + warm_up
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_model(folder)
        rollout = RolloutCallback(
            sampler=GroupSampler(GROUP),
            rewards={"random": RandomReward()},
            decoding=Decoding(max_turns=1, max_turn_tokens=NEW_TOKENS),
        )
        with Elsewhere(trl, folder, all_steps) as peer:
            clock = Alternating(peer.step, warm_up)
            fit(our_policy(folder), all_steps, [clock, rollout])
    value, spread = ratio(clock.seconds["other"], clock.seconds["ours"])
    return Row(
        "trajectories/s of a whole optimizer step, single turn / TRL's GRPOTrainer",
        value,
        target=10.0,
        at_most=False,
        spread=spread,
        detail={
            "seconds_a_step": seconds_of({"ours": clock.seconds["ours"], "trl": clock.seconds["other"]}),
            "trajectories": QUESTIONS * GROUP,
        },
    )


ROWS: dict[str, Callable[[], Row]] = {"step": against_trl}
