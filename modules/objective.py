"""What R-GRPO optimises, as a set of choices; `docs/method.md` has the formulas."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from modules.functional.advantages import Baseline
from modules.functional.kl import KLEstimator
from modules.functional.losses import Normalisation
from modules.functional.policy_gradient import RatioLevel, RatioTo


@dataclass(frozen=True)
class Objective:
    """What is optimised: VLM-R3 (arXiv 2505.16192), with the choices of GRPO (arXiv 2402.03300) and its successors.

    Args:
        scale_by_std: divide advantages by the standard deviation of their group (GRPO), or do not (Dr. GRPO, arXiv
            2503.20783).
        epsilon: added to that deviation.
        baseline: advantages are over the mean of the group (GRPO), or of its other members (RLOO, arXiv 2402.14740).
        credit: all tokens of a trajectory get its advantage, or what a turn reward pays a turn is left to that turn's
            tokens (`modules.functional.credit`).
        clip_low: how far the ratio may fall below 1 (PPO, arXiv 1707.06347).
        clip_high: how far it may rise above (apart from clip_low: DAPO, arXiv 2503.14476).
        ratio_to: denominator of the ratio: the sampler, or the reference (the formula of VLM-R3).
        ratio_level: one ratio for each token, or their geometric mean over a trajectory (GSPO, arXiv 2507.18071).
        beta: weight of the KL divergence from the reference.
        kl: its estimator (J. Schulman, "Approximating KL Divergence", 2020).
        kl_in: where it is a penalty: in the loss of each token (GRPO), or in the reward of a trajectory, summed over
            its sampled tokens (RLOO).
        unbiased_kl: weigh the estimate in the loss by the ratio, which makes the gradient that of the divergence
            (DeepSeek-V3.2, arXiv 2512.02556).
        sync_reference: the reference becomes the policy every so many optimizer steps (TR-DPO, arXiv 2404.09656);
            None: it stays what training started from.
        entropy_bonus: weight of the entropy of what is sampled from (A3C, arXiv 1602.01783).
        normalisation: the loss is a mean over sequences (GRPO) or tokens (DAPO), or a sum over a constant (Dr. GRPO).
        constant: with ``normalisation: constant``, tokens that a trajectory counts for.
        mask_truncated: trajectories that a limit ended carry no loss (DAPO's overlong filtering).
        truncation_penalty: what is taken off their reward (a constant in place of DAPO's soft overlong punishment).
        drop_zero_variance: leave out groups whose rewards are all the same (DAPO).
        min_spread: rewards that span no more than this count as the same; above the length reward's cap, ties in
            accuracy do not become full-size advantages.
        resample: batches that are rolled out at most for one step: other questions take the place of groups that were
            left out, until there are as many groups as a batch has questions (DAPO's dynamic sampling).
        sampler_correction: cap of the weights that make up for a sampler which computes otherwise than the learner
            (truncated importance sampling: F. Yao et al., "Your Efficient RL Framework Secretly Brings You
            Off-Policy RL Training", 2025); None: no such weights.
        inner_epochs: passes over the trajectories of an iteration (PPO).
        mini_batches: optimizer steps in each pass.
    """

    scale_by_std: bool = True
    epsilon: float = 1e-4
    baseline: Baseline = "mean"
    credit: Literal["trajectory", "turn"] = "trajectory"
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_to: RatioTo = "sampler"
    ratio_level: RatioLevel = "token"
    beta: float = 0.0
    kl: KLEstimator = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    unbiased_kl: bool = False
    sync_reference: int | None = None
    entropy_bonus: float = 0.0
    normalisation: Normalisation = "sequence"
    constant: int | None = None
    mask_truncated: bool = False
    truncation_penalty: float = 0.0
    drop_zero_variance: bool = True
    min_spread: float = 1e-6
    resample: int = 1
    sampler_correction: float | None = None
    inner_epochs: int = 1
    mini_batches: int = 1

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_that_all_act()

    @property
    def needs_reference(self) -> bool:
        """Whether anything uses the reference policy."""
        return self.beta > 0 or self.ratio_to == "reference"

    @property
    def reference_in_loss(self) -> bool:
        """Whether the loss does."""
        return self.ratio_to == "reference" or (self.beta > 0 and self.kl_in == "loss")

    @property
    def changes_rewards(self) -> bool:
        """Whether something is taken off the rewards before they are compared."""
        return self.truncation_penalty > 0 or (self.beta > 0 and self.kl_in == "reward")

    def _check_ranges(self) -> None:
        at_least_zero = (
            "epsilon",
            "clip_low",
            "clip_high",
            "beta",
            "entropy_bonus",
            "truncation_penalty",
            "min_spread",
        )
        lowest = dict.fromkeys(at_least_zero, 0) | dict.fromkeys(("resample", "inner_epochs", "mini_batches"), 1)
        for name, least in (lowest | {"sync_reference": 1, "constant": 1}).items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"Expected `objective.{name}` to be at least {least}, but got {value}.")
        if self.sampler_correction is not None and not self.sampler_correction > 0:
            raise ValueError(
                f"Expected `objective.sampler_correction` to be above 0, but got {self.sampler_correction}."
            )
        if self.normalisation == "constant" and self.constant is None:
            raise ValueError("Expected `objective.constant` to be given with `normalisation: constant`, but got None.")

    def _check_that_all_act(self) -> None:
        """Refuse what would be a setting without an effect."""
        takes = {
            "epsilon": (self.scale_by_std, "`scale_by_std: true`"),
            "credit": (
                self.ratio_level == "token",
                "`ratio_level: token` (a ratio over a trajectory hands the gradient of each token to all of them)",
            ),
            "kl": (self.needs_reference, "a `beta` above 0, or for its curve with `ratio_to: reference`"),
            "kl_in": (self.beta > 0, "a `beta` above 0"),
            "unbiased_kl": (
                self.beta > 0 and self.kl_in == "loss" and self.kl != "k2",
                "a `beta` above 0, `kl_in: loss`, and k1 or k3 for `kl` (the gradient of k2 is the divergence's own)",
            ),
            "sync_reference": (self.needs_reference, "a `beta` above 0 or `ratio_to: reference`"),
            "constant": (self.normalisation == "constant", "`normalisation: constant`"),
            "min_spread": (self.drop_zero_variance, "`drop_zero_variance: true`"),
            "resample": (
                self.drop_zero_variance and self.kl_in == "loss",
                "`drop_zero_variance: true` and `kl_in: loss` (with the divergence in rewards, hardly any are equal)",
            ),
            "sampler_correction": (self.ratio_to == "sampler", "`ratio_to: sampler`"),
        }
        defaults = {field.name: field.default for field in fields(self)}
        for name, (acts, what) in takes.items():
            if not acts and getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"Expected `objective.{name}` to be {defaults[name]!r}, but got {getattr(self, name)!r}, which "
                    f"acts only with {what}."
                )
        if self.kl == "k1" and self.beta > 0 and self.kl_in == "loss" and not self.unbiased_kl:
            raise ValueError(
                "Expected `objective.unbiased_kl: true` or `kl_in: reward` with `kl: k1`, but got neither: the "
                "gradient of k1 itself is zero on average (arXiv 2506.09477)."
            )


GRPO = Objective()
