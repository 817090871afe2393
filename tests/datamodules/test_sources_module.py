"""The data module of sources: from YAML, through a Trainer, with mixtures that resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

import datamodules
from datamodules import DataError, SourcesDataModule, Weighted
from datamodules.sources import VLIR, VSR, MathVista
from modules.trajectory import SampleBatch


@pytest.fixture
def captions(tmp_path: Path, picture: Callable[..., Path]) -> Callable[[str, int], str]:
    """Write a file of so many captions, each about an image of its own; returns its path."""

    def write(name: str, count: int) -> str:
        rows = []
        for k in range(count):
            picture(f"{name}-{k}.png", (4, 4))
            rows.append({"image": f"{name}-{k}.png", "caption": f"{name} {k}.", "label": k % 2})
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)

    return write


def names(batches: Any) -> list[list[str]]:
    return [[sample.id for sample in batch.samples] for batch in batches]


def test_yaml_names_sources_by_their_class(
    captions: Callable[[str, int], str], write_rows: Callable[..., Path]
) -> None:
    row = {"id": "1", "image": "a.png", "question": "Which?", "answers": ["7"], "source": "cards"}
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    config = parser.parse_object(
        {
            "data": {
                "class_path": "SourcesDataModule",
                "init_args": {
                    "train": [
                        {"source": {"class_path": "VSR", "init_args": {"path": captions("a", 6)}}, "weight": 2},
                        {
                            "source": {"class_path": "VLIR", "init_args": {"path": str(write_rows([row]))}},
                            "weight": 1,
                        },
                    ],
                    "val": [
                        {"class_path": "VSR", "init_args": {"path": captions("b", 3)}},
                        {"class_path": "VSR", "init_args": {"path": captions("c", 2), "limit": 1}},
                    ],
                    "batch_size": 4,
                    "epoch_size": 9,
                },
            }
        }
    )
    data = parser.instantiate_classes(config).data
    assert isinstance(data, SourcesDataModule)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [len(batch.samples) for batch in batches] == [4, 4, 1]
    assert sorted(s.source for batch in batches for s in batch.samples) == ["cards"] * 3 + ["vsr"] * 6
    (val,) = data.val_dataloader()
    assert names(val) == [["b-1", "b-2", "b-3", "c-1"]]


class Tiny(LightningModule):
    """Notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        import torch

        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches: list[list[str]] = []

    def training_step(self, batch: SampleBatch, batch_idx: int) -> None:
        self.batches.append([sample.id for sample in batch.samples])
        optimizer = self.optimizers()
        self.manual_backward(self.weight.sum())
        optimizer.step()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        import torch

        return torch.optim.SGD(self.parameters(), lr=0.1)


class Killed(Callback):
    """Saves after so many batches, then ends the run as if the job was killed."""

    def __init__(self, batches: int, path: Path) -> None:
        self.left, self.path = batches, path
        self.batches: list[list[str]] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: object) -> None:
        self.left -= 1
        if self.left == 0:
            assert isinstance(module, Tiny)
            trainer.save_checkpoint(self.path)
            self.batches = module.batches
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumes_in_the_middle_of_an_epoch(
    captions: Callable[[str, int], str], tmp_path: Path, stream: bool, workers: int
) -> None:
    paths = captions("a", 11), captions("b", 5)

    def data() -> SourcesDataModule:
        train = [Weighted(VSR(paths[0]), 1.0), Weighted(VSR(paths[1]), 1.0)]
        return SourcesDataModule(
            train=train, batch_size=3, epoch_size=14, stream=stream, buffer=4, num_workers=workers, seed=5
        )

    def run(resume: Path | None = None, *callbacks: Callback) -> list[list[str]]:
        module = Tiny()
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(max_steps=13, accelerator="cpu", callbacks=list(callbacks), **quiet)  # type: ignore[arg-type]
        trainer.fit(module, data(), ckpt_path=resume, weights_only=False)
        return module.batches

    whole = run()
    for stop in (2, 5, 7):
        killed, path = Killed(stop, tmp_path / f"{stop}.ckpt"), tmp_path / f"{stop}.ckpt"
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run(None, killed)
        assert killed.batches + run(path) == whole, stop


def test_without_weights_every_question_comes_equally_often(captions: Callable[[str, int], str]) -> None:
    data = SourcesDataModule(train=[Weighted(VSR(captions("a", 5))), Weighted(VSR(captions("b", 2)))], batch_size=3)
    data.setup("fit")
    batches = names(data.train_dataloader())
    assert sorted(chain(*batches)) == ["a-1", "a-2", "a-3", "a-4", "a-5", "b-1", "b-2"]


def test_a_share_of_nothing_is_refused(captions: Callable[[str, int], str]) -> None:
    train = [Weighted(VSR(captions("a", 5)), 1000.0), Weighted(VSR(captions("b", 5)), 1.0)]
    data = SourcesDataModule(train=train, epoch_size=10)
    data.setup("fit")
    with pytest.raises(DataError, match=r"b\.jsonl: its weight comes to no question in an epoch of 10"):
        data.train_dataloader()


def test_settings_that_make_no_sense(captions: Callable[[str, int], str]) -> None:
    source = VSR(captions("a", 2))
    with pytest.raises(ValueError, match="Expected `weight` to be more than 0"):
        Weighted(source, 0.0)
    with pytest.raises(ValueError, match="MathVista is for evaluation only"):
        Weighted(MathVista("mathvista"))
    with pytest.raises(ValueError, match="Expected a `weight` for each training source"):
        SourcesDataModule(train=[Weighted(source), Weighted(source, 1.0)])
    with pytest.raises(ValueError, match="Expected a `weight` for each training source"):
        SourcesDataModule(train=[Weighted(source), Weighted(source)], stream=True, epoch_size=4)
    with pytest.raises(ValueError, match="`stream` needs `epoch_size`"):
        SourcesDataModule(train=[Weighted(source)], stream=True)
    with pytest.raises(ValueError, match="Expected `buffer` to be at least 1"):
        SourcesDataModule(train=[Weighted(source)], buffer=0)
    with pytest.raises(DataError, match="`fit` needs a source but the data's `train` is not set"):
        SourcesDataModule().setup("fit")


def test_images_that_are_all_missing_end_the_run(tmp_path: Path, captions: Callable[[str, int], str]) -> None:
    source = VSR(captions("a", 2), root=str(tmp_path / "elsewhere"))
    for stream in (False, True):
        data = SourcesDataModule(train=[Weighted(source)], stream=stream, epoch_size=2)
        with pytest.raises(DataError, match=r"expected images under .*elsewhere, found none"):
            data.setup("fit")


def test_vlir_as_a_source_is_what_the_vlir_module_reads(write_rows: Callable[..., Path]) -> None:
    row = {"id": "1", "image": "a.png", "question": "Which?", "answers": ["7"], "source": "cards", "answer_kind": "vqa"}
    path = str(write_rows([row]))
    modules = (datamodules.VLIRDataModule(predict=path), SourcesDataModule(predict=[VLIR(path)]))
    for data in modules:
        data.setup("predict")
    (one,), (other,) = (list(data.predict_dataloader()) for data in modules)
    assert one.samples[0].answer_kind == other.samples[0].answer_kind == "vqa"
    assert one.samples[0].source == other.samples[0].source == "cards"
