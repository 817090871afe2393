"""What happens around training: rollouts, pictures, progress, throughput, export. What YAML names is exported here."""

from callbacks.answers import Answers
from callbacks.board import Board
from callbacks.crop_audit import CropAudit
from callbacks.evaluation import Evaluation
from callbacks.export import Export
from callbacks.faults import Faults
from callbacks.few_shot import FewShot
from callbacks.monitors import Monitors
from callbacks.preflight import Preflight
from callbacks.progress import RunProgressBar
from callbacks.rollout import RolloutCallback
from callbacks.stop import CleanStop
from callbacks.summary import Summary
from callbacks.throughput import Throughput
from callbacks.trajectory_log import TrajectoryLogger
from callbacks.watchdog import Watchdog

__all__ = [
    "Answers",
    "Board",
    "CleanStop",
    "CropAudit",
    "Evaluation",
    "Export",
    "Faults",
    "FewShot",
    "Monitors",
    "Preflight",
    "RolloutCallback",
    "RunProgressBar",
    "Summary",
    "Throughput",
    "TrajectoryLogger",
    "Watchdog",
]
