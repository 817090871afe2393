"""VLM-R3 in one docstring: a policy that looks again.

    image + question -> `Sample` -> `GroupSampler` repeats it G times -> `RolloutEngine`: the policy writes, its
    boxes are cut out and zoomed (`CropAndScale`), the crops are fed back -> `Trajectory` -> `rewards` ->
    advantages -> packing -> `TrajectoryBatch` -> `RGRPOModule.training_step` (losses, `ReferenceModule`)

Supervised warm-up enters at the same `Trajectory`: a rationale is a trajectory that somebody else wrote
(`replay`). Evaluation and prediction run the same engine at temperature 0.

What YAML names is exported here.
"""

from modules.backbones.base import Backbone
from modules.backbones.hf_vlm import HFVLMBackbone
from modules.backbones.qwen_vl import QwenVLBackbone
from modules.backbones.timm_lm import TimmLMBackbone
from modules.engine import GroupSampler, LocalEngine, RolloutEngine
from modules.policy import PolicyModule
from modules.rewards import (
    Accuracy,
    CropCost,
    Format,
    InformationGain,
    Integration,
    IoU,
    Judge,
    Length,
    RegionValidity,
    Repetition,
    Reward,
)
from modules.rgrpo import RGRPOModule
from modules.sft import SFTModule

__all__ = [
    "Accuracy",
    "Backbone",
    "CropCost",
    "Format",
    "GroupSampler",
    "HFVLMBackbone",
    "InformationGain",
    "Integration",
    "IoU",
    "Judge",
    "Length",
    "LocalEngine",
    "PolicyModule",
    "QwenVLBackbone",
    "RGRPOModule",
    "RegionValidity",
    "Repetition",
    "Reward",
    "RolloutEngine",
    "SFTModule",
    "TimmLMBackbone",
]
