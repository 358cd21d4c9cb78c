"""Decodes image files to RGB, upright: whole, or resized and cropped to a model's size as CLIP does."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from tqdm import tqdm

from complora_kernels.common.files import check_plain

T = TypeVar("T")

_MOST_PIXELS = 2**25
"""The most pixels of a resized image before it is cropped to its middle; Pillow keeps them in 128 MiB."""


def load_crops(
    paths: Sequence[str | Path],
    size: tuple[int, int],
    *,
    resize_mode: Literal["shortest", "longest", "squash"] | str = "shortest",
    interpolation: Literal["bicubic", "bilinear"] | str = "bicubic",
    workers: int | None = None,
    progress: bool = True,
) -> Tensor:
    """Decode image files and bring them to a model's size as CLIP's preprocessing for evaluation does.

    The pixels are bit for bit those of `open_clip.image_transform(size, is_train=False)` before they become floats, for
    the image in RGB, turned upright as by `DeviceImages.from_files`. An image hundreds of times as long as wide is
    cropped before it is enlarged, and differs by up to one level. (CLIP's own evaluation ignores EXIF's orientation and
    converts to RGB last, which changes photos that lie on their side, transparent images and CMYK.)

    Args:
        paths: at least one file, as in `DeviceImages.from_files`.
        size: height and width of the results.
        resize_mode: "shortest": the image covers the result, which is its middle. "longest": it fits into the result,
            with black around it. "squash": it is stretched to the result.
        interpolation: "bicubic" or "bilinear", antialiased. As in open_clip, "shortest" is always bicubic where the
            size is no square.
        workers: number of threads; None: Python's default.
        progress: show a progress bar on stderr once the work has taken two seconds.

    Returns:
        uint8 [N, 3, H, W].

    Raises:
        ValueError: there are no paths, a mode is unknown, or a file cannot be decoded, is too large or needs more
            memory than there is; the message names the first such file.
        OSError: a file cannot be read.
    """
    crop_of = cropper(size, resize_mode=resize_mode, interpolation=interpolation)
    crops = torch.empty(len(paths), 3, *size, dtype=torch.uint8)

    def crop(i: int, path: str | Path) -> None:
        crops[i] = crop_of(path)

    for_each_file(crop, paths, workers, progress)
    return crops


def cropper(
    size: tuple[int, int],
    *,
    resize_mode: Literal["shortest", "longest", "squash"] | str = "shortest",
    interpolation: Literal["bicubic", "bilinear"] | str = "bicubic",
) -> Callable[[str | Path | Image.Image], Tensor]:
    """What `load_crops` does with one file, or with an image of Pillow: to uint8 [3, H, W]. Arguments as there."""
    if resize_mode not in _FIT:
        raise ValueError(f"resize_mode={resize_mode!r}, expected {', '.join(_FIT)}")
    if interpolation not in _FILTERS:
        raise ValueError(f"interpolation={interpolation!r}, expected {', '.join(_FILTERS)}")
    if min(size) < 1:
        raise ValueError(f"size={size}, expected at least 1")

    def crop_of(image: str | Path | Image.Image) -> Tensor:
        rgb = _rgb(image) if isinstance(image, Image.Image) else open_image(image)
        return pixels_of(_FIT[resize_mode](rgb, size, _FILTERS[interpolation]))

    return crop_of


def for_each_file(
    work: Callable[[int, str | Path], T],
    paths: Sequence[str | Path],
    workers: int | None,
    progress: bool,
    doing_what: str = "decoding images",
) -> list[T]:
    """Call `work(i, path)` for every path, in threads; of several errors, that of the first path is raised."""
    if not paths:
        raise ValueError("paths is empty, expected at least one image file")
    register_plugins()

    def named(i: int, path: str | Path) -> T:
        try:
            return work(i, path)
        except MemoryError as error:
            raise ValueError(f"{path} is not decoded: there is not enough memory for it") from error

    pool = ThreadPoolExecutor(workers)
    with warnings.catch_warnings():
        # Pillow's warnings about large images, and about damage outside of the pixels, name no file
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.(Jpeg|Tiff)ImagePlugin")
        try:
            doing = pool.map(named, range(len(paths)), paths)
            with tqdm(doing, doing_what, len(paths), unit="image", delay=2, leave=False, disable=not progress) as bar:
                return list(bar)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C the remaining files are not decoded


def open_image(path: str | Path, shorter_side: int | None = None) -> Image.Image:
    """Decode an image to RGB, upright, and reduce it to a shorter side as `DeviceImages.from_files` describes.

    Raises:
        ValueError: the file cannot be decoded, or has more pixels than Pillow opens.
        MemoryError: there is not enough memory for the image.
        OSError: the file cannot be read.
    """
    with _reading(path, shorter_side) as image:
        rgb = _rgb(image)
        factor = _reduction(rgb, shorter_side)
        return rgb.reduce(factor) if factor > 1 else rgb


def size_by_header(path: str | Path, shorter_side: int | None) -> tuple[int, int]:
    """Height and width of the image that `open_image` will return, before EXIF turns it, from the file's header.

    Returns (0, 0) where the header cannot be read: decoding will raise the error, and names the first damaged file.
    """
    try:
        with _reading(path, shorter_side) as image:
            factor = _reduction(image, shorter_side)
            return -(-image.height // factor), -(-image.width // factor)
    except (OSError, ValueError):
        return 0, 0


def _rgb(image: Image.Image) -> Image.Image:
    """An image in RGB, upright. Raises a ValueError for more than 8 bits a channel."""
    if image.mode in ("I", "F") or ";" in image.mode:
        raise ValueError(f"mode {image.mode}, expected 8 bits a channel")
    upright = _upright(image)
    if upright.mode == "P":
        upright = upright.convert("RGBA")  # Pillow warns where a palette with transparency becomes RGB at once
    return upright.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as `ImageOps.exif_transpose` does, which also rewrites the EXIF block and may fail at that."""
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception:  # a damaged EXIF block raises errors of any kind, and tells no orientation
        turn = None
    return image if turn is None else image.transpose(turn)


@contextmanager
def _reading(path: str | Path, shorter_side: int | None) -> Iterator[Image.Image]:
    """Open an image without decoding it; a JPEG is set to decode only as many pixels as are needed."""
    try:
        check_plain(path)
        with Image.open(path) as image:
            factor = _reduction(image, shorter_side)
            if factor > 1:  # a JPEG is reduced by 2, 4 or 8 while it is decoded
                image.draft(None, (-(-image.width // factor), -(-image.height // factor)))
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{path} is not decoded: it has {_pixels(error)} pixels, expected at most "
            f"{2 * (Image.MAX_IMAGE_PIXELS or 0)}: shrink the file. (A Python program that trusts it may raise this "
            "limit, twice PIL.Image.MAX_IMAGE_PIXELS.)"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise errors of any kind for damaged bytes
        if isinstance(error, OSError) and error.errno is not None:  # an error of the file system names the file
            raise
        raise ValueError(f"{path} cannot be decoded: {error}") from error


def _pixels(error: Exception) -> str:
    """The number of pixels of an image that Pillow refuses, from its message."""
    found = re.search(r"\((\d+) pixels\)", str(error))
    return found[1] if found else "too many"


def _reduction(image: Image.Image, shorter_side: int | None) -> int:
    """The factor by which both sides of an image are reduced."""
    return 1 if shorter_side is None else max(1, min(image.size) // shorter_side)


def pixels_of(image: Image.Image) -> Tensor:  # uint8 [3, H, W]
    """The pixels of an image in RGB."""
    return torch.from_numpy(np.array(np.asarray(image).transpose(2, 0, 1), order="C"))


def _shortest(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    height, width = size
    if height == width:  # the longer side is rounded down, as in torchvision
        shorter = min(image.size)
        covering = (height * image.width // shorter, height * image.height // shorter)
    else:
        covering, resample = _scaled(image, size, min), Image.Resampling.BICUBIC
    return _middle(image, covering, resample, size)


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
    """Width and height of the image scaled to cover the result (`min`) or to fit into it (`max`)."""
    height, width = size
    ratio = which(image.height / height, image.width / width)
    return max(1, round(image.width / ratio)), max(1, round(image.height / ratio))


def _middle(
    image: Image.Image, covering: tuple[int, int], resample: Image.Resampling, size: tuple[int, int]
) -> Image.Image:
    """The middle of an image that is resized so that it covers height and width."""
    height, width = size
    left, top = round((covering[0] - width) / 2), round((covering[1] - height) / 2)
    if covering[0] * covering[1] <= max(_MOST_PIXELS, image.width * image.height):
        return image.resize(covering, resample).crop((left, top, left + width, top + height))
    # A thin image would take gigabytes: it is cropped before it is enlarged, columns first as in Pillow
    image, (x0, x1), (y0, y1) = _crop_for(image, covering, (left, top, left + width, top + height))
    image = image.resize((width, image.height), resample, (x0, 0, x1, image.height))
    return image.resize((width, height), resample, (0, y0, width, y1))


def _crop_for(
    image: Image.Image, covering: tuple[int, int], part: tuple[int, int, int, int]
) -> tuple[Image.Image, tuple[float, float], tuple[float, float]]:
    """The pixels that a part of the enlarged image depends on, and the part's limits within them."""
    box, ends = [], []
    for first, end, pixels, enlarged in zip(part[:2], part[2:], image.size, covering, strict=True):
        begins, stops = first * pixels / enlarged, end * pixels / enlarged
        start = max(0, math.floor(begins) - 3)  # a bicubic filter sees two pixels on each side
        box += [start, min(pixels, math.ceil(stops) + 3)]
        ends.append((begins - start, stops - start))
    return image.crop((box[0], box[2], box[1], box[3])), *ends


def image_suffixes() -> tuple[str, ...]:
    """The lower-case suffixes of the files that are read as images: `_SUFFIXES` and those of Pillow's plugins."""
    register_plugins()
    return _SUFFIXES + tuple(
        suffix
        for suffix, kind in Image.EXTENSION.items()
        if kind in Image.OPEN and not Image.OPEN[kind][0].__module__.startswith("PIL.")
    )


@cache
def register_plugins() -> None:
    """Register all of Pillow's formats and, where pillow-heif is installed, HEIF, in which phones take photos."""
    Image.preinit()  # keeps the order in which `Image.open` tries the formats
    Image.init()
    try:
        from pillow_heif import register_heif_opener  # type: ignore[reportMissingImports]
    except ImportError:
        return
    register_heif_opener()


# Pillow's formats for photos, without those for icons, drawings or data, such as .ico, .eps, .psd, .pfm or .h5
_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".mpo", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    *(".png", ".apng", ".gif", ".webp", ".avif", ".avifs", ".tif", ".tiff", ".bmp", ".dib"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pcx", ".qoi", ".tga"),
)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FIT = {"shortest": _shortest, "longest": _longest, "squash": _squash}
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
