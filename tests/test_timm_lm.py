"""`TimmLMBackbone` as a whole: parts freeze one by one, YAML names them, prompts and boxes are as they should be."""

from __future__ import annotations

import logging
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from tokenizers import processors
from torch import nn

from modules.backbones.base import Backbone
from modules.backbones.fragments import FragmentVocabulary
from modules.backbones.timm_lm import TokenizerConfig
from modules.engine import Decoding, LocalEngine, Request
from modules.policy import freeze_matching
from modules.replay import Replayer
from modules.scoring import collate, token_log_probs
from modules.trajectory import Region, Sample, Step
from tests.conftest import FRAGMENTS, make_samples
from tests.timm_parts import LLAMA, VIT, build, learner_log_probs, native_log_probs, written


def test_parts_freeze_one_by_one() -> None:
    for part in ("vision", "projector", "language"):
        backbone = build()
        freeze_matching(backbone, [part])
        token_log_probs(backbone, collate(backbone, written(backbone)), chunk=100)[0].sum().backward()
        without = {backbone.part(name) for name, p in backbone.named_parameters() if p.grad is None}
        trained = {backbone.part(name) for name, p in backbone.named_parameters() if p.grad is not None}
        assert without == {part}
        assert trained == {"vision", "projector", "language"} - {part}


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
