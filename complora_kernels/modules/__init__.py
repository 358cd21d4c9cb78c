"""Drop-in modules: torch's own layers with one method overridden."""

from complora_kernels.modules.attention import CompLoRAMultiheadAttention
from complora_kernels.modules.layer import CompLoRALayer
from complora_kernels.modules.linear import CompLoRALinear
from complora_kernels.modules.packed import CompLoRAPackedLinear

__all__ = ["CompLoRALayer", "CompLoRALinear", "CompLoRAMultiheadAttention", "CompLoRAPackedLinear"]
