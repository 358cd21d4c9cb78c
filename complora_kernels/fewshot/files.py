"""The program's files of JSON: objects, and lines of objects, that tell when they are damaged; names of files."""

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
    """The text with each run of characters that file names had better not have as one underscore."""
    return re.sub(r"[^\w.-]+", "_", text)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write an object, sealed, into a file that is whole or absent. An OSError leaves what was there before."""
    write_atomically(path, json.dumps(sealed(record), indent=2) + "\n")


def read_json(path: Path, expected: str = "a JSON object") -> dict[str, Any]:
    """The object in a file of JSON, as `sealed` knows it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged or holds something else; it is named.
    """
    with reading(path, expected):
        return unsealed(json.loads(read_plain(path)))


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Append one line, sealed, and force it to the disk. A line that a crash cut short is removed first.

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
        check: called with each line's object; what it raises names the line.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is damaged; the file and the line are named.
    """
    if not path.exists():
        return []
    lines = read_plain(path).split(b"\n")[:-1]  # what follows the last newline was cut short, or is empty
    records = []
    for number, line in enumerate(lines, 1):
        with reading(f"{path}, line {number}", "a line as `complora` writes it"):
            record = unsealed(json.loads(line))
            if check is not None:
                check(record)
            records.append(record)
    return records


def check_writable(folder: Path) -> None:
    """Create the folder where it is missing and try to write into it.

    Raises:
        OSError: the folder cannot be made or written to; the message says --output.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"--output {folder}: expected a folder that can be written to ({error})") from error
