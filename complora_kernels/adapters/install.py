"""`install` puts adapted layers in the place of a model's own modules: all of them, or none when it fails."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.fx import GraphModule

from complora_kernels.adapters.pretrained import SavesAdapter
from complora_kernels.adapters.whole_modules import whole_modules, whole_tensors
from complora_kernels.common.changes import Changes, joined
from complora_kernels.common.wrappers import unwrap
from complora_kernels.integrations import Integration, find
from complora_kernels.modules.extend import Extension, extend
from complora_kernels.modules.forward_scope import Scoped
from complora_kernels.modules.layer import CompLoRALayer
from complora_kernels.modules.masks import recognise_causal_mask
from complora_kernels.modules.protected import check_before_load

logger = logging.getLogger("complora_kernels")


class Replacement(NamedTuple):
    """A plain module of a model, and the adapted layer that takes its place."""

    path: str
    module: nn.Module
    layer: CompLoRALayer


def install(model: nn.Module, replacements: Sequence[Replacement], changes: Changes | None = None) -> None:
    """Makes `model`, in wrappers or not, an adapted one, and freezes all but the new factors and `modules_to_save`.

    At once, or as a part of `changes`. The layers replace the modules wherever they are children, so that shared
    modules stay shared. Towers fold the factors of all their layers at once, residual blocks of the adapted towers are
    fused, texts are truncated, and the last block computes one position, where the integration knows how.
    """
    model = unwrap(model)
    layers = {module: layer for _, module, layer in replacements}
    with joined(changes) as pending:
        exchange_modules(model, replacements, pending)
        pending.add_hook(model, lambda module: module.register_load_state_dict_pre_hook(check_before_load))
        whole = whole_modules(model, replacements[0].layer.config.modules_to_save, layers)
        trained = {id(tensor) for tensor in whole_tensors(whole).values() if tensor.is_floating_point()}
        for parameter in model.parameters():
            if parameter.requires_grad != (id(parameter) in trained):
                pending.set_attribute(parameter, "requires_grad", not parameter.requires_grad)


def exchange_modules(model: nn.Module, replacements: Sequence[Replacement], changes: Changes) -> None:
    """Puts layers in the place of modules of `model`, plain or adapted, and extends towers and blocks around them."""
    layers = {module: layer for _, module, layer in replacements}
    for mask in _square_masks(model):
        recognise_causal_mask(mask)
    for parent in model.modules():
        for name, child in parent._modules.items():  # named_children() would leave out a module's second name
            if child in layers:
                changes.draft(parent._modules)[name] = layers[child]
    adapted = {module for module in model.modules() if isinstance(module, CompLoRALayer)}
    for module, added in _extensions(model, layers.keys() | adapted).items():
        extend(module, added, changes)


def truncate_texts(model: nn.Module, changes: Changes | None = None) -> None:
    """Lets the text tower of `model`, adapted or plain, compute no positions after the longest text of a batch.

    At once, or as a part of `changes`. A model whose integration knows of no such tower is left alone.
    """
    with joined(changes) as pending:
        for library in find(model):
            for module, extension in library.truncation(model):
                extend(module, [extension], pending)


def _extensions(model: nn.Module, layers: Collection[nn.Module]) -> dict[nn.Module, list[type[Extension]]]:
    """The extensions of the modules of `model` when `layers` are adapted."""
    libraries = find(model)
    added: defaultdict[nn.Module, list[type[Extension]]] = defaultdict(list)
    for module, extension in (pair for library in libraries for pair in library.truncation(model)):
        added[module].append(extension)
    truncated = len(added) > 0
    scoped = {module for module, extensions in added.items() if issubclass(extensions[-1], Scoped)}
    whole = [] if isinstance(model, GraphModule) else [(model, Scoped)]  # a GraphModule writes its class's forward anew
    towers = (pair for library in libraries for pair in library.towers(model))
    for module, extension in (*towers, *whole):
        if module not in scoped and _folds(module, layers, scoped):
            added[module].append(extension)
            scoped.add(module)
    for module, extension in (pair for library in libraries for pair in library.callers(model, layers)):
        added[module].append(extension)
    fusible, reasons = _fusible_blocks(model, libraries, layers)
    for library, block in fusible:
        added[block].append(library.FusedBlock)
    _log_fusion(len(fusible), reasons, truncated)
    for module in model.modules():
        if hasattr(type(module), "save_pretrained") and any(part in layers for part in module.modules()):
            added[module].append(SavesAdapter)
    return added


def _folds(module: nn.Module, layers: Collection[nn.Module], scoped: set[nn.Module]) -> bool:
    """Whether a forward pass of `module` will fold factors: those of the layers that are below no other scope."""
    below = (child for child in module.children() if child not in scoped)
    return any(child in layers or _folds(child, layers, scoped) for child in below)


def _fusible_blocks(
    model: nn.Module, libraries: Sequence[Integration], layers: Collection[nn.Module]
) -> tuple[list[tuple[Integration, nn.Module]], dict[str, str]]:
    """The residual blocks of the adapted towers that can be fused, and by path why the others cannot.

    Blocks without an adapter are among them: gradients pass through them.
    """
    blocks = [(library, block) for library in libraries for block in library.residual_blocks(model)]
    adapted = {block.tower for _, block in blocks if any(part in layers for part in block.module.modules())}
    fusible, reasons = [], {}
    for library, block in blocks:
        if block.tower in adapted:
            parts = library.parts_of_block(block.module)
            if isinstance(parts, str):
                reasons[block.path] = parts
            else:
                fusible.append((library, block.module))
    return fusible, reasons


def _log_fusion(fused: int, reasons: dict[str, str], truncated: bool) -> None:
    """Says how the adapted model will run, as a warning where it runs slower than it could."""
    of_all = f"{fused} of {fused + len(reasons)} residual blocks are fused"
    of_all += ", texts are truncated" if truncated else ""
    if not reasons and fused:
        logger.info("%s", of_all)
    elif not reasons:
        logger.info("0 residual blocks are fused: adapters only, because the model has none of a known library")
    else:
        path, reason = next(iter(reasons.items()))
        others = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        logger.warning("%s; %s%s keeps its own forward pass, with adapters in it: %s", of_all, path, others, reason)


def _square_masks(model: nn.Module) -> Iterator[Tensor]:
    for name, buffer in model.named_buffers():
        if "mask" in name and buffer.dim() == 2 and buffer.shape[0] == buffer.shape[1] and not buffer.is_meta:
            yield buffer
