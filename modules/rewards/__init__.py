"""Rewards: named objects, each with a weight and a gate, swapped by config and logged alone."""

from modules.rewards.accuracy import Accuracy
from modules.rewards.base import RESERVED, Reward, check_failures, check_gates, score
from modules.rewards.information import InformationGain, Integration
from modules.rewards.judge import Judge
from modules.rewards.regions import CropCost, IoU, RegionValidity
from modules.rewards.text import Format, Length, Repetition
from modules.rewards.turns import TurnReward, credited_by_turn, score_turns

__all__ = [
    "RESERVED",
    "Accuracy",
    "CropCost",
    "Format",
    "InformationGain",
    "Integration",
    "IoU",
    "Judge",
    "Length",
    "RegionValidity",
    "Repetition",
    "Reward",
    "TurnReward",
    "check_failures",
    "check_gates",
    "credited_by_turn",
    "score",
    "score_turns",
]
