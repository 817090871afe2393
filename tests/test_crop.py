"""Crops against torchvision and transformers, their gradients against finite differences."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.autograd import gradcheck
from torchvision.transforms.v2.functional import InterpolationMode, pil_to_tensor, resized_crop
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from modules.crop import CropAndScale
from modules.functional.boxes import zoom_factor

PHOTOS = sorted((Path(__file__).parent / "data" / "photos").glob("*.jpg"))


@pytest.fixture(scope="module")
def photos() -> list[Tensor]:
    images = [pil_to_tensor(Image.open(path).convert("RGB")) for path in PHOTOS]
    assert [tuple(image.shape[1:]) for image in images] == [(504, 378), (270, 480), (720, 1280)]
    return images


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    """Uniform noise: every pixel differs from its neighbours, so a wrong tap shows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, height, width, generator=generator, dtype=torch.float64)


def crop(image: Tensor, box: tuple[float, ...], size: tuple[int, int]) -> Tensor:
    boxes = torch.tensor([box], dtype=torch.float64)
    return CropAndScale(size=size)([image], boxes)[0]


def torchvision_crop(image: Tensor, box: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    x1, y1, x2, y2 = box
    if size[1] == 1 and size[0] > 1:  # torch 2.14 returns wrong rows for these; Pillow agrees with the transpose
        return torchvision_crop(image.mT.contiguous(), (y1, x1, y2, x2), (size[1], size[0])).mT
    return resized_crop(image, y1, x1, y2 - y1, x2 - x1, list(size), InterpolationMode.BILINEAR, antialias=True)


# Agreement with torchvision where the box is one of whole pixels.


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((157, 124, 285, 260), (272, 256)),  # x2, the zoom of a small region
        ((157, 124, 285, 260), (136, 128)),  # x1: a copy
        ((3, 5, 203, 45), (41, 333)),  # non-square, uneven factors
        ((0, 0, 9, 7), (24, 24)),  # the image's corner
        ((10, 20, 11, 21), (4, 6)),  # one pixel
    ],
)
def test_enlarging_equals_torchvision(photos: list[Tensor], box: tuple[int, ...], size: tuple[int, int]) -> None:
    for photo in photos:
        image = photo / 255
        boxes = torch.tensor([box], dtype=torch.float32)
        ours = CropAndScale(size=size)([image], boxes)[0]
        torch.testing.assert_close(ours, torchvision_crop(image, box, size), rtol=0, atol=1e-5)


@pytest.mark.parametrize("factor", [1.5, 3, 6, 12])
def test_shrinking_equals_torchvision(photos: list[Tensor], factor: float) -> None:
    for photo in photos:
        image = photo / 255
        height, width = image.shape[1:]
        for box in [(0, 0, width, height), (31, 17, 361, 259)]:
            size = (round((box[3] - box[1]) / factor), round((box[2] - box[0]) / factor))
            ours = CropAndScale(size=size)([image], torch.tensor([box], dtype=torch.float32))[0]
            torch.testing.assert_close(ours, torchvision_crop(image, box, size), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(10, 90), (90, 10), (1, 1), (1, 50), (50, 1), (40, 80)])
def test_noise_equals_torchvision_when_an_axis_shrinks_and_another_does_not(size: tuple[int, int]) -> None:
    image, box = noise(64, 96), (7, 11, 67, 51)
    torch.testing.assert_close(crop(image, box, size), torchvision_crop(image, box, size), rtol=0, atol=1e-12)


# Boxes between pixels.


@pytest.mark.parametrize(
    ("box", "size"),
    [((4.3, 6.8, 20.9, 17.1), (30, 45)), ((4.3, 6.8, 52.3, 42.8), (12, 16))],  # enlarging; 3 to 1
)
def test_ramp_gives_the_place_of_each_output_pixel(box: tuple[float, ...], size: tuple[int, int]) -> None:
    # Bilinear and, at a whole factor, triangle weights reproduce a linear image; pixel j lies at j + 1/2.
    y, x = torch.meshgrid(torch.arange(60.0).double() + 0.5, torch.arange(80.0).double() + 0.5, indexing="ij")
    ours = crop(torch.stack([x, y, x + y]) / 200, box, size) * 200
    centres_x = box[0] + (torch.arange(size[1]).double() + 0.5) * (box[2] - box[0]) / size[1]
    centres_y = box[1] + (torch.arange(size[0]).double() + 0.5) * (box[3] - box[1]) / size[0]
    margin = 4  # output pixels whose weights the edge of the box cuts off
    inner = slice(margin, -margin)
    torch.testing.assert_close(ours[0, 5, inner], centres_x[inner], rtol=0, atol=1e-9)
    torch.testing.assert_close(ours[1, inner, 5], centres_y[inner], rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [(40, 40), (5, 6), (5, 40)])
def test_nothing_outside_the_box_is_read(size: tuple[int, int]) -> None:
    image, box = noise(40, 50), (10.25, 8.5, 30.75, 29.25)
    inside = torch.zeros(40, 50, dtype=torch.bool)
    inside[8:30, 10:31] = True  # the pixels that the box touches
    other = torch.where(inside, image, 1 - image)
    torch.testing.assert_close(crop(other, box, size), crop(image, box, size), rtol=0, atol=1e-12)
    assert (crop(1 - image, box, size) - crop(image, box, size)).abs().max() > 0.01


@pytest.mark.parametrize("size", [(30, 35), (5, 6)])
def test_crop_is_continuous_in_the_box(size: tuple[int, int]) -> None:
    # From one pixel's edge to the next and beyond; and (size 30 x 35) from enlarging to shrinking.
    image = noise(60, 60)
    boxes = torch.tensor([[10.0, 9.0, 40.0, 38.0]]).double() + torch.linspace(0, 1, 801).double()[
        :, None
    ] * torch.tensor([1.5, 1.2, 7.5, 4.0])
    frames = torch.stack(CropAndScale(size=size)([image], boxes, torch.zeros(801, dtype=torch.long)))
    steps = (frames[1:] - frames[:-1]).abs().amax((1, 2, 3))
    # The fastest coordinate moves by 7.5 / 800 pixels a step, over noise in [0, 1]; a jump would be near 1.
    assert steps.max() < 0.1
    assert steps.min() > 0


# Gradients.

ENLARGING = [[3.3, 2.6, 9.8, 7.9], [0.4, 0.7, 6.3, 5.6]]
SHRINKING = [[1.3, 0.6, 17.8, 13.9], [0.4, 1.7, 12.3, 14.6]]


@pytest.mark.parametrize("corners", [ENLARGING, SHRINKING, [ENLARGING[0], SHRINKING[1]]])
@pytest.mark.parametrize("sizes", [None, [(9, 13), (4, 7)], [(2, 13), (1, 1)]])
def test_gradients(corners: list[list[float]], sizes: list[tuple[int, int]] | None) -> None:
    images = [noise(15, 18).requires_grad_(), noise(16, 14, seed=1).requires_grad_()]
    boxes = torch.tensor(corners, dtype=torch.float64).requires_grad_()
    module = CropAndScale(size=(7, 8))

    def weighted(boxes: Tensor, *images: Tensor) -> tuple[Tensor, ...]:
        return tuple(module(images, boxes, sizes=sizes))

    assert gradcheck(weighted, (boxes, *images), fast_mode=True)


def test_gradients_of_boxes_that_share_images() -> None:
    images = [noise(15, 18).requires_grad_(), noise(15, 18, seed=1).requires_grad_()]
    boxes = torch.tensor([ENLARGING[0], SHRINKING[0], ENLARGING[1], SHRINKING[1]], dtype=torch.float64)
    owner = torch.tensor([1, 0, 1, 1])
    module = CropAndScale(size=(7, 8))
    assert gradcheck(lambda b, *i: tuple(module(i, b, owner)), (boxes.requires_grad_(), *images), fast_mode=True)


@pytest.mark.parametrize("size", [(24, 24), (4, 4)])
def test_moving_towards_a_bright_square_brightens(size: tuple[int, int]) -> None:
    image = torch.zeros(3, 64, 64, dtype=torch.float64)
    image[:, 20:40, 30:50] = 1.0
    box = torch.tensor([[14.35, 12.45, 34.35, 32.45]], dtype=torch.float64, requires_grad=True)  # up and left of it
    module = CropAndScale(size=size)
    module([image], box)[0].mean().backward()
    assert box.grad is not None
    right, down = box.grad[0, [0, 2]].sum().item(), box.grad[0, [1, 3]].sum().item()
    assert right > 0
    assert down > 0

    def brightness(dx: float, dy: float) -> float:
        moved = box.detach() + torch.tensor([dx, dy, dx, dy], dtype=torch.float64)
        return module([image], moved)[0].mean().item()

    step = 1e-6
    assert right == pytest.approx((brightness(step, 0) - brightness(-step, 0)) / (2 * step), rel=1e-5)
    assert down == pytest.approx((brightness(0, step) - brightness(0, -step)) / (2 * step), rel=1e-5)


# Batches.


@pytest.mark.parametrize("module", [CropAndScale(size=(24, 20)), CropAndScale(None, 28, 4 * 784, 64 * 784)])
def test_batch_equals_one_at_a_time(photos: list[Tensor], module: CropAndScale) -> None:
    # Two images of one shape, with as many boxes that do not shrink; two of other shapes; one without a box.
    images = [photos[0], photos[0].flip(2), photos[2], photos[1], photos[1]]
    boxes = torch.tensor(
        [
            [400.0, 100.0, 700.0, 420.5],
            [10.0, 10.0, 25.5, 30.0],
            [50.0, 60.5, 350.0, 460.0],
            [200.0, 301.0, 219.0, 320.0],
            [0.0, 0.0, 480.0, 270.0],
            [100.0, 200.0, 112.0, 214.0],
            [20.0, 20.0, 30.0, 30.0],
            [1.0, 2.0, 300.0, 400.0],
        ]
    )
    owner = torch.tensor([2, 0, 1, 1, 3, 0, 1, 0])
    together = module(images, boxes, owner)
    assert len(together) == len(boxes)
    for index, image in enumerate(owner.tolist()):
        (alone,) = module([images[image]], boxes[index : index + 1])
        # Bilinear samples depend on the cut-out in the last bits of a float32 coordinate of up to 504 pixels.
        torch.testing.assert_close(together[index], alone, rtol=0, atol=5e-5)


@pytest.mark.parametrize("owner", [[0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
@pytest.mark.parametrize("size", [(24, 24), (4, 4)])
def test_images_of_one_shape_may_have_any_numbers_of_boxes(owner: list[int], size: tuple[int, int]) -> None:
    images = [noise(20, 30), noise(20, 30, seed=1)]
    corners = [(0.5, 0.5, 9.0, 8.0), (20.0, 3.0, 30.0, 20.0), (3.0, 3.0, 20.0, 15.5), (7.0, 1.0, 12.0, 13.0)]
    boxes = torch.tensor(corners, dtype=torch.float64)
    together = CropAndScale(size=size)(images, boxes, torch.tensor(owner))
    for ours, box, image in zip(together, corners, owner, strict=True):
        torch.testing.assert_close(ours, crop(images[image], box, size), rtol=0, atol=1e-12)


def test_order_of_boxes_is_the_order_of_crops() -> None:
    images = [noise(20, 30, seed=seed) for seed in range(3)]
    boxes = torch.tensor([[1.5, 2.0, 9.0, 8.0], [0.0, 0.0, 30.0, 20.0], [3.0, 3.0, 20.0, 15.5]], dtype=torch.float64)
    module = CropAndScale(size=(8, 8))
    straight = module(images, boxes)
    order = torch.tensor([2, 0, 1])
    shuffled = module(images, boxes[order], order)
    for index, source in enumerate(order.tolist()):
        torch.testing.assert_close(shuffled[index], straight[source], rtol=0, atol=1e-12)


def test_sizes_override_the_rule_box_by_box() -> None:
    sizes = [(5, 9), (40, 3), (5, 9)]
    boxes = torch.tensor([[1.0, 2.0, 9.0, 8.0]]).repeat(3, 1)
    crops = CropAndScale(size=(8, 8))([noise(20, 30)], boxes, torch.zeros(3, dtype=torch.long), sizes)
    assert [tuple(one.shape) for one in crops] == [(3, 5, 9), (3, 40, 3), (3, 5, 9)]
    assert torch.equal(crops[0], crops[2])


@pytest.mark.parametrize("size", [(200, 180), (16, 12)])
def test_uint8_equals_float_and_is_left_as_it_was(photos: list[Tensor], size: tuple[int, int]) -> None:
    photo = photos[1]
    before, boxes = photo.clone(), torch.tensor([[20.0, 30.0, 180.5, 160.25]])
    module = CropAndScale(size=size)
    (ours,) = module([photo], boxes)
    assert ours.dtype == torch.float32
    assert ours.min() >= 0
    assert 0.5 < ours.max() <= 1 + 1e-6
    torch.testing.assert_close(ours, module([photo / 255], boxes)[0], rtol=0, atol=1e-6)
    assert torch.equal(photo, before)


@pytest.mark.parametrize("size", [(60, 60), (9, 9)])
def test_autocast_changes_nothing(size: tuple[int, int]) -> None:
    image, boxes = noise(50, 50).float(), torch.tensor([[5.5, 6.0, 40.0, 45.0]])
    module = CropAndScale(size=size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (ours,) = module([image], boxes)
    assert torch.equal(ours, module([image], boxes)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", [(60, 60), (9, 9)])
def test_gpu_equals_cpu(size: tuple[int, int]) -> None:
    image, boxes = noise(50, 50), torch.tensor([[5.5, 6.0, 40.0, 45.0]], dtype=torch.float64)
    (ours,) = CropAndScale(size=size)([image.cuda()], boxes)
    assert ours.is_cuda
    torch.testing.assert_close(ours.cpu(), crop(image, (5.5, 6.0, 40.0, 45.0), size))


def test_no_boxes_no_crops() -> None:
    assert CropAndScale(size=(8, 8))([], torch.zeros(0, 4)) == []


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (12, 12)])
def test_one_pixel_sides_are_finite(shape: tuple[int, int], size: tuple[int, int]) -> None:
    image = noise(*shape)
    whole = (0, 0, shape[1], shape[0])
    torch.testing.assert_close(crop(image, whole, size), torchvision_crop(image, whole, size), rtol=0, atol=1e-12)


# The zoom rule.

IMAGE = (400, 500)  # height, width: 200,000 pixels


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((10, 10, 110, 110), (196, 196)),  # r 0.05: x2 = 200 x 200; 200 / 28 = 7.1 -> 7
        ((10, 10, 260, 110), (196, 504)),  # r 0.125: x2 = 200 x 500; 500 / 28 = 17.9 -> 18
        ((10, 10, 260, 260), (364, 364)),  # r 0.3125: 2 - 0.1875 / 0.375 = x1.5 = 375; / 28 = 13.4 -> 13
        ((0, 0, 250, 400), (392, 252)),  # r 0.5: x1; 400 / 28 = 14.3 -> 14, 250 / 28 = 8.9 -> 9
        ((0, 0, 500, 400), (392, 504)),  # r 1: x1; 14 and 17.9 -> 18
    ],
)
def test_zoom_rule(box: tuple[float, float, float, float], expected: tuple[int, int]) -> None:
    module = CropAndScale(grid=28, min_pixels=4 * 784, max_pixels=1024 * 784)
    assert module.output_size(box, IMAGE) == expected
    (ours,) = module([torch.zeros(3, *IMAGE, dtype=torch.uint8)], torch.tensor([box], dtype=torch.float32))
    assert tuple(ours.shape) == (3, *expected)


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.5, 3.0, 8.0])  # 8: more pixels than the limit
def test_a_chosen_factor_takes_the_place_of_the_rule(factor: float) -> None:
    module = CropAndScale(grid=28, min_pixels=9 * 784, max_pixels=1024 * 784)
    expected = smart_resize(250 * factor, 150 * factor, 28, 9 * 784, 1024 * 784)  # type: ignore[arg-type]
    assert module.output_size((10, 10, 160, 260), IMAGE, factor) == expected


@pytest.mark.parametrize("box", [(10, 10, 110, 110), (10, 10, 260, 260), (0, 0, 250, 400), (1.5, 0.25, 300, 7)])
def test_the_rules_own_factor_changes_nothing(box: tuple[float, float, float, float]) -> None:
    module = CropAndScale(grid=28, min_pixels=4 * 784, max_pixels=1024 * 784)
    own = zoom_factor((box[2] - box[0]) * (box[3] - box[1]) / (IMAGE[0] * IMAGE[1]))
    assert module.output_size(box, IMAGE, own) == module.output_size(box, IMAGE)


def test_a_factor_that_cannot_act_is_refused() -> None:
    ruled = CropAndScale(grid=28, min_pixels=784, max_pixels=7840)
    for factor in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive and finite"):
            ruled.output_size((0, 0, 9, 9), IMAGE, factor)
    with pytest.raises(ValueError, match=r"fixed size.* 2.0 with size=\(24, 24\)"):
        CropAndScale(size=(24, 24)).output_size((0, 0, 9, 9), IMAGE, 2.0)


@pytest.mark.parametrize(("low", "high"), [(4, 64), (300, 1024)])
def test_zoom_rule_keeps_the_pixel_limits(low: int, high: int) -> None:
    module = CropAndScale(grid=28, min_pixels=low * 784, max_pixels=high * 784)
    expected = smart_resize(375, 375, 28, low * 784, high * 784)  # x1.5, as above
    assert module.output_size((10, 10, 260, 260), IMAGE) == expected
    assert low * 784 <= expected[0] * expected[1] <= high * 784


def test_longest_strips_still_give_a_crop() -> None:
    # x2 of 1 x 5000 is 2 x 10000; the short side grows to 10000 / 200 = 50; 50 / 28 = 1.8 -> 2, 357.1 -> 357.
    module = CropAndScale(grid=28, min_pixels=4 * 784, max_pixels=1024 * 784)
    assert module.output_size((0, 20, 5000, 21), (5000, 5000)) == (56, 9996)
    assert module.output_size((20, 0, 21, 5000), (5000, 5000)) == (9996, 56)
    (ours,) = module([torch.full((3, 40, 5000), 51, dtype=torch.uint8)], torch.tensor([[0.0, 20.0, 5000.0, 21.0]]))
    torch.testing.assert_close(ours, torch.full((3, 56, 9996), 0.2))
    for length in range(201, 4000, 7):  # the quotient must not be rounded to more than 200
        module.output_size((0, 0, length + 0.3, 1), (5000, 5000))


# What is refused.


@pytest.mark.parametrize(
    ("box", "fault"),
    [
        ((float("nan"), 0, 5, 5), "not_finite"),
        ((0, 0, float("inf"), 5), "not_finite"),
        ((5, 0, 5, 5), "order"),
        ((9, 0, 5, 5), "order"),
        ((-1, 0, 5, 5), "outside"),
        ((0, 0, 30.5, 5), "outside"),
        ((0, 0, 5, 20.5), "outside"),
        ((3, 3, 3.5, 9), "small"),
    ],
)
def test_bad_boxes_are_reported(box: tuple[float, ...], fault: str) -> None:
    boxes = torch.tensor([[0.0, 0.0, 30.0, 20.0], box])
    with pytest.raises(ValueError, match=rf"box 1, .* on image 0 of height 20 and width 30, .*{fault}"):
        CropAndScale(size=(8, 8))([noise(20, 30)], boxes, torch.tensor([0, 0]))


def test_a_pixel_that_float32_makes_smaller_is_a_pixel() -> None:
    boxes = torch.tensor([[1023.002, 5.0, 1024.002, 6.0]])
    assert boxes[0, 2] - boxes[0, 0] < 1
    assert CropAndScale(size=(8, 8))([noise(20, 1100)], boxes)[0].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"boxes": torch.zeros(4)}, "`boxes`"),
        ({"boxes": torch.tensor([[0, 0, 5, 5]])}, "`boxes`"),
        ({"boxes": torch.tensor([[0.0, 0.0, 5.0, 5.0]] * 2)}, "2 boxes"),
        ({"owner": torch.tensor([1])}, "`owner`"),
        ({"owner": torch.tensor([-1])}, "`owner`"),
        ({"sizes": [(8, 8), (8, 8)]}, "`sizes`"),
        ({"sizes": [(8, 0)]}, "`sizes`"),
        ({"images": [torch.zeros(20, 30)]}, "image 0"),
        ({"images": [torch.zeros(3, 20, 30, dtype=torch.long)]}, "image 0"),
    ],
)
def test_arguments_that_do_not_fit_are_reported(arguments: dict[str, object], match: str) -> None:
    good: dict[str, object] = {"images": [torch.zeros(3, 20, 30)], "boxes": torch.tensor([[0.0, 0.0, 5.0, 5.0]])}
    assert len(CropAndScale(size=(8, 8))(**good)) == 1
    with pytest.raises(ValueError, match=match):
        CropAndScale(size=(8, 8))(**{**good, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"size": (8, 8), "grid": 28},
        {"grid": 28},
        {"grid": 28, "min_pixels": 784},
        {"size": (0, 8)},
        {"grid": 0, "min_pixels": 4, "max_pixels": 8},
        {"grid": 28, "min_pixels": 800, "max_pixels": 784},
    ],
)
def test_rules_that_make_no_sense_are_reported(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        CropAndScale(**arguments)


def test_huge_images_are_reduced_strip_by_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.randint(0, 256, (3, 300, 420), dtype=torch.uint8)
    boxes = torch.tensor([[10.3, 20.0, 400.0, 280.0], [0.0, 0.0, 420.0, 300.0]])
    crop = CropAndScale(size=(32, 24))
    whole = crop([image], boxes, torch.tensor([0, 0]))
    monkeypatch.setattr("modules.crop.AT_ONCE", 5000)
    assert all(torch.equal(a, b) for a, b in zip(whole, crop([image], boxes, torch.tensor([0, 0])), strict=True))
