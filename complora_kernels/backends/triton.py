"""The triton backend: fused kernels on CUDA GPUs, each product by the plan of its problem.

Plans other than `fused` leave the large products to torch. Calls go through operations that are registered with torch
only where something follows operations one by one: torch.compile, or a dispatch mode such as selective checkpointing.
Elsewhere kernels are launched at once, which takes half the host's time, and so are norms and activations: blocks are
not fused under torch.compile and selective checkpointing. The first call imports Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors
from torch.nn import functional as F

from complora_kernels.adapted_linear import AdaptedLinear, Deferred, Needs, ProductGrads
from complora_kernels.backends import hardware, plans
from complora_kernels.backends.support import unsupported_ranks, unsupported_tensors
from complora_kernels.backends.torch import (
    Activated,
    Norm,
    Normed,
    ProductInput,
    SideBySide,
    Source,
    add_residual,
    block_diagonal,
    input_grad,
    whole_gradient,
)
from complora_kernels.common.shapes import check_device, flatten, split_like, unflatten
from complora_kernels.common.tracing import PLAIN, is_dispatched
from complora_kernels.kernels.rows import MAX_NORM_WIDTH, groups_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_LIBRARY = torch.library.Library("complora_triton", "DEF")
_LIBRARY.define(
    "packed_lora_linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor[] As, Tensor[] Bs, int[] starts, "
    "float dropout_p, Tensor? seed, bool save_h, str precision) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "packed_lora_linear_bwd(Tensor dY, Tensor x, Tensor h, Tensor weight, Tensor[] As, Tensor[] Bs, int[] starts, "
    "float dropout_p, Tensor? seed, bool[] needs, str precision) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "fold_factors(Tensor[] factors, Tensor?[] bases, bool[] complement, bool[] output_side, float scaling, "
    "ScalarType dtype) -> Tensor"
)


@functools.cache
def kernels() -> Any:
    """`complora_kernels.kernels` with its modules. This is the one place that imports Triton."""
    from complora_kernels import kernels
    from complora_kernels.kernels import (  # noqa: F401
        activation,
        beside,
        factors,
        launch,
        linear,
        linear_bwd,
        norm,
        norm_bwd,
        norm_bwd_da,
        reductions,
    )

    return kernels


class TritonBackend:
    """The kernels of `complora_kernels.kernels`."""

    name = "triton"
    purpose = "fused kernels on CUDA GPUs (on AMD's: compiled, not run)"
    philox = True
    reads_parts = True
    own_operations = True

    @property
    def automatic(self) -> bool:
        return not hardware.interpreted() and torch.version.hip is None

    def unavailable(self) -> str | None:
        if hardware.is_missing("triton"):
            return "triton is not installed"
        return None if hardware.interpreted() else hardware.gpu_unavailable()

    def gpu_refusal(self, index: int | None) -> str | None:
        return hardware.too_old(index)

    def unsupported_tensors(
        self, label: str, tensors: Sequence[Tensor], bases: Sequence[Tensor | None] = (), dtype: Any = None
    ) -> str | None:
        devices = ("cpu",) if hardware.interpreted() else ("cuda",)
        reason = unsupported_tensors(label, tensors, dtype, devices, DTYPES, self.gpu_refusal)
        if reason is not None:
            return reason
        for basis in bases:
            if basis is not None and basis.dtype is not torch.float32:
                return f"a basis has dtype {basis.dtype}, the kernels support torch.float32"
        return None

    def unsupported_linear(self, x: Tensor, linear: AdaptedLinear) -> str | None:
        reason = self.unsupported_tensors("x", [x])
        if reason is not None or not linear.rows:
            return reason
        if (reason := unsupported_ranks(linear)) is not None:
            return reason
        if linear.columns is not None and is_dispatched(x):
            return "columns of h are left out, the registered operations compute all"
        try:
            groups_of(linear, traced=type(linear.weight.shape[0]) is not int or torch.compiler.is_compiling())
        except ValueError as error:
            return str(error)
        return None

    def unsupported_norm(self, x: Tensor, *others: Tensor | None) -> str | None:
        if x.shape[-1] > MAX_NORM_WIDTH:
            return f"x {tuple(x.shape)}, the kernels support rows of at most {MAX_NORM_WIDTH}"
        for tensor in (x, *others):
            if tensor is not None and tensor.is_neg():
                return "a tensor is a view that negates its memory, the kernels read the memory"
        return None

    def project_complement(
        self,
        factor: Tensor,  # [..., d]
        basis: Tensor,  # [d, k]
        basis_kind: str,
    ) -> Tensor:
        rows = flatten(factor)  # [R, d]
        (projected,) = self.fold_factors([rows], [basis], [basis_kind], [False], 1.0, [factor.dtype])
        return unflatten(projected, factor.shape)

    def fold_factors(
        self,
        factors: Sequence[Tensor],  # each [r, d], those of the output side [d, r]; all of one dtype
        bases: Sequence[Tensor | None],  # each [d, k], float32
        kinds: Sequence[str],
        output_side: Sequence[bool],
        scaling: float,
        dtypes: Sequence[torch.dtype],  # all the same
    ) -> list[Tensor]:  # parts of one tensor, in the shapes of the factors
        given = (bases, [kind == "complement" for kind in kinds], output_side, scaling, dtypes[0])
        registered = _is_registered(*factors, *bases)
        fold = torch.ops.complora_triton.fold_factors if registered else kernels().factors.fold_factors
        return split_like(fold(factors, *given), factors)

    def fold_factors_bwd(
        self,
        factors: Sequence[Tensor],  # their gradients: each [r, d], those of the output side [d, r]
        bases: Sequence[Tensor | None],
        kinds: Sequence[str],
        output_side: Sequence[bool],
        scaling: float,
        dtypes: Sequence[torch.dtype],
    ) -> list[Tensor]:
        # Factors and bases stay where they are and gradients do not: gathered, they too lie at known distances.
        flat = _flatten_dense_tensors(factors)
        if _is_registered(flat, *bases):
            return self.fold_factors(split_like(flat, factors), bases, kinds, output_side, scaling, dtypes)
        given = (bases, [kind == "complement" for kind in kinds], output_side, scaling, dtypes[0])
        return split_like(kernels().factors.fold_factors(factors, *given, flat=flat), factors)

    def packed_lora_linear_fwd(
        self,
        given: ProductInput,  # x [M, K]
        linear: AdaptedLinear,  # weight [N, K]
        *,
        residual: Tensor | None = None,  # [M, N]
    ) -> tuple[Tensor, Tensor]:  # y [M, N], h [M, P r]
        x, h, beside, plan = given
        if beside is not None and h is not None:
            inputs, weights, onto = beside
            if onto is not None:
                return onto.addmm_(inputs, weights.mT), h  # s + [x | h | 1 | 0] [W | B̃ | b | 0]^T
            bias = None if linear.bias is None else kernels().launch.cast(linear.bias, x.dtype)
            return add_residual(F.linear(inputs, weights, bias), residual), h
        if h is None and residual is None and _is_registered(x, *linear.tensors()):
            return torch.ops.complora_triton.packed_lora_linear_fwd(
                x,
                linear.weight,
                linear.bias,
                linear.As,
                linear.Bs,
                _starts(linear),
                linear.dropout_p,
                linear.seed,
                linear.save_h,
                linear.precision,
            )
        return _linear_fwd(x, linear, h, residual, _plan(x.shape, x.dtype, x.device, linear) if plan is None else plan)

    def packed_lora_linear_bwd(
        self,
        dY: Tensor | Sequence[Tensor],  # [M, N], or of each group of rows of the weight [M, D]
        source: Source,  # gives x [M, K]
        h: Tensor,  # [M, P r]
        linear: AdaptedLinear,  # weight [N, K]
        needs: Needs,
        *,
        defer: bool = False,
    ) -> ProductGrads:
        if isinstance(source, Tensor):
            dY = whole_gradient(dY)
            if _is_registered(dY, source, h, *linear.tensors()):
                factors = (linear.As, linear.Bs, _starts(linear), linear.dropout_p, linear.seed)
                computed: Any = torch.ops.complora_triton.packed_lora_linear_bwd(
                    dY, source, h, linear.weight, *factors, needs, linear.precision
                )
                dX, dA, dB = computed
                return _product_grads(dX, dA, dB, linear, needs)
        x = source if isinstance(source, Tensor) else source.input  # has the shape and device of the product's input
        plan = _plan(x.shape, source.dtype, x.device, linear)
        if defer and needs.x and plan.name == "concat" and _may_defer(source, linear):
            return _deferred_bwd(dY, source, h, linear, needs)
        dX, dA, dB = _linear_bwd(whole_gradient(dY), source, h, linear, needs, plan)
        return _product_grads(dX, dA, dB, linear, needs)

    def norm_fwd(
        self,
        x: Tensor,  # [M, K]
        delta: Tensor | None,  # [M, K]
        norm: Norm,
        dtype: torch.dtype,
        reader: AdaptedLinear,
        *,
        closing: AdaptedLinear | None = None,
    ) -> tuple[Tensor, Normed, ProductInput]:
        k, adapted = kernels(), len(reader.rows) > 0
        # float32 rows and Ã do not fit beside each other
        inside = reader if adapted and dtype.itemsize == 2 and reader.columns is None else None
        plan = _plan(x.shape, dtype, x.device, reader) if adapted else None
        beside = _beside(x.shape, dtype, inside, plan)
        twice = closing is not None and _adds_in_place(x, delta, dtype, closing)
        outputs = k.norm.norm_fwd(x, delta, *norm, dtype, inside, beside=beside, twice=twice)
        stream, normed, mean, rstd, h, again = outputs
        saved = Normed(stream, mean, rstd, norm, dtype)
        if beside is not None:
            return again, saved, ProductInput(normed[:, : x.shape[1]], h, SideBySide(normed, beside.whole(dtype)))
        if adapted and inside is None:
            h = k.linear.packed_lora_linear_h(normed, reader)
        return again, saved, ProductInput(normed, h if adapted else None, None, plan)

    def norm_bwd(
        self,
        d_normed: Tensor | Deferred,  # [M, K]
        d_stream: Tensor | None,  # [M, K]
        normed: Normed,
    ) -> tuple[Tensor, Sequence[Tensor] | None]:  # ds [M, K], each dÃ [r, K] or None
        k, saved = kernels(), (normed.x, normed.mean, normed.rstd, normed.norm.weight)
        if not isinstance(d_normed, Deferred):
            return k.norm_bwd.norm_bwd(d_normed, d_stream, *saved), None
        base, g, linear, needs_A = d_normed
        if not needs_A:
            return k.norm_bwd.norm_bwd(base, d_stream, *saved, g=g, reader=linear), None
        ds, dA = k.norm_bwd_da.norm_bwd_da(base, d_stream, *saved, normed.norm.bias, g, linear)
        return ds, dA.unbind()

    def activation_fwd(
        self,
        z: Tensor,  # [M, K]
        activation: str,
        reader: AdaptedLinear,
        *,
        onto: Tensor | None = None,  # [M, N]
    ) -> ProductInput:
        k, adapted = kernels(), len(reader.rows) > 0
        inside = reader if _activation_computes_h(reader) else None
        plan = _plan(z.shape, z.dtype, z.device, reader) if adapted and onto is None else None
        if onto is None:
            beside = _beside(z.shape, z.dtype, inside, plan)
        else:
            beside = k.beside.beside(reader, z.dtype, with_bias=True)
        a, h = k.activation.activation_fwd(z, activation, inside, beside=beside)
        if beside is not None:
            return ProductInput(a[:, : z.shape[1]], h, SideBySide(a, beside.whole(z.dtype), onto))
        if adapted and inside is None:
            h = k.linear.packed_lora_linear_h(a, reader)
        return ProductInput(a, h if adapted else None, None, plan)

    def activation_bwd(
        self,
        da: Tensor | Deferred,  # [M, K]
        z: Tensor,  # [M, K]
        activation: str,
    ) -> tuple[Tensor, Sequence[Tensor] | None]:  # dz [M, K], each dÃ [r, K] or None
        k = kernels()
        if not isinstance(da, Deferred):
            return k.activation.activation_bwd(da, z, activation)[0], None
        linear, needs_A = da.linear, da.needs_A
        dz, dA = k.activation.activation_bwd(da.base, z, activation, g=da.g, reader=linear, compute_dA=needs_A)
        return dz, dA.view(len(linear.As), -1, z.shape[1]).unbind() if needs_A else None


def _beside(
    shape: Sequence[int],  # of the product's input: M, K
    dtype: torch.dtype,
    reader: AdaptedLinear | None,
    plan: plans.Plan | None,
) -> Any:
    """The matrices of a product whose input is written with h in the same rows, where its plan is `concat`."""
    if reader is None or plan is None or not _lies_beside(shape, dtype, reader, plan):
        return None
    return kernels().beside.beside(reader, dtype)


def _lies_beside(shape: Sequence[int], dtype: torch.dtype, reader: AdaptedLinear, plan: plans.Plan) -> bool:
    """Whether h can be written in the rows of the product's input, and its plan wants it there."""
    fits = dtype.itemsize == 2 and shape[1] % 8 == 0 and reader.weight.shape[1:] == shape[1:]
    return fits and plan.name == "concat"


def _adds_in_place(
    x: Tensor,  # [M, N]
    delta: Tensor | None,  # [M, N]
    dtype: torch.dtype,  # of the product
    closing: AdaptedLinear,  # weight [N, K]
) -> bool:
    """Whether torch can add the product of an activation to `s = x + delta` where it lies, in one rounding."""
    if x.dtype != dtype or (delta is not None and delta.dtype != dtype) or not _activation_computes_h(closing):
        return False
    shape = (x.shape[0], closing.weight.shape[1])  # of the activation
    return _lies_beside(shape, dtype, closing, _plan(shape, dtype, x.device, closing))


def _activation_computes_h(reader: AdaptedLinear) -> bool:
    """Whether the kernel of an activation computes h of the product that reads it."""
    return len(reader.rows) > 0 and reader.columns is None and _one_mask(reader)


def _one_mask(linear: AdaptedLinear) -> bool:
    """Whether its adapters read the same x: the kernels of an activation draw one mask."""
    return len(linear.rows) == 1 or not linear.seeds


def _may_defer(source: Source, linear: AdaptedLinear) -> bool:
    """Whether what computed x can add the second term of dX in its own gradient."""
    if isinstance(source, Tensor) or linear.columns is not None or linear.As[0].shape[0] > plans.MAX_FUSED_RANK:
        return False
    return not isinstance(source, Activated) or _one_mask(linear)


def _computes_dA(source: Source, linear: AdaptedLinear) -> bool:
    """Whether the launch that adds the second term of dX has the registers for dÃ as well."""
    if isinstance(source, Normed):
        return kernels().norm_bwd_da.fits_together(source.x.shape[1], source.dtype)
    return linear.rank <= kernels().activation.MAX_DA_RANK


def _deferred_bwd(
    dY: Tensor | Sequence[Tensor],  # [M, N], or of each group of rows of the weight [M, D]
    source: Source,  # a norm or an activation
    h: Tensor,  # [M, P r]
    linear: AdaptedLinear,
    needs: Needs,
) -> ProductGrads:
    """Torch's product alone, `dY W`, for dX: the gradient of what computed x adds the second term."""
    k, stacked = kernels(), _stacked(linear)
    start, stop = linear.rows[0]
    apart = not isinstance(dY, Tensor) and len(dY) == linear.weight.shape[0] // (stop - start)
    dY = dY if apart else whole_gradient(dY)
    outputs = {"compute_g": True, "compute_dB": needs.B, "pack": apart}
    g, dB, *packed = k.reductions.packed_lora_linear_db(dY, h.contiguous(), stacked, **outputs)
    whole: Any = packed[0] if apart else dY  # [M, N]
    base = whole @ k.launch.cast(linear.weight, whole.dtype)
    nothing: list[Tensor | None] = [None] * len(linear.rows)
    left = needs.A and _computes_dA(source, linear)
    dA = _factor_grad(source, g, linear).unbind() if needs.A and not left else nothing
    return ProductGrads(Deferred(base, g, stacked, left), dA, dB.unbind() if needs.B else nothing)


def _linear_fwd(
    x: Tensor,  # [M, K]
    linear: AdaptedLinear,
    h: Any,  # [M, P r], or None
    residual: Tensor | None,  # [M, N]
    plan: plans.Plan,
) -> tuple[Tensor, Tensor]:  # y [M, N], h [M, P r]
    k, linear, save_h = kernels(), _stacked(linear), linear.save_h
    if plan.name == "fused":
        if h is None and plan.h != "inside":
            h = k.linear.packed_lora_linear_h(x, linear)
        y, h = k.linear.packed_lora_linear_fwd(x, linear, h, residual=residual, tiles=plan.tiles)
        return y, h if save_h else x.new_empty(0, h.shape[1])
    bias = None if linear.bias is None else k.launch.cast(linear.bias, x.dtype)
    if plan.name == "merge":
        y = F.linear(x, k.factors.merge_weight(linear, x.dtype), bias)  # x (W + ΔW)^T + b
        h = k.linear.packed_lora_linear_h(x, linear) if h is None and save_h else h
    elif plan.name == "concat":
        beside = _beside(x.shape, x.dtype, linear, plan)
        if h is None and beside is not None:
            xh, h = k.linear.packed_lora_linear_h(x, linear, beside=beside)
            y = F.linear(xh, beside.whole(x.dtype), bias)  # [x | h | 0] [W | B̃ | 0]^T + b
        else:
            h = k.linear.packed_lora_linear_h(x, linear) if h is None else h
            wide = _side_by_side(linear.weight, block_diagonal(linear), x.dtype)  # [N, C]
            y = F.linear(_side_by_side(x, h, x.dtype), wide, bias)
    else:
        h = k.linear.packed_lora_linear_h(x, linear) if h is None else h
        y = F.linear(x, linear.weight.to(x.dtype), bias)
        for h_p, B_p, (start, stop) in zip(h.chunk(len(linear.rows), 1), linear.Bs, linear.rows, strict=True):
            y[:, start:stop].addmm_(h_p, B_p.mT)
    y = add_residual(y, residual)
    return y, h.contiguous() if h is not None and save_h else x.new_empty(0, linear.rank)


def _linear_bwd(
    dY: Tensor,  # [M, N]
    source: Source,  # gives x [M, K]
    h: Tensor,  # [M, P r]
    linear: AdaptedLinear,
    needs: Needs,
    plan: plans.Plan,
) -> tuple[Any, Any, Any]:  # dX [M, K], dÃ [P, r, K] or of one [r, K], dB̃ [P, D, r]; unused where not needed
    k, linear, dropping = kernels(), _stacked(linear), linear.dropout_p > 0
    h, dtype, dX, dA = h.contiguous(), source.dtype, None, None
    inside = needs.x and plan.name == "fused" and plan.h == "inside"
    if inside and len(linear.rows) == 1 and dY.shape[0] > 0:
        x, _, _, norm, activation = _da_source(source, h, linear)
        wanted = {"compute_dA": needs.A, "compute_dB": needs.B}
        kind = {"norm": norm, "activation": activation}
        return k.linear_bwd.packed_lora_linear_bwd(dY, x, h, linear, tiles=plan.tiles, **wanted, **kind)
    if inside:
        dX, g = k.linear.packed_lora_linear_dx(dY, linear, None, tiles=plan.tiles)
        if needs.A and needs.B:
            dA, dB = k.reductions.packed_lora_linear_grads(_da_source(source, g, linear), (dY, h, linear))
            return dX, dA, dB
        _, dB = k.reductions.packed_lora_linear_db(dY, h, linear, compute_g=False, compute_dB=needs.B)
    else:
        beside = needs.x and plan.name == "concat" and not dropping
        outputs = {"compute_g": needs.x or needs.A, "compute_dB": needs.B, "beside": beside}
        g, dB, *packed = k.reductions.packed_lora_linear_db(dY, h, linear, **outputs)
        if beside:
            A, W = k.activation.flat_factors(linear), k.launch.cast(linear.weight, dtype)  # [P r, K], [N, K]
            zeros = A.new_zeros(packed[0].shape[1] - len(W) - len(A), A.shape[1])
            dX = packed[0] @ torch.cat([W, A, zeros] if len(zeros) else [W, A])  # [dY | g | 0] [W ; Ã ; 0]
        elif needs.x and plan.name == "merge":
            dX = dY @ k.factors.merge_weight(linear, dtype)  # dY (W + ΔW)
        elif needs.x and plan.name == "addmm" and not dropping:
            dX = input_grad(dY, g, linear, plan.name, dtype)
        elif needs.x:  # a dropout mask stands between g Ã and the sum, whatever the plan
            dX, _ = k.linear.packed_lora_linear_dx(dY, linear, g, tiles=plan.tiles)
    if needs.A:
        dA = _factor_grad(source, g, linear)
    return dX, dA, dB


def _product_grads(dX: Any, dA: Any, dB: Any, linear: AdaptedLinear, needs: Needs) -> ProductGrads:
    """The gradients of a product from dX [M, K], dÃ [P, r, K] and dB̃ [P, D, r]; dÃ of one adapter may be [r, K]."""
    nothing: list[Tensor | None] = [None] * len(linear.rows)
    As = nothing if not needs.A else [dA] if dA.dim() == 2 else dA.unbind()
    return ProductGrads(dX if needs.x else None, As, dB.unbind() if needs.B else nothing)


def _factor_grad(source: Source, g: Tensor, linear: AdaptedLinear) -> Tensor:  # g [M, P r] to dÃ [P, r, K]
    """`dÃ = g^T drop(x)`; a norm or an activation is computed again inside the kernel."""
    x, g, linear, norm, activation = _da_source(source, g, linear)
    return kernels().reductions.packed_lora_linear_da(x, g, linear, norm=norm, activation=activation)


def _da_source(source: Source, g: Tensor, linear: AdaptedLinear) -> Any:
    norm = (source.mean, source.rstd, *source.norm[:2]) if isinstance(source, Normed) else None
    activation = source.activation if isinstance(source, Activated) else None
    x = source if isinstance(source, Tensor) else source.input
    return kernels().reductions.Source(x, g, linear, norm, activation)


def _plan(shape: Sequence[int], dtype: torch.dtype, device: torch.device, linear: AdaptedLinear) -> plans.Plan:
    """The plan for the product of an x of this shape, dtype and device."""
    plan = plans.choose_for_shape(shape, dtype, device, linear, "triton")
    if plan.h != "inside":
        return plan
    rank = linear.As[0].shape[0]
    fits = linear.columns is None and kernels().linear.fits_inside(rank, dtype, linear.dropout_p)
    return plan if fits else plan._replace(h="given")


def _stacked(linear: AdaptedLinear) -> AdaptedLinear:
    """The record with all As in one tensor [P, r, K], and all Bs in one [P, D, r], for several launches.

    That of a single adapter stays as it is.
    """
    if len(linear.rows) == 1:
        return linear
    As: Any = kernels().launch.stacked(linear.As)
    Bs: Any = kernels().launch.stacked(linear.Bs)
    weight, bias, _, _, rows, dropout_p, seeds, save_h, precision, columns = linear
    return AdaptedLinear(weight, bias, As, Bs, rows, dropout_p, seeds, save_h, precision, columns)


def _starts(linear: AdaptedLinear) -> list[int]:
    return [start for start, _ in linear.rows]


def _side_by_side(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`[left | right | 0]`, rows starting on 16 bytes as cuBLAS wants them."""
    whole = left.new_empty(len(left), kernels().beside.width(left.shape[1], right.shape[1]), dtype=dtype)
    whole[:, : left.shape[1]], end = left, left.shape[1] + right.shape[1]
    whole[:, left.shape[1] : end] = right
    whole[:, end:].zero_()
    return whole


def _is_registered(first: Tensor, *others: Tensor | None) -> bool:
    """Whether a call goes through its registered operation.

    Something may follow the operations; or a tensor is one that a kernel could not read, and that torch's dispatcher
    turns into memory (a view that negates) or the operation's checks refuse.
    """
    if is_dispatched(first):
        return True
    for tensor in (first, *others):
        if tensor is None:
            continue
        if type(tensor) not in PLAIN or tensor.is_neg() or tensor.layout is not torch.strided:
            return True
        if tensor.data_ptr() == 0 and tensor.numel() > 0:
            return True
    return False


def _has_memory(tensor: Tensor) -> bool:
    return tensor.data_ptr() != 0 or tensor.numel() == 0


# The checks of `functional` again, in fewer words: anybody may call a registered operation, and a kernel reads past the
# end of a tensor that does not fit.


def _check_linear(x: Tensor, linear: AdaptedLinear) -> None:
    weight, bias, As, Bs = linear.weight, linear.bias, linear.As, linear.Bs
    rows, p, seed = linear.rows, linear.dropout_p, linear.seed
    if not 1 <= len(As) == len(Bs) == len(rows):
        raise ValueError(
            f"As, Bs, starts have lengths {len(As)}, {len(Bs)}, {len(rows)}, expected equal ones of at least 1"
        )
    A, B = As[0].shape, Bs[0].shape
    fits = x.dim() == weight.dim() == len(A) == len(B) == 2 and x.shape[1] == weight.shape[1] == A[1] > 0
    fits = fits and A[0] == B[1] > 0 and all(other.shape == A for other in As) and all(other.shape == B for other in Bs)
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = _shapes([x, weight, *As, *Bs, *([] if bias is None else [bias])])
        raise ValueError(
            f"x, weight, As, Bs, bias have shapes {shapes}, expected [M, K], [N, K], each [r, K], each [D, r], [N]"
        )
    check_device(x, weight, bias, *As, *Bs, seed)
    _check_memory(x, weight, bias, *As, *Bs, seed)
    _check_dtype(x.dtype, *As, *Bs)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected a floating-point one")
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p={p}, expected a probability in [0, 1)")
    if p > 0 and (seed is None or seed.shape != (1,) or seed.dtype != torch.int64):
        raise ValueError(f"seed={seed} with dropout_p={p}, expected an int64 tensor of shape [1]")
    if linear.precision not in ("exact", "fast"):
        raise ValueError(f"precision={linear.precision!r}, expected 'exact' or 'fast'")


def _check_memory(*tensors: Tensor | None) -> None:
    """Each is strided, and its storage was not given back."""
    for tensor in tensors:
        if tensor is not None and (tensor.layout is not torch.strided or not _has_memory(tensor)):
            raise ValueError(f"a tensor {list(tensor.shape)} is {tensor.layout} or has no memory, expected a dense one")


def _check_dtype(dtype: torch.dtype, *tensors: Tensor) -> None:
    if dtype not in DTYPES or [tensor for tensor in tensors if tensor.dtype != dtype]:
        dtypes = [dtype, *(tensor.dtype for tensor in tensors)]
        raise ValueError(f"tensors have dtypes {dtypes}, expected one of {DTYPES}")


def _shapes(tensors: Sequence[Tensor]) -> list[list[int]]:
    return [list(tensor.shape) for tensor in tensors]


def _record(
    weight: Tensor,
    bias: Tensor | None,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    starts: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
    save_h: bool,
    precision: str,
) -> AdaptedLinear:
    """The record that a registered operation was called with, in the order of its schema."""
    if len(starts) != len(Bs):
        raise ValueError(f"Bs, starts have lengths {len(Bs)}, {len(starts)}, expected equal ones")
    rows = [(start, start + len(B)) for start, B in zip(starts, Bs, strict=True)]
    return AdaptedLinear(weight, bias, As, Bs, rows, dropout_p, [] if seed is None else [seed], save_h, precision)


def _packed_lora_linear_fwd(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    linear = _record(*arguments)
    _check_linear(x, linear)
    return _linear_fwd(x, linear, None, None, _plan(x.shape, x.dtype, x.device, linear))


def _packed_lora_linear_bwd(
    dY: Tensor, x: Tensor, h: Tensor, weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    As, Bs, starts, dropout_p, seed, needs, precision = arguments
    linear = _record(weight, None, As, Bs, starts, dropout_p, seed, True, precision)
    _check_linear(x, linear)
    check_device(x, dY, h)
    _check_memory(dY, h)
    _check_dtype(x.dtype, dY, h)
    h_shape = (x.shape[0], len(linear.As) * len(linear.As[0]))
    if dY.shape != (x.shape[0], len(weight)) or len(needs) != 3 or (needs[2] and h.shape != h_shape):
        raise ValueError(
            f"dY {list(dY.shape)}, h {list(h.shape)}, needs={list(needs)}, expected [M, N], [M, P r] and three"
        )
    plan = _plan(x.shape, x.dtype, x.device, linear)
    computed = zip(_linear_bwd(dY, x, h, linear, Needs(*needs), plan), needs, strict=True)
    dX, dA, dB = (tensor if needed else x.new_empty(0) for tensor, needed in computed)  # no aliases of each other
    return dX, dA.unsqueeze(0) if dA.dim() == 2 else dA, dB


def _fold_factors(
    factors: Sequence[Tensor],
    bases: Sequence[Tensor | None],
    complement: Sequence[bool],
    output_side: Sequence[bool],
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    if not 1 <= len(factors) == len(bases) == len(complement) == len(output_side):
        raise ValueError(
            f"factors, bases, complement, output_side have lengths {len(factors)}, {len(bases)}, {len(complement)}, "
            f"{len(output_side)}, expected equal ones of at least 1"
        )
    check_device(*factors, *bases)
    _check_dtype(factors[0].dtype, *factors)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}, expected one of {DTYPES}")
    return kernels().factors.fold_factors(factors, bases, complement, output_side, scaling, dtype)


def _packed_lora_linear_fwd_shape(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    linear = _record(*arguments)
    check_device(x, *linear.tensors())
    M = x.shape[0]  # not len(x), which torch.compile would take for a constant
    return x.new_empty(M, len(linear.weight)), x.new_empty(M if linear.save_h else 0, linear.rank)


def _packed_lora_linear_bwd_shape(
    dY: Tensor, x: Tensor, h: Tensor, weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    As, Bs, starts, dropout_p, seed, needs, precision = arguments
    linear = _record(weight, None, As, Bs, starts, dropout_p, seed, True, precision)
    check_device(x, dY, h, *linear.tensors())
    shapes = (x.shape, (len(linear.As), *linear.As[0].shape), (len(linear.Bs), *linear.Bs[0].shape))
    dX, dA, dB = (x.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, needs, strict=True))
    return dX, dA, dB


def _fold_factors_shape(
    factors: Sequence[Tensor],
    bases: Sequence[Tensor | None],
    complement: Sequence[bool],
    output_side: Sequence[bool],
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    check_device(*factors, *bases)
    return factors[0].new_empty((sum(factor.numel() for factor in factors),), dtype=dtype)


for _name, _compute, _shape in (
    ("packed_lora_linear_fwd", _packed_lora_linear_fwd, _packed_lora_linear_fwd_shape),
    ("packed_lora_linear_bwd", _packed_lora_linear_bwd, _packed_lora_linear_bwd_shape),
    ("fold_factors", _fold_factors, _fold_factors_shape),
):
    _LIBRARY.impl(_name, _compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"complora_triton::{_name}", _shape, lib=_LIBRARY)
