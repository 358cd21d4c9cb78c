"""Checks that a model can tell classes apart by the tokens of their prompts."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence

from torch import Tensor

from complora_kernels.fewshot.datasets.dataset import enumerated
from complora_kernels.fewshot.escapes import visible
from complora_kernels.fewshot.templates import prompts

logger = logging.getLogger("complora_kernels")

Tokenizer = Callable[..., Tensor]  # N texts -> int64 [N, L]


def check_told_apart(
    source: str,
    class_names: Sequence[str],
    templates: Sequence[str],
    training_template: str,
    tokenize: Tokenizer,
    *,
    called: str = "classes",
) -> None:
    """Raise a ValueError where the prompts of two classes are the same tokens.

    They have to differ in `training_template`, because a step compares images with its features alone, and in at least
    one of `templates`, because images are classified by the mean of their features. Classes with the same name, as
    ImageNet has them, are no error.

    Args:
        source: the data set, for the message.
        class_names: names of the classes.
        templates: the templates for classification.
        training_template: the template for training.
        tokenize: the tokenizer of the model.
        called: a word for the classes, for the message.
    """
    for used in ([training_template], templates):
        names = _alike(class_names, used, tokenize)
        if names:
            raise ValueError(
                f"{source}: the model's tokenizer does not tell the {called} {enumerated(names)} apart: their prompts, "
                f"such as {prompts(used[0], names[:1])[0]!r}, are the same tokens; {_reason(names, used, tokenize)}"
            )


def warn_of_truncation(
    source: str, class_names: Sequence[str], templates: Sequence[str], training_template: str, tokenize: Tokenizer
) -> None:
    """Log one warning that names the classes whose prompts are truncated because they are longer than the model reads.

    Among several templates, only the longest is checked. The arguments are those of `check_told_apart`.
    """
    used = dict.fromkeys([training_template, max(templates, key=len)])
    by_template = [_are_truncated(prompts(template, class_names), tokenize) for template in used]
    truncated = [name for name, *of_name in zip(class_names, *by_template, strict=True) if any(of_name)]
    if truncated:
        length = tokenize([""]).shape[1]
        logger.warning(
            f"{visible(source)}: the prompts of {enumerated(truncated)} are longer than the {length} tokens that "
            "the model reads; they are truncated"
        )


def _alike(class_names: Sequence[str], templates: Sequence[str], tokenize: Tokenizer) -> list[str]:
    """The names of the first group of classes that are the same tokens in every template, if there is one."""
    groups = [list(dict.fromkeys(class_names))]
    for template in templates:
        finer: list[list[str]] = []
        for names in groups:
            members: dict[tuple[int, ...], list[str]] = {}
            for name, row in zip(names, tokenize(prompts(template, names)).tolist(), strict=True):
                members.setdefault(tuple(row), []).append(name)
            finer += [group for group in members.values() if len(group) > 1]
        groups = finer
    return groups[0] if groups else []


def _reason(names: Sequence[str], templates: Sequence[str], tokenize: Tokenizer) -> str:
    unknown_words = getattr(tokenize, "unknown_words", None)
    unknown = [] if unknown_words is None else list(dict.fromkeys(unknown_words(" ".join(prompts("{}", names)))))
    if unknown:
        return (
            f"it does not know {enumerated(unknown)}, expected a model that does, such as "
            "--model ViT-B-16-quickgelu --pretrained openai"
        )
    if all(_are_truncated([text for template in templates for text in prompts(template, names)], tokenize)):
        return (
            f"they are truncated after {tokenize(['']).shape[1]} tokens, before they differ; expected shorter names, "
            "or a shorter template"
        )
    return "expected names that differ in more than it ignores, such as case, blanks and forms of a character"


def _are_truncated(texts: list[str], tokenize: Tokenizer) -> list[bool]:
    """Whether each text is longer than the context of a tokenizer that truncates, as open_clip's do."""
    if "context_length" not in inspect.signature(tokenize).parameters:
        return [False] * len(texts)
    tokens = tokenize(texts)  # [N, L]
    longer = tokenize(texts, context_length=tokens.shape[1] + 1)
    padding = tokenize([""])[0, -1]
    return ((longer[:, :-1] != tokens).any(1) | (longer[:, -1] != padding)).tolist()
