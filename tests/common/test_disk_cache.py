"""Bases on the disk: later processes read what an earlier one computed, and a file that is not right is not there."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from complora_kernels import subspace
from complora_kernels.common import disk_cache
from complora_kernels.config import CompLoRAConfig

SIZES: list[dict[str, Any]] = [{"subspace_k": 30}, {"subspace_ratio": 0.9}, {"subspace_energy": 0.5}]


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("COMPLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def weight(seed: int = 0, out: int = 160, in_: int = 128) -> Tensor:
    return torch.randn(out, in_, generator=torch.Generator().manual_seed(seed))


def basis(W: Tensor, *, side: Any = "output", name: str = "", **options: Any) -> subspace.Basis:
    """As a new process gets it, which holds no decomposition in its memory."""
    subspace.clear_cache()
    size = {} if options.keys() & {"subspace_k", "subspace_ratio", "subspace_energy"} else {"subspace_ratio": 0.25}
    return subspace.projection_basis(W, CompLoRAConfig(sides="both", **(size | options)), side, name)


@pytest.fixture
def decompositions(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each decomposition of a weight."""
    calls: list[None] = []
    decompose = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: (calls.append(None), decompose(*a, **k))[1])
    return calls


def same(one: subspace.Basis, other: subspace.Basis) -> bool:
    return torch.equal(one.matrix, other.matrix) and one.matrix.dtype == other.matrix.dtype and one[1:] == other[1:]


# ---- what is kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_a_later_process_reads_the_same_basis(decompositions, size, dtype):
    W = weight().to(dtype)
    for side in ("output", "input"):
        computed = basis(W, side=side, **size)
        (count,) = {len(decompositions)}
        read = basis(W, side=side, **size)
        assert same(read, computed)
        assert len(decompositions) == count
        read.matrix.zero_()  # it belongs to the caller
        assert same(basis(W, side=side, **size), computed)


def test_whatever_decides_about_a_basis_tells_files_apart(folder):
    W = weight()
    other = W.clone()
    other[0, 0] += 1e-6
    random: dict[str, Any] = {"subspace_source": "random"}
    variants = [
        basis(W),
        basis(other),
        basis(W.double()),
        basis(W.T.contiguous()),
        basis(W, side="input"),
        basis(W, subspace_k=32),
        basis(W, **random),
        basis(W, subspace_seed=1, **random),
        basis(W, name="a.b", **random),
    ]
    assert len(list(folder.iterdir())) == len(variants)
    basis(W, name="another", subspace_seed=5)  # neither decides about singular vectors
    assert len(list(folder.iterdir())) == len(variants)


def test_small_weights_are_not_kept(folder):
    basis(weight(out=160, in_=100))
    assert not folder.exists()


@pytest.mark.parametrize("value", ["0", None])
def test_the_folder_is_chosen_by_the_environment(monkeypatch, tmp_path, decompositions, folder, value):
    if value is None:
        monkeypatch.delenv("COMPLORA_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    else:
        monkeypatch.setenv("COMPLORA_CACHE", value)
    basis(weight())
    basis(weight())
    assert len(decompositions) == (1 if value is None else 2)
    assert not folder.exists()
    assert (tmp_path / "xdg" / "complora_kernels" / "bases").exists() == (value is None)


# ---- files that are not right


def changed(path: Path, change: Any) -> None:
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content))


def flipped(content: bytearray, place: int) -> bytearray:
    content[place] ^= 1
    return content


def forged(content: bytearray, **fields: Any) -> bytes:
    """Other fields or values, under a digest that fits."""
    _, header, data = bytes(content).split(b"\n", 2)
    values = fields.pop("data", lambda data: data)(data)
    content_ = json.dumps(json.loads(header) | fields).encode() + b"\n" + values
    return hashlib.sha256(content_).hexdigest().encode() + b"\n" + content_


DAMAGE: dict[str, Any] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-4],
    "a bit of the matrix": lambda content: flipped(content, len(content) - 9),
    "a bit of the record": lambda content: flipped(content, 80),
    "a bit of the digest": lambda content: flipped(content, 5),
    "not orthonormal": lambda content: forged(content, data=lambda data: data[4:] + data[:4]),
    "NaN": lambda content: forged(content, data=lambda data: b"\xff" * len(data)),
    "another kind": lambda content: forged(content, kind="complement"),
    "another k": lambda content: forged(content, k=31),
    "no number": lambda content: forged(content, k="32"),
    "share": lambda content: forged(content, energy=2.0),
    "shape": lambda content: forged(content, shape=[80, 64]),
    "dtype": lambda content: forged(content, dtype="int32"),
    "of another weight": lambda content: forged(content, key="1/x"),
    "code": lambda content: b"import os\n" + content,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_as_if_it_were_not_there(folder, decompositions, damage):
    computed = basis(weight())
    (path,) = folder.iterdir()
    content = path.read_bytes()
    changed(path, damage)
    assert same(basis(weight()), computed)
    assert len(decompositions) == 2
    assert path.read_bytes() == content


def test_what_is_no_file_of_the_user_is_not_read_and_not_written_through(folder, decompositions, tmp_path, monkeypatch):
    computed = basis(weight())
    (path,) = folder.iterdir()
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    content = elsewhere.read_bytes()
    path.symlink_to(elsewhere)
    assert same(basis(weight()), computed)
    assert len(decompositions) == 2
    assert not path.is_symlink()
    assert elsewhere.read_bytes() == content
    path.unlink()
    os.mkfifo(path)  # opening it would wait for ever
    assert same(basis(weight()), computed)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert same(basis(weight()), computed)
    assert len(decompositions) == 4


def test_a_folder_that_cannot_be_used_changes_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("COMPLORA_CACHE", str(tmp_path / "file" / "cache"))
    first = basis(weight())
    assert same(basis(weight()), first)


# ---- size and other processes


def test_the_least_recently_used_are_removed_beyond_the_size(folder, monkeypatch, decompositions):
    basis(weight(0))
    (first,) = folder.iterdir()
    monkeypatch.setattr(disk_cache, "MOST_BYTES", 3 * first.stat().st_size + 100)
    for seed in (1, 2):
        basis(weight(seed))
    for age, path in enumerate(sorted(folder.iterdir(), key=lambda path: path != first)):
        os.utime(path, (1e9 - age, 1e9 - age))
    os.utime(first, (1, 1))
    basis(weight(0))  # it is used, and so becomes the youngest
    (folder / f".x{disk_cache.SUFFIX}.abandoned").touch()
    os.utime(folder / f".x{disk_cache.SUFFIX}.abandoned", (1, 1))
    (folder / "notes.txt").touch()
    basis(weight(3))
    assert first.exists()
    assert len(list(folder.glob(f"*{disk_cache.SUFFIX}"))) == 3
    assert {path.name for path in folder.iterdir() if not path.name.endswith(disk_cache.SUFFIX)} == {"notes.txt"}
    count = len(decompositions)
    basis(weight(0))
    assert len(decompositions) == count


PROCESS = """
import sys, torch
from complora_kernels import subspace
from complora_kernels.config import CompLoRAConfig
for seed in range(6):
    W = torch.randn(160, 128, generator=torch.Generator().manual_seed(seed))
    basis = subspace.projection_basis(W, CompLoRAConfig(subspace_ratio=0.25), "output")
    U = torch.linalg.svd(W.double()).U[:, :32]
    assert (basis.matrix.double() @ basis.matrix.double().T - U @ U.T).norm() < 1e-4
"""


def test_processes_share_the_folder(folder):
    command = [sys.executable, "-c", PROCESS]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert len(list(folder.iterdir())) == 6
