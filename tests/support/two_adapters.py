"""A small CLIP with two adapters, and what each, or a sum of them, should make of it."""

from __future__ import annotations

from typing import Any

import torch
from small_clip import config, small_clip
from tiny_models import with_updates
from torch import Tensor, nn

import complora_kernels as ck

# Two adapters that differ in all that an adapter may choose; both adapt v of the image tower.
DEFAULT = config(r=2, sides="both", target_modules=("q", "k", "v"), towers=("image",))
B = config(r=3, lora_alpha=5.0, sides="output", target_modules=("v", "o", "fc1", "fc2"), subspace_k=10, use_rslora=True)
SIZES = {"default": 20, "b": 10}  # subspace_k
CONFIGS = {"default": DEFAULT, "b": B}


def clip() -> Any:
    return small_clip(layers=1).double()


def randomise(model: Any, seed: int) -> Any:
    """Gives the active adapter factors that reach into the protected subspaces."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in ck.adapter_parameters(model):
            factor.copy_(torch.randn(factor.shape, generator=generator, dtype=factor.dtype) * 0.3)
    return model


def alone(adapter_name: str, model: Any = None) -> Any:
    """A model with one of the two adapters alone, under the name "default"."""
    model = clip() if model is None else model
    ck.apply_complora(model, CONFIGS[adapter_name], progress=False)
    return randomise(model, {"default": 1, "b": 2}[adapter_name])


def both(model: Any = None, *, active: str = "default") -> Any:
    model = alone("default", model)
    ck.add_adapter(model, "b", B, progress=False)
    ck.set_adapter(model, "b")
    randomise(model, 2)
    ck.set_adapter(model, active)
    return model


def expected(adapter_name: str, plain: Any = None) -> Any:
    """A plain model whose weights hold the update of one of the adapters, by dense projectors in float64."""
    plain = clip() if plain is None else plain
    one = alone(adapter_name)
    return with_updates(plain, one, CONFIGS[adapter_name], lambda _: SIZES[adapter_name])


def expected_sum(weights: dict[str, float]) -> Any:
    """A plain model with `W + Σ w_i ΔW_i`."""
    model = clip()
    updated = {name: expected(name).state_dict() for name in weights}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            plain = parameter.clone()
            for adapter_name, weight in weights.items():
                parameter += weight * (updated[adapter_name][name] - plain)
    return model


@torch.no_grad()
def features(model: Any, rows: slice | list[int] = slice(None)) -> Tensor:
    """What both towers make of four images and texts, or of some of them."""
    generator = torch.Generator().manual_seed(5)
    own = next(model.parameters())
    images = torch.randn(4, 3, 16, 16, generator=generator).to(own)
    texts = torch.randint(1, 19, (4, 6), generator=generator)
    texts[torch.arange(4), torch.tensor([5, 2, 3, 4])] = 19
    return torch.cat([model.encode_image(images[rows]), model.encode_text(texts[rows].to(own.device))], 1)


def frozen(model: nn.Module) -> dict[str, int]:
    """The memory of every parameter that is not a factor."""
    return {name: p.data_ptr() for name, p in model.named_parameters() if "lora_" not in name}
