"""Work with an adapted model: its parameters, gradients and report; switching, merging and copying its adapter."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from complora_kernels import subspace
from complora_kernels.adapters.build import adapted_layers, adapted_model, all_layers, trained_tensors
from complora_kernels.common.changes import Changes
from complora_kernels.common.memory import sharing_memory
from complora_kernels.common.sharded import reshard, whole
from complora_kernels.modules.layer import CompLoRALayer, switched_off
from complora_kernels.modules.protected import PROJECTED_SIDES
from complora_kernels.modules.update_limit import size_of_update

LIMIT_ROUNDING = 1e-6  # a limit is kept in float32, and B̃ is rounded to it


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The factors A and B of every adapted weight, and the parameters of `modules_to_save`, to hand to an optimizer.

    Of several adapters they are those of the active one: after `set_adapter` an optimizer has to be made anew.

    Raises:
        ValueError: `model` has no adapter, or a weighted sum of several is active.
    """
    return iter([parameter for _, parameter in named_adapter_parameters(model)])


def named_adapter_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What the active adapter trains, by names in the plain model such as `visual...resblocks.0.attn.lora_A.q`.

    Raises:
        ValueError: `model` has no adapter, or a weighted sum of several is active.
    """
    layers = adapted_layers(model)
    require_single(layers, "it cannot be trained")
    factors = [
        (f"{path}.{name}" if path else name, parameter)
        for path, layer in layers.items()
        for name, parameter in layer.named_parameters()
        if name.startswith(("lora_A", "lora_B"))
    ]
    whole = trained_tensors(model).items()
    return factors + [(name, tensor) for name, tensor in whole if isinstance(tensor, nn.Parameter)]


def require_single(layers: dict[str, CompLoRALayer], reason: str) -> None:
    """Raises ValueError where a weighted sum of adapters is active."""
    layer = next(iter(layers.values()))
    if layer.combined:
        raise ValueError(
            f"the active adapters are the sum of {layer.active_adapters}, expected one: {reason}. "
            f"set_adapter(model, {next(iter(layer.active_adapters))!r}) goes on with that one"
        )


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints "trainable params: X || all params: Y || trainable%: Z", as PEFT does."""
    every = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"trainable params: {trainable:,} || all params: {every:,} || trainable%: {100 * trainable / every:.4f}")


def check_gradients(model: nn.Module) -> None:
    """Raises RuntimeError naming each adapter that the last backward pass gave no gradient; call it after the first.

    It finds an adapter that is silently ignored because the model reads its weight without calling its module. A
    gradient that is zero counts as one: A's is zero in the first step, because B still is.
    """
    require_unmerged(adapted_layers(model))
    missing = [name for name, parameter in named_adapter_parameters(model) if parameter.grad is None]
    if missing:
        raise RuntimeError(
            f"no gradient reached {', '.join(missing)}: expected one for every adapter after a backward pass. "
            "Is its tower part of the loss, and was the adapter not disabled?"
        )


@dataclass(frozen=True)
class SubspaceReport:
    """The protected subspace of one adapted weight, and how far training moved the weight.

    Attributes:
        path: the module's path, followed by .q, .k, .v or .o in attention.
        k: the number of protected directions on the widest projected side; 0 for plain LoRA.
        energy: the share of Σσ² inside the protected output directions (input directions with `sides="input"`); of the
            trace of Y^T Y (X^T X) with `subspace_source="activations"`.
        share: |ΔW - P_out ΔW P_in|² / |ΔW|², the share of the update inside the protected subspace; 0 up to rounding.
        relative_update: |ΔW| / |W|.
        basis_bytes: the memory of the bases.
        removed: |ΔR - ΔW|² / |ΔR|², the share of the raw factors' update ΔR = scaling · B A that lies in the protected
            subspace and that the projections remove.
        limit: what |ΔW| is bounded by, in the norm of `update_bound_norm`; None without `update_bound`.
        against_last: |ΔW|₂ / σ_k, the update's largest singular value against the last protected one of W; None where
            not both sides of at least one of W's own directions are protected.
        top_triples: U_k, V_k and their σ are singular triples of W + ΔW, whatever ΔW is. They are its top k, as they
            are W's, where its other singular values stay below σ_k: "guaranteed", because the limit is below
            σ_k - σ_{k+1}; "kept" by this ΔW; or "passed" by it. "" where `against_last` is None.
    """

    path: str
    k: int
    energy: float
    share: float
    relative_update: float
    basis_bytes: int
    removed: float
    limit: float | None
    against_last: float | None
    top_triples: Literal["guaranteed", "kept", "passed", ""]


@torch.no_grad()
def subspace_report(model: nn.Module) -> list[SubspaceReport]:
    """One row for each adapted weight, computed in float64 (Frobenius norms).

    With `sides="both"` it takes the singular values of each weight, 0.15 s for [768, 768] unless they are in memory.

    Raises:
        ValueError: `model` has no adapter.
    """
    return [_report(path, layer, name) for path, layer in adapted_layers(model).items() for name in layer.weights]


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes what it did before it was adapted, but for `modules_to_save`.

    Those are trained in place, and no copy of what they were is kept: they compute what they have learned.

    That holds on the thread that entered the context and on the threads of the backward passes that it starts. With
    activation checkpointing, call `backward` within the context too, because it computes the forward pass again.
    Contexts may be nested, and left in any order.

    Raises:
        ValueError: `model` has no adapter.
        RuntimeError: an adapter is merged into its weights; unmerge it first.
    """
    layers = all_layers(model)
    require_unmerged(layers)
    with switched_off(layers.values()):
        yield


def merge_adapter(model: nn.Module) -> None:
    """Adds every update to its frozen weight, `W ← W + ΔW` rounded once to W's dtype, and keeps the originals.

    The model then computes with plain layers; memory grows by the adapted weights until `unmerge_adapter`. Its state
    dict is that of a plain model with the update inside, plus the factors and a mark `lora_merged` for each layer: an
    adapted model, which would add the update again, refuses to load it. See also `merge_and_unload`.

    Of a model that `fully_shard` has sharded, every process calls this, and keeps its own part of the merged weights.

    All weights are merged or, when the call fails or is interrupted, none. The parameters stay the same objects and get
    other memory: a CUDA graph, or a tensor that shares memory with a weight, keeps the original values.

    Raises:
        ValueError: `model` has no adapter, an update holds NaN or infinite values, or an adapted weight shares memory
            with a parameter or a buffer of another module, from which it would part; no weight is then changed.
        RuntimeError: merged already.
    """
    layers = adapted_layers(model)
    require_unmerged(layers)
    changes = Changes()
    merge_layers(model, layers, changes)
    changes.make()


def merge_layers(
    model: nn.Module, layers: dict[str, CompLoRALayer], changes: Changes, *, safe_merge: bool = True
) -> None:
    """Merges these layers of `model`, as a part of `changes`; errors as `merge_adapter`."""
    reshard(model)
    _require_untied(model, layers)
    for path, layer in layers.items():
        try:
            layer.merge(changes, safe_merge=safe_merge)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def unmerge_adapter(model: nn.Module) -> None:
    """Puts the original weights back, bit for bit and in the memory that they had: all, or none when the call fails.

    Raises:
        ValueError: `model` has no adapter.
        RuntimeError: not merged.
    """
    layers = adapted_layers(model)
    _require_state(layers, merged=True)
    reshard(model)
    changes = Changes()
    for layer in layers.values():
        layer.unmerge(changes)
    changes.make()


def raw_adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Raw factors, bases and `modules_to_save` by name, for a checkpoint from which training goes on exactly.

    `save_adapter` is for use. Names are those of the model that was adapted, without the prefix of a container around
    it, as there.
    The tensors are the model's own: clone what must outlast the next step.

    Raises:
        ValueError: `model` has no adapter, holds several adapted models, or is a part of one.
    """
    part = _part_with_names(model)
    state: dict[str, Tensor] = {name: parameter.detach() for name, parameter in named_adapter_parameters(part)}
    state |= {name: tensor.detach() for name, tensor in trained_tensors(part).items()}
    for path, layer in adapted_layers(part).items():
        layer.compute_bases()
        own = layer.named_buffers(path, recurse=False)
        state |= {name: basis for name, basis in own if "_basis" in name[len(path) :]}
    return state


def load_raw_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """The inverse of `raw_adapter_state`, into a model that is adapted by the same configuration.

    Raises:
        ValueError: names or shapes differ; the model is then as it was.
    """
    own = raw_adapter_state(model)
    differing = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
    if differing:
        raise ValueError(
            f"state differs from the model's adapter in {', '.join(differing)}, expected the same names and shapes"
        )
    changes = Changes()
    changes.copy(list(own.values()), [state[name] for name in own])
    for path, layer in adapted_layers(_part_with_names(model)).items():
        prefix = f"{path}." if path else ""
        matrices = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        layer.describe_bases(matrices, changes)
    changes.make()


def _part_with_names(model: nn.Module) -> nn.Module:
    """The part of `model` from which names are counted: the model that was adapted, or a layer that stands alone."""
    return model if isinstance(model, CompLoRALayer) else adapted_model(model)


def _report(path: str, layer: CompLoRALayer, name: str) -> SubspaceReport:
    layer.compute_bases()  # and the limit
    weight = layer.original_weight(name).double()  # [out, in]
    delta = layer.get_delta_weight(name).double()  # [out, in]
    bases: dict[subspace.Side, subspace.Basis] = {}
    for side in PROJECTED_SIDES[layer.config.sides]:
        basis = layer.basis(name, side)
        assert basis is not None
        bases[side] = basis
    A, B = (whole(factor).double() for factor in layer.factors(name))  # [r, in], [out, r]
    raw = layer.scaling_of(name) * B @ A  # [out, in]
    left, kept = _project(delta, bases), _project(raw, bases)  # P_out ΔW P_in, P_out ΔR P_in [out, in]
    norm, limit = delta.norm(), layer.limit(name, *layer.factors(name))
    k = max((basis.k for basis in bases.values()), default=0)
    against_last, top_triples = None, ""
    if k > 0 and layer.config.sides == "both" and layer.config.subspace_source == "weight":
        sigma = [*subspace.singular_values(layer.original_weight(name)).tolist(), 0.0]  # σ_1, σ_2, ...
        against_last = _largest_singular_value(layer, name) / sigma[k - 1] if sigma[k - 1] > 0 else math.inf
        others = _project(weight + delta, bases)  # [out, in], W + ΔW without its triples U_k, V_k
        top_triples = "kept" if _is_below(others, sigma[k - 1]) else "passed"
        if limit is not None and float(limit) < (1 - LIMIT_ROUNDING) * (sigma[k - 1] - sigma[k]):
            top_triples = "guaranteed"
    return SubspaceReport(
        path=f"{path}.{name}" if name else path,
        k=k,
        energy=next((basis.energy for basis in bases.values()), 0.0),
        share=float((delta - left).norm() ** 2 / norm**2) if norm > 0 else 0.0,
        relative_update=float(norm / weight.norm()) if weight.norm() > 0 else 0.0,
        basis_bytes=sum(basis.matrix.nbytes for basis in bases.values()),
        removed=float((raw - kept).norm() ** 2 / raw.norm() ** 2) if raw.norm() > 0 else 0.0,
        limit=None if limit is None else float(limit),
        against_last=against_last,
        top_triples=top_triples,
    )


def _project(delta: Tensor, bases: dict[subspace.Side, subspace.Basis]) -> Tensor:
    """`P_out ΔW P_in` of the sides that have a basis."""
    for side, basis in bases.items():
        U = basis.matrix.double()
        inside = U @ (U.mT @ delta) if side == "output" else (delta @ U) @ U.mT  # [out, in]
        delta = delta - inside if basis.kind == "principal" else inside
    return delta


def _largest_singular_value(layer: CompLoRALayer, name: str) -> float:
    (A,), (B,) = layer.fold_factors((name,))
    return size_of_update(A, B, "spectral")


def _is_below(matrix: Tensor, sigma: float) -> bool:  # [out, in], float64
    """Whether all singular values are below `sigma`: where `sigma² I - M M^T` has a Cholesky decomposition."""
    M = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT  # [m, n], m <= n
    identity = torch.eye(len(M), dtype=M.dtype, device=M.device)
    return int(torch.linalg.cholesky_ex(sigma**2 * identity - M @ M.mT).info) == 0


def _require_untied(model: nn.Module, layers: dict[str, CompLoRALayer]) -> None:
    used = [
        (module, name, tensor)
        for module in model.modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    ]
    shared = {
        used[one][:2]
        for pair in sharing_memory([tensor for *_, tensor in used])
        for one, other in (pair, pair[::-1])
        if used[one][0] is not used[other][0]
    }
    parameters = sorted({(path, rows.parameter) for path, layer in layers.items() for rows in layer.weights.values()})
    tied = []
    for path, parameter in parameters:
        owner, _, name = parameter.rpartition(".")
        if (layers[path].get_submodule(owner), name) in shared:
            tied.append(f"{path}.{parameter}")
    if tied:
        raise ValueError(
            f"{', '.join(tied)}: tied to a parameter of another module or to a buffer, whose memory it shares; "
            "expected weights of their own"
        )


def require_unmerged(layers: dict[str, CompLoRALayer]) -> None:
    """Raises RuntimeError where an adapter is merged into its weight."""
    _require_state(layers, merged=False)


def _require_state(layers: dict[str, CompLoRALayer], *, merged: bool) -> None:
    wrong = [path for path, layer in layers.items() if layer.merged != merged]
    if wrong:
        state, call = ("not merged", "merge_adapter") if merged else ("merged", "unmerge_adapter")
        raise RuntimeError(f"{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} {state}: call {call} first")
