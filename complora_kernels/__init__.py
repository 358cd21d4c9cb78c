"""Comp-LoRA for CLIP: LoRA in the complement of each frozen weight's principal subspace (arXiv 2501.15040)."""

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
