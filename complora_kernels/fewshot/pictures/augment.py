"""Draws pictures with all that may vary: place, colours, ground, sharpness."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = 0.5, 0.25
Draw = Callable[..., Tensor]  # random numbers or decisions for each of N pictures


def over(ground: float, pictures: Tensor, size: int) -> Tensor:
    """Pictures [N, 4, H, W], uint8, as they are, over a plain ground: uint8 [N, 3, size, size]."""
    rgb, opacity = _premultiplied(pictures).split([3, 1], 1)
    images = rgb + (1 - opacity) * ground
    images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def augmented(
    pictures: Tensor,  # uint8 [N, 4, H, W]
    mirrors: Tensor,  # bool [N]: whether a mirror image shows the same
    size: int,
    generator: torch.Generator,
) -> Tensor:  # float32 [N, 3, size, size], in [0, 1]
    """Each picture moved, turned, recoloured, over a random ground, and blurred or not."""
    n = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(n, *shape).uniform_(low, high, generator=generator)

    def chance(p: float) -> Tensor:  # bool [N, 1, 1, 1]
        return torch.rand(n, 1, 1, 1, generator=generator) < p

    grid = F.affine_grid(_affine(n, mirrors, uniform, chance), [n, 1, size, size], align_corners=False)
    moved = F.grid_sample(_premultiplied(pictures), grid, mode="bilinear", align_corners=False)  # [N, 4, size, size]
    rgb, opacity = moved.split([3, 1], 1)

    grey = (rgb * rgb.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    rgb = torch.where(chance(0.3), grey, rgb)
    order = torch.rand(n, 3, generator=generator).argsort(1)  # [N, 3]
    swapped = rgb.gather(1, order[:, :, None, None].expand_as(rgb))
    rgb = torch.where(chance(0.2), swapped, rgb)
    plain = uniform(0, 1, 3, 1, 1) * opacity
    rgb = torch.where(chance(0.08), plain, rgb)  # the outline alone
    rgb = torch.where(chance(0.1), opacity - rgb, rgb)  # a negative
    contrast, brightness = uniform(0.5, 1.3, 1, 1, 1), uniform(-0.15, 0.15, 1, 1, 1)
    rgb = contrast * rgb + opacity * ((1 - contrast) / 2 + brightness)

    images = rgb + (1 - opacity) * _grounds(n, size, uniform, chance)
    coarse = F.interpolate(F.avg_pool2d(images, 2), size=(size, size), mode="bilinear", align_corners=False)
    images = torch.where(chance(0.25), coarse, images)
    noise = torch.randn(images.shape, generator=generator) * uniform(0, 0.06, 1, 1, 1)
    return (images + noise).clamp(0, 1)


def normalize(pixels: Tensor) -> Tensor:  # float32 [N, 3, H, W], in [0, 1] -> the same shape
    """Subtract the mean and divide by the deviation that the model expects."""
    return (pixels - MEAN) / STD


def _premultiplied(pictures: Tensor) -> Tensor:  # uint8 [N, 4, H, W] -> float32 [N, 4, H, W] in [0, 1]
    pixels = pictures.float() / 255
    return torch.cat([pixels[:, :3] * pixels[:, 3:], pixels[:, 3:]], 1)


def _affine(n: int, mirrors: Tensor, uniform: Draw, chance: Draw) -> Tensor:  # [N, 2, 3]
    angle = uniform(-1, 1) ** 3 * math.pi / 6  # mostly upright
    across, along = 1 / (uniform(0.7, 1.15) * uniform(0.85, 1.15)), 1 / uniform(0.7, 1.15)
    across = torch.where(mirrors & chance(0.5).flatten(), -across, across)
    shear, shift = uniform(-0.2, 0.2), uniform(-0.15, 0.15, 2)
    cos, sin = angle.cos(), angle.sin()
    rows = (
        torch.stack([across * cos, across * (sin + shear * cos), shift[:, 0]], -1),
        torch.stack([-along * sin, along * (cos - shear * sin), shift[:, 1]], -1),
    )
    return torch.stack(rows, 1)


def _grounds(n: int, size: int, uniform: Draw, chance: Draw) -> Tensor:  # [N, 3, size, size]
    """White, black, a colour, or a gradient between two of these."""
    first, second = uniform(0, 1, 3, 1, 1), uniform(0, 1, 3, 1, 1)
    first = torch.where(chance(0.3), torch.ones(()), first)
    first = torch.where(chance(0.3), torch.zeros(()), first)
    second = torch.where(chance(0.7), first, second)
    line = torch.linspace(-1, 1, size)
    slope = uniform(-0.5, 0.5, 1, 1, 1) * line[:, None] + uniform(-0.5, 0.5, 1, 1, 1) * line + 0.5
    return first + (second - first) * slope.clamp(0, 1)
