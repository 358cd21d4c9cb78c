"""`apply_complora`: finds the targets, builds every adapted module, and only then swaps them in."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple, TypeVar

from torch import Tensor, nn
from tqdm import tqdm

from complora_kernels.adapters.calibration import Calibrate, Watched, protect_activations
from complora_kernels.common.changes import Changes
from complora_kernels.common.wrappers import inside, is_compiled, named_modules, registers_parameters, unwrap, wrappers
from complora_kernels.config import CompLoRAConfig
from complora_kernels.integrations import open_clip
from complora_kernels.modules import CompLoRAAttention, CompLoRALayer, CompLoRALinear, CompLoRAMultiheadAttention
from complora_kernels.modules.attention import recognise_causal_mask
from complora_kernels.modules.block import CompLoRABlock, not_understood
from complora_kernels.modules.extend import extend
from complora_kernels.modules.layer import check_before_load
from complora_kernels.modules.pooled import pool_images
from complora_kernels.modules.prompts import cut_prompts
from complora_kernels.modules.tower import fold_once

logger = logging.getLogger("complora_kernels")

Model = TypeVar("Model", bound=nn.Module)


class Target(NamedTuple):
    """A module to adapt."""

    path: str
    module: nn.Module


def apply_complora(
    model: Model, config: CompLoRAConfig, *, calibrate: Calibrate | None = None, progress: bool = True
) -> Model:
    """Adapts `model` in place and freezes everything but the new factors; its outputs are unchanged before training.

    The targets become `CompLoRALinear`, `CompLoRAMultiheadAttention` or `CompLoRAAttention`, which share the original
    parameters under their old names. Each adapted weight is decomposed once (0.1 to 0.5 s for a [768, 768] weight on
    two cores; weights seen before come from a cache).

    With `subspace_source="activations"` the model runs on calibration batches before it is changed:

        ck.apply_complora(model, config, calibrate=lambda model: [model.encode_image(images) for images in batches])

    `calibration` says what of it counts. Later, `load_state_dict` of other base weights is an error, because the bases
    belong to the activations of these, and so is a state dict with other bases (it holds a fingerprint of each).

    Args:
        model: an open_clip model, or any model when `config.target_modules` is a regular expression; also one that
            torch.compile, DataParallel or AveragedModel wraps, as a whole or in parts: what is inside is adapted, under
            the names that it has there. Of a container, such as a LightningModule, pass the model in it.
        config: what to adapt and how.
        calibrate: a function of the model that runs what is adapted (`encode_text` too, or only `encode_text`, where
            the text tower is) on some batches without labels; what it returns is not looked at. It is called once, with
            the model inside its wrappers, without gradients, in evaluation mode and without compiled code, and leaves
            torch's random generators as they were. Given with `subspace_source="activations"` and with no other.
        progress: show a progress bar on stderr once the work has taken two seconds.

    Returns:
        The same model.

    Raises:
        ValueError: the model is adapted already, a target matched nothing or cannot be adapted, a layer index is out of
            range, k exceeds a weight, or a weight holds NaN; `calibrate` is missing or has no use, did not reach an
            adapted weight, or gave it NaN or infinite values; a target is wrapped in DistributedDataParallel or
            FullyShardedDataParallel, which know only the parameters of the plain model, or is itself a compiled module.
            The model is then as it was, also when `calibrate` itself fails.
    """
    if config.source.needs_data != (calibrate is not None):
        raise ValueError(
            f"calibrate={calibrate!r} with subspace_source={config.subspace_source!r} and sides={config.sides!r}, "
            'expected a function of the model that runs calibration batches with subspace_source="activations" and '
            "projected sides, None otherwise"
        )
    if any(isinstance(module, CompLoRALayer) for module in model.modules()):
        raise ValueError("model has an adapter already, expected a plain model: Comp-LoRA is applied once")
    targets = find_targets(model, config)
    plain = unwrap(model)
    adapted = adapt_targets(targets, config, progress=progress)
    if calibrate is not None:
        watched = [Watched(path, module, adapted[module]) for path, module in targets]
        protect_activations(plain, watched, calibrate, progress=progress)
    changes = Changes()
    put_in_place(plain, adapted, changes)
    changes.make()
    return model


def adapt_targets(targets: list[Target], config: CompLoRAConfig, *, progress: bool) -> dict[nn.Module, CompLoRALayer]:
    """An adapted layer for each target, which stays as it is; those that protect activations have no bases yet."""
    with tqdm(targets, "decomposing weights", unit="module", delay=2, leave=False, disable=not progress) as bar:
        return {module: build_layer(path, module, config) for path, module in bar}


def put_in_place(model: nn.Module, adapted: dict[nn.Module, CompLoRALayer], changes: Changes) -> None:
    """Adds what makes `model` an adapted one, with these layers in the place of its modules, to `changes`."""
    for mask in _square_masks(model):
        recognise_causal_mask(mask)
    _swap(model, adapted, changes)
    changes.add_hook(model, lambda module: module.register_load_state_dict_pre_hook(check_before_load))
    for parameter in model.parameters():
        if parameter.requires_grad:
            changes.set_attribute(parameter, "requires_grad", False)
    for tower in (*open_clip.tower_modules(model), model):
        fold_once(tower, changes)
    fused = _fuse_blocks(model, adapted, changes)
    cut_prompts(model, open_clip.text_tower, changes)
    if isinstance(visual := getattr(model, "visual", None), nn.Module):
        pool_images(unwrap(visual), open_clip.image_pool, fused, changes)


def find_targets(model: nn.Module, config: CompLoRAConfig, paths: Collection[str] | None = None) -> list[Target]:
    """The modules that `config` selects in `model`, each once.

    With `paths`, those of them that a regular expression selected before: it is not matched again. One that comes from
    a file may take longer than anybody waits.

    Raises:
        ValueError: as `apply_complora`.
    """
    if isinstance(config.target_modules, str):
        targets = _matching_linears(model, config.target_modules, paths)
    else:
        targets = _parts_of_blocks(model, config, config.target_modules)
    check_wrappers(model, targets)
    compiled = {id(inside(wrapper)) for wrapper in wrappers(model) if is_compiled(wrapper)}
    for path, module in targets:
        if id(module) in compiled:
            raise ValueError(
                f"{path} is a compiled module, whose compiled code would go on calling the plain one: expected a "
                "plain module (compile it, or what it is a part of, when it is adapted)"
            )
    return targets


def check_wrappers(model: nn.Module, targets: list[Target]) -> None:
    """Raises ValueError where a wrapper around or within `model` has listed the parameters of a target."""
    for wrapper in filter(registers_parameters, wrappers(model)):
        parts = {id(module) for module in wrapper.modules()}
        path = next((path for path, module in targets if id(module) in parts), None)
        if path is not None:
            raise ValueError(
                f"{path} is inside a {type(wrapper).__name__}, which has listed the parameters of the plain model and "
                "would leave the adapter's out: expected a model that is adapted first and wrapped then"
            )


def _parts_of_blocks(model: nn.Module, config: CompLoRAConfig, parts: tuple[str, ...]) -> list[Target]:
    blocks = list(open_clip.residual_blocks(model))
    targets = []
    for tower in config.towers:
        in_tower = [block for block in blocks if block.tower == tower]
        if not in_tower:
            raise ValueError(
                f"towers={config.towers!r} matched nothing in the {tower} tower: "
                f"{open_clip.describe_tower(model, tower)}. "
                'Choose other towers, or name nn.Linear modules by a regular expression, target_modules=r"..."'
            )
        layers = {block.layer for block in in_tower}
        missing = sorted(set(config.layers or ()) - layers)
        if missing and config.layers is not None:
            raise ValueError(
                f"layers={config.layers!r}, expected indices of the {tower} tower's blocks, 0 to {max(layers)}: "
                f"there is no {missing}"
            )
        for block in in_tower:
            if config.layers is None or block.layer in config.layers:
                targets += [Target(path, part) for path, part in open_clip.parts(block, parts)]
    return list({id(target.module): target for target in targets}.values())


def _matching_linears(model: nn.Module, pattern: str, paths: Collection[str] | None) -> list[Target]:
    modules = dict(named_modules(model))
    linears = [(path, module) for path, module in modules.items() if path and isinstance(module, nn.Linear)]
    chosen = [path for path, _ in linears if (re.fullmatch(pattern, path) if paths is None else path in paths)]
    targets = [Target(path, modules[path]) for path in chosen]
    if not targets:
        known = ", ".join(path for path, _ in linears[:8]) + (", ..." if len(linears) > 8 else "")
        raise ValueError(
            f"target_modules={pattern!r} matched no nn.Linear by its whole name, "
            f"expected a match among: {known or 'none'}"
        )
    for path, _ in targets:
        parent = modules[path.rpartition(".")[0]]
        # These read `.weight` of their children instead of calling them; the encoder layer does so in evaluation.
        reads = isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
        if reads or type(parent).__name__ == "AttentionPool2d":
            raise ValueError(
                f"target_modules={pattern!r} matched {path}, which its parent, a {type(parent).__name__}, uses without "
                "calling it: an adapter there would have no effect. Expected a module that is called "
                '(in residual blocks, target_modules=("o",) adapts the output projection)'
            )
    return targets


def build_layer(path: str, module: nn.Module, config: CompLoRAConfig) -> CompLoRALayer:
    """The layer that takes the place of a target, which stays as it is."""
    try:
        if isinstance(module, nn.MultiheadAttention):
            return CompLoRAMultiheadAttention.from_attention(module, config, path=path)
        if CompLoRAAttention.recognises(module):
            return CompLoRAAttention.from_attention(module, config, path=path)
        if isinstance(module, nn.Linear):
            return CompLoRALinear.from_linear(module, config, path=path)
        raise TypeError(f"{path} is a {type(module).__name__}, expected a plain nn.Linear")
    except TypeError as error:
        raise ValueError(str(error)) from None


def _swap(model: nn.Module, adapted: dict[nn.Module, CompLoRALayer], changes: Changes) -> None:
    """Replaces each module wherever it is a child, so that shared modules stay shared."""
    for parent in model.modules():
        for name, child in parent._modules.items():  # named_children() would leave out a module's second name
            if child in adapted:
                changes.draft(parent._modules)[name] = adapted[child]


def _fuse_blocks(model: nn.Module, adapted: dict[nn.Module, CompLoRALayer], changes: Changes) -> list[nn.Module]:
    """Fuses the residual blocks of the adapted towers, also those without an adapter: gradients pass through them.

    Returns:
        The blocks that are fused.
    """
    blocks, fused = list(open_clip.residual_blocks(model)), []
    for tower in sorted({block.tower for block in blocks if any(m in adapted for m in block.module.modules())}):
        refused: dict[str, str] = {}
        for block in blocks:
            if block.tower == tower:
                reason = not_understood(block.module)
                if reason is None:
                    extend(block.module, CompLoRABlock, changes)
                    fused.append(block.module)
                else:
                    refused[block.path] = reason
        if refused:
            path, reason = next(iter(refused.items()))
            others = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
            logger.warning("%s%s keeps its own forward pass, with adapters in it: %s", path, others, reason)
    return fused


def _square_masks(model: nn.Module) -> Iterator[Tensor]:
    for name, buffer in model.named_buffers():
        if "mask" in name and buffer.dim() == 2 and buffer.shape[0] == buffer.shape[1] and not buffer.is_meta:
            yield buffer


def adapted_layers(model: nn.Module) -> dict[str, CompLoRALayer]:
    """The adapted modules of `model` by their paths, those of the plain model (see `wrappers`).

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
        name = layer.path or path  # a layer that was made alone knows no model
        if not f".{path}".endswith(f".{name}"):
            raise ValueError(
                f"{path} was adapted as {name}: expected the whole model that apply_complora was given, no part of it"
            )
        parts.add(path.removesuffix(name).rstrip("."))
    if len(parts) > 1:
        raise ValueError(
            f"{', '.join(part or 'the model itself' for part in sorted(parts))} have an adapter each: expected one of "
            "these parts, because an adapter is saved by the names of its own model"
        )
    return dict(named_modules(model))[parts.pop()]
