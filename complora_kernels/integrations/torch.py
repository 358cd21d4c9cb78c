"""Any torch module: its `nn.Linear` layers can be adapted, and torch's own modules that read the weights of others."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from complora_kernels.integrations import Block, Target
from complora_kernels.modules.block import BlockParts, CompLoRABlock
from complora_kernels.modules.extend import Extension
from complora_kernels.modules.forward_scope import Scoped
from complora_kernels.modules.layer import CompLoRALayer
from complora_kernels.modules.linear import CompLoRALinear
from complora_kernels.modules.protected import WeightRows

FusedBlock = CompLoRABlock


def recognises(model: nn.Module) -> bool:
    return True


def residual_blocks(model: nn.Module) -> list[Block]:
    return []


def targets_in(block: Block, names: Collection[str]) -> list[Target]:
    return []


def linear_target(path: str, module: nn.Module) -> Target:
    """A target that becomes a `CompLoRALinear`."""
    rows = module.out_features if isinstance(module, nn.Linear) else 0  # another class is refused when it is adapted
    return Target(path, module, {"": WeightRows("weight", 0, rows)}, CompLoRALinear.from_linear)


def missing(model: nn.Module, tower: str) -> str | None:
    return None


def uncalled(parent: nn.Module) -> Collection[str]:
    """Those of torch's attention, and of its encoder layer, which reads them in evaluation."""
    return parent._modules if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) else ()


def parts_of_block(block: nn.Module) -> BlockParts | str:
    return f"it is a {type(block).__name__}, of no known library"


def towers(model: nn.Module) -> list[tuple[nn.Module, type[Scoped]]]:
    return []


def truncation(model: nn.Module) -> list[tuple[nn.Module, type[Extension]]]:
    return []


def activations(model: nn.Module) -> dict[str, str]:
    return {}


def peft_modules(path: str, layer: CompLoRALayer) -> dict[str, str] | str:
    if isinstance(layer, CompLoRALinear):
        return {"": path}
    return f"a {type(layer).__name__} has no modules of its own for its adapters"
