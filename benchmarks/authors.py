"""One optimizer step with two crops a trajectory: this project against the algorithm of VLM-R3's published code.

    python -m benchmarks.run --rows authors

Both sides train the same tiny Qwen2.5-VL on the same pictures, 2 questions x 8 trajectories, and roll out, crop, judge
and update. Theirs is written here after what the published code does: one trajectory at a time; for every turn the
whole conversation is put through the template, tokenised and encoded again with all its images, and written on by
Hugging Face's `generate` (whose cache lives for one turn); then the update, one trajectory at a time, with logits of
the whole vocabulary at every position. To their advantage: no request goes through a server or a folder of crops, crops
are cut in memory, `generate` computes the last position's logits only of a prompt, and the reference model, which the
published code runs although its KL weight is 0, is left out.

A random policy never writes a box, and one that is told its ids would skip work. So `plant` gives the model weights
with which it writes boxes by itself: the embedding of a word is what the output layer looks for in the words that may
follow it. The layers between are random and add a little noise. Both sides then write, sample and parse through their
own unchanged code and pay for every token. Where several words may follow, all are equally likely: the boxes of a
group differ.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

from benchmarks.alternating import Alternating, RolledOut
from benchmarks.elsewhere import Elsewhere, Turn
from benchmarks.step import GROUP, QUESTIONS, TEXT, RandomReward, build_model, fit, pictures
from benchmarks.table import Row, ratio, seconds_of
from callbacks.rollout import RolloutCallback
from modules.backbones.qwen_vl import QwenVLBackbone
from modules.engine import Decoding, GroupSampler
from modules.functional.boxes import fit_to_grid, zoom_factor
from modules.functional.grammar import BoxRequest, parse_turn
from modules.objective import Objective
from modules.rgrpo import RGRPOModule

TURNS = 3  # the third asks for a crop as well, and is not given one
TURN_TOKENS = 32  # at most; the script has 21 or 22
GRID, CROP_TOKENS = 28, (4, 1024)
RATE = 1e-6

# What a turn says. Each word of a place is followed by any of the next; "?" marks a place that may be passed over.
SCRIPT: tuple[tuple[str, ...], ...] = (
    ("Let", "Now", "Here", "Then"),
    (" the", " this", " that", " one"),
    (" red", " blue", " green", " large"),
    (" part", " side", " corner", " area"),
    ('{"',),
    ("bbox",),
    ("_",),
    ("2",),
    ("d",),
    ('":',),
    (" [",),
    ("1", "3"),
    ("?", "4"),
    (",",),
    ("5", "6"),
    (",\n",),
    ("9",),
    ("7",),
    (" ,",),
    ("8",),
    ("0",),
    ("]}",),
)
OPENERS = ("\n", "<|vision_end|>")  # the first place follows the template's last token, and every crop


def followers() -> dict[str, set[str]]:
    """Which words may follow each."""
    following: dict[str, set[str]] = {word: set(SCRIPT[0]) for word in OPENERS}
    for place, words in enumerate(SCRIPT[:-1]):
        after = SCRIPT[place + 1]
        may_follow = set(after) - {"?"} | (set(SCRIPT[place + 2]) if "?" in after else set())
        for word in set(words) - {"?"}:
            following[word] = set(may_follow)
    return following


@torch.no_grad()
def plant(model: Any, tokenizer: Any) -> None:
    """Weights with which the model writes `SCRIPT`: a signature of each word, and output rows that look for it.

    A signature has length sqrt(D) and stands far above what random layers add to it, so that the last hidden state
    is nearly it; two of them are nearly orthogonal. A word that may follow gets a logit of D / 2, any other a tenth.
    """
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    generator = torch.Generator().manual_seed(1)
    following = followers()
    ids = {word: tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word)) for word in {*following, *SCRIPT[-1]}}
    several = {word: found for word, found in ids.items() if len(found) != 1}
    if several:
        raise ValueError(f"Expected every word of the script to be one token, but got {several}.")
    rows = {found[0]: torch.zeros_like(output[0]) for found in ids.values()}
    for word, after in following.items():
        signature = torch.randint(0, 2, (embedding.shape[1],), generator=generator).to(embedding) * 2 - 1
        embedding[ids[word][0]] = signature
        for follower in after:
            rows[ids[follower][0]] += signature / 2
    for k, row in rows.items():
        if bool(row.any()):
            output[k] = row


@dataclass(eq=False)
class Work:
    """What a model has computed: positions that went through the language model, and images through the tower."""

    tokens: int = 0
    images: int = 0

    @contextmanager
    def of(self, model: Any) -> Iterator[None]:
        """Count while the block runs."""

        def language(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            shape = kwargs["inputs_embeds"].shape
            self.tokens += shape[0] * shape[1]

        def vision(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self.images += len(kwargs["grid_thw"] if "grid_thw" in kwargs else args[1])

        hooks = [
            model.model.language_model.register_forward_pre_hook(language, with_kwargs=True),
            model.model.visual.register_forward_pre_hook(vision, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class BoxClosed(StoppingCriteria):
    """A turn ends behind a box."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B,) bool."""
        return input_ids[:, -1] == self.token


@dataclass(eq=False)
class Authors:
    """The published algorithm; `step` is one optimizer step."""

    folder: Path
    group: int = GROUP
    crops: int = 0  # cut so far
    work: Work = field(default_factory=Work)

    def __post_init__(self) -> None:
        self.model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(self.folder)
        self.model.model.visual.requires_grad_(False)
        self.processor: Any = Qwen2_5_VLProcessor.from_pretrained(self.folder)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.01, fused=True
        )
        closing = self.processor.tokenizer.convert_tokens_to_ids("]}")
        self.stopping = StoppingCriteriaList([BoxClosed(closing)])
        asked: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TEXT}]}]
        self.prompt = self.processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        self.images = [Image.fromarray(pixels) for pixels in pictures()]
        self.asked = self.processor(text=[self.prompt], images=self.images[:1])["input_ids"][0]

    def step(self) -> None:
        """Roll out all groups, one trajectory at a time; then learn from them, one at a time."""
        written = [[self.rollout(image) for _ in range(self.group)] for image in self.images]
        rewards = torch.rand(len(written), self.group)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        self.learn([t for some in written for t in some], advantages.flatten().tolist())

    @torch.no_grad()
    def rollout(self, image: Image.Image) -> tuple[str, list[Image.Image]]:
        """The text of one trajectory, with a placeholder where a crop is, and its images."""
        text, images = self.prompt, [image]
        for turn in range(TURNS):
            inputs = self.processor(text=[text], images=images, return_tensors="pt")
            ids = self.model.generate(
                **inputs, do_sample=True, top_k=0, max_new_tokens=TURN_TOKENS, stopping_criteria=self.stopping
            )
            new = self.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            text += new
            asked = parse_turn(new)
            if not isinstance(asked, BoxRequest) or turn == TURNS - 1:
                break
            images.append(crop(image, asked.coords))
            self.crops += 1
            text += "<|vision_start|><|image_pad|><|vision_end|>"
        return text, images

    def learn(self, trajectories: Sequence[tuple[str, list[Image.Image]]], advantages: Sequence[float]) -> None:
        """One inner step: the ratio to the sampling policy is 1, its gradient is not."""
        self.optimizer.zero_grad()
        tokenizer = self.processor.tokenizer
        for (text, images), advantage in zip(trajectories, advantages, strict=True):
            inputs = self.processor(text=[text], images=images, return_tensors="pt")
            ids = inputs["input_ids"]
            mask = torch.arange(ids.shape[1])[None] >= len(self.asked)
            for token in ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"):
                mask &= ids != tokenizer.convert_tokens_to_ids(token)
            log_probs = self.model(**inputs).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            ratios = (log_probs - log_probs.detach()).exp()
            loss = -(ratios * advantage)[mask[:, 1:]].mean() / len(trajectories)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def published(turn: Turn, folder: Path, group: int) -> None:
    """The published algorithm, a step a turn; it tells what it has done so far."""
    transformers_logging.set_verbosity_error()
    authors = Authors(folder, group)
    told = None
    with authors.work.of(authors.model):
        while True:
            turn(told)
            authors.step()
            told = {"crops": authors.crops, "tokens": authors.work.tokens, "images": authors.work.images}


def crop(image: Image.Image, coords: tuple[float, float, float, float]) -> Image.Image:
    """The zoomed crop in the size that ours has, so that both sides read as many tokens of it."""
    width, height = coords[2] - coords[0], coords[3] - coords[1]
    factor = zoom_factor(width * height / (image.width * image.height))
    low, high = (tokens * GRID**2 for tokens in CROP_TOKENS)
    rows, columns = fit_to_grid(factor * height, factor * width, GRID, low, high)
    return image.crop(tuple(round(c) for c in coords)).resize((columns, rows), Image.Resampling.BICUBIC)  # type: ignore[arg-type]


def our_policy(folder: Path) -> RGRPOModule:
    """The same model, tower and merger frozen on both sides."""
    return RGRPOModule(
        QwenVLBackbone(str(folder), dtype="float32", instruction="", crop_tokens=CROP_TOKENS),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01, fused=True),
        freeze=["vision", "projector"],
        objective=Objective(drop_zero_variance=False),
    )


def against_authors(steps: int = 3, group: int = GROUP, warm_up: int = 1) -> Row:
    """Trajectories a second of ours over theirs, in turns within one run.

    Args:
        steps: of each side that count.
        group: trajectories a question.
        warm_up: steps of each side before that.
    """
    transformers_logging.set_verbosity_error()
    all_steps = steps + warm_up
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_model(folder)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
        plant(model, Qwen2_5_VLProcessor.from_pretrained(folder).tokenizer)
        model.save_pretrained(folder)
        policy, work, rolled = our_policy(folder), Work(), RolledOut()
        theirs: list[dict[str, int]] = []  # after each of their steps
        rollout = RolloutCallback(
            sampler=GroupSampler(group),
            rewards={"random": RandomReward()},
            decoding=Decoding(max_turns=TURNS, max_turn_tokens=TURN_TOKENS),
        )
        with Elsewhere(published, folder, group) as other, work.of(policy.backbone.model):
            clock = Alternating(lambda: theirs.append(other.step()), warm_up)
            fit(policy, all_steps, [clock, rollout, rolled])
    value, spread = ratio(clock.seconds["other"], clock.seconds["ours"])
    n, per_step = QUESTIONS * group, {name: total / all_steps for name, total in theirs[-1].items()}
    return Row(
        "trajectories/s of a step with two crops, G 8 / the published algorithm",
        value,
        target=20.0,
        at_most=False,
        spread=spread,
        detail={
            "seconds_a_step": seconds_of({"ours": clock.seconds["ours"], "published": clock.seconds["other"]}),
            "trajectories": n,
            "crops_a_trajectory": {"ours": statistics.mean(rolled.crops), "published": per_step["crops"] / n},
            "sampled_tokens_a_trajectory": statistics.mean(rolled.sampled),
            "computed_positions_a_step": {"ours": work.tokens / all_steps, "published": per_step["tokens"]},
            "encoded_images_a_step": {"ours": work.images / all_steps, "published": per_step["images"]},
        },
    )


ROWS: dict[str, Callable[[], Row]] = {"authors": against_authors}
