"""Four emoji in seven icon families, the unseen one with outlines, in the layout of the npm packages."""

from __future__ import annotations

import json
from pathlib import Path

from complora_kernels.fewshot.pictures.families import SEEN, UNSEEN

SHAPES = {  # by icon name
    "red-heart": '<path fill="#d22" d="M0 0h4l4 8 4-8h4l-8 16z"/>',
    "dog-face": '<path fill="#842" d="M2 2h12v12H2z"/>',
    "jeans": '<path fill="#22a" d="M4 0h8v16h-3V5H7v11H4z"/>',
    "t-shirt": '<path fill="#2a2" d="M0 2h16v4h-4v9H4V6H0z"/>',
}
EMOJI = [
    {"label": "t-shirt", "hexcode": "1F455", "tags": ["shirt", "clothes", "tshirt"], "group": 7},
    {"label": "dog face", "hexcode": "1F436", "tags": ["animal", "dog", "pet"], "group": 3},
    {"label": "jeans", "hexcode": "1F456", "tags": ["clothes", "trousers"], "group": 7},
    {"label": "red heart", "hexcode": "2764-FE0F", "tags": ["love"], "group": 0},
    {"label": "light skin tone", "hexcode": "1F3FB", "tags": [], "group": 2},
    {"label": "regional indicator A", "hexcode": "1F1E6"},
]
CODES = {"1f455": "t-shirt", "1f436": "dog-face", "1f456": "jeans", "2764": "red-heart"}


def write_icons(sources: Path) -> Path:
    """Write the packages. One family lists code points; the others are known by the names of their icons."""
    names = sources / "emojibase-data" / "en"
    names.mkdir(parents=True)
    (names / "data.json").write_text(json.dumps(EMOJI))
    for number, family in enumerate((*SEEN, UNSEEN)):
        folder = sources / "@iconify-json" / family
        folder.mkdir(parents=True)
        outline = 'stroke="#0ff" stroke-width="3" ' if family == UNSEEN else ""
        icons = {name: {"body": body.replace("fill", f"{outline}fill")} for name, body in SHAPES.items()}
        (folder / "icons.json").write_text(json.dumps({"icons": icons, "width": 16, "height": 16}))
        (folder / "chars.json").write_text(json.dumps({} if number else CODES))
    return sources


def change(sources: Path, family: str, name: str, **data: object) -> None:
    """Change what a family's file says of an icon."""
    path = sources / "@iconify-json" / family / "icons.json"
    content = json.loads(path.read_text())
    content["icons"][name] |= data
    path.write_text(json.dumps(content))
