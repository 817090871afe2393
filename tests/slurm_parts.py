"""A run of R-GRPO of a minute, on the quickstart's policy and data; its module is imported by the jobs themselves."""

from __future__ import annotations

import os
import time

from modules.rewards import Reward
from modules.trajectory import Trajectory

FILES = ("configs/quickstart/base.yaml", "configs/quickstart/rgrpo.yaml")  # TINY comes behind them
TINY = """\
model:
  init_args:
    schedule: {{name: constant, warmup: 0.0, options: {{}}}}
data:
  init_args:
    root: {data}
    batch_size: 2
    train: {{images: 4, seed: 2}}  # so that the run has several epochs
    val: null
rollout:
  sampler: {{size: 2}}
  rewards:
    slow:
      class_path: tests.slurm_parts.Slow
      init_args: {{seconds: {seconds}}}
trainer:
  val_check_interval: null
  log_every_n_steps: 1
  enable_progress_bar: false
  callbacks: []
"""


class Slow(Reward):
    """Differs between nearly all trajectories, and takes its time, on the first rank alone: the other has to wait.

    Args:
        seconds: a trajectory.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def __call__(self, trajectory: Trajectory) -> float:
        if os.environ.get("SLURM_PROCID", "0") == "0":
            time.sleep(self.seconds)
        return float(trajectory.sampled.sum()) + float(trajectory.log_probs.sum()) / 100
