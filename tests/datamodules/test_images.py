"""Every kind of file that calls itself an image."""

from __future__ import annotations

import re
import struct
import zlib
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


TURNS = {  # EXIF orientation -> what makes an upright (3, H, W) of the pixels as stored
    1: lambda x: x,
    2: lambda x: x.flip(2),
    3: lambda x: x.flip(1, 2),
    4: lambda x: x.flip(1),
    5: lambda x: x.transpose(1, 2),
    6: lambda x: x.flip(1).transpose(1, 2),
    7: lambda x: x.flip(1, 2).transpose(1, 2),
    8: lambda x: x.flip(2).transpose(1, 2),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["png", "tif", "webp"])
def test_every_orientation_in_every_kind_of_file(tmp_path: Path, orientation: int, kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(tmp_path / f"a.{kind}", exif=exif, **({"lossless": True} if kind == "webp" else {}))
    stored = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(load_image(tmp_path / f"a.{kind}"), TURNS[orientation](stored))


def test_palette(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), RED).convert("P").save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png")[:, 0, 0].tolist() == list(RED)


def test_transparency_becomes_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    picture.save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png")[:, 0].T.tolist() == [[255, 0, 0], [255, 255, 255]]


def test_half_transparent_pixels_are_mixed_with_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    picture.putpixel((1, 0), (0, 0, 0, 51))
    picture.save(tmp_path / "a.png")
    # 255 * (1 - 128 / 255) = 127 of white in green and blue; 255 * (1 - 51 / 255) = 204 in black
    assert load_image(tmp_path / "a.png")[:, 0].T.tolist() == [[255, 127, 127], [204, 204, 204]]


def test_a_transparent_colour_and_grey_with_alpha_become_white(tmp_path: Path) -> None:
    picture = Image.new("RGB", (2, 1), RED)
    picture.putpixel((1, 0), GREEN)
    picture.save(tmp_path / "colour.png", transparency=RED)
    assert load_image(tmp_path / "colour.png")[:, 0].T.tolist() == [[255, 255, 255], list(GREEN)]
    grey = Image.new("LA", (2, 1), (7, 255))
    grey.putpixel((1, 0), (7, 0))
    grey.save(tmp_path / "grey.png")
    assert load_image(tmp_path / "grey.png")[:, 0].T.tolist() == [[7, 7, 7], [255, 255, 255]]


def test_cmyk_and_one_bit(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert (load_image(tmp_path / "a.jpg")[:, 4, 4].int() - torch.tensor(RED)).abs().max() <= 3
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    assert load_image(tmp_path / "a.tif")[:, 4, 4].tolist() == list(RED)
    Image.new("1", (8, 8), 1).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").unique().tolist() == [255]


def test_transparent_palette_becomes_white(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.putpixel((0, 0), 0)
    picture.save(tmp_path / "a.png", transparency=0)
    assert load_image(tmp_path / "a.png")[:, 0].T.tolist() == [[255, 255, 255], [255, 0, 0]]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm", "a.jp2"])
def test_16_bit_grey_is_scaled(tmp_path: Path, name: str) -> None:
    grey = np.array([[0, 257 * 100, 65535]] * 8, dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / name)
    assert load_image(tmp_path / name)[:, 0].tolist() == [[0, 100, 255]] * 3


def test_16_bit_colours_keep_their_upper_bits(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)  # 2 x 1 pixels, 16 bits, RGB; Pillow does not write such
    row = b"\0" + struct.pack(">6H", 0xFFFF, 0x8000, 0x0001, 0x00FF, 0x0100, 0x7FFF)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(row)), chunk(b"IEND", b"")]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert load_image(tmp_path / "a.png")[:, 0].T.tolist() == [[255, 128, 0], [0, 1, 127]]


@pytest.mark.parametrize(
    ("pixels", "why"),
    [
        (np.array([[0, 70_000]], dtype=np.int32), "integers of more than 16 bits"),
        (np.array([[-1, 9]], dtype=np.int32), "integers of more than 16 bits"),
        (np.array([[0.0, 1.0]], dtype=np.float32), "floating point"),
    ],
)
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, pixels: np.ndarray, why: str) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(BadImage, match=why):
        load_image(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_first_frame_of_an_animation_or_of_pages(tmp_path: Path, name: str) -> None:
    first, *others = [Image.new("RGB", (2, 2), colour) for colour in (RED, GREEN, RED)]
    first.save(tmp_path / name, save_all=True, append_images=others, **({"lossless": True} if "webp" in name else {}))
    with Image.open(tmp_path / name) as image:
        assert getattr(image, "n_frames", 1) == 3
    assert load_image(tmp_path / name)[:, 0, 0].tolist() == list(RED)


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000), (3, 257)])
def test_extreme_shapes(tmp_path: Path, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert torch.equal(load_image(tmp_path / "a.png"), torch.from_numpy(pixels).permute(2, 0, 1))


def test_a_large_picture_is_not_copied_as_a_whole(tmp_path: Path) -> None:
    """Decoded, Pillow holds 4 bytes a pixel, the tensor 3: together 2.3 times the tensor."""
    Image.new("RGB", (5000, 3000), RED).save(tmp_path / "a.png", compress_level=1)
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        reset.write_text("5")  # the peak begins anew at what is used now
    except OSError:
        pytest.skip("the peak of this process's memory cannot be reset here")

    def kilobytes(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+)", status.read_text())[1])  # type: ignore[index]

    before = kilobytes("VmRSS")
    image = load_image(tmp_path / "a.png")
    assert kilobytes("VmHWM") - before < 4 * image.nbytes / 1024


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
