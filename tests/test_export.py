"""Export: what Hugging Face and peft load from the folder is the policy; what cannot be exported is refused."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import train
from benchmarks.families import build
from callbacks.export import Export
from commands.cli import cli
from modules.backbones.qwen_vl import QwenVLBackbone
from modules.export import ExportError, export_policy
from modules.lora import LoRA, add_lora
from modules.policy import PolicyModule
from modules.replay import Replayer
from modules.scoring import collate
from modules.sft import SFTModule
from modules.trajectory import SampleBatch, Trajectory
from tests.conftest import make_backbone, make_samples
from tests.fitting import Batches, trainer
from tests.test_lora import scramble

CONFIG = """\
vars: {{base: {base}}}
model:
  class_path: SFTModule
  init_args:
    backbone:
      class_path: QwenVLBackbone
      init_args:
        model: ${{vars.base}}
        image_tokens: [4, 16]
        crop_tokens: [4, 16]
    lora: {{rank: 4, alpha: 8, targets: [language, vision]}}
    optimizer:
      class_path: torch.optim.AdamW
      init_args: {{lr: 0.02}}
data:
  class_path: tests.test_export.Rationales
trainer:
  accelerator: cpu
  max_steps: 2
  limit_val_batches: 0
  num_sanity_val_steps: 0
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks+:
    class_path: Export
"""


class Rationales(Batches):
    """Two rationales with a crop each."""

    def __init__(self) -> None:
        super().__init__([SampleBatch(make_samples(2))])


@dataclass(frozen=True)
class Run:
    """What a fit with adapters has left, and what its policy says."""

    base: Path  # the model that it started from
    config: Path
    folder: Path
    backbone: QwenVLBackbone
    trajectory: Trajectory
    logits: Tensor  # (L, V) of the policy, by its own pass
    before: Tensor  # the same of the model that it started from

    @property
    def checkpoint(self) -> str:
        return str(self.folder / "last.ckpt")

    def native(self, model: Any) -> Tensor:
        """(L, V) of the trajectory by Hugging Face's own forward."""
        ids = torch.cat([self.trajectory.prompt_ids, self.trajectory.completion_ids])[None]
        seen = [self.backbone.process([v.pixels]) for v in self.trajectory.visuals]
        with torch.no_grad():
            logits: Tensor = model(
                input_ids=ids,
                mm_token_type_ids=(ids == self.backbone.image_token_id).long(),
                pixel_values=torch.cat([x["pixel_values"] for x in seen]),
                image_grid_thw=torch.cat([x["image_grid_thw"] for x in seen]),
            ).logits
        return logits[0]

    def gap(self, model: Any) -> float:
        return float((self.native(model.eval()) - self.logits).abs().max())


@torch.no_grad()
def tiny(family: str, folder: Path) -> Path:
    """A random model whose attention is less sharp: what float32 rounds away in a layer stays below 1e-5 at the end."""
    model = load(build(family, folder))
    for name, p in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "attn.qkv.weight")):
            p.mul_(0.25)
        if name.endswith("lm_head.weight"):
            p.mul_(0.5)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def own_logits(backbone: QwenVLBackbone, trajectory: Trajectory) -> Tensor:
    return backbone.head(backbone.eval().hidden_states(collate(backbone, [trajectory])))[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("export")
    base = tiny("qwen2_5_vl", root / "base")
    config = root / "sft.yaml"
    config.write_text(CONFIG.format(base=base))
    made = cli(["fit", f"--config={config}", f"--run_dir={root / 'run'}"])
    assert isinstance(made.model, PolicyModule)
    backbone = made.model.backbone
    assert isinstance(backbone, QwenVLBackbone)
    (trajectory, _), _ = Replayer(backbone)(make_samples(2))
    assert len(trajectory.visuals) == 2
    start = QwenVLBackbone(str(base))
    return Run(
        base,
        config,
        root / "run",
        backbone,
        trajectory,
        own_logits(backbone, trajectory),
        own_logits(start, trajectory),
    )


def load(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder)


def names(folder: Path, file: str = "model.safetensors") -> set[str]:
    with safe_open(folder / file, "pt") as weights:
        return set(weights.keys())


def base_of(folder: Path) -> str | None:
    base: str | None = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    return base


def export(run: Run, output: Path, *more: str) -> None:
    train.main(["export", f"--ckpt_path={run.checkpoint}", f"--output={output}", *more])


def test_hugging_face_loads_the_policy(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "exported"
    export(run, output)
    assert f"written to {output}" in capsys.readouterr().out
    assert run.gap(load(output)) < 1e-5
    assert float((run.logits - run.before).abs().max()) > 0.1
    assert run.gap(load(run.base)) > 0.1
    assert names(output) == names(run.base)
    theirs, ours = AutoProcessor.from_pretrained(output), AutoProcessor.from_pretrained(run.base)
    assert theirs.chat_template == ours.chat_template
    text = "<|im_start|>user\n<|vision_start|>What's 7 + 8?<|im_end|>"
    assert theirs.tokenizer(text)["input_ids"] == ours.tokenizer(text)["input_ids"]
    assert theirs.image_processor.to_dict() == ours.image_processor.to_dict()
    again = QwenVLBackbone(str(output))  # and it is a backbone's `model`
    assert float((own_logits(again, run.trajectory) - run.logits).abs().max()) < 1e-5


def test_peft_loads_the_adapters(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(run, tmp_path / "adapter", "--lora=adapter")
    assert "base of these adapters" not in capsys.readouterr().out
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        run.base
    )
    assert run.gap(PeftModel.from_pretrained(load(run.base), tmp_path / "adapter")) < 1e-5
    AutoProcessor.from_pretrained(tmp_path / "adapter")
    assert run.gap(load(tmp_path / "adapter")) < 1e-5  # transformers finds the base by itself


def test_the_callback_leaves_the_same_folder(run: Run, tmp_path: Path) -> None:
    export(run, tmp_path / "exported")
    assert names(run.folder / "export") == names(tmp_path / "exported")
    assert run.gap(load(run.folder / "export")) < 1e-5
    assert {p.name for p in (run.folder / "export").iterdir()} == {p.name for p in (tmp_path / "exported").iterdir()}


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("rank", [0, 4])
def test_tied_embeddings_and_other_families(family: str, rank: int, tmp_path: Path) -> None:
    backbone = QwenVLBackbone(str(tiny(family, tmp_path / "base")))
    lora = LoRA(rank=rank, alpha=8, targets=["language", "vision", "projector"])
    if rank:
        add_lora(backbone, lora)
        scramble(backbone)
    else:
        with torch.no_grad():
            backbone.model.get_output_embeddings().weight.add_(0.1)
    (trajectory,), _ = Replayer(backbone)(make_samples(1))
    expected = own_logits(backbone, trajectory)
    export_policy(backbone, backbone.state_dict(), lora, tmp_path / "exported", "merged")
    assert names(tmp_path / "exported") == names(tmp_path / "base")
    ids = torch.cat([trajectory.prompt_ids, trajectory.completion_ids])
    found = QwenVLBackbone(str(tmp_path / "exported")).native_logits(ids, trajectory.visuals)
    assert float((found - expected).abs().max()) < 1e-5
    found = QwenVLBackbone(str(tmp_path / "base")).native_logits(ids, trajectory.visuals)
    assert float((found - expected).abs().max()) > 0.1


def test_another_export_takes_the_place_of_the_first(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "exported"
    output.mkdir()  # empty is as good as new
    export(run, output, "--lora=adapter")
    (output / "notes.txt").write_text("mine")
    export(run, output)
    left = {p.name for p in output.iterdir()}
    assert {"notes.txt", "model.safetensors", "vlm_r3_export.json"} <= left
    assert not left & {"adapter_model.safetensors", "adapter_config.json"}
    assert run.gap(load(output)) < 1e-5
    assert os.listdir(tmp_path) == ["exported"]


def test_a_failed_export_leaves_the_last_one_whole(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "exported"
    export(run, output)
    before = {p.name: p.read_bytes() for p in output.iterdir()}

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(run.backbone.processor, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        export_policy(run.backbone, run.backbone.state_dict(), LoRA(rank=4, alpha=8), output, "merged")
    assert {p.name: p.read_bytes() for p in output.iterdir()} == before
    assert os.listdir(tmp_path) == ["exported"]


def test_adapters_of_a_run_that_began_elsewhere_have_another_base(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """R-GRPO's adapters go on the merged policy of the warm-up, not on the model that this one started from."""
    backbone = QwenVLBackbone(str(run.base), image_tokens=(4, 16), crop_tokens=(4, 16))
    module = SFTModule(backbone, init_from=run.checkpoint, lora=LoRA(rank=2))
    scramble(backbone)
    fit = trainer(tmp_path / "fit", max_steps=1)
    fit.fit(module, Rationales())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    config = OmegaConf.load(run.config)
    OmegaConf.update(config, "model.init_args.init_from", run.checkpoint)
    OmegaConf.save(config, tmp_path / "config.yaml")
    logits = own_logits(backbone, run.trajectory)
    capsys.readouterr()
    train.main(["export", f"--ckpt_path={tmp_path / 'last.ckpt'}", f"--output={tmp_path / 'a'}", "--lora=adapter"])
    assert f"the base of these adapters is the policy of {run.checkpoint}" in capsys.readouterr().out
    assert base_of(tmp_path / "a") is None
    export(run, tmp_path / "base")
    right, wrong = (PeftModel.from_pretrained(load(b), tmp_path / "a") for b in (tmp_path / "base", run.base))
    assert float((run.native(right.eval()) - logits).abs().max()) < 1e-5
    assert float((run.native(wrong.eval()) - logits).abs().max()) > 0.1


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run what must be refused; what it says, a line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(["export", *args])
    said = [line for line in capsys.readouterr().err.splitlines() if line and "Loading weights" not in line]
    assert stop.value.code == 2
    assert len(said) == 1
    assert said[0].startswith("error: ")
    return said[0]


def test_a_checkpoint_that_is_none_is_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = f"--output={tmp_path / 'exported'}"
    assert "`ckpt_path` to be a checkpoint, but there is no file 'none.ckpt'" in refused(
        ["--ckpt_path=none.ckpt", output], capsys
    )
    said = refused([f"--ckpt_path={run.config}", output], capsys)
    assert "sft.yaml' to be a training checkpoint, but reading it fails" in said
    assert not (tmp_path / "exported").exists()


def test_the_configuration_is_needed(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved, empty = tmp_path / "moved.ckpt", tmp_path / "empty"
    empty.mkdir()
    os.link(run.checkpoint, moved)
    args = [f"--ckpt_path={moved}", f"--output={tmp_path / 'exported'}"]
    assert "config.yaml', but there is no such file beside the checkpoint; name it with --config" in refused(
        args, capsys
    )
    assert "none.yaml', but there is no such file" in refused([*args, "--config=none.yaml"], capsys)
    for text, said in (
        ("model: {init_args: {backbone: [}", "to be the configuration of a run"),
        ("model: {init_args: {backbone: '${vars.base}'}}", "'vars.base' not found"),
        ("data: {}", "to hold `model.init_args.backbone`"),
        ("model: {init_args: {backbone: {class_path: QwenVL}}}", "unknown class 'QwenVL'"),
        (
            f"model: {{init_args: {{backbone: {{class_path: QwenVLBackbone, init_args: {{model: {empty}}}}}}}}}",
            f"in '{empty}'",
        ),
    ):
        (tmp_path / "wrong.yaml").write_text(text)
        assert said in refused([*args, f"--config={tmp_path / 'wrong.yaml'}"], capsys), text
    train.main(["export", *args, f"--config={run.config}"])
    assert run.gap(load(tmp_path / "exported")) < 1e-5


def test_the_checkpoint_of_another_backbone_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = build("qwen2_vl", tmp_path / "qwen2_vl")
    config = tmp_path / "other.yaml"
    config.write_text(CONFIG.format(base=other))
    for form in ("merged", "adapter"):
        args = [f"--ckpt_path={run.checkpoint}", f"--output={tmp_path / 'exported'}", f"--config={config}"]
        assert "to hold the weights of this backbone, but" in refused([*args, f"--lora={form}"], capsys)


def test_a_folder_of_somebody_else_is_left_alone(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    checkpoint = f"--ckpt_path={run.checkpoint}"
    said = refused([checkpoint, f"--output={tmp_path}"], capsys)
    assert "to be new, empty or an earlier export, but it holds other files, such as 'thesis.tex'" in said
    assert os.listdir(tmp_path) == ["thesis.tex"]
    assert "is a file" in refused([checkpoint, f"--output={tmp_path / 'thesis.tex'}"], capsys)


def test_what_has_no_adapters_has_none_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plain.ckpt"
    run = trainer(tmp_path, max_steps=1)
    run.fit(SFTModule(make_backbone()), Batches([SampleBatch(make_samples(1))]))
    run.save_checkpoint(path)
    said = refused([f"--ckpt_path={path}", f"--output={tmp_path / 'exported'}", "--lora=adapter"], capsys)
    assert "a policy with adapters for `lora` 'adapter', but it was trained without" in said


def test_the_callback_says_before_training_what_cannot_be(tmp_path: Path) -> None:
    module = SFTModule(make_backbone())
    with pytest.raises(ExportError, match=r"is one Hugging Face model, .* but got TimmLMBackbone"):
        trainer(tmp_path, Export(), max_steps=1).fit(module, Rationales())
    assert module.global_step == 0


def test_the_callback_looks_at_adapters_and_folder(run: Run, tmp_path: Path) -> None:
    fake: Any = SimpleNamespace(default_root_dir=str(tmp_path))
    plain, adapted = SFTModule(run.backbone), SFTModule(run.backbone)
    adapted.lora = LoRA(rank=4)
    (tmp_path / "thesis.tex").write_text("mine")
    Export(lora="adapter").setup(fake, adapted, "fit")
    with pytest.raises(ExportError, match="trained without"):
        Export(lora="adapter").setup(fake, plain, "fit")
    with pytest.raises(ExportError, match="holds other files"):
        Export(folder=str(tmp_path)).setup(fake, plain, "fit")
    Export(folder=str(tmp_path)).setup(fake, plain, "test")


def test_only_the_first_rank_writes(run: Run, tmp_path: Path) -> None:
    module = SFTModule(run.backbone)
    strategy = SimpleNamespace(lightning_module_state_dict=module.state_dict)
    fake: Any = SimpleNamespace(default_root_dir=str(tmp_path), strategy=strategy, is_global_zero=False)
    Export(folder=str(tmp_path / "x")).on_fit_end(fake, module)
    assert not (tmp_path / "x").exists()
