"""Comp-LoRA for CLIP: LoRA in the complement of each frozen weight's principal subspace (arXiv 2501.15040)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from complora_kernels.adapters.build import apply_complora
    from complora_kernels.adapters.eva import apply_eva
    from complora_kernels.adapters.explain import explain
    from complora_kernels.adapters.interchange import export_peft, import_clip_lora
    from complora_kernels.adapters.manage import (
        adapter_parameters,
        check_gradients,
        disable_adapter,
        merge_adapter,
        print_trainable_parameters,
        subspace_report,
        unmerge_adapter,
    )
    from complora_kernels.adapters.mixed import mixed_adapters
    from complora_kernels.adapters.peft_import import import_peft
    from complora_kernels.adapters.peft_training import accelerate_peft, decelerate_peft, peft_config
    from complora_kernels.adapters.preservation import PreservationLoss
    from complora_kernels.adapters.ranks import rising_ranks
    from complora_kernels.adapters.save_load import load_adapter, save_adapter
    from complora_kernels.adapters.several import (
        active_adapters,
        adapter_names,
        add_adapter,
        delete_adapter,
        set_adapter,
    )
    from complora_kernels.adapters.unload import merge_and_unload, unload
    from complora_kernels.config import CompLoRAConfig
    from complora_kernels.fewshot.classifier import load_classifier
    from complora_kernels.graphs import GraphedTrainStep
    from complora_kernels.modules import CompLoRALinear, CompLoRAMultiheadAttention
    from complora_kernels.modules.block import set_recompute

__version__ = "0.1.0"

__all__ = [
    "CompLoRAConfig",
    "CompLoRALinear",
    "CompLoRAMultiheadAttention",
    "GraphedTrainStep",
    "PreservationLoss",
    "accelerate_peft",
    "active_adapters",
    "adapter_names",
    "adapter_parameters",
    "add_adapter",
    "apply_complora",
    "apply_eva",
    "check_gradients",
    "decelerate_peft",
    "delete_adapter",
    "disable_adapter",
    "explain",
    "export_peft",
    "import_clip_lora",
    "import_peft",
    "load_adapter",
    "load_classifier",
    "merge_adapter",
    "merge_and_unload",
    "mixed_adapters",
    "peft_config",
    "print_trainable_parameters",
    "rising_ranks",
    "save_adapter",
    "set_adapter",
    "set_recompute",
    "subspace_report",
    "unload",
    "unmerge_adapter",
]

# Where each public name is. It is imported when it is first used, so that `complora --help` does not wait for torch.
_HOMES = {
    name: module
    for module, names in {
        "adapters.build": "apply_complora",
        "adapters.eva": "apply_eva",
        "adapters.explain": "explain",
        "adapters.interchange": "export_peft import_clip_lora",
        "adapters.manage": "adapter_parameters check_gradients disable_adapter merge_adapter "
        "print_trainable_parameters subspace_report unmerge_adapter",
        "adapters.mixed": "mixed_adapters",
        "adapters.peft_import": "import_peft",
        "adapters.peft_training": "accelerate_peft decelerate_peft peft_config",
        "adapters.preservation": "PreservationLoss",
        "adapters.ranks": "rising_ranks",
        "adapters.save_load": "load_adapter save_adapter",
        "adapters.several": "active_adapters adapter_names add_adapter delete_adapter set_adapter",
        "adapters.unload": "merge_and_unload unload",
        "config": "CompLoRAConfig",
        "graphs": "GraphedTrainStep",
        "modules": "CompLoRALinear CompLoRAMultiheadAttention",
        "modules.block": "set_recompute",
        "fewshot.classifier": "load_classifier",
    }.items()
    for name in names.split()
}


def __getattr__(name: str) -> Any:
    """A public name, or a module of the package that nothing has imported yet."""
    if name in _HOMES:
        try:
            module = import_module(f"{__name__}.{_HOMES[name]}")
        except ModuleNotFoundError as error:
            if not _HOMES[name].startswith("fewshot"):
                raise
            needed = f"{__name__}.{name} needs {error.name}, expected it: pip install 'complora-kernels[train]'"
            raise ModuleNotFoundError(needed, name=error.name) from error
        found = globals()[name] = getattr(module, name)
        return found
    if not name.startswith("_"):
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
