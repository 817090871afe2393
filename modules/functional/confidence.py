"""How sure a policy was of its answer."""

from __future__ import annotations

import math

from modules.functional.kinds import Detokenize, token_kinds
from modules.trajectory import Trajectory


def confidence(trajectory: Trajectory, detokenize: Detokenize) -> float | None:
    """The probability of the answer's tokens, given all before them; None where no tags hold an answer.

    It is of the distribution that ``trajectory.log_probs`` are of: at the temperature of the rollout, at 1 if greedy,
    over all tokens that are not banned. Other wordings of the same answer are not counted in: a long answer has a small
    one.
    """
    answer = token_kinds(trajectory, detokenize)["answer"]
    return math.exp(float(trajectory.log_probs[answer].double().sum())) if bool(answer.any()) else None
