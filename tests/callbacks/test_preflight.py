"""What a run says and refuses before it starts, through real fits on real files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image, ImageFile
from torch import Tensor

from callbacks.preflight import Preflight, image_size, look_at, rollouts
from callbacks.rollout import RolloutCallback
from commands.cli import cli
from datamodules.images import load_image
from datamodules.module import VLIRDataModule
from datamodules.vlir.schema import to_row
from modules.backbones.cache import RaggedCache
from modules.backbones.timm_lm import ScalerConfig, TimmLMBackbone
from modules.engine import Decoding, GroupSampler, LocalEngine
from modules.policy import PolicyError
from modules.replay import Replayer
from modules.rewards import Format
from modules.rgrpo import Objective, RGRPOModule
from modules.sft import SFTModule
from modules.trajectory import SampleBatch
from tests import cli_stand_ins  # noqa: F401  classes that its configuration names
from tests.cli_stand_ins import CONFIG
from tests.conftest import make_backbone, make_samples
from tests.fitting import Batches, trainer

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = ((64, 64), (48, 80), (160, 120))  # (height, width)
ROLLOUT: dict[str, Any] = {
    "sampler": GroupSampler(2),
    "rewards": {"format": Format()},
    "decoding": Decoding(max_turns=3, max_turn_tokens=6),
    "evaluations": {"greedy": Decoding(0.0, max_turns=2, max_turn_tokens=5)},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests write predictions where they run."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write_data(tmp_path: Path) -> Callable[..., str]:
    """Write a VLIR file of questions with rationales about images of the given sizes; returns its path."""

    def write(sizes: tuple[tuple[int, int], ...] = SIZES, name: str = "data") -> str:
        lines = []
        for k, (sample, (height, width)) in enumerate(zip(make_samples(len(sizes)), sizes, strict=True)):
            Image.new("RGB", (width, height), "grey").save(tmp_path / f"{name}-{k}.png")
            lines.append(json.dumps(to_row(replace(sample, source="test"), [f"{name}-{k}.png"])) + "\n")
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(lines))
        return str(path)

    return write


class Shifted(TimmLMBackbone):
    """Counts positions one too far once something is in the cache."""

    def forward(
        self, embeddings: Tensor, position_ids: Tensor, attention_mask: Tensor, cache: RaggedCache | None = None
    ) -> Tensor:
        late = int(cache is not None and cache.get_seq_length() > 0)
        return super().forward(embeddings, position_ids + late, attention_mask, cache)


def zoomer(kind: type[TimmLMBackbone] = TimmLMBackbone, **kwargs: Any) -> TimmLMBackbone:
    """Images of 4 to 36 tokens, crops of 4 to 16; each token a cell of 8 x 8 pixels."""
    backbone = make_backbone(crop=ScalerConfig(min_pixels=4 * 64, max_pixels=16 * 64), **kwargs)
    backbone.image_scaler = ScalerConfig(min_pixels=4 * 64, max_pixels=36 * 64).build(8)
    backbone.__class__ = kind
    return backbone


def start(
    module: L.LightningModule, data: L.LightningDataModule, *callbacks: L.Callback, test: bool = False, **options: Any
) -> L.Trainer:
    """A fit of no steps, or a test."""
    options = {"max_steps": 1, "limit_train_batches": 0, "limit_test_batches": 1, **options}
    run = trainer(None, *callbacks, RolloutCallback(**ROLLOUT), **options)
    if test:
        run.test(module, datamodule=data, verbose=False)
    else:
        run.fit(module, datamodule=data)
    return run


Say = Callable[..., list[str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Say:
    """The lines that a run prints before it starts."""

    def run(*args: Any, **kwargs: Any) -> list[str]:
        capsys.readouterr()
        start(*args, **kwargs)
        return capsys.readouterr().out.strip().split("\n")

    return run


def test_a_warm_up_says_what_it_needs(write_data: Callable[..., str], said: Say) -> None:
    backbone = zoomer()
    lines = said(SFTModule(backbone), VLIRDataModule(train=write_data(), batch_size=2), Preflight())
    # 64 x 64 is 8 x 8 cells, more than 36; 48 x 80 is 6 x 10, shrunk to 4 x 7 (by 1.29, rounded down)
    assert lines[1].split() == ["smallest,", "longest", "80", "x", "48", "28", "15", "4", "15"]
    assert lines[2].split() == ["median", "64", "x", "64", "36", "16", "4", "16"]
    assert lines[3].split()[:4] == ["largest", "120", "x", "160"]
    question = len(backbone.tokenize("Which digit is on the red card?"))
    assert lines[4] == f"prompts       up to {36 + question} of 128 tokens; 3 of 3 questions were looked at"
    ((trajectory,), _) = Replayer(backbone)(make_samples(1))
    text = int(trajectory.sampled.sum())
    assert lines[5] == f"rationales    up to {36 + question + text + 16} of 128 tokens, with prompt and crops"
    assert " ".join(lines[6].split()) == "memory weights gradients optimizer rollout cache activations peak"
    assert lines[7].split()[7:9] == ["0", "B"]  # there is no validation: nothing is rolled out
    assert lines[8].startswith("self-check    token by token and in one pass, logits differ by ")
    assert len(lines) == 9


def test_rgrpo_and_tests_say_how_long_trajectories_become(write_data: Callable[..., str], said: Say) -> None:
    path = write_data()
    lines = said(RGRPOModule(zoomer()), VLIRDataModule(train=path, batch_size=2), Preflight())
    assert "trajectories  up to 89 of 128 tokens: prompt 39, turns 3 x 6, crops 2 x 16" in lines
    assert not any(line.startswith("rationales") for line in lines)
    lines = said(SFTModule(zoomer()), VLIRDataModule(test=path), Preflight(), test=True)
    assert "trajectories  up to 65 of 128 tokens: prompt 39, turns 2 x 5, crops 1 x 16" in lines
    assert " ".join(lines).count("  0 B") == 3  # gradients, optimizer, activations
    lines = said(SFTModule(zoomer()), VLIRDataModule(train=path, val=path), Preflight())  # validation rolls out
    assert "trajectories  up to 65 of 128 tokens: prompt 39, turns 2 x 5, crops 1 x 16" in lines


def test_a_context_without_room_for_a_crop_stops_the_run(write_data: Callable[..., str], said: Say) -> None:
    data = VLIRDataModule(train=write_data())
    # the shortest prompt has an image of 28 tokens and 3 words, the smallest crop is 4 tokens; two tokens are written
    assert said(SFTModule(zoomer(context_length=37)), data, Preflight(self_check=False))
    with pytest.raises(PolicyError, match=r"at least 37 tokens \(31 of the prompt, 4 of the crop\), but it holds 36"):
        start(SFTModule(zoomer(context_length=36)), data, Preflight(self_check=False))
    assert said(SFTModule(zoomer(context_length=36)), data, Preflight(self_check=False, budget=False)) == [""]


def test_a_context_that_a_trajectory_may_exceed_is_warned_of(
    write_data: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    data = VLIRDataModule(train=write_data(), batch_size=2)
    start(RGRPOModule(zoomer(context_length=89)), data, Preflight(self_check=False))
    assert "may come to" not in caplog.text
    start(RGRPOModule(zoomer(context_length=88)), data, Preflight(self_check=False))
    assert "may come to 89 tokens, but the context of TimmLMBackbone holds 88" in caplog.text


@pytest.mark.parametrize("test", [False, True])
def test_a_broken_backbone_is_stopped(write_data: Callable[..., str], test: bool) -> None:
    path = write_data()
    data = VLIRDataModule(train=path, test=path)
    with pytest.raises(PolicyError, match=r"Expected Shifted .*layers\.0.*--preflight\.self_check false"):
        start(SFTModule(zoomer(Shifted)), data, Preflight(), test=test)
    start(SFTModule(zoomer(Shifted)), data, Preflight(self_check=False), test=test)
    start(SFTModule(zoomer(Shifted)), data, Preflight(tolerance=100.0), test=test)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_passes(write_data: Callable[..., str], said: Say, precision: str) -> None:
    lines = said(SFTModule(zoomer()), VLIRDataModule(train=write_data()), Preflight(), precision=precision)
    assert lines[-1].startswith("self-check")


def test_data_that_are_no_records_are_passed_over(said: Say) -> None:
    lines = said(SFTModule(zoomer()), Batches([SampleBatch(make_samples(2))]), Preflight())
    assert len(lines) == 1
    assert lines[0].startswith("self-check")
    assert look_at(None, "train", 10) == look_at(Batches([]), "train", 10) == ([], 0)
    assert look_at(SimpleNamespace(records=[1, 2]), "train", 10) == ([], 0)
    assert look_at(SimpleNamespace(records={"train": [1, 2]}), "train", 10) == ([], 2)


def test_the_check_of_a_run_changes_nothing_of_it(write_data: Callable[..., str]) -> None:
    path = write_data()
    after = []
    for callbacks in ([], [Preflight()]):
        torch.manual_seed(0)
        module = SFTModule(zoomer())
        start(module, VLIRDataModule(train=path, batch_size=2), *callbacks, limit_train_batches=2, max_steps=2)
        after.append([torch.rand(3), *(p.detach().clone() for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))


def test_only_the_first_rank_speaks(
    write_data: Callable[..., str], said: Say, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(L.Trainer, "is_global_zero", property(lambda self: False))
    data = VLIRDataModule(train=write_data(), batch_size=2)
    assert said(RGRPOModule(zoomer(context_length=80)), data, Preflight()) == [""]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    with pytest.raises(PolicyError, match="Expected Shifted"):  # but every rank checks
        start(SFTModule(zoomer(Shifted)), data, Preflight())


def test_questions_are_looked_at_evenly_and_without_pixels(
    write_data: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = tuple((48 + k, 64) for k in range(10))
    data = VLIRDataModule(train=write_data(sizes))
    data.setup("fit")
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("an image was decoded"))
        with pytest.raises(pytest.fail.Exception, match="was decoded"):  # the control
            load_image(tmp_path / "data-0.png")
        samples, count = look_at(data, "train", 4)
    assert count == 10
    assert [sample.images[0].shape for sample in samples] == [(3, 48 + k, 64) for k in (0, 3, 6, 9)]
    assert all(sample.images[0].is_meta for sample in samples)
    assert [len(s.rationale) for s in samples] == [2] * 4
    # what training leaves out is left out: no such file, no image, an image that its boxes do not fit
    (tmp_path / "data-0.png").unlink()
    (tmp_path / "data-3.png").write_text("<html>")
    Image.new("RGB", (8, 8)).save(tmp_path / "data-6.png")
    samples, _ = look_at(data, "train", 4)
    assert [sample.images[0].shape for sample in samples] == [(3, 57, 64)]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_sizes_are_those_of_decoded_images(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = tmp_path / f"image.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (20, 30)).save(path, exif=exif)
    assert image_size(path) == tuple(load_image(path).shape[1:])


def test_what_is_in_flight_and_what_is_learned_from(write_data: Callable[..., str]) -> None:
    path = write_data()
    data = VLIRDataModule(train=path, val=path, batch_size=6, val_batch_size=5)
    module = RGRPOModule(zoomer(), objective=Objective(mini_batches=5), micro_batch=None)
    run = start(module, data)
    greedy, training = ROLLOUT["evaluations"]["greedy"], ROLLOUT["decoding"]
    assert rollouts(run, module, "train") == ([training, greedy], 12, 4)  # 12 trajectories, in five steps
    module.micro_batch = 2
    assert rollouts(run, module, "train") == ([training, greedy], 12, 2)
    assert rollouts(run, module, "test") == ([greedy], 5, 0)
    assert rollouts(run, SFTModule(zoomer()), "train") == ([greedy], 5, 0)
    next(c for c in run.callbacks if isinstance(c, RolloutCallback)).engine = LocalEngine(max_batch=4)  # type: ignore[attr-defined]
    assert rollouts(run, module, "train")[1] == 4


def test_text_only_questions(write_data: Callable[..., str], said: Say) -> None:
    data = VLIRDataModule(train=write_data())
    data.setup("fit")
    records = list(data.records["train"])
    for k, record in enumerate(records):
        bare = replace(record.sample, images=(), regions=(), rationale=record.sample.rationale[1:])
        records[k] = replace(record, sample=bare, images=())
    data.records["train"] = records
    lines = said(RGRPOModule(zoomer()), data, Preflight(self_check=False))
    assert lines[0] == "prompts       up to 3 of 128 tokens; 3 of 3 questions were looked at"
    assert lines[1] == "trajectories  up to 21 of 128 tokens: prompt 3, turns 3 x 6, crops 2 x 0"


@pytest.mark.parametrize(("name", "value"), [("tolerance", 0.0), ("images", 0)])
def test_values_that_make_no_sense(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"Expected `{name}`"):
        Preflight(**{name: value})  # type: ignore[arg-type]


def test_the_command_line_has_a_group_for_it() -> None:
    Path("base.yaml").write_text(CONFIG)
    given = ["--preflight.self_check", "false", "--preflight.tolerance=0.1", "--preflight.images=7"]
    run = cli(["fit", "--config=base.yaml", "--run_dir=run", "--trainer.max_steps=1", *given])
    (preflight,) = [c for c in run.trainer.callbacks if isinstance(c, Preflight)]  # type: ignore[attr-defined]
    assert (preflight.self_check, preflight.budget, preflight.tolerance, preflight.images) == (False, True, 0.1, 7)
