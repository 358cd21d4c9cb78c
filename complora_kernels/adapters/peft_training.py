"""Comp-LoRA and this package's kernels inside PEFT: `peft_config`, `accelerate_peft`. They import PEFT when called."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from complora_kernels.adapters.peft_folder import INITIALISATIONS
from complora_kernels.common.changes import Changes
from complora_kernels.config import CompLoRAConfig
from complora_kernels.integrations import find
from complora_kernels.modules.block import CompLoRABlock
from complora_kernels.modules.extend import extend, own_class, restore
from complora_kernels.modules.layer import CompLoRALayer
from complora_kernels.modules.peft_linear import AcceleratedLinear

if TYPE_CHECKING:
    from peft import LoraConfig

Model = TypeVar("Model", bound=nn.Module)

logger = logging.getLogger("complora_kernels")


def peft_config(config: CompLoRAConfig, target_modules: str | Collection[str], **options: Any) -> LoraConfig:
    """The `LoraConfig` with which `peft.get_peft_model` trains Comp-LoRA on the `nn.Linear` layers that it selects.

    Each adapted layer computes `y = x W^T + b + s · (drop(x) Ã^T) B̃^T`, as those of `apply_complora` do. PEFT's calls
    work as for LoRA: `disable_adapter`, `set_adapter`, `merge_adapter` (and `unmerge_adapter`, up to rounding),
    `save_pretrained`. The folded factors are saved, an ordinary LoRA that PEFT loads without this package. To train
    them further, pass the same configuration again:
    `PeftModel.from_pretrained(model, directory, config=ck.peft_config(...), is_trainable=True)`.

    Args:
        config: rank, scaling, dropout, sides and subspace; its selection of modules is not looked at.
        target_modules: as PEFT takes them: endings of names, a regular expression, or "all-linear".
        options: further fields of `LoraConfig`, such as `modules_to_save` or `rank_pattern`.

    Raises:
        ImportError: peft is missing, or older than 0.21.
        ValueError: a subspace of activations, which needs calibration batches, an `update_bound`, an option that
            `config` has, or an initialisation that changes the base weights, such as "pissa".
            `get_peft_model` raises one for attention, embeddings, convolutions and quantised layers.
    """
    from complora_kernels.adapters.peft_variant import ComplementLoraConfig

    if config.protects_activations:
        raise ValueError("subspace_source='activations', expected a source that needs no calibration batches")
    if config.update_bound is not None:
        raise ValueError(f"update_bound={config.update_bound}, expected None: PEFT's layers do not bound their updates")
    fields = {name: getattr(config, name) for name in ("r", "lora_alpha", "lora_dropout", "use_rslora")}
    if twice := sorted(fields.keys() & options.keys()):
        raise ValueError(f"options {', '.join(twice)} are fields of config, expected them there alone")
    initialised = options.get("init_lora_weights", True)
    if isinstance(initialised, str) and initialised not in INITIALISATIONS:
        raise ValueError(f"init_lora_weights={initialised!r}, expected one that leaves the base weights as they are")
    modules = target_modules if isinstance(target_modules, str) else list(target_modules)
    return ComplementLoraConfig(complora=config, target_modules=modules, **fields, **options)


def accelerate_peft(model: Model) -> Model:
    """Lets the LoRA layers of a model of PEFT compute `y = x W^T + b + s · (drop(x) A^T) B^T` in one operation.

    Only forward methods are exchanged, those of PEFT's linear layers and of the residual blocks around them:
    parameters, names, adapters and files stay PEFT's, and so do its calls (`set_adapter`, `disable_adapter`,
    `merge_adapter`, `add_adapter`, `unload`). A layer computes `functional.lora_linear` where one adapter of LoRA, or
    of `peft_config`, is active on a frozen `nn.Linear` in the dtype of its input or under autocast. A residual block of
    a known library whose layers do is fused, as `apply_complora` fuses it. Both compute as PEFT does in all other
    cases: merged or disabled, several adapters or others for each sample, DoRA and other variants, biases of LoRA,
    hooks on their parts. Log lines say how many layers and blocks are accelerated; `decelerate_peft` undoes it. Layers
    that PEFT makes later are not among them: call it again. Numbers are PEFT's up to rounding; dropout draws its masks
    otherwise.

    Args:
        model: made by `get_peft_model` or `PeftModel.from_pretrained`, or any model with layers of PEFT in it.

    Returns:
        The same model.

    Raises:
        ImportError: peft is missing, or older than 0.21.
        ValueError: the model has no LoRA layer of PEFT.
    """
    from complora_kernels.adapters.peft_variant import ComplementLinear, Linear, LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError("model has no LoRA layer of PEFT, expected one: call peft.get_peft_model first")
    linears = {layer for layer in layers if own_class(layer) in (Linear, ComplementLinear)}
    blocks = [
        (library, block.module)
        for library in find(model)
        for block in library.residual_blocks(model)
        if not linears.isdisjoint(block.module.modules())
    ]
    changes = Changes()
    for layer in linears:
        extend(layer, [AcceleratedLinear], changes)
    for library, block in blocks:
        extend(block, [library.FusedBlock], changes)
    changes.make()
    others = Counter(type(layer).__name__ for layer in layers if layer not in linears)
    kept = ", ".join(f"{count} {name}" for name, count in others.items())
    logger.info("accelerated %d of %d LoRA layers; as before: %s", len(linears), len(layers), kept or "none")
    fused = sum(not isinstance(library.parts_of_block(block), str) for library, block in blocks)
    logger.info("fused %d of %d residual blocks with LoRA layers", fused, len(blocks))
    return model


def decelerate_peft(model: Model) -> Model:
    """Gives what `accelerate_peft` changed its own forward method back; returns the same model.

    Raises:
        ValueError: the class of a layer or block was changed since, as `fully_shard` does; nothing is then changed.
    """
    ours = any(isinstance(module, CompLoRALayer) for module in model.modules())  # then the blocks are fused for these
    changes = Changes()
    for module in model.modules():
        if isinstance(module, AcceleratedLinear) or (isinstance(module, CompLoRABlock) and not ours):
            restore(module, changes)
            changes.draft(vars(module)).pop("recompute", None)
    changes.make()
    return model
