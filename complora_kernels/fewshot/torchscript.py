"""Reads the weights of a TorchScript archive, the format of OpenAI's models, as data, without running its code.

`torch.jit.load` runs the code of an archive, and TorchScript can write files. Here the tensors are read from `data.pkl`
and the records of the folder `data`, and from the code only the lists of parameters and buffers.
"""

from __future__ import annotations

import itertools
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from complora_kernels.fewshot.pickles import read_pickle

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "build_list")
_MOST_CODE = 2**26  # bytes: CLIP has less than a hundredth
_MOST_MODULES = 10**5
_CLASS = re.compile(r"^class (\w+)\(Module\):\n((?:^  .*\n?)*)", re.MULTILINE)
_NAMES = re.compile(r"^  __(?:parameters|buffers)__ = (.*)$", re.MULTILINE)
_LIST = re.compile(r"\[(?:\"[^\"\\]*\", )*\]")  # the form of TorchScript's lists of names


class _Object:
    """A stand-in for an instance of one of the archive's classes."""

    type_name = ""
    attributes: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(
                f"{self.type_name} restores itself by code of the archive, which is not run; expected plain attributes"
            )
        self.attributes = state


def is_torchscript(path: Path) -> bool:
    """Whether this program or torch would read a file as an archive of TorchScript.

    Raises:
        Exception: the archive is damaged, or would grow to many times its size; the error may be of almost any kind,
            and is to be caught with `files.reading`.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if sum(entry.file_size for entry in entries) > _most_bytes(path):  # torch would allocate memory for them
        raise ValueError("its records are compressed to a small part of their size, which torch does not do")
    return any("/code/" in entry.filename or entry.filename.endswith("/constants.pkl") for entry in entries)


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Read the parameters and buffers that `torch.jit.save` wrote, by their names in the state dict, on the CPU.

    Tensors that share memory in the archive share it here.

    Raises:
        Exception: the archive is damaged, or its module is more than attributes; the error may be of almost any kind,
            and is to be caught with `files.reading`.
    """
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        root = next(iter(entries)).partition("/")[0]
        storages: dict[str, Tensor] = {}

        def stored(name: str) -> bytes:
            # torch compresses only code; a compressed record may expand to any size
            if entries[name].compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed, which torch does not do")
            return archive.read(name)

        def load(pid: Any) -> Tensor:
            _, dtype, key, *_ = pid
            if key not in storages:
                content = stored(f"{root}/data/{key}")
                storages[key] = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0)
            return storages[key].view(dtype)

        if f"{root}/byteorder" in entries and stored(f"{root}/byteorder").decode() != sys.byteorder:
            raise ValueError("it was written on a machine with another order of bytes")
        module = read_pickle(stored(f"{root}/data.pkl"), _find, load, calls=True)
        code = [name for name in entries if name.startswith(f"{root}/code/") and name.endswith(".py")]
        if sum(entries[name].file_size for name in code) > _MOST_CODE:
            raise ValueError(f"it has more than {_MOST_CODE} bytes of code")
        kept = {}
        for name in code:
            place = name.removeprefix(f"{root}/code/").removesuffix(".py").replace("/", ".")
            for found in _CLASS.finditer(archive.read(name).decode()):
                lists = _NAMES.findall(found[2])
                if not all(map(_LIST.fullmatch, lists)):
                    raise ValueError(f"{name} has a list of names that TorchScript does not write")
                kept[f"{place}.{found[1]}"] = {kept_name for names in lists for kept_name in names.split('"')[1::2]}
    if not isinstance(module, _Object):
        raise ValueError("it holds no module")
    tensors = dict(_tensors(module, "", kept, itertools.count(1)))
    if sum(tensor.nbytes for tensor in tensors.values()) > _most_bytes(path):
        raise ValueError("its tensors are expanded to many times its size")
    return tensors


def _most_bytes(path: Path) -> int:
    return 4 * path.stat().st_size + _MOST_CODE


def _tensors(
    module: _Object, prefix: str, kept: dict[str, set[str]], count: Iterator[int]
) -> Iterator[tuple[str, Tensor]]:
    if next(count) > _MOST_MODULES:  # a few modules that hold each other are visited again and again
        raise ValueError(f"it has more than {_MOST_MODULES} modules")
    for name, value in module.attributes.items():
        if isinstance(value, _Object) and value.type_name in kept:  # a module, because other classes have no such lists
            yield from _tensors(value, f"{prefix}{name}.", kept, count)
        elif isinstance(value, Tensor) and name in kept[module.type_name]:
            yield f"{prefix}{name}", value


def _find(module: str, name: str) -> Any:
    full_name = f"{module}.{name}"
    if module == "__torch__" or module.startswith("__torch__."):
        return type("_Object", (_Object,), {"type_name": full_name})
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    if full_name == "torch._utils._rebuild_tensor_v2":
        return _rebuild_tensor
    if full_name == "collections.OrderedDict":  # it holds backward hooks, and is always empty
        return dict
    if module == "torch.jit._pickle" and name in _LISTS:
        return lambda items, *_: items
    if full_name == "torch.jit._pickle.restore_type_tag":
        return lambda value, tag: value
    raise pickle.UnpicklingError(f"it asks for {full_name}")


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)
