"""From class names to the prompts that a CLIP compares an image with."""

from __future__ import annotations

from collections.abc import Iterable


def prompts(template: str, class_names: Iterable[str]) -> list[str]:
    """`template` with its one `{}` replaced by each class name in turn.

    Raises:
        ValueError: the template does not hold exactly one `{}`.
    """
    if template.count("{}") != 1:
        raise ValueError(f"template={template!r}: expected one {{}} for the class name")
    return [template.replace("{}", name) for name in class_names]
