"""Weights of other types than float32 (`trainer.precision`): batches are left alone, steps are those of float32."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from callbacks.rollout import RolloutCallback
from modules.engine import Decoding, GroupSampler
from modules.policy import PolicyModule
from modules.rgrpo import RGRPOModule
from modules.sft import SFTModule
from modules.trajectory import SampleBatch
from tests.conftest import make_backbone, make_samples
from tests.fitting import fit, furthest, weights
from tests.learning import ADAM, LIMITS, Wordiness

pytestmark = pytest.mark.filterwarnings("ignore")


def trained(kind: type[PolicyModule], precision: str) -> tuple[PolicyModule, list[dict[str, float]]]:
    """A policy after two batches, and what was logged."""
    module = kind(make_backbone(), optimizer=ADAM)
    rollout: Any = RolloutCallback(
        sampler=GroupSampler(4), rewards={"reward": Wordiness()}, decoding=Decoding(1.0, **LIMITS)
    )
    callbacks: list[L.Callback] = [rollout] if kind is RGRPOModule else []
    return module, fit(module, [SampleBatch(make_samples(2))] * 2, *callbacks, precision=precision).rows


@pytest.mark.parametrize("kind", [SFTModule, RGRPOModule])
@pytest.mark.parametrize(
    ("precision", "dtype", "bound"), [("64-true", torch.float64, 1e-5), ("bf16-true", torch.bfloat16, 0.1)]
)
def test_a_step_is_that_of_float32(kind: type[PolicyModule], precision: str, dtype: torch.dtype, bound: float) -> None:
    _, expected = trained(kind, "32-true")
    module, rows = trained(kind, precision)
    assert {p.dtype for p in module.backbone.parameters()} == {dtype}
    assert rows[0]["train/grad_norm"] == pytest.approx(expected[0]["train/grad_norm"], rel=bound)
    assert rows[0]["train/loss"] == pytest.approx(expected[0]["train/loss"], rel=bound, abs=0.01)
    assert module.trainer.global_step == 2


@pytest.mark.parametrize("scale", [4.0, 4096.0])
def test_a_scaled_loss_is_clipped_and_told_as_it_is(scale: float) -> None:
    """``16-mixed``: until the step, gradients are as many times too large."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    ends = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", scaler=scaler)]):
        module = SFTModule(make_backbone(), optimizer=partial(torch.optim.SGD, lr=0.1), clip_norm=1.0)
        rows = fit(module, [SampleBatch(make_samples(2))], plugins=plugins).rows
        ends.append((rows[0]["train/grad_norm"], weights(module)))
    assert ends[1][0] == pytest.approx(ends[0][0], rel=0.01)
    assert ends[0][0] > 10  # clipped
    assert furthest(ends[0][1], ends[1][1]) < 1e-3
