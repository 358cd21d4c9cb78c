"""Small CLIPs whose adapters protect activations, and what tests compare them by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tiny_models import TEXT, clip, config, features, randomise
from torch import Tensor, nn

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.subspace import Side

ALL = ("q", "k", "v", "o", "fc1", "fc2")
SIDES: tuple[Side, ...] = ("output", "input")
BOTH_SIDES = {"sides": "both", "target_modules": ALL, "subspace_source": "activations"}
Inputs = tuple[Tensor, Tensor]


def batches(seed: int = 3, dtype: torch.dtype = torch.float64, count: int = 6) -> list[Inputs]:
    """Enough for activations of full rank: images of 5 tokens and texts of 7, none of them an end before the last."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 6, 3, 32, 32, generator=generator).to(dtype)
    texts = torch.randint(1, 39, (count, 6, TEXT["context_length"]), generator=generator)
    texts[..., -1] = 39
    return list(zip(images, texts, strict=True))


def run(inputs: list[Inputs]) -> Callable[[Any], object]:
    return lambda model: [features(model, *pair) for pair in inputs]


def adapt(model: Any, inputs: list[Inputs] | None = None, **options: Any) -> Any:
    dtype = next(model.parameters()).dtype
    calibrate = run(batches(dtype=dtype) if inputs is None else inputs)
    return ck.apply_complora(model, config(**(BOTH_SIDES | options)), calibrate=calibrate, progress=False)


def adapted_weights(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    for path, layer in adapted_layers(model).items():
        for name in layer.weights:
            yield f"{path}.{name}".rstrip("."), layer, name


# ---- files


def saved(directory: Path, plain: nn.Module, inputs: list[Inputs] | None = None, **options: Any) -> Any:
    """`plain` with an adapter, which is also in the directory."""
    model = randomise(adapt(plain, inputs, **options))
    ck.save_adapter(model, directory)
    return model


def small(seed: int = 0) -> nn.Module:
    """The same model at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return clip()


def bases_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if "basis" in name}


def assert_same_adapter(model: Any, expected: Any) -> None:
    """The bases bit by bit, and the updates up to what folding folded factors again rounds, 6e-8 a product."""
    assert bases_of(model).keys() == bases_of(expected).keys()
    for name, basis in bases_of(expected).items():
        assert torch.equal(bases_of(model)[name], basis), name
    for (path, layer, name), (_, other, _) in zip(adapted_weights(model), adapted_weights(expected), strict=True):
        update, known = layer.get_delta_weight(name), other.get_delta_weight(name)
        assert (update - known).norm() <= 2e-6 * known.norm(), path
        for side in SIDES:
            basis, known_basis = layer.basis(name, side), other.basis(name, side)
            assert (basis is None) == (known_basis is None)
            assert basis is None or basis[1:] == known_basis[1:]
