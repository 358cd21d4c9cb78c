"""What each kernel takes alone, as replays of CUDA graphs: products against cuBLAS, the rest against their bytes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial

import torch
from torch.nn import functional as F

from benchmarks.gpu.problems import Bench, Row, Rows, clock_of, triton_backend
from complora_kernels.adapted_linear import AdaptedLinear, Deferred, Needs
from complora_kernels.backends import plans
from complora_kernels.backends.plans import Plan
from complora_kernels.backends.torch import ProductInput
from complora_kernels.kernels.rows import MAX_NORM_WIDTH
from complora_kernels.replays import Capturer, Replay, Step, free_memory, reason, warm_seconds

ROUNDS = 5
CUBLAS = "cuBLAS, frozen"
HALF = 2  # bytes of a number in half precision


def timed(bench: Bench, steps: Mapping[str, Step]) -> dict[str, Row]:
    """Medians of a warm and a cold L2 cache, in turns (ABBA); what cannot be captured is a row that says why."""
    if bench.dry:
        for step in steps.values():
            step()
        return {}
    clock = clock_of(bench)
    capture = Capturer(clock)
    made = {name: captured(capture, step) for name, step in steps.items()}
    runs = {name: run for name, run in made.items() if isinstance(run, Replay)}
    warm: dict[str, list[float]] = {name: [] for name in runs}
    cold: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            warm[name].append(warm_seconds(clock.warm, runs[name]))
            cold[name].append(clock.cold(runs[name]))
    rows: dict[str, Row] = {}
    for name, run in made.items():
        if isinstance(run, str):
            rows[name] = {"what": name, "error": run, "ok": False}
        else:
            rows[name] = {"what": name, "s": statistics.median(warm[name]), "cold_s": statistics.median(cold[name])}
    return rows


def captured(capture: Capturer, step: Step) -> Replay | str:
    """A replay, or what is wrong with the step: one of several ways to compute a product ends no other."""
    try:
        made = capture(step)
        return made if isinstance(made, Replay) else f"not captured: {made}"
    except Exception as error:
        why = f"fails: {reason(error)}"
    free_memory()
    return why


# ---- products


def product(bench: Bench, layer: str, batch: int, *, backward: bool = False) -> Rows:
    """y of a given h, or dX with its g, by every plan and every tile, against the frozen product of cuBLAS."""
    from complora_kernels.kernels.linear import candidate_tiles, fits_inside

    backend = triton_backend()
    x, linear, dY = bench.product(layer, batch)
    h = bench.random(len(x), linear.rank)
    tiles = [Plan("fused", "given", (m, n, k, w, s)) for m, n, k, w, s in candidate_tiles(bench.device, x.dtype)]
    candidates = [*tiles, Plan("concat"), Plan("merge")]
    if fits_inside(bench.sizes.rank, x.dtype, 0.0):
        candidates.append(Plan("fused", "inside"))

    def by(plan: Plan) -> object:
        with plans.override(plan):
            if backward:
                return backend.packed_lora_linear_bwd(dY, x, h, linear, Needs(True, False, False))
            return backend.packed_lora_linear_fwd(ProductInput(x, None if plan.h == "inside" else h), linear)

    frozen = (lambda: dY @ linear.weight) if backward else (lambda: F.linear(x, linear.weight, linear.bias))
    steps: dict[str, Step] = {CUBLAS: frozen, **{str(plan): partial(by, plan) for plan in candidates}}
    rows = timed(bench, steps)
    floor, operations = rows.get(CUBLAS, {}).get("s"), 2 * len(x) * linear.weight.numel()
    for row in rows.values():
        if "s" in row and floor:
            row |= {"of_cublas": floor / row["s"], "operations_per_s": operations / row["s"]}
        yield row


# ---- what moves bytes


def one(bench: Bench, what: str, step: Step, moved: int) -> Rows:
    """A kernel and the fewest bytes that it reads and writes, each once."""
    for row in timed(bench, {what: step}).values():
        rate = bench.ceilings.get("bytes_per_s")
        if "s" in row:
            row |= {"bytes": moved, "bytes_per_s": moved / row["s"]}
            row |= {"of_copy": moved / row["s"] / rate} if rate else {}
        yield row


def fold(bench: Bench) -> Rows:
    """A tower's factors and their gradients."""
    backend, given = triton_backend(), bench.factors(bench.sizes.layers)
    half = [bench.dtype] * len(given.factors)
    arguments = (given.bases, given.kinds, given.output_side, 1.0)
    read = sum(tensor.nbytes for tensor in (*given.factors, *given.bases) if tensor is not None)
    numbers = sum(factor.numel() for factor in given.factors)
    yield from one(
        bench,
        "fold_factors",
        lambda: backend.fold_factors(given.factors, *arguments, half),
        read + HALF * numbers,
    )
    grads = [factor.to(bench.dtype) for factor in given.factors]
    wide = [torch.float32] * len(grads)
    yield from one(
        bench,
        "fold_factors_bwd",
        lambda: backend.fold_factors_bwd(grads, *arguments, wide),
        read + HALF * numbers,
    )


def activation(bench: Bench, kind: str, batch: int) -> Rows:
    backend, (z, reader, _) = triton_backend(), bench.product("fc2", batch)
    yield from one(bench, f"{kind}, a and h", lambda: backend.activation_fwd(z, kind, reader), 2 * z.nbytes)
    yield from one(bench, f"{kind}, dz", lambda: backend.activation_bwd(z, z, kind), 3 * z.nbytes)


def norm(bench: Bench, batch: int) -> Rows:
    """The norms before q, k and v, which adds nothing, and before fc1, which adds o."""
    backend, own, d = triton_backend(), bench.norm(), bench.sizes.width
    assert d <= MAX_NORM_WIDTH
    for layer, adds in (("qkv", False), ("fc1", True)):
        x, reader, _ = bench.product(layer, batch)
        delta = bench.random(*x.shape) if adds else None
        closing = bench.product("fc2", batch).linear if adds else None  # for which s is written twice
        moved = (5 if adds else 2) * x.nbytes
        step = partial(backend.norm_fwd, x, delta, own, x.dtype, reader, closing=closing)
        yield from one(bench, f"norm before {layer}, n and h", step, moved)
        _, normed, _ = step()
        yield from one(bench, f"norm before {layer}, ds", partial(backend.norm_bwd, x, x, normed), 4 * x.nbytes)
        deferred = Deferred(x, bench.random(len(x), reader.rank), reader, needs_A=True)
        step = partial(backend.norm_bwd, deferred, x, normed)
        yield from one(bench, f"norm before {layer}, ds and dA", step, 5 * x.nbytes)


def factor_gradients(bench: Bench, layer: str, batch: int) -> Rows:
    """dB in one pass over dY; g and dA in one over dY and one over x."""
    backend = triton_backend()
    x, linear, dY = bench.product(layer, batch)
    h = bench.random(len(x), linear.rank)

    def gradients(needs: Needs, record: AdaptedLinear = linear) -> object:
        return backend.packed_lora_linear_bwd(dY, x, h, record, needs)

    yield from one(bench, f"{layer}, dB", partial(gradients, Needs(False, False, True)), dY.nbytes)
    yield from one(bench, f"{layer}, g and dA", partial(gradients, Needs(False, True, False)), dY.nbytes + x.nbytes)


def attention(bench: Bench, batch: int) -> Rows:
    """Forward and backward pass by each of torch's kernels, the one that torch takes first among them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if bench.dry:
        return
    L, H, d = bench.sizes.tokens, bench.sizes.heads, bench.sizes.width // bench.sizes.heads
    leaf, grad = bench.random(batch, L, 3, H, d).requires_grad_(), bench.random(batch, H, L, d)

    def run() -> object:
        q, k, v = (part.permute(0, 2, 1, 3) for part in leaf.unbind(2))
        return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), leaf, grad)

    def by(kernel: SDPBackend) -> object:
        with sdpa_kernel(kernel):
            return run()

    kernels = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    steps: dict[str, Step] = {"as torch chooses": run}
    yield from timed(bench, steps | {kernel.name: partial(by, kernel) for kernel in kernels}).values()


def ceilings(bench: Bench) -> Rows:
    """Operations a second of a large product of cuBLAS, and bytes a second of a large copy."""
    from benchmarks import machine

    if bench.dry:
        return
    bench.ceilings = machine.ceilings()
    yield {"what": "ceilings", **bench.ceilings}
