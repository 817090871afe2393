"""Expected boxes: against naive loops over real tokenizers' words, closed forms, torchvision and finite differences."""

from __future__ import annotations

import itertools
import math
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss
from transformers import AutoTokenizer

from benchmarks.families import QWEN
from modules.backbones.fragments import FragmentVocabulary, fragment_tokenizer
from modules.crop import CropAndScale
from modules.functional.boxes import check
from modules.functional.soft_boxes import (
    WrittenBox,
    bin_box,
    box_distance,
    box_losses,
    digit_box,
    digit_shapes,
    expectation,
    fit_boxes,
    pad,
    teacher_forced_expectation,
)

BASE = Path(__file__).parents[2] / "configs" / "quickstart" / "base.yaml"


def expected(written: WrittenBox, logits: Tensor) -> Tensor:
    """(4,) the box that logits (n, V) at the n tokens of a turn expect."""
    added = expectation(logits[written.positions], written.choices, written.values)
    return teacher_forced_expectation(added, torch.zeros_like(written.axes), written.axes, 1)[0]


@cache
def qwen() -> tuple[object, list[str]]:
    """Qwen2.5-VL's own tokenizer, and the text of each of its ids."""
    tokenizer = AutoTokenizer.from_pretrained(QWEN)
    return tokenizer, tokenizer.batch_decode([[k] for k in range(len(tokenizer))])


@pytest.mark.parametrize(
    "text",
    [
        'I look. {"bbox_2d": [12, 7, 140, 2048]}',
        '见{"bbox_2d": [0.125, 7.5, 140.25, 9]}\n',
        '{"bbox_2d": [-3, -0.5, 14, 20], "label": "12 cats"}',
        '{"bbox_2d": [1, 2, 3, 4]} no: {"bbox_2d":[11,22,333,444],"image": 1}',
    ],
)
def test_digits_of_qwens_tokenizer_equal_a_naive_loop(text: str) -> None:
    tokenizer, texts = qwen()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    logits = torch.randn(len(ids), len(texts), generator=torch.Generator().manual_seed(0)) * 3
    written = digit_box(ids, texts, digit_shapes(texts, [True] * len(texts)))
    assert written is not None

    digits = [tokenizer.convert_tokens_to_ids(str(d)) for d in range(10)]
    numbers, number = [], ""
    last = max(k for k in range(len(ids)) if "bbox" in texts[ids[k]])
    # every token from the last key on, character by character; numbers in the order of their ends
    for k in range(last + 3, len(ids)):  # behind "bbox", "_" and "2d"
        token = texts[ids[k]]
        for c in token:
            if c.isdigit() or c in "-.":
                number += c
                if c.isdigit():
                    assert token == c, "Qwen gives every digit a token of its own"
                    p = logits[k].double()[digits].softmax(0)
                    numbers.append([float(sum(d * p[d] for d in range(10))), number])
                else:
                    numbers.append([0.0, number])
            elif number:
                numbers.append("stop")
                number = ""
    groups = [list(g) for stop, g in itertools.groupby(numbers, lambda x: x == "stop") if not stop][:4]
    naive = []
    for group in groups:
        whole = group[-1][1]
        sign = -1 if whole[0] == "-" else 1
        point = len(whole.split(".")[0].lstrip("-"))
        digits_only = [value for value, prefix in group if prefix[-1].isdigit()]
        naive.append(sign * sum(v * 10.0 ** (point - 1 - n) for n, v in enumerate(digits_only)))
    torch.testing.assert_close(expected(written, logits.double()), torch.tensor(naive, dtype=torch.float64))
    assert written.coords == tuple(float(group[-1][1]) for group in groups)


@pytest.fixture(scope="module")
def quickstart() -> FragmentVocabulary:
    config = yaml.safe_load(BASE.read_text())
    return FragmentVocabulary(**config["model"]["init_args"]["backbone"]["init_args"]["tokenizer"]["vocabulary"])


def test_bins_of_the_quickstart_equal_a_naive_loop(quickstart: FragmentVocabulary) -> None:
    tokenizer = fragment_tokenizer(quickstart)
    bins = torch.tensor([tokenizer.convert_tokens_to_ids(f) for f in quickstart.coordinate_tokens()])
    ids = torch.tensor(tokenizer('<think>I zoom in on red {"bbox_2d": [48, 100, 84, 136]}')["input_ids"])
    logits = torch.randn(len(ids), len(tokenizer), generator=torch.Generator().manual_seed(1)) * 3
    written = bin_box(ids, bins, float(quickstart.step))
    assert written is not None
    assert written.coords == (48, 100, 84, 136)
    naive = []
    for token, ending in zip((2, 3, 4, 5), (", ", ", ", ", ", "]}"), strict=True):
        p = {v: logits[token, tokenizer.convert_tokens_to_ids(f"{v}{ending}")].double().exp() for v in range(0, 196, 4)}
        naive.append(float(sum(v * q for v, q in p.items()) / sum(p.values())))
    torch.testing.assert_close(expected(written, logits.double()), torch.tensor(naive, dtype=torch.float64))


def test_tokens_of_several_digits_are_compared_with_others_of_their_shape(quickstart: FragmentVocabulary) -> None:
    """The quickstart's tokens read as strings of digits: ``"48, "`` could have been any other two-digit coordinate."""
    tokenizer = fragment_tokenizer(quickstart)
    texts = tokenizer.batch_decode([[k] for k in range(len(tokenizer))])
    ids = torch.tensor(tokenizer('red {"bbox_2d": [48, 100, 84, 136]}')["input_ids"])
    written = digit_box(ids, texts, digit_shapes(texts, [True] * len(texts)))
    assert written is not None
    logits = torch.zeros(len(ids), len(texts))
    two, three = range(12, 100, 4), range(100, 196, 4)
    means = [sum(values) / len(values) for values in (two, three, two, three)]
    torch.testing.assert_close(expected(written, logits), torch.tensor(means))


def boxed(pieces: list[str]) -> WrittenBox | None:
    """The box in a text that is cut into these tokens, of a vocabulary with all of theirs and all short digits."""
    words = list(dict.fromkeys([*pieces, *map(str, range(10)), *(f"{k:02d}" for k in range(100))]))
    return digit_box(torch.tensor([words.index(p) for p in pieces]), words, digit_shapes(words, [True] * len(words)))


def test_expectation_of_independent_digits_is_the_mean_over_all_numbers_of_that_length() -> None:
    pieces = ['{"bbox_2d": [', "4", "2", ", ", "-", "17", "5", ".", "25", ", ", "9", ", ", "80", "]}"]
    words = list(dict.fromkeys([*pieces, *map(str, range(10)), *(f"{k:02d}" for k in range(100))]))
    ids = torch.tensor([words.index(p) for p in pieces])
    written = digit_box(ids, words, digit_shapes(words, [True] * len(words)))
    assert written is not None
    logits = torch.randn(len(ids), len(words), dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def distribution(position: int) -> list[tuple[str, float]]:
        width = len(pieces[position])
        alike = [w for w in words if re.fullmatch(rf"[0-9]{{{width}}}", w)]
        return list(zip(alike, logits[position, [words.index(w) for w in alike]].softmax(0).tolist(), strict=True))

    means = []
    for parts in ((1, 2), ("-", 5, 6, ".", 8), (10,), (12,)):
        choices = [[(part, 1.0)] if isinstance(part, str) else distribution(part) for part in parts]
        mean = 0.0
        for drawn in itertools.product(*choices):
            mean += float("".join(text for text, _ in drawn)) * math.prod(p for _, p in drawn)
        means.append(mean)
    torch.testing.assert_close(
        expected(written, logits), torch.tensor(means, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "pieces",
    [
        ['{"bbox_2d": [', "1", "e", "2", ", ", "3", ", ", "40", ", ", "50", "]}"],  # no plain number
        ['{"bbox_2d": [', "1", ", ", "3", ", ", "40", "]}"],  # three
        ['{"bbox_2d": [', "1, 3", ", ", "40", ", ", "50", "]}"],  # one token for two numbers
        ["7"],
    ],
)
def test_what_is_no_box_of_plain_numbers_is_left_out(pieces: list[str]) -> None:
    assert boxed(pieces) is None


def test_ids_that_cannot_be_sampled_are_no_choices() -> None:
    texts = ['{"bbox_2d": [', *"0123456789", ", ", "]}", "7"]
    ids = torch.tensor([0, 2, 11, 3, 11, 4, 11, 5, 12])
    usable = [True] * 13 + [False]
    written = digit_box(ids, texts, digit_shapes(texts, usable))
    assert written is not None
    assert written.choices[0].tolist() == list(range(1, 11))


def test_few_coordinate_tokens_are_no_box() -> None:
    bins = torch.tensor([[0, 1, 2], [3, 4, 5]])
    assert bin_box(torch.tensor([9, 0, 1, 2, 9]), bins, 4.0) is None
    written = bin_box(torch.tensor([0, 9, 2, 0, 1, 5]), bins, 4.0)  # the last four, wherever others stand
    assert written is not None
    assert written.coords == (8, 0, 4, 8)
    assert written.positions.tolist() == [2, 3, 4, 5]


def test_temperature_and_padding() -> None:
    logits = torch.tensor([[0.0, 2.0, 5.0], [0.0, 2.0, 5.0]])
    choices, values = pad([torch.tensor([0, 1]), torch.tensor([0, 1, 2])], -1), torch.tensor([[0.0, 1, 99], [0, 1, 2]])
    p = torch.tensor([0.0, 1.0, 2.5]).exp()
    torch.testing.assert_close(
        expectation(logits, choices, values, temperature=2.0),
        torch.stack([p[1] / p[:2].sum(), (p[1] + 2 * p[2]) / p.sum()]),
    )


coordinate = st.one_of(st.floats(-1e3, 1e3, width=32), st.sampled_from([0.0, 1.0, 64.0, 128.0]))


@given(
    st.lists(st.tuples(*[coordinate] * 4), min_size=1, max_size=20), st.tuples(st.integers(1, 128), st.integers(1, 128))
)
@settings(max_examples=150, deadline=None)
def test_fitted_boxes_can_be_cropped_and_have_a_gradient(rows: list[tuple[float, ...]], size: tuple[int, int]) -> None:
    boxes = torch.tensor(rows, requires_grad=True)
    fitted, changed = fit_boxes(boxes, torch.tensor([size] * len(rows), dtype=torch.float32))
    fitted.sum().backward()
    assert boxes.grad is not None
    assert boxes.grad.isfinite().all()
    CropAndScale(size=(8, 8))([torch.zeros(3, *size)], fitted.detach(), torch.zeros(len(rows), dtype=torch.long))
    for before, after, moved in zip(rows, fitted.tolist(), changed.tolist(), strict=True):
        valid = check(tuple(before), size, 0.0) is None
        assert moved == (tuple(before) != tuple(after))
        assert not (valid and moved)


def test_a_fitted_box_by_hand() -> None:
    boxes = torch.tensor([[-3.0, 4, 20, 30], [12, 8, 10, 9], [-9, 5, -5, 9]], requires_grad=True)
    fitted, changed = fit_boxes(boxes, torch.tensor([[24.0, 32.0]] * 3))
    assert fitted.tolist() == [[0, 4, 20, 24], [10.5, 8, 11.5, 9], [0, 5, 1, 9]]
    assert changed.tolist() == [True, True, True]
    (gradient,) = torch.autograd.grad(fitted[0].sum() + fitted[1, 0] * 10, boxes)
    assert gradient.tolist() == [[0, 1, 1, 0], [5, 0, 5, 0], [0, 0, 0, 0]]


def test_losses_equal_torchvision_and_a_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(2, 50, 2, 2, generator=generator, dtype=torch.float64) * 100
    a, b = torch.cat([corners.amin(2), corners.amax(2)], -1)
    sizes = torch.tensor([[100.0, 50.0]] * 50, dtype=torch.float64)
    l1, overlap = box_losses(a, b, sizes)
    torch.testing.assert_close(overlap, generalized_box_iou_loss(a, b), rtol=1e-6, atol=1e-6)
    loop = [
        (abs(p[0] - q[0]) / 50 + abs(p[1] - q[1]) / 100 + abs(p[2] - q[2]) / 50 + abs(p[3] - q[3]) / 100) / 4
        for p, q in zip(a, b, strict=True)
    ]
    torch.testing.assert_close(l1, torch.stack(loop))
    assert torch.equal(l1, box_distance(b, a, sizes))


def test_gradient_through_box_crop_and_tower_equals_finite_differences() -> None:
    """From the logits of coordinate bins, through the expected box and the crop, to a small tower's answer."""
    generator = torch.Generator().manual_seed(4)
    image = torch.rand(3, 30, 40, generator=generator, dtype=torch.float64)
    tower = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 4, stride=4), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(16, 5)
    ).double()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    ids = torch.tensor([1, 4, 13, 18])
    written = bin_box(ids, torch.arange(20).view(2, 10), 3.7)
    assert written is not None
    crop = CropAndScale(size=(8, 8))

    def loss(logits: Tensor) -> Tensor:
        box, _ = fit_boxes(expected(written, logits)[None], torch.tensor([[30.0, 40.0]]).double())
        return torch.nn.functional.cross_entropy(tower(crop([image], box)[0][None]), torch.tensor([2]))

    logits = torch.randn(4, 20, generator=generator, dtype=torch.float64)
    logits[:2, :3] += 3  # the box has an inside
    logits[2:, 16:] += 3
    assert torch.autograd.gradcheck(loss, logits.requires_grad_(), eps=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    assert gradient.abs().max() > 1e-4
