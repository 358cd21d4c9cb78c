"""Other ways to train an adapted model: its frozen weights and its factors, in the code of others.

Every baseline has the residual block of Hugging Face's CLIP, with q, k, v and o in linear layers of their own: PEFT
adds the update of an `nn.MultiheadAttention`'s output projection twice (https://github.com/huggingface/peft/pull/3774),
and the block copies q, k and v less often than open_clip's own does. `transformers_clip` has that library's own model.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from complora_kernels.adapters.build import adapted_layers
from complora_kernels.config import CompLoRAConfig
from complora_kernels.graphs import CUDAGraphs
from complora_kernels.integrations import open_clip
from complora_kernels.replays import Replay

PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
Factors = tuple[nn.Parameter, nn.Parameter]  # A [r, in], B [out, r]


class Adapter(NamedTuple):
    """What one adapted weight has learned, and the directions that it leaves alone."""

    A: Tensor  # [r, in]
    B: Tensor  # [out, r]
    basis: Tensor  # [out, k]

    def project(self, B: Tensor) -> Tensor:  # [out, r]
        """`P B` with `P = I - U_k U_k^T`: B of the plain LoRA that computes the same, or from a gradient of it B's."""
        return B - self.basis @ (self.basis.mT @ B)


@dataclass
class Trainee:
    """A model and what is trained of it, by the names that the weights have in a baseline."""

    model: Any
    factors: dict[str, Factors]
    plain: bool = False  # its factors are those of plain LoRA
    merges: bool = False  # True: evaluation merges, and its factors then get no gradient
    inputs: list[Tensor] = field(default_factory=list)  # the inputs of blocks without factors, see `block_inputs`

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [factor for pair in self.factors.values() for factor in pair]


def of_ours(model: nn.Module) -> Trainee:
    """A model from `apply_complora`."""
    layers = adapted_layers(model)
    factors = {_name(path, name): layer.factors(name) for path, layer in layers.items() for name in layer.weights}
    return Trainee(model, factors)


def adapters(ours: nn.Module) -> dict[str, Adapter]:
    """Those of an adapted model with `sides="output"`, by the names that the weights have in a baseline, in float64."""
    found = {}
    for path, layer in adapted_layers(ours).items():
        for name in layer.weights:
            basis = layer.basis(name, "output")
            assert basis is not None
            assert basis.kind == "principal"
            found[_name(path, name)] = Adapter(*(t.detach().double() for t in (*layer.factors(name), basis.matrix)))
    return found


def _name(path: str, name: str) -> str:
    return f"{path.removesuffix('.attn')}.{PROJECTIONS[name]}" if name else path.replace(".mlp.", ".")


class Block(nn.Module):
    """A residual block that shares the weights of open_clip's."""

    def __init__(self, block: Any, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = block.attn.num_heads, causal
        self.ln_1, self.ln_2, self.gelu = block.ln_1, block.ln_2, block.mlp.gelu
        weights, biases = block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_frozen_linear, weights, biases)
        self.out_proj = _frozen_linear(block.attn.out_proj.weight, block.attn.out_proj.bias)
        self.c_fc, self.c_proj = block.mlp.c_fc, block.mlp.c_proj

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:  # [N, L, d]
        n = self.ln_1(x)
        q, k, v = (
            linear(n).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [N, heads, L, d / heads]
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        x = x + self.out_proj(mixed)
        return x + self.c_proj(self.gelu(self.c_fc(self.ln_2(x))))

    def get_weight_dtype(self) -> torch.dtype:  # open_clip asks its blocks for it
        return self.ln_1.weight.dtype


def _frozen_linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight.detach(), False), nn.Parameter(bias.detach(), False)
    return linear


def with_blocks(plain: nn.Module) -> Any:
    """A copy of a plain model that shares its frozen parameters, with `Block`s."""
    model = copy.deepcopy(plain, {id(parameter): parameter for parameter in plain.parameters()})
    for path, block, tower, _ in list(open_clip.residual_blocks(model)):
        model.set_submodule(path, Block(block, causal=tower == "text"))
    return model


def without_adapters(plain: nn.Module, _weights: dict[str, Adapter], _config: CompLoRAConfig) -> Trainee:
    """The frozen model; the backward pass through the image tower goes down to the input of its first block."""
    model = with_blocks(plain)
    return Trainee(model, {}, inputs=block_inputs(model))


def block_inputs(model: Any) -> list[Tensor]:
    """Zeros [L, d], added to what the image tower's first block gets: their gradient is its own, summed over images."""
    zeros = torch.zeros_like(model.visual.positional_embedding).requires_grad_()

    def add(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *others = args  # [N, L, d]
        return (x + zeros, *others)

    model.visual.transformer.register_forward_pre_hook(add)
    return [zeros]


class LoRALinear(nn.Module):
    """A frozen product `x W^T + b` and an adapter."""

    plain = False  # its factors are those of plain LoRA
    basis: Tensor  # [out, k]

    def __init__(self, base: nn.Linear, adapter: Adapter, config: CompLoRAConfig) -> None:
        super().__init__()
        A, B, basis = adapter
        self.base, self.scaling, self.dropout = base, config.scaling, nn.Dropout(config.lora_dropout)
        # Where it is the fast form, factors in the dtype of the base.
        wide = base.weight.dtype if self.plain else torch.promote_types(base.weight.dtype, torch.float32)
        self.A, self.B = nn.Parameter(A.to(wide)), nn.Parameter((adapter.project(B) if self.plain else B).to(wide))
        self.register_buffer("basis", basis.to(wide))


class DenseProjectorLinear(LoRALinear):
    """The formula as it stands, `x W + ((x A) B) P_perp`: 4·M·out² operations more."""

    P: Tensor  # [out, out]

    def __init__(self, base: nn.Linear, adapter: Adapter, config: CompLoRAConfig) -> None:
        super().__init__(base, adapter, config)
        identity = torch.eye(len(adapter.B), dtype=adapter.B.dtype, device=adapter.B.device)
        self.register_buffer("P", adapter.project(identity).to(base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:  # [..., in] to [..., out]
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        return self.base(x) + self.scaling * (((self.dropout(x) @ A.mT) @ B.mT) @ self.P)


class FoldedLinear(LoRALinear):
    """Plain torch with the projection in the factor: 4·r·out·k operations more."""

    def forward(self, x: Tensor) -> Tensor:  # [..., in] to [..., out]
        B = self.B - self.basis @ (self.basis.mT @ self.B)  # P B
        return self.base(x) + self.scaling * F.linear(F.linear(self.dropout(x), self.A.to(x.dtype)), B.to(x.dtype))


class CLIPLoRALinear(LoRALinear):
    """The layer of CLIP-LoRA (arXiv 2405.18541): the product of the factors in full size, plain LoRA."""

    plain = True

    def forward(self, x: Tensor) -> Tensor:  # [..., in] to [..., out]
        return self.base(x) + torch.matmul(self.dropout(x), (self.B @ self.A).mT) * self.scaling


def by_linear(
    linear: type[LoRALinear], plain: nn.Module, weights: dict[str, Adapter], config: CompLoRAConfig
) -> Trainee:
    """Every adapted weight in a layer of its own of the class `linear`."""
    model, factors = with_blocks(plain), {}
    for path, adapter in weights.items():
        adapted = linear(model.get_submodule(path), adapter, config)
        model.set_submodule(path, adapted)
        factors[path] = (adapted.A, adapted.B)
    return Trainee(model, factors, linear.plain)


def by_peft(plain: nn.Module, weights: dict[str, Adapter], config: CompLoRAConfig) -> Trainee:
    """PEFT's LoRA layers: plain LoRA, which projects nothing."""
    model = with_blocks(plain)
    return Trainee(model, adapt_by_peft(model, {name: name for name in weights}, weights, config), plain=True)


def adapt_by_peft(
    model: Any,
    paths: dict[str, str],  # the path of each adapter's linear layer
    weights: dict[str, Adapter],
    config: CompLoRAConfig,
) -> dict[str, Factors]:
    """Puts PEFT's layers into `model`; their factors by the names of the adapters."""
    import peft

    peft_config = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=list(paths.values()),
    )
    peft.get_peft_model(model, peft_config)
    factors = {}
    for name, adapter in weights.items():
        layer = model.get_submodule(paths[name])
        assert isinstance(layer, peft.tuners.lora.Linear)
        # PEFT keeps float32 factors and casts its input to them: the adapter in the dtype of the base is its fast form.
        dtype = next(layer.get_base_layer().parameters()).dtype
        A, B = nn.Parameter(adapter.A.to(dtype)), nn.Parameter(adapter.project(adapter.B).to(dtype))
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = A, B
        factors[name] = (A, B)
    return factors


def by_clip_lora(checkout: Path, plain: nn.Module, weights: dict[str, Adapter], config: CompLoRAConfig) -> Trainee:
    """CLIP-LoRA's own `LinearLoRA` out of a checkout, with a copy of the frozen weight in each: plain LoRA."""
    layers = checkout / "loralib" / "layers.py"
    if not layers.is_file():
        raise FileNotFoundError(f"--clip-lora {checkout}: expected a checkout with loralib/layers.py")
    spec = importlib.util.spec_from_file_location("clip_lora_layers", layers)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, factors = with_blocks(plain), {}
    for path, adapter in weights.items():
        base = model.get_submodule(path)
        layer = module.LinearLoRA(base, r=config.r, lora_alpha=config.lora_alpha, dropout_rate=config.lora_dropout).to(
            base.weight
        )
        layer.weight.requires_grad_(False)
        layer.bias.requires_grad_(False)
        layer.scaling = config.scaling
        layer.w_lora_A = nn.Parameter(adapter.A.to(base.weight))
        layer.w_lora_B = nn.Parameter(adapter.project(adapter.B).to(base.weight))
        model.set_submodule(path, layer)
        factors[path] = (layer.w_lora_A, layer.w_lora_B)
    return Trainee(model, factors, plain=True, merges=True)


def cut_context(model: Any, length: int) -> None:
    """Prompts cut by hand: the model takes texts of `length` tokens from now on."""
    model.positional_embedding = nn.Parameter(model.positional_embedding.detach()[:length], False)
    model.attn_mask = model.attn_mask[:length, :length]


def graphed(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """One CUDA graph of a whole training step on tensors that stay where they are."""
    recorder = CUDAGraphs(torch.device("cuda"))
    recorder.warm_up(step)
    return Replay(step, *recorder.capture(step))
