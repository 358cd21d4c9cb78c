"""The checkpoint of an unfinished run: trained factors, the optimizer's moments, random states and the log.

It is one safetensors file, replaced as a whole, with a digest of its content. The batches need no state: they are a
function of the seed and the step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from complora_kernels.adapters.files import tensor_digest
from complora_kernels.adapters.manage import load_raw_adapter_state, raw_adapter_state
from complora_kernels.common.files import check_plain, reading, set_aside, write_atomically
from complora_kernels.fewshot.escapes import visible

logger = logging.getLogger("complora_kernels")

_EXPECTED = "the checkpoint of an unfinished run"


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Torch's global random state in this process, by "cpu" and "cuda"."""
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    random_states: Sequence[dict[str, Tensor]],
) -> None:
    """Write the state of a run.

    Args:
        path: the file, which is replaced where it exists.
        model: an adapted model; its raw factors and its bases are written.
        optimizer: the optimizer of the model's factors.
        progress: all other values that the run needs to continue, as JSON.
        random_states: `random_state` of every process that trains the model.
    """
    tensors = {f"adapter.{name}": tensor for name, tensor in raw_adapter_state(model).items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    for rank, state in enumerate(random_states):
        tensors |= {f"random.{rank}.{kind}": value for kind, value in state.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = json.dumps(progress)
    metadata = {"progress": described, "digest": tensor_digest(tensors, described)}
    write_atomically(path, save(tensors, metadata=metadata))


def put_damaged_aside(path: Path, steps: int) -> None:
    """Rename a damaged checkpoint, with a warning: its run starts again, and ends with the same numbers.

    A checkpoint of an earlier version, which wrote no digest, is renamed too: nothing tells whether it is whole.

    Args:
        path: the file, which need not exist.
        steps: the number of steps of the whole run.

    Raises:
        OSError: the file cannot be read or renamed.
    """
    if not path.exists():
        return
    try:
        progress, _ = _read(path)
        with reading(path, _EXPECTED):
            _check_progress(progress, steps)
    except ValueError as damage:
        logger.warning("%s; renamed to %s, the run starts again", visible(str(damage)), set_aside(path).name)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote into an adapted model and a new optimizer, and return `progress`.

    The random state becomes that of the process `rank`; it stays unchanged where the file has none for it.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged or of another adapter; the model stays unchanged.
    """
    progress, tensors = _read(path)
    with reading(path, f"{_EXPECTED} of this adapter"):
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer.", tensors).items():
            index, _, moment = name.partition(".")
            moments.setdefault(int(index), {})[moment] = tensor
        _check_moments(moments, optimizer)
        load_raw_adapter_state(model, _under("adapter.", tensors))
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        state, device = _under(f"random.{rank}.", tensors), next(model.parameters()).device
        if "cpu" in state:
            torch.set_rng_state(state["cpu"])
        if "cuda" in state and device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], device)
    return progress


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the progress and the tensors by their names in the file, and verify the digest."""
    with reading(path, _EXPECTED):
        check_plain(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata["digest"] != tensor_digest(tensors, metadata["progress"]):
            raise ValueError("it does not match its digest")
        progress = json.loads(metadata["progress"])
        if not isinstance(progress, dict):
            raise ValueError(f"its progress is {str(progress)[:80]}")
        return progress, tensors


def _check_progress(progress: dict[str, Any], steps: int) -> None:
    """Raise an error for a progress that `train` cannot continue from."""
    if type(progress["step"]) is not int or not 0 <= progress["step"] < steps:
        raise ValueError(f"step is {str(progress['step'])[:80]}, expected one of {steps}")
    if type(progress["seconds"]) not in (int, float):
        raise ValueError(f"seconds is {str(progress['seconds'])[:80]}")
    if not isinstance(progress["log"], list):
        raise ValueError(f"log is {str(progress['log'])[:80]}")
    for line in progress["log"]:
        if any(type(line[name]) not in (int, float) for name in ("step", "loss", "learning_rate")):
            raise ValueError(f"a line of its log is {str(line)[:80]}")


def _check_moments(moments: dict[int, dict[str, Tensor]], optimizer: torch.optim.Optimizer) -> None:
    """Raise an error unless there are AdamW's moments of all parameters, or of none."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if moments and moments.keys() != set(range(len(parameters))):
        raise ValueError(f"it has moments of {len(moments)} factors, expected {len(parameters)}")
    for index, found in moments.items():
        shape = parameters[index].shape
        shapes = {name: tensor.shape for name, tensor in found.items() if tensor.is_floating_point()}
        if shapes != {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}:
            raise ValueError(f"the moments of factor {index} do not fit it")


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
