"""Reads the pickles in which CoOp keeps few-shot splits, without running any code that they may hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from complora_kernels.common.files import reading
from complora_kernels.fewshot.pickles import read_pickle

_KNOWN = ("dassl.data.datasets.base_dataset", "Datum")
_FIELDS = {"_impath": str, "_label": int, "_domain": int, "_classname": str}


class Record:
    """Stands for a pickled `Datum` of Dassl, which describes an image; any state but four plain values is refused."""

    impath: str
    label: int

    def __setstate__(self, state: Any) -> None:
        kinds = {name: type(state.get(name)) for name in _FIELDS} if isinstance(state, dict) else type(state)
        if kinds != _FIELDS:  # the message does not show the state, which may be endless
            raise pickle.UnpicklingError(f"the state of a Datum has not the types {_FIELDS}")
        self.impath, self.label = state["_impath"], state["_label"]


def _find(module: str, name: str) -> type:
    if (module, name) != _KNOWN:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
    return Record


def read_coop_pickle(path: Path) -> dict[str, list[Record]]:
    """Read the lists "train" and, where the file has it, "val" of CoOp's `shot_{shots}-seed_{seed}.pkl`.

    Raises:
        ValueError: the file, which the message names, is damaged or holds anything but lists of Dassl's `Datum`.
    """
    with reading(path, "a pickle of Dassl's Datum objects alone"):
        content: Any = read_pickle(path.read_bytes(), _find)
    if not isinstance(content, dict) or "train" not in content or not set(content) <= {"train", "val"}:
        raise ValueError(f"{path}: expected a dict with the lists train and val")
    for split, records in content.items():
        if not isinstance(records, list):
            raise ValueError(f"{path}: {split} is a {type(records).__name__}, expected a list")
        for i, record in enumerate(records):
            if type(record) is not Record or "impath" not in vars(record):
                raise ValueError(f"{path}: {split}[{i}] is a {type(record).__name__}, expected a Datum of Dassl")
    return content
