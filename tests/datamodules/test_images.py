"""Every kind of file that calls itself an image."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import images
from datamodules.images import BadImage, load_image

RED, GREEN = (255, 0, 0), (0, 255, 0)


def test_shape_type_and_orientation(tmp_path: Path) -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert image.dtype == torch.uint8
    assert image.shape == (3, 2, 3)
    assert image[1, 0, 2] == pixels[0, 2, 1]
    assert image.is_contiguous()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 2), RED)
    picture.putpixel((0, 0), GREEN)
    exif = Image.Exif()
    exif[274] = 6  # "rotate by 90 degrees clockwise to show"
    picture.save(tmp_path / "a.png", exif=exif)
    image = load_image(tmp_path / "a.png")
    assert image.shape == (3, 4, 2)
    assert image[:, 0, 1].tolist() == list(GREEN)  # top-left went to top-right


def test_palette(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), RED).convert("P").save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png")[:, 0, 0].tolist() == list(RED)


def test_transparency_becomes_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    picture.save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png")[:, 0].T.tolist() == [[255, 0, 0], [255, 255, 255]]


def test_transparent_palette_becomes_white(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.putpixel((0, 0), 0)
    picture.save(tmp_path / "a.png", transparency=0)
    assert load_image(tmp_path / "a.png")[:, 0].T.tolist() == [[255, 255, 255], [255, 0, 0]]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_grey_is_scaled(tmp_path: Path, name: str) -> None:
    Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).save(tmp_path / name)
    assert load_image(tmp_path / name)[0, 0].tolist() == [0, 100, 255]


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in (RED, GREEN)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif")[:, 0, 0].tolist() == list(RED)


def _half_a_photograph() -> bytes:
    data = (Path(__file__).parents[1] / "data" / "cards" / "IMG_2596.JPG").read_bytes()
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>404</html>", "HTML"),
        (b"not an image at all", "not an image of a known format"),
        (b"\x89PNG\r\n\x1a\n garbage behind a good signature", "known format|decoded"),
        (_half_a_photograph(), "cannot be decoded"),
    ],
    ids=["empty", "html", "text", "signature", "truncated"],
)
def test_bad_files_are_named_with_the_reason(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(BadImage, match=why) as error:
        load_image(path)
    assert str(path) in str(error.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="no such file"):
        load_image(tmp_path / "none.png")
    with pytest.raises(BadImage, match="decoded"):
        load_image(tmp_path)


def test_any_damage_is_a_bad_image_or_an_image(tmp_path: Path) -> None:
    """Damaged bytes never end in another exception."""
    random = np.random.default_rng(0)
    whole = {}
    for kind in ("png", "gif", "bmp", "tif", "jpg"):
        Image.fromarray(random.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(tmp_path / f"a.{kind}")
        whole[kind] = (tmp_path / f"a.{kind}").read_bytes()
    for trial in range(150):
        kind = list(whole)[trial % len(whole)]
        data = bytearray(whole[kind])
        for at in random.integers(0, len(data), size=3):
            data[at] = random.integers(0, 256)
        path = tmp_path / f"damaged.{kind}"
        path.write_bytes(bytes(data[: random.integers(1, len(data) + 1)]))
        with suppress(BadImage):
            assert load_image(path).ndim == 3


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert images.MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS  # the level at which Pillow itself refuses
    Image.new("1", (20_000, 9_000)).save(tmp_path / "bomb.png")  # 180 megapixels in some kilobytes
    with pytest.raises(BadImage, match="megapixels"):
        load_image(tmp_path / "bomb.png")
    Image.new("1", (20, 9)).save(tmp_path / "small.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 179)
    with pytest.raises(BadImage, match="found 20 x 9"):  # ours, where somebody has lifted Pillow's
        load_image(tmp_path / "small.png")
