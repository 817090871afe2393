"""Adapters: where they are, that only they train, what they compute, and what becomes of them in checkpoints."""

from __future__ import annotations

import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.families import build
from modules.backbones.qwen_vl import QwenVLBackbone
from modules.backbones.timm_lm import TimmLMBackbone
from modules.lora import LoRA, adapted_layers, add_lora, merge_lora, without_lora
from modules.policy import PolicyError
from modules.replay import Replayer
from modules.scoring import collate, token_log_probs
from modules.sft import SFTModule
from modules.trajectory import SampleBatch
from tests.conftest import make_backbone, make_samples
from tests.fitting import Batches, fit, furthest, trainer, weights

ADAM = partial(torch.optim.AdamW, lr=3e-3)
LAYERS = {
    f"language.model.layers.{layer}.{name}"
    for layer in range(2)
    for name in (
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
    )
}
TOWER = {f"vision.blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}


def adapted_names(module: nn.Module) -> set[str]:
    end = ".lora_A.default.weight"
    return {name.removesuffix(end) for name, _ in module.named_parameters() if name.endswith(end)}


def scramble(module: nn.Module, seed: int = 0) -> None:
    """Adapters as after long training: they are zero at first."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if ".lora_B." in name:
            p.data.normal_(0, 0.1, generator=generator)


def with_lora(backbone: TimmLMBackbone, **options: Any) -> TimmLMBackbone:
    """The backbone with adapters that do something."""
    add_lora(backbone, LoRA(**{"rank": 4, "alpha": 8, **options}))
    scramble(backbone)
    return backbone


def scores(backbone: TimmLMBackbone) -> Tensor:
    """(T,) log-probabilities of everything that is written in four rationales with crops."""
    backbone.learn()
    with torch.no_grad():
        return token_log_probs(backbone, collate(backbone, Replayer(backbone)(make_samples(4))[0]), 10_000)[0]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["language"], LAYERS),
        (["vision"], TOWER),
        (["projector"], {"projector"}),
        (["vision", "language"], LAYERS | TOWER),
        ([r"q_proj|v_proj"], {name for name in LAYERS if name.endswith(("q_proj", "v_proj"))}),
        (["down_proj", r"layers\.1\.self_attn"], {n for n in LAYERS if "1.self_attn" in n or "down_proj" in n}),
    ],
)
def test_targets_are_parts_or_names(targets: list[str], expected: set[str]) -> None:
    backbone = make_backbone()
    add_lora(backbone, LoRA(rank=2, targets=targets))
    assert adapted_names(backbone) == expected
    assert LoRA().targets == ["language"]


@pytest.mark.parametrize("target", ["q_prj", "lm_head", "embed_tokens", "norm"])
def test_a_target_without_linear_layers_is_refused(target: str) -> None:
    said = (
        rf"`lora.targets` '{target}' to be one of .* but their names end in \['down_proj', .*'v_proj'\], such as \['vis"
    )
    with pytest.raises(ValueError, match=said):
        SFTModule(make_backbone(), lora=LoRA(rank=2, targets=["language", target]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": -1}, "`lora.rank` to be at least 0, but got -1"),
        ({"rank": 1, "alpha": 0}, "`lora.alpha` to be above 0, but got 0"),
        ({"rank": 1, "dropout": 1.0}, r"`lora.dropout` to be in \[0, 1\), but got 1.0"),
        ({"rank": 1, "targets": []}, "`lora.targets` to name a part"),
    ],
)
def test_senseless_values_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LoRA(**options)


def test_without_peft_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    SFTModule(make_backbone())
    with pytest.raises(ValueError, match=r"peft to be installed.*pip install 'vlm-r3\[lora\]'"):
        SFTModule(make_backbone(), lora=LoRA(rank=2))


def test_adapters_are_nothing_at_first_and_can_be_switched_off() -> None:
    backbone = make_backbone()
    before = scores(backbone)
    add_lora(backbone, LoRA(rank=4))
    assert torch.equal(scores(backbone), before)
    scramble(backbone)
    after = scores(backbone)
    assert float((after - before).abs().max()) > 0.1
    with without_lora(backbone):
        assert torch.equal(scores(backbone), before)
    assert torch.equal(scores(backbone), after)


@pytest.mark.parametrize(("rank", "alpha"), [(2, 16), (4, 8)])
def test_a_layer_computes_what_the_paper_says(rank: int, alpha: int) -> None:
    backbone = with_lora(make_backbone(), rank=rank, alpha=alpha, targets=["projector"])
    layer: Any = backbone.projector
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (a.shape, b.shape) == ((rank, 16), (32, rank))
    x = torch.randn(3, 16)
    expected = x @ layer.base_layer.weight.T + layer.base_layer.bias + alpha / rank * (x @ a.T @ b.T)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert float((layer(x) - layer.base_layer(x)).detach().abs().max()) > 0.1


def test_every_parameter_is_still_of_its_part() -> None:
    plain = make_backbone()
    parts = {name: plain.part(name) for name, _ in plain.named_parameters()}
    wrapped = with_lora(plain, targets=["vision", "projector", "language"])
    for name, _ in wrapped.named_parameters():
        layer = name.split(".lora_")[0]
        own = name.replace(".base_layer", "") if layer == name else f"{layer}.weight"
        assert wrapped.part(name) == parts[own], name


def test_only_adapters_train() -> None:
    module = SFTModule(make_backbone(), optimizer=ADAM, lora=LoRA(rank=4), freeze=["vision", "projector"])
    before = weights(module.backbone)
    fit(module, [SampleBatch(make_samples(4))], max_steps=2)
    moved = {name for name, p in module.backbone.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"{layer}.lora_{x}.default.weight" for layer in LAYERS for x in "AB"}
    optimized = [p for group in module.trainer.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in optimized} == {id(p) for name, p in module.backbone.named_parameters() if ".lora_" in name}


def test_warm_up_learns_with_adapters() -> None:
    module = SFTModule(make_backbone(), optimizer=partial(torch.optim.AdamW, lr=1e-2), lora=LoRA(rank=8))
    rows = fit(module, [SampleBatch(make_samples(4))], max_steps=25).rows
    assert rows[-1]["train/loss"] < 0.5 * rows[0]["train/loss"]


@pytest.mark.parametrize("pattern", ["language", "lora_A", "q_proj"])
def test_frozen_adapters_are_refused(pattern: str) -> None:
    with pytest.raises(PolicyError, match=rf"`lora.targets` alone, but '{pattern}' matches 'language.*\.lora_A"):
        SFTModule(make_backbone(), lora=LoRA(rank=2), freeze=[pattern])


def test_dropout_acts_in_warm_up_only() -> None:
    losses = {}
    for dropout in (0.0, 0.5):
        torch.manual_seed(0)
        backbone = with_lora(make_backbone(), dropout=dropout)
        backbone.train()
        batch = collate(backbone, Replayer(backbone)(make_samples(2))[0])
        passes = [token_log_probs(backbone, batch, 10_000)[0].detach() for _ in range(2)]
        losses[dropout] = float((passes[0] - passes[1]).abs().max())
        assert torch.equal(scores(backbone), scores(backbone))
    assert losses[0.0] == 0
    assert losses[0.5] > 0.01


def test_adapters_of_half_precision_weights_are_full() -> None:
    backbone = with_lora(make_backbone().bfloat16())
    assert {p.dtype for name, p in backbone.named_parameters() if ".lora_" in name} == {torch.float32}
    assert {p.dtype for name, p in backbone.named_parameters() if ".lora_" not in name} == {torch.bfloat16}
    hidden = backbone.embed(torch.tensor([[3, 4]]))
    assert adapted_layers(backbone)[0](hidden).dtype == torch.bfloat16
    merged = merge_lora(backbone.state_dict(), 2.0)
    assert merged["language.model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("targets", [["language"], ["language", "vision", "projector"]])
def test_merged_weights_compute_the_same(targets: list[str]) -> None:
    backbone = with_lora(make_backbone(), targets=targets)
    before, after = scores(make_backbone()), scores(backbone)
    plain = make_backbone(seed=5)
    plain.load_state_dict(merge_lora(backbone.state_dict(), LoRA(rank=4, alpha=8).scaling))
    assert float((scores(plain) - after).abs().max()) < 1e-5
    assert float((after - before).abs().max()) > 0.1
    for layer in adapted_layers(backbone):
        layer.merge()  # as peft does it
    theirs = {name.replace(".base_layer", ""): p for name, p in weights(backbone).items() if ".lora_" not in name}
    assert furthest(weights(plain), theirs) < 1e-6


def save(module: SFTModule, path: Path, steps: int = 2, ckpt_path: str | None = None) -> str:
    """A checkpoint of this module after so many steps."""
    run = trainer(path.parent, max_steps=steps, max_epochs=-1)
    run.fit(module, Batches([SampleBatch(make_samples(2))]), ckpt_path=ckpt_path)
    run.save_checkpoint(path)
    return str(path)


def adapted_module(**options: Any) -> SFTModule:
    lora = {"rank": 4, "alpha": 8, **options}
    return SFTModule(make_backbone(seed=1), optimizer=ADAM, lora=LoRA(**lora))


def test_a_run_with_adapters_goes_on_where_it_stopped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = adapted_module()
    again = copy.deepcopy(module)
    scramble(again, seed=7)
    save(module, tmp_path / "whole.ckpt", steps=4)
    torch.manual_seed(0)
    half = save(adapted_module(), tmp_path / "half.ckpt", steps=2)
    assert torch.load(half, weights_only=True)["lora"] == {
        "rank": 4,
        "alpha": 8,
        "dropout": 0.0,
        "targets": ["language"],
    }
    save(again, tmp_path / "again.ckpt", steps=4, ckpt_path=half)
    assert furthest(weights(again.backbone), weights(module.backbone)) == 0


@pytest.mark.parametrize("options", [{"alpha": 16}, {"rank": 2}, {"targets": ["q_proj"]}, {"rank": 0}])
def test_a_run_does_not_go_on_with_other_adapters(tmp_path: Path, options: dict[str, Any]) -> None:
    path = save(adapted_module(), tmp_path / "lora.ckpt")
    with pytest.raises(PolicyError, match=r"`ckpt_path` to be of a run with the adapters of this one.*'alpha': 8"):
        save(adapted_module(**options), tmp_path / "other.ckpt", steps=4, ckpt_path=path)


def test_init_from_merges_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = adapted_module()
    scramble(source.backbone)
    path = save(source, tmp_path / "lora.ckpt")
    after = scores(source.backbone)
    fresh_adapters = SFTModule(make_backbone(seed=2), init_from=path, lora=LoRA(rank=2, targets=["vision"]))
    monkeypatch.setitem(sys.modules, "peft", None)  # merging is arithmetic
    plain = SFTModule(make_backbone(seed=3), init_from=path)
    assert not adapted_layers(plain.backbone)
    assert float((scores(plain.backbone) - after).abs().max()) < 1e-5
    assert torch.equal(scores(fresh_adapters.backbone), scores(plain.backbone))
    assert float((scores(make_backbone(seed=1)) - after).abs().max()) > 0.1


def test_init_from_another_backbones_adapters_is_refused(tmp_path: Path) -> None:
    path = save(adapted_module(), tmp_path / "lora.ckpt")
    with pytest.raises(
        PolicyError, match=r"lora.ckpt' to hold the weights of this backbone, but \d+ tensors.*layers.2"
    ):
        SFTModule(make_backbone(layers=3), init_from=path)


def test_adapters_learn_through_recomputed_layers(tmp_path: Path) -> None:
    """Nothing that enters the language model has a gradient: recomputing must not depend on it."""
    folder, limits = str(build("qwen2_5_vl", tmp_path)), (4, 16)
    gradients = []
    for recompute in (False, True):
        backbone = QwenVLBackbone(folder, image_tokens=limits, crop_tokens=limits, gradient_checkpointing=recompute)
        add_lora(backbone, LoRA(rank=2))
        scramble(backbone)
        torch.manual_seed(0)
        for name, p in backbone.named_parameters():
            if ".lora_A." in name:
                p.data.normal_()
        backbone.learn()
        batch = collate(backbone, Replayer(backbone)(make_samples(2))[0])
        token_log_probs(backbone, batch, 10_000)[0].mean().backward()
        gradients.append({name: p.grad for name, p in backbone.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 2 * 14
    assert min(float(g.abs().max()) for g in gradients[0].values()) > 1e-4
    assert furthest(*gradients) < 1e-6
