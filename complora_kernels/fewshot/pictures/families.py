"""The icon families: SVG pictures of the concepts in Iconify's sets, rendered to pixels by resvg.

Each family is an npm package, `@iconify-json/NAME`, in the folder of sources.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from complora_kernels.common.files import reading
from complora_kernels.fewshot.pictures.concepts import Concept, code_of, unicode_name

ICONIFY = "@iconify-json"
SEEN = ("noto", "fluent-emoji", "fluent-emoji-flat", "twemoji", "emojione", "fxemoji")
UNSEEN = "noto-v1"
"""The family that no model is trained on: what is kept is measured on it."""

RENDERED = 64
"""Height and width of a rendered picture, in pixels."""


class Failure(NamedTuple):
    """An icon that is not used, and why."""

    family: str
    icon: str
    reason: str


class Family(NamedTuple):
    """The pictures of one family."""

    name: str
    codes: tuple[str, ...]  # N of `Concept.code`, in the order of the concepts
    pictures: Tensor  # uint8 [N, 4, 64, 64]: red, green, blue, opacity
    failures: tuple[Failure, ...]


def check_sources(sources: Path, families: Sequence[str]) -> None:
    """Raise a FileNotFoundError that names the npm packages of icons that are missing."""
    missing = [f"{ICONIFY}/{name}" for name in families if not _file(sources, name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{sources}: {', '.join(missing)} not found, expected npm packages, such as `npm install` puts into "
            "node_modules"
        )


def read_family(sources: Path, name: str, concepts: Sequence[Concept], names: Mapping[str, str]) -> Family:
    """Render one family.

    An icon that does not render is named among the failures, and the rest goes on.

    Args:
        sources: the folder of npm packages.
        name: the family, such as "noto".
        concepts: the concepts to look for.
        names: codes by icon name, as `icon_names` collects them, for families that list no code points.
    """
    with reading(_file(sources, name), "a set of icons of Iconify"):
        icons = json.loads(_file(sources, name).read_bytes())
        found = _icons_by_code(icons, concepts, {**names, **_listed(sources, name)})
    codes, pictures, failures = [], [], []
    for concept in concepts:
        if concept.code in found:
            try:
                pictures.append(_render(icons, found[concept.code]))
                codes.append(concept.code)
            except Exception as error:  # whatever the file says of an icon, the others go on
                failures.append(Failure(name, found[concept.code], f"{type(error).__name__}: {error}"))
    shape = (0, 4, RENDERED, RENDERED)
    stacked = torch.stack(pictures) if pictures else torch.empty(shape, dtype=torch.uint8)
    return Family(name, tuple(codes), stacked, tuple(failures))


def icon_names(sources: Path, families: Sequence[str]) -> dict[str, str]:
    """The codes of icons by their names, from the families that list them."""
    return {icon: code for name in families for icon, code in _listed(sources, name).items()}


def _file(sources: Path, name: str) -> Path:
    return sources / ICONIFY / name / "icons.json"


def _listed(sources: Path, name: str) -> dict[str, str]:
    path = _file(sources, name).with_name("chars.json")
    if not path.is_file():
        return {}
    with reading(path, "the code points of a set of icons of Iconify"):
        return {icon: code_of(code) for code, icon in json.loads(path.read_bytes()).items()}


def _icons_by_code(icons: Mapping[str, Any], concepts: Sequence[Concept], names: Mapping[str, str]) -> dict[str, str]:
    """The icon of each code. A name that says a code is believed before one that only sounds like a concept's."""
    there = [*icons["icons"], *icons.get("aliases", {})]
    squeezed = {
        _squeeze(name): concept.code for concept in concepts for name in (unicode_name(concept.code), concept.name)
    }
    squeezed.pop("", None)
    found: dict[str, str] = {}
    for icon in there:
        if icon in names:
            found.setdefault(names[icon], icon)
    for icon in there:
        if icon not in names and _squeeze(icon) in squeezed:
            found.setdefault(squeezed[_squeeze(icon)], icon)
    return found


def _squeeze(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _render(icons: Mapping[str, Any], icon: str) -> Tensor:  # uint8 [4, 64, 64]
    import resvg_py
    from PIL import Image

    data = dict(icons["aliases"][icon]) if icon not in icons["icons"] else icons["icons"][icon]
    if "parent" in data:
        data = {**icons["icons"][data["parent"]], **data}
    left, top = data.get("left", icons.get("left", 0)), data.get("top", icons.get("top", 0))
    width, height = data.get("width", icons.get("width", 16)), data.get("height", icons.get("height", 16))
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {namespaces} viewBox="{left} {top} {width} {height}">{data["body"]}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDERED, height=RENDERED, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    square = Image.new("RGBA", (RENDERED, RENDERED))  # a picture that is wider than high lies in the middle
    square.paste(image, ((RENDERED - image.width) // 2, (RENDERED - image.height) // 2))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()
    if not pixels[3].any():
        raise ValueError("nothing is drawn")
    mirrored = [dim for dim, name in ((2, "hFlip"), (1, "vFlip")) if data.get(name)]
    return torch.rot90(pixels.flip(mirrored), -data.get("rotate", 0), (1, 2)).contiguous()


def read_families(sources: Path, concepts: Sequence[Concept], families: Sequence[str]) -> Iterator[Family]:
    """Render the families one after the other."""
    names = icon_names(sources, families)
    for name in families:
        yield read_family(sources, name, concepts, names)
