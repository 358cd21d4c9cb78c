"""Renders pictures of characters: matplotlib's fonts become distance fields, which torch draws in batches.

A distance field holds at every point its depth inside the stroke. Adding to it thickens the stroke, dividing it softens
the edge, and sampling it on a bent grid bends the character: one lookup draws every variation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
IMAGE_SIZE = 32

TRAINING_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmr10", "cmb10", "cmti10",
)  # fmt: skip
HELD_OUT_FONTS = ("DejaVuSansMono-BoldOblique", "DejaVuSerif-Italic", "STIXGeneralBol", "cmss10", "cmtt10")

# Only matplotlib 3.11 or later, which needs Python 3.11, has this font: elsewhere its fields come from the package.
LATE_FONT = "cmti10"
LATE_FONT_FIELDS = Path(__file__).parents[1] / "assets" / f"{LATE_FONT}.safetensors"

FOREGROUNDS = {
    "red": (235, 50, 50),
    "orange": (245, 140, 40),
    "yellow": (240, 225, 60),
    "green": (70, 210, 80),
    "cyan": (60, 215, 225),
    "blue": (80, 120, 250),
    "purple": (170, 85, 235),
    "pink": (250, 135, 195),
    "white": (240, 240, 240),
}
GROUNDS = {
    "black": (12, 12, 12),
    "gray": (60, 60, 60),
    "brown": (70, 38, 12),
    "navy": (12, 15, 75),
    "maroon": (75, 10, 25),
}

_RENDER_SIZE = 128  # side of the picture from which a distance field is computed, in pixels
_FIELD_SIZE = 64  # side of a distance field; it covers [-1, 1]², and the character's longer side [-0.5, 0.5]


@cache
def distance_fields(font: str) -> Tensor:
    """The 36 characters of one of matplotlib's fonts as signed distances, positive inside the stroke.

    Args:
        font: a file name in matplotlib's font folder, without `.ttf`.

    Returns:
        float32 [36, 64, 64], in units of the character's longer side.

    Raises:
        ValueError: matplotlib ships no such font.
    """
    import matplotlib
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont
    from scipy.ndimage import distance_transform_edt

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    if not path.is_file() and font == LATE_FONT:
        return load_file(LATE_FONT_FIELDS)["distance_fields"]
    if not path.is_file():
        raise ValueError(f"font={font!r}: expected a font that matplotlib ships, but {path} does not exist")
    face = ImageFont.truetype(str(path), 2 * _RENDER_SIZE, layout_engine=ImageFont.Layout.BASIC)
    fields = []
    for character in CHARACTERS:
        left, top, right, bottom = (int(edge) for edge in face.getbbox(character))
        glyph = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(glyph).text((-left, -top), character, fill=255, font=face)
        shrink = _RENDER_SIZE / 2 / max(glyph.size)
        glyph = glyph.resize((round(glyph.width * shrink), round(glyph.height * shrink)), Image.Resampling.BOX)
        canvas = Image.new("L", (_RENDER_SIZE, _RENDER_SIZE))
        canvas.paste(glyph, ((_RENDER_SIZE - glyph.width) // 2, (_RENDER_SIZE - glyph.height) // 2))
        inside = np.asarray(canvas) > 127
        inner, outer = (np.asarray(distance_transform_edt(mask)) for mask in (inside, ~inside))
        fields.append(inner - outer)
    field = torch.from_numpy(np.stack(fields)).float() / (_RENDER_SIZE / 2)
    return F.avg_pool2d(field, _RENDER_SIZE // _FIELD_SIZE)


def _uniform(low: float, high: float, size: int | tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.empty(size).uniform_(low, high, generator=generator)


def _bent_grid(n: int, jitter: float, generator: torch.Generator) -> Tensor:
    """The point of the field that each output pixel shows: a random affine map, smoothly displaced. [n, 32, 32, 2]"""
    angle = _uniform(-0.3, 0.3, n, generator) * jitter
    shear = _uniform(-0.35, 0.35, n, generator) * jitter
    height = 0.85 + _uniform(-0.2, 0.2, n, generator) * jitter  # the character's height as a share of the frame's
    width = height * (1 + _uniform(-0.25, 0.3, n, generator) * jitter)
    shift = _uniform(-0.12, 0.12, (n, 2), generator) * jitter
    cos, sin = angle.cos(), angle.sin()
    # The character's longer side is half of the field, hence / 2.
    rows = (torch.stack([cos / width, (sin + shear * cos) / width, shift[:, 0]], -1),
            torch.stack([-sin / height, (cos - shear * sin) / height, shift[:, 1]], -1))  # fmt: skip
    grid = F.affine_grid(torch.stack(rows, 1) / 2, [n, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    strength = _uniform(0, 0.06, n, generator) * jitter
    bend = torch.randn(n, 2, 4, 4, generator=generator) * strength[:, None, None, None]
    bend = F.interpolate(bend, size=IMAGE_SIZE, mode="bicubic", align_corners=True)
    return grid + bend.permute(0, 2, 3, 1)


def _coarsen(coverage: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Reduce a share of the pictures [N, 1, 32, 32] to the resolution of an 8x8 or a 16x16 scanner."""
    chance = torch.rand(len(coverage), generator=generator)[:, None, None, None]
    for factor, above in ((2, 1 - share), (4, 1 - share / 2)):
        coarse = F.interpolate(F.avg_pool2d(coverage, factor), size=IMAGE_SIZE, mode="bilinear", align_corners=False)
        coverage = torch.where(chance > above, coarse, coverage)
    return coverage


def _shades(
    palette: dict[str, tuple[int, int, int]], index: Tensor, jitter: float, generator: torch.Generator
) -> Tensor:
    """A random shade of the colour of each index. [n, 3]"""
    return torch.tensor(list(palette.values()))[index] + _uniform(-15, 15, (len(index), 3), generator) * jitter


def render_glyphs(
    classes: Tensor,  # [N]
    fonts: Sequence[str] = TRAINING_FONTS,
    *,
    generator: torch.Generator,
    foregrounds: Tensor | None = None,  # [N]
    grounds: Tensor | None = None,  # [N]
    jitter: float = 1.0,
) -> Tensor:
    """Render one character per entry of `classes`, each with its own font, shape, stroke width, blur and noise.

    Args:
        classes: integers [N], indices into `CHARACTERS`.
        fonts: the fonts to draw from, each equally likely.
        generator: the only source of randomness; the same state gives the same pictures.
        foregrounds: integers [N], indices into `FOREGROUNDS`; drawn at random when absent.
        grounds: integers [N], indices into `GROUNDS`; drawn at random when absent.
        jitter: 0 renders the characters as their fonts have them, 1 with the full variation of the pretraining.

    Returns:
        uint8 [N, 3, 32, 32].
    """
    n = len(classes)
    fields = torch.stack([distance_fields(font) for font in fonts])  # [fonts, 36, 64, 64]
    field = fields[torch.randint(len(fonts), (n,), generator=generator), classes]  # [N, 64, 64]
    depth = F.grid_sample(field[:, None], _bent_grid(n, jitter, generator), padding_mode="border", align_corners=False)
    thickness = _uniform(-0.015, 0.07, n, generator) * jitter
    softness = 0.01 + _uniform(0, 0.03, n, generator) * jitter
    coverage = torch.sigmoid((depth + thickness[:, None, None, None]) / softness[:, None, None, None])  # [N, 1, 32, 32]
    coverage = _coarsen(coverage, 0.5 * jitter, generator)
    if foregrounds is None:
        foregrounds = torch.randint(len(FOREGROUNDS), (n,), generator=generator)
    if grounds is None:
        grounds = torch.randint(len(GROUNDS), (n,), generator=generator)
    front = _shades(FOREGROUNDS, foregrounds, jitter, generator)
    back = _shades(GROUNDS, grounds, jitter, generator)
    images = back[..., None, None] + coverage * (front - back)[..., None, None]  # [N, 3, 32, 32]
    images = images + torch.randn(images.shape, generator=generator) * (6 * jitter)
    return images.round().clamp(0, 255).to(torch.uint8)
