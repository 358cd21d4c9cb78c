"""`mixed_adapters`: one batch whose samples have different adapters, in one product for each frozen weight."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from complora_kernels.adapters.build import BASE, all_layers
from complora_kernels.adapters.manage import require_unmerged
from complora_kernels.adapters.several import adapter_names as names_of
from complora_kernels.adapters.sums import sums_of
from complora_kernels.common.wrappers import named_modules
from complora_kernels.integrations import find
from complora_kernels.modules.mixed import Samples, standing_in


@contextlib.contextmanager
def mixed_adapters(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Within the context, on this thread, each sample of a batch has an adapter of its own; as PEFT's `adapter_names`.

        with ck.mixed_adapters(model, ["a", "b", "__base__", "a"]), torch.no_grad():
            features = model.encode_image(images)  # of four images

    The factors of all the adapters lie side by side, and of `h = x Ã^T` each row keeps the columns of its own adapter:
    one product with each frozen weight for the whole batch. The factors are those that the adapters have when the
    context is entered. Which adapter is active does not matter, and does not change.

    Samples come first in the inputs of all adapted layers, but for residual blocks around an `nn.MultiheadAttention`
    with `batch_first=False`, where they are in the second place. Where a model rearranges them, as Swin does in
    windows, the forward pass is refused.

    Args:
        model: adapted, in wrappers or not, in evaluation mode. DataParallel, which parts a batch, is refused.
        adapter_names: a name for each sample, of `adapter_names(model)` or "__base__", which is the plain model.

    Raises:
        ValueError: a name is unknown, or there is none. In a forward pass: the model is in training mode, gradients are
            computed, or an input has another number of samples than there are names.
        RuntimeError: an adapter is merged.
    """
    layers, known = all_layers(model), [BASE, *names_of(model)]
    require_unmerged(layers)
    unknown = [name for name in adapter_names if name not in known]
    if isinstance(adapter_names, str) or not adapter_names or unknown:
        raise ValueError(f"adapter_names={adapter_names!r}, expected for each sample one of {', '.join(known)}")
    used = dict.fromkeys((name for name in adapter_names if name != BASE), 1.0)
    sums = sums_of(layers, used)
    first = _sequence_first(model, layers)
    in_place: dict[nn.Module, nn.Module] = {}
    for path, layer in layers.items():
        columns = _columns(adapter_names, sums[path].ranks)
        samples = Samples(columns, first[path], path or type(layer).__name__)
        in_place[layer] = layer.with_sum(sums[path].adapter, used, samples)
    with standing_in(in_place):
        yield


def _columns(adapter_names: Sequence[str], ranks: dict[str, int]) -> Tensor:  # [N, R]
    """The columns that each sample has, of those of all adapters one after the other."""
    owners = [name for name, rank in ranks.items() for _ in range(rank)]
    numbers = {name: number for number, name in enumerate(ranks)}
    of_column = torch.tensor([numbers[name] for name in owners], dtype=torch.int64)  # [R]
    of_sample = torch.tensor([numbers.get(name, -1) for name in adapter_names])  # [N]
    return of_sample.unsqueeze(1) == of_column


def _sequence_first(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, bool | None]:
    """Whether x of each layer is [L, N, in], by the attention that it is or that shares its residual block with it.

    None where that is not known: outside of the blocks of a model which has such an attention.
    """
    orders = {
        path: not module.batch_first
        for path, module in named_modules(model)
        if isinstance(module, nn.MultiheadAttention)
    }
    blocks = {block.path for library in find(model) for block in library.residual_blocks(model)}
    found: dict[str, bool | None] = {}
    for path in layers:
        block = next((outer for outer in _and_parents(path) if outer in blocks), None)
        own = [first for other, first in orders.items() if block is not None and _is_within(other, block)]
        elsewhere = None if block is None and any(orders.values()) else False
        found[path] = orders.get(path, own[0] if own else elsewhere)
    return found


def _and_parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _is_within(path: str, outer: str) -> bool:
    return not outer or path.startswith(f"{outer}.")
