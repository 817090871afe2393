"""A checkpoint's policy as a Hugging Face folder.

    python train.py export --ckpt_path runs/sft/last.ckpt --output exported [--lora adapter]

The backbone is built as the run's own ``config.yaml`` describes it. With ``--lora adapter`` only the adapters are
written; their base is the model that the run started from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import modules  # noqa: F401  its classes can be named in YAML without a path
from commands.suggest import Parser
from modules.backbones.base import Backbone
from modules.export import ExportError, Form, check_folder, check_form, export_policy, exportable
from modules.lora import LoRA, split_lora
from modules.policy import check_weights, load_policy, read_policy


def main(args: Sequence[str]) -> None:
    """Parse the command line of an export and run it.

    Raises:
        SystemExit: with code 2 after a message if it is wrong, or the policy cannot be exported.
    """
    parser = Parser(prog="train.py export", description="Write a Hugging Face folder.", allow_abbrev=False)
    parser.add_function_arguments(export)
    given = parser.parse_args(list(args))
    try:
        export(given.ckpt_path, given.output, given.config, given.lora)
    except ValueError as error:
        parser.error(str(error))


def export(ckpt_path: str, output: str, config: str | None = None, lora: Form = "merged") -> None:
    """Write a Hugging Face folder: model, processor, tokenizer and chat template.

    Args:
        ckpt_path: a checkpoint of a run.
        output: the folder, new, empty or an earlier export.
        config: the run's YAML; None: ``config.yaml`` beside the checkpoint.
        lora: adapters merged into the weights, or only the adapters.

    Raises:
        ValueError: if any of them is not what it should be, or the backbone cannot be exported or built.
    """
    check_folder(Path(output))
    state, adapters = read_policy(ckpt_path, "ckpt_path")
    check_form(lora, adapters)
    arguments = model_arguments(ckpt_path, config)
    backbone = build(arguments["backbone"])
    target = exportable(backbone)
    base = None if arguments.get("init_from") else target.model.name_or_path
    if lora == "merged":
        load_policy(backbone, ckpt_path, "ckpt_path")
        state, adapters = backbone.state_dict(), LoRA()
    else:
        check_weights(split_lora(state)[0], backbone.state_dict(), ckpt_path, "ckpt_path")
    export_policy(target, state, adapters, Path(output), lora, base)
    print(f"written to {output}")
    if lora == "adapter" and base is None:
        print(f"the base of these adapters is the policy of {arguments['init_from']}: export that as well, merged")


def model_arguments(ckpt_path: str, config: str | None) -> dict[str, Any]:
    """The init arguments of a run's policy module, ``backbone`` among them.

    Raises:
        ExportError: if there is no such file, or it does not have them.
    """
    file = Path(config) if config is not None else Path(ckpt_path).with_name("config.yaml")
    if not file.is_file():
        hint = "" if config is not None else " beside the checkpoint; name it with --config"
        raise ExportError(f"Expected the configuration of the run in {str(file)!r}, but there is no such file{hint}.")
    try:
        tree = OmegaConf.load(file)
        model = OmegaConf.select(tree, "model.init_args")
        arguments = OmegaConf.to_container(model, resolve=True) if OmegaConf.is_config(model) else None
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ExportError(f"Expected {str(file)!r} to be the configuration of a run, but got: {reason}") from error
    if not isinstance(arguments, dict) or "backbone" not in arguments:
        raise ExportError(f"Expected {str(file)!r} to hold `model.init_args.backbone`, but it does not.")
    return {str(name): value for name, value in arguments.items()}


def build(backbone: dict[str, Any]) -> Backbone:
    """The backbone of a ``class_path`` and its ``init_args``."""
    parser = Parser(prog="train.py export", allow_abbrev=False)
    parser.add_subclass_arguments(Backbone, "backbone")
    built: Backbone = parser.instantiate(parser.parse_object({"backbone": backbone})).backbone
    return built
