"""A trained policy as a folder that Hugging Face's ``from_pretrained``, peft and inference servers load."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from safetensors.torch import save_file
from torch import Tensor

from modules.backbones.base import Backbone
from modules.lora import LoRA, merge_lora, peft_config, split_lora
from modules.policy import PolicyError

MARK = "vlm_r3_export.json"  # by which a folder is known as one of ours
MODEL = "model."  # where a backbone has its Hugging Face model

Form = Literal["merged", "adapter"]


class ExportError(PolicyError):
    """A policy that cannot be exported as it was asked for; the message is for the user."""


class Exportable(Protocol):
    """A backbone that is one Hugging Face model with its processor."""

    model: Any  # transformers.PreTrainedModel, a submodule under this name
    processor: Any  # transformers.ProcessorMixin

    def export(self, folder: Path, state_dict: Mapping[str, Tensor]) -> None:
        """Write model, with these weights, and processor into an existing folder."""


def export_policy(
    backbone: Exportable, state: Mapping[str, Tensor], lora: LoRA, folder: Path, form: Form, base: str | None = None
) -> None:
    """Write a policy as a Hugging Face folder, in place of what an earlier export has left there.

    Args:
        backbone: of the policy.
        state: its weights, by its own names, adapters among them if it has any.
        lora: what adapters these are.
        folder: is made where there is none.
        form: the model with the adapters merged into its weights, or the adapters alone, which
            ``peft.PeftModel.from_pretrained(model, folder)`` puts on the model that training started from; processor,
            tokenizer and chat template are beside either.
        base: hub name or folder of that model, for the adapters' configuration.

    Raises:
        ExportError: see `check_form` and `check_folder`.
    """
    check_form(form, lora)
    check_folder(folder)
    own = {name.removeprefix(MODEL): tensor for name, tensor in state.items() if name.startswith(MODEL)}
    if form == "adapter":
        write_whole(folder, lambda part: write_adapter(backbone, own, lora, part, base), form)
    else:
        weights = merge_lora(own, lora.scaling) if lora.rank else own
        write_whole(folder, lambda part: backbone.export(part, weights), form)


def write_adapter(
    backbone: Exportable, state: Mapping[str, Tensor], lora: LoRA, folder: Path, base: str | None
) -> None:
    """Write the adapters of a model's weights as peft saves them, and the processor."""
    _, layers = split_lora(state)
    config = peft_config(lora, sorted(layers), base_model_name_or_path=base, inference_mode=True)
    config.save_pretrained(str(folder))
    tensors = {
        f"base_model.model.{name}.lora_{which}.weight": tensor.detach().cpu().contiguous()
        for name, pair in layers.items()
        for which, tensor in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    backbone.processor.save_pretrained(folder)


def exportable(backbone: Backbone) -> Exportable:
    """The backbone, if it is one Hugging Face model.

    Raises:
        ExportError: if not.
    """
    if not hasattr(backbone, "export"):
        raise ExportError(
            "Expected a backbone that is one Hugging Face model, such as QwenVLBackbone, for an export is a folder of "
            f"one, but got {type(backbone).__name__}; its checkpoints are loaded by `init_from`."
        )
    return cast(Exportable, backbone)


def check_form(form: Form, lora: LoRA) -> None:
    """Whether there is what is to be written.

    Raises:
        ExportError: if adapters are asked for, and there are none.
    """
    if form == "adapter" and not lora.rank:
        raise ExportError(
            "Expected a policy with adapters for `lora` 'adapter', but it was trained without; 'merged' exports it."
        )


def check_folder(folder: Path) -> None:
    """Whether a folder can be written to without harm.

    Raises:
        ExportError: if it is a file, or holds something that no export has left there.
    """
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"Expected the output to be a folder, but {str(folder)!r} is a file.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise ExportError(
            f"Expected the output folder {str(folder)!r} to be new, empty or an earlier export, "
            f"but it holds other files, such as {min(p.name for p in folder.iterdir())!r}."
        )


def write_whole(folder: Path, write: Callable[[Path], None], form: Form) -> None:
    """Let ``write`` fill a folder beside this one, and only then replace the files of an earlier export by its."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        part = Path(name)
        write(part)
        files = sorted(str(p.relative_to(part)) for p in part.rglob("*") if p.is_file())
        (part / MARK).write_text(json.dumps({"form": form, "files": files}, indent=2) + "\n", encoding="utf-8")
        for old in written(folder):
            (folder / old).unlink(missing_ok=True)
        for new in [MARK, *files]:
            (folder / new).parent.mkdir(parents=True, exist_ok=True)
            (part / new).replace(folder / new)


def written(folder: Path) -> list[str]:
    """The files that an earlier export has left in a folder, by their paths in it."""
    mark = folder / MARK
    return list(json.loads(mark.read_text(encoding="utf-8"))["files"]) if mark.is_file() else []
