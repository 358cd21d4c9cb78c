"""`save_adapter` and `load_adapter`: an adapter as two files that any LoRA implementation understands.

The files hold the folded factors `Ã = A P_in` and `B̃ = P_out B`, bounded where `update_bound` says so, without the
scaling: an ordinary LoRA of the same function. Raw factors under the same names would load elsewhere and silently
compute something else.

Bases are computed from the base weights again, when a loaded adapter is trained. Those of activations cannot be: they
are saved in a third file, which this package alone reads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from complora_kernels import subspace
from complora_kernels.adapters.build import (
    adapted_layers,
    adapted_model,
    check_name,
    check_wrappers,
    is_adapted,
    trained_tensors,
)
from complora_kernels.adapters.configuration import FORMAT_VERSION, module_pattern, peft_fields, peft_key, peft_name
from complora_kernels.adapters.factors import (
    PROJECTIONS,
    AdaptedWeight,
    Bases,
    FactorPairs,
    adapted_weights,
    check_factors,
    check_names,
    common_config,
    factor_tensors,
    file_factors,
    file_tensors,
    fill_adapter,
    own_bases,
    warn_of_trained,
    weights_to_fill,
)
from complora_kernels.adapters.files import WEIGHTS_FILE, read_adapter, read_bases, write_adapter
from complora_kernels.adapters.manage import require_single
from complora_kernels.adapters.replacement import replaced_adapter
from complora_kernels.adapters.several import active_adapters, add_from, in_folders, refuse_modules_to_save
from complora_kernels.adapters.whole_modules import check_whole_tensors, whole_modules, whole_tensors
from complora_kernels.common import base_weights
from complora_kernels.common.files import reading
from complora_kernels.common.sharded import has_shards, is_first_process
from complora_kernels.common.wrappers import named_modules
from complora_kernels.config import CompLoRAConfig
from complora_kernels.integrations import activations, describe
from complora_kernels.integrations.names import exchanged, library_of
from complora_kernels.modules.layer import CompLoRALayer
from complora_kernels.modules.protected import PROJECTED_SIDES
from complora_kernels.modules.several import DEFAULT

Model = TypeVar("Model", bound=nn.Module)


def save_adapter(
    model: nn.Module, directory: str | os.PathLike[str], *, adapter_names: Iterable[str] | None = None
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into `directory`, which is made if needed.

    Of several adapters it saves the active one into `directory` itself, whatever its name. With `adapter_names` it
    saves these, where PEFT writes them: the one called "default" into `directory` itself, each other one into the
    folder of its name within. All are written before the first is moved into place, but for sharded models.

    The factors are saved folded, in their own dtype (float32), as PEFT's `base_model.model.<path>.lora_A.weight`; in
    attention the path ends in q_proj, k_proj, v_proj or out_proj, whatever the library. Stock PEFT reads the adapter
    where modules of these names are called; for `nn.MultiheadAttention` use `export_peft`. A merged model is saved as
    if it were not. The modules of `modules_to_save` are saved as a whole, as `base_model.model.<path>.<tensor>`.

    Names are those of the model that `apply_complora` was given, without what is around it: torch.compile's wrapper,
    DataParallel, DistributedDataParallel, AveragedModel, or a container that holds it, such as a LightningModule. The
    files load into that model, with or without them.

    With `subspace_source="activations"` the bases are written too, as `adapter_bases-<digest>.safetensors`: 4·d·k bytes
    for each projected side of a weight, with d - k for k where that is less. Only `load_adapter` reads it.

    Of a model that `fully_shard` has sharded, every process calls this, and the first of them writes the files.

    An adapter that is there already is replaced as a whole: the files are written and synced beside it, then moved
    into place, bases and configuration first and weights last. A call that fails leaves the old one. A process that is
    killed leaves the old one or the new one, and a folder `.saving-…` to delete. Between the moves it leaves old
    weights beside a new configuration: `load_adapter` then loads the old adapter, with a warning; PEFT would not
    notice.

    Raises:
        OSError: `directory` cannot be written to; or the new adapter is in place, as the message then says, but the
            system did not confirm that it is on the disk.
        ValueError: `model` has no adapter, is a part of an adapted model or holds several, its layers differ in
            configuration, or a factor holds NaN or infinity or is not whole (FullyShardedDataParallel); or the active
            adapter is a weighted sum, or a name is unknown.

    Warns:
        UserWarning: other parameters are trained too, and are not in the files.
    """
    part = adapted_model(model)
    saved = in_folders(part, directory, adapter_names)
    if adapter_names is None:
        require_single(adapted_layers(part), "it cannot be saved as one adapter: adapter_names saves each")
    if not has_shards(part):
        with contextlib.ExitStack() as folders:
            staged = {folders.enter_context(replaced_adapter(path)): layers for path, layers in saved.items()}
            contents = [(staging, _content(part, layers)) for staging, layers in staged.items()]
            warn_of_trained(model)
            for staging, content in contents:
                write_adapter(staging, *content)
        return
    contents = {path: _content(part, layers) for path, layers in saved.items()}
    # All processes gather them together, whatever the first one finds at the directory.
    warn_of_trained(model)
    if is_first_process():
        for path, content in contents.items():
            with replaced_adapter(path) as staging:
                write_adapter(staging, *content)


def _content(
    part: nn.Module, layers: dict[str, CompLoRALayer]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """The configuration, the tensors and the bases that are saved of an adapter in these layers."""
    config, weights = common_config(layers), adapted_weights(layers)
    factors, trained = file_factors(weights), file_tensors(part, config)
    bases = {} if config.source.recomputable else own_bases(weights)
    described = _adapter_config(config, weights, activations(part), bases)
    if trained:
        shapes = {name: list(tensor.shape) for name, tensor in trained_tensors(part).items()}
        described["complora"]["modules_to_save"] = shapes
    matrices = {_basis_key(*key): basis.matrix for key, basis in bases.items()}
    return described, factor_tensors(factors) | trained, matrices


def load_adapter(
    model: Model, directory: str | os.PathLike[str], *, adapter_name: str | None = None, progress: bool = True
) -> Model:
    """Loads what `save_adapter` wrote; a plain model is adapted first, with the configuration of the adapter.

    With a new `adapter_name`, an adapted model gets a further adapter, as by `add_adapter`: it is not activated.

    The model then computes exactly the saved update, also when its weights are a half-precision copy of those that the
    adapter was trained on: bases computed from rounded weights are turned until they leave the factors as they are. The
    bases of activations are the saved ones, whatever those of an adapted model were.

    Bases are computed from the weights when something needs them: the first forward pass in which a factor gets a
    gradient (5 s for q, k, v of ViT-B/16 on two cores), or after something has written to a factor (other than through
    `.data`, which torch does not count), `subspace_report`, a raw state, torch.compile. Until then the saved factors,
    which are folded, are used as they are.

    Everything is checked before the model is changed, and if anything fails it stays as it was.

    The files need not be trusted: they run no code and no regular expression (the names in them say what is adapted),
    and sizes are compared before memory is taken.

    Args:
        model: plain, or adapted with the same configuration and not merged; or a wrapper around it (see
            `save_adapter`), or a container that holds it as the only part with modules of the saved names.
        directory: written by `save_adapter`; one that was saved by `adapter_names` lies in the folder of its name
            within, unless it is called "default".
        adapter_name: a name for the adapter; None is "default" in a plain model, else the active adapter.
        progress: show a progress bar while the base weights are compared with those that the adapter was trained on.

    Returns:
        The same model. Its raw factors and the modules of `modules_to_save` are now the saved ones, trainable.

    Raises:
        FileNotFoundError: a file is missing, that of the bases too where they are those of activations.
        OSError: a file cannot be read.
        ValueError: a file is truncated or was changed, or contradicts itself; the adapter is for another configuration,
            rank, set of layers or model, or was trained on other base weights; it holds NaN or infinite values; the
            subspaces that it declares leave no room for the rank of its update; a weighted sum of adapters is active;
            or, of a plain model, as `apply_complora`, with a new `adapter_name` as `add_adapter`.
        RuntimeError: the adapter in the model is merged.
    """
    if adapter_name is not None:
        check_name(adapter_name)
    if adapter_name is not None and is_adapted(model) and active_adapters(model) != {adapter_name: 1.0}:
        add_from(model, adapter_name, lambda view: _load(view, directory, DEFAULT, further=True, progress=progress))
    else:
        _load(model, directory, DEFAULT if adapter_name is None else adapter_name, further=False, progress=progress)
    return model


def _load(
    model: nn.Module, directory: str | os.PathLike[str], adapter_name: str, *, further: bool, progress: bool
) -> None:
    """`load_adapter` of the only adapter of a model, or of a further one into a plain view."""
    saved, tensors = read_adapter(directory)
    with reading(directory, "an adapter of this model", errors=ValueError):
        config = CompLoRAConfig.from_dict(saved["complora"]["config"])
        if further:
            refuse_modules_to_save(config)
        paths = saved["complora"]["base_weights"].keys()
        part = adapted_model(model) if is_adapted(model) else _plain_model(model, paths)
        if is_adapted(part):
            require_single(adapted_layers(part), "nothing can be loaded into it")
        _check_modules(part, paths)
        weights = weights_to_fill(part, config, paths)
        own = whole_tensors(whole_modules(part, config.modules_to_save, ()))
        factors, whole = _sorted(tensors, weights, own)
        check_factors(factors, weights, config)
        check_whole_tensors(whole, own)
        _check_base_weights(saved["complora"]["base_weights"], weights, progress=progress)
        _check_activations(saved["complora"]["activations"], activations(part))
        bases = None if config.source.recomputable else _saved_bases(directory, saved, weights)
        fill_adapter(part, config, factors, bases, whole, adapter_name=adapter_name)


def _adapter_config(
    config: CompLoRAConfig, weights: dict[str, AdaptedWeight], activation: dict[str, str], bases: Bases
) -> dict[str, Any]:
    from complora_kernels import __version__

    fields = peft_fields(config, weights)
    attention = [path for path, (_, name) in weights.items() if name and config.rank_of(path) == config.r]
    if attention:
        # PEFT drops factors of q_proj, k_proj, v_proj that are no modules without a word, but warns of this pattern.
        fields["rank_pattern"] |= {module_pattern(attention): config.r}
    described = {
        _basis_key(*key): {"kind": basis.kind, "k": basis.k, "energy": basis.energy} for key, basis in bases.items()
    }
    return fields | {
        "complora": {
            "format_version": FORMAT_VERSION,
            "package_version": __version__,
            "config": config.to_dict(),
            "activations": activation,
            "base_weights": {
                path: base_weights.describe(layer.original_weight(name)) for path, (layer, name) in weights.items()
            },
        }
        | ({"bases": described} if described else {})
    }


def _sorted(
    tensors: dict[str, Tensor], weights: Iterable[str], whole: Iterable[str]
) -> tuple[FactorPairs, dict[str, Tensor]]:
    """The factors of the weights in a file and the tensors of `modules_to_save`, by the names of the model."""
    keys = {path: (peft_key(path, "lora_A"), peft_key(path, "lora_B")) for path in weights}
    names = {name: peft_name(name) for name in whole}
    check_names(WEIGHTS_FILE, tensors, {key for pair in keys.values() for key in pair} | set(names.values()))
    factors = {path: (tensors[A], tensors[B]) for path, (A, B) in keys.items()}
    return factors, {name: tensors[key] for name, key in names.items()}


def _saved_bases(directory: str | os.PathLike[str], saved: dict[str, Any], weights: dict[str, AdaptedWeight]) -> Bases:
    """The bases that `save_adapter` wrote, on the model's device and in the dtype of its bases; errors as there."""
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
        matrix = tensors[key].to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        bases[path, side] = subspace.Basis(matrix, described["kind"], described["k"], described["energy"])
    return bases


def _basis_key(path: str, side: subspace.Side) -> str:
    return f"{path}.{side}_basis"


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


def _check_modules(model: nn.Module, paths: Collection[str]) -> None:
    """Raises ValueError where a model has none of the modules that an adapter is for: it is another one's."""
    modules = dict(named_modules(model))
    if not paths or any(module in modules for path in paths for module in _module_paths(path)):
        return
    first = next(iter(paths))
    library = library_of(first)
    named = f", as {library} names them" if library else ""
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    hint = "; export_peft and import_peft take it to another library's CLIP" if exchanged(first, modules) else ""
    raise ValueError(
        f"it adapts {first}{more}{named}, and the model has none of these: it is {describe(model)}. Expected the model "
        f"that it was trained on{hint}"
    )


def _check_base_weights(
    saved: dict[str, base_weights.Description], weights: dict[str, AdaptedWeight], *, progress: bool
) -> None:
    """Raises ValueError naming the first weight that is not the one that the adapter was trained on."""
    with tqdm(weights.items(), "comparing weights", unit="weight", delay=2, leave=False, disable=not progress) as bar:
        for path, (layer, name) in bar:
            apart = base_weights.relative_distance(base_weights.describe(layer.original_weight(name)), saved[path])
            if not apart <= base_weights.TOLERANCE:
                raise ValueError(
                    f"this adapter was trained on other base weights: {path} is about {apart:.2g} |W| away from what "
                    f"it was then, expected at most {base_weights.TOLERANCE} (half-precision copies are within 0.004)"
                )


def _check_activations(saved: dict[str, str], own: dict[str, str]) -> None:
    """Raises ValueError where the model computes another function of the same weights."""
    if saved != own:
        raise ValueError(
            f"this adapter was trained with MLP activations {saved}, expected a model with them, got {own}"
        )
