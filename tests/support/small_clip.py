"""A small CLIP that is the same at every call, adapters with random values, and what tests compare them by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stand_in
import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.modules import block


def small_clip(seed: int = 0, *, layers: int = 2, width: int = 32, context_length: int = 6, **options: Any) -> Any:
    """Two heads in each tower of equal depth and width; weights of the size that trained ones have."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIP(
            16,
            {"image_size": 16, "patch_size": 8, "width": width, "layers": layers, "head_width": width // 2},  # pyright: ignore[reportArgumentType]
            {"context_length": context_length, "vocab_size": 20, "width": width, "heads": 2, "layers": layers},  # pyright: ignore[reportArgumentType]
            **options,
        )
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.eval()


def small_clip_4(*, context_length: int = 6) -> Any:
    """The weights of `small_clip` in the layout of open_clip 4."""
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "heads": 2}
    text = {"context_length": context_length, "vocab_size": 20, "width": 32, "layers": 2, "heads": 2}
    model = stand_in.CLIP(16, vision, text).eval()
    assert not model.load_state_dict(small_clip(context_length=context_length).state_dict(), strict=False).missing_keys
    return model


def with_text_module(*, context_length: int, vision: dict[str, Any] | None = None, **options: Any) -> Any:
    """The layout of open_clip's `CustomTextCLIP`; `options` are its text tower's."""
    image: Any = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16, **(vision or {})}
    text: Any = {"context_length": context_length, "vocab_size": 20, "width": 32, "heads": 2, "layers": 2, **options}
    model = CustomTextCLIP(16, image, text)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.eval()


def sequence_first(*, context_length: int) -> Any:
    """As open_clip builds it on request: the transformers transpose what they are given."""
    model = small_clip(context_length=context_length)
    for transformer in (model.transformer, model.visual.transformer):
        transformer.batch_first = False
        for layer in transformer.resblocks:
            layer.attn.batch_first = False
    return model


def random_texts(*lengths: int, context: int) -> Tensor:  # [N, context]
    """Random ids, also after the end, which is the largest one: what is there must not matter."""
    ids = torch.randint(0, 19, (len(lengths), context), generator=torch.Generator().manual_seed(sum(lengths)))
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 19
    return ids


def config(**options: Any) -> ck.CompLoRAConfig:
    """Rank 2 and 20 protected directions of 32, so that the complement basis is the narrower one."""
    size = {} if options.keys() & {"subspace_k", "subspace_energy", "subspace_ratio"} else {"subspace_k": 20}
    defaults: dict[str, Any] = {"r": 2, "lora_alpha": 3.0, "sides": "both"} | size
    if options.get("sides") == "none":
        defaults.pop("subspace_k", None)
    return ck.CompLoRAConfig(**(defaults | options))


def adapted(model: nn.Module, seed: int = 1, **options: Any) -> Any:
    """`model` with random factors, which reach into the protected subspaces as those of AdamW do."""
    ck.apply_complora(model, config(**options), progress=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in ck.adapter_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def saved(directory: Path, plain: nn.Module | None = None, **options: Any) -> Any:
    """A model with an adapter, which is also in `directory`."""
    model = adapted(small_clip() if plain is None else plain, **options)
    ck.save_adapter(model, directory)
    return model


def compute_every_position(patch: pytest.MonkeyPatch) -> None:
    """Lets the last block of a tower compute those too that nobody reads, with dropout masks for all of them."""
    patch.setattr(block, "reading_of", lambda *_, **__: None)


@torch.no_grad()
def features(model: Any) -> Tensor:
    """What both towers make of fixed random images and texts."""
    generator = torch.Generator().manual_seed(5)
    dtype = next(model.parameters()).dtype
    images = torch.randn(3, 3, 16, 16, generator=generator).to(dtype)
    texts = torch.randint(1, 20, (3, 6), generator=generator)
    return torch.cat([model.encode_image(images), model.encode_text(texts)]).float()


def updates(model: nn.Module) -> dict[str, Tensor]:
    """ΔW of every adapted weight."""
    layers = adapted_layers(model).items()
    return {f"{path}/{name}": layer.get_delta_weight(name) for path, layer in layers for name in layer.weights}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative difference in Frobenius norms."""
    apart = float((actual - expected).detach().norm() / expected.detach().norm())
    assert apart <= tolerance, f"{apart:.2e} apart, expected at most {tolerance}"
