"""A tiny policy of the real architecture, questions to ask it, and the authors' files about real photographs."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.backbones.fragments import FragmentVocabulary
from modules.backbones.scaling import ScalerConfig
from modules.backbones.timm_lm import LanguageConfig, TimmLMBackbone, TokenizerConfig, VisionConfig
from modules.functional.boxes import BoxSpace, fit_to_grid, from_original
from modules.replay import Replayer
from modules.scoring import collate, token_log_probs
from modules.trajectory import Region, Sample, Step, Visual

CARDS = Path(__file__).parent / "data" / "cards"
CARD_QUESTION = "What is the rank of the left-most card?"
COLOURS = ("red", "green", "blue")
FRAGMENTS = [
    "Which digit is on the ",
    *COLOURS,
    " card?",
    "<think>I zoom in on ",
    *[f'{colour} {{"bbox_2d": [' for colour in COLOURS],
    "I can read it now.</think><answer>",
    *"0123456789",
    "</answer>",
]


def make_backbone(
    seed: int = 0, layers: int = 2, crop: ScalerConfig | None = None, zooms: Sequence[float] = (), **kwargs: object
) -> TimmLMBackbone:
    """Random weights, large enough that logits have a standard deviation of about one or more."""
    torch.manual_seed(seed)
    backbone = TimmLMBackbone(
        vision=VisionConfig(
            "vit_tiny_patch16_224",
            options={
                "img_size": 16,
                "patch_size": 8,
                "embed_dim": 16,
                "depth": 1,
                "num_heads": 2,
                "class_token": False,
                "global_pool": "",
                "dynamic_img_size": True,
            },
        ),
        language=LanguageConfig(
            config={
                "model_type": "qwen2",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": layers,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 128,
                "initializer_range": 0.3,
                "tie_word_embeddings": False,
            }
        ),
        tokenizer=TokenizerConfig(vocabulary=FragmentVocabulary(FRAGMENTS, 17, 4, list(zooms))),
        image=ScalerConfig(size=(16, 16)),
        crop=crop or ScalerConfig(size=(16, 16)),
        **kwargs,  # type: ignore[arg-type]
    )
    return backbone.eval()


class Scripted(TimmLMBackbone):
    """A backbone that writes what it is told: logits point at the next token of a script."""

    def script(self, texts: list[str]) -> Scripted:
        self.lines = [self.tokenize(t).tolist() for t in texts]
        self.cursor = [0] * len(texts)
        return self

    def head(self, hidden: Tensor) -> Tensor:
        logits = torch.zeros(hidden.shape[0], len(self.banned))
        alive = [k for k, line in enumerate(self.lines) if self.cursor[k] < len(line)]
        for row, k in enumerate(alive[: hidden.shape[0]]):
            logits[row, self.lines[k][self.cursor[k]]] = 50.0
            self.cursor[k] += 1
        return logits


class Blind(TimmLMBackbone):
    """Sees whole images; every crop is the same to it."""

    def encode(self, visuals: Sequence[Visual]) -> list[Tensor]:
        features = super().encode(visuals)
        return [f if v.role == "image" else torch.zeros_like(f) for f, v in zip(features, visuals, strict=True)]


def scripted(texts: list[str], **kwargs: object) -> Scripted:
    """A backbone of `make_backbone` that writes the n-th text in the n-th trajectory."""
    backbone = make_backbone(**kwargs)  # type: ignore[arg-type]
    backbone.__class__ = Scripted
    assert isinstance(backbone, Scripted)
    return backbone.script(texts)


def make_samples(count: int, seed: int = 0, size: int = 64) -> list[Sample]:
    """Questions about random images, with rationales."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for k in range(count):
        image = torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8)
        colour = COLOURS[k % len(COLOURS)]
        region = Region((4.0 * (k % 8), 8.0, 4.0 * (k % 8) + 24.0, 40.0))
        samples.append(
            Sample(
                id=f"sample-{k}",
                question=f"Which digit is on the {colour} card?",
                images=(image,),
                answers=(str(k % 10),),
                regions=(region,),
                rationale=(
                    Step(f"<think>I zoom in on {colour} ", region),
                    Step(f"I can read it now.</think><answer>{k % 10}</answer>"),
                ),
            )
        )
    return samples


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell starts what it puts into the background deaf to Ctrl-C, and its children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def zooming() -> TimmLMBackbone:
    """A policy that has just begun to learn: it often writes valid boxes, and is far from certain of anything."""
    backbone = make_backbone(seed=1)
    replay = Replayer(backbone)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=3e-3)
    for _ in range(25):
        batch = collate(backbone, replay(make_samples(8))[0])
        log_probs, _ = token_log_probs(backbone, batch, chunk=10_000)
        optimizer.zero_grad()
        (-log_probs.mean()).backward()
        optimizer.step()
    return backbone.eval()


@pytest.fixture
def backbone() -> TimmLMBackbone:
    return make_backbone()


@pytest.fixture
def samples() -> list[Sample]:
    return make_samples(8)


@pytest.fixture
def write_list(tmp_path: Path) -> Callable[..., Path]:
    """Write a JSON list; returns the file."""

    def write(rows: list[Any], name: str = "data.json", encoding: str = "utf-8") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(rows), encoding=encoding)
        return path

    return write


@pytest.fixture
def left_cards() -> list[dict[str, Any]]:
    """The left-most card of each photograph: `image_path`, `rank`, `box` in original pixels, `size` (H, W)."""
    with (CARDS / "train_labels.csv").open() as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["filename"])
    found = []
    for name, group in groupby(rows, key=lambda row: row["filename"]):
        row = min(group, key=lambda row: int(row["xmin"]))
        box = tuple(float(row[side]) for side in ("xmin", "ymin", "xmax", "ymax"))
        size = (int(row["height"]), int(row["width"]))
        found.append({"image_path": name, "rank": row["class"], "box": box, "size": size})
    return found


@pytest.fixture
def authors_rgrpo(left_cards: list[dict[str, Any]], write_list: Callable[..., Path]) -> Path:
    """An R-GRPO file of the authors' form about the photographs in `CARDS`."""
    rows = [
        {"image_path": card["image_path"], "question": CARD_QUESTION, "answer": card["rank"], "source": "cards"}
        for card in left_cards
    ]
    return write_list(rows, "rgrpo.json")


@pytest.fixture
def authors_sft(left_cards: list[dict[str, Any]], write_list: Callable[..., Path]) -> Path:
    """A warm-up file of the authors' form about the photographs in `CARDS`; boxes in whole resized pixels."""
    rows = []
    for card in left_cards:
        resized = fit_to_grid(*card["size"], 28, 4 * 784, 2048 * 784)
        box = [round(c) for c in from_original(card["box"], BoxSpace("resized"), card["size"], resized)]
        segments = [
            f'<think>The left-most card is here: {{"bbox_2d": {box}}}\n',
            f"It is a {card['rank']}.</think><answer>{card['rank']}</answer>\n",
        ]
        rows.append(
            {
                "image_path": card["image_path"],
                "question": CARD_QUESTION,
                "response_list": segments,
                "img_crop_list": [f"crops/{card['image_path']}"],
            }
        )
    return write_list(rows, "sft.json")
