"""`apply_complora`: builds an adapted layer for every target, which changes nothing, and only then installs them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import TypeVar

from torch import Tensor, nn
from tqdm import tqdm

from complora_kernels.adapters.calibration import Calibrate, protect_activations, weight_moments
from complora_kernels.adapters.install import Replacement, install
from complora_kernels.adapters.whole_modules import whole_modules, whole_tensors
from complora_kernels.common.wrappers import inside, is_compiled, named_modules, registers_parameters, unwrap, wrappers
from complora_kernels.config import CompLoRAConfig
from complora_kernels.integrations import Target
from complora_kernels.integrations.selection import select
from complora_kernels.modules.layer import CompLoRALayer
from complora_kernels.modules.several import DEFAULT
from complora_kernels.subspace import Side

logger = logging.getLogger("complora_kernels")

Model = TypeVar("Model", bound=nn.Module)

BASE = "__base__"  # PEFT's name, in a batch of several adapters, for the plain model


def apply_complora(
    model: Model,
    config: CompLoRAConfig,
    *,
    adapter_name: str = DEFAULT,
    calibrate: Calibrate | None = None,
    progress: bool = True,
) -> Model:
    """Adapts `model` in place and freezes everything else; its outputs are unchanged before training.

    Trained are the new factors and what `config.modules_to_save` names.

    The targets become `CompLoRALinear`, `CompLoRAMultiheadAttention` or another `CompLoRALayer`, which share the
    original parameters under their old names. Each adapted weight is decomposed once (0.1 to 0.5 s for a [768, 768]
    weight on two cores; weights seen before come from a cache).

    With `subspace_source="activations"` the model runs on calibration batches before it is changed:

        ck.apply_complora(model, config, calibrate=lambda model: [model.encode_image(images) for images in batches])

    `calibration` says what of it counts. Later, `load_state_dict` of other base weights is an error, because the bases
    belong to the activations of these, and so is a state dict with other bases (it holds a fingerprint of each).

    Args:
        model: a CLIP model of a library that `complora_kernels.integrations` knows, or any model when
            `config.target_modules` is a regular expression; also one that torch.compile, DataParallel or AveragedModel
            wraps, as a whole or in parts: what is inside is adapted, under the names that it has there. Of a container,
            such as a LightningModule, pass the model in it.
        config: what to adapt and how.
        adapter_name: the name of the adapter; `add_adapter` adds others.
        calibrate: a function of the model that runs what is adapted (`encode_text` too, or only `encode_text`, where
            the text tower is) on some batches without labels; what it returns is not looked at. It is called once, with
            the model inside its wrappers, without gradients, in evaluation mode and without compiled code, and leaves
            torch's random generators as they were. Given with `subspace_source="activations"` and with no other.
        progress: show a progress bar on stderr once the work has taken two seconds.

    Returns:
        The same model. Its class, and those of its towers and blocks, become subclasses of the same names.

    Raises:
        ValueError: the model is adapted already, a target matched nothing or cannot be adapted, a layer index is out of
            range, k exceeds a weight or protects all of it, or a weight holds NaN; `modules_to_save` selects nothing,
            an adapted module or a tied one; `calibrate` is missing or has no use, did not reach an adapted weight, or
            gave it NaN or infinite values; a target is wrapped in DistributedDataParallel or FullyShardedDataParallel,
            which know only the parameters of the plain model, or is itself a compiled module; or `adapter_name` is
            no name that a file can have.
            The model is then as it was, also when `calibrate` itself fails.
    """
    if config.protects_activations != (calibrate is not None):
        raise ValueError(
            f"calibrate={calibrate!r} with subspace_source={config.subspace_source!r} and sides={config.sides!r}, "
            'expected a function of the model that runs calibration batches with subspace_source="activations" and '
            "projected sides, None otherwise"
        )
    check_plain(model)
    replacements = build_layers(model, config, adapter_name=adapter_name)
    compute_bases(replacements, progress=progress)
    if calibrate is not None:
        moments = weight_moments(unwrap(model), replacements, calibrate)
        protect_activations(replacements, moments, progress=progress)
    check_room(replacements)
    install(model, replacements)
    return model


def check_plain(model: nn.Module) -> None:
    """Raises ValueError where the model is adapted already."""
    if is_adapted(model):
        raise ValueError(
            "model has an adapter already, expected a plain model: Comp-LoRA is applied once, and add_adapter adds "
            "another adapter"
        )


def compute_bases(replacements: list[Replacement], *, progress: bool) -> None:
    """Computes the bases that can be computed from the weights."""
    with tqdm(replacements, "decomposing weights", unit="module", delay=2, leave=False, disable=not progress) as bar:
        for replacement in bar:
            replacement.layer.compute_bases()


def check_room(replacements: list[Replacement]) -> None:
    """Raises ValueError where a projection leaves nothing to train; warns where a rank is above that of the weight."""
    wide = []
    for _, _, layer in replacements:
        for name in layer.weights:
            label, (A, B) = layer.weight_name(name), layer.factors(name)
            lengths: dict[Side, int] = {"output": len(B), "input": A.shape[1]}
            for side, d in lengths.items():
                basis = layer.basis(name, side)
                if basis is not None and basis.k >= d:
                    raise ValueError(
                        f"{label}: {basis.k} of {d} {side} directions are protected, which leaves nothing to train: "
                        "expected a smaller subspace_k, subspace_energy or subspace_ratio"
                    )
            if len(A) > min(len(B), A.shape[1]):
                wide.append(f"{label} [{len(B)}, {A.shape[1]}]")
    if wide:
        logger.warning("r is above min(out, in), the highest rank of an update, for %s", ", ".join(wide[:4]))


def build_layers(
    model: nn.Module, config: CompLoRAConfig, paths: Collection[str] | None = None, *, adapter_name: str = DEFAULT
) -> list[Replacement]:
    """An adapted layer, without bases, for each target of `find_targets`, to be installed; the model stays as it is.

    Raises:
        ValueError: as `apply_complora`.
    """
    check_name(adapter_name)
    targets = find_targets(model, config, paths)
    replacements = [Replacement(target.path, target.module, adapt(target, config)) for target in targets]
    for _, _, layer in replacements:
        layer.active_adapters = {adapter_name: 1.0}
    return replacements


def check_name(adapter_name: str) -> None:
    """Raises ValueError for a name of an adapter that cannot be a part of a tensor's name and a folder's."""
    valid = isinstance(adapter_name, str) and adapter_name.strip() and not set(adapter_name) & set("./\\\0")
    if not valid or adapter_name == BASE:
        raise ValueError(
            f"adapter_name={adapter_name!r}, expected a name without '.', '/' and '\\', other than {BASE!r}, which is "
            "the plain model"
        )


def adapt(target: Target, config: CompLoRAConfig) -> CompLoRALayer:
    """The layer that takes the place of a target, which stays as it is.

    Raises:
        ValueError: it cannot be adapted.
    """
    try:
        return target.adapt(target.module, config, path=target.path)
    except TypeError as error:
        raise ValueError(str(error)) from None


def find_targets(model: nn.Module, config: CompLoRAConfig, paths: Collection[str] | None = None) -> list[Target]:
    """The modules that `config` selects in `model`, each once.

    With `paths`, those of them that a regular expression selected before: it is not matched again. One that comes from
    a file may take longer than anybody waits.

    Raises:
        ValueError: as `apply_complora`.
    """
    targets = select(model, config, paths)
    whole_modules(model, config.modules_to_save, [target.module for target in targets])
    check_targets(model, {target.path: target.module for target in targets})
    return targets


def check_targets(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Raises ValueError where a wrapper around or within `model` would go on with modules that are to be replaced."""
    check_wrappers(model, modules)
    compiled = {id(inside(wrapper)) for wrapper in wrappers(model) if is_compiled(wrapper)}
    for path, module in modules.items():
        if id(module) in compiled:
            raise ValueError(
                f"{path} is a compiled module, whose compiled code would go on calling the plain one: expected a plain "
                "module (compile it, or what it is a part of, when it is adapted)"
            )


def check_wrappers(model: nn.Module, modules: Mapping[str, nn.Module], done: str = "adapted") -> None:
    """Raises ValueError where a wrapper around or within `model` has listed the parameters of one of its modules."""
    for wrapper in filter(registers_parameters, wrappers(model)):
        parts = {id(module) for module in wrapper.modules()}
        path = next((path for path, module in modules.items() if id(module) in parts), None)
        if path is not None:
            raise ValueError(
                f"{path} is inside a {type(wrapper).__name__}, which has listed the parameters that the model has now: "
                f"expected a model that is {done} first and wrapped then"
            )


def is_adapted(model: nn.Module) -> bool:
    """Whether `model` holds an adapted layer."""
    return any(isinstance(module, CompLoRALayer) for module in model.modules())


def adapted_layers(model: nn.Module) -> dict[str, CompLoRALayer]:
    """The modules of `model` that the active adapter adapts, by their paths in the plain model (see `wrappers`).

    Raises:
        ValueError: there is none.
    """
    return {path: layer for path, layer in all_layers(model).items() if layer.weights}


def all_layers(model: nn.Module) -> dict[str, CompLoRALayer]:
    """The modules of `model` that any of its adapters adapts, by their paths in the plain model.

    Raises:
        ValueError: there is none.
    """
    layers = {path: module for path, module in named_modules(model) if isinstance(module, CompLoRALayer)}
    if not layers:
        raise ValueError("model has no Comp-LoRA adapter, expected one: call apply_complora or load_adapter first")
    return layers


def adapted_model(model: nn.Module) -> nn.Module:
    """The model that was adapted: `model` inside its wrappers, or the one part of it that `apply_complora` was given.

    A LightningModule with `self.clip = model` is not the model whose adapter is saved, `clip` is.

    Raises:
        ValueError: no part of `model` has an adapter, or several have one, or it is itself a part of what was adapted.
    """
    parts: set[str] = set()
    for path, layer in adapted_layers(model).items():
        part = _adapted_part(path, layer)
        if part is None:
            raise ValueError(
                f"{path} was adapted as {layer.path}: expected the whole model that apply_complora was given, no part "
                "of it"
            )
        parts.add(part)
    if len(parts) > 1:
        raise ValueError(
            f"{', '.join(part or 'the model itself' for part in sorted(parts))} have an adapter each: expected one of "
            "these parts, because an adapter is saved by the names of its own model"
        )
    return dict(named_modules(model))[parts.pop()]


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that an adapter has beside its factors, those of `modules_to_save`, by their names.

    A part of an adapted model has none.
    """
    modules, tensors = dict(named_modules(model)), {}
    for part in dict.fromkeys(_adapted_part(path, layer) for path, layer in adapted_layers(model).items()):
        if part is not None:
            layers = adapted_layers(modules[part]).values()
            found = whole_modules(modules[part], next(iter(layers)).config.modules_to_save, layers)
            tensors |= whole_tensors({f"{part}.{path}" if part else path: module for path, module in found.items()})
    return tensors


def _adapted_part(path: str, layer: CompLoRALayer) -> str | None:
    """The path of the model that was adapted, from that of its layer; None where it is not within the given model."""
    name = layer.path or path  # a layer that was made alone knows no model
    return path.removesuffix(name).rstrip(".") if f".{path}".endswith(f".{name}") else None
