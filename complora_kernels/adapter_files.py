"""The files of an adapter, `adapter_config.json` and `adapter_model.safetensors`: their form and their replacement.

The weights file is the adapter: its metadata repeats the configuration and holds a digest of everything. It moves into
place last, in one step, so whenever a process is killed `read_adapter` finds the old adapter or the new one. The
configuration file says the same to PEFT and to people. When it does not, that is an error (edited) or a warning (left
over from a save that was killed between the two moves).

Bases that cannot be computed from the base weights are a third file, which other programs need not know. Its name holds
a part of its digest, so that it never takes the place of one that the old weights file needs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from complora_kernels.config import CompLoRAConfig
from complora_kernels.subspace import fingerprint

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASES_FILES = "adapter_bases-*.safetensors"
FORMAT_VERSION = 1


def peft_fields(config: CompLoRAConfig, modules: Iterable[str], **changes: Any) -> dict[str, Any]:
    """The fields of PEFT's `LoraConfig` for an adapter on exactly the named modules."""
    fields = {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "target_modules": module_pattern(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    return fields | changes


def module_pattern(modules: Iterable[str]) -> str:
    """A regular expression for these modules alone: PEFT reads a list as endings, and a name can end another's."""
    return "|".join(re.escape(module) for module in modules)


def peft_key(module: str, factor: str) -> str:
    """The name under which PEFT stores `lora_A` or `lora_B` of a module."""
    return ".".join(part for part in ("base_model.model", module, factor, "weight") if part)


@contextlib.contextmanager
def replaced_adapter(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder inside `directory`; what the block writes there replaces the adapter in `directory` when it ends.

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
        clean()  # again: an interrupt may have broken the first off


def write_files(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes the two files into `folder` and forces them to the disk."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry of metadata: safetensors writes several in random order, and equal adapters should be equal files.
    _write(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
    _write(folder / WEIGHTS_FILE, save(tensors, metadata=metadata or {"format": "pt"}))


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], bases: dict[str, Tensor]) -> None:
    """Writes an adapter that `read_adapter` can verify; `config["complora"]` is what only this package reads.

    `bases`, where there are any, are a file of their own, for `read_bases`.
    """
    if bases:
        bases = {name: tensor.detach().cpu().contiguous() for name, tensor in bases.items()}
        digest = _sha256(_fingerprints(bases))
        config = config | {"complora": config["complora"] | {"bases_digest": digest}}
        _write(folder / _bases_file(digest), save(bases, metadata={"format": "pt"}))
    config = _with_digest(config, _digest(config, tensors))
    write_files(folder, config, tensors, metadata={"adapter_config": json.dumps(config)})


def read_adapter(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors that `write_adapter` wrote.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file is truncated or was changed, was not written by `save_adapter`, or by a newer version of it.
    """
    config_path, weights_path = (Path(directory) / name for name in (CONFIG_FILE, WEIGHTS_FILE))
    for path in (config_path, weights_path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, expected the two files that save_adapter writes")
    config, tensors = _read_weights(weights_path)
    _check_config_file(config_path, config)
    return config, tensors


def read_bases(directory: str | os.PathLike[str], config: dict[str, Any]) -> dict[str, Tensor]:
    """The bases that `write_adapter` wrote with an adapter of this configuration.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is truncated or was changed.
    """
    digest = config["complora"]["bases_digest"]
    path = Path(directory) / _bases_file(digest)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, expected the bases that save_adapter wrote beside {WEIGHTS_FILE}: "
            "those of activations cannot be computed from the base weights"
        )
    _, tensors = _read_tensors(path)
    if _sha256(_fingerprints(tensors)) != digest:
        raise ValueError(f"{path} does not match its digest, expected it as save_adapter wrote it")
    return tensors


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _bases_file(digest: str) -> str:
    return BASES_FILES.replace("*", digest[:8])


def _read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors passes on whatever a broken header makes its parser and torch raise
        raise ValueError(f"{path} is truncated or damaged, expected a whole safetensors file ({error})") from error


def _read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    metadata, tensors = _read_tensors(path)
    if "adapter_config" not in metadata:
        raise ValueError(
            f"{path} has no adapter_config in its metadata, expected a file that save_adapter wrote (what export_peft "
            "writes is for PEFT)"
        )
    try:
        config = json.loads(metadata["adapter_config"])
        version, digest = config["complora"]["format_version"], config["complora"]["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, expected metadata as save_adapter wrote them ({error!r})") from error
    # The text too: a digit changed beyond what a float can hold would otherwise pass.
    if digest != _digest(config, tensors) or json.dumps(config) != metadata["adapter_config"]:
        raise ValueError(f"{path} does not match its digest, expected it as save_adapter wrote it")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version={version}, expected at most {FORMAT_VERSION}: it was written by the newer "
            f"complora_kernels {config['complora']['package_version']}"
        )
    return config, tensors


def _check_config_file(path: Path, expected: dict[str, Any]) -> None:
    """The file may say more than `save_adapter` wrote, such as the name of the base model, but nothing else."""
    try:
        written = json.loads(path.read_bytes())
        written_digest = written["complora"]["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, expected JSON as save_adapter wrote it ({error!r})") from error
    if written_digest != expected["complora"]["digest"]:
        warnings.warn(
            f"{path} belongs to other weights than the {WEIGHTS_FILE} beside it, as after a save that was cut short; "
            "the configuration inside the weights file is used",
            stacklevel=4,
        )
        return
    changed = [name for name, value in expected.items() if name not in written or written[name] != value]
    if changed:
        raise ValueError(
            f"{path} differs in {', '.join(changed)} from the configuration that the weights were saved with, expected "
            "it as save_adapter wrote it: a changed configuration needs a new adapter"
        )


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
            _put_back(config, previous, staging)
            _remove(target, bases - old_bases)
        elif isinstance(error, OSError):  # of the folder's sync; the old bases stay, for the old weights may come back
            raise OSError(
                f"the new adapter is in place in {str(target)!r}, but the folder could not be forced to the disk "
                f"({error}): if the machine fails now, the old adapter may be back"
            ) from error
        else:  # an interrupt that came after the last move
            _remove(target, old_bases - bases)
        raise


def _put_back(config: Path, previous: bytes | None, staging: Path) -> None:
    if (staging / CONFIG_FILE).exists():  # it was not moved
        return
    if previous is None:
        config.unlink()
    else:
        (staging / CONFIG_FILE).write_bytes(previous)
        os.replace(staging / CONFIG_FILE, config)


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


def _with_digest(config: dict[str, Any], digest: str | None) -> dict[str, Any]:
    return config | {"complora": config["complora"] | {"digest": digest}}


def _digest(config: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Of the configuration, whatever digest it holds, and of every name, shape, dtype and bit of the tensors."""
    return _sha256([json.dumps(_with_digest(config, None)), *_fingerprints(tensors)])


def _fingerprints(tensors: dict[str, Tensor]) -> list[str]:
    return [f"{name}={fingerprint(tensors[name])}" for name in sorted(tensors)]


def _sha256(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
