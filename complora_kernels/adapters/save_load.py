"""`save_adapter` and `load_adapter`: an adapter as two files that any LoRA implementation understands.

What is saved are the folded factors `Ã = A P_in` and `B̃ = P_out B`, without the scaling: an ordinary LoRA of the same
function. Raw factors under the same names would load elsewhere and silently compute something else.

Bases are computed from the base weights again when an adapter is loaded. Those of activations cannot be: they are saved
in a third file, which this package alone reads.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from complora_kernels import functional, subspace
from complora_kernels.adapters import base_weights
from complora_kernels.adapters.build import (
    adapt,
    adapted_layers,
    adapted_model,
    build_layers,
    check_wrappers,
    find_targets,
    is_adapted,
)
from complora_kernels.adapters.files import (
    FORMAT_VERSION,
    WEIGHTS_FILE,
    blaming,
    module_pattern,
    peft_fields,
    peft_key,
    read_adapter,
    read_bases,
    replaced_adapter,
    write_adapter,
)
from complora_kernels.adapters.install import Replacement, install
from complora_kernels.common.changes import Changes
from complora_kernels.common.wrappers import named_modules
from complora_kernels.config import ATTENTION_TARGETS, CompLoRAConfig
from complora_kernels.integrations import find
from complora_kernels.modules.layer import CompLoRALayer
from complora_kernels.modules.protected import PROJECTED_SIDES

Model = TypeVar("Model", bound=nn.Module)
FactorPairs = dict[str, tuple[Tensor, Tensor]]  # by module: Ã [r, in] and B̃ [out, r]
Bases = dict[tuple[str, subspace.Side], subspace.Basis]  # by module and side

PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
LOST = 1e-4  # the most of its norm that a loaded factor may lose: rounding loses a few 1e-6, other bases a few percent


class AdaptedWeight(NamedTuple):
    """One adapted weight of a layer: "" in a linear layer, q, k, v or o in attention."""

    layer: CompLoRALayer
    name: str


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into `directory`, which is made if needed.

    The factors are saved folded, in their own dtype (float32), as PEFT's `base_model.model.<path>.lora_A.weight`; in
    attention the path ends in q_proj, k_proj, v_proj or out_proj, whatever the library. Stock PEFT reads the adapter
    where modules of these names are called; for `nn.MultiheadAttention` use `export_peft`. A merged model is saved as
    if it were not.

    Names are those of the model that `apply_complora` was given, without what is around it: torch.compile's wrapper,
    DataParallel, DistributedDataParallel, AveragedModel, or a container that holds it, such as a LightningModule. The
    files load into that model, with or without them.

    With `subspace_source="activations"` the bases are written too, as `adapter_bases-<digest>.safetensors`: 4·d·k bytes
    for each projected side of a weight, with d - k for k where that is less. Only `load_adapter` reads it.

    An adapter that is there already is replaced as a whole: the files are written and synced beside it, then moved
    into place, bases and configuration first and weights last. A call that fails leaves the old one. A process that is
    killed leaves the old one or the new one, and a folder `.saving-…` to delete. Between the moves it leaves old
    weights beside a new configuration: `load_adapter` then loads the old adapter, with a warning; PEFT would not
    notice.

    Raises:
        OSError: `directory` cannot be written to; or the new adapter is in place, as the message then says, but the
            system did not confirm that it is on the disk.
        ValueError: `model` has no adapter, is a part of an adapted model or holds several, its layers differ in
            configuration, or a factor holds NaN or infinity or is not whole (sharded).

    Warns:
        UserWarning: other parameters are trained too, and are not in the files.
    """
    part = adapted_model(model)
    layers = adapted_layers(part)
    config = common_config(layers)
    weights = adapted_weights(layers)
    with replaced_adapter(directory) as staging:
        factors = folded_factors(weights)
        bases = own_bases(weights) if config.protects_activations else {}
        described = _adapter_config(config, weights, find(part).activations(part), bases)
        matrices = {_basis_key(*key): basis.matrix for key, basis in bases.items()}
        warn_of_trained(model)
        write_adapter(staging, described, factor_tensors(factors), matrices)


def load_adapter(model: Model, directory: str | os.PathLike[str], *, progress: bool = True) -> Model:
    """Loads what `save_adapter` wrote; a plain model is adapted first, with the configuration of the adapter.

    The model then computes exactly the saved update, also when its weights are a half-precision copy of those that the
    adapter was trained on: bases computed from rounded weights are turned until they leave the factors as they are. The
    bases of activations are the saved ones, whatever those of an adapted model were.
    Everything is checked before the model is changed, and if anything fails it stays as it was.

    The files need not be trusted: they run no code and no regular expression (the names in them say what is adapted),
    and sizes are compared before memory is taken.

    Args:
        model: plain, or adapted with the same configuration and not merged; or a wrapper around it (see
            `save_adapter`), or a container that holds it as the only part with modules of the saved names.
        directory: written by `save_adapter`.
        progress: show a progress bar while weights are decomposed, as `apply_complora`.

    Returns:
        The same model. Its raw factors are now the saved ones, trainable.

    Raises:
        FileNotFoundError: a file is missing, that of the bases too where they are those of activations.
        ValueError: a file is truncated or was changed, or contradicts itself; the adapter is for another configuration,
            rank, set of layers or model, or was trained on other base weights; it holds NaN or infinite values; the
            subspaces that it declares leave no room for its update; or, of a plain model, as `apply_complora`.
        RuntimeError: the adapter in the model is merged.
    """
    saved, tensors = read_adapter(directory)
    with blaming(directory):
        config = CompLoRAConfig.from_dict(saved["complora"]["config"])
        paths = saved["complora"]["base_weights"].keys()
        part = adapted_model(model) if is_adapted(model) else _plain_model(model, paths)
        weights = weights_to_fill(part, config, paths)
        factors = _to_factors(tensors, weights)
        check_factors(factors, weights, config)
        _check_base_weights(saved["complora"]["base_weights"], weights)
        _check_activations(saved["complora"]["activations"], find(part).activations(part))
        bases = _saved_bases(directory, saved, weights) if config.protects_activations else None
        fill_adapter(part, config, factors, bases, progress=progress)
    return model


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
def folded_factors(weights: dict[str, AdaptedWeight]) -> FactorPairs:
    """`Ã` [r, in] and `B̃` [out, r] of each weight, without the scaling.

    Raises:
        ValueError: one holds NaN or infinite values, or is not whole.
    """
    folded: FactorPairs = {}
    for path, (layer, name) in weights.items():
        A, B = layer.factors(name)
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != layer.config.r or B.shape[1] != layer.config.r:
            raise ValueError(
                f"{path} has factors of shapes {tuple(A.shape)} and {tuple(B.shape)}, expected [r, in] and [out, r] "
                f"with r={layer.config.r}: gather sharded parameters first (FSDP.summon_full_params)"
            )
        folded_A, folded_B = _project(A, layer.basis(name, "input")), _project(B.mT, layer.basis(name, "output")).mT
        _check_update(path, folded_A, folded_B, layer.config.scaling)
        folded[path] = (folded_A, folded_B)
    return folded


def warn_of_trained(model: nn.Module) -> None:
    """Warns of what is trained beside the adapters: it is in none of the files."""
    trained = {
        f"{path}.{name}" if path else name: parameter
        for path, module in named_modules(model)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    }
    for path, layer in adapted_layers(model).items():
        weights = {rows.parameter for rows in layer.weights.values()}  # frozen, or an error, as their biases are
        biases = {weight.replace("weight", "bias") for weight in weights}
        for name, _ in layer.named_parameters():
            if name in weights | biases or name.startswith(("lora_A", "lora_B")):
                trained.pop(f"{path}.{name}" if path else name, None)
    if trained:
        warnings.warn(
            f"{_listed(trained)} require a gradient and are no part of the adapter: they are not saved with it. Save "
            "them yourself, or freeze what is not trained",
            stacklevel=3,
        )


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

    `paths` is for `find_targets`. Factors and bases of the weights of a plain model are not those of `config`: nothing
    of the size that it asks for is made.

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
    """Raises ValueError unless the pair of each weight has the right shapes and is a finite update."""
    for path, (layer, name) in weights.items():
        out_features, in_features = layer.original_weight(name).shape
        shapes = tuple(tuple(factor.shape) for factor in factors[path])
        expected = ((config.r, in_features), (out_features, config.r))
        if shapes != expected:
            raise ValueError(
                f"{path} has factors A and B of shapes {shapes[0]} and {shapes[1]}, expected {expected[0]} and "
                f"{expected[1]}: the adapter is for another rank or model"
            )
        A, B = (factor.to(layer.factors(name)[0].dtype) for factor in factors[path])
        _check_update(path, A, B, config.scaling)


def fill_adapter(
    model: Model, config: CompLoRAConfig, factors: FactorPairs, bases: Bases | None = None, *, progress: bool
) -> Model:
    """Adapts `model` where it is plain, and sets factors that `check_factors` has accepted, and `bases` where given."""
    changes = Changes()
    if is_adapted(model):
        layers = adapted_layers(model)
    else:
        replacements = build_layers(model, config, factors, progress=progress)
        install(model, replacements, changes)
        layers = _by_path(model, replacements)
    weights = adapted_weights(layers)
    for key, basis in (own_bases(weights) if bases is None else bases).items():
        path, side = key
        layer, name = weights[path]
        layer.set_basis(name, side, _aligned_basis(basis, path, side, factors[path]), changes)
    own = [factor for layer, name in weights.values() for factor in layer.factors(name)]
    changes.copy(own, [factor for path in weights for factor in factors[path]])
    changes.make()
    return model


def _adapter_config(
    config: CompLoRAConfig, weights: dict[str, AdaptedWeight], activations: dict[str, str], bases: Bases
) -> dict[str, Any]:
    from complora_kernels import __version__

    attention = [path for path, (_, name) in weights.items() if name]
    # Where q_proj, k_proj, v_proj are no modules PEFT drops their factors without a word, but warns of this pattern.
    patterns = {"rank_pattern": {module_pattern(attention): config.r}} if attention else {}
    described = {"bases": _described_bases(bases)} if bases else {}
    return peft_fields(config, weights, **patterns) | {
        "complora": {
            "format_version": FORMAT_VERSION,
            "package_version": __version__,
            "config": config.to_dict(),
            "activations": activations,
            "base_weights": {
                path: base_weights.describe(layer.original_weight(name)) for path, (layer, name) in weights.items()
            },
            **described,
        }
    }


def _to_factors(tensors: dict[str, Tensor], weights: Iterable[str]) -> FactorPairs:
    keys = {path: (peft_key(path, "lora_A"), peft_key(path, "lora_B")) for path in weights}
    check_names(WEIGHTS_FILE, tensors, {key for pair in keys.values() for key in pair})
    return {path: (tensors[A], tensors[B]) for path, (A, B) in keys.items()}


def _project(factor: Tensor, basis: subspace.Basis | None) -> Tensor:
    if basis is None:
        return factor.detach()
    return functional.project_complement(factor, basis.matrix, basis_kind=basis.kind)


def own_bases(weights: dict[str, AdaptedWeight]) -> Bases:
    """The bases that the layers have."""
    return {
        (path, side): basis
        for path, (layer, name) in weights.items()
        for side in PROJECTED_SIDES[layer.config.sides]
        if (basis := layer.basis(name, side)) is not None
    }


def _described_bases(bases: Bases) -> dict[str, dict[str, Any]]:
    """What is to be known of each basis beside its matrix, by its key in the file."""
    return {
        _basis_key(*key): {"kind": basis.kind, "k": basis.k, "energy": basis.energy} for key, basis in bases.items()
    }


def _saved_bases(directory: str | os.PathLike[str], saved: dict[str, Any], weights: dict[str, AdaptedWeight]) -> Bases:
    """The bases that `save_adapter` wrote, in the dtype and on the device of the model's.

    Raises:
        FileNotFoundError, ValueError: as `load_adapter`.
    """
    tensors = read_bases(directory, saved)
    config = CompLoRAConfig.from_dict(saved["complora"]["config"])
    keys: list[tuple[str, subspace.Side]] = [(path, side) for path in weights for side in PROJECTED_SIDES[config.sides]]
    check_names("the file of the bases", tensors, [_basis_key(*key) for key in keys])
    bases = {}
    for path, side in keys:
        layer, name = weights[path]
        weight = layer.original_weight(name)
        key = _basis_key(path, side)
        described = saved["complora"]["bases"][key]
        d = weight.shape[0] if side == "output" else weight.shape[1]
        expected = (d, described["k"] if described["kind"] == "principal" else d - described["k"])
        if tuple(tensors[key].shape) != expected:
            raise ValueError(f"{key} has shape {tuple(tensors[key].shape)}, expected {expected}")
        matrix = tensors[key].to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        bases[path, side] = subspace.Basis(matrix, **described)
    return bases


def _basis_key(path: str, side: subspace.Side) -> str:
    return f"{path}.{side}_basis"


def _aligned_basis(
    basis: subspace.Basis, path: str, side: subspace.Side, factors: tuple[Tensor, Tensor]
) -> subspace.Basis:
    """The basis, turned so that folding leaves the factors of a weight as they are.

    Raises:
        ValueError: no basis of its size does.
    """
    A, B = factors
    factor = B.mT if side == "output" else A  # [r, d]
    aligned = basis._replace(matrix=subspace.align_basis(basis.matrix, factor, kind=basis.kind))
    wide, matrix = factor.cpu().double(), aligned.matrix.cpu().double()  # autocast and TF32 leave float64 alone
    lost = wide @ matrix  # [r, m]
    lost = lost if basis.kind == "principal" else wide - lost @ matrix.T
    if not lost.norm() <= LOST * wide.norm():
        raise ValueError(
            f"{path}: projecting the {side} side with k={basis.k} changes the saved factor by "
            f"{float(lost.norm() / wide.norm()):.2g} of its norm, expected at most {LOST}: the adapter was saved with "
            "other subspaces"
        )
    return aligned


def _plain_model(model: nn.Module, paths: Collection[str]) -> nn.Module:
    """`model` inside its wrappers, or the one part of a container that has modules for all these weights.

    Raises:
        ValueError: several parts of a container have; or a wrapper around the model has listed its parameters.
    """
    modules = dict(named_modules(model))
    prefixes = [""]
    if not _has_all(modules, "", paths):
        ends = tuple(f".{path}" for path in _module_paths(next(iter(paths))))
        candidates = {path[: -len(end)] + "." for path in modules for end in ends if path.endswith(end)}
        prefixes = sorted(prefix for prefix in candidates if _has_all(modules, prefix, paths)) or [""]
    names = [prefix.rstrip(".") for prefix in prefixes]
    if len(names) > 1:
        raise ValueError(f"the adapter fits {', '.join(names)} alike, expected one of these parts of the model")
    part = modules[names[0]]
    check_wrappers(model, {names[0] or "the model": part})
    return part


def _module_paths(path: str) -> list[str]:
    """The paths that the module of an adapted weight may have: a projection is a module only in some attentions."""
    parent, _, name = path.rpartition(".")
    return [path, parent] if parent and name in PROJECTIONS.values() else [path]


def _has_all(modules: dict[str, nn.Module], prefix: str, paths: Iterable[str]) -> bool:
    return all(any(prefix + module in modules for module in _module_paths(path)) for path in paths)


def _smallest_layers(
    model: nn.Module, config: CompLoRAConfig, paths: Collection[str] | None
) -> dict[str, CompLoRALayer]:
    """The layers that `config` would make of a plain model, but of rank 1 and without bases."""
    no_size: dict[str, Any] = {f"subspace_{name}": None for name in config.subspace_size}
    selection = ATTENTION_TARGETS if isinstance(config.target_modules, str) else config.target_modules
    smallest = dataclasses.replace(config, r=1, sides="none", target_modules=selection, **no_size)
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
    """Raises ValueError where `scaling · B A` overflows, of finite factors too."""
    with torch.autocast(A.device.type, enabled=False):
        delta = (scaling * B) @ A  # [out, in]
    if not torch.isfinite(delta).all():
        raise ValueError(f"the update of {path} holds NaN or infinite values, expected finite ones")


def _check_base_weights(saved: dict[str, base_weights.Description], weights: dict[str, AdaptedWeight]) -> None:
    """Raises ValueError naming the first weight that is not the one that the adapter was trained on."""
    for path, (layer, name) in weights.items():
        apart = base_weights.relative_distance(base_weights.describe(layer.original_weight(name)), saved[path])
        if not apart <= base_weights.TOLERANCE:
            raise ValueError(
                f"this adapter was trained on other base weights: {path} is about {apart:.2g} |W| away from what it "
                f"was then, expected at most {base_weights.TOLERANCE} (half-precision copies are within 0.004)"
            )


def _check_activations(saved: dict[str, str], own: dict[str, str]) -> None:
    """Raises ValueError where the model computes another function of the same weights."""
    if saved != own:
        raise ValueError(
            f"this adapter was trained with MLP activations {saved}, expected a model with them, got {own}"
        )


def _differences(first: CompLoRAConfig, second: CompLoRAConfig) -> str:
    a, b = first.to_dict(), second.to_dict()
    return ", ".join(f"{name}={a[name]!r} and {b[name]!r}" for name in a if a[name] != b[name])


def _listed(names: Iterable[str], limit: int = 4) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "nothing"
