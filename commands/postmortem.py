"""What was in a batch whose step was left out, for its loss or gradient was not finite.

    python train.py postmortem runs/rgrpo/faults/step12-batch40-rank0.pt [--texts 5]

The file is one that the `Faults` callback has left; it also holds the images and all tokens (``torch.load``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from callbacks.faults import VERSION
from callbacks.webpage import printable
from commands.suggest import Parser

NAMES = 5  # of parameters that are spelt out


class FaultError(ValueError):
    """A file that is no dump; the message is for the user."""


@dataclass(frozen=True)
class Member:
    """One trajectory of the dump."""

    name: str
    told: dict[str, Any]
    advantage: float
    turns: Tensor  # (K,) what its turns get in addition; (0,) where they are not credited apart

    @property
    def sampled(self) -> Tensor:
        """(T,) log-probabilities of what it wrote."""
        found: Tensor = self.told["log_probs"][self.told["sampled"]]
        return found

    @property
    def faults(self) -> list[str]:
        """What of it is not finite."""
        bad = ~self.sampled.isfinite()
        found = []
        if bool(bad.any()):
            first = int(bad.nonzero()[0, 0])
            found.append(f"{int(bad.sum())} of {len(bad)} log-probabilities, first that of token {first}")
        if not torch.tensor(self.advantage).isfinite():
            found.append(f"advantage {self.advantage:g}")
        bad = ~self.turns.isfinite()
        if bool(bad.any()):
            found.append(f"{int(bad.sum())} advantages of turns, first that of turn {int(bad.nonzero()[0, 0]) + 1}")
        return found


def main(args: Sequence[str]) -> None:
    """Parse the command line and print the report.

    Raises:
        SystemExit: with code 2 after a message if the file is not one of ours.
    """
    parser = Parser(prog="train.py postmortem", description="Look into a batch that failed.", allow_abbrev=False)
    parser.add_argument("file", type=str, help="a file below faults/ of a run")
    parser.add_argument("--texts", type=int, default=3, help="trajectories whose text is printed")
    given = parser.parse_args(list(args))
    try:
        said = report(given.file, given.texts)
    except FaultError as error:
        parser.error(str(error))
    except (
        AttributeError,
        IndexError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # it says that it is one of ours
        parser.error(f"{given.file}: expected a batch that `Faults` has kept, but parts of it are missing: {error!r}.")
    print(said)


def report(file: str, texts: int) -> str:
    """The report.

    Args:
        file: a dump.
        texts: so many trajectories are spelt out at most, the suspicious ones first.

    Raises:
        FaultError: it is no dump.
    """
    found = read(file)
    details, members = found["details"], list(trajectories(found))
    lines = [
        f"{file}: step {found['step']}, batch {found['batch']}, rank {found['rank']}",
        f"loss {details['loss']:g} (this rank's), gradient norm {details['grad_norm']:g} (all ranks')",
        f"gradients that are not finite: {listed(details['gradients'])}",
        f"weights that were not finite before the step: {listed(details['weights'])}",
        f"{len(found['samples'])} questions, {len(members)} trajectories, {len(found['images'])} images",
    ]
    suspects = [member for member in members if member.faults]
    lines += [f"  {member.name}: {'; '.join(member.faults)}" for member in suspects]
    if members and not suspects:
        lines.append("  what was rolled out is finite: the fault came about in the learner's pass")
    if members:
        lowest = min(members, key=lambda m: float(m.sampled.nan_to_num().min()) if len(m.sampled) else 0.0)
        longest = max(members, key=lambda m: len(m.told["prompt_ids"]) + len(m.told["completion_ids"]))
        steepest = max(members, key=lambda m: abs(m.advantage))
        tokens = len(longest.told["prompt_ids"]) + len(longest.told["completion_ids"])
        lines += [
            f"lowest log-probability  {float(lowest.sampled.nan_to_num().min()):.2f}  {lowest.name}",
            f"most tokens             {tokens}  {longest.name}",
            f"largest advantage       {steepest.advantage:+.2f}  {steepest.name}",
        ]
    for member in [*suspects, *(m for m in members if not m.faults)][:texts]:
        lines += ["", f"--- {member.name}, ended: {printable(member.told['stop'])}", printable(member.told["text"])]
    if not members:
        for sample in found["samples"][:texts]:
            told = "".join(step["text"] + (str(step["box"]) if step["box"] else "") for step in sample["rationale"])
            lines += ["", f"--- {printable(sample['id'])}: {printable(sample['question'])}", printable(told)]
    return "\n".join(lines)


def read(file: str) -> dict[str, Any]:
    """The dump; nothing in it is run.

    Raises:
        FaultError: it is no dump.
    """
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FaultError(f"{file}: no such file.") from None
    except Exception as error:  # whatever a damaged or hostile file leads the reader into
        raise FaultError(f"{file}: expected a batch that `Faults` has kept, but reading it fails: {error!r}.") from None
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise FaultError(f"{file}: expected a batch that `Faults` has kept (version {VERSION}), found something else.")
    return found


def trajectories(found: dict[str, Any]) -> Iterator[Member]:
    """Every trajectory, by question and number."""
    for group in found["groups"]:
        for k, told in enumerate(group["trajectories"]):
            turns = group.get("turn_advantages")
            extra = torch.zeros(0) if turns is None else turns[k]
            yield Member(f"{printable(group['id'])} #{k + 1}", told, float(group["advantages"][k]), extra)


def listed(names: Sequence[str]) -> str:
    """A few of the names, and how many there are."""
    if not names:
        return "none"
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return f"{len(names)}: {printable(', '.join(names[:NAMES]))}{more}"
