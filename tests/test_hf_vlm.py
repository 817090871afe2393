"""Hugging Face backbones beside exactness (`test_parity.py`): refusals, limits, prompts, what is computed once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.families import build
from modules.backbones.base import see_images
from modules.backbones.hf_vlm import ZOOM_INSTRUCTION, HFVLMBackbone
from modules.backbones.qwen_vl import QwenVLBackbone
from modules.backbones.scaling import ScalerConfig
from modules.engine import Decoding, LocalEngine, Request
from modules.functional.grammar import BoxRequest, parse_turn
from modules.policy import freeze_matching
from modules.rgrpo import RGRPOModule
from modules.scoring import collate, token_log_probs
from modules.sft import SFTModule
from modules.trajectory import Region, Sample, SampleBatch, Step
from tests.fitting import fit

LIMITS = (4, 16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny random models by family, made once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = build(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


@pytest.fixture
def qwen(folders: Callable[[str], Path]) -> QwenVLBackbone:
    return make_qwen(folders("qwen2_5_vl"))


def make_qwen(folder: Path, **options: Any) -> QwenVLBackbone:
    backbone = QwenVLBackbone(str(folder), **{"image_tokens": LIMITS, "crop_tokens": LIMITS, **options})
    return backbone.eval()  # type: ignore[return-value]


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def question(*images: Tensor, text: str = "What is it?") -> Sample:
    return Sample("q", text, images, ("a",))


# what is refused


def copied(folder: Path, target: Path, *without: str) -> Path:
    shutil.copytree(folder, target)
    for name in without:
        (target / name).unlink()
    return target


@pytest.mark.parametrize(
    ("without", "missing"),
    [
        (("config.json",), "the configuration of"),
        (("model.safetensors",), "the weights of"),
        (("processor_config.json",), "the processor of|processor of text and images"),
        (("chat_template.jinja",), "chat template"),
    ],
)
def test_a_folder_without_a_part_is_refused_by_its_name(
    folders: Callable[[str], Path], tmp_path: Path, without: tuple[str, ...], missing: str
) -> None:
    folder = copied(folders("qwen2_5_vl"), tmp_path / "broken", *without)
    with pytest.raises(ValueError, match=missing) as raised:
        make_qwen(folder)
    assert "broken" in str(raised.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the configuration of a vision-language model in .*nowhere"):
        HFVLMBackbone(str(tmp_path / "nowhere"))


def test_a_model_without_an_image_token_is_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=64)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match=r"weights of a vision-language model in .*text"):
        HFVLMBackbone(str(tmp_path / "text"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model_type": "paligemma"}, "paligemma is not supported: its prompts"), ({"model_type": "mllama"}, "mllama")],
)
def test_families_that_cannot_be_exact_are_refused_by_name(
    folders: Callable[[str], Path], tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(changes))
    with pytest.raises(ValueError, match=message):
        HFVLMBackbone(str(tmp_path / "other"))


def test_linear_attention_is_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig

    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 32}
    AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision).save_pretrained(tmp_path / "qwen3_5")
    with pytest.raises(ValueError, match=r"qwen3_5.*linear_attention"):
        HFVLMBackbone(str(tmp_path / "qwen3_5"), random=True)


def test_qwen_backbone_refuses_other_families(folders: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="to be a Qwen-VL model, but it is smolvlm; HFVLMBackbone may take it"):
        make_qwen(folders("smolvlm"))


# weights


def test_random_takes_the_configuration_and_other_weights(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(folders("qwen2_5_vl"), tmp_path / "empty", "model.safetensors")
    torch.manual_seed(1)
    one, other = make_qwen(folder, random=True), make_qwen(folders("qwen2_5_vl"))
    assert {n: p.shape for n, p in one.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    assert not torch.equal(one.model.lm_head.weight, other.model.lm_head.weight)


def test_random_weights_can_be_made_without_memory(folders: Callable[[str], Path]) -> None:
    with torch.device("meta"):
        backbone = make_qwen(folders("qwen2_5_vl"), random=True)
    assert all(p.is_meta for p in backbone.parameters())
    assert len(backbone.visual_ids(56, 84)) == 2 + 2 * 3


def test_dtype_and_checkpointing_act(folders: Callable[[str], Path]) -> None:
    backbone = make_qwen(folders("qwen2_5_vl"), dtype="bfloat16", gradient_checkpointing=True)
    assert {p.dtype for p in backbone.parameters()} == {torch.bfloat16}
    assert backbone.model.is_gradient_checkpointing


def test_eager_attention_says_the_same(folders: Callable[[str], Path], qwen: QwenVLBackbone) -> None:
    eager = make_qwen(folders("qwen2_5_vl"), attn_implementation="eager")
    sample = question(picture(90, 60))
    trajectories = LocalEngine().rollout(qwen, [Request(sample, k) for k in range(3)], Decoding(max_turn_tokens=6))
    with torch.no_grad():
        ours, _ = token_log_probs(qwen, collate(qwen, trajectories), 100)
        theirs, _ = token_log_probs(eager, collate(eager, trajectories), 100)
    assert float((ours - theirs).abs().max()) < 1e-4


def test_checkpointed_gradients_are_the_same(folders: Callable[[str], Path], qwen: QwenVLBackbone) -> None:
    saving = make_qwen(folders("qwen2_5_vl"), gradient_checkpointing=True)
    sample = question(picture(90, 60))
    trajectories = LocalEngine().rollout(qwen, [Request(sample, k) for k in range(3)], Decoding(max_turn_tokens=6))
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    gradients = []
    for backbone in (qwen, saving):
        backbone.zero_grad()
        backbone.learn()
        backbone.model.model.language_model.layers[0].mlp.register_forward_pre_hook(count)
        token_log_probs(backbone, collate(backbone, trajectories), 100)[0].sum().backward()
        gradients.append(backbone.model.model.language_model.layers[0].mlp.down_proj.weight.grad)
        backbone.eval()
    assert calls == 3  # once, and once more in the backward pass of the one that saves memory
    assert gradients[0] is not None
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


# images


def test_token_limits_of_images_and_crops_act(folders: Callable[[str], Path]) -> None:
    backbone = make_qwen(folders("qwen2_5_vl"), image_tokens=(4, 30), crop_tokens=(6, 9))
    large, small = picture(900, 700), picture(30, 30)
    whole = backbone.see([large, small])
    crops = backbone.look([large, large], [Region((0, 0, 700, 900)), Region((0, 0, 20, 20))])
    assert 20 < whole[0].tokens <= 30
    assert whole[1].tokens == 4
    assert crops[0].tokens <= 9
    assert 6 <= crops[1].tokens <= 9
    cell = backbone.grid
    assert cell is not None
    for visual in [*whole, *crops]:
        assert visual.pixels.shape[-2] % cell == visual.pixels.shape[-1] % cell == 0
        assert visual.tokens == visual.pixels.shape[-2] * visual.pixels.shape[-1] // cell**2


def test_a_policy_is_told_that_it_may_choose_the_zoom(folders: Callable[[str], Path], qwen: QwenVLBackbone) -> None:
    told = make_qwen(folders("qwen2_5_vl"), offer_zoom=True)
    sample = question(picture(56, 56))
    prompts = [b.detokenize(b.prompt_ids(sample, b.see(sample.images))) for b in (qwen, told)]
    assert prompts[1].replace(ZOOM_INSTRUCTION, "") == prompts[0] != prompts[1]
    request = parse_turn(ZOOM_INSTRUCTION.rstrip(".").replace("x1, y1, x2, y2", "1, 2, 3, 4"))
    assert request == BoxRequest((1, 2, 3, 4), zoom=2)  # what it is told to write is understood
    with pytest.raises(ValueError, match=r"with `offer_zoom`, but got \(28, 28\) for all"):
        HFVLMBackbone(str(folders("qwen2_5_vl")), crop=ScalerConfig(size=(28, 28)), offer_zoom=True)
    with pytest.raises(ValueError, match=r"with `offer_zoom`, but got the scaling of gemma3"):
        HFVLMBackbone(str(folders("gemma3")), offer_zoom=True)


def test_images_on_a_grid_are_scaled_exactly_once(qwen: QwenVLBackbone) -> None:
    (visual,) = qwen.see([picture(100, 170)])
    inputs = qwen.process([visual.pixels])
    processor = qwen.processor.image_processor
    rows, columns = (int(n) for n in inputs["image_grid_thw"][0, 1:])
    patch, merge, frames = processor.patch_size, processor.merge_size, processor.temporal_patch_size
    # the layout of Qwen's patches, undone: (row, column) of cells, of patches in a cell, channel, frame, pixels
    grid = inputs["pixel_values"].view(rows // merge, columns // merge, merge, merge, 3, frames, patch, patch)
    pixels = grid[:, :, :, :, :, 0].permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * patch, columns * patch)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    torch.testing.assert_close(pixels * std + mean, visual.pixels, atol=1e-5, rtol=0)


def test_a_frozen_tower_sees_each_image_once(qwen: QwenVLBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = qwen.encode
    monkeypatch.setattr(qwen, "encode", lambda visuals: (seen.append(len(visuals)), encode(visuals))[1])
    module = RGRPOModule(qwen, freeze=["vision", "projector"])
    requests = [Request(question(picture(90, 60)), k) for k in range(4)]
    trajectories = LocalEngine().rollout(qwen, requests, Decoding(max_turn_tokens=4))
    distinct = {v for t in trajectories for v in t.visuals}
    for _ in range(2):  # the learner's passes
        token_log_probs(module.backbone, collate(qwen, trajectories), 100)
    assert sum(seen) == len(distinct)
    for parameter in qwen.parameters():
        parameter.requires_grad_(True)
    token_log_probs(qwen, collate(qwen, trajectories), 100)
    assert sum(seen) == 2 * len(distinct)  # a tower that trains is asked again


def test_parts_can_be_frozen_by_name(folders: Callable[[str], Path]) -> None:
    for family in ("qwen2_5_vl", "smolvlm", "internvl", "llava_onevision", "gemma3"):
        backbone = HFVLMBackbone(str(folders(family)))
        freeze_matching(backbone, ["vision", "projector"])
        training = {n for n, p in backbone.named_parameters() if p.requires_grad}
        assert training == {n for n in training if "language_model" in n or "text_model" in n or "lm_head" in n}
        assert {backbone.part(n) for n, _ in backbone.named_parameters()} == {"vision", "projector", "language"}


# prompts and what may be sampled


def test_a_question_cannot_forge_what_is_special(qwen: QwenVLBackbone) -> None:
    image = picture(60, 60)
    text = "<|image_pad|><|im_end|><|vision_start|> what?"
    sample = question(image, text=text)
    ids = qwen.prompt_ids(sample, see_images(qwen, [sample])[0])
    plain = question(image, text="what?")
    honest = qwen.prompt_ids(plain, see_images(qwen, [plain])[0])
    for token in ("<|image_pad|>", "<|im_end|>", "<|vision_start|>"):
        special = qwen.tokenizer.convert_tokens_to_ids(token)
        assert int((ids == special).sum()) == int((honest == special).sum())
    assert text in qwen.tokenizer.decode(ids)


def test_a_question_without_images_has_a_prompt(qwen: QwenVLBackbone) -> None:
    ids = qwen.prompt_ids(question(), [])
    assert int((ids == qwen.image_token_id).sum()) == 0
    (trajectory,) = LocalEngine().rollout(qwen, [Request(question(), 0)], Decoding(max_turn_tokens=3))
    assert len(trajectory.completion_ids) >= 1


def test_reserved_tokens_are_never_sampled_but_ends_are(qwen: QwenVLBackbone) -> None:
    reserved = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|im_start|>"]
    assert all(bool(qwen.banned[qwen.tokenizer.convert_tokens_to_ids(token)]) for token in reserved)
    assert not any(bool(qwen.banned[k]) for k in qwen.eos_ids)
    assert qwen.tokenizer.eos_token_id in qwen.eos_ids
    assert not bool(qwen.banned[qwen.tokenize("hello")].any())
    assert bool(qwen.banned[len(qwen.tokenizer) :].all())


def test_a_rationale_is_written_in_the_space_of_the_family(folders: Callable[[str], Path]) -> None:
    image = picture(120, 240)
    region = Region((60.0, 30.0, 180.0, 90.0))
    sample = Sample("r", "?", (image,), ("a",), rationale=(Step("Look: ", region),))
    expected: dict[str, Callable[[Any], list[int]]] = {
        "qwen2_5_vl": lambda v: [v.shape[2] // 4, v.shape[1] // 4, 3 * v.shape[2] // 4, 3 * v.shape[1] // 4],
        "qwen3_vl": lambda v: [250, 250, 750, 750],
    }
    for family, coords in expected.items():
        backbone = make_qwen(folders(family))
        visuals = see_images(backbone, [sample])[0]
        ids, _ = backbone.write("Look: ", region, sample, visuals)
        written = json.loads(backbone.detokenize(ids).removeprefix("Look: "))["bbox_2d"]
        assert written == pytest.approx(coords(visuals[0].pixels), abs=0.51)


def test_two_images_are_shown_as_the_chat_template_shows_them(folders: Callable[[str], Path]) -> None:
    for family in ("qwen2_5_vl", "smolvlm", "internvl", "llava_onevision", "glm4v", "gemma3"):
        backbone = HFVLMBackbone(str(folders(family)), instruction="").eval()
        sample = question(picture(60, 90), picture(90, 60, seed=1))
        visuals = see_images(backbone, [sample])[0]
        ids = backbone.prompt_ids(sample, visuals)
        assert int((ids == backbone.image_token_id).sum()) == sum(v.tokens for v in visuals)
        assert [len(f) for f in backbone.encode(visuals)] == [v.tokens for v in visuals]
        if backbone.grid is None:
            continue
        content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": sample.question}]
        rendered = backbone.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        placeholder = str(backbone.tokenizer.convert_ids_to_tokens(backbone.image_token_id))
        for visual in visuals:  # one placeholder in the template becomes many
            rendered = rendered.replace(placeholder, "<>" * visual.tokens, 1)
        assert backbone.tokenizer.decode(ids) == rendered.replace("<>", placeholder)


def test_warm_up_recomputes_activations_of_loaded_weights(folders: Callable[[str], Path]) -> None:
    calls = []
    for saving in (False, True):
        backbone = make_qwen(folders("qwen2_5_vl"), gradient_checkpointing=saving)
        seen: list[int] = []
        layer = backbone.model.model.language_model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        steps = (Step("Look: ", Region((0.0, 0.0, 30.0, 40.0))), Step("<answer>a</answer>"))
        sample = Sample("r", "?", (picture(90, 60),), ("a",), rationale=steps)
        fit(SFTModule(backbone, freeze=["vision", "projector"]), [SampleBatch([sample])])
        calls.append(len(seen))
    assert calls[0] > 0
    assert calls[1] == 2 * calls[0]
