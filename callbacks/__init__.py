"""What happens around training: rollouts, pictures, progress, throughput, export. What YAML names is exported here."""

from callbacks.crop_audit import CropAudit
from callbacks.export import Export
from callbacks.monitors import Monitors
from callbacks.preflight import Preflight
from callbacks.progress import RunProgressBar
from callbacks.rollout import RolloutCallback
from callbacks.throughput import Throughput
from callbacks.trajectory_log import TrajectoryLogger

__all__ = [
    "CropAudit",
    "Export",
    "Monitors",
    "Preflight",
    "RolloutCallback",
    "RunProgressBar",
    "Throughput",
    "TrajectoryLogger",
]
