"""Arguments of the registered operations that fit, and random ones beside them that mostly do not."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map_only

REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, MemoryError, AttributeError)  # the last: of None
SIZES = (-(2**63), -4, -1, 0, 1, 7, 2**31, 2**62, 2**63 - 1)
NUMBERS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 0.1, 1.0, 1e300)
DTYPES = (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)


def arguments(name: str, device: torch.device) -> list[Any]:
    """New arguments of an operation of the extension, or of Triton's ("triton." before its name)."""
    M, K, N, P, r, D = 5, 8, 24, 2, 2, 12
    x, dY, weight = torch.randn(M, K), torch.randn(M, N), torch.randn(N, K)
    h, g, seed = torch.randn(M, P * r), torch.randn(M, P * r), torch.tensor([3])
    As, Bs = [torch.randn(r, K) for _ in range(P)], [torch.randn(D, r) for _ in range(P)]
    on_input, on_output = torch.eye(K, 3), torch.eye(D, 2)
    fold = [[*As, *Bs], [on_input, None, on_output, on_output], [False, True] * 2, [False] * 2 + [True] * 2, 0.5]
    known: dict[str, list[Any]] = {
        "project_complement": [torch.randn(3, M, K), on_input, False],
        "fold_factors": [*fold, torch.float32],
        "packed_lora_linear_factor_grads": [dY, x, h, g, [D, 0], D, 0.25, seed, [True, True]],
        "drop": [x, seed, 1, 0.25],
        "triton.fold_factors": [*fold, torch.float32],
        "triton.packed_lora_linear_fwd": [x, weight, torch.randn(N), As, Bs, [D, 0], 0.25, seed, True, "exact"],
        "triton.packed_lora_linear_bwd": [dY, x, h, weight, As, Bs, [D, 0], 0.25, seed, [True] * 3, "exact"],
    }
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), known[name])


def negated(tensor: Tensor) -> Tensor:
    """A view whose memory holds the negative of its values."""
    return torch.complex(torch.zeros_like(tensor), tensor).conj().imag


def shrunk(tensor: Tensor, bytes: int) -> Tensor:
    """A tensor after `storage.resize_`: a shape without memory for all of it."""
    copy = tensor.clone()
    copy.untyped_storage().resize_(bytes)
    return copy


CHANGES: list[Callable[[Tensor], Any]] = [
    *(lambda tensor, dtype=dtype: tensor.to(dtype) for dtype in DTYPES),
    lambda tensor: tensor.to("meta"),
    lambda tensor: tensor.to_sparse(),
    lambda tensor: tensor.to_sparse_csr(),
    lambda tensor: tensor.to_mkldnn(),
    negated,
    lambda tensor: torch.complex(tensor, tensor).conj(),
    lambda tensor: shrunk(tensor, 0),
    lambda tensor: shrunk(tensor, tensor.nbytes - 1),
    lambda tensor: tensor[:0],
    lambda tensor: tensor[..., :0],
    lambda tensor: tensor[..., 1:],
    lambda tensor: torch.cat([tensor, tensor]),
    lambda tensor: tensor.unsqueeze(0),
    lambda tensor: tensor.flatten(),
    lambda tensor: tensor.sum(),
    lambda tensor: tensor.mT,
    lambda tensor: tensor.mT.contiguous().mT,
    lambda tensor: torch.stack([tensor, tensor + 1], -1)[..., 0],
    lambda tensor: tensor.flip(-1).as_strided(tensor.shape, [1] * tensor.dim()),  # elements share their memory
    lambda tensor: tensor[:1].expand(2**57, *tensor.shape[1:]),
    lambda tensor: tensor[:1].as_strided((1, *tensor.shape[1:]), (2**62, *tensor.stride()[1:])),
    lambda tensor: tensor[..., :1].as_strided((*tensor.shape[:-1], 1), (*tensor.stride()[:-1], 2**62)),
    lambda tensor: tensor.new_empty(2**62, 0),
    lambda tensor: tensor.clone().requires_grad_(),
    lambda tensor: None,
    lambda tensor: 1.0,
]


def mutated(value: Any, draw: random.Random) -> Any:
    """Something else in the place of an argument."""
    if isinstance(value, Tensor):
        return draw.choice(CHANGES)(value)
    if isinstance(value, list):
        at = draw.randrange(len(value))
        elsewhere = [*value[:at], mutated(value[at], draw), *value[at + 1 :]]
        return draw.choice([elsewhere, elsewhere, elsewhere, [], value[:-1], value + value[:1], value[::-1], None])
    if isinstance(value, bool):
        return draw.choice([not value, None, 7])
    if isinstance(value, int):
        return draw.choice([*SIZES, None, 1.5])
    if isinstance(value, float):
        return draw.choice([*NUMBERS, None, "p"])
    if isinstance(value, torch.dtype):
        return draw.choice([*DTYPES, None])
    return draw.choice(["fast", "other", None, 7])


def check_refused_or_right(operation: Callable[..., Any], name: str, device: torch.device, draws: int) -> None:
    """Calls with one or two arguments changed: a result is that of plain copies of the arguments."""
    assert not isinstance(called(operation, arguments(name, device)), Exception)
    draw, outcomes = random.Random(name), []
    for _ in range(draws):
        given = arguments(name, device)
        for at in draw.sample(range(len(given)), draw.choice([1, 1, 2])):
            try:
                given[at] = mutated(given[at], draw)
            except REFUSALS:  # torch's own: there is no such tensor
                break
        before = plain(given)
        result = called(operation, given)
        outcomes.append(isinstance(result, Exception))
        values = [tensor for tensor in tree_iter(result) if isinstance(tensor, Tensor) and not tensor.is_meta]
        if not values and isinstance(result, Exception):
            continue
        torch.testing.assert_close(
            values,
            [tensor for tensor in tree_iter(called(operation, before)) if isinstance(tensor, Tensor)][: len(values)],
            rtol=1e-2,  # sums in another order, of halves
            atol=1e-2,
            equal_nan=True,
            msg=lambda text, given=given: f"{text}\n{name} of {given}",
        )
    assert 0 < sum(outcomes) < draws


def called(operation: Callable[..., Any], given: Sequence[Any]) -> Any:
    """The result, or the error."""
    try:
        return operation(*given)
    except REFUSALS as error:
        return error


def plain(given: Any) -> Any:
    """The same values, each tensor in memory of its own."""

    def copied(tensor: Tensor) -> Tensor:
        try:
            if not tensor.is_meta and tensor.untyped_storage().nbytes() < tensor.nbytes:
                return tensor  # expanded; or without memory, where torch itself does not look
            return tensor.detach().resolve_neg().resolve_conj().clone(memory_format=torch.contiguous_format)
        except REFUSALS:
            return tensor

    return tree_map_only(Tensor, copied, given)
