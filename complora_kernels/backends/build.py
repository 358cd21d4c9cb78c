"""Which halves of the C++/CUDA extension were built, and whether they load. Building is left to `setup.py`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Literal, NamedTuple

PACKAGE = Path(__file__).parents[1]
RECORD = PACKAGE / "_build.json"
SOURCES = PACKAGE.parent / "csrc"  # a checkout has them; beside an installed package are none, or somebody else's
MODULES = {"cpu": "complora_kernels._C", "cuda": "complora_kernels._C_cuda"}


class Build(NamedTuple):
    """The record that `setup.py` wrote beside the modules."""

    version: str  # the version of the package
    halves: list[str]  # "cpu", "cuda", both or none
    reason: str  # why these halves
    sizes: dict[str, int]  # the sizes of the modules, in bytes
    details: dict[str, str]  # torch, compiler, cuda, chips


@functools.lru_cache
def failure(half: Literal["cpu", "cuda"]) -> str | None:
    """Loads a half of the extension when first asked. Returns None, or why it cannot be used here."""
    import torch

    if half == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA GPU"
    return _load(half)


@functools.lru_cache
def chip_refusal(capability: tuple[int, int]) -> str | None:
    """Why the build does not run on a GPU of this compute capability, or None where it does."""
    build = _read_record()
    chips = "" if isinstance(build, str) else build.details.get("chips", "")
    for major, minor, variant, ptx in re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", chips):
        chip = (int(major), int(minor))
        if capability == chip or (variant != "a" and capability[0] == chip[0] and capability >= chip):
            return None
        if ptx and not variant and capability >= chip:  # the driver compiles it
            return None
    return (
        f"the GPU has compute capability {capability[0]}.{capability[1]}, the extension was built for {chips or 'none'}"
    )


@functools.lru_cache
def _load(half: str) -> str | None:
    if half == "cuda" and (reason := _load("cpu")) is not None:  # the half for the CPU has the schemas
        return reason
    reason = _unbuilt(half)
    if reason is not None:
        return reason
    import torch  # noqa: F401  loads the libraries that the modules are linked to

    try:
        importlib.import_module(MODULES[half])
        importlib.import_module("complora_kernels.backends.fakes")
    except Exception as error:  # the file is damaged, or this torch or machine lacks a library
        return f"it does not load: {_one_line(error)}"
    return None


def _unbuilt(half: str) -> str | None:
    """Why there is no module to load that fits this package, or None where there is."""
    from complora_kernels import __version__

    build = _read_record()
    if isinstance(build, str):
        return build
    if half not in build.halves:
        return f"it was not built: {build.reason}"
    if build.version != __version__:
        return f"it was built for version {build.version}, this is {__version__}: install again"
    spec = importlib.util.find_spec(MODULES[half])
    if spec is None or spec.origin is None:
        return f"{MODULES[half]} is missing: install again"
    built = Path(spec.origin).stat()
    if built.st_size != build.sizes.get(half):  # loading a truncated file would kill the process
        return f"{spec.origin} has {built.st_size} bytes, expected {build.sizes.get(half)}: install again"
    ours = SOURCES.glob("*") if (SOURCES / "registration.cpp").exists() else ()
    newer = sorted(path.name for path in ours if path.stat().st_mtime > built.st_mtime)
    return f"csrc/{newer[0]} is newer than what was built: `make extension`" if newer else None


def _read_record() -> Build | str:
    """The record, or why there is none."""
    try:
        details = json.loads(RECORD.read_text())
        return Build(
            details.pop("version"),
            list(details.pop("halves")),
            details.pop("reason"),
            dict(details.pop("sizes")),
            details,
        )
    except FileNotFoundError:
        return f"there is no {RECORD.name}, the record of a build: `pip install`, or `make extension` in a checkout"
    except Exception as error:
        return f"{RECORD} is damaged: {_one_line(error)}: install again"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())


def describe() -> list[str]:
    """Lines for people: which halves were built, why, by which compilers, and whether each loads."""
    build = _read_record()
    if isinstance(build, str):
        return [build]
    lines = [f"built      {' and '.join(build.halves) or 'nothing'}: {build.reason}"]
    lines += [f"{name:<10} {value}" for name, value in build.details.items()]
    for half in build.halves:
        reason = _load(half)
        lines.append(f"{half + ' half':<10} {'loads' if reason is None else reason}")
    return lines
