"""Crops against torchvision's and open_clip's transforms of the same images, and images against their files."""

from __future__ import annotations

import logging
import math
import struct
import threading
import warnings
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageFile, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as torchvision

from complora_kernels.fewshot import crops as crops_module
from complora_kernels.fewshot import decode as decode_module
from complora_kernels.fewshot import images as images_module
from complora_kernels.fewshot.crops import bicubic_taps, draw_boxes, resample
from complora_kernels.fewshot.decode import load_crops
from complora_kernels.fewshot.images import DeviceImages

SIZES = [(60, 80), (75, 50), (7, 7), (1, 50), (40, 1), (224, 224), (190, 300)]
BOXES = [(0, 0, 60, 80), (3, 4, 1, 46), (1, 2, 5, 4), (0, 17, 1, 1), (0, 0, 40, 1), (100, 7, 29, 1), (12, 0, 178, 299)]
FLIPS = [i % 2 == 1 for i in range(len(SIZES))]


@pytest.fixture
def images() -> list[Tensor]:
    """Noise between black and white: all that overshoots shows."""
    return [torch.randint(0, 2, (3, *size), dtype=torch.uint8) * (255 - i) for i, size in enumerate(SIZES)]


@pytest.fixture(params=["by torch", "by products"])
def way(request, monkeypatch) -> None:
    """The way of the CPU, and that of other devices run on the CPU."""
    if request.param == "by products":
        monkeypatch.setattr(crops_module, "resample_by_torch", crops_module.resample_by_products)


def crop(image: Tensor, box: Any, flip: Any, size: tuple[int, int]) -> Tensor:
    cut = torchvision.resized_crop(
        image, *map(int, box), size=list(size), interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    return torchvision.horizontal_flip(cut) if flip else cut


def all_of(images: DeviceImages, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Every image of `images` once, with drawn boxes and flips."""
    return torch.arange(len(images)), *draw_boxes(images.sizes, **{"seed": 0, "step": 0, **options})


# ---- resampling


@pytest.mark.parametrize("size", [(224, 224), (32, 32), (24, 16), (7, 7)])
def test_crops_match_torchvision(images, size):
    """The reference are torchvision's transforms of uint8 images, as they come from decoding."""
    stored = DeviceImages.from_tensors(images, "cpu")
    draws = [(torch.arange(len(images)), torch.tensor(BOXES), torch.tensor(FLIPS))]
    draws += [all_of(stored, step=step) for step in range(5)]
    for indices, boxes, flips in draws:
        ours = resample(stored, indices, boxes, flips, size)
        theirs = torch.stack(
            [crop(image, box, flip, size) for image, box, flip in zip(images, boxes, flips, strict=True)]
        )
        assert ours.dtype == torch.float32
        assert ours.is_contiguous()
        assert torch.equal(ours, theirs.float() / 255)
        by_products = crops_module.resample_by_products(stored, indices, boxes, flips, *size)
        levels = (by_products - ours).abs() * 255
        # Weights that lie halfway between two 16-bit numbers are rounded by the last bit of float64
        assert levels.max() < 1.5
        assert (levels > 0.5).double().mean() < 1e-3


@pytest.mark.parametrize("height", [1, 2, 7])
def test_crops_one_pixel_wide_match_pillow(images, height):
    """torchvision's are wrong where the processor has no AVX2."""
    stored = DeviceImages.from_tensors(images, "cpu")
    indices, boxes, flips = torch.arange(len(images)), torch.tensor(BOXES), torch.tensor(FLIPS)
    ours = resample(stored, indices, boxes, flips, (height, 1))
    for image, (top, left, h, w), mine in zip(images, BOXES, ours, strict=True):
        box = Image.fromarray(image[:, top : top + h, left : left + w].permute(1, 2, 0).numpy())
        theirs = pixels(box.resize((1, height), Image.Resampling.BICUBIC))
        assert (255 * mine - theirs).abs().max() < 1.5  # Pillow's weights have 22 bits


@pytest.mark.usefixtures("way")
def test_many_pixels_for_one_resized_pixel_do_not_overflow():
    """128 in each direction, to which sums are exact."""
    image = torch.randint(0, 2, (3, 256, 896), dtype=torch.uint8) * 255
    white = torch.full_like(image, 255)
    stored = DeviceImages.from_tensors([image, white], "cpu")
    box = torch.tensor([[0, 0, 256, 896]] * 2)
    ours = resample(stored, torch.arange(2), box, torch.tensor([True, False]), (2, 7))
    theirs = torch.stack([crop(image, box[0], True, (2, 7)), crop(white, box[1], False, (2, 7))])
    assert torch.equal(ours, theirs.float() / 255)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [224, 32])
def test_crops_match_those_of_float_images_up_to_rounding(size):
    """Float images are not clamped between the passes, which makes no difference for these images."""
    for image in (torch.randint(64, 192, (3, *shape), dtype=torch.uint8) for shape in SIZES):
        stored = DeviceImages.from_tensors(image[None], "cpu")
        indices, boxes, flips = all_of(stored)
        ours = resample(stored, indices, boxes, flips, size)[0]
        theirs = crop(image.float() / 255, boxes[0], flips[0], (size, size))
        height = int(boxes[0, 2])
        _, weights = bicubic_taps(torch.tensor([height]).double(), height, size)
        # Half a level of the first pass, through the second one's weights; half a level of the second; 16-bit weights.
        levels = 0.5 * weights.abs().sum(-1).max() + 0.5 + 2 * weights.shape[-1] * 255 / 2**15
        assert (ours - theirs).abs().max() <= levels / 255


@pytest.mark.usefixtures("way")
def test_an_image_can_be_resized_to_one_pixel(images):
    stored = DeviceImages.from_tensors(images[:1], "cpu")
    ours = resample(stored, torch.tensor([0]), torch.tensor([BOXES[0]]), torch.tensor([False]), 1)
    exact = F.interpolate(images[0][None].double() / 255, (1, 1), mode="bicubic", antialias=True)
    assert (ours - exact).abs().max() <= 1 / 255


@pytest.mark.usefixtures("way")
def test_a_crop_has_the_same_bits_in_any_batch(images):
    stored = DeviceImages.from_tensors(images, "cpu")
    indices = torch.tensor([6, 0, 3, 6, 1, 6, 2])  # some twice
    boxes, flips = draw_boxes(stored.sizes[indices], 0, 0)
    ours = resample(stored, indices, boxes, flips, 16)
    for i in range(len(indices)):
        one = slice(i, i + 1)
        assert torch.equal(ours[one], resample(stored, indices[one], boxes[one], flips[one], 16))


@pytest.mark.usefixtures("way")
def test_boxes_of_the_result_size_are_copied(images):
    stored = DeviceImages.from_tensors([images[5]], "cpu")
    box = torch.tensor([[3, 5, 30, 20]])
    (ours,) = resample(stored, torch.tensor([0]), box, torch.tensor([True]), (30, 20))
    assert torch.equal(ours, images[5][:, 3:33, 5:25].flip(2).float() / 255)


@pytest.mark.usefixtures("way")
def test_an_empty_batch_gives_an_empty_result():
    stored = DeviceImages.from_tensors(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "cpu")
    none = torch.zeros(0, dtype=torch.long)
    assert resample(stored, none, torch.zeros(0, 4).long(), none.bool(), 5).shape == (0, 3, 5, 5)


def test_operands_of_the_products_are_exact_in_tf32_and_bfloat16(images, monkeypatch):
    stored = DeviceImages.from_tensors(images, "cpu")
    operands, bmm = [], torch.bmm

    def observed(*factors: Tensor, out: Tensor) -> Tensor:
        operands.extend(factors)
        return bmm(*factors, out=out)

    monkeypatch.setattr(torch, "bmm", observed)
    plain = crops_module.resample_by_products(stored, *all_of(stored), 24, 24)
    assert operands
    for factor in operands:
        assert torch.equal(factor, factor.bfloat16().float())  # 8 bits; TF32 has 11
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(crops_module.resample_by_products(stored, *all_of(stored), 24, 24), plain)


def test_products_have_the_size_of_the_boxes_not_of_the_images(images, monkeypatch):
    stored = DeviceImages.from_tensors(images, "cpu")
    shapes, bmm = [], torch.bmm

    def observed(matrix: Tensor, pixels: Tensor, *, out: Tensor) -> Tensor:
        shapes.append((matrix.shape, pixels.shape))
        return bmm(matrix, pixels, out=out)

    monkeypatch.setattr(torch, "bmm", observed)
    box = torch.tensor([[100, 7, 30, 20]])
    crops_module.resample_by_products(stored, torch.tensor([6]), box, torch.tensor([True]), 24, 16)
    assert shapes == [((1, 32, 20), (1, 20, 90)), ((1, 48, 30), (1, 30, 48))]


def test_nothing_waits_for_the_device(images):
    """The meta device holds no numbers: reading one from it is an error."""
    for budget in (None, 0):
        stored = DeviceImages.from_tensors(images, "meta", budget_bytes=budget)
        crops = resample(stored, *all_of(stored), 24)
        assert (crops.device.type, crops.shape) == ("meta", (len(images), 3, 24, 24))


def test_a_huge_box_does_not_pad_the_others_to_its_size():
    boxes = torch.tensor([[0, 0, 30, 40]] * 20 + [[0, 0, 300, 400]] + [[0, 0, 40, 25]] * 10)
    groups = [group.tolist() for group in crops_module._groups(boxes)]
    assert [len(group) for group in groups] == [30, 1]
    assert groups[1] == [20]
    assert sorted(groups[0]) == [i for i in range(31) if i != 20]


def test_a_group_has_a_limited_number_of_pixels():
    assert [len(group) for group in crops_module._groups(torch.tensor([[0, 0, 2048, 2048]] * 12))] == [5, 5, 2]


# ---- weights


@pytest.mark.parametrize("size", [1, 7, 32, 224])
def test_weights_match_torch(size):
    lengths = [1, 2, 3, 31, 32, 33, 64, 137, 500]
    first, weights = bicubic_taps(torch.tensor(lengths).double(), max(lengths), size)
    # A sum of T positive and negative numbers of at most 1, rounded T times
    assert (weights.sum(-1) - 1).abs().max() <= weights.shape[-1] * torch.finfo(torch.float64).eps
    for length, start, taps in zip(lengths, first, weights, strict=True):
        dense = torch.zeros(size, length + len(taps[0]), dtype=torch.float64)
        dense.scatter_(1, start[:, None] + torch.arange(len(taps[0])), taps)
        assert not dense[:, length:].any()
        unit = torch.eye(length, dtype=torch.float64)[None, None]
        theirs = F.interpolate(unit, (size, length), mode="bicubic", antialias=True)[0, 0]
        torch.testing.assert_close(dense[:, :length], theirs, rtol=0, atol=1e-14)  # float64 rounding


# ---- boxes


def torchvisions_boxes(n: int, height: int, width: int, **options: Any) -> np.ndarray:  # [n, 4]
    image = torch.zeros(3, height, width)
    options = {"scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], **options}
    return np.array([RandomResizedCrop.get_params(image, **options) for _ in range(n)])


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two samples' distribution functions."""
    values = np.concatenate([a, b])
    shares = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (a, b)]
    return np.abs(shares[0] - shares[1]).max()


@pytest.mark.parametrize(("height", "width"), [(375, 500), (37, 53), (100, 30), (20, 90), (3, 2)])
def test_boxes_have_torchvisions_distribution(height, width):
    n = 3000
    ours = draw_boxes(torch.tensor([[height, width]] * n), 0, 0)[0].numpy()
    theirs = torchvisions_boxes(n, height, width)
    # Two samples of one distribution are this far apart less often than once in 10,000 draws (Kolmogorov, Smirnov).
    most = math.sqrt(-math.log(0.0001 / 2) / n)
    for ours_, theirs_ in [
        *zip(ours.T, theirs.T, strict=True),  # top, left, height, width
        *((b[:, 2] * b[:, 3], t[:, 2] * t[:, 3]) for b, t in [(ours, theirs)]),
        *((b[:, 3] / b[:, 2], t[:, 3] / t[:, 2]) for b, t in [(ours, theirs)]),
        *((b[:, 0] - b[:, 1], t[:, 0] - t[:, 1]) for b, t in [(ours, theirs)]),
        *((b[:, 0] + b[:, 2], t[:, 0] + t[:, 2]) for b, t in [(ours, theirs)]),  # the lower edge
    ]:
        assert ks_distance(ours_, theirs_) < most


def test_boxes_keep_their_limits():
    sizes = torch.tensor(SIZES * 50)
    boxes, flips = draw_boxes(sizes, 3, 5)
    assert (boxes.dtype, boxes.shape, flips.dtype, flips.shape) == (torch.int64, (350, 4), torch.bool, (350,))
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()
    large = boxes[sizes.amin(1) > 100, 2:]
    assert len(large) == 100
    # Rounding a length moves it by half a pixel.
    assert ((large + 0.5).prod(1) >= 0.08 * 224 * 190).all()
    assert ((large[:, 1] + 0.5) / (large[:, 0] - 0.5) >= 3 / 4).all()
    assert ((large[:, 1] - 0.5) / (large[:, 0] + 0.5) <= 4 / 3).all()


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (999, 20), (50, 51), (1, 1), (1, 40)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (1.1, 1.4), (0.5, 0.7)])
def test_the_box_is_torchvisions_central_one_where_no_try_fits(height, width, ratio):
    options = {"scale": (30.0, 40.0), "ratio": ratio}
    ours, _ = draw_boxes(torch.tensor([[height, width]]), 0, 0, **options)
    theirs = torchvisions_boxes(1, height, width, **options)
    np.testing.assert_array_equal(ours.numpy(), np.maximum(theirs, [0, 0, 1, 1]))  # torchvision's can be empty


def test_flips_have_their_probability():
    sizes = torch.full((10_000, 2), 9)
    assert abs(draw_boxes(sizes, 0, 0)[1].double().mean() - 0.5) < 4 * 0.5 / 100  # four standard deviations
    assert not draw_boxes(sizes, 0, 0, flip=0.0)[1].any()
    assert draw_boxes(sizes, 0, 0, flip=1.0)[1].all()


def test_boxes_are_a_function_of_seed_and_step():
    sizes = torch.full((4, 2), 1000)
    before = torch.get_rng_state()
    drawn = {(seed, step): draw_boxes(sizes, seed, step) for seed in range(4) for step in range(4)}
    torch.rand(3)
    for (seed, step), (boxes, flips) in drawn.items():
        again, flips_again = draw_boxes(sizes, seed, step)
        assert torch.equal(again, boxes)
        assert torch.equal(flips_again, flips)
    assert len({tuple(boxes.flatten().tolist()) for boxes, _ in drawn.values()}) == 16
    assert len({tuple(box) for boxes, _ in drawn.values() for box in boxes.tolist()}) == 64
    torch.set_rng_state(before)


def test_the_box_of_an_image_does_not_depend_on_the_others():
    sizes = torch.tensor([[50, 60], [500, 600]])
    boxes, flips = draw_boxes(sizes, 1, 2)
    others, flips_of_others = draw_boxes(torch.tensor([[1, 900], [500, 600]]), 1, 2)
    assert torch.equal(boxes[1], others[1])
    assert torch.equal(flips, flips_of_others)


@pytest.mark.parametrize("limits", [(0.0, 1.0), (1.0, 0.5), (-1.0, 1.0)])
@pytest.mark.parametrize("name", ["scale", "ratio"])
def test_limits_are_checked(name, limits):
    with pytest.raises(ValueError, match=rf"{name}=.* expected two positive limits"):
        draw_boxes(torch.tensor([[5, 5]]), 0, 0, **{name: limits})


# ---- storage


def test_images_are_kept_unchanged(images):
    stored = DeviceImages.from_tensors(images, "cpu")
    assert len(stored) == len(images)
    assert stored.bytes == sum(image.numel() for image in images)
    assert stored.sizes.tolist() == [list(size) for size in SIZES]
    assert all(torch.equal(stored[i], image) for i, image in enumerate(images))
    assert torch.equal(stored[-1], images[-1])
    images[0].zero_()
    assert stored[0].any()
    with pytest.raises(IndexError):
        stored[len(images)]


def test_images_over_the_budget_stay_in_host_memory(caplog):
    caplog.set_level(logging.WARNING, "complora_kernels")
    images = torch.zeros(1000, 3, 2, 2, dtype=torch.uint8)
    assert DeviceImages.from_tensors(images, "meta", budget_bytes=12_000).device.type == "meta"
    assert not caplog.messages
    stored = DeviceImages.from_tensors(images, "meta", budget_bytes=11_999)
    assert (stored.device.type, stored.target.type) == ("cpu", "meta")
    assert caplog.messages == [
        "the images stay in host memory: they are 12,000 bytes and the budget is 11,999 bytes",
    ]


def test_images_without_room_on_the_device_stay_in_pinned_host_memory(monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "complora_kernels")
    pinned = []

    def full_device(size: int, device: torch.device, *, pin_memory: bool = False) -> Tensor:
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        pinned.append(pin_memory)
        return torch.empty(size, dtype=torch.uint8)  # there may be no GPU to pin memory for

    monkeypatch.setattr(images_module, "empty_buffer", full_device)
    images = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8)
    stored = DeviceImages.from_tensors(images, "cuda:1", budget_bytes=10_000)
    assert pinned == [True]
    assert all(torch.equal(stored[i], image) for i, image in enumerate(images))
    assert caplog.messages == [
        "the images stay in host memory: they are 360 bytes and cuda:1 has no memory left for them"
    ]


# ---- files


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8).numpy())


def test_files_of_every_mode_become_rgb(tmp_path, picture, capfd):
    grey, palette, bits = picture.convert("L"), picture.quantize(8), picture.convert("1")
    alpha = picture.convert("RGBA")
    alpha.putalpha(grey)
    picture.save(tmp_path / "rgb.png")
    picture.save(tmp_path / "rgb.webp", lossless=True)
    grey.save(tmp_path / "grey.png")
    alpha.save(tmp_path / "alpha.png")
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "transparent.png", transparency=bytes([0, 100, 255]))
    bits.save(tmp_path / "bits.png")
    picture.save(tmp_path / "photo.jpg", quality=90)
    picture.convert("CMYK").save(tmp_path / "print.tif")
    palette_rgb, bits_rgb, grey_rgb = (image.convert("RGB") for image in (palette, bits, grey))
    with Image.open(tmp_path / "photo.jpg") as photo:
        photo.load()
    expected = {
        "rgb.png": picture,
        "rgb.webp": picture,
        "grey.png": grey_rgb,
        "alpha.png": picture,
        "palette.png": palette_rgb,
        "transparent.png": palette_rgb,
        "bits.png": bits_rgb,
        "photo.jpg": photo,
        "print.tif": picture.convert("CMYK").convert("RGB"),
    }
    stored = DeviceImages.from_files([tmp_path / name for name in expected], "cpu")
    assert len(stored) == len(expected)
    for i, (name, image) in enumerate(expected.items()):
        assert torch.equal(stored[i], pixels(image)), name
    assert capfd.readouterr().err == ""  # fast work shows no bar


def test_photos_are_upright(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right to see it upright
    picture.save(tmp_path / "turned.png", exif=exif)
    stored = DeviceImages.from_files([str(tmp_path / "turned.png")], "cpu", progress=False)
    assert stored.sizes.tolist() == [[7, 5]]
    assert torch.equal(stored[0], pixels(picture).rot90(-1, (1, 2)))


def tag(number: int, kind: int, count: int, value: bytes) -> bytes:
    """An entry of an EXIF block; of more than four bytes the value is where they stand in it."""
    return struct.pack("<HHL", number, kind, count) + value.ljust(4, b"\0")


def block(*tags: bytes, behind: bytes = b"") -> bytes:
    return b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(tags)) + b"".join(tags) + b"\0\0\0\0" + behind


SHORT, TURN = 3, tag(0x112, 3, 1, b"\6")  # a quarter to the right
DAMAGED = {  # EXIF blocks, and whether they say how the picture is turned
    "no resolution": (block(TURN), True),
    "negative resolution": (block(TURN, tag(0x11A, 10, 1, b"\x26"), behind=struct.pack("<ll", -72, 1)), True),
    "resolution by 0": (block(TURN, tag(0x11A, 5, 1, b"\x26"), behind=struct.pack("<LL", 72, 0)), True),
    "resolution NaN": (block(TURN, tag(0x11A, 11, 1, struct.pack("<f", math.nan))), True),
    "resolution as text": (block(TURN, tag(0x11A, 2, 4, b"72\0")), True),
    "negative width": (block(TURN, tag(0x100, 9, 1, struct.pack("<l", -5))), True),
    "tag beyond the file": (block(TURN, tag(0x10F, 2, 2**31, b"\xff\xff\xff\x7f")), True),
    "fewer tags than it says": (block(TURN).replace(b"\1\0\x12", b"\xff\xff\x12"), True),
    "orientation 0": (block(tag(0x112, SHORT, 1, b"\0")), False),
    "orientation 1": (block(tag(0x112, SHORT, 1, b"\1")), False),
    "orientation 9": (block(tag(0x112, SHORT, 1, b"\x09")), False),
    "orientation as text": (block(tag(0x112, 2, 2, b"6")), False),
    "two orientations": (block(tag(0x112, SHORT, 2, b"\6\0\3")), True),  # the first
    "no orientation": (block(tag(0x10F, 2, 2, b"x")), False),
    "no TIFF": (b"Exif\0\0" + b"\xff" * 40, False),
    "truncated": (b"Exif\0\0II", False),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_only_the_orientation_of_exif_changes_pixels(tmp_path, picture, damage, suffix):
    """Other entries of the EXIF block that cannot be read or written are ignored."""
    exif, is_turned = DAMAGED[damage]
    path = tmp_path / f"photo.{suffix}"
    picture.save(path, exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of the block
        with Image.open(path) as image:
            expected = pixels(image.convert("RGB"))
    expected = expected.rot90(-1, (1, 2)) if is_turned else expected
    for _ in range(2):
        (stored,) = DeviceImages.from_files([path], "cpu")
        assert torch.equal(stored, expected)
    (crop,) = load_crops([path], (expected.shape[1], expected.shape[2]))
    assert torch.equal(crop, expected)


@pytest.mark.parametrize("form", ['tiff:Orientation="8"', "<tiff:Orientation>8</tiff:Orientation>"])
def test_an_orientation_in_xmp_counts_where_exif_has_none(tmp_path, picture, form):
    """Pillow does the same. The file is a PNG, whose XMP every supported Pillow reads."""
    turned, notes = Image.Exif(), PngInfo()
    turned[0x0112] = 6
    notes.add_itxt("XML:com.adobe.xmp", form)
    for name, options in (("xmp", {}), ("both", {"exif": turned})):
        picture.save(tmp_path / f"{name}.png", pnginfo=notes, **options)
    xmp, both = DeviceImages.from_files([tmp_path / "xmp.png", tmp_path / "both.png"], "cpu")
    assert torch.equal(xmp, pixels(picture).rot90(1, (1, 2)))
    assert torch.equal(both, pixels(picture).rot90(-1, (1, 2)))
    for name, ours in (("xmp", xmp), ("both", both)):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert torch.equal(ours, pixels(ImageOps.exif_transpose(image)))


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_file_with_text_that_would_fill_the_memory_is_named(tmp_path, picture, name):
    picture.save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    notes = zlib.compress(bytes(100 << 20), 1)
    head = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[name]
    (tmp_path / "notes.png").write_bytes(
        data[:33] + chunk(name, head + notes) + data[33:]
    )  # inserted behind the header
    with pytest.raises(ValueError, match=r"notes.png cannot be decoded: (?i:Decompressed data too large)"):
        load_crops([tmp_path / "whole.png", tmp_path / "notes.png"], (4, 4))


@pytest.mark.parametrize("step", ["open_image", "pixels_of"])
@pytest.mark.parametrize("load", ["from_files", "load_crops"])
def test_a_file_for_which_there_is_no_memory_is_named(tmp_path, picture, monkeypatch, load, step):
    for name in ("first.png", "second.png"):
        picture.save(tmp_path / name)
    module = decode_module if load == "load_crops" else images_module
    before, calls = getattr(module, step), []

    def without_memory(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 1:
            raise MemoryError
        return before(*arguments)

    monkeypatch.setattr(module, step, without_memory)
    monkeypatch.setattr(decode_module, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))
    paths = [tmp_path / "first.png", tmp_path / "second.png"]
    with pytest.raises(ValueError, match=rf"{paths[1]} is not decoded: there is not enough memory for it$"):
        load_crops(paths, (4, 4)) if load == "load_crops" else DeviceImages.from_files(paths, "cpu")


@pytest.mark.parametrize("name", ["truncated.jpg", "truncated.png", "text.jpg", "empty.png"])
def test_a_file_that_cannot_be_decoded_is_named(tmp_path, picture, name):
    big = picture.resize((300, 200))
    big.save(tmp_path / "whole.png")
    if name.startswith("truncated"):
        big.save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    else:
        (tmp_path / name).write_text("no image" if name == "text.jpg" else "")
    with pytest.raises(ValueError, match=rf"{name} cannot be decoded: "):
        DeviceImages.from_files([tmp_path / "whole.png", tmp_path / name], "cpu")


def test_sixteen_bits_a_channel_are_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 40_000, np.uint16)).save(tmp_path / "depth.png")
    with pytest.raises(ValueError, match=r"depth.png cannot be decoded: mode I;?1?6?, expected 8 bits a channel"):
        DeviceImages.from_files([tmp_path / "depth.png"], "cpu")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing.png"):
        DeviceImages.from_files([tmp_path / "missing.png"], "cpu")


@pytest.mark.parametrize("load", ["from_files", "load_crops"])
def test_too_large_an_image_is_named_with_the_limit(tmp_path, picture, monkeypatch, load):
    """Pillow opens twice its limit, with a warning that names no file: a photo of 108 megapixels is decoded."""
    fitting, too_large, huge = tmp_path / "fits.png", tmp_path / "large.png", tmp_path / "huge.png"
    for path, size in ((fitting, (20, 10)), (too_large, (67, 3)), (huge, (30, 20))):
        picture.resize(size).save(path)
    assert (Image.MAX_IMAGE_PIXELS or 0) * 2 > 108e6
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    decode = {
        "from_files": lambda paths: DeviceImages.from_files(paths, "cpu"),
        "load_crops": lambda paths: load_crops(paths, (4, 4)),
    }[load]
    assert len(decode([fitting])) == 1
    for path, n in ((too_large, 201), (huge, 600)):
        with pytest.raises(
            ValueError,
            match=rf"{path} is not decoded: it has {n} pixels, expected at most 200: shrink the file. .* "
            r"this limit, twice PIL.Image.MAX_IMAGE_PIXELS.\)$",
        ):
            decode([fitting, path])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert len(decode([fitting, too_large, huge])) == 3


def test_the_first_of_two_damaged_files_is_named(tmp_path, picture):
    """The first file is damaged behind its header, and is found later than the second, whose header is damaged."""
    picture.resize((300, 200)).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no image")
    names = ["whole.png", "truncated.png", "text.png", "missing.png"]
    for first in range(1, 4):
        with pytest.raises((ValueError, FileNotFoundError), match=names[first]):
            DeviceImages.from_files([tmp_path / name for name in ("whole.png", *names[first:])], "cpu")


@pytest.mark.parametrize("shorter_side", [None, 16, 10])
@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_headers_tell_the_sizes_of_turned_files(tmp_path, picture, suffix, orientation, shorter_side):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{suffix}"
    picture.resize((67, 33)).save(path, exif=exif)
    (stored,) = DeviceImages.from_files([path], "cpu", shorter_side=shorter_side)
    factor = {None: 1, 16: 2, 10: 3}[shorter_side]
    with Image.open(path) as image:
        if shorter_side is not None:
            image.draft(None, (-(-67 // factor), -(-33 // factor)))
        upright = ImageOps.exif_transpose(image).convert("RGB")
    assert (upright.height > upright.width) == (orientation > 4)
    left = min(upright.size) // (
        shorter_side or 10_000
    )  # the factor left to Pillow after the decoder has halved the image
    assert torch.equal(stored, pixels(upright.reduce(left) if left > 1 else upright))


def test_exif_behind_the_pixels_turns_them_too(tmp_path, picture):
    """A PNG tells it only when it is decoded."""
    picture.save(tmp_path / "photo.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes().removeprefix(b"Exif\0\0")
    data = (tmp_path / "photo.png").read_bytes()
    (tmp_path / "photo.png").write_bytes(data[:-12] + chunk(b"eXIf", content) + data[-12:])  # inserted before IEND
    stored = DeviceImages.from_files([tmp_path / "photo.png"] * 2, "cpu")
    assert stored.sizes.tolist() == [[7, 5]] * 2
    assert torch.equal(stored[1], pixels(picture).rot90(-1, (1, 2)))


def test_an_image_of_another_size_than_its_headers_is_named(tmp_path, picture, monkeypatch):
    for name in ("a.png", "b.png"):
        picture.save(tmp_path / name)
    decoded = images_module.pixels_of
    monkeypatch.setattr(images_module, "pixels_of", lambda image: decoded(image)[:, :4])
    with pytest.raises(ValueError, match=r"a.png has \[4, 7\] pixels, expected \[5, 7\], as its header says"):
        DeviceImages.from_files([tmp_path / "a.png", tmp_path / "b.png"], "cpu")


def test_no_second_copy_of_the_images_is_made(tmp_path, picture, monkeypatch):
    """Beside the buffer, only the images that threads are decoding are alive."""
    paths = [tmp_path / f"{i}.png" for i in range(150)]
    for path in paths:
        picture.save(path)
    decoded, size_of = images_module.pixels_of, images_module.size_by_header
    alive: set[int] = set()
    most, threads = [0], {"headers": set(), "pixels": set()}

    def counted(image: Image.Image) -> Tensor:
        tensor = decoded(image)
        threads["pixels"].add(threading.get_ident())
        alive.add(id(tensor))
        weakref.finalize(tensor, alive.discard, id(tensor))
        most[0] = max(most[0], len(alive))
        return tensor

    def header(*arguments: Any) -> Any:
        threads["headers"].add(threading.get_ident())
        return size_of(*arguments)

    monkeypatch.setattr(images_module, "pixels_of", counted)
    monkeypatch.setattr(images_module, "size_by_header", header)
    stored = DeviceImages.from_files(paths, "cpu")
    assert most[0] <= 33  # the most threads that a pool starts, and one that is just given back
    assert all(torch.equal(image, pixels(picture)) for image in stored)
    for idents in threads.values():
        assert idents
        assert threading.get_ident() not in idents


def test_large_images_are_reduced_to_the_shorter_side(tmp_path):
    noise = torch.randint(0, 256, (3, 41, 60), dtype=torch.uint8)
    image = Image.fromarray(noise.permute(1, 2, 0).numpy())
    image.save(tmp_path / "a.png")
    for enough, factor in ((10, 4), (13, 3), (20, 2), (21, 1), (41, 1), (100, 1), (1, 41)):
        stored = DeviceImages.from_files([tmp_path / "a.png"], "cpu", shorter_side=enough)
        assert torch.equal(stored[0], pixels(image.reduce(factor))), enough
    kept = DeviceImages.from_files([tmp_path / "a.png"], "cpu")
    assert torch.equal(kept[0], noise)
    # Whole blocks are means
    halved = DeviceImages.from_files([tmp_path / "a.png"], "cpu", shorter_side=20)[0]
    means = F.avg_pool2d(noise[None, :, :40].float(), 2)[0]
    assert (halved[:, :20] - means).abs().max() <= 0.5
    with pytest.raises(ValueError, match=r"shorter_side=0, expected at least 1"):
        DeviceImages.from_files([tmp_path / "a.png"], "cpu", shorter_side=0)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("turned", [False, True])
def test_large_photos_are_reduced_while_they_are_decoded(tmp_path, monkeypatch, mode, turned):
    """Smooth ones, of which the two ways of reducing show the same."""
    x, y = np.linspace(0, 200, 300), np.linspace(0, 50, 200)[:, None]
    grey = Image.fromarray((x + y).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    grey.convert(mode).save(tmp_path / "photo.jpg", quality=95, exif=exif)
    plain = DeviceImages.from_files([tmp_path / "photo.jpg"], "cpu")[0]
    sizes, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: (load(self), sizes.append(self.size))[0])
    for enough, decoded, n in (
        (100, (150, 100), 2),
        (50, (75, 50), 4),
        (33, (75, 50), 4),
        (16, (38, 25), 12),
        (10, (38, 25), 20),
    ):
        sizes.clear()
        reduced = DeviceImages.from_files([tmp_path / "photo.jpg"], "cpu", shorter_side=enough)[0]
        assert sizes[0] == decoded
        assert min(reduced.shape[1:]) >= enough
        rough = F.avg_pool2d(plain[None].float(), 4)[0]
        near = F.interpolate(reduced[None].float(), rough.shape[1:], mode="bilinear")[0]
        assert (near - rough).abs().mean() < 8, n  # pixel values reach 250


# ---- crops of files

RESIZE_MODES = ["shortest", "longest", "squash"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Any]:
    """Photos of odd sizes, larger and smaller than the results."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    paths = []
    for i, size in enumerate(
        [(60, 80), (75, 50), (7, 7), (3, 50), (40, 2), (32, 32), (190, 300), (33, 32), (224, 223)]
    ):
        paths.append(folder / f"{i}.png")
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(paths[-1])
    return paths


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
@pytest.mark.parametrize("size", [(32, 32), (24, 16), (15, 31), (7, 7), (1, 1), (224, 224)])
def test_crops_of_files_match_open_clip_bit_for_bit(photos, size, resize_mode, interpolation):
    transform: Any = open_clip.image_transform(
        size, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode=resize_mode, interpolation=interpolation
    )
    thin = [
        path for path in photos if path.stem in ("3", "4")
    ]  # "longest" shrinks their shorter side to less than a pixel
    photos = [path for path in photos if resize_mode != "longest" or max(size) > 7 or path not in thin]
    ours = load_crops(photos, size, resize_mode=resize_mode, interpolation=interpolation)
    assert (ours.dtype, ours.shape, ours.is_contiguous()) == (torch.uint8, (len(photos), 3, *size), True)
    for path, crop in zip(photos, ours, strict=True):
        with Image.open(path) as image:
            assert torch.equal(crop.float() / 255, transform(image)), path.name


@pytest.mark.parametrize(
    "name", [("ViT-B-16", "openai"), ("ViT-B-16-SigLIP", "webli"), ("EVA02-B-16", "merged2b_s8b_b131k")]
)
def test_normalised_crops_match_open_clips_transform(photos, name):
    """Crops use open_clip's settings for the weights, and are then normalised by its transform."""
    known = {
        key: value for key, value in open_clip.get_pretrained_cfg(*name).items() if key in PreprocessCfg.__annotations__
    }
    config = PreprocessCfg(**known)
    transform: Any = image_transform_v2(config, is_train=False)
    ours = load_crops(photos, (224, 224), resize_mode=config.resize_mode, interpolation=config.interpolation)
    for path, crop in zip(photos, ours, strict=True):
        with Image.open(path) as image:
            assert torch.equal(transform.transforms[-1](crop.float() / 255), transform(image)), path.name


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(32, 32), (24, 16), (7, 7)])
def test_cropping_before_enlarging_gives_the_same_image(photos, monkeypatch, size, interpolation):
    """Up to one level: Pillow keeps the place of a box in float32, which changes a weight in its last bits."""
    whole = load_crops(photos, size, interpolation=interpolation)
    monkeypatch.setattr(decode_module, "_MOST_PIXELS", 0)
    cut = load_crops(photos, size, interpolation=interpolation)
    differs = (whole.int() - cut.int()).abs()
    assert differs.max() <= 1
    assert (differs > 0).double().mean() < 0.01


@pytest.mark.parametrize("turned", [False, True])
def test_the_crop_of_an_image_one_pixel_high_is_that_of_its_middle(tmp_path, monkeypatch, turned):
    """Enlarged until it is high enough, this one of a million pixels would take a terabyte."""
    line = np.random.default_rng(0).integers(0, 256, (1, 1_000_000, 3), np.uint8)
    middle = Image.fromarray(line[:, 499_000:501_000])
    if turned:
        line, middle = line.transpose(1, 0, 2), middle.transpose(Image.Transpose.TRANSPOSE)
    Image.fromarray(line).save(tmp_path / "line.png", compress_level=0)
    for size in ((224, 224), (32, 24), (5, 5)):
        (ours,) = load_crops([tmp_path / "line.png"], size)
        middle.save(tmp_path / "middle.png")
        (theirs,) = load_crops([tmp_path / "middle.png"], size)
        assert torch.equal(ours, theirs)


def test_a_thin_image_keeps_a_height_of_one_pixel(tmp_path):
    """open_clip fails on such an image."""
    Image.new("RGB", (100, 2), "white").save(tmp_path / "thin.png")
    crop = load_crops([tmp_path / "thin.png"], (7, 7), resize_mode="longest")[0]
    assert crop.amax((0, 2)).tolist() == [0, 0, 0, 255, 0, 0, 0]


@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
def test_training_and_test_pixels_agree(tmp_path, picture, resize_mode):
    """Whatever the format: what is cropped is what is trained on."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    picture.convert("CMYK").save(tmp_path / "print.tif")
    picture.convert("L").save(tmp_path / "grey.png")
    picture.quantize(8).save(tmp_path / "transparent.png", transparency=bytes([0, 100, 255]))
    alpha = picture.convert("RGBA")
    alpha.putalpha(picture.convert("L"))
    alpha.save(tmp_path / "schön 图.png")
    paths = sorted(tmp_path.iterdir())
    stored = DeviceImages.from_files(paths, "cpu")
    for i in range(len(paths)):
        Image.fromarray(stored[i].permute(1, 2, 0).numpy()).save(paths[i].with_suffix(".rgb.png"))
    ours = load_crops(paths, (6, 6), resize_mode=resize_mode)
    again = load_crops([path.with_suffix(".rgb.png") for path in paths], (6, 6), resize_mode=resize_mode)
    assert torch.equal(ours, again)


def test_crops_do_not_depend_on_workers_and_show_no_bar(photos, capfd):
    one = load_crops(photos, (32, 32), workers=1)
    assert torch.equal(load_crops(photos[::-1], (32, 32), workers=4).flip(0), one)
    assert torch.equal(load_crops([str(path) for path in photos], (32, 32), progress=False), one)
    assert capfd.readouterr().err == ""


def test_the_first_file_that_cannot_be_cropped_is_named(tmp_path, photos):
    whole = photos[6].read_bytes()
    (tmp_path / "first.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "second.png").write_text("no image")
    paths = [*photos, tmp_path / "first.png", tmp_path / "second.png"]
    for _ in range(3):
        with pytest.raises(ValueError, match=r"first.png cannot be decoded: "):
            load_crops(paths, (8, 8))
    with pytest.raises(FileNotFoundError, match=r"third.png"):
        load_crops([tmp_path / "third.png", *paths], (8, 8))
    Image.fromarray(np.full((2, 2), 40_000, np.uint16)).save(tmp_path / "depth.png")
    with pytest.raises(ValueError, match=r"depth.png cannot be decoded: mode I;?1?6?, expected 8 bits a channel"):
        load_crops([tmp_path / "depth.png"], (8, 8))


def test_wrong_arguments_of_load_crops_are_refused(photos):
    with pytest.raises(ValueError, match=r"paths is empty, expected at least one image file"):
        load_crops([], (8, 8))
    with pytest.raises(ValueError, match=r"resize_mode='fit', expected shortest, longest, squash"):
        load_crops(photos, (8, 8), resize_mode="fit")
    with pytest.raises(ValueError, match=r"interpolation='random', expected bicubic, bilinear"):
        load_crops(photos, (8, 8), interpolation="random")
    with pytest.raises(ValueError, match=r"size=\(0, 8\), expected at least 1"):
        load_crops(photos, (0, 8))


# ---- refused


def test_empty_lists_of_images_are_refused():
    with pytest.raises(ValueError, match=r"paths is empty, expected at least one image file"):
        DeviceImages.from_files([], "cpu")
    with pytest.raises(ValueError, match=r"images is empty, expected at least one"):
        DeviceImages.from_tensors(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), "cpu")


@pytest.mark.parametrize("wrong", [torch.zeros(3, 4, 4), torch.zeros(1, 4, 4).byte(), torch.zeros(3, 0, 4).byte()])
def test_tensors_that_are_no_uint8_images_are_refused(wrong):
    with pytest.raises(ValueError, match=r"images\[1\] is torch.* expected uint8 \[3, H, W\]"):
        DeviceImages.from_tensors([torch.zeros(3, 4, 4).byte(), wrong], "cpu")


@pytest.mark.parametrize("box", [[-1, 0, 3, 3], [0, -1, 3, 3], [0, 0, 0, 3], [0, 0, 3, 0], [3, 0, 3, 3], [0, 6, 3, 3]])
def test_boxes_that_are_not_inside_their_image_are_refused(box):
    stored = DeviceImages.from_tensors(torch.zeros(2, 3, 5, 8, dtype=torch.uint8), "cpu")
    boxes = torch.tensor([[0, 0, 5, 8], box])
    with pytest.raises(ValueError, match=r"boxes\[1\] is \[.*inside image 1, which is \[5, 8\]"):
        resample(stored, torch.arange(2), boxes, torch.zeros(2).bool(), 4)


def test_wrong_arguments_of_resample_are_refused():
    stored = DeviceImages.from_tensors(torch.zeros(2, 3, 5, 8, dtype=torch.uint8), "cpu")
    indices, boxes, flips = all_of(stored)
    with pytest.raises(ValueError, match=r"boxes is \[1, 4\] on cpu, expected \[2, 4\] on the host"):
        resample(stored, indices, boxes[:1], flips, 4)
    with pytest.raises(ValueError, match=r"flips is \[2\] on meta, expected \[2\] on the host"):
        resample(stored, indices, boxes, flips.to("meta"), 4)
    with pytest.raises(ValueError, match=r"size=\(0, 4\), expected at least 1"):
        resample(stored, indices, boxes, flips, (0, 4))
    with pytest.raises(IndexError):
        resample(stored, indices + 1, boxes, flips, 4)
