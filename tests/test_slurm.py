"""The shipped batch files on a real SLURM of this machine: a run that was interrupted ends as one that was not.

    make test-slurm

Weights, and what the optimizer keeps, are compared bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import train
from tests.slurm_cluster import Cluster, cluster, free_ports, missing
from tests.slurm_parts import FILES, TINY

ROOT = Path(train.__file__).parent
BEGINS = "training begins at step"
CPU = ("--gpus-per-node=0", "--cpus-per-task=1", "--mem=0")  # the files ask for more
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(missing()),
        reason=f"{', '.join(missing())} not installed: apt-get install --no-install-recommends slurm-wlm munge",
    ),
]


@pytest.fixture(params=[1], ids=["one"])
def slurm(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with cluster(nodes=request.param) as made:
        made.environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        yield made


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[[float], list[str]]:
    """The files of the run whose rewards take that long on the first rank, in seconds a trajectory."""

    def write(seconds: float) -> list[str]:
        file = tmp_path / "tiny.yaml"
        file.write_text(TINY.format(data=tmp_path / "data", seconds=seconds))
        return [*FILES, str(file)]

    return write


@pytest.fixture
def fit(tiny: Callable[[float], list[str]], tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a fit."""

    def line(run: str, steps: int, seconds: float = 0.15) -> list[str]:
        files = [f"--config={file}" for file in tiny(seconds)]
        return ["fit", *files, f"--run_dir={tmp_path / run}", f"--trainer.max_steps={steps}"]

    return line


@pytest.fixture
def submit(slurm: Cluster, tmp_path: Path) -> Callable[..., str]:
    """Submit one of the files; what it prints is in ``<name>.out`` of the test's folder. Returns the job's number."""

    def run(name: str, file: str, options: tuple[str, ...], arguments: list[str]) -> str:
        output = f"--output={tmp_path / name}.out"
        command = ["sbatch", "--parsable", *CPU, output, *options, f"slurm/{file}", *arguments]
        return slurm.ask(*command, cwd=ROOT, MASTER_PORT=str(free_ports(1)[0]))

    return run


def saved(file: Path) -> dict[str, Any]:
    """What a checkpoint holds of a run's progress."""
    found = torch.load(file, weights_only=True)
    return {name: found[name] for name in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")}


def same(a: Any, b: Any) -> bool:
    """Whether nested values are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def starts(file: Path) -> list[int]:
    """The steps at which a job's attempts have begun to train."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [int(line.rsplit(" ", 1)[1]) for line in lines if BEGINS in line]


def test_a_time_limit_changes_nothing(
    slurm: Cluster, submit: Callable[..., str], fit: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Two ranks, one of which waits for the other most of the time; the limit of SLURM itself."""
    two = ("--ntasks-per-node=2",)
    job = submit("limited", "one_node.sbatch", (*two, "--time=3", "--signal=SIGUSR1@60"), fit("limited", 100, 0.3))
    whole = submit("whole", "one_node.sbatch", (*two, "--time=30"), fit("whole", 100, 0.3))
    ended = {name: slurm.finish(name, 900) for name in (job, whole)}
    said = (tmp_path / "limited.out").read_text()
    print(said)
    assert [each["JobState"] for each in ended.values()] == ["COMPLETED", "COMPLETED"], said
    assert int(ended[job]["Restarts"]) >= 1
    assert ended[whole]["Restarts"] == "0"
    assert len(starts(tmp_path / "limited.out")) == int(ended[job]["Restarts"]) + 1
    assert starts(tmp_path / "limited.out") == sorted(set(starts(tmp_path / "limited.out")))  # each attempt got further
    assert "auto-requeueing enabled" not in said
    assert not list((tmp_path / "limited").glob("hpc_ckpt*"))
    found, expected = (saved(tmp_path / run / "last.ckpt") for run in ("limited", "whole"))
    assert found["global_step"] == 100
    assert same(found, expected)


@pytest.mark.parametrize("slurm", [2], indirect=True, ids=["two nodes"])
def test_two_nodes_stop_at_the_same_step(
    slurm: Cluster, submit: Callable[..., str], fit: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Two emulated nodes with a rank each go on from each other's checkpoint, and end as two ranks of one node do."""
    slurm.environment["MASTER_ADDR"] = "127.0.0.1"  # the nodes' names are those of no host
    job = submit("nodes", "several_nodes.sbatch", ("--ntasks-per-node=1",), fit("nodes", 40))
    slurm.wait(lambda: starts(tmp_path / "nodes.out"), 300, "training")
    slurm.ask("scancel", "--signal=USR1", job)
    ended = slurm.finish(job)
    assert (ended["JobState"], ended["Restarts"], ended["NumNodes"]) == ("COMPLETED", "1", "2")
    whole = submit("whole", "one_node.sbatch", ("--ntasks-per-node=2",), fit("whole", 40))
    assert slurm.finish(whole)["Restarts"] == "0"
    assert same(*(saved(tmp_path / run / "last.ckpt") for run in ("nodes", "whole")))


def test_a_pipeline_goes_on_in_the_stage_that_was_stopped(
    slurm: Cluster, submit: Callable[..., str], tiny: Callable[[float], list[str]], tmp_path: Path
) -> None:
    """Two stages that are the same and start from the same: only the first of them is interrupted."""
    stages: list[dict[str, Any]] = [
        {"name": "first", "args": ["--trainer.max_steps=3"]},
        {"name": "stopped", "start_from": "first", "args": ["--trainer.max_steps=20"]},
        {"name": "whole", "start_from": "first", "args": ["--trainer.max_steps=20"]},
    ]
    config = {"run_dir": str(tmp_path / "runs"), "stages": [{"configs": tiny(0.15), **stage} for stage in stages]}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(config))
    job = submit("pipeline", "one_node.sbatch", (), ["pipeline", f"--config={tmp_path / 'pipeline.yaml'}"])
    out = tmp_path / "pipeline.out"
    slurm.wait(lambda: len(starts(out)) == 2, 300, "the second stage")
    slurm.ask("scancel", "--signal=USR1", job)
    ended = slurm.finish(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), out.read_text()
    first, before, after, last = starts(out)
    assert (first, before, last) == (0, 0, 0)
    assert 0 < after < 20
    assert f"{tmp_path / 'runs' / 'first'}  done before" in out.read_text()
    assert same(*(saved(tmp_path / "runs" / stage / "final.ckpt") for stage in ("stopped", "whole")))


def test_a_cell_of_an_array_is_put_back_alone(
    slurm: Cluster, submit: Callable[..., str], tiny: Callable[[float], list[str]], tmp_path: Path
) -> None:
    """Two rows that are the same: one of their tasks is asked to end."""
    grid = {
        "run_dir": str(tmp_path / "grid"),
        "seeds": 1,
        "base": "left",
        "fit": {"configs": tiny(0.15), "set": {"trainer.max_steps": 20}},
        "test": {
            "configs": [FILES[0], "configs/quickstart/test.yaml"],
            "set": {"data.init_args.root": str(tmp_path / "data"), "data.init_args.test.images": 2},
        },
        "rows": {"left": {}, "put_back": {}},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    job = submit("%a", "ablations.sbatch", ("--array=0-1",), ["--grid", str(tmp_path / "grid.yaml")])
    slurm.wait(lambda: starts(tmp_path / "1.out"), 300, "training")
    slurm.ask("scancel", "--signal=TERM", f"{job}_1")
    ended = [slurm.finish(f"{job}_{task}") for task in (0, 1)]
    assert [each["JobState"] for each in ended] == ["COMPLETED", "COMPLETED"], (tmp_path / "1.out").read_text()
    assert [each["Restarts"] for each in ended] == ["0", "1"]
    weights = [saved(tmp_path / "grid" / "seed_0" / row / "fit" / "final.ckpt") for row in ("left", "put_back")]
    assert same(*weights)
    assert weights[0]["global_step"] == 20


def test_a_chain_waits_for_a_job_that_was_put_back(
    slurm: Cluster, fit: Callable[..., list[str]], tmp_path: Path
) -> None:
    first, second = fit("first", 20), fit("second", 2)
    second.append(f"--model.init_args.init_from={tmp_path / 'first' / 'last.ckpt'}")
    file = tmp_path / "cpu.sbatch"  # options of sbatch that differ from the file's: a file of one's own
    own = "".join(f"#SBATCH {option}\n" for option in (*CPU, f"--output={tmp_path}/%j.out"))
    file.write_text((ROOT / "slurm" / "one_node.sbatch").read_text().replace("set -euo", f"{own}set -euo"))
    said = slurm.ask("bash", "slurm/chain.sh", str(file), " ".join(first), " ".join(second), cwd=ROOT)
    one, two = said.splitlines()
    slurm.wait(lambda: starts(tmp_path / f"{one}.out"), 300, "training")
    slurm.ask("scancel", "--signal=USR1", one)
    slurm.wait(lambda: len(starts(tmp_path / f"{one}.out")) == 2, 300, "the second attempt")
    assert slurm.state(two) == "PENDING"
    ended = [slurm.finish(name) for name in (one, two)]
    assert [(each["JobState"], each["Restarts"]) for each in ended] == [("COMPLETED", "1"), ("COMPLETED", "0")]
    assert ended[1]["StartTime"] >= ended[0]["EndTime"]
    assert saved(tmp_path / "second" / "last.ckpt")["global_step"] == 2


def test_what_cannot_or_must_not_be_put_back_is_kept(
    slurm: Cluster, submit: Callable[..., str], fit: Callable[..., list[str]], tmp_path: Path
) -> None:
    """A job that may not be requeued, and one that its user has cancelled: both have a checkpoint, and end."""
    refused = submit("refused", "one_node.sbatch", ("--no-requeue",), fit("refused", 1000))
    cancelled = submit("cancelled", "one_node.sbatch", (), fit("cancelled", 1000))
    for name, job, signal in (("refused", refused, ("--signal=USR1",)), ("cancelled", cancelled, ())):
        slurm.wait(lambda name=name: starts(tmp_path / f"{name}.out"), 300, "training")  # type: ignore[misc]
        slurm.ask("scancel", *signal, job)
    ended = {name: slurm.finish(job) for name, job in (("refused", refused), ("cancelled", cancelled))}
    said = {name: (tmp_path / f"{name}.out").read_text() for name in ended}
    assert (ended["refused"]["JobState"], ended["refused"]["ExitCode"]) == ("FAILED", "138:0"), said["refused"]
    assert "scontrol says 'Requested operation is presently disabled" in said["refused"]
    assert ended["cancelled"]["JobState"] == "CANCELLED", said["cancelled"]
    assert "SLURM is ending it by itself (state COMPLETING)" in said["cancelled"]
    for name in ended:
        assert ended[name]["Restarts"] == "0"
        assert "`--ckpt_path=last` goes on from" in said[name]
        assert saved(tmp_path / name / "last.ckpt")["global_step"] >= 1
