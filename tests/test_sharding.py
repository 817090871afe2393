"""Strategies that nobody has run this project with are refused; runs of the others are in ``distributed``."""

from __future__ import annotations

import pytest
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy

from modules.errors import PolicyError
from modules.sft import SFTModule
from modules.sharding import gathered, shard
from tests.conftest import make_backbone


def test_a_strategy_that_was_not_tried_is_refused_in_a_sentence() -> None:
    with pytest.raises(PolicyError, match=r"to be auto, ddp or ModelParallelStrategy, .* but got FSDPStrategy; docs/"):
        shard(SFTModule(make_backbone()), FSDPStrategy())


def test_weights_of_one_process_stay_as_they_are() -> None:
    module = SFTModule(make_backbone())
    before = list(module.parameters())
    shard(module, SingleDeviceStrategy("cpu"))
    with gathered(module):
        assert all(a is b for a, b in zip(before, module.parameters(), strict=True))
