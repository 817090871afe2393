"""What happens around a training step: rollouts, pictures, progress, throughput. What YAML names is exported here."""

from callbacks.progress import RunProgressBar
from callbacks.rollout import RolloutCallback
from callbacks.throughput import Throughput
from callbacks.trajectory_log import TrajectoryLogger

__all__ = ["RolloutCallback", "RunProgressBar", "Throughput", "TrajectoryLogger"]
