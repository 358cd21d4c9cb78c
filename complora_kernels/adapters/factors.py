"""The factors of an adapted model under the names of files: taken out, checked, and put into a model.

Files hold the folded factors `Ã = A P_in` and `B̃ = P_out B` without the scaling: an ordinary LoRA of the same function.
A weight has the path of its layer, in attention followed by `q_proj`, `k_proj`, `v_proj` or `out_proj`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from complora_kernels import functional, subspace
from complora_kernels.adapters.build import (
    adapt,
    adapted_layers,
    build_layers,
    check_room,
    compute_bases,
    find_targets,
    is_adapted,
    trained_tensors,
)
from complora_kernels.adapters.configuration import peft_key, peft_name
from complora_kernels.adapters.install import Replacement, install
from complora_kernels.adapters.whole_modules import check_finite, whole_modules, whole_tensors
from complora_kernels.common.changes import Changes
from complora_kernels.common.low_rank import widened
from complora_kernels.common.sharded import reshard, whole
from complora_kernels.common.wrappers import named_modules
from complora_kernels.config import ATTENTION_TARGETS, PROJECTIONS, CompLoRAConfig
from complora_kernels.modules.layer import CompLoRALayer
from complora_kernels.modules.protected import PROJECTED_SIDES, mark_folded
from complora_kernels.modules.several import DEFAULT
from complora_kernels.modules.update_limit import size_of_update

FactorPairs = dict[str, tuple[Tensor, Tensor]]  # by weight: Ã [r, in] and B̃ [out, r]
Bases = dict[tuple[str, subspace.Side], subspace.Basis]  # by weight and side


class AdaptedWeight(NamedTuple):
    """One adapted weight of a layer: "" in a linear layer, q, k, v or o in attention."""

    layer: CompLoRALayer
    name: str


def common_config(layers: dict[str, CompLoRALayer]) -> CompLoRAConfig:
    """The one configuration of all layers.

    Raises:
        ValueError: they differ.
    """
    (first, layer), *others = layers.items()
    for path, other in others:
        if other.config != layer.config:
            raise ValueError(
                f"{first} and {path} differ in configuration ({_differences(layer.config, other.config)}), expected "
                "one for the whole model, as apply_complora gives"
            )
    return layer.config


def adapted_weights(layers: dict[str, CompLoRALayer]) -> dict[str, AdaptedWeight]:
    """Every adapted weight by the name that files use: the layer's path, in attention with the projection's name."""
    return {
        f"{path}.{PROJECTIONS[name]}" if name else path: AdaptedWeight(layer, name)
        for path, layer in layers.items()
        for name in layer.weights
    }


@torch.no_grad()
def file_factors(weights: dict[str, AdaptedWeight]) -> FactorPairs:
    """`Ã` [r, in] and `B̃` [out, r] of each weight as files hold them: folded and bounded, but without the scaling.

    Raises:
        ValueError: one holds NaN or infinite values, or is not whole.
    """
    folded: FactorPairs = {}
    for path, (layer, name) in weights.items():
        A, B = map(whole, layer.factors(name))  # [r, in], [out, r]
        r = layer.config.rank_of(path)
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != r or B.shape[1] != r:
            raise ValueError(
                f"{path} has factors of shapes {tuple(A.shape)} and {tuple(B.shape)}, expected [r, in] and [out, r] "
                f"with r={r}: gather sharded parameters first (FSDP.summon_full_params)"
            )
        folded_A = _project(A, layer.projection(name, "input", A))
        folded_B = _project(B.mT, layer.projection(name, "output", B)).mT
        limit, scaling = layer.limit(name, A, B), layer.config.scaling_of(path)
        if limit is not None:
            norm = layer.config.update_bound_norm
            limits = [widened(limit) / scaling]
            (folded_A,), (folded_B,) = functional.bound_updates([folded_A], [folded_B], limits, norm=norm)
        _check_update(path, folded_A, folded_B, scaling)
        folded[path] = (folded_A, folded_B)
    return folded


def warn_of_trained(model: nn.Module) -> None:
    """Warns of parameters that are trained beside the adapters: none of the files holds them."""
    saved = {id(tensor) for tensor in trained_tensors(model).values()}
    trained = {
        f"{path}.{name}" if path else name: parameter
        for path, module in named_modules(model)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and id(parameter) not in saved
    }
    for path, layer in adapted_layers(model).items():
        weights = {rows.parameter for rows in layer.weights.values()}  # frozen, or an error, as their biases are
        biases = {weight.replace("weight", "bias") for weight in weights}
        for name, _ in layer.named_parameters():
            if name in weights | biases or name.startswith(("lora_A", "lora_B")):
                trained.pop(f"{path}.{name}" if path else name, None)
    if trained:
        warnings.warn(
            f"{_listed(trained)} require a gradient and are no part of the adapter: they are not saved with it. Name "
            "their modules in modules_to_save, save them yourself, or freeze what is not trained",
            stacklevel=3,
        )


def file_tensors(model: nn.Module, config: CompLoRAConfig) -> dict[str, Tensor]:
    """The tensors of `modules_to_save` of an adapter of this configuration under the names of the weights file.

    Raises:
        ValueError: one holds NaN or infinite values.
    """
    tensors = trained_tensors(model) if config.modules_to_save else {}
    check_finite(tensors)
    return {peft_name(name): whole(tensor) for name, tensor in tensors.items()}


def factor_tensors(factors: FactorPairs) -> dict[str, Tensor]:
    """The factors under the names of the weights file."""
    return {
        peft_key(path, factor): tensor
        for path, pair in factors.items()
        for factor, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
    }


def weights_to_fill(
    model: nn.Module, config: CompLoRAConfig, paths: Collection[str] | None = None
) -> dict[str, AdaptedWeight]:
    """The adapted weights of `model`, or those that `config` would give a plain one, which stays plain.

    `paths` is for `find_targets`. The weights of a plain model come in layers of rank 1 without bases, so that a
    configuration from a file takes no memory before its sizes are checked.

    Raises:
        ValueError: `config` is not that of the adapted model, or does not fit the plain one.
        RuntimeError: the adapter in the model is merged.
    """
    if not is_adapted(model):
        return adapted_weights(_smallest_layers(model, config, paths))
    layers = adapted_layers(model)
    merged = [path for path, layer in layers.items() if layer.merged]
    if merged:
        raise RuntimeError(f"{', '.join(merged)}: merged, expected an unmerged adapter: call unmerge_adapter first")
    own = common_config(layers)
    if own != config:
        raise ValueError(
            f"the model is adapted with another configuration than the file: {_differences(own, config)} "
            "(model, file); expected the same one, or a plain model"
        )
    return adapted_weights(layers)


def check_names(label: str, given: Iterable[str], expected: Iterable[str]) -> None:
    """Raises ValueError that lists what is missing and what is unexpected."""
    missing, unexpected = set(expected) - set(given), set(given) - set(expected)
    if missing or unexpected:
        raise ValueError(
            f"{label} does not fit the model: missing {_listed(missing)}, unexpected {_listed(unexpected)}; "
            "expected an adapter of the same rank, layer set and model"
        )


def check_factors(factors: FactorPairs, weights: dict[str, AdaptedWeight], config: CompLoRAConfig) -> None:
    """Raises ValueError unless the factors of each weight have the right shapes and make a finite update."""
    for path, (layer, name) in weights.items():
        out_features, in_features = layer.original_weight(name).shape
        shapes = tuple(tuple(factor.shape) for factor in factors[path])
        r = config.rank_of(path)
        expected = ((r, in_features), (out_features, r))
        if shapes != expected:
            raise ValueError(
                f"{path} has factors A and B of shapes {shapes[0]} and {shapes[1]}, expected {expected[0]} and "
                f"{expected[1]}: the adapter is for another rank or model"
            )
        A, B = (factor.to(layer.factors(name)[0].dtype) for factor in factors[path])
        _check_update(path, A, B, config.scaling_of(path))


def fill_adapter(
    model: nn.Module,
    config: CompLoRAConfig,
    factors: FactorPairs,
    bases: Bases | None = None,
    whole: dict[str, Tensor] | None = None,
    *,
    raw: bool = False,
    adapter_name: str = DEFAULT,
    progress: bool = False,
) -> None:
    """Adapts `model` where it is plain, and sets factors that `check_factors` has accepted, and `bases` where given.

    The bases, given or own, are turned until folding leaves the factors as they are; no weight is decomposed. `whole`
    are the tensors of `modules_to_save`, which `check_whole_tensors` has accepted. With `raw` the factors, for a plain
    model, are to be projected: bases are computed from its weights, and not turned.
    """
    changes = Changes()
    reshard(model)
    if is_adapted(model):
        layers = adapted_layers(model)
    else:
        replacements = build_layers(model, config, factors, adapter_name=adapter_name)
        if raw:
            compute_bases(replacements, progress=progress)
            check_room(replacements)
        install(model, replacements, changes)
        layers = _by_path(model, replacements)
    weights = adapted_weights(layers)
    for path, (layer, name) in weights.items():
        A, B = factors[path]
        for side in () if raw else PROJECTED_SIDES[config.sides]:
            given = None if bases is None else bases[path, side]
            layer.follow(name, side, B.mT if side == "output" else A, changes, given)
        if not raw and config.update_bound is not None:
            size = size_of_update(A, layer.scaling_of(name) * B, config.update_bound_norm)
            layer.follow_update(name, size, changes)
    own = [factor for layer, name in weights.values() for factor in layer.factors(name)]
    changes.copy(own, [factor for path in weights for factor in factors[path]])
    if whole:
        modules = whole_modules(model, config.modules_to_save, ())
        changes.copy([whole_tensors(modules)[name] for name in whole], list(whole.values()))
    changes.make()
    for factor in () if raw else own:
        mark_folded(factor)


def own_bases(weights: dict[str, AdaptedWeight]) -> Bases:
    """The bases that the layers have."""
    return {
        (path, side): basis
        for path, (layer, name) in weights.items()
        for side in PROJECTED_SIDES[layer.config.sides]
        if (basis := layer.basis(name, side)) is not None
    }


def _project(factor: Tensor, basis: subspace.Basis | None) -> Tensor:
    if basis is None:
        return factor.detach()
    return functional.project_complement(factor, basis.matrix, basis_kind=basis.kind)


def _smallest_layers(
    model: nn.Module, config: CompLoRAConfig, paths: Collection[str] | None
) -> dict[str, CompLoRALayer]:
    """The layers that `config` would make of a plain model, but of rank 1 and without bases."""
    no_size: dict[str, Any] = {f"subspace_{name}": None for name in config.subspace_size}
    nothing: dict[str, Any] = {"exclude_modules": None, "layers": None, "rank_pattern": {}, "update_bound": None}
    smallest = dataclasses.replace(config, r=1, sides="none", target_modules=ATTENTION_TARGETS, **nothing, **no_size)
    try:
        targets = find_targets(model, config, paths)
        return _by_path(model, [Replacement(*target[:2], adapt(target, smallest)) for target in targets])
    except ValueError as error:
        raise ValueError(f"the adapter does not fit the model: {error}") from error


def _by_path(model: nn.Module, replacements: list[Replacement]) -> dict[str, CompLoRALayer]:
    """The result of `adapted_layers` once these layers have taken the place of the modules that they adapt."""
    adapted = {module: layer for _, module, layer in replacements}
    return {path: adapted[module] for path, module in named_modules(model) if module in adapted}


def _check_update(path: str, A: Tensor, B: Tensor, scaling: float) -> None:
    """Raises ValueError where `scaling · B A` is not finite: the product of finite factors may overflow."""
    with torch.autocast(A.device.type, enabled=False):
        delta = (scaling * B) @ A  # [out, in]
    if not torch.isfinite(delta).all():
        raise ValueError(f"the update of {path} holds NaN or infinite values, expected finite ones")


def _differences(first: CompLoRAConfig, second: CompLoRAConfig) -> str:
    a, b = first.to_dict(), second.to_dict()
    return ", ".join(f"{name}={a[name]!r} and {b[name]!r}" for name in a if a[name] != b[name])


def _listed(names: Iterable[str], limit: int = 4) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "nothing"
