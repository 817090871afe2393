"""Encoders and language models of every kind in `TimmLMBackbone`: in the right order, exact, and trained by part."""

from __future__ import annotations

import logging
import string
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
from jsonargparse import ArgumentParser
from tokenizers import processors
from torch import Tensor, nn
from torch.nn import functional as F

from modules.backbones import timm_lm
from modules.backbones.base import Backbone
from modules.backbones.fragments import FragmentVocabulary
from modules.backbones.masks import layer_masks
from modules.backbones.projectors import ProjectorConfig, pixel_shuffle
from modules.backbones.scaling import ScalerConfig
from modules.backbones.timm_lm import LanguageConfig, TimmLMBackbone, TokenizerConfig, VisionConfig
from modules.engine import Decoding, LocalEngine, Request
from modules.policy import freeze_matching
from modules.replay import Replayer
from modules.scoring import collate, token_log_probs
from modules.trajectory import Region, Sample, Step, Trajectory, Visual
from tests.conftest import FRAGMENTS, make_samples

VIT = {"embed_dim": 48, "depth": 1, "num_heads": 4, "dynamic_img_size": True}
STAGES = {"depths": [1, 1, 1, 1]}
SWIN = {**STAGES, "embed_dim": 12, "num_heads": [1, 2, 3, 4], "strict_img_size": False}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "vit without class token": ("vit_tiny_patch16_224", {**VIT, "class_token": False, "global_pool": ""}),
    "vit averaged": ("vit_little_patch16_reg4_gap_256", VIT),
    "siglip": ("vit_base_patch16_siglip_224", VIT),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", VIT),
    "dinov3": ("vit_small_patch16_dinov3", {**VIT, "embed_dim": 64}),
    "convnext": ("convnext_tiny", {**STAGES, "dims": [8, 16, 24, 32]}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "resnet": ("resnet10t", {}),
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
WINDOW = 6  # shorter than any sequence here
MIXED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3}
GEMMA = {"sliding_window": WINDOW, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
LANGUAGES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": {"model_type": "gpt2", **GPT2},  # learned positions
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {**LLAMA, "model_type": "qwen2", **MIXED},
    "qwen3": {**LLAMA, "model_type": "qwen3", **MIXED},
    "gemma2": {**LLAMA, "model_type": "gemma2", **GEMMA, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**LLAMA, "model_type": "gemma3_text", **GEMMA, "sliding_window_pattern": 2},
    "cohere": {**LLAMA, "model_type": "cohere", "logit_scale": 4.0},
    "granite": {**LLAMA, "model_type": "granite", "logits_scaling": 0.5},
}


def build(
    vision: VisionConfig | None = None,
    language: dict[str, Any] | None = None,
    scaler: ScalerConfig | None = None,
    tokenizer: TokenizerConfig | None = None,
    seed: int = 0,
    attention: Any = "sdpa",
    dtype: Any = "float32",
    checkpointing: bool = False,
    **options: Any,
) -> TimmLMBackbone:
    torch.manual_seed(seed)
    scaler = scaler or ScalerConfig((32, 48))
    vocabulary = FragmentVocabulary(FRAGMENTS, coordinates=17, step=4)
    backbone = TimmLMBackbone(
        vision or VisionConfig("vit_tiny_patch16_224", options={**VIT, "embed_dim": 32}),
        LanguageConfig(
            config=language or LLAMA, attn_implementation=attention, dtype=dtype, gradient_checkpointing=checkpointing
        ),
        tokenizer or TokenizerConfig(vocabulary=vocabulary),
        image=scaler,
        crop=scaler,
        **options,
    )
    return backbone.eval()


def encoder(family: str) -> VisionConfig:
    name, options = ENCODERS[family]
    return VisionConfig(name, options=options)


def written(backbone: TimmLMBackbone, count: int = 3) -> list[Trajectory]:
    """Rationales with a crop each."""
    trajectories, skipped = Replayer(backbone)(make_samples(count))
    assert not skipped
    return trajectories


def places(backbone: TimmLMBackbone, rows: int, columns: int) -> list[int]:
    """For each cell of an image of ``rows`` x ``columns`` of them: the token that changes most when the cell does."""
    side = backbone.cell
    pixels = torch.rand(3, rows * side, columns * side, generator=torch.Generator().manual_seed(0))
    visuals = [Visual(pixels, rows * columns)]
    for k in range(rows * columns):
        top, left = k // columns * side, k % columns * side
        other = pixels.clone()
        other[:, top : top + side, left : left + side] = 1 - other[:, top : top + side, left : left + side]
        visuals.append(Visual(other, rows * columns))
    with torch.no_grad():
        first, *others = backbone.encode(visuals)
    assert len(first) == rows * columns
    return [int((features - first).norm(dim=-1).argmax()) for features in others]


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_give_a_token_a_patch_in_row_major_order_at_any_size(family: str) -> None:
    backbone = build(encoder(family), scaler=ScalerConfig(min_pixels=64 * 64, max_pixels=112 * 112))
    image = make_samples(1)[0].images[0]
    for shape in ((64, 40), (30, 64)):
        (visual,) = backbone.see([image[:, : shape[0], : shape[1]]])
        (features,) = backbone.encode([visual])
        height, width = visual.pixels.shape[-2:]
        assert (height > width) == (shape[0] > shape[1])
        assert visual.tokens == len(backbone.visual_ids(height, width)) == height * width // backbone.patch**2
        assert len(features) == visual.tokens
    assert places(backbone, 2, 3) == list(range(6))
    assert places(backbone, 3, 2) == list(range(6))


@pytest.mark.parametrize("family", ENCODERS)
def test_what_is_not_frozen_is_trained(family: str) -> None:
    """Parameters without a gradient stall data-parallel ranks, and weight decay would act on them alone."""
    backbone = build(encoder(family), scaler=ScalerConfig((84, 168)) if "v2" in family else ScalerConfig((64, 96)))
    log_probs, _ = token_log_probs(backbone, collate(backbone, written(backbone)), chunk=100)
    log_probs.sum().backward()
    assert [name for name, p in backbone.named_parameters() if p.requires_grad != (p.grad is not None)] == []
    frozen = {name.split(".")[1] for name, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"siglip": {"attn_pool"}, "vit averaged": {"fc_norm"}, "convnext": {"head"}}.get(family, set())


def test_parts_freeze_one_by_one() -> None:
    for part in ("vision", "projector", "language"):
        backbone = build()
        freeze_matching(backbone, [part])
        token_log_probs(backbone, collate(backbone, written(backbone)), chunk=100)[0].sum().backward()
        without = {backbone.part(name) for name, p in backbone.named_parameters() if p.grad is None}
        trained = {backbone.part(name) for name, p in backbone.named_parameters() if p.grad is not None}
        assert without == {part}
        assert trained == {"vision", "projector", "language"} - {part}


def test_pretrained_weights_are_loaded_heads_and_all(tmp_path: Path) -> None:
    """A folder as the hub has them, with the attention pool that is not used here."""
    torch.manual_seed(5)
    options = {k: v for k, v in VIT.items() if k != "dynamic_img_size"}
    source = timm.create_model("vit_base_patch16_siglip_224", num_classes=7, **options)
    timm.models.save_for_hf(source, tmp_path, model_args=options)
    vision = VisionConfig(f"local-dir:{tmp_path}", pretrained=True, options={"dynamic_img_size": True})
    loaded = build(vision).vision.state_dict()
    assert len(loaded) == len(source.state_dict()) - 2  # the classifier
    for name, value in loaded.items():
        assert torch.equal(value, source.state_dict()[name]), name
    random = build(VisionConfig(f"local-dir:{tmp_path}", options={"dynamic_img_size": True})).vision.state_dict()
    assert not torch.equal(random["blocks.0.attn.qkv.weight"], loaded["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("vision", "scaler", "message"),
    [
        (VisionConfig("vit_tinny"), None, r"`vision.name` to name .* 'vit_tinny': .*Unknown model"),
        (VisionConfig("vit_tiny_patch16_224", options={"depht": 1}), None, "'depht'"),
        (VisionConfig("local-dir:/none", pretrained=True), None, r"`vision.name` .*'local-dir:/none'"),
        (VisionConfig("vit_tiny_patch16_224", options={"depth": 1}), None, "of an image of 32 x 48 .*dynamic_img_size"),
        (VisionConfig("pit_ti_224"), ScalerConfig((224, 224)), "'pit_ti_224' to make . x . features .* it gives 1"),
        (
            VisionConfig("vit_tiny_patch16_224", options=VIT),
            ScalerConfig((32, 40)),
            r"`image.size` .* 16, .*\(32, 40\)",
        ),
    ],
    ids=["name", "option", "folder", "fixed size", "pooled", "off the grid"],
)
def test_encoders_that_cannot_be_used_are_refused(
    vision: VisionConfig, scaler: ScalerConfig | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(vision, scaler=scaler)


def normal(logits: Tensor, backbone: TimmLMBackbone) -> Tensor:
    return logits.masked_fill(backbone.banned, -torch.inf).log_softmax(-1)


def native_log_probs(backbone: TimmLMBackbone, trajectory: Trajectory) -> Tensor:
    """(sampled tokens,) by the language model's own forward over this trajectory alone."""
    ids = torch.cat([trajectory.prompt_ids, trajectory.completion_ids])
    log_probs = normal(backbone.native_logits(ids, trajectory.visuals).float(), backbone)[:-1]
    own = log_probs[torch.arange(len(ids) - 1), ids[1:]][len(trajectory.prompt_ids) - 1 :]
    return own[trajectory.sampled]


def learner_log_probs(backbone: TimmLMBackbone, trajectories: list[Trajectory]) -> Tensor:
    with torch.no_grad():
        return token_log_probs(backbone, collate(backbone, trajectories), chunk=50)[0]


def rolled_out(backbone: TimmLMBackbone) -> list[Trajectory]:
    requests = [Request(sample, seed) for sample in make_samples(2) for seed in range(3)]
    decoding = Decoding(max_turn_tokens=12, max_turns=2)
    return LocalEngine().rollout(backbone, requests, decoding)


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


def test_pixel_shuffle_is_torchs() -> None:
    maps = torch.randn(2, 5, 4, 6)
    shuffled = pixel_shuffle(maps.flatten(2).transpose(1, 2), 4, 6, 2)
    expected = F.pixel_unshuffle(maps, 2).unflatten(1, (5, 4)).transpose(1, 2).flatten(1, 2)  # theirs: channels first
    assert torch.equal(shuffled, expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_pixel_shuffle_makes_fewer_tokens_of_a_coarser_grid(family: str) -> None:
    scaler = ScalerConfig(min_pixels=64 * 64, max_pixels=160 * 160)
    plain = build(encoder(family), scaler=scaler)
    backbone = build(encoder(family), scaler=scaler, projector=ProjectorConfig("pixel_shuffle", 2))
    assert backbone.cell == 2 * backbone.patch == 2 * plain.cell
    (visual,) = backbone.see([make_samples(1)[0].images[0][:, :40]])
    height, width = visual.pixels.shape[-2:]
    assert height % backbone.cell == width % backbone.cell == 0
    assert visual.tokens == len(backbone.visual_ids(height, width)) == height * width // backbone.cell**2
    assert 4 * visual.tokens == len(plain.visual_ids(height, width))
    assert places(backbone, 2, 3) == list(range(6))
    trajectories = written(backbone)
    native = torch.cat([native_log_probs(backbone, t) for t in trajectories])
    assert (learner_log_probs(backbone, trajectories) - native).abs().max() < 1e-4
    backbone.encode([visual])[0].sum().backward()
    assert all(p.grad is not None for p in backbone.projector.parameters())


@pytest.mark.parametrize(("kind", "ratio"), [("pixel_shuffle", None), ("pixel_shuffle", 1), ("mlp", 2)])
def test_ratios_that_do_not_fit_the_projector_are_refused(kind: Any, ratio: int | None) -> None:
    with pytest.raises(ValueError, match=r"`projector.ratio`"):
        ProjectorConfig(kind, ratio)


@pytest.mark.parametrize(
    ("given", "layers", "ratio"),
    [
        ({}, 1, 1),
        ({"projector": {"kind": "mlp"}}, 3, 1),
        ({"projector": {"kind": "linear"}}, 1, 1),
        ({"projector": {"kind": "pixel_shuffle", "ratio": 2}}, 3, 2),
    ],
)
def test_projectors_are_named_in_yaml(given: dict[str, Any], layers: int, ratio: int) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Backbone, "backbone")
    options = {
        "vision": {"name": "vit_tiny_patch16_224", "options": VIT},
        "language": {"config": LLAMA, "gradient_checkpointing": True},
        "tokenizer": {"vocabulary": {"fragments": FRAGMENTS}},
        "image": {"size": [32, 32]},
        "crop": {"size": [32, 64]},
        **given,
    }
    parsed = parser.parse_object({"backbone": {"class_path": "TimmLMBackbone", "init_args": options}})
    backbone = parser.instantiate(parsed).backbone
    assert len([*backbone.projector]) == layers if isinstance(backbone.projector, nn.Sequential) else layers == 1
    assert backbone.ratio == ratio
    assert backbone.language.base_model.layers[0].gradient_checkpointing


def test_a_text_without_image_goes_all_the_way() -> None:
    backbone = build()
    sample = Sample(
        "text", "Which digit is on the red card?", rationale=(Step("I can read it now.</think><answer>7</answer>"),)
    )
    assert backbone.prompt_ids(sample, ()).tolist() == backbone.tokenize(sample.question).tolist()
    mixed = [sample, *make_samples(1)]
    trajectories, skipped = Replayer(backbone)(mixed)
    assert not skipped
    assert [len(t.visuals) for t in trajectories] == [0, 2]
    sampled = LocalEngine().rollout(backbone, [Request(s, 0) for s in mixed], Decoding(max_turn_tokens=8, max_turns=2))
    assert not sampled[0].visuals
    for made in (trajectories, sampled):
        native = torch.cat([native_log_probs(backbone, t) for t in made])
        assert (learner_log_probs(backbone, made) - native).abs().max() < 1e-4


def test_a_question_that_cannot_be_read_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    backbone = build()
    known, *strange = [Sample(str(k), text) for k, text in enumerate(("red card?", "Which bird?", "Which tree?"))]
    with caplog.at_level(logging.WARNING):
        backbone.prompt_ids(known, ())
        assert not caplog.records
        LocalEngine().rollout(backbone, [Request(s, 0) for s in strange], Decoding(max_turn_tokens=2))
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.endswith("'Which bird?'")


@pytest.mark.parametrize(
    ("space", "text"),
    [("unit", "[0.156, 0.125, 0.594, 0.953]"), ("thousand", "[156, 125, 594, 953]"), ("pixels", "[10, 8, 38, 61]")],
)
def test_boxes_in_digits_are_as_fine_as_their_space(space: Any, text: str, tmp_path: Path) -> None:
    letters = TokenizerConfig(vocabulary=FragmentVocabulary(list(string.printable)))
    build(tokenizer=letters).tokenizer.save_pretrained(tmp_path)
    backbone = build(tokenizer=TokenizerConfig(str(tmp_path)), box_space=space)
    sample = make_samples(1)[0]
    ids, coordinates = backbone.write("", Region((10.0, 8.0, 38.0, 61.0)), sample, backbone.see(sample.images))
    assert backbone.detokenize(ids) == f'{{"bbox_2d": {text}}}'
    assert coordinates.isnan().all()


def test_a_prompt_begins_as_the_tokenizer_begins_texts(tmp_path: Path) -> None:
    tokenizer = build().tokenizer
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<tool>"]})
    begin, tool = tokenizer.convert_tokens_to_ids(["<s>", "<tool>"])
    begins = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    tokenizer._tokenizer.post_processor = begins
    tokenizer.save_pretrained(tmp_path)
    backbone = build(tokenizer=TokenizerConfig(str(tmp_path)))
    sample = make_samples(1)[0]
    ids = backbone.prompt_ids(sample, backbone.see(sample.images)).tolist()
    assert ids[:2] == [begin, backbone.image_token_id]
    assert ids.count(begin) == 1
    assert begin not in backbone.write("red ", None, sample, ())[0]
    assert bool(backbone.banned[[begin, tool, backbone.image_token_id]].all())
    assert not bool(backbone.banned[tokenizer.eos_token_id])
