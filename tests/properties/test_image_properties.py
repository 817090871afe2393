"""Whatever a file holds: a picture that can be computed with, or a refusal that names the file. Never anything else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from datamodules.images import MAX_PIXELS, BadImage, load_image
from modules.crop import CropAndScale
from tests.properties.hostile import FILES, images, png_that_claims, quick

SCALER = CropAndScale(grid=8, min_pixels=16 * 16, max_pixels=64 * 64)


@given(images())
@quick(150)
@example(b"")
@example(png_that_claims(2**31 - 1, 2**31 - 1))
@example(png_that_claims(0, 1))
def test_any_bytes_are_a_picture_or_a_named_refusal(data: bytes) -> None:
    try:
        image = load_image(data, "a.png")
    except BadImage as error:
        message = str(error)
        assert message.startswith("a.png: ")
        assert message.isprintable(), "an unprintable message breaks a log"
        return
    channels, height, width = image.shape
    assert (image.dtype, channels) == (torch.uint8, 3)
    assert height >= 1
    assert width >= 1
    # what a policy would be shown of it
    (seen,) = SCALER([image], torch.tensor([[0.0, 0.0, width, height]]))
    assert seen.isfinite().all()
    assert 0 <= seen.min() <= seen.max() <= 1


@pytest.mark.parametrize("name", FILES)
def test_the_files_that_are_damaged_are_whole_before(name: str) -> None:
    """Else the properties above would try refusals only."""
    if name in ("EPS", "tiff float"):  # refused: a program; which value is white is not said
        with pytest.raises(BadImage):
            load_image(FILES[name](), name)
    else:
        assert load_image(FILES[name](), name).shape[0] == 3


@given(st.sampled_from(sorted(FILES)), st.floats(0, 0.9))
@quick(60)
def test_a_file_that_breaks_off_is_refused_or_whole(name: str, share: float) -> None:
    data = FILES[name]()
    try:
        whole = load_image(data, name)
    except BadImage:
        return
    try:
        image = load_image(data[: int(share * len(data))], name)
    except BadImage:
        return
    assert torch.equal(image, whole), "a part of a picture was taken for all of it"


@given(st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1))
@quick(40)
@example(2**31 - 1, 1)
@example(MAX_PIXELS + 1, 1)
def test_a_bomb_is_refused_by_its_size_before_it_is_unpacked(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        with pytest.raises(BadImage, match="megapixels"):
            load_image(png_that_claims(width, height))
