"""Training images in the device's memory, decoded once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from complora_kernels.fewshot.decode import for_each_file, open_image, pixels_of, size_by_header

logger = logging.getLogger("complora_kernels")


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
            ValueError: no paths, or a file that cannot be decoded, is not of the size that its header says, finds no
                memory, or has more pixels than Pillow opens (179 million, twice `PIL.Image.MAX_IMAGE_PIXELS`, against
                files that are made to fill the memory); the first is named.
            OSError: a file that cannot be read.
        """
        if shorter_side is not None and shorter_side < 1:
            raise ValueError(f"shorter_side={shorter_side}, expected at least 1")

        def size_of(i: int, path: str | Path) -> tuple[int, int]:
            return size_by_header(path, shorter_side)

        sizes = for_each_file(size_of, paths, None, progress, "reading headers")
        stored = cls(sizes, device, budget_bytes)

        def decode(i: int, path: str | Path) -> None:
            image = pixels_of(open_image(path, shorter_side))
            if sorted(image.shape[1:]) != sorted(sizes[i]):
                found, expected = list(image.shape[1:]), list(sizes[i])
                raise ValueError(f"{path} has {found} pixels, expected {expected}, as its header says")
            stored._put(i, image)

        for_each_file(decode, paths, None, progress)
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
