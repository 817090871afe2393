"""What a run writes to TensorBoard, against the page that lists it (docs/curves.md)."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from callbacks.board import CHARTS, layout
from commands.cli import cli

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "curves.md").read_text()
STAGES = ("train", "val", "val/<mode>", "test", "test/<mode>")
FIT = [
    "fit",
    f"--config={ROOT}/configs/quickstart/base.yaml",
    "--board.every_n_steps=1",
    "--trainer.log_every_n_steps=1",
]
SMALL = ["--data.val.images=2", "--data.init_args.batch_size=4", "--data.val_batch_size=8", "--data.root=cards"]

pytestmark = pytest.mark.filterwarnings("ignore")


def listed() -> list[str]:
    """Every name of the page's tables, ``*`` spelt out."""
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    return [
        stage + name[1:] if name[0] == "*" else name for name in names for stage in (STAGES if name[0] == "*" else "_")
    ]


@cache
def pattern(name: str) -> re.Pattern[str]:
    """A listed name as a regular expression; a bracketed word is anything but a slash, ``<metric>`` a whole name."""
    parts = re.split(r"(<\w+>)", name)
    free = {"<metric>": r".+", "<mode>": r"(?!reward/|audit/|boxes/)[^/]+"}
    return re.compile(
        "".join(free.get(part, r"[^/]+") if part[0] == "<" else re.escape(part) for part in parts if part)
    )


def unlisted(names: set[str]) -> list[str]:
    return sorted(name for name in names if not any(pattern(known).fullmatch(name) for known in listed()))


def written(folder: Path) -> EventAccumulator:
    return EventAccumulator(
        str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0, "histograms": 0}
    ).Reload()


def names(events: EventAccumulator) -> set[str]:
    """Of everything, without what the text plugin puts behind a name."""
    tags = events.Tags()
    found = {tag for kind in ("scalars", "images", "histograms", "tensors") for tag in tags[kind]}
    return {name.removesuffix("/text_summary") for name in found} - {"custom_scalars__config__"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EventAccumulator]:
    """A warm-up, R-GRPO with most that it can be told to log, and a test; all tiny."""
    root = tmp_path_factory.mktemp("runs")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.chdir(root)
    sft = [*FIT, f"--config={ROOT}/configs/quickstart/sft.yaml", *SMALL, "--run_dir=sft", "--trainer.max_steps=80"]
    cli([*sft, "--data.train.images=2", "--trainer.val_check_interval=1.0", "--trainer.check_val_every_n_epoch=20"])
    rgrpo = [*FIT, f"--config={ROOT}/configs/quickstart/rgrpo.yaml", f"--config={ROOT}/configs/monitors.yaml", *SMALL]
    rgrpo += ["--data.train.images=4", "--trainer.max_steps=4", "--trainer.val_check_interval=2", "--run_dir=rgrpo"]
    rgrpo += ["--model.objective.beta=0.01", "--model.init_args.init_from=sft/last.ckpt"]
    cli([*rgrpo, "--trainer.callbacks+=CropAudit"])
    test = ["test", FIT[1], f"--config={ROOT}/configs/quickstart/test.yaml", "--data.root=cards", "--run_dir=test"]
    test += ["--data.train.images=2", "--data.test.images=2", "--model.init_args.init_from=sft/last.ckpt"]
    cli([*test, "--trainer.callbacks+=CropAudit", "--trainer.callbacks+=Evaluation", "--rollout.by_source=true"])
    monkeypatch.undo()
    return {name: written(root / name) for name in ("sft", "rgrpo", "test")}


@pytest.mark.parametrize("name", ["sft", "rgrpo", "test"])
def test_a_run_writes_no_name_that_the_page_does_not_list(runs: dict[str, EventAccumulator], name: str) -> None:
    found = names(runs[name])
    assert len(found) > 40  # else nothing was looked at
    assert unlisted(found) == []


def test_a_name_that_is_not_listed_would_be_found() -> None:
    assert unlisted({"train/something_new", "val/new/thing/x", "train/reward/mine", "val/sampled/iou"}) == [
        "train/something_new",
        "val/new/thing/x",
    ]


# listed, but not written by the runs above: what they were not told to do, and what did not happen
ELSEWHERE = re.compile(
    r"val(/<mode>)?/<source>/\w+|test(/<mode>)?/reward/<reward>|train/reward/penalised|train/advantage/turn_\w+"
    r"|train/grounding/<what>|train/sampler_correction(_capped)?|(val|train)(/<mode>)?/iou|train/monitor/<rule>"
    r"|train/correlation/.+|(val|test)/audit/.+_gap"
)


def test_the_page_lists_no_name_that_is_never_written(runs: dict[str, EventAccumulator]) -> None:
    found = set().union(*map(names, runs.values()))
    stale = [name for name in listed() if not any(pattern(name).fullmatch(each) for each in found)]
    assert [name for name in stale if not ELSEWHERE.fullmatch(name)] == []


def test_the_layout_has_a_chart_for_every_scalar_and_no_empty_chart(
    runs: dict[str, EventAccumulator],
) -> None:
    for events in (runs["sft"], runs["rgrpo"]):
        stored = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
        charts = {c.title: list(c.multiline.tag) for group in stored.category for c in group.chart}
        assert [group.title for group in stored.category] == list(CHARTS)
        everything = {title: tags for group in layout().values() for title, (_, tags) in group.items()}
        assert charts.items() <= everything.items()
        scalars = {name for name in events.Tags()["scalars"] if not name.startswith(("final/", "epoch"))}
        shown = [re.compile(tag) for tags in charts.values() for tag in tags]
        assert sorted(name for name in scalars if not any(tag.match(name) for tag in shown)) == []
        empty = [title for title, tags in charts.items() if not any(re.match(t, n) for t in tags for n in scalars)]
        assert [title for title in empty if title != "does the crop matter? (audit)"] == []  # it may not have looked
    for title, tags in ((t, tags) for group in layout().values() for t, (_, tags) in group.items()):
        examples = [re.sub(r"<\w+>", "word", name) for name in listed()]
        assert any(re.match(tag, name) for tag in tags for name in examples), title


def test_hparams_hold_what_the_run_was_told_and_its_latest_metrics(runs: dict[str, EventAccumulator]) -> None:
    events = runs["rgrpo"]
    data = events.PluginTagToContent("hparams")
    start = plugin_data_pb2.HParamsPluginData.FromString(data["_hparams_/session_start_info"]).session_start_info
    told = {
        name: json.loads(json.dumps(value.number_value or value.string_value or value.bool_value))
        for name, value in start.hparams.items()
    }
    assert (told["stage"], told["learning_rate"], told["group_size"]) == ("RGRPOModule", 7e-4, 8.0)
    assert (told["objective/beta"], told["weight/format"], told["batch_size"]) == (0.01, 0.1, 4.0)
    experiment = plugin_data_pb2.HParamsPluginData.FromString(data["_hparams_/experiment"]).experiment
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert {"final/steps", "final/val/accuracy", "final/val/sampled/accuracy", "final/train/reward/total"} <= metrics
    for name in metrics - {"final/steps"}:
        assert events.Scalars(name)[-1].value == events.Scalars(name.removeprefix("final/"))[-1].value
    assert events.Scalars("final/steps")[-1].value == 4
