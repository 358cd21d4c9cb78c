"""The layers that tests of operations compute: odd shapes, layouts and dtypes, and what is checked of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from numerics import assert_as_accurate_as_reference, random_basis
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from complora_kernels import reference
from complora_kernels.adapted_linear import AdaptedLinear

HALF = (torch.bfloat16, torch.float16)

DTYPES = (torch.float64, torch.float32, *HALF)

LEAVES = ("x", "lora_A", "lora_B")


@dataclass(frozen=True)
class Layer:
    """The arguments of `complora_linear`, and the gradient that its output receives."""

    x: Tensor  # [..., in]
    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]
    lora_A: Tensor  # [r, in]
    lora_B: Tensor  # [out, r]
    output_basis: Tensor | None  # [out, k]
    input_basis: Tensor | None  # [in, k]
    dY: Tensor  # [..., out]
    output_basis_kind: str = "principal"
    input_basis_kind: str = "principal"
    scaling: float = 0.5

    def double(self) -> Layer:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.double() for name, value in values.items() if isinstance(value, Tensor)})

    def arguments(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "dY"}


def make_layer(
    *,
    batch: tuple[int, ...] = (7,),
    out: int = 24,
    in_: int = 16,
    r: int = 3,
    k_out: int | None = 5,
    k_in: int | None = 4,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    **others: Any,
) -> Layer:
    """A random layer; the factors are float32 parameters, or float64, whatever the dtype of the rest."""
    wide = torch.promote_types(dtype, torch.float32)
    return Layer(
        x=torch.randn(*batch, in_).to(dtype),
        weight=(torch.randn(out, in_) / in_**0.5).to(dtype),
        bias=torch.randn(out).to(dtype) if bias else None,
        lora_A=torch.randn(r, in_, dtype=wide) / in_**0.5,
        lora_B=torch.randn(out, r, dtype=wide),
        output_basis=None if k_out is None else random_basis(out, k_out, wide),
        input_basis=None if k_in is None else random_basis(in_, k_in, wide),
        dY=torch.randn(*batch, out).to(dtype),
        **others,
    )


def results(
    function: Callable[..., Tensor], layer: Layer, wanted: Sequence[str] = LEAVES, **options: Any
) -> dict[str, Tensor]:
    """The output `y` and the gradients `dx`, `dlora_A`, `dlora_B` of the wanted arguments."""
    leaves = {name: getattr(layer, name).detach().requires_grad_() for name in wanted}
    y = function(**{**layer.arguments(), **leaves}, **options)
    gradients = torch.autograd.grad(y, tuple(leaves.values()), layer.dY)
    return {"y": y.detach(), **{f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}}


def assert_accurate(
    ours: Sequence[dict[str, Tensor]], same_dtype: Sequence[dict[str, Tensor]], exact: Sequence[dict[str, Tensor]]
) -> None:
    """The accuracy rule for each name, over the results of several layers of the same shapes."""
    for name in ours[0]:
        a, b, c = (torch.stack([result[name] for result in part]) for part in (ours, same_dtype, exact))
        assert_as_accurate_as_reference(a, b, c, name)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """A tensor of the same shape, of other memory layout."""
    if layout == "strided":
        return torch.stack([tensor, tensor + 1], -1)[..., 0]
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.mT.contiguous().mT
    if layout == "expanded" and tensor.dim() > 1:
        return tensor[:1].expand(tensor.shape)
    return tensor


SIZES = (1, 8, 63, 137)

KINDS = ("principal", "complement")

LAYOUTS = ("contiguous", "strided", "transposed", "expanded")


class Recorder(TorchDispatchMode):
    """What is computed below autograd: the products, the shapes of all results, and which memory is still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[int, int, int]] = []  # [m, k] times [k, n]
        self.shapes: list[torch.Size] = []
        self._storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        assert name not in ("bmm", "baddbmm", "matmul", "linear", "mv", "dot"), f"{name} is not counted"
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.products.append((*left.shape, right.shape[1]))
        given = {StorageWeakRef(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage not in given:  # not a view
                self.shapes.append(tensor.shape)
                self._storages[storage] = tensor.untyped_storage().nbytes()
        return result

    @property
    def multiplications(self) -> int:
        return sum(m * k * n for m, k, n in self.products)

    def live_bytes(self, *excluded: Tensor) -> int:
        known = {StorageWeakRef(tensor.untyped_storage()) for tensor in excluded}
        return sum(size for ref, size in self._storages.items() if ref not in known and not ref.expired())


def packed_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, As: Any, Bs: Any, rows: Any, *, dropout_masks: Any = None
) -> Tensor:
    """`reference.packed_lora_linear`, called as `functional.packed_lora_linear` is."""
    return reference.packed_lora_linear(x, AdaptedLinear(weight, bias, As, Bs, rows), dropout_masks=dropout_masks)
