"""The fused layer of LoRAFusion (arXiv 2510.00206, github.com/CentML/lorafusion), out of a checkout of it.

It is for Triton 3.2 and the GPUs of a list. With a newer Triton, which has not the TMA descriptors that it imports, its
own kernels without TMA run; a GPU of an H100's generation that is not in the list gets an H100's tiles. Nothing of its
files is changed, nor of what its kernels compute.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison import Missing

OPTION = "--lorafusion"
ENTRY = "lorafusion.ops.lora_v1"
KERNELS = "lorafusion.ops.triton_ops"
WITH_TMA = {
    "tma_utils": {"HAS_TMA_DESC": False},
    "fused_lora_xw_sb_tma": {"fused_lora_xw_sb_tma": None},
    "fused_lora_dyw_dsa_tma": {"fused_lora_dyw_dsa_tma": None},
}
PACKAGES = ("loguru", "tabulate", "mypy_extensions", "tqdm")  # packages that its files import


def fused_linear_lora(checkout: Path) -> Callable[..., Tensor]:
    """Its function of that name: x [N, L, in], linear_w, lora_a, lora_b, alpha, seed, dropout_p, linear_bias."""
    if not checkout.joinpath(*ENTRY.split(".")).with_suffix(".py").is_file():
        raise Missing(f"{OPTION} {checkout}: expected a checkout with {ENTRY.replace('.', '/')}.py")
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise Missing(f"not installed: pip install {' '.join(absent)}")
    if not has_tma_descriptors():
        for name, values in WITH_TMA.items():
            module = ModuleType(f"{KERNELS}.{name}")
            vars(module).update(values)
            sys.modules[module.__name__] = module
    sys.path.insert(0, str(checkout))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one says that there is no TMA
            entry: Any = importlib.import_module(ENTRY)
    finally:
        sys.path.remove(str(checkout))
    add_tiles(importlib.import_module(f"{KERNELS}.config"))
    return entry.fused_linear_lora


def has_tma_descriptors() -> bool:
    """Whether Triton has what its files ask for."""
    import triton.language

    return hasattr(triton.language, "nv_tma_desc_type") and hasattr(triton.language, "_experimental_descriptor_load")


def add_tiles(config: Any) -> None:
    if torch.cuda.get_device_capability()[0] == 9:
        config.HARDWARE_CONFIGS.setdefault(config.get_device_short_name(), config.H100_CONFIG)
