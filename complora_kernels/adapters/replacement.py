"""An adapter in a folder is replaced as a whole, or stays as it was, whenever the process fails or is killed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from complora_kernels.adapters.files import BASES_FILES, CONFIG_FILE, WEIGHTS_FILE
from complora_kernels.common.files import write_atomically


@contextlib.contextmanager
def replaced_adapter(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder inside `directory`; the files that the block writes there replace the adapter when it ends.

    Other files in `directory` stay. A block or a move that fails leaves everything as it was.

    Raises:
        OSError: `directory` cannot be made or written to; the block is then not entered. Or the new adapter is in
            place, as the message says, but the system did not confirm that it is on the disk.
    """
    target = Path(directory)
    staging = target / f".saving-{secrets.token_hex(4)}"
    made = [folder for folder in (target, *target.parents) if not folder.exists()]

    def clean() -> None:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # it is not empty: the adapter is there
                folder.rmdir()

    try:
        try:
            try:
                staging.mkdir(parents=True)
            except OSError as error:
                raise OSError(
                    f"directory={str(target)!r}, expected a folder that can be written to ({error})"
                ) from error
            yield staging
            _move_adapter(staging, target)
        finally:
            clean()
    finally:
        clean()  # again: an interrupt may have broken the first call off


def _move_adapter(staging: Path, target: Path) -> None:
    """Moves bases and configuration, then the weights; a failure in between puts the old configuration back."""
    config, weights = target / CONFIG_FILE, staging / WEIGHTS_FILE
    previous = config.read_bytes() if config.exists() else None
    old_bases = {path.name for path in target.glob(BASES_FILES)}
    bases = {path.name for path in staging.glob(BASES_FILES)}
    try:
        for name in bases:
            os.replace(staging / name, target / name)
        os.replace(staging / CONFIG_FILE, config)
        os.replace(weights, target / WEIGHTS_FILE)
        _sync_directory(target)
        _remove(target, old_bases - bases)
    except BaseException as error:
        if weights.exists():
            moved = not (staging / CONFIG_FILE).exists()
            if moved and previous is None:
                config.unlink()
            elif moved and previous is not None:
                write_atomically(config, previous)
            _remove(target, bases - old_bases)
        elif isinstance(error, OSError):  # the sync failed; the old bases stay, for the old weights may come back
            raise OSError(
                f"the new adapter is in place in {str(target)!r}, but the folder could not be forced to the disk "
                f"({error}): if the machine fails now, the old adapter may be back"
            ) from error
        else:  # an interrupt came after the last move
            _remove(target, old_bases - bases)
        raise


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Removes files that nothing refers to; one that cannot be removed does no harm."""
    for name in names:
        with contextlib.suppress(OSError):
            (folder / name).unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    """Forces the new names in a folder to the disk, where the system can do that."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
