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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypedDict

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from complora_kernels.common import base_weights
from complora_kernels.common.files import write_atomically, write_new
from complora_kernels.common.schema import check_type
from complora_kernels.config import CompLoRAConfig
from complora_kernels.subspace import check_orthonormal, fingerprint, known_k

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASES_FILES = "adapter_bases-*.safetensors"
FORMAT_VERSION = 1
CONFIG_BYTES = 16 * 2**20  # the most of a configuration: an adapted weight takes about 500
FLOATING = ("F16", "BF16", "F32", "F64")  # as safetensors calls them
ROUNDING = 1e-9  # of a share of energies, which were summed in float64

Shapes = dict[str, tuple[int, ...]]


class SavedBasis(TypedDict):
    """The description of a saved basis."""

    kind: Literal["principal", "complement"]
    k: int
    energy: float


class SavedAdapter(TypedDict):
    """The entry "complora" of the configuration."""

    format_version: int
    package_version: str
    config: dict[str, Any]  # `CompLoRAConfig.to_dict`
    activations: dict[str, str]
    base_weights: dict[str, base_weights.Description]
    digest: str


class SavedBases(TypedDict):
    """Its further keys where the bases are those of activations."""

    bases: dict[str, SavedBasis]
    bases_digest: str


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
    write_new(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
    write_new(folder / WEIGHTS_FILE, save(tensors, metadata=metadata or {"format": "pt"}))


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], bases: dict[str, Tensor]) -> None:
    """Writes an adapter that `read_adapter` can verify; `config["complora"]` is what only this package reads.

    `bases`, where there are any, are a file of their own, for `read_bases`.
    """
    if bases:
        bases = {name: tensor.detach().cpu().contiguous() for name, tensor in bases.items()}
        digest = _sha256(_fingerprints(bases))
        config = config | {"complora": config["complora"] | {"bases_digest": digest}}
        write_new(folder / _bases_file(digest), save(bases, metadata={"format": "pt"}))
    config = _with_digest(config, _digest(config, tensors))
    write_files(folder, config, tensors, metadata={"adapter_config": json.dumps(config)})


def read_adapter(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors that `write_adapter` wrote.

    Types and sizes are compared with what the configuration declares before a tensor takes memory.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file is truncated or was changed, was not written by `save_adapter`, or by a newer version of it,
            or contradicts itself; the message has its path.
    """
    config_path, weights_path = (Path(directory) / name for name in (CONFIG_FILE, WEIGHTS_FILE))
    for path in (config_path, weights_path):
        require_file(path, "the two files that save_adapter writes")
    with reading(weights_path):
        config, tensors = _read_weights(weights_path)
    _check_config_file(config_path, config)
    return config, tensors


def read_bases(directory: str | os.PathLike[str], config: dict[str, Any]) -> dict[str, Tensor]:
    """The bases that `write_adapter` wrote with an adapter of this configuration, which `read_adapter` has checked.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is truncated or was changed, or a basis is not one of those that the configuration declares.
    """
    saved = config["complora"]
    path = Path(directory) / _bases_file(saved["bases_digest"])
    require_file(
        path,
        f"the bases that save_adapter wrote beside {WEIGHTS_FILE}: those of activations cannot be computed from the "
        "base weights",
    )
    with reading(path):
        _, tensors = _read_tensors(path, lambda _: _shapes_of_bases(saved))
        if _sha256(_fingerprints(tensors)) != saved["bases_digest"]:
            raise ValueError(f"{path} does not match its digest, expected it as save_adapter wrote it")
        for name, basis in tensors.items():
            check_orthonormal(basis, name)
    return tensors


@contextlib.contextmanager
def blaming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Puts the path of a file, or of a folder, before the message of a ValueError that the block raises."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever a damaged file makes its parser raise in the block becomes a ValueError with the path of the file."""
    with blaming(path):
        try:
            yield
        except ValueError:
            raise
        except MemoryError as error:
            raise MemoryError(f"{path}: not enough memory to read it") from error
        except Exception as error:  # safetensors passes on what its own parser, torch and the system raise
            raise ValueError(f"{path} is truncated or damaged, expected it as it was written ({error})") from error


def require_file(path: Path, expected: str) -> None:
    """Raises FileNotFoundError where there is nothing, ValueError where there is no regular file or a link to one."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing, expected {expected}")
    if not path.is_file():  # a folder; a pipe or a device could be read for ever
        raise ValueError(f"{path} is no regular file, expected {expected}")


def _bases_file(digest: str) -> str:
    return BASES_FILES.replace("*", digest[:8])


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
            if found.get_dtype() not in FLOATING:
                raise ValueError(f"{name} has dtype {found.get_dtype()}, expected one of {', '.join(FLOATING)}")
        return metadata, {name: file.get_tensor(name) for name in shapes}


def _read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config: dict[str, Any] = {}

    def declared(metadata: dict[str, str]) -> Shapes:
        if "adapter_config" not in metadata:
            raise ValueError(
                f"{path} has no adapter_config in its metadata, expected a file that save_adapter wrote (what "
                "export_peft writes is for PEFT)"
            )
        config.update(_parse_config(metadata["adapter_config"].encode(), path))
        _check_version(config["complora"])
        shapes = _check_saved(config["complora"])
        _check_peft_fields(config)
        return shapes

    metadata, tensors = _read_tensors(path, declared)
    # The text too: a digit changed beyond what a float can hold would otherwise pass.
    if config["complora"]["digest"] != _digest(config, tensors) or json.dumps(config) != metadata["adapter_config"]:
        raise ValueError(f"{path} does not match its digest, expected it as save_adapter wrote it")
    return config, tensors


def _parse_config(text: bytes, path: Path) -> dict[str, Any]:
    """JSON with a digest, as `save_adapter` writes it."""
    try:
        if len(text) > CONFIG_BYTES:
            raise ValueError(f"more than {CONFIG_BYTES} bytes")
        config = json.loads(text, parse_constant=_refuse_constant)
        check_type(config, dict[str, Any], "it")
        check_type(config.get("complora"), dict[str, Any], "complora")
        check_type(config["complora"].get("digest"), str, "complora.digest")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, expected JSON as save_adapter wrote it ({error})") from error
    return config


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _check_version(saved: dict[str, Any]) -> None:
    version: Any = saved.get("format_version")
    check_type(version, int, "complora.format_version")
    if version < 1:
        raise ValueError(f"format_version={version}, expected at least 1")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"format_version={version}, expected at most {FORMAT_VERSION}: it was written by the newer "
            f"complora_kernels {saved.get('package_version')}"
        )


def _check_peft_fields(config: dict[str, Any]) -> None:
    """Raises ValueError where what PEFT reads contradicts what this package reads."""
    saved = config["complora"]
    expected = peft_fields(CompLoRAConfig.from_dict(saved["config"]), saved["base_weights"])
    del expected["rank_pattern"]  # of attention
    for name, value in expected.items():
        if name in config and not _same_json(config[name], value):
            raise ValueError(f"{name}={config[name]!r:.100} contradicts complora, expected {value!r:.100}")


def _same_json(value: Any, other: Any) -> bool:
    """Whether two values have the same JSON: in Python 2 == 2.0 and 1 == True, which JSON writes differently."""
    return json.dumps(value, sort_keys=True) == json.dumps(other, sort_keys=True)


def _check_saved(saved: dict[str, Any]) -> Shapes:
    """The shapes of the tensors that the configuration declares.

    Raises:
        ValueError: a part is missing or of another type, or two contradict each other.
    """
    check_type(saved, SavedAdapter, "complora")
    config = CompLoRAConfig.from_dict(saved["config"])
    shapes: Shapes = {}
    for path, described in saved["base_weights"].items():
        if len(described["shape"]) != 2:
            raise ValueError(f"complora.base_weights.{path}.shape={described['shape']}, expected [out, in]")
        out_features, in_features = described["shape"]
        shapes[peft_key(path, "lora_A")] = (config.r, in_features)
        shapes[peft_key(path, "lora_B")] = (out_features, config.r)
    if not config.source.recomputable:
        check_type(saved, SavedBases, "complora")
        if not re.fullmatch("[0-9a-f]{64}", saved["bases_digest"]):  # it becomes a part of a file's name
            raise ValueError(f"complora.bases_digest={saved['bases_digest']!r:.100}, expected 64 hexadecimal digits")
        _shapes_of_bases(saved)
    return shapes


def _shapes_of_bases(saved: dict[str, Any]) -> Shapes:
    size = CompLoRAConfig.from_dict(saved["config"]).subspace_size
    shapes: Shapes = {}
    for key, basis in saved["bases"].items():
        path, _, side = key.removesuffix("_basis").rpartition(".")
        if side not in ("output", "input") or path not in saved["base_weights"]:
            raise ValueError(f"complora.bases has {key}, expected output_basis or input_basis of an adapted weight")
        d, k = saved["base_weights"][path]["shape"][side == "input"], basis["k"]
        if not 0 <= k <= d:
            raise ValueError(f"complora.bases.{key}.k={k}, expected at least 0 and at most {d}")
        declared = known_k(saved["base_weights"][path]["shape"], size["k"], size["ratio"])
        if declared is not None and k != declared:
            raise ValueError(f"complora.bases.{key}.k={k}, expected {declared} as in complora.config")
        energy, least = basis["energy"], (size["energy"] or 0) if k else 0
        if not least - ROUNDING <= energy <= 1 + ROUNDING:
            raise ValueError(f"complora.bases.{key}.energy={energy}, expected a share in [{least}, 1]")
        shapes[key] = (d, k if basis["kind"] == "principal" else d - k)
    return shapes


def _check_config_file(path: Path, expected: dict[str, Any]) -> None:
    """The file may say more than `save_adapter` wrote, such as the name of the base model, but nothing else."""
    with reading(path), path.open("rb") as file:
        written = _parse_config(file.read(CONFIG_BYTES + 1), path)
    if written["complora"]["digest"] != expected["complora"]["digest"]:
        warnings.warn(
            f"{path} belongs to other weights than the {WEIGHTS_FILE} beside it, as after a save that was cut short; "
            "the configuration inside the weights file is used",
            stacklevel=4,
        )
        return
    changed = [name for name, value in expected.items() if name not in written or not _same_json(written[name], value)]
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
        else:  # an interrupt that came after the last move
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


def _with_digest(config: dict[str, Any], digest: str | None) -> dict[str, Any]:
    return config | {"complora": config["complora"] | {"digest": digest}}


def _digest(config: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """A digest of the configuration, without the one that it holds, and of the tensors."""
    return tensor_digest(tensors, json.dumps(_with_digest(config, None)))


def tensor_digest(tensors: dict[str, Tensor], text: str) -> str:
    """A digest of a text and of every name, shape, dtype and bit of the tensors."""
    return _sha256([text, *_fingerprints(tensors)])


def _fingerprints(tensors: dict[str, Tensor]) -> list[str]:
    return [f"{name}={fingerprint(tensors[name])}" for name in sorted(tensors)]


def _sha256(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
