"""What Hugging Face's language models need to be run with explicit masks: windows, scaled logits, refusals."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_language_model(config: PreTrainedConfig) -> None:
    """Refuse a language model with layers that a cache of keys and values does not describe.

    Args:
        config: of the language model alone (`get_text_config` of a larger one).

    Raises:
        ValueError: it has layers of linear attention, of a state, of chunks, ...
    """
    others = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES)
    if others:
        raise ValueError(
            f"Expected a language model of full or sliding attention, but {config.model_type!r} has layers of "
            f"{others}: with a cache of keys and values they do not say token by token what they say in one pass."
        )


def layer_masks(
    mask: Tensor, position_ids: Tensor, config: PreTrainedConfig, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """The attention mask as the layers of a language model take it: with their windows, boolean or additive.

    Hugging Face's models leave a mask of four dimensions as it is: a window that is not in it does not act, and eager
    attention adds it to the scores, ``True`` as 1.

    Args:
        mask: (B, 1, L, K) bool, True where a query may attend. K = L without a cache; else the cache has no holes,
            so that the key in slot k stands at position k.
        position_ids: (B, L) long: which token of its sequence each one is, from 0.
        config: of the language model alone.
        dtype: of the scores.

    Returns:
        One mask for all layers, or one a type of layer where a model mixes them.
    """
    types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    length, keys = mask.shape[-2:]
    eager = config._attn_implementation == "eager"
    everything = additive(mask, dtype) if eager else mask
    if not window or window >= keys or types == {"full_attention"}:
        return everything
    of_key = position_ids[:, None, :] if keys == length else torch.arange(keys, device=mask.device)
    near = mask & (position_ids[:, :, None] - of_key < window)[:, None]
    windowed = additive(near, dtype) if eager else near
    if types == LAYER_TYPES:
        return {"full_attention": everything, "sliding_attention": windowed}
    return windowed


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as numbers that are added to scores."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def cap_logits(logits: Tensor, config: PreTrainedConfig) -> Tensor:
    """What some language models do with the logits (..., V) of their output layer.

    Args:
        logits: as the output layer gives them.
        config: of the language model alone.
    """
    scale = getattr(config, "logit_scale", None)  # Cohere
    if scale is not None:
        logits = logits * scale
    divisor = getattr(config, "logits_scaling", None)  # Granite
    if divisor is not None:
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return logits if cap is None else cap * torch.tanh(logits / cap)


def plain_head(model: PreTrainedModel, config: PreTrainedConfig) -> nn.Linear | None:
    """The output layer of a model, where it is a linear layer without adapters and nothing is done with its logits.

    Args:
        model: the whole model.
        config: of its language model.
    """
    layer = model.get_output_embeddings()
    one = torch.ones(1)
    return layer if type(layer) is nn.Linear and cap_logits(one, config) is one else None


def recompute_activations(model: PreTrainedModel) -> None:
    """Let the layers of a model recompute their activations in the backward pass."""
    newer = getattr(model, "activation_checkpointing_enable", None)  # later versions warn of the older name
    enable = newer or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
