"""What the targets of an H200 would come to by a roofline model: `python -m benchmarks.model`.

The launches of each step are those of the real dispatch (`benchmarks.dispatch`), their times those of
`benchmarks.roofline`. Nothing here was measured on a GPU. `--write` keeps the figures in `benchmarks/modelled.json`,
which `make targets` prints beside what was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import baselines, bench_layer, bench_step, dispatch, roofline
from benchmarks.comparison import bounds
from benchmarks.roofline import Modelled, modelled
from benchmarks.targets import MODELLED
from complora_kernels import subspace

ITERATIONS = 8000
CHIP = 90
# Ours by its shipped plans: no file is there.
VARIABLES = {"COMPLORA_BACKEND": "triton", "COMPLORA_PLANS": str(MODELLED.with_name("plans.json"))}


def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`F.dropout` in the one kernel that a GPU has for it."""
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def some_directions(weight: Tensor) -> tuple[subspace.Directions, subspace.Directions]:
    """Directions of the sizes that the singular vectors of a weight have, in no time."""
    sides = (torch.eye(size, min(weight.shape)) for size in weight.shape)
    first, second = (subspace.Directions(side, torch.ones(min(weight.shape))) for side in sides)
    return first, second


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """The benchmarks in the dtype of a GPU, on one thread; ours by the triton backend."""
    with contextlib.ExitStack() as stack:
        for module in (bench_step, bench_layer):
            stack.enter_context(patch.object(module, "DTYPE", torch.bfloat16))
        stack.enter_context(patch.object(bench_layer, "ON_GPU", True))
        stack.enter_context(patch.object(F, "dropout", dropout))
        stack.enter_context(patch.object(subspace, "_singular_vectors", some_directions))
        variables = {
            "COMPLORA_BACKEND": "triton",
            "COMPLORA_PLANS": str(MODELLED.with_name("plans.json")),
            "COMPLORA_CACHE": "0",
        }
        stack.enter_context(patch.dict(os.environ, variables))
        os.environ.pop("TRITON_INTERPRET", None)
        torch.set_num_threads(1)
        yield


make_plain = functools.cache(bench_step.make_plain)


def launches_of(run: Callable[[], object]) -> list[dispatch.Launch]:
    """Of a second run: the first makes the optimizer's state."""
    with dispatch.following(CHIP) as follower:
        run()
        follower.launches.clear()
        run()
    return follower.launches


def steps(case: bench_step.Case) -> dict[str, Modelled]:
    """Ours, and the baselines of a case that a target asks for."""
    plain = make_plain(case.model)
    ours = bench_step.make_ours(plain, case.config)
    weights, batch = baselines.adapters(ours), bench_step.make_batch(case, plain)
    found = {}
    for name in (bench_step.OURS, *(name for name, target in case.baselines.items() if target)):
        baseline = bench_step.BASELINES.get(name, bench_step.Baseline(None, graphed=case.graphed))
        trainee = bench_step.make_trainee(name, case, plain, ours, weights, {})
        own_batch = bench_step.cut(trainee.model, batch) if baseline.cut else batch
        launches = launches_of(bench_step.make_step(trainee, own_batch))
        launches = roofline.compiled(launches) if baseline.compiled else launches
        found[name] = modelled(launches, graphed=baseline.graphed)
    return found


def layers(dropout_p: float) -> dict[str, Modelled]:
    """Ours and the baselines of a layer that a target asks for, timed as replays."""
    layer = bench_layer.make_layer(bench_layer.GPU_SHAPES[0])
    layer.dropout_p, found = dropout_p, {}
    for name in (bench_layer.OURS, *bench_layer.TARGETS):
        baseline = bench_layer.BASELINES[name]
        if dropout_p and not baseline.drops:
            continue
        if name == bench_layer.FOLDED:
            given = (layer.x, layer.weight, layer.bias, layer.A, layer.B, layer.basis, dropout_p)
            launches = roofline.compiled(launches_of(partial(layer.step, partial(bench_layer.folded, *given))))
        else:
            launches = launches_of(bench_layer.step(layer, baseline.make(layer), baseline.plan))
        found[name] = modelled(launches, graphed=True)
    return found


def figure(target: str, baseline: float, ours: float) -> float:
    """A baseline's time over ours, for an upper bound ours over it."""
    return ours / baseline if "at_most" in bounds()[target] else baseline / ours


def table(title: str, found: dict[str, Modelled]) -> str:
    """Milliseconds by part, a step a line."""
    lines = [title, f"{'':<50}{'total':>9}{'launches':>10}" + "".join(f"{part:>23}" for part in roofline.PARTS)]
    for name, step in found.items():
        parts = "".join(f"{1e3 * step.parts.get(part, 0.0):>20.2f} ms" for part in roofline.PARTS)
        bound = "  bound by the host" if step.total == step.host else ""
        lines.append(f"{name:<50}{1e3 * step.total:>6.2f} ms{step.launches:>10}{parts}{bound}")
    return "\n".join(lines)


def all_figures() -> tuple[dict[str, float], dict[str, float]]:
    """The modelled figures by target, and the seconds of our steps by case; prints each step by its parts."""
    figures: dict[str, float] = {}
    times: dict[str, float] = {}
    print("\n".join(f"{name}: {value:g} {what} ({source})" for name, (value, what, source) in roofline.ASSUMED.items()))
    with as_on_a_gpu():
        for case in bench_step.GPU_CASES:
            found, targets = steps(case), case.baselines
            seconds = {name: step.total for name, step in found.items()}
            for name, target in targets.items():
                if target:
                    figures[target] = figure(target, seconds[name], seconds[bench_step.OURS])
            if case.prompts and case.lora_dropout:
                figures["step/8000 iterations"] = ITERATIONS * seconds[bench_step.OURS]
            times[str(case)] = seconds[bench_step.OURS]
            print(f"\n{table(str(case), found)}", flush=True)
        for dropout_p in (0.0, 0.25):
            found = layers(dropout_p)
            for name, target in bench_layer.TARGETS.items():
                target = f"{target}, dropout" if dropout_p else target
                if target in bounds() and name in found:
                    figures[target] = figure(target, found[name].total, found[bench_layer.OURS].total)
            print(f"\n{table(f'one layer, {bench_layer.GPU_SHAPES[0]}, p={dropout_p}', found)}", flush=True)
    # The model's own targets are of the same steps.
    figures |= {f"model/{name}": figures[f"step/{name}"] for name in ("PEFT", "compiled", "frozen")}
    _, figures["model/batch 32, ms"], *_ = [1e3 * seconds for seconds in times.values()]
    return figures, times


def rounded(value: Any) -> Any:
    """Three digits: what the model is worth."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return float(f"{value:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {MODELLED.name}")
    parser.add_argument("--check", action="store_true", help=f"fail where {MODELLED.name} has others")
    arguments = parser.parse_args()
    figures, times = all_figures()
    print()
    for target, value in figures.items():
        print(f"{target:<28} modelled {value:.2f}")
    content = json.dumps({"figures": rounded(figures), "seconds": rounded(times)}, indent=1) + "\n"
    if arguments.write:
        MODELLED.write_text(content)
    if arguments.check and MODELLED.read_text() != content:
        sys.exit(f"{MODELLED.name} has other figures: python -m benchmarks.model --write")


if __name__ == "__main__":
    main()
