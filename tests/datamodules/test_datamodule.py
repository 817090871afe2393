"""The data module: bad rows, corrupt images, grouping, ranks, and resuming through a real Trainer."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from datamodules import CardsDataModule, DataError, VLIRDataModule
from modules.trajectory import SampleBatch


def _row(number: int, **changes: Any) -> dict[str, Any]:
    return {"id": str(number), "image": "a.png", "question": "Which?", "answers": ["7"], "source": "cards"} | changes


def _ids(batches: Any) -> list[list[str]]:
    return [[sample.id for sample in batch.samples] for batch in batches]


class Tiny(LightningModule):
    """Counts what it is given; one parameter, manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches: list[list[str]] = []
        self.seen: list[SampleBatch] = []

    def training_step(self, batch: SampleBatch, batch_idx: int) -> None:
        self.batches.append([sample.id for sample in batch.samples])
        self.seen.append(batch)
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(self.weight.sum())
        optimizer.step()  # type: ignore[union-attr]

    def validation_step(self, batch: SampleBatch, batch_idx: int) -> None:
        self.seen.append(batch)

    predict_step = test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAfter(Callback):
    """Save at the end of every training batch, then stop as if the job was killed."""

    def __init__(self, path: Path, batches: int) -> None:
        self.path = path
        self.left = batches

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


def _trainer(*callbacks: Callback, epochs: int = 1, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        enable_model_summary=False,
        **quiet | settings,
    )


def test_bad_rows_are_skipped_named_and_counted(
    write_rows: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_rows([_row(1), "no json", _row(3, answers="7"), _row(4)])
    data = VLIRDataModule(train=str(path), batch_size=2)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert sorted(sample.id for sample in batch.samples) == ["1", "4"]
    assert data.skipped_total == 2
    assert data.skipped[1] == f"{path}:3: key `answers`: expected a list of strings, found str '7'"
    assert f"left out {path}:2: not JSON" in caplog.text


def test_many_bad_rows_are_summed_up(write_rows: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    data = VLIRDataModule(train=str(write_rows([_row(1), *["no json"] * 20])))
    data.setup("fit")
    assert data.skipped_total == 20
    assert caplog.text.count("not JSON") == 5
    assert "left out 15 more rows" in caplog.text


def test_corrupt_images_and_boxes_outside_make_a_batch_smaller(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    outside = [{"box": [0, 0, 41, 5]}]
    rows = [_row(1), _row(2, image="bad.png"), _row(3, image="none.png"), _row(4, regions=outside), _row(5)]
    path = write_rows(rows)
    data = VLIRDataModule(test=str(path), batch_size=3)
    data.setup("test")
    first, second = data.test_dataloader()
    assert _ids([first, second]) == [["1"], ["5"]]
    assert first.skipped == [
        f"{path}:2: {tmp_path / 'bad.png'}: the file is empty",
        f"{path}:3: {tmp_path / 'none.png'}: no such file",
    ]
    assert second.skipped == [
        f"{path}:4: key `regions[0].box`: expected a box inside the 40 x 30 image, found (0.0, 0.0, 41.0, 5.0)"
    ]


def test_a_run_goes_on_past_corrupt_images_and_counts_each_once(
    write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    data = VLIRDataModule(train=str(write_rows([_row(1), _row(2, image="bad.png"), "no json"])), batch_size=1)
    model = Tiny()
    _trainer(epochs=2).fit(model, datamodule=data)
    assert sorted(model.batches) == [[], [], ["1"], ["1"]]
    assert sorted(len(batch.skipped) for batch in model.seen) == [0, 0, 1, 1]
    assert data.skipped_total == 2


@pytest.mark.parametrize("cache", [False, True])
def test_questions_of_one_image_share_one_tensor(write_rows: Callable[..., Path], cache: bool) -> None:
    rows = [_row(1), _row(2, image="b.png"), _row(3), {**_row(4), "images": ["b.png", "a.png"]}]
    del rows[3]["image"]
    data = VLIRDataModule(test=str(write_rows(rows)), batch_size=4, cache_images=cache)
    data.setup("test")
    (batch,) = data.test_dataloader()
    one, two, three, four = (sample.images for sample in batch.samples)
    assert one[0] is three[0] is four[1]
    assert two[0] is four[0]
    assert one[0] is not two[0]
    (again,) = data.test_dataloader()
    assert (again.samples[0].images[0] is one[0]) == cache


def test_one_tensor_an_image_survives_workers(write_rows: Callable[..., Path]) -> None:
    data = VLIRDataModule(test=str(write_rows([_row(1), _row(2)])), batch_size=2, num_workers=1)
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert batch.samples[0].images[0] is batch.samples[1].images[0]
    with pytest.raises(ValueError, match="num_workers"):
        VLIRDataModule(cache_images=True, num_workers=1)


def test_grouping_shuffles_images_and_keeps_their_questions_adjacent(write_rows: Callable[..., Path]) -> None:
    rows = [_row(n, image=f"{n % 10}.png") for n in range(40)] + [_row(99)]
    path = write_rows(rows)
    for n in range(10):
        (path.parent / f"{n}.png").write_bytes((path.parent / "a.png").read_bytes())
    grouped, scattered = (VLIRDataModule(train=str(path), batch_size=8, group_by_image=g) for g in (True, False))
    grouped.setup("fit")
    scattered.setup("fit")
    order = [int(i) for batch in _ids(grouped.train_dataloader()) for i in batch if i != "99"]
    assert [[n % 10 for n in order[at : at + 4]] for at in range(0, 40, 4)] == [[n % 10] * 4 for n in order[::4]]
    assert [n % 10 for n in order[::4]] != list(range(10))
    free = [int(i) for batch in _ids(scattered.train_dataloader()) for i in batch]
    assert sorted(free) == sorted([*order, 99])
    assert sum(a % 10 == b % 10 for a, b in pairwise(free)) < 20


def test_several_files_and_text_only_questions(write_rows: Callable[..., Path]) -> None:
    text_only = {"id": "t", "images": [], "question": "2 + 2?", "answers": ["4"], "source": "math"}
    paths = [str(write_rows([_row(1)], "x.jsonl")), str(write_rows([text_only], "y.jsonl"))]
    data = VLIRDataModule(test=paths, batch_size=4)
    data.setup("test")
    assert _ids(data.test_dataloader()) == [["1", "t"]]


def test_ranks_see_disjoint_questions(write_rows: Callable[..., Path]) -> None:
    path = write_rows([_row(n) for n in range(7)])
    seen = []
    for rank in range(2):
        data = VLIRDataModule(train=str(path), val=str(path), batch_size=2)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2, overfit_batches=0)  # type: ignore[assignment]
        data.setup("fit")
        seen.append((_ids(data.train_dataloader()), _ids(data.val_dataloader()[0])))
    for split in range(2):
        assert len(seen[0][split]) == len(seen[1][split])
        both = [i for rank in seen for batch in rank[split] for i in batch]
        assert sorted(both) == [str(n) for n in range(7)]


def test_data_errors_are_one_sentence(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        VLIRDataModule(train=str(tmp_path / "none.jsonl")).setup("fit")
    with pytest.raises(DataError, match="`test` needs a file but the data's `test` is not set"):
        VLIRDataModule(train=str(write_rows([_row(1)]))).setup("test")
    with pytest.raises(DataError, match=r"expected images under .*elsewhere, found none"):
        VLIRDataModule(train=str(write_rows([_row(1)])), root=str(tmp_path / "elsewhere")).setup("fit")
    with pytest.raises(ValueError, match="batch_size"):
        VLIRDataModule(batch_size=0)


def test_limit_acts_on_each_file(write_rows: Callable[..., Path]) -> None:
    data = VLIRDataModule(test=str(write_rows([_row(n) for n in range(5)])), limit=2)
    data.setup("test")
    assert _ids(data.test_dataloader()) == [["0", "1"]]


def test_fit_validate_test_and_predict_run(write_rows: Callable[..., Path]) -> None:
    path = str(write_rows([_row(n) for n in range(3)]))
    data = VLIRDataModule(train=path, val=path, test=path, predict=path, batch_size=2, val_batch_size=3)
    model = Tiny()
    trainer = _trainer(num_sanity_val_steps=0)
    trainer.fit(model, datamodule=data)
    assert [len(batch.samples) for batch in model.seen] == [2, 1, 3]
    image = model.seen[0].samples[0].images[0]
    assert image.dtype == torch.uint8
    assert model.seen[0].samples[1].images[0] is image  # Lightning's transfer did not copy
    for run in (trainer.validate, trainer.test, trainer.predict):
        run(model, datamodule=data)  # type: ignore[operator]
    assert [len(batch.samples) for batch in model.seen[3:]] == [3, 3, 3]


@pytest.mark.parametrize("killed_after", [1, 2, 4, 5, 6, 8])
def test_a_killed_run_resumes_with_the_batches_that_were_left(
    write_rows: Callable[..., Path], tmp_path: Path, killed_after: int
) -> None:
    path = str(write_rows([_row(n) for n in range(11)]))  # four batches an epoch

    def data() -> VLIRDataModule:
        return VLIRDataModule(train=path, val=path, batch_size=3, seed=5)

    whole = Tiny()
    _trainer(epochs=3).fit(whole, datamodule=data())
    assert len(whole.batches) == 12
    assert whole.batches[:4] != whole.batches[4:8]

    killed = Tiny()
    checkpoint = tmp_path / "killed.ckpt"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        _trainer(SaveAfter(checkpoint, killed_after), epochs=3).fit(killed, datamodule=data())
    resumed = Tiny()
    _trainer(epochs=3).fit(resumed, datamodule=data(), ckpt_path=str(checkpoint), weights_only=False)
    assert killed.batches + resumed.batches == whole.batches
    assert resumed.weight.item() == pytest.approx(whole.weight.item())


def test_overfitting_repeats_the_same_questions(write_rows: Callable[..., Path]) -> None:
    path = str(write_rows([_row(n) for n in range(9)]))
    model = Tiny()
    _trainer(epochs=3, overfit_batches=1).fit(model, datamodule=VLIRDataModule(train=path, batch_size=3))
    assert model.batches == [["0", "1", "2"]] * 3


def test_settings_from_yaml(tmp_path: Path) -> None:
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(CardsDataModule, "cards")
    parser.add_lightning_class_args(VLIRDataModule, "vlir")
    config = tmp_path / "config.yaml"
    parser.add_argument("--config", action="config")
    config.write_text(
        json.dumps(
            {
                "cards": {"root": str(tmp_path), "train": {"images": 3, "seed": 1, "rationale": "box"}},
                "vlir": {"train": ["a.jsonl", "b.jsonl"], "val": "c.jsonl"},
            }
        )
    )
    arguments = [f"--config={config}", "--cards.train.loose_size=0.5", "--vlir.val=d.jsonl"]
    built = parser.instantiate(parser.parse_args(arguments))
    assert built.cards.splits[0].loose_size == 0.5
    assert built.vlir.files["train"] == [Path("a.jsonl"), Path("b.jsonl")]
    assert built.vlir.files["val"] == [Path("d.jsonl")]
