"""`import_peft`: the LoRA of a folder that PEFT wrote becomes the adapter of a plain model."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from typing import Any, TypeVar

from torch import nn

from complora_kernels.adapters.build import check_name, check_wrappers, find_targets, is_adapted
from complora_kernels.adapters.configuration import module_pattern, most_frequent
from complora_kernels.adapters.factors import check_factors, check_names, fill_adapter, weights_to_fill
from complora_kernels.adapters.manage import subspace_report
from complora_kernels.adapters.peft_folder import PeftFolder, read_peft
from complora_kernels.adapters.several import add_from, refuse_modules_to_save
from complora_kernels.adapters.whole_modules import check_whole_tensors, whole_modules, whole_tensors
from complora_kernels.common.files import reading
from complora_kernels.common.wrappers import named_modules, unwrap
from complora_kernels.config import TARGETS, TOWERS, CompLoRAConfig
from complora_kernels.integrations import Target
from complora_kernels.modules.several import DEFAULT

Model = TypeVar("Model", bound=nn.Module)

logger = logging.getLogger("complora_kernels")


def import_peft(
    model: Model,
    directory: str | os.PathLike[str],
    *,
    projected: CompLoRAConfig | None = None,
    adapter_name: str | None = None,
    progress: bool = True,
) -> Model:
    """Adapts a plain model with the LoRA that PEFT's `save_pretrained`, or `export_peft`, wrote to `directory`.

    It computes `y = x W^T + b + s · (x A^T) B^T` as PEFT does; A and B are those of the file, trainable. What
    `export_peft` wrote comes back as it was. Of an `nn.MultiheadAttention`, of a linear layer that holds q, k and v,
    such as a `qkv`, or where `target_parameters` name an `in_proj_weight`, PEFT has one A for q, k and v: each of
    the three gets a copy. The output projection of an `nn.MultiheadAttention` gets twice the B of the file, because
    PEFT (up to 0.21) adds that update twice, in training too. Modules of `modules_to_save` get the values of the file
    and are trainable. The names in the file may be those of another library with the same CLIP (`integrations.names`).

    With `projected`, A and B are the raw factors of a Comp-LoRA, whose projections remove what lies in the protected
    subspaces. `subspace_report` has the removed share of each weight's update, a log line the range of the shares.

    The files need not be trusted: they run no code and no regular expression, and sizes are compared before memory is
    taken.

    Args:
        model: in wrappers or not, as for `apply_complora`. One with an adapter gets a further one, under a new name,
            as by `add_adapter`: it is not activated.
        directory: a folder with `adapter_config.json` and `adapter_model.safetensors`. PEFT writes an adapter that is
            not called "default" into a folder of its name.
        projected: the sides and the subspace; its other fields are not looked at, the file has them. None gives plain
            LoRA, `sides="none"`.
        adapter_name: the name of the adapter; None is "default", in a plain model.
        progress: as `apply_complora`.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: one of the two files is missing.
        OSError: a file cannot be read.
        ValueError: the model has an adapter, and no new name is given; a file is damaged, contradicts itself or does
            not fit the model, or holds NaN or infinite values; or the adapter is more than LoRA on linear layers and
            attention: another method, DoRA or another variant, biases, replicated layers, embeddings, convolutions. The
            message names the file and what is wrong. The model is then as it was.
    """
    name = DEFAULT if adapter_name is None else adapter_name
    check_name(name)
    if not is_adapted(model):
        _import(model, directory, projected, name, further=False, progress=progress)
    elif adapter_name is None:
        raise ValueError("model has an adapter already, expected a plain model, or adapter_name for a further adapter")
    else:
        further = {"further": True, "progress": progress}
        add_from(model, adapter_name, lambda view: _import(view, directory, projected, DEFAULT, **further))
    return model


def _import(
    model: nn.Module,
    directory: str | os.PathLike[str],
    projected: CompLoRAConfig | None,
    adapter_name: str,
    *,
    further: bool,
    progress: bool,
) -> None:
    """`import_peft` into a plain model, or of a further adapter into a plain view."""
    plain = CompLoRAConfig(sides="none") if projected is None else projected
    if plain.protects_activations:
        raise ValueError("projected.subspace_source='activations', expected a source that needs no calibration batches")
    part = unwrap(model)
    folder = read_peft(directory, part)
    with reading(directory, "an adapter of PEFT for this model", errors=ValueError):
        modules = dict(named_modules(part))
        check_wrappers(model, {update.path: modules[update.path] for update in folder.updates})
        config = _config(model, folder, plain)
        if further:
            refuse_modules_to_save(config)
        weights = weights_to_fill(model, config, {update.weight for update in folder.updates})
        factors = {update.weight: (update.A, update.B) for update in folder.updates}
        check_names("the adapter", factors, weights)
        check_factors(factors, weights, config)
        check_whole_tensors(folder.whole, whole_tensors(whole_modules(part, config.modules_to_save, ())))
        fill_adapter(
            part,
            config,
            factors,
            whole=folder.whole,
            raw=projected is not None,
            adapter_name=adapter_name,
            progress=progress,
        )
    if projected is not None:
        removed = [row.removed for row in subspace_report(model)]
        logger.info(
            "the projections remove %.1f%% to %.1f%% of an imported update, see `removed` in subspace_report",
            100 * min(removed),
            100 * max(removed),
        )


def _config(model: nn.Module, folder: PeftFolder, projected: CompLoRAConfig) -> CompLoRAConfig:
    """The configuration of the folder, with the subspace of `projected`.

    Raises:
        ValueError: there is no update, or a value is out of its range.
    """
    if not folder.updates:
        raise ValueError("there is no update in the files, expected LoRA factors of at least one weight")
    r, rank_pattern = most_frequent({update.weight: update.r for update in folder.updates})
    lora_alpha, alpha_pattern = most_frequent({update.weight: update.lora_alpha for update in folder.updates})
    return dataclasses.replace(
        projected,
        r=r,
        lora_alpha=lora_alpha,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        lora_dropout=folder.fields["lora_dropout"],
        use_rslora=folder.fields["use_rslora"],
        modules_to_save=folder.modules_to_save,
        exclude_modules=None,
        **_selection(model, {(update.path, update.name) for update in folder.updates}),
    )


def _selection(model: nn.Module, weights: set[tuple[str, str]]) -> dict[str, Any]:
    """The fields of a configuration that select exactly these adapters, each by its layer's path and its name.

    Raises:
        ValueError: no fields do.
    """
    known: dict[tuple[str, str], tuple[str, str, int]] = {}  # the word, tower and layer that select an adapter alone
    for word, tower in itertools.product(TARGETS, TOWERS):
        for layer, target in enumerate(_targets(model, target_modules=(word,), towers=(tower,))):
            known |= {(target.path, name): (word, tower, layer) for name in target.weights}
    candidates: list[dict[str, Any]] = []
    if weights <= known.keys():
        places = [known[weight] for weight in weights]
        words, towers = tuple({word for word, *_ in places}), tuple({tower for _, tower, _ in places})
        layers = {each: tuple(sorted({layer for _, tower, layer in places if tower == each})) for each in towers}
        one = layers[towers[0]] if len(set(layers.values())) == 1 else layers
        candidates += [{"target_modules": words, "towers": towers, "layers": chosen} for chosen in (None, one)]
    paths = sorted({path for path, _ in weights})
    candidates.append({"target_modules": tuple(paths), "layers": None})
    for fields in candidates:
        if {(target.path, name) for target in _targets(model, **fields) for name in target.weights} == weights:
            return fields
    if not any(name for _, name in weights):
        return {"target_modules": module_pattern(paths), "layers": None}
    raise ValueError(
        "target_modules, towers and layers cannot select exactly what it adapts, expected the same projections in all "
        "adapted layers of every tower"
    )


def _targets(model: nn.Module, **selection: Any) -> list[Target]:
    try:
        return find_targets(model, CompLoRAConfig(sides="none", **selection))
    except ValueError:
        return []
