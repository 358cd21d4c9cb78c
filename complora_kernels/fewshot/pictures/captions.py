"""The captions that the model is trained with, and the concepts that each is true of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from complora_kernels.fewshot.pictures.concepts import Concept

OF_NAMES = (
    "{name}",
    "a {name}",
    "the {name}",
    "a photo of a {name}.",
    "a photo of the {name}.",
    "a picture of a {name}",
    "an image of a {name}.",
    "an icon of the {name}",
    "a drawing of the {name}.",
    "a blurry photo of a {name}.",
    "a black and white photo of a {name}.",
    "{tag} {name}",
    "{name} {tag}",
    "a photo of a {name}, {tag}.",
)
OF_TAGS = ("{tag}", "a photo of a {tag}.", "a picture of something: {tag}", "a photo of {tag}, {tag2}.")
TAGGED = 0.25
"""The share of captions that name a picture by its tags alone."""


class Captions(NamedTuple):
    """One caption for each of T pictures."""

    texts: list[str]
    is_true: Tensor  # bool [N, T], [i, j]: whether caption j is true of picture i


class Captioner:
    """Draws captions. A tag is true of each concept that has it, or has it as a word of its name."""

    def __init__(self, concepts: Sequence[Concept]) -> None:
        self.concepts = tuple(concepts)
        tags = sorted({tag for concept in concepts for tag in concept.tags})
        self._numbers = numbers = {tag: number for number, tag in enumerate(tags)}
        self._tags = [[numbers[tag] for tag in concept.tags] for concept in concepts]
        self._words = tags
        self._has = torch.zeros(len(concepts), len(tags), dtype=torch.bool)  # [concepts, tags]
        for row, concept in enumerate(concepts):
            known = {*concept.tags, *concept.name.split()}
            self._has[row, [numbers[tag] for tag in known if tag in numbers]] = True

    def draw(self, pictures: Tensor, captioned: Tensor, generator: torch.Generator) -> Captions:
        """Captions of the concepts `captioned`, and of which of the concepts `pictures` they are true.

        Args:
            pictures: int64 [N], indices of concepts.
            captioned: int64 [T], indices of concepts.
            generator: the only source of randomness.
        """
        n = len(captioned)
        kinds = torch.rand(n, generator=generator)
        choices = torch.randint(2**31, (3, n), generator=generator)
        is_true = pictures[:, None] == captioned  # [N, T]
        texts = []
        for place, concept in enumerate(captioned.tolist()):
            first, second, template = choices[:, place].tolist()
            own = self._tags[concept]
            tag, tag2 = (own[choice % len(own)] if own else None for choice in (first, second))
            if tag is None or tag2 is None or kinds[place] >= TAGGED:
                name, words = self.concepts[concept].name, "" if tag is None else self._words[tag]
                form = OF_NAMES[template % len(OF_NAMES)]
                texts.append(" ".join(form.format(name=name, tag=words).split()))
                if name in self._numbers and "{tag}" not in form:  # "a banana" is true of the monkey that has one
                    is_true[:, place] |= self._has[:, self._numbers[name]][pictures]
                continue
            form = OF_TAGS[template % len(OF_TAGS)]
            texts.append(form.format(tag=self._words[tag], tag2=self._words[tag2]))
            true = self._has[:, tag] & self._has[:, tag2] if "{tag2}" in form else self._has[:, tag]
            is_true[:, place] |= true[pictures]
        return Captions(texts, is_true)

    def corpus(self) -> list[str]:
        """Every name and every tag of each concept, in the templates by turns, for the tokenizer."""
        names = [OF_NAMES[i % len(OF_NAMES)].format(name=c.name, tag="") for i, c in enumerate(self.concepts)]
        tags = [tag for concept in self.concepts for tag in concept.tags]
        return [*names, *(OF_TAGS[i % len(OF_TAGS)].format(tag=tag, tag2="") for i, tag in enumerate(tags))]
