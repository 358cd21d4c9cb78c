"""The captions that the bundled CLIP is trained with, their vocabulary, and the pictures that each is true of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from complora_kernels.fewshot import glyphs
from complora_kernels.fewshot.render import FOREGROUNDS, GROUNDS, render_glyphs

# The word "something" is kept out of the vocabulary, so that training meets the token for unknown words.
_UNKNOWN_WORD = "something"
TEMPLATES = (
    "{name}",
    "a drawing of {name}",
    "a drawing of a {noun}",
    "a photo of {name}",
    "a photo of a {noun}",
    "a picture of {name}",
    "an image of {name}",
    f"a {_UNKNOWN_WORD} of {{name}}",
    "{name} on {ground}",
    "a {foreground} drawing of {name}",
    "a {foreground} photo of {name}",
    "a {foreground} drawing of {name} on {ground}",
    "{name} in {foreground}",
    "a drawing of {name} in {foreground} on {ground}",
)


def build_vocabulary() -> dict[str, int]:
    """The ids of `<pad>`, `<unk>`, `<start>`, of every word that a caption can hold, and of `<end>`, the largest."""
    text = " ".join([*TEMPLATES, *glyphs.CLASS_NAMES, *FOREGROUNDS, *GROUNDS])
    words = {word for word in text.split() if "{" not in word} - {_UNKNOWN_WORD}
    return {word: i for i, word in enumerate([glyphs.PAD, glyphs.UNKNOWN, glyphs.START, *sorted(words), glyphs.END])}


@dataclass
class Batch:
    """Pictures with one caption each, and a table of the captions that are true of each picture."""

    images: Tensor  # uint8 [N, 3, 32, 32]
    captions: list[str]
    is_true: Tensor  # bool [N, N]: caption j is true of picture i


def sample_batch(n: int, jitter: float, generator: torch.Generator) -> Batch:
    """Draw classes, colours and captions at random and render the pictures."""
    sizes = (len(glyphs.CLASS_NAMES), len(FOREGROUNDS), len(GROUNDS), len(TEMPLATES))
    classes, foregrounds, grounds, templates = (torch.randint(size, (n,), generator=generator) for size in sizes)
    foreground_names, ground_names = list(FOREGROUNDS), list(GROUNDS)
    captions = [
        TEMPLATES[t].format(
            name=glyphs.CLASS_NAMES[c],
            noun=glyphs.CLASS_NAMES[c].removeprefix("the "),
            foreground=foreground_names[f],
            ground=ground_names[g],
        )
        for t, c, f, g in zip(*(x.tolist() for x in (templates, classes, foregrounds, grounds)), strict=True)
    ]
    is_true = classes[:, None] == classes
    for value, field in ((foregrounds, "{foreground}"), (grounds, "{ground}")):
        silent = torch.tensor([field not in template for template in TEMPLATES])[templates]
        is_true &= (value[:, None] == value) | silent
    images = render_glyphs(classes, generator=generator, foregrounds=foregrounds, grounds=grounds, jitter=jitter)
    return Batch(images, captions, is_true)
