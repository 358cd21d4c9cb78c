"""Tensors that are sharded over processes (torch's DTensor), as `fully_shard` makes parameters between forward passes.

DTensors are recognised by what they have: importing torch.distributed.tensor takes half a second.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, distributed, nn

from complora_kernels.common.tracing import PLAIN


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is distributed over processes, in shards or in copies."""
    return type(tensor) not in PLAIN and hasattr(tensor, "full_tensor")  # a missing attribute takes a microsecond


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on each process; every process that holds a part of it has to call this."""
    own: Any = tensor
    return own.full_tensor() if is_sharded(tensor) else tensor


def sharded_like(values: Tensor, like: Tensor) -> Tensor:
    """Values, the same on every process, distributed as another tensor of their shape is; sharded ones as they are."""
    if not is_sharded(like) or is_sharded(values):
        return values
    from torch.distributed.tensor import distribute_tensor

    model: Any = like
    return distribute_tensor(values.to(like.device), model.device_mesh, model.placements)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    own: Any = tensor
    return own.detach().to_local() if is_sharded(tensor) else tensor.detach()


def reshard(model: nn.Module) -> None:
    """Lets go of the gathered copies of parameters that a forward pass may have left in `fully_shard`'s modules."""
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            sharded: Any = module
            sharded.reshard()


def has_shards(model: nn.Module) -> bool:
    """Whether parameters of a model are sharded, or were until a forward pass that now begins or has just ended."""
    modules = any(hasattr(module, "reshard") and hasattr(module, "unshard") for module in model.modules())
    return modules or any(map(is_sharded, model.parameters()))


def is_first_process() -> bool:
    """Whether this is the process that writes the files of a model that all of them hold."""
    return distributed.get_rank() == 0
