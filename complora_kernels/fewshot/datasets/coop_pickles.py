"""CoOp's cached draws: pickles, read without running what they may hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

_KNOWN = ("dassl.data.datasets.base_dataset", "Datum")
_FIELDS = {"_impath": str, "_label": int, "_domain": int, "_classname": str}


class Record:
    """What a pickled `Datum` of Dassl says about an image. Its state is four plain values, or it is refused."""

    impath: str
    label: int

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or any(type(state.get(name)) is not kind for name, kind in _FIELDS.items()):
            raise pickle.UnpicklingError(f"the state of a Datum is {str(state)[:200]}")
        self.impath, self.label = state["_impath"], state["_label"]


class _Unpickler(pickle.Unpickler):
    """Builds dicts, lists, strings, numbers and `Record`s: whatever else a file asks for is refused, not imported."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) != _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return Record


def read_coop_pickle(path: Path) -> dict[str, list[Record]]:
    """The lists "train" and, if it is there, "val" of a file that CoOp wrote as `shot_{shots}-seed_{seed}.pkl`.

    Raises:
        ValueError: the file holds anything but lists of Dassl's `Datum`, or is damaged; it is named.
    """
    try:
        with path.open("rb") as file:
            content: Any = _Unpickler(file).load()
    except OSError:
        raise
    except Exception as error:  # damaged files raise almost anything
        raise ValueError(f"{path} is not read: {error}; expected a pickle of Dassl's Datum objects alone") from error
    if not isinstance(content, dict) or "train" not in content or not set(content) <= {"train", "val"}:
        raise ValueError(f"{path}: expected a dict with the lists train and val")
    for split, records in content.items():
        if not isinstance(records, list):
            raise ValueError(f"{path}: {split} is a {type(records).__name__}, expected a list")
        for i, record in enumerate(records):
            if type(record) is not Record or "impath" not in vars(record):
                raise ValueError(f"{path}: {split}[{i}] is a {type(record).__name__}, expected a Datum of Dassl")
    return content
