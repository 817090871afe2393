"""What a judge is shown of a region is what a policy would be."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from datamodules.vlir.checks import crop_of
from datamodules.vlir.fingerprints import Fingerprint
from datamodules.vlir.rules import Question
from modules.crop import CropAndScale
from modules.trajectory import Region, Sample

BOX = (14.0, 28.0, 98.0, 84.0)  # 84 x 56


@dataclass
class Stored:
    """An image that is there already."""

    image: Tensor

    def load(self) -> Tensor:
        return self.image


@pytest.mark.parametrize(
    ("zoom", "size"),
    [(None, (112, 168)), (2.0, (112, 168)), (4.0, (224, 336)), (1.0, (56, 84))],  # the rule's factor is 2 here
)
def test_a_crop_is_as_large_as_its_zoom_says(zoom: float | None, size: tuple[int, int]) -> None:
    image = torch.rand(3, 400, 400, generator=torch.Generator().manual_seed(0))
    question = Question(Sample("q", "?", ("a",)), (Stored(image),), (Fingerprint("d", (400, 400), ""),), "f", 1)  # type: ignore[arg-type]
    scaler = CropAndScale(grid=28, min_pixels=28**2, max_pixels=1024 * 28**2)
    picture = crop_of(question, Region(BOX, zoom=zoom), scaler)
    assert picture.size == size
    assert picture.pixels().shape == (3, *size)
    assert picture.identity == f"d {list(BOX)} {size[0]}x{size[1]}"
    (expected,) = scaler([image], torch.tensor([BOX], dtype=torch.float64), sizes=[size])
    assert torch.equal(picture.pixels(), expected)
