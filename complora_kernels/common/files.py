"""Reading and writing files: errors name their file, and a file is whole or absent whenever the process is killed.

Nothing is ever written through a link that somebody else may have made: a new file is written under a name that nobody
can guess, and then moved into place.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

DIGEST = "digest"
"""The key of a record's digest. A record without one is read unverified: people may write such files by hand."""

NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # Windows has no such flag


@contextlib.contextmanager
def reading(source: os.PathLike[str] | str, expected: str, errors: type[Exception] = Exception) -> Iterator[None]:
    """A context in which a file is read: any error of a parser becomes a ValueError that names the file.

    Args:
        source: the file, or the place in it, as it stands in the message.
        expected: a description of valid content.
        errors: the class of the errors that content can cause; others pass unchanged.

    Raises:
        ValueError: the content is not as expected. One whose message already begins with the source stays as it is.
        OSError: the file cannot be opened or read; it is named.
        MemoryError: memory does not suffice for the content.
    """
    try:
        yield
    except errors as error:
        if isinstance(error, MemoryError):
            raise
        if isinstance(error, OSError):
            if error.errno is None:
                raise OSError(errno.EIO, words_of(error), str(source)) from error
            if error.filename is None:  # a read, or a seek to a damaged offset, names no file
                error.filename = str(source)
            raise
        if type(error) is ValueError and str(error).startswith(str(source)):
            raise
        raise ValueError(f"{source}: expected {expected} ({words_of(error)})") from error


def words_of(error: BaseException) -> str:
    """The message of an error, with its kind where the message alone says little."""
    if isinstance(error, MemoryError) and not error.args:
        return "not enough memory"
    if isinstance(error, KeyError):
        return f"there is no {error}"
    return str(error) or type(error).__name__


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context in which a file is written: "No space left on device" and similar errors name it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def check_plain(path: Path | str) -> None:
    """Raises OSError unless `path` is a file or a link to one: a pipe or a device could be read for ever."""
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise OSError(errno.EINVAL, "expected a plain file", str(path))


def read_plain(path: Path) -> bytes:
    """The content of a file. Raises OSError as `check_plain`."""
    check_plain(path)
    return path.read_bytes()


def refuse_link(folder: Path) -> None:
    """Raises OSError where a link stands in the place of a folder: its target may belong to others."""
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "a symbolic link, expected a folder that belongs to this one", str(folder))


def open_to_append(path: Path) -> IO[bytes]:
    """A file, made where it is missing, open for reading and for writing at its end.

    Raises:
        OSError: it is a link or no plain file, or cannot be opened.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for its other end.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | NO_LINK | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, "a symbolic link, expected a file that belongs to this folder", str(path)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "expected a plain file", str(path))
    return os.fdopen(descriptor, "r+b")


def write_new(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Writes a new file and forces it to the disk. Raises FileExistsError where a file or a link exists already."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666), "wb") as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def write_atomically(path: Path, content: bytes | str, *, sync: bool = True) -> None:
    """Writes a temporary file beside `path`, forces it to the disk unless `sync` is False, and moves it into place.

    Raises:
        OSError: the file cannot be written; what was there before is still there.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}")
    with writing(path):
        try:
            write_new(temporary, data, sync=sync)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def set_aside(path: Path) -> Path:
    """Renames a damaged file to the first free name of `NAME.damaged-1`, `-2` and so on; returns the new path."""
    names = (path.with_name(f"{path.name}.damaged-{n}") for n in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    path.rename(aside)
    return aside


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with a digest of its content, by which `unsealed` detects any change."""
    return {**record, DIGEST: _digest(record)}


def unsealed(record: Any) -> dict[str, Any]:
    """The record without its digest. Raises ValueError unless it is an object that matches the digest in it, if any."""
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {_KINDS.get(type(record), 'number')} stands there")
    content = {name: value for name, value in record.items() if name != DIGEST}
    if DIGEST in record and record[DIGEST] != _digest(content):
        raise ValueError(f"it does not match its digest; one that was changed by hand needs no {DIGEST!r}")
    return content


_KINDS = {type(None): "null", bool: "truth value", str: "text", list: "array"}


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
