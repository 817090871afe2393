"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and what comes after them with the same interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modules.backbones.cache import RaggedCache
from modules.backbones.hf_vlm import HFVLMBackbone, flat
from modules.backbones.scaling import TokenLimits


class QwenVLBackbone(HFVLMBackbone):
    """The family that VLM-R3 was made with: images at their own resolution, positions on three axes.

    Args:
        model: hub name or local folder.
        image_tokens: least and most visual tokens of a whole image; a token is a cell of 28 x 28 pixels (Qwen3-VL:
            32 x 32). VLM-R3's published code: 4 to 2,048 in warm-up, 4 to 4,096 in R-GRPO, 32 to 8,192 in evaluation.
        crop_tokens: likewise of crops (there: 4 to 1,024 in training, 32 to 4,096 in evaluation).
        kwargs: see `HFVLMBackbone`.

    Raises:
        ValueError: see `HFVLMBackbone`; or the model is of another family.
    """

    def __init__(
        self,
        model: str,
        image_tokens: tuple[int, int] = (4, 4096),
        crop_tokens: tuple[int, int] = (4, 1024),
        **kwargs: Any,
    ) -> None:
        super().__init__(model, image=TokenLimits(*image_tokens), crop=TokenLimits(*crop_tokens), **kwargs)  # type: ignore[arg-type]
        family = self.model.config.model_type
        if not family.startswith("qwen") or self.grid is None or self._rope is None:
            raise ValueError(
                f"Expected {model!r} to be a Qwen-VL model, but it is {family}; HFVLMBackbone may take it."
            )
        self.width = int(self.text_config.hidden_size)

    def _encode(self, pixels: Sequence[Tensor]) -> Tensor:
        """Features of the tower's end and, side by side with them, those for deeper layers (DeepStack)."""
        outputs = self._image_outputs(pixels)
        deeper = getattr(outputs, "deepstack_features", None) or []
        return torch.cat([flat(outputs.pooler_output), *(flat(features) for features in deeper)], -1)

    def merge(self, embeddings: Tensor, is_visual: Tensor, features: Sequence[Tensor]) -> Tensor:
        """See `Backbone.merge`; DeepStack's features widen the embeddings, with zeros where there is text."""
        extra = features[0].shape[-1] - self.width if features else 0
        if extra:
            embeddings = torch.cat([embeddings, embeddings.new_zeros(*embeddings.shape[:-1], extra)], -1)
        return super().merge(embeddings, is_visual, features)

    def forward(
        self, embeddings: Tensor, position_ids: Tensor, attention_mask: Tensor, cache: RaggedCache | None = None
    ) -> Tensor:
        """See `Backbone.forward`."""
        tokens, *deeper = embeddings.split(self.width, -1)
        if not deeper:
            return self._decode(tokens, position_ids, attention_mask, cache)
        return self._decode(
            tokens,
            position_ids,
            attention_mask,
            cache,
            # everywhere: zeros are added where there is text
            visual_pos_masks=torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device),
            deepstack_visual_embeds=[features.flatten(0, 1) for features in deeper],
        )
