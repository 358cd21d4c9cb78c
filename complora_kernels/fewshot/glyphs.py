"""The bundled small CLIP and its classes: digits and capital letters, bright on a dark ground.

`load_glyph_clip` returns a standard open_clip model with its tokenizer and its preprocessing. `render.py` beside this
file draws the pictures, and `pretrain.py` trained the weights, from random ones, on those pictures alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import load_file
from torch import Tensor

from complora_kernels.fewshot.render import HELD_OUT_FONTS, IMAGE_SIZE, render_glyphs

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = tuple(f"the letter {letter}" for letter in "abcdefghijklmnopqrstuvwxyz")
CLASS_NAMES = tuple(f"the digit {digit}" for digit in DIGITS) + LETTERS

ASSETS = Path(__file__).resolve().parent.parent / "assets"
WEIGHTS_FILE = "glyph_clip.safetensors"
CONFIG_FILE = "glyph_clip.json"
VOCABULARY_FILE = "glyph_vocabulary.json"

PAD, UNKNOWN, START, END = "<pad>", "<unk>", "<start>", "<end>"
MEAN = (0.25, 0.25, 0.25)
STD = (0.25, 0.25, 0.25)

_TEST_SEED = 2501_15040
_IMAGES_PER_CLASS = 20


class GlyphTokenizer:
    """One token per word, lower-cased, punctuation dropped; words outside the vocabulary become `<unk>`.

    Args:
        vocabulary: word -> id, the ids 0 to n-1. `<pad>` is 0; `<end>` is the largest, where open_clip pools.
        context_length: tokens per text, `<start>` and `<end>` included.
    """

    def __init__(self, vocabulary: Mapping[str, int], context_length: int = 16) -> None:
        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            raise ValueError(f"vocabulary: expected the ids 0 to {len(vocabulary) - 1}, each once")
        last = len(vocabulary) - 1
        if vocabulary.get(PAD) != 0 or vocabulary.get(END) != last or not {UNKNOWN, START} <= set(vocabulary):
            raise ValueError(f"vocabulary: expected {PAD} = 0, {END} = {last}, and entries for {UNKNOWN} and {START}")
        self.vocabulary = dict(vocabulary)
        self.context_length = context_length

    def encode(self, text: str) -> list[int]:
        """The ids of one text, from `<start>` to `<end>`, without padding."""
        unknown = self.vocabulary[UNKNOWN]
        words = [self.vocabulary.get(word, unknown) for word in _words(text)]
        return [self.vocabulary[START], *words, self.vocabulary[END]]

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that become `<unk>`, in the order of the text."""
        return [word for word in _words(text) if word not in self.vocabulary]

    def __call__(self, texts: str | list[str]) -> Tensor:
        """Tokenize one text or several.

        Returns:
            int64 [N, context_length], padded with zeros.

        Raises:
            ValueError: a text has more words than fit. It is not truncated, because the class name often comes last.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            ids = self.encode(text)
            if len(ids) > self.context_length:
                most = self.context_length - 2
                raise ValueError(f"texts: {text!r} has {len(ids) - 2} words, expected at most {most}")
            row[: len(ids)] = torch.tensor(ids)
        return tokens


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def preprocess(images: Tensor) -> Tensor:
    """Resize to 32x32 where needed, scale to [0, 1] and normalise.

    Args:
        images: uint8 [N, 3, H, W].

    Returns:
        float32 [N, 3, 32, 32], on the images' device.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: {images.dtype} {list(images.shape)}, expected uint8 [N, 3, H, W]")
    pixels = images.float() / 255
    if pixels.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
        pixels = F.interpolate(pixels, size=IMAGE_SIZE, mode="bilinear", align_corners=False, antialias=True)
    return normalize(pixels)


def normalize(
    pixels: Tensor,  # float32 [N, 3, 32, 32], in [0, 1]
) -> Tensor:  # float32 [N, 3, 32, 32]
    """Subtract the mean of the model's pictures and divide by their deviation."""
    return (pixels - pixels.new_tensor(MEAN)[:, None, None]) / pixels.new_tensor(STD)[:, None, None]


def build_clip(model_config: Mapping[str, Any], seed: int = 0) -> CLIP:
    """Make an open_clip CLIP with random weights; torch's global random state stays unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(**model_config)


def load_glyph_clip(
    device: str | torch.device = "cpu", folder: Path = ASSETS
) -> tuple[CLIP, GlyphTokenizer, Callable[[Tensor], Tensor]]:
    """Load the bundled model, or a model that `pretrain` wrote into another folder.

    Returns:
        The model in eval mode and float32, its tokenizer, and its preprocessing, `preprocess`.
    """
    tokenizer = load_glyph_tokenizer(folder)
    model = build_clip(json.loads((folder / CONFIG_FILE).read_text())["model_cfg"])
    weights = load_file(folder / WEIGHTS_FILE)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model.to(device).eval(), tokenizer, preprocess


def load_glyph_tokenizer(folder: Path = ASSETS) -> GlyphTokenizer:
    """Load the tokenizer of the model in a folder."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    vocabulary = json.loads((folder / VOCABULARY_FILE).read_text())
    return GlyphTokenizer(vocabulary, config["model_cfg"]["text_cfg"]["context_length"])


def held_out_test_set() -> tuple[Tensor, Tensor]:
    """Render all 36 classes in fonts that the model has never seen, with half the variation of the pretraining.

    The pictures are the same at every call.

    Returns:
        images uint8 [720, 3, 32, 32] and labels int64 [720], indices into `CLASS_NAMES`, 20 a class.
    """
    labels = torch.arange(len(CLASS_NAMES)).repeat_interleave(_IMAGES_PER_CLASS)
    generator = torch.Generator().manual_seed(_TEST_SEED)
    return render_glyphs(labels, HELD_OUT_FONTS, generator=generator, jitter=0.5), labels


def letter_test_set() -> tuple[Tensor, Tensor]:
    """The retention set: the 26 letters of `held_out_test_set`.

    Returns:
        images uint8 [520, 3, 32, 32] and labels int64 [520], indices into `LETTERS`, 20 a letter.
    """
    images, labels = held_out_test_set()
    letters = labels >= len(DIGITS)
    return images[letters], labels[letters] - len(DIGITS)


@torch.no_grad()
def zero_shot_accuracy(
    model: CLIP,
    tokenizer: Callable[[list[str]], Tensor],
    images: Tensor,  # [N, 3, H, W]
    labels: Tensor,  # [N]
    class_names: tuple[str, ...],
    template: str = "a drawing of {}.",
) -> float:
    """The share of the pictures whose nearest caption is their own; `template` gives the caption of a class name."""
    device = model.logit_scale.device
    captions = model.encode_text(tokenizer([template.format(name) for name in class_names]).to(device), normalize=True)
    chunks = [model.encode_image(preprocess(chunk).to(device), normalize=True) for chunk in images.split(256)]
    features = torch.cat(chunks)  # [N, D]
    return ((features @ captions.T).argmax(-1).cpu() == labels).float().mean().item()
