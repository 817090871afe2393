"""Kill runs of two processes at random moments, go on from their checkpoints, and compare the ends to the last bit.

    python -m tests.kills --kills 20 [--seed 0] [--strategy ddp|fsdp]

The run is an R-GRPO with everything that has a state: a warm-up and a cosine, a reference that follows the policy and
a penalty for leaving it, several steps an iteration, a rule that changes a reward's weight midway, shuffled data. It
runs once without an interruption. Then, until there were so many kills, it runs, and SIGKILL is sent after a random
time to one of its two processes, at random, or to both; the same command goes on from ``last.ckpt``, and is killed
again or not. An ended run has to have the weights, the optimizer's state and every curve of the first one, bit for bit.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed import ranks
from tests.distributed.launches import STRATEGIES
from tests.distributed.stand_ins import CONFIG

RUN = """\
model:
  class_path: RGRPOModule
  init_args:
    init_from: warm/last.ckpt
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 3.0e-3, weight_decay: 0.01}}
    schedule: {name: cosine, warmup: 0.3}
    objective: {beta: 0.05, sync_reference: 5, mini_batches: 2}
    micro_batch: 2
data: {class_path: Questions, init_args: {plan: even}}
rollout:
  rewards:
    accuracy: {class_path: Written}
    format: {class_path: Format, init_args: {weight: 0.5}}
checkpoint: {every_n_train_steps: 2}
trainer:
  max_epochs: 5
  callbacks+:
    - class_path: Monitors
      init_args:
        window: 3
        rules: {late: {metric: train/loss, below: 1.0e9, patience: 6, action: {reward: format, to: 0.1}}}
"""
WARM = ["--data.plan=even", "--trainer.max_epochs=8", "--model.init_args.optimizer.class_path=torch.optim.AdamW"]
WARM += ["--model.init_args.optimizer.init_args.lr=3e-3"]
TIMED = ("seconds", "per_second")  # in the names of curves that are not the same twice


@dataclass
class Ended:
    """What a run came to."""

    state: dict[str, torch.Tensor]
    optimizer: list[torch.Tensor]
    curves: dict[str, dict[int, float]]

    def differs(self, other: Ended) -> list[str]:
        """Names of what is not the same, to the last bit."""
        wrong = [name for name in self.state if not torch.equal(self.state[name], other.state[name])]
        same = len(self.optimizer) == len(other.optimizer)
        if not same or not all(map(torch.equal, self.optimizer, other.optimizer)):
            wrong.append("the optimizer")
        for name in sorted(self.curves.keys() | other.curves.keys()):
            wrong += [f"{name}, {told}" for told in parted(self.curves.get(name, {}), other.curves.get(name, {}))]
        return wrong


def parted(curve: dict[int, float], other: dict[int, float]) -> list[str]:
    """Where a curve is another one; Lightning repeats a value where nothing was measured (no box was written, say)
    until an epoch ends, and a run that goes on has nothing to repeat."""
    wrong, before = [], None
    for step in sorted(curve.keys() | other.keys()):
        a, b = repr(curve.get(step)), repr(other.get(step))  # NaN is NaN
        if a != b and not (step not in other and a == before):
            wrong.append(f"step {step}: {a} and {b}")
        before = a
    return wrong


def prepare(folder: Path) -> None:
    """The files of the run, and the policy that it starts from."""
    (folder / "base.yaml").write_text(CONFIG)
    (folder / "run.yaml").write_text(RUN)
    ranks.run(["fit", "--config=base.yaml", "--run_dir=warm", *WARM], folder, ranks=1)


def command(run: str, strategy: str) -> list[str]:
    """The command line, which is always the same."""
    files = ["--config=base.yaml", "--config=run.yaml", f"--run_dir={run}", "--ckpt_path=last"]
    return ["fit", *files, *STRATEGIES[strategy]]


def read(folder: Path) -> Ended:
    """The last checkpoint, and of each curve the last value of each step."""
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    moments = [v for state in checkpoint["optimizer_states"][0]["state"].values() for v in state.values()]
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    curves = {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
        if not any(word in name for word in TIMED)
    }
    return Ended(checkpoint["state_dict"], moments, curves)


def kill_and_compare(folder: Path, kills: int, seed: int, strategy: str) -> Iterator[str]:
    """A line about each kill, the last of them about all.

    Raises:
        AssertionError: a run ended otherwise than the one that nobody killed.
    """
    prepare(folder)
    start = time.monotonic()
    ranks.run(command("whole", strategy), folder)
    length = time.monotonic() - start
    expected = read(folder / "whole")
    draw = random.Random(seed)
    done, number, hit = 0, 0, set()
    while done < kills:
        number += 1
        name = f"killed{number}"
        while True:
            last = folder / name / "last.ckpt"
            before = torch.load(last, weights_only=True)["global_step"] if last.exists() else 0
            started = ranks.start(command(name, strategy), folder)
            if done < kills:
                victims = draw.choice([[0], [1], [0, 1]])
                moment = draw.uniform(0, 1.1) * length
                deadline = time.monotonic() + moment
                while time.monotonic() < deadline and any(p.is_alive() for p in started.processes):
                    time.sleep(0.01)
                struck = all(p.is_alive() for p in started.processes)
                started.kill(victims)
            ended = started.wait(after_death=15)
            if not any(rank.code for rank in ended):
                break
            if not (struck and any(rank.code == -9 for rank in ended)):
                raise AssertionError("\n".join(rank.said for rank in ended))
            done += 1
            hit.add(name)
            yield (
                f"kill {done}: {name}, rank {' and '.join(map(str, victims))} after {moment:.1f} s, from step {before}"
            )
        wrong = expected.differs(read(folder / name))
        assert not wrong, f"{name} ends otherwise: {wrong}"
        yield (
            f"{name}: {len(expected.state)} tensors, {len(expected.optimizer)} of the optimizer, "
            f"{len(expected.curves)} curves are the same"
        )
        shutil.rmtree(folder / name)
    yield f"{done} kills of {len(hit)} runs, all of which went on and ended exactly; one alone takes {length:.1f} s"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", choices=[name for name in STRATEGIES if name != "one"], default="ddp")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for line in kill_and_compare(Path(folder), told.kills, told.seed, told.strategy):
            print(line, flush=True)


if __name__ == "__main__":
    main()
