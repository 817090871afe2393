"""What lands in the event files, read back with TensorBoard's own reader and markdown."""

import html
import io
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from torch.utils.data import DataLoader

from callbacks.drawing import draw_trajectory
from callbacks.layout import GAP, MARGIN
from callbacks.timeline import CARD
from callbacks.trajectory_log import TrajectoryLogger, best_and_worst, describe, literal, most_instructive, written
from modules.trajectory import Group, Region, Sample, SampleBatch, StopReason, Trajectory, Turn, Visual

NONE = torch.zeros(0, dtype=torch.long)
BOX = '{"bbox_2d": [1, 2, 30, 40]}'


def member(sample: Sample, answer: str) -> Trajectory:
    crop = Visual(torch.full((3, 28, 28), 0.5), 1, "crop")
    turns = (
        Turn(f"<think>look *here* {BOX}", 0, 1, region=Region((1, 2, 30, 40)), crop=crop),
        Turn(f"</think>\n<answer>{answer}</answer>", 1, 2),
    )
    text = "".join(turn.text for turn in turns)
    return Trajectory(
        sample, NONE, NONE, NONE.bool(), NONE.float(), NONE.float(), (), turns, StopReason.ANSWER, answer, text
    )


def group(name: str, totals: list[float]) -> Group:
    sample = Sample(name, f"Question of {name}?", (torch.zeros(3, 48, 48, dtype=torch.uint8),), ("7",))
    members = tuple(member(sample, f"{name}-{k}") for k in range(len(totals)))
    values = torch.tensor(totals, dtype=torch.float32)
    return Group(sample, members, {"accuracy": values}, values, values - values.mean())


class Rolled(pl.LightningModule):
    """Stands in for the policy and the rollout callback: one fixed batch of groups a step."""

    def __init__(self, groups: list[Group]) -> None:
        super().__init__()
        self.groups = groups
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def on_train_batch_start(self, batch: SampleBatch, batch_idx: int) -> None:
        batch.groups = self.groups

    def on_validation_batch_start(self, batch: SampleBatch, batch_idx: int) -> None:
        singles = [group(sample.id, [1.0]) for sample in batch.samples]
        batch.evaluations = {"sampled": [group("wrong mode", [0.0])] * len(singles), "greedy": singles}

    def training_step(self, batch: SampleBatch, batch_idx: int) -> torch.Tensor:
        return self.weight.sum()

    def validation_step(self, batch: SampleBatch, batch_idx: int) -> None:
        self.log("val/accuracy", 1.0, on_epoch=True, batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(batches: int, size: int = 2) -> DataLoader[Any]:
    samples = [Sample(f"s{k}", "?") for k in range(batches * size)]
    return DataLoader(samples, batch_size=size, collate_fn=lambda rows: SampleBatch(list(rows)))  # type: ignore[arg-type]


def fit(folder: Path, callback: TrajectoryLogger, groups: list[Group], logger: Any, epochs: int = 1) -> pl.Trainer:
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        logger=logger,
        callbacks=[callback],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Rolled(groups), loader(3), loader(2))
    return trainer


def read(logger: TensorBoardLogger) -> EventAccumulator:
    return EventAccumulator(logger.log_dir, size_guidance={"images": 0, "tensors": 0}).Reload()


@pytest.mark.filterwarnings("ignore")
def test_pictures_and_text_can_be_read_back(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    groups = [group("even", [1.0, 1.0, 1.0]), group("mixed", [0.2, 1.0, 0.0]), group("narrow", [0.5, 0.6, 0.5])]
    fit(tmp_path, TrajectoryLogger(every_n_steps=2, max_per_step=2, validation_samples=3), groups, logger, epochs=2)
    events = read(logger)

    trained = {"train/trajectory/group", "train/trajectory/0", "train/trajectory/1"}
    followed = {f"val/trajectory/{place}" for place in range(3)}
    timelines = {f"val/over_time/{place}" for place in range(3)}
    assert set(events.Tags()["images"]) == trained | followed | timelines
    for tag in trained:
        assert [event.step for event in events.Images(tag)] == [0, 2, 4]  # 6 batches, every second
    for tag in followed:
        # at each validation (not the sanity check), where its curves have their points
        assert [event.step for event in events.Images(tag)] == [event.step for event in events.Scalars("val/accuracy")]
        assert len(events.Images(tag)) == 2

    # best of the group first, then the worst, pixel by pixel
    mixed = groups[1]
    for tag, index in (("train/trajectory/0", 1), ("train/trajectory/1", 2)):
        stored = np.asarray(Image.open(io.BytesIO(events.Images(tag)[0].encoded_image_string)))
        total, advantage = float(mixed.totals[index]), float(mixed.advantages[index])
        expected = draw_trajectory(mixed.trajectories[index], {"accuracy": total}, total=total, advantage=advantage)
        np.testing.assert_array_equal(stored, np.asarray(expected))

    # each with its earlier moments beside it
    for tag in timelines:
        first, second = (Image.open(io.BytesIO(event.encoded_image_string)) for event in events.Images(tag))
        question = first.height - 1  # the pictures have the same moment on the left
        assert first.height == second.height
        left = (0, 0, MARGIN + CARD, question)
        np.testing.assert_array_equal(np.asarray(first.crop(left)), np.asarray(second.crop(left)))
        right = (MARGIN + CARD + GAP, MARGIN + 40, MARGIN + 2 * CARD + GAP, question)
        assert len(first.crop(right).getcolors()) == 1  # nothing yet
        assert len(second.crop(right).getcolors(10_000)) > 1

    # the same samples each time, across batches of two
    for place in range(3):
        first, second = (event.encoded_image_string for event in events.Images(f"val/trajectory/{place}"))
        assert first == second
        picture = draw_trajectory(group(f"s{place}", [1.0]).trajectories[0], {"accuracy": 1.0}, total=1.0)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(first))), np.asarray(picture))

    (tag,) = events.Tags()["tensors"]
    assert tag.startswith("train/trajectory_text")
    markdown = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    assert "Group 2 of 3" in markdown
    assert "mixed-1" in seen(markdown)
    assert "mixed-2" in seen(markdown)
    assert "mixed-0" not in seen(markdown)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("csv", [False, True])
def test_without_a_logger_for_pictures_nothing_is_drawn(
    tmp_path: Path, csv: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("drew a picture that nobody takes")

    monkeypatch.setattr("callbacks.trajectory_log.draw_trajectory", fail)
    monkeypatch.setattr("callbacks.trajectory_log.draw_group", fail)
    trainer = fit(tmp_path, TrajectoryLogger(1), [group("a", [0.0, 1.0])], CSVLogger(tmp_path) if csv else False)
    assert trainer.global_step == 3


@pytest.mark.filterwarnings("ignore")
def test_supervised_batches_have_no_groups_to_show(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, TrajectoryLogger(1, validation_samples=0), [], logger)
    assert read(logger).Tags()["images"] == []


def seen(markdown: str) -> str:
    """The characters that TensorBoard's page shows for a markdown text."""
    page = markdown_to_safe_html(markdown)
    return html.unescape(re.sub(r"<[^>]*>", "", page.replace("<br>", "\n"))).replace("\xa0", " ")


@pytest.mark.parametrize(
    "text",
    [
        "<think>is it *bold* or _not_? a*b*c</think><answer>7</answer>",
        f"look {BOX} and [link](http://x) ![i](y) `code` ~~~ ```",
        "1. a\n2. b\n# no heading\n- no list\n> no quote\n    no code",
        "| a | b | and \\| c, &lt; stays &lt; &amp;amp; $x^2$",
        "<script>alert(1)</script><strong>bold</strong><br> 中文 é 🙂",
    ],
)
def test_what_a_model_wrote_is_shown_literally(text: str) -> None:
    cell = seen(f"| a | b |\n|---|---|\n| text | {literal(text)} |")
    assert text in cell


def test_description_shows_the_text_with_its_crops_and_the_numbers() -> None:
    mixed = group("mixed", [0.25, 1.0])
    page = seen(describe(mixed, 0))
    assert written(mixed.trajectories[0]) == f"<think>look *here* {BOX}[crop 1]\n</think>\n<answer>mixed-0</answer>"
    for text in (written(mixed.trajectories[0]), "Question of mixed?", "accuracy 0.250, total 0.250", "-0.375"):
        assert text in page


def test_refused_box_is_written_with_its_reason() -> None:
    sample = Sample("id", "?")
    turns = (Turn("a [1]", 0, 1, fault="arity"), Turn("b", 1, 2))
    rolled = Trajectory(
        sample, NONE, NONE, NONE.bool(), NONE.float(), NONE.float(), (), turns, StopReason.EOS, None, "a [1]b"
    )
    assert written(rolled) == "a [1][refused: arity]\nb"


def test_most_instructive_group_is_the_one_with_the_widest_rewards() -> None:
    nan = float("nan")
    # population standard deviations: 0, 0.5 (of 0 and 1), 0.25 (of 0 and 0.5), not known
    groups = [group("a", [1, 1]), group("b", [0, 1, nan]), group("c", [0, 0.5]), group("d", [nan, 3])]
    index, why = most_instructive(groups)
    assert index == 1
    assert "0.500" in why
    index, why = most_instructive([groups[0], groups[3]])
    assert index == 0
    assert "differ" in why


def test_members_are_taken_from_the_outside_in() -> None:
    assert best_and_worst(torch.tensor([0.2, 0.9, float("nan"), 0.5, 0.7])) == [1, 2, 4, 0, 3]
    assert best_and_worst(torch.tensor([1.0, 1.0, 1.0])) == [0, 2, 1]
    assert best_and_worst(torch.tensor([1.0])) == [0]


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="`every_n_steps` to be at least 1 but got 0"):
        TrajectoryLogger(every_n_steps=0)
