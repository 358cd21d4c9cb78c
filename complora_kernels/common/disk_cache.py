"""Matrices that take long to compute, kept in the user's cache folder for later processes.

The cache is never in the way: a file that is damaged, false or not the user's own is as if it were not there, and so is
a folder that cannot be written to. Files are written under names that nobody can guess and moved into place, so that
processes may share the folder; the least recently used ones are removed beyond `MOST_BYTES`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from complora_kernels.common.files import NO_LINK, write_atomically

VARIABLE = "COMPLORA_CACHE"
MOST_BYTES = 2**30
SUFFIX = ".matrix"
ABANDONED_AFTER = 3600.0  # seconds: a temporary file of a process that was killed


def cache_folder() -> Path | None:
    """`$COMPLORA_CACHE`, by default complora_kernels/bases in the user's cache folder; None where it is 0."""
    value = os.environ.get(VARIABLE)
    if value == "0":
        return None
    try:
        return Path(value or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "complora_kernels/bases"))
    except RuntimeError:  # the user has no home
        return None


def is_there(key: str) -> bool:
    """Whether there is a file for `key`, of which `read` may still find that it is damaged."""
    folder = cache_folder()
    return folder is not None and _path(folder, key).exists()


def read(key: str) -> tuple[Tensor, dict[str, Any]] | None:
    """The matrix and the record that `write` kept under `key`, or None."""
    folder = cache_folder()
    if folder is None:
        return None
    path = _path(folder, key)
    try:
        digest, _, content = _read_own(path).partition(b"\n")
        if digest.decode() != hashlib.sha256(content).hexdigest():
            return None
        header, _, data = content.partition(b"\n")
        record = json.loads(header)
        if record.pop("key") != key:
            return None
        matrix = torch.frombuffer(bytearray(data), dtype=getattr(torch, record.pop("dtype"))).view(record.pop("shape"))
        os.utime(path)  # it was used
    except Exception:  # there is no file, or whatever is wrong with it
        return None
    return matrix, record


def write(key: str, matrix: Tensor, record: dict[str, Any]) -> None:
    """Keeps a matrix with at least one element, and a record of JSON's types, under `key`, where that is possible."""
    folder = cache_folder()
    if folder is None:
        return
    dtype = str(matrix.dtype).removeprefix("torch.")
    header = json.dumps(record | {"key": key, "dtype": dtype, "shape": list(matrix.shape)})
    content = header.encode() + b"\n" + matrix.detach().cpu().contiguous().numpy().tobytes()
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        digest = hashlib.sha256(content).hexdigest().encode()
        write_atomically(_path(folder, key), digest + b"\n" + content, sync=False)  # the digest shows what was not
        _remove_oldest(folder)


def _path(folder: Path, key: str) -> Path:
    return folder / (hashlib.sha256(key.encode()).hexdigest()[:32] + SUFFIX)


def _read_own(path: Path) -> bytes:
    """The content of a plain file of this user. Raises OSError for any other, and for a link."""
    descriptor = os.open(path, os.O_RDONLY | NO_LINK | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        own = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
        if not (own and stat.S_ISREG(status.st_mode) and status.st_size <= MOST_BYTES):
            raise OSError("not a plain file of this user")
        return file.read()


def _remove_oldest(folder: Path) -> None:
    """Removes the least recently used files until the others take at most `MOST_BYTES`, and abandoned ones."""
    kept: list[tuple[float, int, str]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if entry.name.endswith(SUFFIX):
                kept.append((status.st_mtime, status.st_size, entry.path))
            elif f"{SUFFIX}." in entry.name and status.st_mtime < time.time() - ABANDONED_AFTER:
                Path(entry.path).unlink(missing_ok=True)
    excess = sum(size for _, size, _ in kept) - MOST_BYTES
    for _, size, path in sorted(kept):
        if excess <= 0:
            break
        Path(path).unlink(missing_ok=True)
        excess -= size
