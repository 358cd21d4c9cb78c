"""What the first run on a GPU computes: shapes of CLIP's ViT-B/16, random tensors, and the clock."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.backends import REGISTRY
from complora_kernels.reference import Norm
from complora_kernels.replays import Replays, replays
from complora_kernels.tune import LAYERS

Row = dict[str, Any]  # a line of the results file, without its entry
DROPOUT = 0.25


class Sizes(NamedTuple):
    """A tower, and how often what may go wrong now and then is repeated."""

    width: int = 768
    heads: int = 12
    tokens: int = 197
    image: int = 224
    patch: int = 16
    batches: tuple[int, int] = (256, 32)  # of the times; the checks take the second
    rank: int = 16
    layers: int = 12
    repeats: int = 1000


@dataclass
class Bench:
    """Where the entries run, and the random tensors that they begin with."""

    device: torch.device
    sizes: Sizes = field(default_factory=Sizes)
    dtype: torch.dtype = torch.bfloat16
    dry: bool = False  # nothing is computed: kernels are compiled alone, and what reads results is left out
    clock: Replays | None = None  # None: that of the device
    ceilings: dict[str, float] = field(default_factory=dict)  # operations and bytes a second, once they are measured

    def random(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype) * scale

    def values(self) -> contextlib.AbstractContextManager[object]:
        """Within it what is computed has its values, in a dry run too."""
        return _disable_current_modes() if self.dry else contextlib.nullcontext()

    def product(self, layer: str, batch: int, dropout_p: float = 0.0) -> Product:
        """The adapted product of a layer of a block, in half precision."""
        d, r = self.sizes.width, self.sizes.rank
        inputs, outputs, adapters = (n * d if i < 2 else n for i, n in enumerate(LAYERS[layer]))
        height = outputs // adapters
        As = [self.random(r, inputs, scale=inputs**-0.5) for _ in range(adapters)]
        Bs = [self.random(height, r, scale=r**-0.5) for _ in range(adapters)]
        weight, bias = self.random(outputs, inputs, scale=inputs**-0.5), self.random(outputs)
        rows = [(start, start + height) for start in range(0, outputs, height)]
        seeds = [torch.tensor([2**33 + 7], device=self.device)] if dropout_p else []
        linear = AdaptedLinear(weight, bias, As, Bs, rows, dropout_p, seeds)
        M = batch * self.sizes.tokens
        return Product(self.random(M, inputs), linear, self.random(M, outputs))

    def norm(self) -> Norm:
        d = self.sizes.width
        weight, bias = (self.random(d, dtype=torch.float32) for _ in range(2))
        return Norm(1 + 0.1 * weight, 0.1 * bias, 1e-5)

    def factors(self, layers: int) -> Factors:
        """The factors of the six linears of a tower, half of the directions of the output side protected."""
        d, r = self.sizes.width, self.sizes.rank
        sizes = [(d, d)] * 4 + [(d, 4 * d), (4 * d, d)]  # q, k, v, o, fc1, fc2
        As = [self.random(r, K, dtype=torch.float32) for _ in range(layers) for K, _ in sizes]
        Bs = [self.random(N, r, dtype=torch.float32) for _ in range(layers) for _, N in sizes]
        bases = [self.random(N, d // 2, scale=N**-0.5, dtype=torch.float32) for _ in range(layers) for _, N in sizes]
        kinds, sides = ["principal"] * 2 * len(As), [False] * len(As) + [True] * len(Bs)
        return Factors([*As, *Bs], [*[None] * len(As), *bases], kinds, sides)


class Product(NamedTuple):
    """An adapted product and the gradient of its result."""

    x: Tensor  # [M, K]
    linear: AdaptedLinear  # weight [N, K]
    dY: Tensor  # [M, N]


class Factors(NamedTuple):
    """The arguments of a fold; As first."""

    factors: list[Tensor]  # each [r, d], those of the output side [d, r], float32
    bases: list[Tensor | None]  # each [d, k]
    kinds: list[str]
    output_side: list[bool]


def triton_backend() -> Any:
    """The backend whose kernels are checked and timed."""
    return REGISTRY["triton"]


def clock_of(bench: Bench) -> Replays:
    """How steps are timed: as replays of CUDA graphs."""
    clock = bench.clock or replays(bench.device)
    if clock is None:
        raise ValueError(f"device={bench.device} has no CUDA graphs to time, expected a GPU")
    return clock


Rows = Iterator[Row]
