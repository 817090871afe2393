"""Two real processes (gloo) through the real command line: never waiting for each other, and as exact as one.

`UNEVEN` gives them batches in which they have trajectories of other lengths, no image, no question, questions that are
all skipped, or groups that are all left out. A rank that waits forever ends the test with the stacks of all.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import torch

from tests.distributed import ranks
from tests.distributed.launches import STRATEGIES, furthest, weights
from tests.distributed.stand_ins import CONFIG, hang, in_float64, is_asked_to_end, seeds_by_question
from tests.kills import read

pytestmark = pytest.mark.slow

FIT = ["fit", "--config=base.yaml"]
RGRPO = ["--model=RGRPOModule", "--model.init_args.init_from=warm/last.ckpt"]
GROUNDING = [f"--model.init_args.grounding.{name}" for name in ("l1=1", "giou=0.5", "answer=0.3")]
KINDS = {
    "sft": [],
    "sft with grounding": GROUNDING,
    "rgrpo": RGRPO,
    "rgrpo with grounding": [*RGRPO, *GROUNDING],
    "rgrpo with a reference": [*RGRPO, *(f"--model.init_args.objective.{o}" for o in ("beta=0.1", "sync_reference=2"))],
}
# Most boxes that an untrained policy expects have to be mended before they are cut out, and the images are noise: the
# gradient of the answer, of a norm of hundreds, makes 1e-7 in the weights of one step 1e-2 after six. Not in double.
DOUBLE = {"sft with grounding"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a policy that zooms."""
    made = tmp_path_factory.mktemp("distributed")
    (made / "base.yaml").write_text(CONFIG)
    adam = [f"--model.init_args.optimizer.{o}" for o in ("class_path=torch.optim.AdamW", "init_args.lr=3e-3")]
    ranks.run([*FIT, "--run_dir=warm", "--data.plan=even", "--trainer.max_epochs=8", *adam], made, ranks=1)
    return made


def fit(folder: Path, kind: str, strategy: str, *more: str, name: str = "") -> Path:
    """The last checkpoint of a run, which is made once."""
    run = Path(name or f"{kind} {strategy}".replace(" ", "-"))
    last = folder / run / "last.ckpt"
    if not last.exists():
        arguments = [*FIT, f"--run_dir={run}", "--model.init_args.micro_batch=2", *KINDS[kind], *STRATEGIES[strategy]]
        count = 1 if strategy == "one" else 2
        ranks.run([*arguments, *more], folder, count, prepare=in_float64 if kind in DOUBLE else seeds_by_question)
    return last


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_of_unequal_work_come_to_what_one_comes_to(folder: Path, kind: str, strategy: str) -> None:
    one, two = (weights(fit(folder, kind, name)) for name in ("one", strategy))
    start = weights(folder / "warm/last.ckpt") if "rgrpo" in kind else None
    if start is not None:  # something was learned
        assert furthest(start, {name: one[name] for name in start}) > 1e-3
    # gradients through crops of noise are large, and so is their rounding
    assert furthest(one, two) < (1e-12 if kind in DOUBLE else 1e-5 if "grounding" in kind else 1e-6)


@pytest.mark.parametrize("kind", ["sft", "rgrpo with a reference"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_any_number_of_processes_goes_on_from_a_checkpoint_of_another(folder: Path, kind: str, strategy: str) -> None:
    adam = ["--model.init_args.optimizer.class_path=torch.optim.AdamW", "--model.init_args.optimizer.init_args.lr=1e-3"]
    frozen = [*adam, "--model.init_args.freeze=[vision]"] if strategy == "ddp" else adam  # see docs/distributed.md
    halves = {}
    for name in ("one", strategy):
        more = [*frozen, "--checkpoint.every_n_train_steps=2", "--checkpoint.save_top_k=-1"]
        last = fit(folder, kind, name, *more, name=f"half-{kind}-{name}".replace(" ", "-"))
        (halves[name],) = last.parent.glob("*step=2.ckpt")
    ends = []
    for first in ("one", strategy):
        for then in ("one", strategy):
            more = [*frozen, f"--ckpt_path={halves[first]}"]
            run = f"{kind}-{first}-then-{then}-with-{strategy}".replace(" ", "-")
            ends.append(weights(fit(folder, kind, then, *more, name=run)))
    assert max(furthest(ends[0], end) for end in ends[1:]) < 2e-5  # Adam's first steps enlarge rounding
    assert furthest(weights(halves["one"]), ends[0]) > 1e-3


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_adapters_take_as_many_steps_as_in_one_process(folder: Path, strategy: str) -> None:
    """The first gradient of an adapter's first matrix is exactly 0, which the optimizer counts as one."""
    adam = [f"--model.init_args.optimizer.{o}" for o in ("class_path=torch.optim.AdamW", "init_args.lr=1e-2")]
    lora = [f"--model.init_args.lora.{o}" for o in ("rank=2", "targets=[vision,language]")]
    ends = {}
    for name in ("one", strategy):
        last = fit(folder, "sft", name, *adam, *lora, "--trainer.max_steps=4", name=f"adapters-{name}")
        ends[name] = torch.load(last, weights_only=True)
    steps = [[float(state["step"]) for state in end["optimizer_states"][0]["state"].values()] for end in ends.values()]
    assert len(steps[0]) >= 8
    assert steps[0] == steps[1]
    assert furthest(*(end["state_dict"] for end in ends.values())) < 1e-5


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_of_which_one_is_asked_to_end_stop_at_one_step_and_lose_nothing(folder: Path, strategy: str) -> None:
    adam = "--model.init_args.optimizer.class_path=torch.optim.AdamW"
    command = [*FIT, "--ckpt_path=last", adam, *STRATEGIES[strategy]]
    whole, cut = f"whole-{strategy}", f"cut-{strategy}"
    ranks.run([*command, f"--run_dir={whole}"], folder)
    ended = ranks.start([*command, f"--run_dir={cut}"], folder, prepare=is_asked_to_end).wait()
    assert [rank.code for rank in ended] == [128 + signal.SIGTERM] * 2
    assert "stopped behind step 2" in ended[0].said
    ranks.run([*command, f"--run_dir={cut}"], folder)
    expected, found = read(folder / whole), read(folder / cut)
    assert len(expected.curves["train/loss"]) == 6
    assert expected.differs(found) == []


def test_validation_of_two_processes_counts_every_question_once(folder: Path) -> None:
    found = {}
    for name in ("one", "ddp", "fsdp"):
        checkpoint = f"--ckpt_path={folder / 'warm/last.ckpt'}"
        more = ["--trainer.limit_val_batches=1.0", f"--run_dir=validated-{name}", checkpoint, *STRATEGIES[name]]
        said = ranks.run(["validate", *FIT[1:], *more], folder, 1 if name == "one" else 2)
        found[name] = re.findall(r"(val/\S+) +│? +([-\d.e]+)", said[0])
    assert found["one"]
    assert found["one"] == found["ddp"] == found["fsdp"]


def test_a_rank_that_hangs_fails_loudly(folder: Path) -> None:
    with pytest.raises(ranks.Hung, match=r"(?s)rank 0.*_sum_over_ranks.*rank 1.*sleeps_like_a_log"):
        ranks.run([*FIT, "--run_dir=hung", *STRATEGIES["ddp"]], folder, timeout=30, prepare=hang)


def test_a_layout_that_was_not_tried_is_refused_in_a_sentence(folder: Path) -> None:
    sharded = STRATEGIES["fsdp"]
    for wrong, expected in {
        "--trainer.strategy.save_distributed_checkpoint=true": "save_distributed_checkpoint` to be false",
        "--trainer.strategy.data_parallel_size=1": "data_parallel_size` to be the number of all ranks",
    }.items():
        more = [wrong, *(["--trainer.strategy.tensor_parallel_size=2"] if "data_parallel" in wrong else [])]
        ended = ranks.start([*FIT, "--run_dir=refused", *sharded, *more], folder).wait()
        assert [rank.code for rank in ended] == [2, 2]
        assert f"error: Expected `trainer.strategy.init_args.{expected}" in ended[0].said
        assert "Traceback" not in ended[0].said


def test_what_two_processes_left_is_a_start_for_one(folder: Path) -> None:
    made = fit(folder, "sft", "fsdp")
    arguments = [*FIT, "--model=RGRPOModule", f"--model.init_args.init_from={made}", "--trainer.max_steps=1"]
    ranks.run([*arguments, "--run_dir=after", "--model.init_args.optimizer.init_args.lr=1e-12"], folder, ranks=1)
    ours, theirs = weights(folder / "after/last.ckpt"), weights(made)
    assert furthest({name: ours[name] for name in theirs}, theirs) < 1e-6
    assert torch.load(made, weights_only=True)["optimizer_states"]
