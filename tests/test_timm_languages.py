"""Language models of every kind in `TimmLMBackbone`: exact in rows and in rollouts, recomputed, refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from modules.backbones import timm_lm
from modules.backbones.masks import layer_masks
from modules.backbones.timm_lm import LanguageConfig, TimmLMBackbone, TokenizerConfig
from modules.scoring import collate, token_log_probs
from modules.trajectory import Trajectory
from tests.timm_parts import LANGUAGES, LLAMA, build, learner_log_probs, native_log_probs, rolled_out, written


@pytest.mark.parametrize("name", LANGUAGES)
def test_language_models_are_exact_in_rows_and_in_rollouts(name: str) -> None:
    """Packed rows with crops, and rollouts with a cache, against the model's own forward with its own masks."""
    backbone = build(language=LANGUAGES[name], attention="eager" if name == "gemma2" else "sdpa")
    replayed = written(backbone)
    packed = learner_log_probs(backbone, replayed)
    native = torch.cat([native_log_probs(backbone, t) for t in replayed])
    assert len(packed) == len(native) > 20
    assert native.std() > 0.3
    assert (packed - native).abs().max() < 1e-4
    sampled = rolled_out(backbone)
    recorded = torch.cat([t.log_probs[t.sampled] for t in sampled])
    assert (recorded - torch.cat([native_log_probs(backbone, t) for t in sampled])).abs().max() < 1e-4
    assert (recorded - learner_log_probs(backbone, sampled)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_a_window_that_is_left_out_would_be_noticed(name: str) -> None:
    backbone = build(language=LANGUAGES[name], attention="eager" if name == "gemma2" else "sdpa")
    replayed = written(backbone)
    native = torch.cat([native_log_probs(backbone, t) for t in replayed])
    everything = lambda mask, *_: torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -1e30)  # noqa: E731
    with patch.object(timm_lm, "layer_masks", everything):
        assert (learner_log_probs(backbone, replayed) - native).abs().max() > 0.1


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "cohere", "granite"])
def test_plain_logits_would_be_noticed(name: str) -> None:
    attention = "eager" if name == "gemma2" else "sdpa"
    backbone = build(language=LANGUAGES[name], attention=attention)
    replayed = written(backbone)
    native = torch.cat([native_log_probs(backbone, t) for t in replayed])
    with patch.object(timm_lm, "cap_logits", lambda logits, _: logits):
        assert (learner_log_probs(backbone, replayed) - native).abs().max() > 0.1
        with pytest.raises(ValueError, match=f"token by token and in one pass, but those of '{name}'"):
            build(language=LANGUAGES[name], attention=attention)


def test_eager_attention_equals_sdpa_and_needs_numbers() -> None:
    replayed = written(build())
    eager, sdpa = build(attention="eager"), build()
    expected = learner_log_probs(sdpa, replayed)
    assert (learner_log_probs(eager, replayed) - expected).abs().max() < 1e-5
    with patch.object(timm_lm, "layer_masks", lambda mask, *_: mask):
        assert (learner_log_probs(eager, replayed) - expected).abs().max() > 0.1


def test_windows_are_counted_in_positions_not_in_places_of_a_row() -> None:
    """The second completion of a packed row is as near to the prefix as the first; a cached key stands in its slot."""
    config = build(language=LANGUAGES["mistral"]).text_config
    config.sliding_window = 3
    positions = torch.tensor([[0, 1, 2, 3, 2, 3]])  # a prefix of two, two completions of two
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    masked = layer_masks(mask, positions, config, torch.float32)
    assert isinstance(masked, Tensor)
    assert masked[0, 0, 5].tolist() == [False, True, True, True, True, True]
    later = layer_masks(torch.ones(1, 1, 1, 6, dtype=torch.bool), torch.tensor([[4]]), config, torch.float32)
    assert isinstance(later, Tensor)
    assert later[0, 0, 0].tolist() == [False, False, True, True, True, True]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]},
            "'qwen3_next' has layers",
        ),
        ({"model_type": "llama4_text", "layer_types": ["chunked_attention"] * 2}, "'llama4_text' has layers .*chunked"),
        ({"model_type": "mamba", "state_size": 4}, "'mamba'"),
        ({"model_type": "rwkv", "attention_hidden_size": 32}, "'rwkv'"),
        ({"model_type": "bert"}, "token by token and in one pass, but those of 'bert'"),
        ({"model_type": "bloom", "n_layer": 1, "n_head": 2}, "a cache, but 'bloom' fails"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_language_models_that_are_not_exact_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(language={**LLAMA, **config}, attention="eager", context_length=64)


def test_a_folder_without_a_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`language.name` to name .*" + tmp_path.name):
        timm_lm.build_language(LanguageConfig(name=str(tmp_path)), 10)
    build().language.config.save_pretrained(tmp_path)  # a configuration, no weights
    with pytest.raises(ValueError, match=r"`language.name` to name .*" + tmp_path.name):
        timm_lm.build_language(LanguageConfig(name=str(tmp_path)), 10)
    with pytest.raises(ValueError, match=r"`tokenizer.name` to name .*" + tmp_path.name):
        build(tokenizer=TokenizerConfig(name=str(tmp_path / "none")))


def gradients(backbone: TimmLMBackbone, trajectories: list[Trajectory]) -> dict[str, Tensor]:
    backbone.zero_grad()
    backbone.learn()
    token_log_probs(backbone, collate(backbone, trajectories), chunk=100)[0].sum().backward()
    return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text"])
def test_checkpointing_recomputes_activations_and_changes_no_gradient(name: str) -> None:
    plain, saving = (build(language=LANGUAGES[name], checkpointing=c) for c in (False, True))
    trajectories = written(plain)
    calls: list[str] = []
    for backbone, label in ((plain, "plain"), (saving, "saving")):
        backbone.language.base_model.layers[1].mlp.register_forward_pre_hook(
            lambda *_, label=label: calls.append(label)
        )
    expected, got = gradients(plain, trajectories), gradients(saving, trajectories)
    assert calls == ["plain", "saving", "saving"]
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert (value - got[name]).abs().max() <= 1e-5 * max(1.0, float(value.abs().max())), name


def test_checkpointing_leaves_rollouts_their_cache() -> None:
    plain, saving = rolled_out(build()), rolled_out(build(checkpointing=True))
    assert [t.text for t in plain] == [t.text for t in saving]
    assert all(torch.equal(a.log_probs, b.log_probs) for a, b in zip(plain, saving, strict=True))


def test_weights_of_the_language_model_have_the_type_that_is_asked_for() -> None:
    backbone, exact = build(dtype="bfloat16"), build()
    assert {p.dtype for p in backbone.language.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in (*backbone.vision.parameters(), *backbone.projector.parameters())} == {torch.float32}
    trajectories = written(backbone)
    difference = (learner_log_probs(backbone, trajectories) - learner_log_probs(exact, trajectories)).abs()
    assert 0 < difference.mean() < 0.1
    sampled = rolled_out(backbone)
    recorded = torch.cat([t.log_probs[t.sampled] for t in sampled])
    assert (recorded - learner_log_probs(backbone, sampled)).abs().mean() < 0.1
