"""Everything that the model is trained and measured on: rendered icons and characters, by concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from complora_kernels.fewshot.pictures.concepts import Concept, read_concepts
from complora_kernels.fewshot.pictures.families import RENDERED, SEEN, UNSEEN, Failure, Family, read_families
from complora_kernels.fewshot.render import CHARACTERS, TRAINING_FONTS, distance_fields

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SIDED = {"left", "right", "waxing", "waning", "quarter"}  # words of names: moons, hands, magnifying glasses
_THICKNESSES = (0.0, 0.04)  # added to the distance to the edge, as a share of a character's longer side


@dataclass(frozen=True)
class Pictures:
    """P pictures, and which concept each of them shows."""

    concepts: tuple[Concept, ...]  # C of them
    pixels: Tensor  # uint8 [P, 4, 64, 64]
    shown: Tensor  # int64 [P], indices of concepts
    mirrors: Tensor  # bool [P]: whether a mirror image shows the same

    def by_concept(self) -> list[Tensor]:
        """The indices of the pictures of each concept."""
        order = self.shown.argsort(stable=True)
        counts = torch.bincount(self.shown, minlength=len(self.concepts))
        return list(order.split(counts.tolist()))


@dataclass(frozen=True)
class Sources:
    """What `complora pretrain-pictures` reads."""

    seen: Pictures  # of the families that it trains on, and of characters
    unseen: Pictures  # of the family that it does not; the same concepts
    failures: tuple[Failure, ...]
    counts: dict[str, int]  # pictures by family


def read_sources(folder: Path) -> Sources:
    """Render all families and the characters.

    Raises:
        FileNotFoundError: a package is missing.
        ValueError: a file of a package is damaged.
    """
    concepts = read_concepts(folder)
    families = {family.name: family for family in read_families(folder, concepts, (*SEEN, UNSEEN))}
    drawn = {code for name in SEEN for code in families[name].codes}
    known = tuple(concept for concept in concepts if concept.code in drawn)
    everything = (*known, *character_concepts())
    icons = [_pictures(everything, families[name]) for name in SEEN]
    failures = tuple(failure for family in families.values() for failure in family.failures)
    counts = {name: len(family.codes) for name, family in families.items()}
    return Sources(
        _together([*icons, characters(everything)]), _pictures(everything, families[UNSEEN]), failures, counts
    )


def character_concepts() -> tuple[Concept, ...]:
    """The ten digits and the 26 letters."""
    names = [f"digit {digit}" for digit in DIGITS] + [f"letter {letter}" for letter in CHARACTERS[10:].lower()]
    kinds = [("number", "numeral")] * 10 + [("alphabet", "character")] * 26
    return tuple(
        Concept(f"character-{character.lower()}", name, tags, "characters")
        for character, name, tags in zip(CHARACTERS, names, kinds, strict=True)
    )


def characters(concepts: Sequence[Concept]) -> Pictures:
    """The characters of the fonts that the models are trained on, white, in two thicknesses."""
    fields = torch.stack([distance_fields(font) for font in TRAINING_FONTS])  # [fonts, 36, 64, 64]
    thicker = torch.stack([fields + more for more in _THICKNESSES]).flatten(0, 1)  # [2 fonts, 36, 64, 64]
    edge = 2 / RENDERED  # of a pixel's width, so that outlines are smooth
    margin = fields.shape[-1] // 8  # the character fills half of its field
    inner = thicker[..., margin:-margin, margin:-margin]
    inner = F.interpolate(inner, size=(RENDERED, RENDERED), mode="bilinear", align_corners=False)
    opacity = (torch.sigmoid(inner / edge * 2) * 255).round().to(torch.uint8)
    pixels = torch.full((*opacity.shape[:2], 4, RENDERED, RENDERED), 255, dtype=torch.uint8)
    pixels[:, :, 3] = opacity
    codes = [concept.code for concept in concepts]
    first = codes.index(f"character-{CHARACTERS[0].lower()}")
    shown = torch.arange(first, first + len(CHARACTERS)).repeat(len(pixels))
    return Pictures(tuple(concepts), pixels.flatten(0, 1), shown, torch.zeros(len(shown), dtype=torch.bool))


def _pictures(concepts: tuple[Concept, ...], family: Family) -> Pictures:
    numbers = {concept.code: number for number, concept in enumerate(concepts)}
    kept = [place for place, code in enumerate(family.codes) if code in numbers]
    shown = torch.tensor([numbers[family.codes[place]] for place in kept], dtype=torch.long)
    mirrors = torch.tensor([_can_be_mirrored(concepts[number]) for number in shown.tolist()])
    return Pictures(concepts, family.pictures[kept], shown, mirrors.bool())


def _can_be_mirrored(concept: Concept) -> bool:
    """Whether a mirror image shows the same: not of signs and flags, nor of what a side tells apart."""
    return concept.group not in ("symbols", "flags") and not _SIDED & set(concept.name.split())


def _together(parts: Sequence[Pictures]) -> Pictures:
    pixels, shown, mirrors = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("pixels", "shown", "mirrors")
    )
    return Pictures(parts[0].concepts, pixels, shown, mirrors)
