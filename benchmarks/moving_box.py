"""A box that moves onto an object because the answer gets better, and for no other reason.

    python -m benchmarks.moving_box --seeds 8 --figure docs/images/moving_box.png

An image shows a handwritten digit. The box is four distributions over coordinate bins, as a policy has them; its
expected box is cropped, and a reader that is fixed says what is in the crop: one of ten digits, by its distance from a
picture of each, or nothing. The only loss is the cross-entropy of the right digit; neither the object's box nor the
crop at it is ever shown to anything that learns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate, pad

from modules.crop import CropAndScale
from modules.functional.boxes import iou
from modules.functional.soft_boxes import expectation, fit_boxes, teacher_forced_expectation
from modules.trajectory import Box

SIDE = 160  # of the image, pixels
STEP = 4  # of the bins, pixels
CROP = 24  # side of a crop
SPREAD = 2.0  # bins, standard deviation of a coordinate's distribution at the start
SHARPNESS = 60.0  # of the reader: what a mean squared difference of 1 is worth in nats
NOTHING = -4.0  # its score for "there is nothing": that of a picture as far from the crop as 4 / 60
STEPS = 150
RATE = 0.3  # Adam's
SHOWN = (0, 2, 4, 6, 9, 12, 16, 24, 40, STEPS)  # of a path in the figure


@dataclass(frozen=True)
class Run:
    """What came of one seed."""

    image: Tensor  # (3, SIDE, SIDE)
    true: Box
    path: list[Box]  # the expected box before every step, and at the end
    losses: list[float]

    def overlap(self, step: int) -> float:
        """IoU with the object."""
        return float(iou(torch.tensor([self.path[step]]), torch.tensor([self.true])))


def scans() -> Tensor:
    """(10, 1, 8, 8) one handwritten digit of each kind, of scikit-learn's `load_digits`."""
    data = load_digits()
    first = [list(data.target).index(digit) for digit in range(10)]
    return torch.tensor(data.images[first] / 16, dtype=torch.float32)[:, None]


def scene(seed: int) -> tuple[Tensor, Box, int, Box]:
    """An image, where its digit is, which one it is, and a box that misses it by up to half of its side."""
    generator = torch.Generator().manual_seed(seed)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    side, digit = between(48, 72), between(0, 9)
    x, y = between(24, SIDE - side - 24), between(24, SIDE - side - 24)
    drawn = interpolate(scans()[digit][None], (side, side), mode="bicubic").clamp(0, 1)[0]
    image = pad(drawn, (x, SIDE - side - x, y, SIDE - side - y)) + 0.05 * torch.rand(SIDE, SIDE, generator=generator)
    true = (float(x), float(y), float(x + side), float(y + side))
    dx, dy, grown = between(-side // 3, side // 3), between(-side // 3, side // 3), between(0, side // 3)
    start = (x + dx - grown / 2, y + dy - grown / 2, x + side + dx + grown / 2, y + side + dy + grown / 2)
    return image.clamp(0, 1).expand(3, -1, -1), true, digit, start


def read(crop: Tensor, pictures: Tensor) -> Tensor:
    """(1, 11) scores of ten digits and of nothing; there is nothing to be learned in it."""
    distances = (crop.mean(0)[None, None] - pictures).square().mean((1, 2, 3))
    return torch.cat([-SHARPNESS * distances, torch.tensor([NOTHING])])[None]


def move(seed: int) -> Run:
    """Minimise the answer's cross-entropy over the logits of the four coordinates."""
    image, true, digit, start = scene(seed)
    pictures = interpolate(scans(), (CROP, CROP), mode="bicubic").clamp(0, 1)
    bins = torch.arange(SIDE // STEP + 1)
    values = (bins * float(STEP)).expand(4, -1)
    logits = (-((bins - torch.tensor(start)[:, None] / STEP) ** 2) / (2 * SPREAD**2)).requires_grad_()
    crop = CropAndScale(size=(CROP, CROP))
    sizes, axes = torch.tensor([[SIDE, SIDE]], dtype=torch.float32), torch.arange(4)
    optimizer = torch.optim.Adam([logits], lr=RATE)
    path: list[Box] = []
    losses: list[float] = []
    for _ in range(STEPS + 1):
        added = expectation(logits, bins.expand(4, -1), values)
        box = teacher_forced_expectation(added, torch.zeros_like(axes), axes, 1)
        x1, y1, x2, y2 = box[0].tolist()
        path.append((x1, y1, x2, y2))
        loss = cross_entropy(read(crop([image], fit_boxes(box, sizes)[0])[0], pictures), torch.tensor([digit]))
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Run(image, true, path, losses)


def figure(runs: Sequence[Run], columns: int = 4, scale: int = 2) -> Image.Image:
    """Each image with the object's box (white) and the expected box from the start (red) to the end (green)."""
    side, line = SIDE * scale, 22
    rows = -(-len(runs) // columns)
    page = Image.new("RGB", (columns * (side + 8) - 8, rows * (side + line + 8) - 8), "white")
    for k, run in enumerate(runs):
        pixels = (run.image.permute(1, 2, 0) * 255).round().byte().numpy()
        panel = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(panel)
        draw.rectangle([c * scale for c in run.true], outline="white", width=1)
        for order, n in enumerate(SHOWN):
            share = order / (len(SHOWN) - 1)
            colour = (int(255 * (1 - share)), int(220 * share), 60)
            draw.rectangle([c * scale for c in run.path[n]], outline=colour, width=3 if n in (0, STEPS) else 1)
        left, top = (k % columns) * (side + 8), (k // columns) * (side + line + 8)
        page.paste(panel, (left, top + line))
        text = f"IoU {run.overlap(0):.2f} -> {run.overlap(-1):.2f}, loss {run.losses[0]:.2f} -> {run.losses[-1]:.2f}"
        ImageDraw.Draw(page).text((left + 2, top + 2), text, fill="black", font_size=15)
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moving_box", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=8, help="how many scenes, from seed 0 on")
    parser.add_argument("--figure", type=Path, help="where a picture of the paths is written")
    options = parser.parse_args(arguments)
    runs = [move(seed) for seed in range(options.seeds)]
    print("seed  IoU before  after  loss before  after")
    for seed, run in enumerate(runs):
        print(f"{seed:4d}{run.overlap(0):12.3f}{run.overlap(-1):7.3f}{run.losses[0]:13.3f}{run.losses[-1]:7.3f}")
    means = [sum(run.overlap(step) for run in runs) / len(runs) for step in (0, -1)]
    print(f"mean{means[0]:12.3f}{means[1]:7.3f}")
    if options.figure is not None:
        options.figure.parent.mkdir(parents=True, exist_ok=True)
        figure(runs).quantize(64).save(options.figure, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
