"""Reads and checks the outcomes of a folder's runs: the lines of results.jsonl and failures.jsonl."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from complora_kernels.fewshot.files import read_json_lines

RESULTS = "results.jsonl"
FAILURES = "failures.jsonl"


def results_of(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of a folder's results.jsonl; there are none where the file is missing.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is damaged, or is no result; the message names the file and the line.
    """
    return read_json_lines(folder / RESULTS, _check_result)


def failures_of(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of a folder's failures.jsonl, with the errors of `results_of`."""
    return read_json_lines(folder / FAILURES, lambda line: _check(line, {"run": _is_text, "error": _is_text}))


def _check_result(line: Mapping[str, Any]) -> None:
    """Check every field that is read later, because a person may have written the line."""
    _check(line, _RESULT, _OPTIONAL)
    parts = [line, *(line.get("interpolated") or [])]
    for part in parts:
        _check(part, _MEASURED, _OPTIONALLY_MEASURED)
        if ("tasks" in part) != ("tasks" in line) or (part["kept"] is None) != (line["zero_shot_kept"] is None):
            raise ValueError("it lacks an accuracy of the retained tasks before or after training")
    for part in parts[1:]:
        _check(part, {"share": _is_share})


def _check(line: Mapping[str, Any], fields: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> None:
    present = {name: check for name, check in (optional or {}).items() if name in line}
    for name, is_valid in {**fields, **present}.items():
        if not is_valid(line[name]):
            raise ValueError(f"{name} is {str(line[name])[:80]}")


Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_tasks(value: Any) -> bool:  # by task: the accuracies before and after training
    return isinstance(value, dict) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_share, pair)) for pair in value.values()
    )


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


_RESULT: dict[str, Check] = {
    "run": _is_text,
    "method": _is_text,
    "shots": lambda value: _is_count(value) and value > 0,
    "learning_rate": _or_none(lambda value: _is_number(value) and value > 0),
    "seed": _is_count,
    "zero_shot_new": _is_share,
    "zero_shot_kept": _or_none(_is_share),
}
_OPTIONAL: dict[str, Check] = {
    **dict.fromkeys(("data", "label", "protocol"), _is_text),
    "images": _or_none(_is_text),
    "options": _or_none(lambda value: isinstance(value, dict)),
    "relative_update": _or_none(_is_number),
    "interpolated": _or_none(lambda value: isinstance(value, list) and all(isinstance(part, dict) for part in value)),
}
_MEASURED: dict[str, Check] = {"new": _is_share, "kept": _or_none(_is_share)}
_OPTIONALLY_MEASURED: dict[str, Check] = {"val": _or_none(_is_share), "tasks": _is_tasks}
