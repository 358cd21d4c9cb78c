"""A line of results, and the outcome of reading a damaged file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

RESULT = {
    "run": "lora-1shot-lr0.01-seed0",
    "data": "digits",
    "protocol": "few-shot",
    "method": "lora",
    "label": "lora",
    "options": {"preset": "glyphs"},
    "shots": 1,
    "learning_rate": 0.01,
    "seed": 0,
    "images": "0123456789ab",
    "zero_shot_new": 0.5,
    "zero_shot_kept": 0.75,
    "new": 0.625,
    "kept": 0.5,
    "val": None,
    "tasks": {"letters": [0.75, 0.5]},
    "interpolated": [{"share": 0.5, "new": 0.6, "kept": 0.7, "tasks": {"letters": [0.75, 0.7]}}],
    "relative_update": 0.1,
}


def outcome(read: Callable[[], Any]) -> tuple[Any, str]:
    """The value that was read, or None and the message of the error."""
    try:
        return read(), ""
    except (ValueError, OSError) as error:
        return None, str(error)
