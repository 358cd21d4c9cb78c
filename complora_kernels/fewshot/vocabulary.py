"""The vocabulary of a run: general names, disjoint from the classes that it learns and from those measured as kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from complora_kernels.common.files import reading
from complora_kernels.fewshot.config import GLYPHS, TrainConfig
from complora_kernels.fewshot.datasets.dataset import as_clip_reads, enumerated
from complora_kernels.fewshot.glyphs import ASSETS
from complora_kernels.fewshot.render import FOREGROUNDS, GROUNDS
from complora_kernels.fewshot.templates import prompts, training_template
from complora_kernels.fewshot.tokens import Tokenizer, check_told_apart

# Common nouns and a few verbs; none is a digit, or a class of ImageNet or Fashion-MNIST. With the default template each
# is 8 tokens for CLIP, the length to which texts are truncated.
PACKAGED = ASSETS / "vocabulary.txt"


def vocabulary_of(config: TrainConfig, class_names: Iterable[str]) -> tuple[str, ...]:
    """The names to which a run keeps the similarities of its images.

    Args:
        config: tells the file; None: the packaged names, without those that share a word with a class, as "apple" and
            "red apple" do: to keep them would be to keep the class.
        class_names: all classes that are learned or measured as kept.

    Raises:
        ValueError: the file has fewer than two names, a name twice, or one of a class. Names are the same that differ
            in case, blanks and underscores alone, which CLIP does not tell apart.
        OSError: the file cannot be read.
    """
    classes = set(map(as_clip_reads, class_names))
    if config.vocabulary is None:
        names = (*FOREGROUNDS, *GROUNDS) if config.model == GLYPHS else _read(PACKAGED)
        words = {word for name in classes for word in _words(name)}
        return tuple(name for name in names if words.isdisjoint(_words(as_clip_reads(name))))
    option, names = f"--vocabulary {config.vocabulary}", _read(Path(config.vocabulary))
    if taken := [name for name in names if as_clip_reads(name) in classes]:
        raise ValueError(
            f"{option}: {enumerated(taken)} {_are(taken)} learned, or measured as kept: expected names of other things"
        )
    read = list(map(as_clip_reads, names))
    if twice := [name for i, name in enumerate(names) if read[i] in read[:i]]:
        raise ValueError(f"{option}: {enumerated(twice)} {_are(twice)} there twice, expected every name once")
    if len(names) < 2:
        raise ValueError(f"{option}: expected at least 2 names, one a line, not {len(names)}")
    return names


def vocabulary_prompts(config: TrainConfig, names: Sequence[str]) -> list[str]:
    """The prompts of names, by the template of a data set that has none of its own."""
    return prompts(training_template(config.template, ""), names)


def check_vocabulary(config: TrainConfig, class_names: Sequence[str], tokenize: Tokenizer) -> None:
    """Raise what `vocabulary_of` does, and a ValueError where the model does not tell names apart, or from classes."""
    names = vocabulary_of(config, class_names)
    source = "--vocabulary" if config.vocabulary is None else f"--vocabulary {config.vocabulary}"
    template = training_template(config.template, "")
    check_told_apart(source, names, [template], template, tokenize, called="names")
    classes = list(dict.fromkeys(class_names))
    tokens = tokenize(vocabulary_prompts(config, [*names, *classes])).tolist()
    of_classes = {tuple(row): name for name, row in zip(classes, tokens[len(names) :], strict=True)}
    for name, row in zip(names, tokens, strict=False):
        if tuple(row) in of_classes:
            raise ValueError(
                f"{source}: the model's tokenizer does not tell {name!r} from the class {of_classes[tuple(row)]!r}, "
                "expected names of other things"
            )


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", name)


def _read(path: Path) -> tuple[str, ...]:
    """The names in a file, one a line, without blank lines."""
    with reading(path, "a text file in UTF-8 with one name a line"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
