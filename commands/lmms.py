"""Our policies in the harness lmms-eval, zooming as they do here.

    pip install "vlm-r3[lmms-eval]"
    python -m lmms_eval --model vlm_r3 --model_args ckpt=runs/rgrpo/last.ckpt --tasks mathvista_testmini --batch_size 16

The harness finds the class by the entry point ``lmms_eval.models``. It asks the questions in its own words, gets the
final answer (all that was written, where there is none), and scores it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from torch import Tensor

from commands.export import build, model_arguments
from modules.engine import Decoding, LocalEngine, Request
from modules.policy import load_policy
from modules.trajectory import Sample, Trajectory

MANIFEST = ModelManifest(model_id="vlm_r3", simple_class_path="commands.lmms.VLMR3")


class VLMR3(lmms):
    """A policy of ours, in one process.

    Args:
        ckpt: checkpoint of a run; None: the weights that the configuration names.
        config: the run's YAML, with ``model.init_args.backbone``; None: ``config.yaml`` beside the checkpoint.
        device: where it runs; None: a GPU if there is one.
        batch_size: questions at once.
        max_turns: see `modules.engine.Decoding`.
        max_turn_tokens: likewise. The tasks' own ``max_new_tokens`` are made for bare answers and are not used.
        max_batch_size: of the harness; not used.

    Raises:
        ValueError: neither checkpoint nor configuration, or they are not those of a policy.
    """

    def __init__(
        self,
        ckpt: str | None = None,
        config: str | None = None,
        device: str | None = None,
        batch_size: int | str = 16,
        max_turns: int | str = 8,
        max_turn_tokens: int | str = 2048,
        max_batch_size: int | str | None = None,
    ) -> None:
        super().__init__()
        if ckpt is None and config is None:
            raise ValueError("Expected `ckpt` or `config` in --model_args, but got neither.")
        self.backbone = build(model_arguments(ckpt or "", config)["backbone"])
        if ckpt is not None:
            load_policy(self.backbone, ckpt, "ckpt")
        self.backbone.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.engine = LocalEngine()
        self.batch_size = int(batch_size)
        self.decoding = Decoding(0.0, max_turns=int(max_turns), max_turn_tokens=int(max_turn_tokens))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The final answers, in the order of the requests."""
        said = [""] * len(requests)
        kinds: dict[Decoding, list[int]] = {}
        for k, request in enumerate(requests):
            kinds.setdefault(self.decoding_of(request.args[1]), []).append(k)
        for decoding, members in kinds.items():
            for start in range(0, len(members), self.batch_size):
                part = members[start : start + self.batch_size]
                samples = [self.sample_of(requests[k]) for k in part]
                asked = [Request(sample, zlib.crc32(sample.id.encode())) for sample in samples]
                for k, trajectory in zip(part, self.engine.rollout(self.backbone, asked, decoding), strict=True):
                    context, options = requests[k].args[:2]
                    said[k] = response(trajectory, options.get("until"))
                    self.cache_hook.add_partial("generate_until", (context, options), said[k])
        return said

    def decoding_of(self, options: dict[str, Any]) -> Decoding:
        """How a task wants its answers: greedy, unless it samples at a temperature."""
        temperature = float(options.get("temperature") or 0.0) if options.get("do_sample", True) else 0.0
        return replace(self.decoding, temperature=temperature, top_p=float(options.get("top_p") or 1.0))

    def sample_of(self, request: Instance) -> Sample:
        """A request as a question."""
        context, _, to_visual, number, task, split = request.args
        found = to_visual(self.task_dict[task][split][number]) or []
        images = found[0] if len(found) == 1 and isinstance(found[0], list) else found
        question = str(context).replace("<image>", "").strip()
        name = f"{task}/{split}/{number}/{request.idx}"
        return Sample(name, question, images=tuple(map(pixels, images)), source=str(task))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not for a policy that writes before it answers."""
        raise NotImplementedError("vlm_r3 writes a rationale before its answer: take a task that generates.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Its turns are its own."""
        raise NotImplementedError("vlm_r3 takes its turns within one answer: take a task of one round.")


def response(trajectory: Trajectory, until: str | Sequence[str] | None) -> str:
    """The final answer, or all that was written where there is none, up to what ends an answer of the task."""
    text = trajectory.text if trajectory.answer is None else trajectory.answer
    for end in [until] if isinstance(until, str) else until or []:
        text = text.split(end)[0] if end else text
    return text


def pixels(image: object) -> Tensor:
    """(3, H, W) uint8 of one of the harness's images.

    Raises:
        TypeError: it is no picture.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(f"Expected pictures, but got {type(image).__name__}: vlm_r3 takes no video or sound.")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
