"""The program's JSON files, which are objects or lines of objects with a digest; and the names of its files."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from complora_kernels.common.files import (
    open_to_append,
    read_plain,
    reading,
    sealed,
    unsealed,
    write_atomically,
    writing,
)


def file_name(text: str) -> str:
    """The text as a file name: each run of characters that are unsafe in file names becomes an underscore."""
    return re.sub(r"[^\w.-]+", "_", text)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write an object with its digest to a file, as a whole. An OSError leaves the old file."""
    write_atomically(path, json.dumps(sealed(record), indent=2) + "\n")


def read_json(path: Path, expected: str = "a JSON object") -> dict[str, Any]:
    """Read the object in a JSON file, and check its digest where it has one.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file, which the message names, is damaged or holds something else.
    """
    with reading(path, expected):
        return unsealed(json.loads(read_plain(path)))


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Append one line with its digest, and force it to the disk. An incomplete last line is removed first.

    Raises:
        OSError: the file cannot be written, or is a link.
    """
    with writing(path), open_to_append(path) as file:
        complete = file.read().rfind(b"\n") + 1
        file.truncate(complete)
        file.write(json.dumps(sealed(record)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path, check: Callable[[dict[str, Any]], object] | None = None) -> list[dict[str, Any]]:
    """The complete lines of the file; none when it does not exist.

    Args:
        path: the file.
        check: called with each line's object; the message of an error that it raises gets the line.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is damaged; the message names the file and the line.
    """
    if not path.exists():
        return []
    lines = read_plain(path).split(b"\n")[:-1]  # behind the last newline is an incomplete line, or nothing
    records = []
    for number, line in enumerate(lines, 1):
        with reading(f"{path}, line {number}", "a line as `complora` writes it"):
            record = unsealed(json.loads(line))
            if check is not None:
                check(record)
            records.append(record)
    return records


def check_writable(folder: Path, option: str = "--output") -> None:
    """Create the folder where it is missing and try to write into it.

    Raises:
        OSError: the folder cannot be made or written to; the message names the option.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{option} {folder}: expected a folder that can be written to ({error})") from error
