"""One image under two names is found, two images are not taken for one; against ImageHash's own distance."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.images import load_image
from datamodules.pictures import ImageFile
from datamodules.vlir.collect import Images
from datamodules.vlir.fingerprints import Bits, fingerprint, fingerprints, perceptual_hash

imagehash = pytest.importorskip("imagehash")

DATA = Path(__file__).parents[1] / "data"
FILES = sorted(path for path in DATA.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
NAMES = [path for path in FILES if path.parent.name != "photos" or path.name.startswith("icdar")]  # the rest are copies


def test_different_photographs_are_far_apart_and_copies_are_near(tmp_path: Path) -> None:
    hashes = {path: perceptual_hash(load_image(path)) for path in NAMES}
    bits = Bits()
    for path, value in hashes.items():
        bits.add(value, path.name)
    limit = Images().near_duplicate
    assert limit is not None
    for a, b in itertools.combinations(NAMES, 2):
        apart = imagehash.hex_to_hash(hashes[a]) - imagehash.hex_to_hash(hashes[b])
        assert apart > 2 * limit, (a, b)
    for path in NAMES:
        with Image.open(path) as image:
            small = image.convert("RGB").resize((image.width // 2, image.height // 2))
            small.save(tmp_path / "copy.jpg", quality=40)
        found = bits.nearest(perceptual_hash(load_image(tmp_path / "copy.jpg")))
        assert found is not None
        assert found[0] == path.name
        assert found[1] <= limit // 2


def test_the_nearest_is_that_of_imagehash_among_many() -> None:
    random = np.random.default_rng(0)
    many = [random.bytes(32).hex() for _ in range(300)]  # more than the array begins with
    bits = Bits()
    assert bits.nearest(many[0]) is None
    for k, value in enumerate(many):
        bits.add(value, str(k))
    wanted = random.bytes(32).hex()
    distances = [imagehash.hex_to_hash(value) - imagehash.hex_to_hash(wanted) for value in many]
    assert bits.nearest(wanted) == (str(int(np.argmin(distances))), min(distances))


def test_fingerprints_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, damaged = ImageFile(tmp_path, "a.png"), ImageFile(tmp_path, "b.png")
    pixels = torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    first = fingerprints([image, image, damaged], tmp_path / "known.json", workers=2)
    assert first[image] == fingerprint(image)
    assert fingerprint(image).size == (40, 60)
    assert "not an image" in str(first[damaged])
    monkeypatch.setattr(ImageFile, "load", lambda self: pytest.fail("decoded again"))
    assert fingerprints([image], tmp_path / "known.json", workers=1)[image] == first[image]
    monkeypatch.undo()
    Image.fromarray(pixels.flip(0).numpy()).save(tmp_path / "a.png")
    assert fingerprints([image], tmp_path / "known.json", workers=1)[image] != first[image]
