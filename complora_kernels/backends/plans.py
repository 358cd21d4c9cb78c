"""The plans by which a product is computed, which of them may run, and the table of the fastest.

`y = x W^T + b + h B̃^T` with `h = drop(x) Ã^T` has four plans, and so have its gradients:

    fused   our kernels add the rank-r term to the float32 accumulator          one rounding
    concat  one product, `[x | h] [W | B̃]^T`                                    one rounding
    merge   `x W_eff^T`, `W_eff = W + B̃ Ã` rounded to the product's dtype       one rounding, no dropout
    addmm   `y = x W^T + b`, then `y += h B̃^T`                                  two roundings

With several adapters `concat` fills B̃ with zeros outside each one's rows: there an infinite h of one adapter makes the
results of the others NaN (0 · ∞). The other plans keep it in its own rows.

The shipped table decides, unless `python -m complora_kernels.tune` has measured the problem. What it found is in a JSON
file, read at the first choice. `COMPLORA_PLAN=fused|concat|merge|addmm` forces a plan by name, `auto` none.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import typing
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.backends import hardware
from complora_kernels.common.files import read_plain, reading, set_aside, unsealed
from complora_kernels.common.thread_stack import ThreadStack
from complora_kernels.kernels.tiles import LargeProduct, choose_tiles

NAMES = ("fused", "concat", "merge", "addmm")
MAX_FUSED_RANK = 64
WIDE = ("float32", "float64")
SCHEMA = 1
ANY = 0  # stands for any number of tokens, while torch.compile traces

logger = logging.getLogger("complora_kernels")


class Problem(NamedTuple):
    """All that the fastest plan depends on. Dtypes are names without `torch.`."""

    backend: str  # "torch" or "triton"
    device: str  # "cpu", or the name of the GPU
    tokens: int  # M, rounded up to a power of two, or `ANY`
    inputs: int  # K
    outputs: int  # N
    rank: int  # r of one adapter
    adapters: int  # the number that share the product; 3 for q, k, v
    dtype: str  # the product's dtype
    weight_dtype: str  # the dtype in which the user keeps the frozen weight: under autocast float32
    dropout: bool

    def __str__(self) -> str:
        tokens = "any M" if self.tokens == ANY else f"M <= {self.tokens}"
        shape = f"{tokens}, K={self.inputs}, N={self.outputs}, {self.adapters} x r={self.rank}"
        dtypes = f"{self.dtype}, weight {self.weight_dtype}{', dropout' if self.dropout else ''}"
        return f"{self.backend}, {self.device}, {shape}, {dtypes}"


class Plan(NamedTuple):
    """One way to compute a problem; `h` and `tiles` belong to `fused` alone."""

    name: str
    h: str = "given"  # "given": h by a kernel of its own, "inside": in the kernel of the product
    tiles: tuple[int, int, int, int, int] | None = None  # BLOCK_M, BLOCK_N, BLOCK_K, warps, stages; None: the kernel's

    def __str__(self) -> str:
        tiles = "" if self.tiles is None else ", {}x{}x{}, {} warps, {} stages".format(*self.tiles)
        return f"fused, h {self.h}{tiles}" if self.name == "fused" else self.name


class Entry(NamedTuple):
    """The measurements of one problem."""

    problem: Problem
    measured: tuple[tuple[Plan, float], ...]  # median seconds of forward and backward, the fastest plan first
    versions: tuple[str, ...]  # torch's and triton's
    date: str


Entries = dict[tuple[Problem, tuple[str, ...]], Entry]  # the keys are a problem and the versions


def _is_cast(problem: Problem) -> bool:
    """Whether the weight is cast for the product: rounding the merged weight moves the same bytes."""
    return problem.weight_dtype in WIDE and problem.dtype not in WIDE


# Of the rows that apply, the first whose plan is eligible is used.
SHIPPED: tuple[tuple[str, Callable[[Problem], bool], Plan], ...] = (
    (f"triton, r > {MAX_FUSED_RANK}", lambda p: p.backend == "triton" and p.rank > MAX_FUSED_RANK, Plan("concat")),
    ("triton, float32 weight, 16-bit product", lambda p: p.backend == "triton" and _is_cast(p), Plan("merge")),
    ("triton, M <= 4096", lambda p: p.backend == "triton" and p.tokens <= 4096, Plan("fused", h="inside")),
    (
        # A layer alone, as the output projection: a copy of x beside h would cost what torch's product saves.
        "triton, 16-bit, N = K, Hopper and later",
        lambda p: (
            p.backend == "triton" and p.inputs == p.outputs and p.dtype not in WIDE and hardware.chip(p.device) >= 90
        ),
        Plan("fused", h="inside"),
    ),
    (
        "triton, 16-bit, Hopper and later",
        lambda p: p.backend == "triton" and p.dtype not in WIDE and hardware.chip(p.device) >= 90,
        Plan("concat"),
    ),
    ("triton", lambda p: p.backend == "triton", Plan("fused", h="given")),
    ('float32, float64, or precision="fast"', lambda p: True, Plan("addmm")),
    ("bfloat16, float16", lambda p: True, Plan("concat")),
)

_FORCED: ThreadStack[Plan] = ThreadStack("forced plan")  # set by `override`
_chosen: dict[tuple[Any, ...], tuple[Plan, str]] = {}  # the plan and where it comes from
_chosen_for: dict[tuple[Any, ...], Plan] = {}  # by devices and dtypes, whose names `_chosen` has


def problem(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K], as the user keeps it
    *,
    backend: str,
    rank: int,
    adapters: int,
    dtype: torch.dtype,  # the product's dtype
    dropout: bool,
) -> Problem:
    """The problem that `choose` is asked about.

    While torch.compile or torch.export traces, M is not looked at, or the graph would serve the M of one bucket alone:
    the problem is one of `ANY` tokens.
    """
    rows, inputs = x.shape
    traced = torch.compiler.is_compiling() or type(rows) is not int  # a size that make_fx or torch.jit.trace follows
    tokens = ANY if traced else 1 << max(rows - 1, 0).bit_length()
    return _problem(backend, x.device, tokens, inputs, weight.shape[0], rank, adapters, dtype, weight.dtype, dropout)


def _problem(
    backend: str,
    device: torch.device,
    tokens: int,
    inputs: int,
    outputs: int,
    rank: int,
    adapters: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    dropout: bool,
) -> Problem:
    product, kept = str(dtype).removeprefix("torch."), str(weight_dtype).removeprefix("torch.")
    return Problem(backend, _device(device), tokens, inputs, outputs, rank, adapters, product, kept, dropout)


def eligible(problem: Problem, precision: str = "exact") -> tuple[str, ...]:
    """The names of the plans that may compute `problem`, in the order of `NAMES`.

    Two roundings in half precision, or one of the weight that is kept, lose most of a small adapter: "exact" excludes
    them, "fast" does not. Any other `precision` is a ValueError.
    """
    if precision not in ("exact", "fast"):
        raise ValueError(f"precision={precision!r}, expected 'exact' or 'fast'")
    return tuple(name for name in NAMES if _refusal(name, problem, precision) is None)


def choose(problem: Problem, precision: str = "exact") -> Plan:
    """The plan of `override`, else by `COMPLORA_PLAN`, else the fastest eligible one measured, else the shipped one.

    torch.compile asks while it traces: the plan is part of the graph. For `ANY` tokens it is the one that was measured
    with the most tokens, where the choice matters most.

    Raises:
        ValueError: the forced plan is unknown or not eligible, or `precision` is.
    """
    return _choose(precision, *problem)


def choose_for(x: Tensor, linear: AdaptedLinear, backend: str) -> Plan:
    """The plan of a backend for the product of x [M, in] and a record with adapters."""
    rows = x.shape[0]
    if type(rows) is int and not torch.compiler.is_compiling():
        return choose_for_shape(x.shape, x.dtype, x.device, linear, backend)
    numbers = _numbers(x.shape[1], x.dtype, linear)
    return choose(_problem(backend, x.device, ANY, *numbers), linear.precision)


def choose_for_shape(
    shape: Sequence[int],  # of x: M, in
    dtype: torch.dtype,  # of x
    device: torch.device,
    linear: AdaptedLinear,
    backend: str,
) -> Plan:
    """`choose_for` of an x that need not be there, where nothing traces.

    What was chosen is kept by all that the choice depends on.
    """
    rows, inputs = shape
    numbers, tokens = _numbers(inputs, dtype, linear), 1 << (rows - 1).bit_length() if rows > 1 else 1
    forced, variable = _forced() if _FORCED.anywhere else None, os.environ.get("COMPLORA_PLAN", "auto")
    key = (forced, variable, linear.precision, backend, device, tokens, *numbers)
    if (plan := _chosen_for.get(key)) is None:  # one look, as in `_choose`
        plan = _chosen_for[key] = choose(_problem(backend, device, tokens, *numbers), linear.precision)
    return plan


def _numbers(inputs: int, dtype: torch.dtype, linear: AdaptedLinear) -> tuple[Any, ...]:
    """The last arguments of `_problem`."""
    As, weight = linear.As, linear.weight
    dropout = linear.dropout_p > 0 or linear.columns is not None  # a masked h is in no weight either
    if isinstance(As, Tensor):
        adapters, rank, _ = As.shape
    else:
        adapters, rank = len(As), As[0].shape[0] if len(As) == 1 else max([A.shape[0] for A in As])
    return inputs, weight.shape[0], rank, adapters, dtype, weight.dtype, dropout


@contextlib.contextmanager
def override(plan: Plan) -> Iterator[None]:
    """Forces `plan` on every problem, whatever the precision asked for; a problem it cannot compute is a ValueError.

    That holds on this thread, and on those of the backward passes that it starts.
    """
    with _FORCED.holding(plan):
        yield


def reload() -> None:
    """Forgets the plan file and what was chosen; the next choice reads it again."""
    _entries.cache_clear()
    _chosen.clear()
    _chosen_for.clear()


def plan_file() -> Path:
    """`$COMPLORA_PLANS`, or complora_kernels/plans.json in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("COMPLORA_PLANS") or Path(cache, "complora_kernels", "plans.json"))


def describe() -> list[str]:
    """The table, one row a line: problem, plan, and whether it is shipped, tuned or forced by COMPLORA_PLAN."""
    variable = os.environ.get("COMPLORA_PLAN", "auto")
    rows: list[tuple[object, ...]] = [(when, plan, "shipped") for when, _, plan in SHIPPED]
    if variable != "auto":
        rows.insert(0, ("every problem that it may compute", variable, "COMPLORA_PLAN"))
    for entry in _entries().values():
        if entry.versions != versions():
            source = "not used: tuned with torch {}, triton {}".format(*entry.versions)
            rows.append((entry.problem, entry.measured[0][0], source))
        elif variable in ("auto", *eligible(entry.problem)):
            rows.append((entry.problem, *_resolve(entry.problem, "exact", None, variable)))
        else:
            rows.append((entry.problem, "none", "COMPLORA_PLAN: not eligible"))
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell!s:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def explain(problem: Problem, chip: int, processors: int) -> list[str]:
    """The tiles that the fused kernels take for a problem with h and g given, and what a model expects of them.

    `chip` is 90 for compute capability 9.0, `processors` the number of its multiprocessors. Nothing is measured.
    """
    M, K, N, P, R = problem.tokens, problem.inputs, problem.outputs, problem.adapters, problem.rank
    size = getattr(torch, problem.dtype).itemsize
    masks, together = (P, R) if problem.dropout else (0, P * R)  # without masks the adapters are one of more ranks
    products = {
        "y": LargeProduct(M, N, K, P, R, size, size),
        "dX": LargeProduct(M, K, N, 1, together, size, size, masks, crowded=masks > 1),
    }
    return [f"{name:<2}  {choose_tiles(product, chip, processors)}" for name, product in products.items()]


def read(path: Path, *, locked: bool = False) -> Entries:
    """The entries of the file; none where there is none. A damaged file is renamed, under the lock, with a warning.

    Raises:
        OSError: the file cannot be read, or is damaged and cannot be locked or renamed.
    """
    try:
        with reading(path, "a file of measured plans"):
            content = unsealed(json.loads(read_plain(path)))
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema={content['schema']!r}, expected {SCHEMA}")
            entries = [checked(_entry(**row)) for row in content["entries"]]
            return {(entry.problem, entry.versions): entry for entry in entries}
    except FileNotFoundError:
        return {}
    except ValueError as damage:
        if not locked:
            with lock(path):  # another process may meanwhile have renamed it and written a whole one
                return read(path, locked=True)
        words, aside = damage.__cause__ or damage, set_aside(path).name
        logger.warning("%s is damaged (%r): renamed to %s, the shipped plans are used", path, words, aside)
        return {}


def lock(path: Path, seconds: float = 30.0) -> contextlib.AbstractContextManager[object]:
    """The file's lock. The system frees it when its holder dies. Raises TimeoutError when it is held for longer."""
    return FileLock(f"{path}.lock", timeout=seconds)


def checked(entry: Entry) -> Entry:
    """The entry with its fastest plan first. Raises ValueError or TypeError unless all of it can be used."""
    for field, kind in typing.get_type_hints(Problem).items():
        value = getattr(entry.problem, field)
        if type(value) is not kind or (kind is int and value < 1):
            raise TypeError(f"{field}={value!r}, expected {kind.__name__}, a number of at least 1")
    if [type(text) for text in (*entry.versions, entry.date)] != [str] * 3 or not entry.measured:
        raise TypeError(f"{entry}, expected something measured, two versions and a date")
    for plan, seconds in entry.measured:
        tiles = (1,) * 5 if plan.tiles is None else plan.tiles
        if reason := _refusal(plan.name, entry.problem, "fast"):
            raise ValueError(f"plan {plan.name!r} cannot compute ({entry.problem}): {reason}")
        if plan.h not in ("given", "inside") or (plan.name != "fused" and plan != Plan(plan.name)):
            raise ValueError(f"{plan!r}, expected h='given' or 'inside', and h and tiles with fused alone")
        if len(tiles) != 5 or not all(type(n) is int and n > 0 for n in tiles) or any(n & (n - 1) for n in tiles[:4]):
            raise ValueError(f"tiles={tiles}, expected blocks and warps that are powers of two, and stages")
        if type(seconds) is not float or not 0 < seconds < float("inf"):
            raise ValueError(f"seconds={seconds!r}, expected a positive number")
    return entry._replace(measured=tuple(sorted(entry.measured, key=lambda pair: pair[1])))


@functools.lru_cache(maxsize=1)
def versions() -> tuple[str, ...]:
    """The versions of torch and triton, which is not imported."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return str(torch.__version__), metadata.version("triton")
    return str(torch.__version__), "none"


def _refusal(name: str, problem: Problem, precision: str) -> str | None:
    """Why a plan may not compute `problem`, or None."""
    if name == "fused" and problem.backend != "triton":
        return f"its kernels are not those of the {problem.backend} backend"
    if name == "fused" and (problem.dtype == "float64" or problem.rank > MAX_FUSED_RANK):
        return f"its kernels support no float64 and no rank above {MAX_FUSED_RANK}"
    if name == "merge" and problem.dropout:
        return "with dropout no one weight serves all tokens"
    if name == "merge" and problem.weight_dtype not in WIDE and precision == "exact":
        return f"a {problem.weight_dtype} weight loses small updates"
    if name == "addmm" and problem.dtype not in WIDE and precision == "exact":
        return f"it rounds twice in {problem.dtype}"
    return None if name in NAMES else "unknown"


def _forced() -> Plan | None:
    return (_FORCED.values() or [None])[-1]


def _choose(precision: str, *fields: Any) -> Plan:
    forced, variable = _forced() if _FORCED.anywhere else None, os.environ.get("COMPLORA_PLAN", "auto")
    key = (forced, variable, precision, fields)
    if (chosen := _chosen.get(key)) is None:  # one look: another thread may call `reload`
        chosen = _chosen[key] = _resolve(Problem(*fields), precision, forced, variable)
    return chosen[0]


def _resolve(problem: Problem, precision: str, forced: Plan | None, variable: str) -> tuple[Plan, str]:
    """The plan and where it comes from."""
    names = eligible(problem, precision)
    if forced is not None:
        if reason := _refusal(forced.name, problem, "fast"):
            raise ValueError(f"plans.override({forced}) cannot compute ({problem}): {reason}")
        return forced, "override"
    if variable not in ("auto", *names):
        reason = f"COMPLORA_PLAN={variable!r} cannot compute ({problem}): {_refusal(variable, problem, precision)}"
        raise ValueError(f"{reason}; expected one of auto, {', '.join(names)}")
    names = names if variable == "auto" else (variable,)
    entry = _measured(problem)
    tuned = [plan for plan, _ in entry.measured if plan.name in names] if entry else []
    shipped = [plan for _, applies, plan in SHIPPED if plan.name in names and applies(problem)]
    source = "COMPLORA_PLAN" if variable != "auto" else "tuned" if tuned else "shipped"
    return (*tuned, *shipped, Plan(names[0]))[0], source  # the last, whatever ships, is forced


def _measured(problem: Problem) -> Entry | None:
    """The entry of a problem, for `ANY` tokens that of the most tokens."""
    if problem.tokens != ANY:
        return _entries().get((problem, versions()))
    entries = [entry for (_, measured_with), entry in _entries().items() if measured_with == versions()]
    same = [entry for entry in entries if entry.problem._replace(tokens=ANY) == problem]
    return max(same, key=lambda entry: entry.problem.tokens, default=None)


@functools.lru_cache(maxsize=1)  # read, and complained about, once
def _entries() -> Entries:
    try:
        return read(plan_file())
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        logger.warning("the plan file cannot be used, the shipped plans are: %r", error)
        return {}


def _entry(problem: Any, measured: Any, versions: Any, date: Any) -> Entry:
    plans = [(Plan(name, h, None if tiles is None else tuple(tiles)), time) for (name, h, tiles), time in measured]
    return Entry(Problem(**problem), tuple(plans), tuple(versions), date)


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# torch.compile calls these while it traces and takes the results for constants. The public decorator,
# torch.compiler.assume_constant_result, does no more, but imports the compiler.
_choose._dynamo_marked_constant = _device._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
