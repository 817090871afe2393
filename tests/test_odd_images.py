"""Odd image files, from the file to the trajectory: each has an outcome, and no trajectory breaks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import AuthorsDataModule
from datamodules.images import load_image
from modules.backbones.fragments import FragmentVocabulary
from modules.backbones.scaling import ScalerConfig
from modules.backbones.timm_lm import LanguageConfig, TimmLMBackbone, TokenizerConfig, VisionConfig
from modules.engine import Decoding, LocalEngine, Request
from modules.environment import REFUSALS
from modules.functional.boxes import MAX_ASPECT, Fault
from modules.trajectory import Region, Sample, StopReason
from tests.conftest import CARDS, Scripted

PATCH, LEAST, MOST = 8, 16 * 16, 64 * 64
LOOK = 'There {"bbox_2d": ['
WHOLE, CORNER = "0, 0, 1000, 1000]}", "0, 0, 100, 100]}"  # thousandths


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def plain(path: Path, height: int, width: int) -> Path:
    Image.fromarray(noise(height, width)).save(path)
    return path


def rotated(path: Path) -> Path:
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise(60, 40)).save(path, exif=exif)  # lies on its side: 40 x 60 when upright
    return path


def animated(path: Path) -> Path:
    frames = [Image.fromarray(noise(40, 60)), Image.new("RGB", (60, 40), "red")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return path


def transparent_palette(path: Path) -> Path:
    Image.fromarray(noise(40, 60)).convert("P").save(path, transparency=0)
    return path


def saved(path: Path, picture: Image.Image) -> Path:
    picture.save(path)
    return path


ODD: dict[str, tuple[Callable[[Path], Path], tuple[int, int]]] = {  # writes the file; the (height, width) it shows
    "one pixel": (lambda folder: plain(folder / "a.png", 1, 1), (1, 1)),
    "a row": (lambda folder: plain(folder / "a.png", 1, 5000), (1, 5000)),
    "a column": (lambda folder: plain(folder / "a.png", 5000, 1), (5000, 1)),
    "transparent": (lambda folder: saved(folder / "a.png", Image.fromarray(noise(40, 60, 4), "RGBA")), (40, 60)),
    "transparent palette": (lambda folder: transparent_palette(folder / "a.png"), (40, 60)),
    "16 bits": (lambda folder: saved(folder / "a.png", Image.fromarray(np.full((40, 60), 25700, np.uint16))), (40, 60)),
    "cmyk": (lambda folder: saved(folder / "a.jpg", Image.new("CMYK", (60, 40), "red")), (40, 60)),
    "on its side": (lambda folder: rotated(folder / "a.jpg"), (40, 60)),
    "gif": (lambda folder: animated(folder / "a.gif"), (40, 60)),
    "webp": (lambda folder: animated(folder / "a.webp"), (40, 60)),
    "apng": (lambda folder: animated(folder / "a.png"), (40, 60)),
}


@pytest.fixture(scope="module")
def policy() -> Scripted:
    """It takes images of any size within its limits, and writes boxes in thousandths."""
    torch.manual_seed(0)
    tower = {"img_size": 16, "patch_size": PATCH, "embed_dim": 16, "depth": 1, "num_heads": 2, "dynamic_img_size": True}
    limits = ScalerConfig(min_pixels=LEAST, max_pixels=MOST)
    backbone = TimmLMBackbone(
        VisionConfig("vit_tiny_patch16_224", options=tower),
        LanguageConfig(
            config={
                "model_type": "llama",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            }
        ),
        TokenizerConfig(vocabulary=FragmentVocabulary(["What?", LOOK, "<answer>7</answer>"], coordinates=11, step=100)),
        image=limits,
        crop=limits,
        box_space="thousand",
    )
    backbone.__class__ = Scripted
    assert isinstance(backbone, Scripted)
    return backbone.eval()


@pytest.mark.parametrize("kind", ODD)
def test_odd_files_are_seen_within_the_limits(kind: str, policy: Scripted, tmp_path: Path) -> None:
    write, size = ODD[kind]
    image = load_image(write(tmp_path))
    assert image.shape == (3, *size)
    whole = Region((0.0, 0.0, float(size[1]), float(size[0])))
    (visual,), (crop,) = policy.see([image]), policy.look([image], [whole])
    most = max(MOST // PATCH**2, math.sqrt(MAX_ASPECT * MOST) / PATCH)  # the latter: long strips, one patch wide
    for shown in (visual, crop):
        height, width = shown.pixels.shape[-2:]
        assert height % PATCH == width % PATCH == 0
        assert LEAST // PATCH**2 <= shown.tokens == height * width // PATCH**2 <= most
        assert 0 <= shown.pixels.min() <= shown.pixels.max() <= 1
        assert (height > width) == (size[0] > size[1])
    assert [len(features) for features in policy.features([visual, crop])] == [visual.tokens, crop.tokens]


@pytest.mark.parametrize("kind", ODD)
def test_trajectories_about_odd_files_end_as_they_should(kind: str, policy: Scripted, tmp_path: Path) -> None:
    write, size = ODD[kind]
    sample = Sample("odd", "What?", (load_image(write(tmp_path)),))
    policy.script([LOOK + WHOLE + LOOK + CORNER + "<answer>7</answer>"])
    (made,) = LocalEngine().rollout(policy, [Request(sample, 0)], Decoding(temperature=0.0, max_turns=4))
    assert made.stop is StopReason.ANSWER
    first, second, _ = made.turns
    assert first.region == Region((0.0, 0.0, float(size[1]), float(size[0])))
    assert first.crop is not None
    if min(size) == 1:  # a tenth of a pixel
        assert second.fault == Fault.SMALL
        assert REFUSALS[Fault.SMALL] in policy.detokenize(made.completion_ids)
    else:
        assert second.region == Region((0.0, 0.0, size[1] / 10, size[0] / 10))
    assert made.visuals[0].pixels.std() > 0 or kind in ("one pixel", "16 bits", "cmyk")


def test_what_is_shown_of_an_upright_picture_is_what_lies_there(policy: Scripted, tmp_path: Path) -> None:
    """A box on a photograph that was taken with the camera on its side means the picture as it is looked at."""
    exif = Image.Exif()
    exif[274] = 6
    picture = Image.new("RGB", (40, 60), "white")
    picture.paste("black", (0, 0, 20, 30))  # top left as stored is top right when upright
    picture.save(tmp_path / "a.png", exif=exif)
    image = load_image(tmp_path / "a.png")
    right, left = policy.look([image, image], [Region((30.0, 0.0, 60.0, 20.0)), Region((0.0, 0.0, 30.0, 20.0))])
    assert float(right.pixels.max()) == 0
    assert float(left.pixels.min()) > 0.999


def test_files_that_cannot_be_used_are_left_out_by_name(tmp_path: Path, write_list: Callable[..., Path]) -> None:
    photograph = (CARDS / "IMG_2596.JPG").read_bytes()
    contents = {
        "truncated.jpg": (photograph[: len(photograph) // 2], "cannot be decoded"),
        "empty.png": (b"", "the file is empty"),
        "page.png": (b"<html>404</html>", "HTML"),
        "text.png": (b"no image", "not an image of a known format"),
        "bomb.png": (None, "megapixels"),
        "missing.png": (None, "no such file"),
    }
    for name, (content, _) in contents.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    Image.new("1", (20_000, 9_000)).save(tmp_path / "bomb.png")
    plain(tmp_path / "good.png", 9, 9)
    rows: list[dict[str, Any]] = [
        {"image_path": name, "question": "What?", "answer": "7", "source": "odd"} for name in [*contents, "good.png"]
    ]
    data = AuthorsDataModule(str(write_list(rows)), "rgrpo", batch_size=len(rows))
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert [sample.images[0].shape for sample in batch.samples] == [(3, 9, 9)]
    assert len(batch.skipped) == len(contents)
    for name, (_, why) in contents.items():
        (line,) = [line for line in batch.skipped if name in line]
        assert why in line


def test_an_image_of_a_hundred_megapixels(policy: Scripted, tmp_path: Path) -> None:
    picture = Image.new("1", (12_000, 9_000), 1)
    picture.paste(0, (11_000, 8_000, 12_000, 9_000))
    picture.save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert (image.shape, image.dtype) == ((3, 9_000, 12_000), torch.uint8)
    (visual,) = policy.see([image])
    assert visual.tokens <= MOST // PATCH**2
    upper = visual.pixels[:, : visual.pixels.shape[1] // 2]
    assert float(upper.min()) > 0.999
    assert float(visual.pixels[:, -1, -1].max()) < 0.1
    (crop,) = policy.look([image], [Region((11_000.0, 7_990.0, 11_010.0, 8_010.0))])
    assert crop.pixels[0, :, 0].diff().argmin() == crop.pixels.shape[1] // 2 - 1  # every pixel of the original is there
