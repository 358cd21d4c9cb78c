"""Training images in the device's memory, decoded once, with torchvision's random crops of them; CLIP's crops of files.

torchvision's transforms of uint8 images run torch's 8-bit kernel on the CPU, and so does `resample` there. Elsewhere
two products with small matrices compute the same integers: 16-bit weights, the columns first, each pass rounded to 8
bits. So a crop has the same bits alone and in any batch, on every device, whatever TF32 and autocast allow.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

logger = logging.getLogger("complora_kernels")
T = TypeVar("T")

_TRIES = 10  # those of torchvision's RandomResizedCrop
_CROPS = 1  # keeps the random numbers of a step apart from those of the epoch of the same number
_MOST_BITS = 22  # torch's limit on the bits after the point of a weight
# Boxes are padded to the largest of their group: to at most so many times their own pixels, and to at most so many
# values, 256 MiB in float32.
_MOST_PADDING = 4
_MOST_VALUES = 2**26


class DeviceImages:
    """uint8 images of any sizes in one buffer, in the memory of the device that uses them or in pinned host memory.

    `images[i]` is uint8 [3, H, W], a view of the buffer.

    Attributes:
        pixels: uint8 [bytes], the buffer.
        sizes: int64 [N, 2], heights and widths, on the host: nothing waits for the device to know them.
        target: the device on which batches are computed.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], device: str | torch.device, budget_bytes: int | None = None):
        self.target = torch.device(device)
        self.sizes = torch.tensor(sizes)
        self._starts = [0, *accumulate(3 * height * width for height, width in sizes)]
        self.pixels = _allocate(self._starts[-1], self.target, budget_bytes)
        self._is_pinned = self.target.type == "cuda" and self.device.type == "cpu"

    @classmethod
    def from_tensors(
        cls, images: Tensor | Sequence[Tensor], device: str | torch.device, *, budget_bytes: int | None = None
    ) -> DeviceImages:
        """Copy uint8 images.

        Args:
            images: [N, 3, H, W], or N images [3, H, W] of any sizes; N at least 1.
            device: where batches are computed and, if they fit, the images kept.
            budget_bytes: more bytes than this are kept in host memory, pinned for a GPU, as are those for which the
                device has no memory; a warning is logged. None sets no limit.

        Raises:
            ValueError: no images, or one of another dtype or shape.
        """
        images = list(images)
        if not images:
            raise ValueError("images is empty, expected at least one")
        for i, image in enumerate(images):
            if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3 or not image.numel():
                raise ValueError(f"images[{i}] is {image.dtype} {list(image.shape)}, expected uint8 [3, H, W]")
        stored = cls([(image.shape[1], image.shape[2]) for image in images], device, budget_bytes)
        for i, image in enumerate(images):
            stored._put(i, image)
        return stored

    @classmethod
    def from_files(
        cls,
        paths: Sequence[str | Path],
        device: str | torch.device,
        *,
        budget_bytes: int | None = None,
        shorter_side: int | None = None,
        progress: bool = True,
    ) -> DeviceImages:
        """Decode image files, each once and on all cores, straight into the buffer, whose size their headers tell.

        Beside the buffer the memory holds the images that are just being decoded, one a thread.

        They become RGB: alpha is dropped, grey repeated. They are turned upright as EXIF says, which torchvision's own
        loaders leave undone: pixels should be as people see them, and as captions describe them. `load_crops` does the
        same.

        Args:
            paths: at least one file of a format that Pillow reads, with 8 bits a channel.
            device: as in `from_tensors`.
            budget_bytes: as in `from_tensors`.
            shorter_side: pixels that are enough of an image's shorter side, at least 1. Where it has twice as many or
                more, n by n pixels become one, their mean, with the largest n that leaves enough; of a JPEG partly
                while it is decoded, which then takes less memory too. With four times the model's size crops of a
                quarter of an image's length still need no enlarging. None: all images are kept as they are.
            progress: show a progress bar on stderr once the work has taken two seconds.

        Raises:
            ValueError: no paths, or a file that cannot be decoded, is not of the size that its header says, or has
                more pixels than Pillow's limit (`PIL.Image.MAX_IMAGE_PIXELS`, against files that are made to fill the
                memory); the first is named.
            OSError: a file that cannot be read.
        """
        if shorter_side is not None and shorter_side < 1:
            raise ValueError(f"shorter_side={shorter_side}, expected at least 1")

        def size_of(i: int, path: str | Path) -> tuple[int, int]:
            return _size_of(path, shorter_side)

        sizes = _for_each_file(size_of, paths, None, progress, "reading headers")
        stored = cls(sizes, device, budget_bytes)

        def decode(i: int, path: str | Path) -> None:
            image = _pixels(_open(path, shorter_side))
            if sorted(image.shape[1:]) != sorted(sizes[i]):
                found, expected = list(image.shape[1:]), list(sizes[i])
                raise ValueError(f"{path} has {found} pixels, expected {expected}, as its header says")
            stored._put(i, image)

        _for_each_file(decode, paths, None, progress)
        return stored

    @property
    def bytes(self) -> int:
        """The size of the buffer."""
        return self.pixels.numel()

    @property
    def device(self) -> torch.device:
        """Where the images are kept."""
        return self.pixels.device

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Tensor:
        index = range(len(self))[index]
        return self.pixels[self._starts[index] : self._starts[index + 1]].view(3, *self.sizes[index].tolist())

    def _put(self, index: int, image: Tensor) -> None:
        """Fill the place of an image, which may have been turned on its side: it takes as many bytes."""
        self.sizes[index] = torch.tensor(image.shape[1:])
        self[index].copy_(image)


def load_crops(
    paths: Sequence[str | Path],
    size: tuple[int, int],
    *,
    resize_mode: Literal["shortest", "longest", "squash"] | str = "shortest",
    interpolation: Literal["bicubic", "bilinear"] | str = "bicubic",
    workers: int | None = None,
    progress: bool = True,
) -> Tensor:
    """Decode image files and bring them to a model's size as CLIP does before it names them.

    Of the image in RGB, turned upright as `DeviceImages.from_files` does it, the pixels are those of
    `open_clip.image_transform(size, is_train=False)` before they become floats, bit for bit. (CLIP's own evaluation
    ignores EXIF's orientation and converts to RGB last, which tells in photos that lie on their side, transparent ones
    and CMYK.)

    Args:
        paths: at least one file, as in `DeviceImages.from_files`.
        size: height and width of the results.
        resize_mode: "shortest": the image covers the result, whose middle is cut out. "longest": it fits into it, with
            black around. "squash": it is stretched to it.
        interpolation: "bicubic" or "bilinear", antialiased. As in open_clip, "shortest" is always bicubic where the
            size is no square.
        workers: threads; None: what Python takes for the number of cores.
        progress: show a progress bar on stderr once the work has taken two seconds.

    Returns:
        uint8 [N, 3, H, W].

    Raises:
        ValueError: no paths, an unknown mode, or a file that cannot be decoded or is too large; the first is named.
        OSError: a file that cannot be read.
    """
    if resize_mode not in _FIT:
        raise ValueError(f"resize_mode={resize_mode!r}, expected {', '.join(_FIT)}")
    if interpolation not in _FILTERS:
        raise ValueError(f"interpolation={interpolation!r}, expected {', '.join(_FILTERS)}")
    if min(size) < 1:
        raise ValueError(f"size={size}, expected at least 1")
    crops = torch.empty(len(paths), 3, *size, dtype=torch.uint8)

    def crop(i: int, path: str | Path) -> None:
        crops[i] = _pixels(_FIT[resize_mode](_open(path), size, _FILTERS[interpolation]))

    _for_each_file(crop, paths, workers, progress)
    return crops


def draw_boxes(
    sizes: Tensor,
    seed: int,
    step: int,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Draw a box in each image, as torchvision's RandomResizedCrop does, and whether to flip it.

    A function of its arguments, with no state to save; the box of an image does not depend on the others' sizes.

    Args:
        sizes: int64 [B, 2], heights and widths, on the host: `images.sizes[indices]`.
        seed: of the run, at least 0.
        step: of the run, at least 0.
        scale: limits of a box's share of the image's area, drawn uniformly.
        ratio: limits of width / height, whose logarithm is drawn uniformly.
        flip: the probability of a flip.

    Returns:
        Boxes int64 [B, 4], top, left, height and width in pixels; flips bool [B].

    Raises:
        ValueError: limits that are not positive or not in ascending order.
    """
    for name, (low, high) in (("scale", scale), ("ratio", ratio)):
        if not 0 < low <= high:
            raise ValueError(f"{name}={(low, high)}, expected two positive limits, the lower one first")
    random = np.random.default_rng((seed, step, _CROPS)).random((len(sizes), 2 * _TRIES + 3))  # in [0, 1)
    areas, ratios, (v_top, v_left, v_flip) = random[:, :_TRIES], random[:, _TRIES:-3], random[:, -3:].T
    image_heights, image_widths = sizes.numpy()[:, :, None].swapaxes(0, 1)  # [B, 1]
    areas = image_heights * image_widths * (scale[0] + (scale[1] - scale[0]) * areas)
    ratios = np.exp(np.log(ratio[0]) + np.log(ratio[1] / ratio[0]) * ratios)
    # After the last try comes what always fits: the largest central box within the limits of the ratio.
    central_heights = np.rint(image_widths / ratio[0]).clip(1, image_heights)
    central_widths = np.rint(image_heights * ratio[1]).clip(1, image_widths)
    heights = np.concatenate([np.rint(np.sqrt(areas / ratios)), central_heights], 1)  # [B, tries + 1]
    widths = np.concatenate([np.rint(np.sqrt(areas * ratios)), central_widths], 1)
    fits = (heights > 0) & (heights <= image_heights) & (widths > 0) & (widths <= image_widths)
    chosen = fits.argmax(1)[:, None]  # the first that fits
    is_central = chosen[:, 0] == _TRIES
    height, width = (np.take_along_axis(lengths, chosen, 1)[:, 0] for lengths in (heights, widths))  # [B]
    free_height, free_width = image_heights[:, 0] - height, image_widths[:, 0] - width
    top = np.where(is_central, free_height // 2, np.floor(v_top * (free_height + 1)))
    left = np.where(is_central, free_width // 2, np.floor(v_left * (free_width + 1)))
    boxes = np.stack([top, left, height, width], 1).astype(np.int64)
    return torch.from_numpy(boxes), torch.from_numpy(v_flip < flip)


@torch.no_grad()
def resample(
    images: DeviceImages, indices: Tensor, boxes: Tensor, flips: Tensor, size: int | tuple[int, int]
) -> Tensor:
    """Cut boxes out of images, resize them (bicubic, antialiased) and flip some from left to right.

    Equal, bit for bit, to torchvision's `horizontal_flip(resized_crop(...))` of the uint8 images on the CPU, divided
    by 255. Nothing waits for the device.

    Args:
        images: N images.
        indices: int64 [B], which of them; on the host, like `boxes` and `flips`.
        boxes: int64 [B, 4], top, left, height and width in pixels.
        flips: bool [B].
        size: S, or the height and the width of the results.

    Returns:
        float32 [B, 3, S, S] in [0, 1], on `images.target`.

    Raises:
        ValueError: shapes that do not belong together, or a box that is empty or not inside its image.
        IndexError: an index beyond the images.
    """
    height, width = (size, size) if isinstance(size, int) else size
    _check(images, indices, boxes, flips, height, width)
    if not len(indices):
        return torch.empty(0, 3, height, width, device=images.target)
    if images.target.type == "cpu" and height * width > 1:  # torch's kernel fails on some boxes for 1x1
        return _resample_by_torch(images, indices, boxes, flips, height, width)
    return _resample_by_products(images, indices, boxes, flips, height, width)


def bicubic_taps(lengths: Tensor, longest: int, size: int) -> tuple[Tensor, Tensor]:
    """The weights with which pixels make up resized ones, as in torch's antialiased `interpolate`.

    The filter is Keys' with a = -0.5, as in Pillow, stretched where the pixels are more than the results.

    Args:
        lengths: float64 [B], numbers of pixels.
        longest: the largest of them, known to the host.
        size: S, the number of results.

    Returns:
        The first pixel of each result, int64 [B, S], and the weights of the T pixels from there on, float64 [B, S, T];
        they sum to 1, and are 0 beyond the last pixel.
    """
    scale = lengths[:, None] / size  # [B, 1] pixels for one result
    stretch = scale.clamp(min=1)
    centre = scale * (torch.arange(size, device=lengths.device) + 0.5)  # [B, S]
    first = (centre - 2 * stretch + 0.5).long().clamp(min=0)
    end = torch.minimum((centre + 2 * stretch + 0.5).long(), lengths.long()[:, None])
    taps = torch.arange(int(4 * max(longest / size, 1)) + 1, device=lengths.device)
    pixel = first[:, :, None] + taps  # [B, S, T]
    x = ((pixel - centre[:, :, None] + 0.5) * (1 / stretch)[:, :, None]).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)).where(pixel < end[:, :, None], 0.0)
    return first, weights / weights.sum(-1, keepdim=True)


def _resample_by_torch(
    images: DeviceImages, indices: Tensor, boxes: Tensor, flips: Tensor, height: int, width: int
) -> Tensor:  # [B, 3, height, width]
    crops = torch.empty(len(indices), 3, height, width)
    for crop, index, (top, left, h, w), flip in zip(
        crops, indices.tolist(), boxes.tolist(), flips.tolist(), strict=True
    ):
        pixels = images[index][None, :, top : top + h, left : left + w]
        resized = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0]
        crop.copy_(resized.flip(2) if flip else resized)
    return crops.div_(255)


def _resample_by_products(
    images: DeviceImages, indices: Tensor, boxes: Tensor, flips: Tensor, height: int, width: int
) -> Tensor:  # [B, 3, height, width]
    groups = _groups(boxes)
    crops = [_resample_group(images, indices[g], boxes[g], flips[g], height, width) for g in groups]
    back = torch.cat(groups).argsort().to(images.target, non_blocking=True)
    return torch.cat(crops)[back]


def _resample_group(
    images: DeviceImages, indices: Tensor, boxes: Tensor, flips: Tensor, height: int, width: int
) -> Tensor:  # [B, 3, height, width]
    longest_height, longest_width = boxes[:, 2:].amax(0).tolist()
    # What the padding holds does not count: its weights are 0, and every uint8 is finite.
    shape = (len(boxes), 3, longest_height, longest_width)
    pixels = torch.empty(shape, dtype=torch.uint8, device=images.device, pin_memory=images._is_pinned)
    for to, index, (top, left, h, w) in zip(pixels, indices.tolist(), boxes.tolist(), strict=True):
        to[:, :h, :w] = images[index][:, top : top + h, left : left + w]
    pixels = pixels.to(images.target, non_blocking=True).float()
    lengths = torch.cat([boxes[:, 2:], flips[:, None]], 1).double().to(images.target, non_blocking=True)
    heights, widths, flips = lengths.unbind(1)
    pixels = _resize(pixels.flatten(1, 2), widths, longest_width, width, flips)  # [B, width, 3 · longest_height]
    pixels = _resize(pixels.view(len(boxes), width * 3, -1), heights, longest_height, height)  # [B, height, width · 3]
    white = torch.full((), 255.0, device=pixels.device)  # a tensor: CUDA multiplies with the inverse of a number
    return (pixels / white).view(-1, height, width, 3).permute(0, 3, 1, 2).contiguous()


def _resize(
    pixels: Tensor,  # [B, M, longest], whole numbers from 0 to 255
    lengths: Tensor,  # [B], how many along the last dimension belong to the box
    longest: int,
    size: int,
    flips: Tensor | None = None,  # [B], 1 where the results are in the opposite order
) -> Tensor:  # [B, size, M], whole numbers from 0 to 255
    first, weights = bicubic_taps(lengths, longest, size)
    if flips is not None:
        flipped = flips[:, None, None] > 0
        first, weights = first.where(~flipped[:, 0], first.flip(1)), weights.where(~flipped, weights.flip(1))
    # As in torch: of the bits after the point as many as keep the largest weight within 16 bits
    bits = torch.log2((2**15 - 0.5) / weights.amax((1, 2), keepdim=True)).floor().clamp(max=_MOST_BITS)  # [B, 1, 1]
    weights = (weights * 2**bits).round()
    # weights = 256 high + low. TF32 and bfloat16 hold these and the pixels exactly, and float32 their sums: these stay
    # below 2^24 up to 128 pixels for one result.
    high = ((weights + 128) / 256).floor()
    low = weights - 256 * high
    taps = torch.arange(weights.shape[2], device=pixels.device)
    columns = (first[:, :, None] + taps)[:, None].expand(-1, 2, -1, -1)  # [B, 2, size, T]
    matrix = pixels.new_zeros(len(pixels), 2, size, longest + len(taps))
    matrix.scatter_(3, columns, torch.stack([high, low], 1).float())
    matrix = matrix.flatten(1, 2)[:, :, :longest]  # [B, 2 · size, longest]
    # Autocast, which would round the sums, leaves calls with `out` alone.
    sums = pixels.new_empty(len(pixels), 2 * size, pixels.shape[1])
    torch.bmm(matrix, pixels.mT, out=sums)
    high, low = sums.int().chunk(2, 1)
    half, bits = (2 ** (bits - 1)).int(), bits.int()
    return ((256 * high + low + half) >> bits).clamp(0, 255).float()


def _groups(boxes: Tensor) -> list[Tensor]:
    """Which boxes are padded to one size: mostly all of them, but a huge one does not make the others as large."""
    groups: list[list[int]] = []
    pixels = height = width = 0
    sizes = boxes[:, 2:].tolist()
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i][0] * sizes[i][1]):
        h, w = sizes[i]
        pixels, height, width = pixels + h * w, max(height, h), max(width, w)
        padded = (len(groups[-1]) + 1) * height * width if groups else 0
        if not groups or padded > _MOST_PADDING * pixels or 3 * padded > _MOST_VALUES:
            groups.append([])
            pixels, height, width = h * w, h, w
        groups[-1].append(i)
    return [torch.tensor(group) for group in groups]


def _check(images: DeviceImages, indices: Tensor, boxes: Tensor, flips: Tensor, height: int, width: int) -> None:
    n = len(indices)
    for name, tensor, shape in (("indices", indices, [n]), ("boxes", boxes, [n, 4]), ("flips", flips, [n])):
        if list(tensor.shape) != shape or tensor.device.type != "cpu":
            raise ValueError(f"{name} is {list(tensor.shape)} on {tensor.device}, expected {shape} on the host")
    if height < 1 or width < 1:
        raise ValueError(f"size={(height, width)}, expected at least 1")
    sizes = images.sizes[indices]  # [B, 2]
    start, length = boxes[:, :2], boxes[:, 2:]
    wrong = ((start < 0) | (length < 1) | (start + length > sizes)).any(1).nonzero()[:, 0].tolist()
    if wrong:
        i = wrong[0]
        raise ValueError(
            f"boxes[{i}] is {boxes[i].tolist()}, expected top, left, height and width of a box inside image "
            f"{indices[i]}, which is {sizes[i].tolist()}"
        )


def _for_each_file(
    work: Callable[[int, str | Path], T],
    paths: Sequence[str | Path],
    workers: int | None,
    progress: bool,
    doing_what: str = "decoding images",
) -> list[T]:
    """`work(i, path)` of every path, in threads. The first path's error is raised, whichever came first in time."""
    if not paths:
        raise ValueError("paths is empty, expected at least one image file")
    pool = ThreadPoolExecutor(workers)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # which does not name the file
        try:
            doing = pool.map(work, range(len(paths)), paths)
            with tqdm(doing, doing_what, len(paths), unit="image", delay=2, leave=False, disable=not progress) as bar:
                return list(bar)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C nobody waits for the files still to come


def _open(path: str | Path, shorter_side: int | None = None) -> Image.Image:  # RGB, upright
    with _reading(path, shorter_side) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "P":
            upright = upright.convert("RGBA")  # Pillow warns where a palette with transparency becomes RGB at once
        rgb = upright.convert("RGB")
        factor = _reduction(rgb, shorter_side)
        return rgb.reduce(factor) if factor > 1 else rgb


def _size_of(path: str | Path, shorter_side: int | None) -> tuple[int, int]:
    """Height and width of what `_open` will return, before EXIF turns it: its bytes, without decoding it.

    (0, 0) where that fails: a file before it may be damaged behind its header, and the first one is to be named.
    """
    try:
        with _reading(path, shorter_side) as image:
            factor = _reduction(image, shorter_side)
            return -(-image.height // factor), -(-image.width // factor)
    except (OSError, ValueError):
        return 0, 0


@contextmanager
def _reading(path: str | Path, shorter_side: int | None) -> Iterator[Image.Image]:
    """An image that is not decoded yet; of a JPEG as many pixels will be decoded as are needed."""
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F") or ";" in image.mode:
                raise ValueError(f"mode {image.mode}, expected 8 bits a channel")
            factor = _reduction(image, shorter_side)
            if factor > 1:  # a JPEG: by 2, 4 or 8 while decoding
                image.draft(None, (-(-image.width // factor), -(-image.height // factor)))
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{path} is not decoded: {error} Expected fewer pixels: shrink the file. (A Python program that trusts it "
            f"may raise PIL.Image.MAX_IMAGE_PIXELS, now {Image.MAX_IMAGE_PIXELS}.)"
        ) from error
    except Exception as error:  # of whatever kind a decoder meets damaged bytes with
        if isinstance(error, OSError) and error.errno is not None:  # the file system's, which names the file
            raise
        raise ValueError(f"{path} cannot be decoded: {error}") from error


def _reduction(image: Image.Image, shorter_side: int | None) -> int:
    """How many pixels of a length become one."""
    return 1 if shorter_side is None else max(1, min(image.size) // shorter_side)


def _pixels(image: Image.Image) -> Tensor:  # uint8 [3, H, W]
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _shortest(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    height, width = size
    if height == width:  # the longer side is rounded down, as in torchvision
        shorter = min(image.size)
        covering = (height * image.width // shorter, height * image.height // shorter)
    else:
        covering, resample = _scaled(image, size, min), Image.Resampling.BICUBIC
    image = image.resize(covering, resample)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _longest(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    height, width = size
    image = image.resize(_scaled(image, size, max), resample)
    ground = Image.new("RGB", (width, height))
    ground.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return ground


def _squash(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    height, width = size
    return image.resize((width, height), resample)


def _scaled(image: Image.Image, size: tuple[int, int], which: Callable[..., float]) -> tuple[int, int]:
    """Width and height with one side as long as the result's, the other at least or, with `max`, at most as long."""
    height, width = size
    ratio = which(image.height / height, image.width / width)
    return max(1, round(image.width / ratio)), max(1, round(image.height / ratio))


_FIT = {"shortest": _shortest, "longest": _longest, "squash": _squash}
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def _allocate(size: int, device: torch.device, budget_bytes: int | None) -> Tensor:
    if device.type != "cpu":
        try:
            if budget_bytes is None or size <= budget_bytes:
                return _empty(size, device)
            reason = f"the budget is {budget_bytes:,} bytes"
        except torch.OutOfMemoryError:
            reason = f"{device} has no memory left for them"
        logger.warning(f"the images stay in host memory: they are {size:,} bytes and {reason}")
    return _empty(size, torch.device("cpu"), pin_memory=device.type == "cuda")


def _empty(size: int, device: torch.device, *, pin_memory: bool = False) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pin_memory)
