"""A test of a tiny policy on questions on disk, for tests of what is left behind; run as a script, it kills itself.

python -m tests.evaluating FOLDER DATA CALLS
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image

from callbacks.evaluation import Evaluation
from callbacks.rollout import RolloutCallback
from datamodules.module import VLIRDataModule
from datamodules.vlir.schema import to_row
from modules.backbones.base import Backbone
from modules.engine import Decoding, LocalEngine, Request
from modules.rewards import Accuracy
from modules.sft import SFTModule
from modules.trajectory import Trajectory
from tests.conftest import make_backbone, make_samples
from tests.fitting import trainer

GREEDY = Decoding(0.0, max_turns=3, max_turn_tokens=10)
SAMPLED = Decoding(1.5, max_turns=3, max_turn_tokens=10)


class Mortal(LocalEngine):
    """Counts what it was asked for; dies at a call, if told to, in the middle of a line.

    Args:
        calls: after which it dies; None: never.
        folder: whose predictions it tears.
    """

    def __init__(self, calls: int | None = None, folder: Path = Path()) -> None:
        super().__init__()
        self.calls, self.folder = calls, folder
        self.asked: list[str] = []

    def rollout(self, backbone: Backbone, requests: Sequence[Request], decoding: Decoding) -> list[Trajectory]:
        if self.calls == 0:
            with (self.folder / "predictions.jsonl").open("a") as file:
                file.write('{"id": "sample-7", "mode": "gre')
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls = None if self.calls is None else self.calls - 1
        self.asked += [request.sample.id for request in requests]
        return super().rollout(backbone, requests, decoding)


def write_questions(file: Path, count: int = 6, seed: int = 0, **fields: Any) -> Path:
    """Questions of `make_samples` as a VLIR file; two are about one image."""
    rows = []
    (file.parent / "images").mkdir(parents=True, exist_ok=True)
    for k, sample in enumerate(make_samples(count, seed)):
        name = f"images/{seed}-{k // 2}.png"
        if k % 2 == 0:
            Image.fromarray(sample.images[0].permute(1, 2, 0).numpy()).save(file.parent / name)
        row = to_row(sample, [name])
        rows.append({**row, "source": ("even", "odd")[k % 2], "meta": {"image_id": name}, **fields})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def evaluate(
    folder: Path, data: Path | list[str], engine: Mortal | None = None, *callbacks: L.Callback, **options: Any
) -> L.Trainer:
    """Test a policy of fixed random weights."""
    options = {"evaluations": {"greedy": GREEDY, "sampled": SAMPLED}, "samples": {"sampled": 3}, **options}
    policy = SFTModule(options.pop("backbone", None) or make_backbone(seed=1, context_length=512))
    rollout = RolloutCallback(
        engine=engine or Mortal(), rewards={"accuracy": Accuracy("exact")}, resume=True, by_source=True, **options
    )
    run = trainer(folder, *callbacks, rollout, Evaluation())
    module = VLIRDataModule(test=data if isinstance(data, list) else str(data), val_batch_size=2)
    run.test(policy, datamodule=module, verbose=False)
    return run


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    evaluate(target, Path(sys.argv[2]), Mortal(int(sys.argv[3]), target))
