"""The files of an adapter, `adapter_config.json` and `adapter_model.safetensors`: writing and reading them.

The weights file is the adapter: its metadata repeats the configuration and holds a digest of everything. It moves into
place last, in one step, so whenever a process is killed `read_adapter` finds the old adapter or the new one. The
configuration file says the same to PEFT and to people. When it does not, that is an error (edited) or a warning (left
over from a save that was killed between the two moves).

Bases that cannot be computed from the base weights are a third file, which other programs need not know. Its name holds
a part of its digest, so that it never takes the place of one that the old weights file needs.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from complora_kernels.adapters.configuration import (
    CONFIG_BYTES,
    Shapes,
    basis_shapes,
    check_config,
    parse_config,
    same_json,
)
from complora_kernels.common.files import reading, write_new, writing
from complora_kernels.subspace import check_orthonormal, fingerprint

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASES_FILES = "adapter_bases-*.safetensors"
FLOATING = ("F16", "BF16", "F32", "F64")  # safetensors' names of the dtypes that are read
INTACT = "a whole file as save_adapter wrote it, neither truncated nor damaged"


def write_files(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes the two files into `folder` and forces them to the disk."""
    # One entry of metadata: safetensors writes several in random order, and equal adapters should be equal files.
    _write(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
    _write(folder / WEIGHTS_FILE, save(_in_host_memory(tensors), metadata=metadata or {"format": "pt"}))


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], bases: dict[str, Tensor]) -> None:
    """Writes an adapter that `read_adapter` can verify; `config["complora"]` is what only this package reads.

    `bases`, where there are any, are a file of their own, for `read_bases`.
    """
    if bases:
        bases = _in_host_memory(bases)
        digest = bases_digest(bases)
        config = config | {"complora": config["complora"] | {"bases_digest": digest}}
        _write(folder / bases_file(digest), save(bases, metadata={"format": "pt"}))
    config = config | {"complora": config["complora"] | {"digest": adapter_digest(config, tensors)}}
    write_files(folder, config, tensors, metadata={"adapter_config": json.dumps(config)})


def read_adapter(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors that `write_adapter` wrote.

    Types and sizes are compared with what the configuration declares before a tensor takes memory.

    Raises:
        FileNotFoundError: one of the files is missing.
        OSError: a file cannot be read.
        ValueError: a file is truncated or was changed, was not written by `save_adapter`, or by a newer version of it,
            or contradicts itself; the message has its path.
    """
    config_path, weights_path = (Path(directory) / name for name in (CONFIG_FILE, WEIGHTS_FILE))
    for path in (config_path, weights_path):
        require_file(path, "the two files that save_adapter writes")
    with reading(weights_path, INTACT):
        config, tensors = _read_weights(weights_path)
    _check_config_file(config_path, config)
    return config, tensors


def read_bases(directory: str | os.PathLike[str], config: dict[str, Any]) -> dict[str, Tensor]:
    """The bases that `write_adapter` wrote with an adapter of this configuration, which `read_adapter` has checked.

    Raises:
        FileNotFoundError: the file is missing.
        OSError: the file cannot be read.
        ValueError: it is truncated or was changed, or a basis is not one of those that the configuration declares.
    """
    saved = config["complora"]
    path = Path(directory) / bases_file(saved["bases_digest"])
    require_file(
        path,
        f"the bases that save_adapter wrote beside {WEIGHTS_FILE}: they cannot be computed from the base weights",
    )
    with reading(path, INTACT):
        _, tensors = _read_tensors(path, lambda _: basis_shapes(saved))
        if bases_digest(tensors) != saved["bases_digest"]:
            raise ValueError(f"{path} does not match its digest, expected it as save_adapter wrote it")
        for name, basis in tensors.items():
            check_orthonormal(basis, name)
    return tensors


def require_file(path: Path, expected: str) -> None:
    """Raises FileNotFoundError where there is nothing, ValueError where there is no regular file or a link to one."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing, expected {expected}")
    if not path.is_file():  # a folder; a pipe or a device could be read for ever
        raise ValueError(f"{path} is no regular file, expected {expected}")


def bases_file(digest: str) -> str:
    """The name of the file that holds the bases of this digest."""
    return BASES_FILES.replace("*", digest[:8])


def adapter_digest(config: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """A digest of the configuration, whatever digest it holds, and of the tensors."""
    return tensor_digest(tensors, json.dumps(config | {"complora": config["complora"] | {"digest": None}}))


def tensor_digest(tensors: dict[str, Tensor], text: str) -> str:
    """A digest of a text and of every name, shape, dtype and bit of the tensors."""
    return _sha256([text, *_fingerprints(tensors)])


def bases_digest(bases: dict[str, Tensor]) -> str:
    """A digest of every name, shape, dtype and bit of the bases."""
    return _sha256(_fingerprints(bases))


def _fingerprints(tensors: dict[str, Tensor]) -> list[str]:
    return [f"{name}={fingerprint(tensors[name])}" for name in sorted(tensors)]


def _sha256(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    with writing(path):
        write_new(path, content)


def _in_host_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config: dict[str, Any] = {}

    def declared(metadata: dict[str, str]) -> Shapes:
        if "adapter_config" not in metadata:
            raise ValueError(
                f"{path} has no adapter_config in its metadata, expected a file that save_adapter wrote (what "
                "export_peft writes is for PEFT)"
            )
        config.update(parse_config(metadata["adapter_config"].encode(), path))
        return check_config(config)

    metadata, tensors = _read_tensors(path, declared)
    # The text is compared too: a digit changed beyond what a float can hold would otherwise pass.
    matches = config["complora"]["digest"] == adapter_digest(config, tensors)
    if not matches or json.dumps(config) != metadata["adapter_config"]:
        raise ValueError(f"{path} does not match its digest, expected it as save_adapter wrote it")
    return config, tensors


def _read_tensors(path: Path, declared: Callable[[dict[str, str]], Shapes]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a file, once its header has floating-point ones of the shapes `declared`."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        shapes = declared(metadata)
        differing = sorted(shapes.keys() ^ set(file.keys()))
        if differing:
            raise ValueError(f"its tensors differ from what the configuration declares: {', '.join(differing):.500}")
        for name, shape in shapes.items():
            found = file.get_slice(name)
            if tuple(found.get_shape()) != shape:
                raise ValueError(f"{name} has shape {tuple(found.get_shape())}, expected {shape}")
            dtypes = (*FLOATING, "I64") if len(shape) == 0 else FLOATING  # a BatchNorm counts its batches
            if found.get_dtype() not in dtypes:
                raise ValueError(f"{name} has dtype {found.get_dtype()}, expected one of {', '.join(dtypes)}")
        return metadata, {name: file.get_tensor(name) for name in shapes}


def _check_config_file(path: Path, expected: dict[str, Any]) -> None:
    """Raises ValueError where the file says anything else than `expected`; it may say more, such as a base model."""
    with reading(path, INTACT), path.open("rb") as file:
        written = parse_config(file.read(CONFIG_BYTES + 1), path)
    if written["complora"]["digest"] != expected["complora"]["digest"]:
        warnings.warn(
            f"{path} belongs to other weights than the {WEIGHTS_FILE} beside it, as after a save that was cut short; "
            "the configuration inside the weights file is used",
            stacklevel=4,
        )
        return
    changed = [name for name, value in expected.items() if name not in written or not same_json(written[name], value)]
    if changed:
        raise ValueError(
            f"{path} differs in {', '.join(changed)} from the configuration that the weights were saved with, expected "
            "it as save_adapter wrote it: a changed configuration needs a new adapter"
        )
