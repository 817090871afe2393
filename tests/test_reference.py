"""The reference: the policy that training started from, bit by bit, at as little cost as can be."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from callbacks.rollout import RolloutCallback
from modules.backbones.timm_lm import TimmLMBackbone
from modules.engine import Decoding, GroupSampler
from modules.lora import LoRA, adapted_layers
from modules.reference import ReferenceModule
from modules.replay import Replayer
from modules.rgrpo import Objective, RGRPOModule
from modules.scoring import collate, token_log_probs
from modules.sft import SFTModule
from modules.trajectory import SampleBatch, TrajectoryBatch
from tests.conftest import make_backbone, make_samples
from tests.fitting import Batches, fit, fresh, furthest, trainer, weights
from tests.learning import Wordiness
from tests.test_lora import scramble, with_lora

ADAM = partial(torch.optim.AdamW, lr=3e-3)
KL = Objective(beta=0.1, inner_epochs=2)
BOTH = ["language", "vision"]


def rollouts() -> RolloutCallback:
    return RolloutCallback(
        sampler=GroupSampler(4), rewards={"reward": Wordiness()}, decoding=Decoding(max_turns=3, max_turn_tokens=10)
    )


def rationales(backbone: TimmLMBackbone) -> TrajectoryBatch:
    """Four rationales with crops, packed."""
    return collate(backbone, Replayer(backbone)(make_samples(4))[0])


@torch.no_grad()
def score(backbone: TimmLMBackbone, batch: TrajectoryBatch) -> Tensor:
    return token_log_probs(backbone.eval(), batch, 10_000)[0]


class TestWithAdapters:
    @pytest.mark.parametrize("targets", [["language"], BOTH])
    def test_is_the_base_model_exactly(self, targets: list[str]) -> None:
        batch = rationales(make_backbone())
        base = score(make_backbone(), batch)
        backbone = with_lora(make_backbone(), targets=targets).eval()
        policy = score(backbone, batch)
        reference = ReferenceModule(backbone)
        assert float((policy - base).abs().max()) > 0.1
        for _ in range(2):
            assert torch.equal(reference(batch, 10_000), base)
            assert torch.equal(score(backbone, batch), policy)

    def test_adapters_are_on_again_after_a_failure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backbone = with_lora(make_backbone()).eval()
        batch = rationales(backbone)
        policy = score(backbone, batch)
        with monkeypatch.context() as patch:
            patch.setattr(backbone, "head", None)
            with pytest.raises(TypeError):
                ReferenceModule(backbone)(batch, 10_000)
        assert torch.equal(score(backbone, batch), policy)
        assert all(p.requires_grad for name, p in backbone.named_parameters() if ".lora_" in name)

    def test_features_of_an_adapted_tower_are_kept_from_it(self) -> None:
        """The two have features of their own of one and the same visual."""
        plain, backbone = make_backbone(), with_lora(make_backbone(), targets=["vision"]).eval()
        batch = rationales(plain)
        base, policy = score(plain, batch), score(backbone, batch)
        assert float((policy - base).abs().max()) > 0.01  # the same visuals, so that the tower matters
        reference = ReferenceModule(backbone)
        assert torch.equal(reference(batch, 10_000), base)
        assert torch.equal(score(backbone, batch), policy)
        assert len(backbone.encoded) == len(batch.visuals)  # the base tower does not change: what it makes is kept
        scramble(backbone, seed=3)
        assert not torch.equal(score(backbone, batch), policy)
        assert torch.equal(reference(batch, 10_000), base)

    def test_holds_and_saves_nothing(self, zooming: TimmLMBackbone, tmp_path: Path) -> None:
        module = RGRPOModule(fresh(zooming), optimizer=ADAM, objective=KL, lora=LoRA(rank=4, targets=BOTH))
        assert module.reference is not None
        assert module.reference.backbone is module.backbone
        assert not list(module.reference.parameters())
        assert {id(p) for p in module.parameters()} == {id(p) for p in module.backbone.parameters()}
        run = trainer(tmp_path, rollouts(), max_steps=2, max_epochs=-1)
        run.fit(module, Batches([SampleBatch(make_samples(2))]))
        run.save_checkpoint(tmp_path / "rgrpo.ckpt")
        state = torch.load(tmp_path / "rgrpo.ckpt", weights_only=True)["state_dict"]
        assert state.keys() == {f"backbone.{name}" for name in module.backbone.state_dict()}

    def test_does_not_change_while_the_policy_trains(self, zooming: TimmLMBackbone) -> None:
        batch = rationales(zooming)
        base = score(fresh(zooming), batch)
        module = RGRPOModule(fresh(zooming), optimizer=ADAM, objective=KL, lora=LoRA(rank=4, targets=BOTH))
        rows = fit(module, [SampleBatch(make_samples(4))], rollouts(), max_steps=6).rows
        assert module.reference is not None
        assert torch.equal(module.reference(batch, 10_000), base)
        assert float((score(module.backbone, batch) - base).abs().max()) > 0.01  # type: ignore[arg-type]
        assert rows[-1]["train/kl"] > 1e-4

    def test_is_the_policy_of_the_warm_up(self, tmp_path: Path) -> None:
        """SFT with adapters, then R-GRPO with new ones, with a rank of their own."""
        run = trainer(tmp_path, max_steps=3, max_epochs=-1)
        warm = SFTModule(make_backbone(), optimizer=ADAM, lora=LoRA(rank=4))
        run.fit(warm, Batches([SampleBatch(make_samples(2))]))
        run.save_checkpoint(tmp_path / "sft.ckpt")
        batch = rationales(make_backbone())
        before, after = score(make_backbone(), batch), score(warm.backbone, batch)  # type: ignore[arg-type]
        module = RGRPOModule(
            make_backbone(seed=9), init_from=str(tmp_path / "sft.ckpt"), objective=KL, lora=LoRA(rank=2, targets=BOTH)
        )
        scramble(module.backbone)
        assert module.reference is not None
        found = module.reference(batch, 10_000)
        assert float((found - after).abs().max()) < 1e-5
        assert float((found - before).abs().max()) > 0.01


class TestWithoutAdapters:
    def test_shares_what_is_frozen_and_copies_the_rest(self) -> None:
        module = RGRPOModule(make_backbone(), objective=KL, freeze=["vision", r"layers\.0\."])
        assert module.reference is not None
        assert not adapted_layers(module.reference.backbone)
        theirs = dict(module.reference.backbone.named_parameters())
        seen = {True: 0, False: 0}
        for name, p in module.backbone.named_parameters():
            frozen = name.startswith("vision") or "layers.0." in name
            seen[frozen] += 1
            assert p.requires_grad is not frozen
            assert (theirs[name].data_ptr() == p.data_ptr()) is frozen, name
            assert torch.equal(theirs[name], p)
            assert not theirs[name].requires_grad
        assert min(seen.values()) > 5

    def test_does_not_change_while_the_policy_trains(self, zooming: TimmLMBackbone) -> None:
        batch = rationales(zooming)
        base, start = score(fresh(zooming), batch), weights(zooming)
        module = RGRPOModule(fresh(zooming), optimizer=ADAM, objective=KL, freeze=["vision"])
        fit(module, [SampleBatch(make_samples(4))], rollouts(), max_steps=6)
        assert module.reference is not None
        assert furthest(weights(module.reference.backbone), start) == 0
        assert furthest(weights(module.backbone), start) > 1e-3
        assert torch.equal(module.reference(batch, 10_000), base)
        assert float((score(module.backbone, batch) - base).abs().max()) > 0.01  # type: ignore[arg-type]

    @pytest.mark.parametrize(("freeze", "times"), [(["vision", "projector"], 0), (["vision"], 1)])
    def test_a_frozen_tower_encodes_for_both(self, freeze: list[str], times: int) -> None:
        batch = rationales(make_backbone())
        module = RGRPOModule(make_backbone(), objective=KL, freeze=freeze)
        assert module.reference is not None
        base = score(module.backbone, batch)  # type: ignore[arg-type]
        calls: list[int] = []
        encode = module.reference.backbone.encode
        module.reference.backbone.encode = lambda visuals: calls.append(1) or encode(visuals)  # type: ignore
        assert torch.equal(module.reference(batch, 10_000), base)
        assert len(calls) == times

    def test_a_checkpoint_holds_shared_weights_once_and_is_resumed(
        self, zooming: TimmLMBackbone, tmp_path: Path
    ) -> None:
        sizes = {}
        for freeze in (["vision", "projector"], ["vision", "projector", "mlp", "self_attn"]):
            module = RGRPOModule(fresh(zooming), optimizer=torch.optim.SGD, objective=KL, freeze=freeze)
            run = trainer(tmp_path, rollouts(), max_steps=2, max_epochs=-1)
            run.fit(module, Batches([SampleBatch(make_samples(2))]))
            path = tmp_path / f"{len(freeze)}.ckpt"
            run.save_checkpoint(path)
            state = torch.load(path, weights_only=True)["state_dict"]
            sizes[len(freeze)] = len({t.data_ptr() for t in state.values()})
            frozen = sum(not p.requires_grad for p in module.backbone.parameters())
            assert sizes[len(freeze)] == len(state) - frozen
        assert sizes[4] < sizes[2]
        again = RGRPOModule(make_backbone(seed=9), optimizer=torch.optim.SGD, objective=KL, freeze=freeze)
        resumed = trainer(tmp_path, rollouts(), max_steps=2, max_epochs=-1)
        resumed.fit(again, Batches([SampleBatch(make_samples(2))]), ckpt_path=path)
        assert furthest(weights(again), weights(module)) == 0
