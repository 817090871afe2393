"""The generated cards: what is drawn, what is asked, and that it is the same everywhere."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from datamodules.cards import (
    CARD,
    CELL,
    COLOURS,
    PLATE,
    SIZE,
    CardsDataModule,
    CardSplit,
    draw_image,
    loosen,
    questions,
    write_split,
)
from datamodules.images import load_image
from modules.functional.grammar import last_answer, well_formed
from modules.trajectory import Region

N = 40


def test_cards_lie_in_different_cells_and_carry_different_colours() -> None:
    for index in range(N):
        cards = draw_image(3, "train", index).cards
        assert len({card.colour for card in cards}) == 4
        for card in cards:
            x1, y1, x2, y2 = card.box
            assert (x2 - x1, y2 - y1) == (CARD, CARD)
            assert x1 // CELL == (x2 - 1) // CELL
            assert y1 // CELL == (y2 - 1) // CELL
        assert len({(card.box[0] // CELL, card.box[1] // CELL) for card in cards}) == 4


def test_pixels_show_what_the_labels_say() -> None:
    data = load_digits()
    for index in range(N):
        image = draw_image(3, "train", index)
        assert image.pixels.shape == (SIZE, SIZE, 3)
        for card in image.cards:
            x1, y1, x2, y2 = (int(side) for side in card.box)
            corner = image.pixels[y1, x1] / 255
            assert (image.pixels[[y1, y1, y2 - 1], [x1, x2 - 1, x2 - 1]] == image.pixels[y1, x1]).all()
            shades = np.array(list(COLOURS.values()))
            brightness = corner.max()
            assert list(COLOURS)[np.abs(shades * brightness - corner).sum(axis=1).argmin()] == card.colour
            assert 0.745 <= brightness <= 1
            margin = (CARD - PLATE) // 2
            plate = image.pixels[y1 + margin : y2 - margin, x1 + margin : x2 - margin]
            scan = torch.tensor(data.images[card.scan])[None, None] / 16 * 255
            expected = torch.nn.functional.interpolate(scan, size=(PLATE, PLATE), mode="bilinear")[0, 0]
            assert np.abs(plate - expected.numpy()[..., None]).max() <= 0.5 + 1e-6
            assert data.target[card.scan] == card.digit


def test_background_is_grey_and_dark() -> None:
    image = draw_image(0, "train", 0)
    free = np.ones((SIZE, SIZE), dtype=bool)
    for card in image.cards:
        x1, y1, x2, y2 = (int(side) for side in card.box)
        free[y1:y2, x1:x2] = False
    background = image.pixels[free]
    assert (background == background[:, :1]).all()
    assert background.max() < 0.36 * 255
    assert background.std() > 15


def test_pools_share_no_scan() -> None:
    seen = {
        pool: {card.scan for index in range(300) for card in draw_image(0, pool, index).cards}
        for pool in ("train", "heldout")
    }
    assert all(scan % 5 == 0 for scan in seen["heldout"])
    assert all(scan % 5 != 0 for scan in seen["train"])
    assert len(seen["heldout"]) > 300  # of 360: drawn from everywhere
    assert len(seen["train"]) > 700


def test_colours_digits_and_cells_are_all_used_alike() -> None:
    cards = [card for index in range(600) for card in draw_image(1, "train", index).cards]
    digits, colours = Counter(card.digit for card in cards), Counter(card.colour for card in cards)
    cells = Counter((card.box[0] // CELL, card.box[1] // CELL) for card in cards)
    for counts, kinds in ((digits, 10), (colours, 6), (cells, 16)):
        assert len(counts) == kinds
        expected = len(cards) / kinds
        assert max(abs(count - expected) for count in counts.values()) < 5 * expected**0.5


def test_an_image_depends_on_seed_pool_and_index_only() -> None:
    first = draw_image(5, "train", 7)
    for _ in range(3):
        draw_image(5, "train", 6)
    again = draw_image(5, "train", 7)
    assert (first.pixels == again.pixels).all()
    assert first.cards == again.cards
    for other in (draw_image(6, "train", 7), draw_image(5, "train", 8), draw_image(5, "heldout", 7)):
        assert other.cards != first.cards


def test_the_generator_does_not_change_unnoticed() -> None:
    """Data on disk are kept under VERSION: if this fails, raise it, and write down the new values.

    Taken from the first version of the generator.
    """
    card = draw_image(0, "train", 0).cards[0]
    assert (card.colour, card.digit, card.scan, card.box) == ("cyan", 8, 1537, (57.0, 149.0, 93.0, 185.0))


def test_questions_and_rationales() -> None:
    image = draw_image(0, "train", 12)
    box, glance, plain = (
        questions(image, CardSplit(20, 0, rationale=kind, regions=kind == "none"), 12)  # type: ignore[arg-type]
        for kind in ("box", "glance", "none")
    )
    for card, zoomed, quick, asked in zip(image.cards, box, glance, plain, strict=True):
        assert zoomed.id == quick.id == asked.id == f"000012-{card.colour}"
        assert zoomed.question == f"Which digit is on the {card.colour} card?"
        assert zoomed.answers == (str(card.digit),)
        assert zoomed.meta == {"image_id": "000012"}
        look, read = zoomed.rationale
        assert look.text == f"<think>I zoom in on {card.colour} "
        assert look.region is not None
        assert look.region.box == card.box
        assert read.region is None
        for sample in (zoomed, quick):
            written = "".join(step.text for step in sample.rationale)
            assert well_formed(written)
            assert last_answer(written) == str(card.digit)
        assert [step.region for step in quick.rationale] == [None]
        assert asked.rationale == ()
        assert asked.regions[0].box == card.box
        assert zoomed.regions == ()


def test_half_of_the_questions_may_ask_for_a_place() -> None:
    split = CardSplit(N, 0, rationale="box", loose_size=0.3, regions=True, places=True, glances=0.4)
    looked: Counter[bool] = Counter()
    for index in range(N):
        image = draw_image(0, "train", index)
        samples = questions(image, split, index)
        assert Counter(sample.source for sample in samples) == {"cards": 2, "card_places": 2}
        for card, sample in zip(image.cards, samples, strict=True):
            written = "".join(step.text for step in sample.rationale)
            zooms = sample.rationale[0].region is not None
            (answer,) = sample.answers
            assert last_answer(written) == answer
            if sample.source == "cards":
                assert (sample.question, answer) == (f"Which digit is on the {card.colour} card?", str(card.digit))
                assert zooms
                assert sample.regions == (Region(card.box),)
            else:
                assert sample.question == f"Where is the {card.colour} card?"
                x, y = (card.box[0] + card.box[2]) / 2, (card.box[1] + card.box[3]) / 2
                assert answer == ("top" if y < 96 else "bottom") + (" left" if x < 96 else " right")
                assert sample.regions == ()
                looked[zooms] += 1
    assert looked[False] == pytest.approx(0.4 * 2 * N, abs=3 * (0.24 * 2 * N) ** 0.5)


def test_a_place_is_asked_for_alike_whatever_the_rationale() -> None:
    image = draw_image(0, "train", 3)
    with_box, plain = (
        [(s.question, s.answers) for s in questions(image, split, 3)]
        for split in (CardSplit(9, 0, rationale="box", places=True, glances=0.4), CardSplit(9, 0, places=True))
    )
    assert with_box == plain


def test_loose_boxes_stay_within_their_limits() -> None:
    box = (60.0, 70.0, 96.0, 106.0)
    random = np.random.default_rng(0)
    drawn = np.array([loosen(box, 0.8, 0.25, random) for _ in range(2000)])
    width, height = drawn[:, 2] - drawn[:, 0], drawn[:, 3] - drawn[:, 1]
    assert (drawn == drawn.round()).all()
    assert width.min() >= CARD - 1
    assert width.max() <= 1.8 * CARD + 1
    assert np.abs(width - height).max() <= 2  # one factor for both, each side rounded
    shift = (drawn[:, 0] + drawn[:, 2]) / 2 - 78
    assert (np.abs(shift) <= 0.25 * width + 1).all()
    assert np.abs(width.mean() - 1.4 * CARD) < 1
    assert np.abs(shift.mean()) < 0.5
    assert shift.std() == pytest.approx(0.25 * 1.4 * CARD / 3**0.5, rel=0.1)
    assert loosen(box, 0.0, 0.0, random) == box


def test_loose_boxes_at_the_border_are_clipped_and_never_empty() -> None:
    random = np.random.default_rng(0)
    for box in ((0.0, 0.0, 36.0, 36.0), (156.0, 156.0, 192.0, 192.0)):
        drawn = np.array([loosen(box, 3.0, 0.5, random) for _ in range(2000)])
        assert drawn.min() >= 0
        assert drawn.max() <= SIZE
        assert (drawn[:, 2:] - drawn[:, :2]).min() >= 17


def test_loosening_changes_neither_pictures_nor_answers() -> None:
    image = draw_image(0, "train", 3)
    clean, loose = (
        questions(image, CardSplit(9, 0, rationale="box", loose_size=size, loose_shift=0.25), 3) for size in (0, 0.8)
    )
    assert [sample.answers for sample in clean] == [sample.answers for sample in loose]
    assert [sample.rationale for sample in clean] != [sample.rationale for sample in loose]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"images": 0, "seed": 0}, "images"),
        ({"images": 1, "seed": -1}, "seed"),
        ({"images": 1, "seed": 0, "rationale": "box", "loose_size": -1.0}, "loose_size"),
        ({"images": 1, "seed": 0, "rationale": "box", "loose_shift": 0.6}, "loose_shift"),
        ({"images": 1, "seed": 0, "rationale": "glance", "loose_size": 0.5}, "rationale 'box' only"),
        ({"images": 1, "seed": 0, "rationale": "box", "places": True, "glances": 1.5}, "glances"),
        ({"images": 1, "seed": 0, "rationale": "box", "glances": 0.5}, "glances.*places=False"),
    ],
)
def test_impossible_splits_are_refused(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        CardSplit(**settings)  # type: ignore[arg-type]


def test_written_splits_read_back_exactly(tmp_path: Path) -> None:
    split = CardSplit(3, 0, "heldout", regions=True)
    path = write_split(split, tmp_path)
    assert path == tmp_path / split.fingerprint / "data.jsonl"
    assert [folder.name for folder in tmp_path.iterdir()] == [split.fingerprint]  # nothing half-made is left
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 12
    for index in range(3):
        pixels = torch.from_numpy(draw_image(0, "heldout", index).pixels).permute(2, 0, 1)
        assert torch.equal(load_image(path.parent / rows[4 * index]["image"]), pixels)


def test_a_split_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = CardSplit(2, 0)
    path = write_split(split, tmp_path)
    monkeypatch.setattr("datamodules.cards.draw_image", None)  # calling it would fail
    assert write_split(split, tmp_path) == path
    with pytest.raises(TypeError):
        write_split(CardSplit(3, 0), tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == [split.fingerprint]


def test_a_faster_process_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = CardSplit(2, 0)
    original = questions

    def overtaken(*args: object) -> object:
        monkeypatch.setattr("datamodules.cards.questions", original)
        write_split(split, tmp_path)
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("datamodules.cards.questions", overtaken)
    assert len(write_split(split, tmp_path).read_text().splitlines()) == 8
    assert [folder.name for folder in tmp_path.iterdir()] == [split.fingerprint]


def test_data_module_end_to_end(tmp_path: Path) -> None:
    data = CardsDataModule(
        str(tmp_path),
        train=CardSplit(6, 0, rationale="box"),
        val=CardSplit(2, 1, "heldout", regions=True),
        test=CardSplit(1, 2, "heldout", regions=True),
        batch_size=8,
    )
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [len(batch.samples) for batch in batches] == [8, 8, 8]
    for batch in batches:
        for first in (0, 4):
            together = batch.samples[first : first + 4]
            assert len({sample.meta["image_id"] for sample in together}) == 1
            assert all(sample.images[0] is together[0].images[0] for sample in together)
    (val,) = data.val_dataloader()
    assert next(sample.id for batch in val for sample in batch.samples).startswith("000000-")
    assert all(sample.regions for batch in val for sample in batch.samples)
    for stage in ("test", "predict"):
        data.setup(stage)
    assert sum(len(batch.samples) for batch in data.test_dataloader()) == 4
    assert sum(len(batch.samples) for batch in data.predict_dataloader()) == 4
    assert data.skipped_total == 0
