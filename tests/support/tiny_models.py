"""CLIPs of a few thousand random weights in every layout, and what an adapter should add to a weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import open_clip.model
import stand_in
import torch
from torch import Tensor, nn

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers

Model = TypeVar("Model", bound=nn.Module)

VISION = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2}  # 5 tokens
TEXT = {"context_length": 7, "vocab_size": 40, "width": 24, "heads": 2, "layers": 2}
EMBED_DIM = 16


def clip(*, quick_gelu: bool = False) -> nn.Module:
    return open_clip.model.CLIP(EMBED_DIM, {**VISION, "head_width": 16}, TEXT, quick_gelu).eval()  # type: ignore[arg-type]


def clip_with_text_module() -> nn.Module:
    return open_clip.model.CustomTextCLIP(EMBED_DIM, {**VISION, "head_width": 16}, TEXT).eval()  # type: ignore[arg-type]


def clip_4() -> nn.Module:
    return stand_in.CLIP(EMBED_DIM, {**VISION, "heads": 2}, TEXT).eval()


LAYOUTS: dict[str, Callable[[], nn.Module]] = {
    "open_clip 3": clip,
    "open_clip 3, quickgelu": lambda: clip(quick_gelu=True),
    "open_clip 3, CustomTextCLIP": clip_with_text_module,
    "open_clip 4": clip_4,
}


def config(**options: Any) -> ck.CompLoRAConfig:
    """Rank 2 and ratio 0.5 where nothing else is said."""
    size = {} if options.get("sides") == "none" or any(name in options for name in SIZES) else {"subspace_ratio": 0.5}
    return ck.CompLoRAConfig(**{"r": 2, "lora_alpha": 3.0, **size, **options})


SIZES = ("subspace_k", "subspace_energy", "subspace_ratio")


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Three images, and three texts that end (the largest token) at different places."""
    texts = torch.randint(1, 39, (3, TEXT["context_length"]))
    texts[torch.arange(3), torch.tensor([6, 3, 4])] = 39
    return torch.randn(3, 3, 32, 32, dtype=dtype), texts


def features(model: nn.Module, images: Tensor, texts: Tensor) -> Tensor:  # [N, 2 · EMBED_DIM]
    encode: Any = model
    return torch.cat([encode.encode_image(images), encode.encode_text(texts)], dim=1)


def randomise(model: Model) -> Model:
    """Gives every B, which starts at zero, random values: the size of the update is that of the weight, about."""
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for name in layer.weights:
                layer.factors(name)[1].normal_()
    return model


def expected_delta(weight: Tensor, A: Tensor, B: Tensor, config: ck.CompLoRAConfig, k: int) -> Tensor:  # [out, in]
    """`s · P_out B A P_in` of the configured sides, with the dense projectors of torch's own decomposition, float64."""
    U, _, Vh = torch.linalg.svd(weight.detach().double())
    P_out = torch.eye(len(U), dtype=U.dtype) - U[:, :k] @ U[:, :k].T
    P_in = torch.eye(len(Vh), dtype=U.dtype) - Vh[:k].T @ Vh[:k]
    delta = B.double() @ A.double()
    delta = P_out @ delta if config.sides in ("output", "both") else delta
    delta = delta @ P_in if config.sides in ("input", "both") else delta
    return delta * config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)


def frozen_weight(module: Any, name: str) -> Tensor:  # [out, in]
    """The weight that the adapter `name` of a plain module would belong to: "" or q, k, v, o."""
    if name in ("", "o"):
        return module.out_proj.weight if name else module.weight
    return module.in_proj_weight.chunk(3)["qkv".index(name)]


def with_updates(plain: Model, adapted: nn.Module, config: ck.CompLoRAConfig, k: Callable[[Tensor], int]) -> Model:
    """A copy of `plain` whose weights hold the updates that `adapted` should compute; `k` of a weight [out, in]."""
    updated = copy.deepcopy(plain)
    with torch.no_grad():
        for path, layer in adapted_layers(adapted).items():
            for name in layer.weights:
                weight = frozen_weight(updated.get_submodule(path), name)
                weight += expected_delta(weight, *layer.factors(name), config, k(weight))
    return updated


def half_of(weight: Tensor) -> int:
    """k where `subspace_ratio=0.5`."""
    return min(weight.shape) // 2
