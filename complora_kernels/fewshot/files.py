"""Files that are whole or absent, whenever the process is killed."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any


def file_name(text: str) -> str:
    """The text with each run of characters that file names had better not have as one underscore."""
    return re.sub(r"[^\w.-]+", "_", text)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write to a temporary file beside `path`, force it to the disk, and move it into place."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Append one line and force it to the disk. A line that a crash cut short is removed first."""
    with path.open("a+b") as file:
        file.seek(0)
        complete = file.read().rfind(b"\n") + 1
        file.truncate(complete)
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of the file; none when it does not exist."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was cut short, or is empty
    return [json.loads(line) for line in lines]


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
