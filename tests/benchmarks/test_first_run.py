"""The program of the first call of `make gpu`: its limits, its file, its checks of small kernels, what it brings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_sources import launched_kernels
from triton_device import DEVICE

from benchmarks import machine
from benchmarks.gpu import __main__ as gpu_main
from benchmarks.gpu import checks, environment, times
from benchmarks.gpu import entries as gpu_entries
from benchmarks.gpu.entries import Entry, entries
from benchmarks.gpu.problems import Bench, Row, Sizes
from benchmarks.gpu.program import Log, run
from complora_kernels.backends import plans
from complora_kernels.backends.plans import Plan
from complora_kernels.backends.triton import TritonBackend
from complora_kernels.replays import Replays

ROOT = Path(__file__).parents[2]
SMALL = Sizes(width=32, heads=2, tokens=5, image=32, patch=16, batches=(3, 2), rank=4, layers=1, repeats=3)


# ---- limits and the file


class Clock:
    """Seconds that pass where an entry says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def entry(self, name: str, estimate: int, takes: float = 0.0, *rows: Row, dies: type[BaseException] | None = None):
        def run(_: Bench) -> Iterator[Row]:
            self.now += takes
            yield from rows
            if dies is not None:
                raise dies(name)

        return Entry(name, estimate, run)


@pytest.fixture
def bench() -> Bench:
    return Bench(torch.device("cpu"))


def lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def states(path: Path) -> dict[str, str]:
    return {row["entry"]: row["state"] for row in lines(path) if "state" in row}


def test_an_entry_begins_where_its_estimate_fits_what_is_left(tmp_path, bench):
    clock, log = Clock(), Log(tmp_path / "rows.jsonl", "first")
    table = [clock.entry("a", 10, 25), clock.entry("b", 20), clock.entry("c", 5, 5), clock.entry("d", 1)]
    outcome = run(table, bench, log, deadline=130, now=lambda: clock.now)
    assert (outcome.waiting, outcome.failed, outcome.status) == (["b", "d"], [], 3)
    assert states(log.path) == {"a": "done", "c": "done"}
    outcome = run(table, bench, Log(log.path, "second"), deadline=200, now=lambda: clock.now)
    assert (outcome.waiting, outcome.status) == ([], 0)
    assert [row["entry"] for row in lines(log.path) if row.get("state") == "started"] == ["a", "c", "b", "d"]


def test_a_failing_check_is_a_row_and_a_failure_at_the_end_and_is_tried_again(tmp_path, bench, capsys):
    clock, log = Clock(), Log(tmp_path / "rows.jsonl", "first")
    wrong = {"what": "y", "error": 0.5, "allowed": 0.1, "ok": False}
    table = [
        clock.entry("wrong", 1, 0, wrong),
        clock.entry("raises", 1, 0, {"what": "y", "ok": True}, dies=ValueError),
        clock.entry("right", 1, 0, {"what": "y", "ok": True}),
    ]
    outcome = run(table, bench, log, deadline=200, now=lambda: clock.now, counted=lambda: {"compiled": 2})
    assert (outcome.failed, outcome.status) == (["wrong", "raises"], 1)
    rows = [row for row in lines(log.path) if "what" in row]
    assert [(row["entry"], row["ok"]) for row in rows] == [
        ("wrong", False),
        ("raises", True),
        ("raises", False),
        ("right", True),
    ]
    assert rows[2]["error"] == "ValueError: raises"
    assert "FAILED wrong: what y, error 0.5, allowed 0.1" in capsys.readouterr().out
    assert {row["compiled"] for row in lines(log.path) if row.get("state") in ("done", "failed")} == {2}
    mended = [clock.entry(entry.name, 1) for entry in table]
    outcome = run(mended, bench, Log(log.path, "second"), deadline=200, now=lambda: clock.now)
    assert (outcome.failed, outcome.status) == ([], 0)
    assert [row["entry"] for row in lines(log.path) if row.get("state") == "started"][3:] == ["wrong", "raises"]


def test_a_killed_call_loses_no_row_and_what_it_was_at_comes_last(tmp_path, bench):
    clock, log = Clock(), Log(tmp_path / "rows.jsonl", "first")
    killed = clock.entry("hangs", 1, 0, {"what": "y", "ok": True}, dies=KeyboardInterrupt)
    table = [clock.entry("a", 1), killed, clock.entry("b", 1)]
    with pytest.raises(KeyboardInterrupt):
        run(table, bench, log, deadline=200, now=lambda: clock.now)
    assert lines(log.path)[-1] == {"entry": "hangs", "call": "first", "what": "y", "ok": True}
    with log.path.open("a") as file:
        file.write('{"entry": "b", "st')  # a line that the kill broke off
    table = [clock.entry(entry.name, 1) for entry in table]
    run(table, bench, Log(log.path, "second"), deadline=200, now=lambda: clock.now)
    text = log.path.read_text()
    assert text.index('"entry": "b", "call": "second"') < text.index('"entry": "hangs", "call": "second"')


def test_a_device_that_answers_nothing_ends_the_process_and_the_next_goes_on(tmp_path, bench):
    clock, path = Clock(), tmp_path / "rows.jsonl"
    table = [clock.entry("faults", 1, dies=RuntimeError), clock.entry("b", 1)]
    outcome = run(table, bench, Log(path, "one"), deadline=200, now=lambda: clock.now, alive=lambda: False)
    assert outcome.broken
    assert "b" not in states(path)
    outcome = run(table, bench, Log(path, "one"), deadline=200, now=lambda: clock.now)  # the same call
    assert (outcome.failed, outcome.status) == (["faults"], 1)
    assert states(path) == {"faults": "failed", "b": "done"}


def test_what_the_first_call_does_fits_its_limit_and_begins_with_checks(bench):
    table = entries(bench)
    assert sum(entry.seconds for entry in table) <= 220
    kinds = [entry.name.split()[0] for entry in table]
    assert kinds == sorted(kinds)  # check, then time
    assert len({entry.name for entry in table}) == len(table)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """`python -m benchmarks.gpu` with other entries, on a machine that says it has a GPU."""
    clock = Clock()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(machine, "on_gpu", lambda: True)
    monkeypatch.setattr(machine, "revision", lambda: "abc")
    monkeypatch.setattr(environment, "compiler", lambda: {"what": "C compiler", "ok": True})
    monkeypatch.setattr(environment, "versions", lambda: {"what": "versions"})
    monkeypatch.setattr(environment, "Compilations", lambda: SimpleNamespace(row=dict))

    def call(*table: Entry, limit: int = 100) -> int:
        monkeypatch.setattr(gpu_entries, "entries", lambda _: list(table))
        return gpu_main.main(["--results", str(tmp_path), "--limit", str(limit)])

    return clock, call, tmp_path / "first-nvidia-h200-abc.jsonl"


def test_the_program_says_by_its_status_what_is_left(program, capsys):
    clock, call, path = program
    right, long = clock.entry("right", 1, 0, {"what": "y", "ok": True}), clock.entry("long", 80)
    wrong = clock.entry("wrong", 1, 0, {"what": "y", "ok": False})
    assert call(right, long, limit=60) == 3
    assert call(right, long, wrong, limit=100) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "3 entries, failed: wrong; waiting: 0"
    assert call(right, long) == 0
    assert [row["entry"] for row in lines(path) if row.get("state") == "started"] == ["right", "long", "wrong"]
    assert [row["what"] for row in lines(path) if row["entry"] == "environment"] == ["C compiler", "versions"] * 3


def test_without_a_compiler_the_program_fails_whatever_it_measures(program, monkeypatch):
    clock, call, _ = program
    monkeypatch.setattr(environment, "compiler", lambda: {"what": "C compiler", "ok": False, "error": "none"})
    assert call(clock.entry("right", 1)) == 1


def test_after_a_fault_of_the_device_another_process_goes_on_within_the_limit(program, monkeypatch):
    clock, call, _ = program
    taken_over = []

    def no_answer() -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", no_answer)
    monkeypatch.setattr(os, "execv", lambda _, command: taken_over.append(command))
    assert call(clock.entry("faults", 1, dies=RuntimeError)) == 1
    (command,) = taken_over
    assert command[1:4] == ["-m", "benchmarks.gpu", "--results"]
    assert 0 < float(command[command.index("--until") + 1]) - time.time() <= 100
    taken_over.clear()
    assert call(clock.entry("faults", 1, dies=RuntimeError), limit=15) == 1
    assert taken_over == []


# ---- what Triton needs


def test_a_missing_compiler_is_said_with_what_it_is_for(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    row = environment.compiler()
    assert not row["ok"]
    assert row["error"].startswith("no C compiler (gcc, clang or CC)")
    assert "Triton builds its driver module with them" in row["error"]
    for module in ("torch", "triton"):
        (tmp_path / f"{module}.py").write_text("raise ImportError('no time for that')")
    command = [sys.executable, "-m", "benchmarks.gpu.environment"]
    variables = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (1, row["error"])


def test_headers_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(environment.sysconfig, "get_paths", lambda _: {"include": str(tmp_path)})
    assert environment.compiler()["error"].startswith(f"no Python.h in {tmp_path}: ")
    (tmp_path / "Python.h").write_text("")
    assert environment.compiler()["ok"]


# ---- the checks


class Again:
    """A graph that runs its step again: launches of kernels are no operations of torch."""

    def warm_up(self, run: Any) -> None:
        run()

    def capture(self, run: Any) -> Any:
        return run, run()


def second(step: Any) -> float:
    step()
    return 1.0


@pytest.fixture
def small() -> Bench:
    torch.manual_seed(0)
    return Bench(DEVICE, SMALL, clock=Replays(Again, second, second, second))


def as_at_real_sizes(check: Any, **options: Any) -> Any:
    """A check by the plan that a GPU's sizes have: h beside what products read, dX with a term that is added later."""

    def run(bench: Bench) -> Iterator[Row]:
        with plans.override(Plan("concat")):
            yield from check(bench, **options)

    return run


CHECKS = {
    "norm": partial(checks.norm, dropout_p=0.25),
    "norm, repeated": checks.norm_repeated,
    "gelu": partial(checks.activation, kind="gelu"),
    "quick_gelu, dropout": partial(checks.activation, kind="quick_gelu", dropout_p=0.25),
    "o": partial(checks.products, layer="o"),
    "q, k and v, dropout": partial(checks.products, layer="qkv", dropout_p=0.25),
    "concat": partial(checks.products, layer="o", plan=Plan("concat")),
    "attention half": checks.attention_half,
    "attention half, dropout": as_at_real_sizes(checks.attention_half, dropout_p=0.25),
    "MLP half": as_at_real_sizes(checks.mlp_half, kind="quick_gelu"),
    "MLP half, dropout": as_at_real_sizes(checks.mlp_half, kind="gelu", dropout_p=0.25),
    "attention": partial(checks.attention, tokens=5, causal=True),
}


@pytest.mark.parametrize("name", CHECKS)
def test_right_kernels_pass(small, name):
    rows = list(CHECKS[name](small))
    assert rows
    assert all(row["ok"] for row in rows), rows


def test_the_fold_passes_and_a_wrong_one_does_not(monkeypatch):
    torch.manual_seed(0)
    bench = Bench(DEVICE, SMALL._replace(width=16))
    assert all(row["ok"] for row in checks.fold(bench))

    def wrong(fold: Any) -> Any:
        return lambda *arguments: [tensor * 1.01 for tensor in fold(*arguments)]

    for name in ("fold_factors", "fold_factors_bwd"):
        monkeypatch.setattr(TritonBackend, name, wrong(getattr(TritonBackend, name)))
    assert not any(row["ok"] for row in checks.fold(bench))


WRONG = {
    "norm": (
        "norm_bwd",
        lambda result: (result[0] * 1.02, result[1]),
        ["ds", "ds with its rank-r term", "ds beside dA"],
    ),
    "gelu": ("activation_fwd", lambda result: (result[0], result[1] * torch.nan, *result[2:]), ["h"]),
    "MLP half": ("activation_bwd", lambda result: (result[0], [A * 1.05 for A in result[1]]), ["factor gradient 2"]),
    "o": ("packed_lora_linear_bwd", lambda result: result._replace(As=[A + 1e-1 for A in result.As]), ["dA"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_found(small, monkeypatch, name):
    method, spoil, found = WRONG[name]
    original = getattr(TritonBackend, method)
    monkeypatch.setattr(TritonBackend, method, lambda *args, **options: spoil(original(*args, **options)))
    assert [row["what"] for row in CHECKS[name](small) if not row["ok"]] == found


def test_an_h_that_is_wrong_now_and_then_is_found(small, monkeypatch):
    original: Any = TritonBackend.norm_fwd
    calls: list[int] = []

    def stale(*arguments: Any) -> Any:
        stream, normed, given = original(*arguments)
        calls.append(1)
        return stream, normed, given._replace(h=given.h + (len(calls) == 5))

    monkeypatch.setattr(TritonBackend, "norm_fwd", stale)
    *right, last = checks.norm_repeated(small)
    assert all(row["ok"] for row in right)
    assert (last["ok"], last["different"] > 0) == (False, True)


FITS = """
import json
import torch
from benchmarks import dispatch
from benchmarks.gpu.entries import entries
from benchmarks.gpu.problems import Bench

bench, launched = Bench(torch.device("cpu"), dry=True), set()
for entry in entries(bench):
    with dispatch.kernels_uncompiled(90, lambda kernel, *_: launched.add(kernel)), dispatch.Uncomputed():
        list(entry.run(bench))
print(json.dumps(sorted(launched)))
"""


@pytest.mark.long
def test_the_first_call_fits_the_launching_functions_and_launches_every_kernel():
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"PYTHONPATH": str(ROOT), "COMPLORA_BACKEND": "triton"}
    done = subprocess.run([sys.executable, "-c", FITS], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == sorted(launched_kernels())


# ---- the times


def test_a_product_is_timed_by_every_plan_against_cublas(small):
    rows = {row["what"]: row for row in times.product(small, "o", 2, backward=True)}
    assert {"cuBLAS, frozen", "concat", "merge", "fused, h inside"} < rows.keys()
    assert {row["of_cublas"] for row in rows.values()} == {1.0}
    assert {row["cold_s"] for row in rows.values()} == {1.0}


def test_what_moves_bytes_is_timed_against_a_copy(small):
    small.ceilings = {"bytes_per_s": 1e6}
    rows = list(times.activation(small, "gelu", 2))
    size = 2 * SMALL.tokens * 4 * SMALL.width * small.dtype.itemsize  # [M, 4 d]
    moved = [2 * size, 3 * size]
    assert [row["bytes"] for row in rows] == moved
    assert [row["of_copy"] for row in rows] == pytest.approx([each / 1e6 for each in moved])


def test_what_fails_and_what_cannot_be_captured_are_rows(small):
    def fails() -> None:
        raise RuntimeError("out of resources")

    class ReadsTheHost(Again):
        def capture(self, run: Any) -> Any:
            raise RuntimeError("it waits for the device")

    rows = times.timed(small, {"wrong": fails, "right": lambda: None})
    assert rows["wrong"] == {"what": "wrong", "error": "fails: RuntimeError: out of resources", "ok": False}
    assert rows["right"] == {"what": "right", "s": 1.0, "cold_s": 1.0}
    small.clock = Replays(ReadsTheHost, second, second, second)
    (row,) = times.one(small, "kernel", lambda: None, 1)
    assert row["error"] == "not captured: RuntimeError: it waits for the device"


# ---- what is taken along

PACKS = """
import sys
from pathlib import Path
import torch, triton
from benchmarks.gpu import cache, checks, entries

entries.entries = lambda bench: [entries.Entry("gelu", 1, lambda bench: checks.activation(bench, "gelu"))]
folder = Path(sys.argv[1])
one = cache.record(0, 1, 90, folder / "built")
assert one.failed == [] and one.misses == len(one.keys) == 2, one
cache.pack(folder / "built", [one], folder / "kernels.zip", 90)
for path in (folder / "built").rglob("*"):
    path.unlink() if path.is_file() else None
"""
TAKES = """
import sys, os
from pathlib import Path
folder = Path(sys.argv[1])
os.environ["TRITON_CACHE_DIR"] = str(folder / "elsewhere")
import triton
from triton.compiler import compiler
from triton.runtime import cache as triton_cache
triton_cache.triton_key = lambda: "another build of the same version"
from benchmarks.gpu import cache, checks, entries

entries.entries = lambda bench: [entries.Entry("gelu", 1, lambda bench: checks.activation(bench, "gelu"))]
print(cache.unpack(folder / "kernels.zip", launchers=False))
one = cache.record(0, 1, 90, folder / "elsewhere")
assert one.failed == [] and one.misses == 0 and len(one.keys) == 2, one
triton.__version__ = "1.0"
row = cache.unpack(folder / "kernels.zip")
assert not row["ok"] and "here is 1.0: all are compiled here" in row["error"], row
"""


@pytest.mark.long
def test_what_was_packed_is_found_by_another_build_of_triton_in_another_folder(tmp_path):
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = str(ROOT)
    for script in (PACKS, TAKES):
        command = [sys.executable, "-c", script, tmp_path]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    names = {path.suffix for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()}
    assert names == {".json", ".cubin"}
    shutil.rmtree(tmp_path / "elsewhere")
