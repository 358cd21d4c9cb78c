"""Dropout without a stored mask: a forward pass keeps its seeds, and a backward pass draws the masks again.

There are two kinds of masks. Those of torch's generator have one seed for each adapter, on the host; those that kernels
draw by Philox (`reference.keep_mask`) have one key for all adapters of a product, on the device. A backend says which
it draws. Seeds and torch's masks are registered operations, which torch.compile calls without tracing into them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from complora_kernels import reference
from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.common.tracing import is_followed

_LIBRARY = torch.library.Library("complora", "FRAGMENT")
_LIBRARY.define("dropout_seed(Tensor x) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_LIBRARY.define("philox_seed(Tensor x) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_LIBRARY.define("dropout_mask(Tensor like, SymInt[] shape, Tensor seed, float p) -> Tensor")


def draw_seeds(x: Tensor, linear: AdaptedLinear, *, philox: bool) -> list[Tensor]:  # each [1]
    """Fresh seeds for the masks of one product: one key for all adapters, or one seed each; none without dropout."""
    if linear.dropout_p == 0 or not linear.rows:
        return []
    return [philox_seed(x)] if philox else [dropout_seed(x) for _ in linear.rows]


def scaled_masks(
    x: Tensor,  # [M, K]
    linear: AdaptedLinear,
    *,
    philox: bool,
) -> list[Tensor] | None:  # each [M, K], in float32 or wider
    """The masks `m = mask / (1 - p)` that the seeds draw, one for each adapter; None where there is no seed."""
    seeds, p = linear.seeds, linear.dropout_p
    if not seeds:
        return None
    if philox:
        masks = [reference.keep_mask(seeds[0], adapter, x.shape, p) for adapter in range(len(linear.rows))]
        p = reference.drawn_p(p)
    else:
        masks = [dropout_mask(x, x.shape, seed, p) for seed in seeds]
    return [mask.to(torch.promote_types(x.dtype, torch.float32)) / (1 - p) for mask in masks]


def fresh_masks(
    x: Tensor,  # [..., K]
    linear: AdaptedLinear,
) -> list[Tensor] | None:  # each [..., K], in the dtype of x
    """Fresh masks `m = mask / (1 - p)` for the reference, one for each adapter; None without dropout.

    Under torch.vmap its argument `randomness` says whether the masks of its examples differ.
    """
    p = linear.dropout_p
    if p == 0:
        return None
    ones = torch.ones_like(x)
    if is_followed():
        return [torch.nn.functional.dropout(ones, p) for _ in linear.rows]
    return [drop(ones, dropout_mask(x, x.shape, dropout_seed(x), p), p) for _ in linear.rows]


def dropout_seed(
    x: Tensor,  # [..., K]
) -> Tensor:  # [1], int64, on the host
    """A fresh seed from the default generator of `x`'s device.

    It follows `torch.manual_seed` and `torch.cuda.manual_seed`. The seed stays on the host. On a GPU it comes from the
    generator's seed and offset, which are host numbers too, so nothing waits for the device.
    """
    return torch.ops.complora.dropout_seed(x)


def philox_seed(
    x: Tensor,  # [..., K]
) -> Tensor:  # [1], int64, on the device of x
    """A fresh key for the masks that kernels draw by Philox, from the default generator of `x`'s device.

    It stays on the device: nothing waits for it, and a CUDA graph that draws it draws another one at each replay.
    """
    return torch.ops.complora.philox_seed(x)


def dropout_mask(
    like: Tensor,
    shape: Sequence[int],
    seed: Tensor,  # [1]
    p: float,
) -> Tensor:  # bool, in the given shape
    """True where an element is kept, with probability 1 - p; the same for equal seed, shape and device type.

    `like` gives the device. A backward pass hands in the gradient it was given: were it the activation, as in the
    forward pass, `torch.compile` would see one and the same mask and keep it from one pass to the other.
    """
    return torch.ops.complora.dropout_mask(like, shape, seed, p)


def drop(
    x: Tensor,  # [..., K]
    mask: Tensor,  # [..., K], bool
    p: float,
) -> Tensor:  # [..., K]
    """`m ∘ x` with `m = mask / (1 - p)`; the factor is applied in float32 to half-precision values, as torch does."""
    return (x * mask).mul_(1 / (1 - p))


def _draw_seed(x: Tensor) -> Tensor:
    if x.device.type != "cuda":
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64)
    index = torch.cuda.current_device() if x.device.index is None else x.device.index
    generator = torch.cuda.default_generators[index]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)  # offsets count in fours
    # Neighbouring offsets must give unrelated streams: spread them over the keys (the golden-ratio multiplier of
    # Knuth's multiplicative hashing) instead of starting the same stream four numbers later.
    key = (generator.initial_seed() * 0x9E3779B97F4A7C15 + offset * 0xD1B54A32D192ED03) % (2**63)
    return torch.tensor([key], dtype=torch.int64)


def _draw_key(x: Tensor) -> Tensor:
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)


def _draw_mask(like: Tensor, shape: Sequence[int], seed: Tensor, p: float) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(int(seed))
    return torch.empty(shape, dtype=torch.bool, device=like.device).bernoulli_(1 - p, generator=generator)


_LIBRARY.impl("dropout_seed", _draw_seed, "CompositeExplicitAutograd")
_LIBRARY.impl("philox_seed", _draw_key, "CompositeExplicitAutograd")
_LIBRARY.impl("dropout_mask", _draw_mask, "CompositeExplicitAutograd")


@torch.library.register_fake("complora::dropout_seed", lib=_LIBRARY)
def _fake_seed(_x: Tensor) -> Tensor:
    return torch.empty((1,), dtype=torch.int64)


@torch.library.register_fake("complora::philox_seed", lib=_LIBRARY)
def _fake_key(x: Tensor) -> Tensor:
    return x.new_empty((1,), dtype=torch.int64)


@torch.library.register_fake("complora::dropout_mask", lib=_LIBRARY)
def _fake_mask(like: Tensor, shape: Sequence[int], _seed: Tensor, _p: float) -> Tensor:
    return torch.empty(shape, dtype=torch.bool, device=like.device)
