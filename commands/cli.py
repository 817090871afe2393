"""The command line of one run: fit, validate, test or predict a policy that YAML describes.

`CLI` is LightningCLI with these rules: everything of a run lies in ``--run_dir``; rollouts, the checks
before a run and checkpoints are always there under names of their own (``--rollout.*``,
``--preflight.*``, ``--checkpoint.*``); and what configuration and command line say is never overruled by a
checkpoint.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf.errors import OmegaConfBaseException

import callbacks  # noqa: F401  their classes can be named in YAML without a path
import datamodules
import modules  # noqa: F401
from callbacks.board import Board
from callbacks.faults import Faults
from callbacks.preflight import Preflight
from callbacks.requeue import PutBack
from callbacks.rollout import RolloutCallback
from callbacks.stop import CleanStop
from callbacks.summary import Summary
from callbacks.throughput import Throughput
from callbacks.watchdog import Watchdog
from commands.suggest import Parser
from datamodules.asked import AskedDataModule
from modules.checkpoints import others
from modules.policy import PolicyError, PolicyModule

NEEDED = ("state_dict", "pytorch-lightning_version")  # of a checkpoint
FALSE_ALARMS = (
    r"LightningCLI's args parameter is intended",  # a pipeline runs several stages in one process, on purpose
    r"The `srun` command is available on your system but is not used",  # SLURM is installed, the run is local
    r"Checkpoint directory .* exists and is not empty",  # curves and checkpoints share the run's folder
    r"predict returned None",  # trajectories are written by the rollout callback
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # between Lightning and torch
)


class CLI(LightningCLI):
    """LightningCLI for policies.

    Args:
        args: the command line without the program's name; None: ``sys.argv``.
        asked: arguments of `AskedDataModule.ask`, if that is the data module.
    """

    def __init__(self, args: Sequence[str] | None = None, asked: Mapping[str, Any] | None = None) -> None:
        self.asked = dict(asked or {})
        # the configuration tree hangs below the subcommand: without this, ${vars.x} would not be found
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        super().__init__(
            PolicyModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults={
                "accelerator": "auto",
                "devices": 1,
                "logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": "", "name": "", "version": "", "default_hp_metric": False},
                },
                # Throughput leaves fit.json: seconds over all resumed attempts, and steps
                "callbacks": [Throughput(), Summary(), CleanStop()],
            },
            parser_class=Parser,
            parser_kwargs={"parser_mode": "omegaconf+", "allow_abbrev": False},
            args=None if args is None else list(args),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Declare what every run has beside trainer, model and data."""
        parser.add_argument("--vars", type=dict, default={}, help="Free variables: ${vars.name} elsewhere in the YAML.")
        parser.add_argument(
            "--run_dir", type=str, default="runs/default", help="Folder of everything that a run writes."
        )
        parser.add_lightning_class_args(RolloutCallback, "rollout")
        parser.add_lightning_class_args(Preflight, "preflight")
        parser.add_lightning_class_args(Board, "board")
        parser.add_lightning_class_args(Faults, "faults")
        parser.add_lightning_class_args(Watchdog, "watchdog")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.enable_version_counter": False})
        # links, not interpolation: they act again when a saved config.yaml is run with another --run_dir
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("run_dir", "trainer.logger.init_args.save_dir")
        parser.link_arguments("run_dir", "checkpoint.dirpath")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; what jsonargparse lets through of the user's mistakes ends like all others."""
        try:
            super().parse_arguments(parser, args)
        except OmegaConfBaseException as error:
            parser.error(str(error.msg or error))
        except AttributeError as error:  # a class path that is given in full and names nothing
            if not isinstance(error.obj, ModuleType):
                raise
            parser.error(str(error))

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: LightningCLI would let the checkpoint's hyper-parameters replace it."""

    def instantiate_classes(self) -> None:
        """Build what is configured; a value that an object refuses is a mistake on the command line or in a file."""
        try:
            super().instantiate_classes()
            if self.asked:
                assert isinstance(self.datamodule, AskedDataModule)
                self.datamodule.ask(**self.asked)
        except ValueError as error:
            self.parser.error(str(error))

    def before_instantiate_classes(self) -> None:
        """A test in the folder of a fit does not overwrite the configuration of the fit; a checkpoint runs no code."""
        config = self.config[self.subcommand]
        check_folder(Path(config.run_dir))
        if config.weights_only is None:  # Lightning would leave it to torch, and take it for false from a URL
            config.weights_only = True
        if self.subcommand != "fit":
            self.save_config_kwargs["config_filename"] = f"config.{self.subcommand}.yaml"
        if config.ckpt_path is not None:
            last = Path(config.run_dir) / "last.ckpt"
            check_checkpoint(last if config.ckpt_path == "last" else Path(config.ckpt_path), config.weights_only)


def check_checkpoint(file: Path, weights_only: bool) -> None:
    """Look at a checkpoint before a run reads it; one that Lightning has to find (``best``, a URL) is left to it.

    Raises:
        PolicyError: it is damaged, or something else.
        UnpicklingError: it holds objects, and only weights may be read.
    """
    if not file.is_file():
        return
    problem = None
    if not zipfile.is_zipfile(file):  # torch writes its files so; a file that was cut off lacks its end
        problem = "it is no file that torch has written, or not all of it"
    elif weights_only:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except UnpicklingError:
            raise
        except Exception as error:  # whatever a damaged file leads the reader into
            problem = f"reading it fails: {error!r}"
        else:
            missing = [k for k in NEEDED if not isinstance(found, dict) or k not in found]
            problem = f"it has no {', '.join(f'`{k}`' for k in missing)}" if missing else None
    if problem is not None:
        raise PolicyError(
            f"Expected `ckpt_path` {str(file)!r} to be a checkpoint of training, but it is damaged or none: {problem}. "
            f"{others(file)}"
        )


def check_folder(folder: Path) -> None:
    """Miss a folder that can be written before anything is loaded.

    Raises:
        PolicyError: it cannot be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PolicyError(
            f"Expected `run_dir` {str(folder)!r} to be a folder that can be written, but it cannot: {error}. What is "
            "in it is untouched: make it writable, or give another one."
        ) from error


def cli(args: Sequence[str] | None = None, asked: Mapping[str, Any] | None = None) -> CLI:
    """Run one command, such as ``["fit", "--config=configs/sft.yaml"]``, and return what ran.

    Args:
        args: the command line without the program's name; None: ``sys.argv``.
        asked: see `CLI`.

    Raises:
        SystemExit: with code 2 after a message if the command line, a file or the data as a whole is wrong; with 0 if
            the run is not over, and its SLURM job back in the queue.
    """
    with without_false_alarms():
        try:
            return CLI(args, asked)
        except PutBack as stopped:  # all is saved and closed
            sys.exit(stopped.settle())
        except (datamodules.DataError, PolicyError) as error:
            # one sentence for the user; where it was raised says nothing more
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except UnpicklingError:
            print(
                "error: Expected `ckpt_path` to hold weights and plain values, but it holds objects that only code can "
                "make (`--weights_only false` reads a checkpoint that you trust as you trust a program).",
                file=sys.stderr,
            )
            sys.exit(2)


@contextmanager
def without_false_alarms() -> Iterator[None]:
    """Ignore the warnings that are wrong here; all others pass."""
    with warnings.catch_warnings():
        for message in FALSE_ALARMS:
            warnings.filterwarnings("ignore", message=message)
        yield


def first_rank() -> bool:
    """Whether this process writes files and messages for all."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


@rank_zero_only
def write_json(path: Path, value: Any) -> None:
    """Write a file that is either there as a whole or not at all; on the first rank only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
