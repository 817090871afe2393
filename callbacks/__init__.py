"""What happens around a training step: rollouts, pictures, progress, throughput. What YAML names is exported here."""

from callbacks.progress import ProgressBar
from callbacks.rollout import RolloutCallback
from callbacks.throughput import Throughput
from callbacks.trajectory_log import TrajectoryLogger

__all__ = ["ProgressBar", "RolloutCallback", "Throughput", "TrajectoryLogger"]
