"""Keeps decoded training images in the memory of the device."""

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
        sizes: int64 [N, 2], heights and widths, on the host, where reading them does not wait for the device.
        target: the device that computes batches.
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
            device: the device that computes batches and, if they fit, keeps the images.
            budget_bytes: images of more bytes than this, or than the device has free, are kept in host memory, pinned
                for a GPU, and a warning is logged. None sets no limit.

        Raises:
            ValueError: there are no images, or one has another dtype or shape.
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
        """Decode image files, each once and on all cores, into the buffer, whose size is known from their headers.

        Beside the buffer, each thread needs memory for the image that it decodes.

        Images become RGB: alpha is dropped, grey is repeated. EXIF's orientation is applied, which torchvision's own
        loaders ignore, because pixels should be as people see them and as captions describe them. `load_crops` does the
        same.

        Args:
            paths: at least one file of a format that Pillow reads, with 8 bits a channel.
            device: as in `from_tensors`.
            budget_bytes: as in `from_tensors`.
            shorter_side: the number of pixels that the shorter side needs, at least 1. A shorter side with twice as
                many or more is reduced: n by n pixels become their mean, with the largest n that leaves enough. A JPEG
                is partly reduced while it is decoded, which takes less memory. With four times the model's size, crops
                of a quarter of an image's length still need no enlarging. None: images keep their size.
            progress: show a progress bar on stderr once the work has taken two seconds.

        Raises:
            ValueError: there are no paths, or a file cannot be decoded, has another size than its header says, needs
                more memory than there is, or has more pixels than Pillow opens (179 million, twice
                `PIL.Image.MAX_IMAGE_PIXELS`, a limit against files that are made to fill the memory); the message names
                the first such file.
            OSError: a file cannot be read.
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
        """The device that keeps the images."""
        return self.pixels.device

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Tensor:
        index = range(len(self))[index]
        return self.pixels[self._starts[index] : self._starts[index + 1]].view(3, *self.sizes[index].tolist())

    def _put(self, index: int, image: Tensor) -> None:
        """Copy an image into its place; an image that was turned on its side takes as many bytes."""
        self.sizes[index] = torch.tensor(image.shape[1:])
        self[index].copy_(image)


def _allocate(size: int, device: torch.device, budget_bytes: int | None) -> Tensor:
    if device.type != "cpu":
        try:
            if budget_bytes is None or size <= budget_bytes:
                return empty_buffer(size, device)
            reason = f"the budget is {budget_bytes:,} bytes"
        except torch.OutOfMemoryError:
            reason = f"{device} has no memory left for them"
        logger.warning(f"the images stay in host memory: they are {size:,} bytes and {reason}")
    return empty_buffer(size, torch.device("cpu"), pin_memory=device.type == "cuda")


def empty_buffer(size: int, device: torch.device, *, pin_memory: bool = False) -> Tensor:
    """An uninitialised buffer of `size` bytes."""
    return torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pin_memory)
