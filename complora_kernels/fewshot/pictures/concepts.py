"""What the pictures show: the names, tags and groups of emoji, as `emojibase-data` lists them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from complora_kernels.common.files import reading

EMOJIBASE = "emojibase-data"  # the npm package
NAMES_FILE = Path(EMOJIBASE, "en", "data.json")

# emojibase's numbers of the groups. Components (2), such as skin tones, are no pictures of their own.
GROUPS = {
    0: "smileys",
    1: "people",
    3: "animals",
    4: "food",
    5: "travel",
    6: "activities",
    7: "objects",
    8: "symbols",
    9: "flags",
}


class Concept(NamedTuple):
    """An emoji without its skin tones."""

    code: str  # its code points in lower-case hexadecimal, without variation selectors: "1f481-200d-2640"
    name: str  # in English, lower-case: "woman tipping hand"
    tags: tuple[str, ...]  # more words for it, none of them in its name
    group: str  # one of GROUPS


def read_concepts(sources: Path) -> list[Concept]:
    """The concepts of emojibase in the order of their code points.

    Raises:
        FileNotFoundError: the package is not in the folder `sources`.
        ValueError: its file holds something else.
    """
    path = sources / NAMES_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the npm package {EMOJIBASE} in the folder {sources}")
    with reading(path, "emojibase's list of emoji"):
        entries = json.loads(path.read_bytes())
        return sorted(_concept(entry) for entry in entries if entry.get("group") in GROUPS)


def _concept(entry: Mapping[str, Any]) -> Concept:
    name = plain(entry["label"])
    tags = dict.fromkeys(plain(tag) for tag in entry.get("tags", ()))
    words = set(name.split())
    return Concept(
        code_of(entry["hexcode"]), name, tuple(tag for tag in tags if tag not in words), GROUPS[entry["group"]]
    )


def plain(text: str) -> str:
    """Lower-case words with single blanks; typographic apostrophes and colons are left out."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "").replace("'", "")
    return " ".join(text.replace(":", " ").replace(",", " ").replace("“", "").replace("”", "").split())


def code_of(hexcode: str) -> str:
    """Code points as `Concept.code` has them."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def unicode_name(code: str) -> str:
    """Unicode's own name of a single code point, lower-case, or nothing."""
    return "" if "-" in code else unicodedata.name(chr(int(code, 16)), "").lower()
