"""torchvision's random crops of training images, on every device.

torchvision's transforms of uint8 images run torch's 8-bit kernel on the CPU, and so does `resample` there. Elsewhere
two products with small matrices compute the same integers: 16-bit weights, the columns first, each pass rounded to 8
bits. So a crop has the same bits alone and in any batch, whatever TF32 and autocast allow. The weights are computed in
float64: where one lies halfway between two 16-bit numbers, a device that rounds its last bit otherwise may give a
pixel's next value, one of 255.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from complora_kernels.fewshot.images import DeviceImages

_TRIES = 10  # tries of torchvision's RandomResizedCrop
_CROPS = 1  # separates the random numbers of a step from those of the epoch with the same number
_MOST_BITS = 22  # torch's limit on the fractional bits of a weight
# Boxes are padded to the largest of their group: to at most so many times their own pixels, and to at most so many
# values, 256 MiB in float32.
_MOST_PADDING = 4
_MOST_VALUES = 2**26


def draw_boxes(
    sizes: Tensor,
    seed: int,
    step: int,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Draw a random box in each image, as torchvision's RandomResizedCrop does, and whether to flip it.

    The results are a function of the arguments, without any state; the box of an image does not depend on the sizes of
    the others.

    Args:
        sizes: int64 [B, 2], heights and widths, on the host: `images.sizes[indices]`.
        seed: seed of the run, at least 0.
        step: number of the step, at least 0.
        scale: limits of a box's share of the image's area, drawn uniformly.
        ratio: limits of width / height, whose logarithm is drawn uniformly.
        flip: the probability of a flip.

    Returns:
        Boxes int64 [B, 4], top, left, height and width in pixels; flips bool [B].

    Raises:
        ValueError: limits are not positive or not in ascending order.
    """
    for name, (low, high) in (("scale", scale), ("ratio", ratio)):
        if not 0 < low <= high:
            raise ValueError(f"{name}={(low, high)}, expected two positive limits, the lower one first")
    random = np.random.default_rng((seed, step, _CROPS)).random((len(sizes), 2 * _TRIES + 3))  # values in [0, 1)
    areas, ratios, (v_top, v_left, v_flip) = random[:, :_TRIES], random[:, _TRIES:-3], random[:, -3:].T
    image_heights, image_widths = sizes.numpy()[:, :, None].swapaxes(0, 1)  # [B, 1]
    areas = image_heights * image_widths * (scale[0] + (scale[1] - scale[0]) * areas)
    ratios = np.exp(np.log(ratio[0]) + np.log(ratio[1] / ratio[0]) * ratios)
    # The last candidate always fits: the largest central box within the limits of the ratio.
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

    torchvision's `horizontal_flip(resized_crop(...))` of the uint8 images on the CPU, divided by 255: on the CPU to the
    same bits, elsewhere up to one 255th in the rare pixels whose weights lie at the edge of rounding. Results one pixel
    wide, for which torch's kernel is wrong on processors without AVX2, are computed as on other devices. Nothing waits
    for the device.

    Args:
        images: N images.
        indices: int64 [B], on the host, like `boxes` and `flips`.
        boxes: int64 [B, 4], top, left, height and width in pixels.
        flips: bool [B].
        size: the side S of square results, or their height and width.

    Returns:
        float32 [B, 3, S, S] in [0, 1], on `images.target`.

    Raises:
        ValueError: the shapes do not fit together, or a box is empty or not inside its image.
        IndexError: an index is beyond the images.
    """
    height, width = (size, size) if isinstance(size, int) else size
    _check(images, indices, boxes, flips, height, width)
    if not len(indices):
        return torch.empty(0, 3, height, width, device=images.target)
    if images.target.type == "cpu" and width > 1:  # for width 1 torch's kernel is wrong without AVX2
        return resample_by_torch(images, indices, boxes, flips, height, width)
    return resample_by_products(images, indices, boxes, flips, height, width)


def bicubic_taps(lengths: Tensor, longest: int, size: int) -> tuple[Tensor, Tensor]:
    """The weights of the pixels in each resized pixel, as in torch's antialiased `interpolate`.

    The filter is Keys' with a = -0.5, as in Pillow; it is stretched where the image shrinks.

    Args:
        lengths: float64 [B], numbers of pixels.
        longest: the largest of the lengths, on the host.
        size: the number S of resized pixels.

    Returns:
        int64 [B, S], the first pixel of each resized one, and float64 [B, S, T], the weights of the T pixels from there
        on; they sum to 1, and are 0 beyond the last pixel.
    """
    scale = lengths[:, None] / size  # [B, 1], pixels for each resized pixel
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


def resample_by_torch(
    images: DeviceImages, indices: Tensor, boxes: Tensor, flips: Tensor, height: int, width: int
) -> Tensor:  # [B, 3, height, width]
    """`resample` by torch's kernel for uint8 images, on the CPU."""
    crops = torch.empty(len(indices), 3, height, width)
    for crop, index, (top, left, h, w), flip in zip(
        crops, indices.tolist(), boxes.tolist(), flips.tolist(), strict=True
    ):
        pixels = images[index][None, :, top : top + h, left : left + w]
        resized = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0]
        crop.copy_(resized.flip(2) if flip else resized)
    return crops.div_(255)


def resample_by_products(
    images: DeviceImages, indices: Tensor, boxes: Tensor, flips: Tensor, height: int, width: int
) -> Tensor:  # [B, 3, height, width]
    """`resample` by products with matrices of weights, on any device."""
    groups = _groups(boxes)
    crops = [_resample_group(images, indices[g], boxes[g], flips[g], height, width) for g in groups]
    back = torch.cat(groups).argsort().to(images.target, non_blocking=True)
    return torch.cat(crops)[back]


def _resample_group(
    images: DeviceImages, indices: Tensor, boxes: Tensor, flips: Tensor, height: int, width: int
) -> Tensor:  # [B, 3, height, width]
    longest_height, longest_width = boxes[:, 2:].amax(0).tolist()
    # The padding may hold any values: its weights are 0, and every uint8 is finite.
    shape = (len(boxes), 3, longest_height, longest_width)
    pixels = torch.empty(shape, dtype=torch.uint8, device=images.device, pin_memory=images._is_pinned)
    for to, index, (top, left, h, w) in zip(pixels, indices.tolist(), boxes.tolist(), strict=True):
        to[:, :h, :w] = images[index][:, top : top + h, left : left + w]
    pixels = pixels.to(images.target, non_blocking=True).float()
    lengths = torch.cat([boxes[:, 2:], flips[:, None]], 1).double().to(images.target, non_blocking=True)
    heights, widths, flips = lengths.unbind(1)
    pixels = _resize(pixels.flatten(1, 2), widths, longest_width, width, flips)  # [B, width, 3 · longest_height]
    pixels = _resize(pixels.view(len(boxes), width * 3, -1), heights, longest_height, height)  # [B, height, width · 3]
    white = torch.full((), 255.0, device=pixels.device)  # a tensor, because CUDA multiplies by the inverse of a number
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
    # Like torch, use as many fractional bits as keep the largest weight within 16 bits.
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
    """Group the boxes that are padded to one size, so that a huge box does not make all others as large."""
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
