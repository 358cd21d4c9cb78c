"""Measures the plans on this machine and keeps them for every later run: `python -m complora_kernels.tune`."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from complora_kernels import backends, functional
from complora_kernels.backends import plans
from complora_kernels.backends.plans import Entry, Plan, Problem
from complora_kernels.common.files import sealed, write_atomically
from complora_kernels.replays import Capturer, Clock, Replays, replays, wall_seconds, warm_seconds

SHAPES = {  # width d, and tokens of one image or text
    "ViT-B-32": (768, 50),
    "ViT-B-16": (768, 197),
    "ViT-L-14": (1024, 257),
    "text-512": (512, 77),  # the text towers of ViT-B-32 and ViT-B-16
    "text-768": (768, 77),  # the text tower of ViT-L-14
}
LAYERS = {"qkv": (1, 3, 3), "o": (1, 1, 1), "fc1": (1, 4, 1), "fc2": (4, 1, 1)}  # K / d, N / d, adapters
DTYPES = ("bfloat16", "float16", "float32", "float64")

Step = Callable[[], Sequence[Tensor]]


def product(
    M: int, K: int, N: int, rank: int, adapters: int, dropout_p: float, options: argparse.Namespace
) -> tuple[Problem, Callable[[Plan], Sequence[Tensor]]]:
    """An adapted product of random tensors: the problem, and its forward and backward pass by a plan."""
    kept = torch.float32 if options.autocast else options.dtype
    random = functools.partial(torch.randn, device=options.device, dtype=kept)
    height = N // adapters
    x, weight, bias = random(M, K, requires_grad=True), random(N, K) / K**0.5, random(N)
    As = [(random(rank, K) / K**0.5).requires_grad_() for _ in range(adapters)]
    Bs = [(random(height, rank) / rank**0.5).requires_grad_() for _ in range(adapters)]
    rows = [(start, start + height) for start in range(0, N, height)]
    dY = random(M, N).to(options.dtype)

    def step(plan: Plan) -> Sequence[Tensor]:
        """y, dX, dÃs and dB̃s."""
        with plans.override(plan), torch.autocast(x.device.type, options.dtype, enabled=options.autocast):
            y = functional.packed_lora_linear(
                x, weight, bias, As, Bs, rows, dropout_p=dropout_p, backend=options.backend
            )
            return y.detach(), *torch.autograd.grad(y, (x, *As, *Bs), dY)

    kind = {"backend": options.backend, "rank": rank, "adapters": adapters, "dtype": options.dtype}
    return plans.problem(x, weight, **kind, dropout=dropout_p > 0), step


def candidates(problem: Problem, device: torch.device, dtype: torch.dtype) -> list[Plan]:
    """Every plan that can run, also those of precision="fast": the fastest eligible one is chosen later."""
    names = plans.eligible(problem, "fast")
    found = [Plan(name) for name in names if name != "fused"]
    if "fused" in names:
        from complora_kernels.kernels.linear import candidate_tiles, fits_inside

        inside = ("given", "inside") if fits_inside(problem.rank, dtype, float(problem.dropout)) else ("given",)
        cuts = [(m, n, k, warps, stages) for m, n, k, warps, stages in candidate_tiles(device, dtype)]
        found += [Plan("fused", h, tiles) for tiles in cuts for h in inside]
    return found


def agreeing(steps: Mapping[Plan, Step], dtype: torch.dtype, say: Callable[[str], None]) -> dict[Plan, Step]:
    """The steps that run and give what the first does; says why the others do not."""
    # Sums in another order differ by a few units in the last place of their norm. TF32 has as many bits as float16.
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    tolerance = max(8 * torch.finfo(torch.float16 if tf32 else dtype).eps, 1e-12 if dtype == torch.float64 else 1e-5)
    kept: dict[Plan, Step] = {}
    expected = None
    for plan, step in steps.items():
        torch.manual_seed(0)  # one dropout mask for all
        try:
            results = [result.double() for result in step()]
            expected = results if expected is None else expected
            pairs = zip(results, expected, strict=True)
            apart = torch.stack([torch.dist(result, first) / torch.linalg.norm(first) for result, first in pairs]).max()
            if not apart <= tolerance:
                raise ArithmeticError(f"{apart:.1e} away from {next(iter(kept))}, expected at most {tolerance:.1e}")
            kept[plan] = step
        except Exception as error:
            say(f"  {plan} is left out: {type(error).__name__}: {error}")
    return kept


def measure(
    steps: Mapping[Plan, Step], timed: Replays | None, rounds: int, say: Callable[[str], None]
) -> list[tuple[Plan, float]]:
    """Median seconds, the fastest first. Steps take turns (ABBA): a slow spell of the machine slows all of them.

    On a GPU (`timed`) they are replays of CUDA graphs, with a warm L2 cache: the host takes longer to launch a product
    than the GPU takes to compute it. Where one plan cannot be captured, all are timed with their launches.
    """
    runs: dict[Plan, Callable[[], Any]] = dict(steps)
    clock: Clock = wall_seconds
    if timed is not None:
        capture = Capturer(timed)
        captured = {plan: capture(step) for plan, step in steps.items()}
        reasons = {plan: why for plan, why in captured.items() if isinstance(why, str)}
        for plan, why in reasons.items():
            say(f"  all plans are timed with their launches: {plan} cannot be captured: {why}")
        if not reasons:
            runs = {plan: run for plan, run in captured.items() if not isinstance(run, str)}
        clock = timed.launched if reasons else functools.partial(warm_seconds, timed.warm)
    taken: dict[Plan, list[float]] = {plan: [] for plan in runs}
    for number in range(rounds):
        for plan in list(runs)[:: -1 if number % 2 else 1]:
            taken[plan].append(clock(runs[plan]))
    return sorted(((plan, statistics.median(each)) for plan, each in taken.items()), key=lambda pair: pair[1])


def record(measured: Mapping[Problem, Sequence[tuple[Plan, float]]], path: Path | None = None) -> None:
    """Adds median seconds to the plan file; what other processes write meanwhile is kept.

    Raises:
        OSError: the file cannot be read, locked or written.
        ValueError, TypeError: a plan that cannot compute its problem, or seconds that are not positive.
    """
    path = path or plans.plan_file()
    today = datetime.now(timezone.utc).date().isoformat()
    new = [plans.checked(Entry(problem, tuple(each), plans.versions(), today)) for problem, each in measured.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with plans.lock(path):
        entries = plans.read(path, locked=True) | {(entry.problem, entry.versions): entry for entry in new}
        rows = [entry._asdict() | {"problem": entry.problem._asdict()} for entry in entries.values()]
        write_atomically(path, json.dumps(sealed({"schema": plans.SCHEMA, "entries": rows}), indent=1))
    plans.reload()


def tune(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Measures and records product by product, so that none that was measured is lost."""
    cases = itertools.product(options.model_shapes, options.batch, options.rank, options.dropout)
    for case, layer in tqdm(list(itertools.product(cases, LAYERS)), desc="tuning", unit="product"):
        model, batch, rank, dropout_p = case
        (d, tokens), (inputs, outputs, adapters) = SHAPES[model], LAYERS[layer]
        problem, step = product(batch * tokens, inputs * d, outputs * d, rank, adapters, dropout_p, options)
        say(f"{model} {layer}: {problem}")
        steps = {plan: functools.partial(step, plan) for plan in candidates(problem, options.device, options.dtype)}
        measured = measure(agreeing(steps, options.dtype, say), replays(options.device), options.rounds, say)
        for plan, seconds in measured:
            say(f"  {seconds * 1e6:10.1f} µs  {plan}")
        if measured and not options.dry_run:
            record({problem: measured}, options.output)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, complete and checked; exits with a message where they cannot be used."""
    parser = argparse.ArgumentParser("python -m complora_kernels.tune", description=(__doc__ or "").split(":")[0])
    add = parser.add_argument
    add("--model-shapes", nargs="+", choices=SHAPES, default=["ViT-B-16", "text-512"], help="towers to tune for")
    add("--batch", nargs="+", type=int, default=[32], help="images or texts in a step (32)")
    add("--rank", nargs="+", type=int, default=[16], help="r of an adapter (16)")
    add("--dtype", choices=DTYPES, help="of the products (bfloat16 on a GPU, else float32)")
    add("--autocast", action="store_true", help="weights are kept in float32, --dtype is autocast's")
    add("--dropout", nargs="+", type=float, default=[0.0, 0.25], help="only whether it is 0 matters (0 0.25)")
    add("--backend", choices=("torch", "triton"), help="(the one in use)")
    add("--device", type=torch.device, help="(the GPU if there is one)")
    add("--rounds", type=int, default=10, help="measurements of each plan (10)")
    add("--output", type=Path, help="the plan file (COMPLORA_PLANS, or in the cache folder)")
    add("--dry-run", action="store_true", help="measure and print, write nothing")
    options = parser.parse_args(arguments)
    if min(*options.batch, *options.rank, options.rounds) < 1 or not all(0 <= p < 1 for p in options.dropout):
        parser.error("expected --batch, --rank and --rounds of at least 1, and --dropout in [0, 1)")
    options.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if options.device.type == "cuda" else "float32"))
    try:
        skip = backends.skipped("packed_lora_linear", options.device.type)
        options.backend = backends.resolve(options.backend, skip=skip)
        if options.backend == "extension":
            options.backend = "torch"  # the extension's products follow the plans of the torch backend
        if options.backend == "reference":
            raise ValueError("backend='reference' has no plans, expected torch or triton")
        if options.autocast and options.dtype.itemsize != 2:
            raise ValueError(f"--autocast with {options.dtype}, expected bfloat16 or float16")
        if not options.dry_run:
            record({}, options.output)  # a file that cannot be written is an error now, not after an hour
    except (ValueError, RuntimeError, OSError) as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line: 0, 1 when it fails on the way, 2 for bad input, 130 after Ctrl-C."""
    options = parse(arguments)
    try:
        tune(options, tqdm.write)
    except (KeyboardInterrupt, OSError, RuntimeError) as error:  # RuntimeError: no memory for a product
        stopped = isinstance(error, KeyboardInterrupt)
        print("stopped: what was measured is kept" if stopped else f"error: {error}", file=sys.stderr)
        return 130 if stopped else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
