"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: what they are put on, the policy without them, merging.

A checkpoint of a run with adapters holds the whole policy, base weights and adapters side by side, and how the
adapters are scaled (`LoRA`): it can be resumed, merged and exported without the file that the run started from.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from modules.backbones.base import PARTS, Backbone

NAME = "default"  # of the one adapter that a layer has, as peft calls it


@dataclass(frozen=True)
class LoRA:
    """Adapters: of each targeted linear layer, only a product of two thin matrices, added to it, is trained.

    Args:
        rank: of that product; 0: no adapters, the weights themselves train.
        alpha: the product is multiplied by alpha / rank.
        dropout: of the adapters' inputs, in supervised warm-up; R-GRPO learns without, see `Backbone.learn`.
        targets: which linear layers get one: those of parts of the backbone (vision, projector, language), or those
            whose name contains a match of a regular expression. The output layer over the vocabulary never does.
    """

    rank: int = 0
    alpha: int = 16
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["language"])

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"Expected `lora.rank` to be at least 0, but got {self.rank}.")
        if self.alpha <= 0:
            raise ValueError(f"Expected `lora.alpha` to be above 0, but got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Expected `lora.dropout` to be in [0, 1), but got {self.dropout}.")
        if not self.targets:
            raise ValueError("Expected `lora.targets` to name a part or a pattern, but got an empty list.")

    @property
    def scaling(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / self.rank


def add_lora(backbone: Backbone, lora: LoRA) -> None:
    """Put adapters on the targeted layers; from here on only they train.

    They are zero at first, so that the policy stays what it is, and of float32 whatever the base weights are.

    Raises:
        ValueError: if peft is missing, or a target matches no linear layer.
    """
    config = peft_config(lora, targeted(backbone, lora.targets))
    peft().inject_adapter_in_model(config, backbone, adapter_name=NAME)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # a step of AdamW is lost in the rounding of bfloat16


def peft_config(lora: LoRA, layers: Sequence[str], **options: Any) -> Any:
    """These adapters on these layers as a `peft.LoraConfig`."""
    return peft().LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(layers), **options
    )


def peft() -> Any:
    """The library, which only runs with adapters need.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ValueError(
            f"Expected peft to be installed, for `lora` is made with it, but {error}: pip install 'vlm-r3[lora]'."
        ) from error


def targeted(backbone: Backbone, targets: list[str]) -> list[str]:
    """Names of the linear layers that ``targets`` match.

    Raises:
        ValueError: if one of them matches none.
    """
    models = [m for m in backbone.modules() if isinstance(m, PreTrainedModel)]
    outputs = {id(model.get_output_embeddings()) for model in models}
    # subclasses are left out: some are used by their weight alone, past an adapter
    linear = [name for name, m in backbone.named_modules() if type(m) is nn.Linear and id(m) not in outputs]
    found: dict[str, None] = {}
    for target in targets:
        matched = [
            name
            for name in linear
            if (backbone.part(f"{name}.weight") == target if target in PARTS else re.search(target, name))
        ]
        if not matched:
            kinds = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ValueError(
                f"Expected `lora.targets` {target!r} to be one of {PARTS} or to match the name of a linear layer, "
                f"but their names end in {kinds}, such as {linear[:1]}."
            )
        found |= dict.fromkeys(matched)
    return list(found)


def adapted_layers(module: nn.Module) -> list[Any]:
    """The layers that have an adapter."""
    return [m for m in module.modules() if hasattr(m, "lora_A")]


@contextmanager
def without_lora(module: nn.Module) -> Iterator[None]:
    """The model without its adapters, which are back afterwards.

    peft also says meanwhile that they do not train, so that `Backbone.features` keeps what a vision tower without
    adapters makes; what one with adapters makes is never kept.
    """
    layers = adapted_layers(module)
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def split_lora(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Base weights and adapters of a policy's weights.

    Returns:
        base: the weights that are not adapters, under the names that they had before `add_lora`.
        adapters: by the name of the layer, A (rank, in) and B (out, rank).
    """
    end = f".lora_A.{NAME}.weight"
    layers = [name.removesuffix(end) for name in state if name.endswith(end)]
    adapters = {layer: (state[f"{layer}{end}"], state[f"{layer}.lora_B.{NAME}.weight"]) for layer in layers}
    base = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    return base, adapters


def merge_lora(state: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """The weights of a policy without adapters that computes the same.

    Args:
        state: of a policy with adapters.
        scaling: see `LoRA.scaling`.

    Returns:
        Base weights; of layers with adapters, the sum W + s B A, made in float32 and kept on the CPU: beside a large
        policy, a second one has no room on its device.
    """
    merged, adapters = split_lora(state)
    for layer, (a, b) in adapters.items():
        weight = merged[f"{layer}.weight"]
        merged[f"{layer}.weight"] = (weight.float() + scaling * (b.float() @ a.float())).to(weight.dtype).cpu()
    return merged
