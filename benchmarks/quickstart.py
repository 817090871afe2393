"""R-GRPO of the quickstart: this project as it is run, against a short loop in plain torch that does the same sums.

    python -m benchmarks.run --rows quickstart

Ours is `train.py fit` with the quickstart's own files: Lightning, the engine, parsed text, checked boxes, rewards by
name, curves, pictures of trajectories, the lot. It starts from a warm-up of some steps, so that it writes boxes.

The loop has a model of the same sizes, as many questions, trajectories, sampled tokens and crops a step, a prompt that
is computed once a group in the rollout and in the update, logits at sampled positions only, and the same optimizer. It
leaves out all that makes it right or usable: text (what it samples is taken for four coordinates and an answer
whatever it is), validity of boxes and of answers, ragged lengths, seeds of trajectories, recorded log-probabilities,
loading of data, logs, curves, pictures, checkpoints and Lightning.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from benchmarks.alternating import Alternating, RolledOut
from benchmarks.table import Row, ratio, seconds_of, threads
from commands.cli import CLI, without_false_alarms

CONFIGS = Path(__file__).parents[1] / "configs" / "quickstart"
QUESTIONS, GROUP, SIDE = 16, 8, 192  # a step; pixels of an image
ASKED, BEFORE, BEHIND = 3, 6, 3  # tokens of the question; sampled before the crop (the last four a box), and behind it
LOOK, CROP, PATCH = 32, 24, 8  # pixels of the image as seen, of a crop, of a patch
Cache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, (rows, heads, tokens, width of a head)


class Block(nn.Module):
    """Attention and a feed-forward layer; ``gated`` as Qwen2 has it, else as a ViT."""

    def __init__(self, width: int, inner: int, gated: bool, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.gated = heads, gated
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, inner * (2 if gated else 1)), nn.Linear(inner, width)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, L, D), and keys and values with the past's."""
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        inner = self.up(self.between(x))
        if self.gated:
            gate, inner = inner.chunk(2, -1)
            return x + self.down(F.silu(gate) * inner), (k, v)
        return x + self.down(F.gelu(inner)), (k, v)


class Policy(nn.Module):
    """A ViT of width 64 and a language model of width 96, two layers each."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, PATCH, PATCH)
        self.places = nn.ParameterList([0.1 * torch.randn((side // PATCH) ** 2, 64) for side in (LOOK, CROP)])
        self.tower = nn.ModuleList([Block(64, 256, gated=False) for _ in range(2)])
        self.projector = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 96))
        self.words, self.order = nn.Embedding(words, 96), nn.Parameter(0.1 * torch.randn(64, 96))
        self.layers = nn.ModuleList([Block(96, 256, gated=True) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(96), nn.Linear(96, words, bias=False)

    @torch.no_grad()
    def see(self, pixels: Tensor, kind: int) -> Tensor:
        """(B, tokens, 64) of images (0) or crops (1); the tower stays as it is."""
        x = self.patches((pixels - 0.35) / 0.25).flatten(2).transpose(1, 2) + self.places[kind]
        for block in self.tower:
            x, _ = block(x)
        return x

    def run(self, x: Tensor, past: Cache | None = None) -> tuple[Tensor, Cache]:
        """Hidden states of a chunk (B, L, 96), and the cache with it."""
        start, mask = 0 if past is None else past[0][0].shape[2], None
        x, cache = x + self.order[start : start + x.shape[1]], []
        if past is not None and x.shape[1] > 1:
            mask = torch.ones(x.shape[1], start + x.shape[1], dtype=torch.bool).tril(start)
        for k, block in enumerate(self.layers):
            x, entry = block(x, None if past is None else past[k], mask, causal=past is None)
            cache.append(entry)
        return self.norm(x), cache


class PlainLoop:
    """`step` is one optimizer step: rollout, rewards, update.

    Args:
        words: size of the vocabulary.
        questions: a step.
        group: trajectories a question.
    """

    def __init__(self, words: int, questions: int = QUESTIONS, group: int = GROUP) -> None:
        self.policy, self.group = Policy(words), group
        trained = [
            p for name, p in self.policy.named_parameters() if not name.startswith(("patches", "places", "tower"))
        ]
        self.optimizer = torch.optim.AdamW(trained, lr=7e-4, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.trained = trained
        self.images = torch.rand(questions, 3, SIDE, SIDE)
        self.asked = torch.randint(words, (questions, ASKED))
        self.answers = torch.randint(words, (questions, 1)).expand(-1, group)
        self.words, self.sampled, self.crops = words, 0, 0

    def prefix(self, seen: Tensor) -> Cache:
        """Of each question once; repeated for its group."""
        p = self.policy
        _, cache = p.run(torch.cat([p.projector(seen), p.words(self.asked)], 1))
        return [(k.repeat_interleave(self.group, 0), v.repeat_interleave(self.group, 0)) for k, v in cache]

    @torch.no_grad()
    def rollout(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """(n, BEFORE + BEHIND) sampled tokens, and (n, tokens, 64) features of the crops."""
        p, rows = self.policy, len(seen) * self.group
        cache = self.prefix(seen)
        x = p.words(
            torch.zeros(rows, 1, dtype=torch.long)
        )  # a fixed first token, as long as ours has one to begin with
        written: list[Tensor] = []
        features = torch.empty(0)
        for place in range(BEFORE + BEHIND):
            hidden, cache = p.run(x, cache)
            token = torch.multinomial(p.head(hidden[:, -1]).softmax(-1), 1)
            written.append(token)
            x = p.words(token)
            if place == BEFORE - 1:
                features = p.see(self.crop(torch.cat(written[-4:], 1)), 1)
                x = torch.cat([x, p.projector(features)], 1)
        return torch.cat(written, 1), features

    def crop(self, coordinates: Tensor) -> Tensor:
        """(n, 3, CROP, CROP) of what four tokens are taken for."""
        low, high = (coordinates % 49 * 4.0).view(-1, 2, 2).aminmax(dim=1)
        owner = torch.arange(len(coordinates)).div(self.group, rounding_mode="floor")
        boxes = torch.cat([owner[:, None].float(), low, high.maximum(low + 8)], 1)
        self.crops += len(boxes)
        return roi_align(self.images, boxes, CROP, sampling_ratio=2)

    def step(self) -> None:
        """Roll out, compare, update."""
        p = self.policy
        seen = p.see(F.adaptive_avg_pool2d(self.images, LOOK), 0)
        written, features = self.rollout(seen)
        self.sampled += written.numel()
        rewards = (written[:, -2].view(-1, self.group) == self.answers).float()
        rewards = rewards + 0.1 * torch.rand_like(rewards)  # an untrained loop is always wrong
        advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
        before, behind = p.words(written[:, :BEFORE]), p.words(written[:, BEFORE:-1])
        first = p.words(torch.zeros(len(written), 1, dtype=torch.long))
        hidden, _ = p.run(torch.cat([first, before, p.projector(features), behind], 1), self.prefix(seen))
        predicting = torch.cat([hidden[:, :BEFORE], hidden[:, BEFORE + features.shape[1] :]], 1)
        log_probs = p.head(predicting).log_softmax(-1).gather(-1, written[..., None])[..., 0]
        loss = -((log_probs - log_probs.detach()).exp() * advantages[:, None]).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()


class Watched(CLI):
    """The command line, with callbacks before all others."""

    def __init__(self, args: Sequence[str], first: Callable[[Any], Sequence[L.Callback]]) -> None:
        self.first = first
        super().__init__(args)

    def before_fit(self) -> None:
        """Put them there."""
        self.trainer.callbacks[:0] = self.first(self.model)  # type: ignore[attr-defined]


def fit(name: str, folder: Path, steps: int, first: Callable[[Any], Sequence[L.Callback]], *options: str) -> Path:
    """`train.py fit` of a stage of the quickstart, without validation; returns its checkpoint."""
    arguments = [
        "fit",
        f"--config={CONFIGS / 'base.yaml'}",
        f"--config={CONFIGS / f'{name}.yaml'}",
        f"--data.init_args.root={folder / 'cards'}",
        "--data.init_args.val.images=4",
        f"--trainer.max_steps={steps}",
        "--trainer.limit_val_batches=0",
        f"--run_dir={folder / name}",
        *options,
    ]
    with without_false_alarms(), contextlib.redirect_stdout(io.StringIO()):
        Watched(arguments, first)
    return folder / name / "last.ckpt"


def against_plain_loop(steps: int = 60, warm_up: int = 400, images: int = 300) -> Row:
    """Trajectories a second of ours over the loop's, in turns within one run, on one thread as `make quickstart`.

    Args:
        steps: of each side that count, taken ten by ten since ours writes its logs every tenth; three more of each are
            run before.
        warm_up: supervised steps of ours before that.
        images: for training, four questions each.
    """
    rolled, clocks, loops = RolledOut(), [], []

    def first(policy: Any) -> Sequence[L.Callback]:
        loops.append(PlainLoop(len(policy.backbone.banned)))
        clocks.append(Alternating(loops[0].step, warm_up=3, together=min(10, steps)))
        return [clocks[0], rolled]

    with threads(1), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = fit("sft", folder, warm_up, lambda _: [])
        fit(
            "rgrpo",
            folder,
            steps + 3,
            first,
            f"--data.init_args.train.images={images}",
            f"--model.init_args.init_from={start}",
        )
    seconds, loop = clocks[0].seconds, loops[0]
    value, spread = ratio(seconds["other"], seconds["ours"])
    n, batches = QUESTIONS * GROUP, len(clocks[0].laps["other"])
    return Row(
        "quickstart R-GRPO, trajectories/s / a plain torch loop",
        value,
        target=0.7,
        at_most=False,
        spread=spread,
        detail={
            "seconds_a_step": seconds_of({"ours": seconds["ours"], "plain_loop": seconds["other"]}),
            "trajectories_a_step": {"ours": statistics.mean(rolled.trajectories), "plain_loop": n},
            "sampled_tokens_a_trajectory": {
                "ours": statistics.mean(rolled.sampled),
                "plain_loop": loop.sampled / n / batches,
            },
            "crops_a_trajectory": {"ours": statistics.mean(rolled.crops), "plain_loop": loop.crops / n / batches},
            "parameters": {"plain_loop": sum(p.numel() for p in loop.policy.parameters())},
        },
    )


ROWS: dict[str, Callable[[], Row]] = {"quickstart": against_plain_loop}
