"""Predictions; on one's own pictures too.

    python train.py predict --config ... --ckpt_path ... --image photo.jpg --question "..." --run_dir runs/photos
    python train.py predict --config ... --ckpt_path ... --image photos/   --question "..." --run_dir runs/photos
    python train.py predict --config ... --ckpt_path ... --questions questions.jsonl       --run_dir runs/photos

Without ``--image`` or ``--questions``, the questions are those of the data module's ``predict`` (docs/data.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from callbacks.answers import Answers
from commands.cli import cli


def main(args: Sequence[str]) -> None:
    """Run a prediction.

    Args:
        args: the command line behind ``predict``.

    Raises:
        SystemExit: with code 2 after a message if the command line or a file is wrong, or nothing could be answered.
    """
    if "--help" in args or "-h" in args:
        print(__doc__)
    parser = argparse.ArgumentParser(prog="train.py predict", allow_abbrev=False, add_help=False)
    parser.add_argument("--image", help="an image file, or a folder of them")
    parser.add_argument("--question", help="what is asked of each image")
    parser.add_argument("--questions", help="in place of both: JSON lines with `image` and `question`")
    parser.add_argument("--at_once", type=int, default=1, help="questions in a batch")
    own, rest = parser.parse_known_args(list(args))
    if own.image is None and own.question is None and own.questions is None:
        cli(["predict", *rest])
        return
    if own.questions is None and (own.image is None or own.question is None):
        missing = "--question" if own.image is not None else "--image"
        print(f"error: Expected --image and --question, or --questions, but {missing} is missing.", file=sys.stderr)
        sys.exit(2)
    if own.questions is not None and (own.image is not None or own.question is not None):
        print("error: Expected --image and --question, or --questions, but got both.", file=sys.stderr)
        sys.exit(2)
    data = {"image": own.image, "question": own.question, "file": own.questions, "batch": own.at_once}
    asked = {name: value for name, value in data.items() if value is not None}
    run = cli(["predict", *rest, "--data=AskedDataModule", "--trainer.callbacks+=Answers"], asked)
    callbacks = run.trainer.callbacks  # type: ignore[attr-defined]
    if not any(each.answered for each in callbacks if isinstance(each, Answers)):
        print("error: Expected an image that can be read, but all were left out.", file=sys.stderr)
        sys.exit(2)
