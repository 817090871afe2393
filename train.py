"""The command line.

    python train.py fit --config configs/quickstart/sft.yaml --run_dir runs/sft     # train
    python train.py validate | test --config ... --ckpt_path ...                     # measure
    python train.py predict --config ... --ckpt_path ... --image a.jpg --question "?"  # see it reason
    python train.py pipeline --config configs/quickstart/pipeline.yaml --seed 1      # stage after stage, and a report
    python train.py ablate --grid configs/ablations/quickstart.yaml --seeds 3        # rows x seeds, and a table
    python train.py audit --config ... --model.init_args.init_from ...               # does the crop matter?
    python train.py export --ckpt_path runs/sft/last.ckpt --output exported          # a Hugging Face folder
    python train.py postmortem runs/sft/faults/step3-batch3-rank0.pt                 # a batch without a finite loss
    python train.py rescore --benchmark mathvista --predictions output.json          # saved predictions, scored
    python train.py compare runs/sft/test runs/rgrpo/test                            # two tests, by question

Every value of a YAML file can be given on the command line after it, and several files follow one
another: ``--config a.yaml --config b.yaml --model.init_args.clip_norm=0.5``. ``python train.py fit
--help`` lists what there is, ``--print_config`` shows what would run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

RUNS = ("fit", "validate", "test")


def main(args: Sequence[str]) -> None:
    """Run one command.

    Args:
        args: the command line without the program's name.

    Raises:
        SystemExit: with code 2 after a message if the command line or a file is wrong.
    """
    # imported where they are used: --help of one command does not wait for what another one needs
    first = args[0] if args else ""
    if first in ("-h", "--help"):
        print(__doc__)
        return
    if first in COMMANDS:
        COMMANDS[first](args[1:])
        return
    from commands.cli import cli
    from commands.suggest import listed, meant, nearest

    if first and not first.startswith("-") and first not in RUNS:
        known = [*RUNS, *COMMANDS]
        print(f"error: unknown command {first!r}{meant(nearest(first, known)) or listed(known)}", file=sys.stderr)
        sys.exit(2)
    cli(args)


def predict(args: Sequence[str]) -> None:
    """What a policy says, of one's own pictures too."""
    from commands.predict import main as run

    run(args)


def pipeline(args: Sequence[str]) -> None:
    """Several runs after one another, then a report."""
    from commands.pipeline import main as run

    run(args)


def ablate(args: Sequence[str]) -> None:
    """The cells of a grid, and their table."""
    from commands.ablate import main as run

    run(args)


def export(args: Sequence[str]) -> None:
    """A checkpoint as a Hugging Face folder."""
    from commands.export import main as run

    run(args)


def audit(args: Sequence[str]) -> None:
    """A test in which crops are replaced as well."""
    from commands.cli import cli

    cli(["test", *args, "--trainer.callbacks+=CropAudit"])


def postmortem(args: Sequence[str]) -> None:
    """What was in a batch whose step was left out."""
    from commands.postmortem import main as run

    run(args)


def rescore(args: Sequence[str]) -> None:
    """The score of predictions that anyone saved."""
    from commands.rescore import main as run

    run(args)


def compare(args: Sequence[str]) -> None:
    """Two tests of the same questions."""
    from commands.compare import main as run

    run(args)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "predict": predict,
    "pipeline": pipeline,
    "ablate": ablate,
    "export": export,
    "audit": audit,
    "postmortem": postmortem,
    "rescore": rescore,
    "compare": compare,
}

if __name__ == "__main__":
    main(sys.argv[1:])
