"""How a GPU is timed, with stand-ins for its clock and its graphs; and the baselines of a layer that only a GPU has."""

from __future__ import annotations

import csv
import gc
import json
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_graph_on_cpu import CUDAGraphsOnCPU
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from benchmarks import bench_factors, bench_layer, comparison, conftest, lorafusion, results
from benchmarks.bench_layer import FLOOR, FOLDED, LORAFUSION, OURS, PEFT, Baseline, Shape
from benchmarks.comparison import Comparison, Missing, Work
from benchmarks.interleaved import time_interleaved
from benchmarks.results import Results, Row
from complora_kernels.graphs import WARM_UPS
from complora_kernels.replays import GPU, SHORT, TOGETHER, Capturer, Replay, Replays, replays

CPU = torch.device("cpu")
LIMITS = {"operations_per_s": 1e9, "bytes_per_s": 1e8, "revision": "abc"}
TINY = Shape("tiny", 12, 16, 24, rank=4, k=5)


def compare(path: Path | None = None) -> Comparison:
    return Comparison("layer", 3, CPU, Results(dict(LIMITS), []), path)


def clocks(warm: float = 1.0, cold: float = 2.0) -> Replays:
    """Runs what it is given, which takes so long."""

    def seconds(step: Any, takes: float) -> float:
        step()
        return takes

    recorder = partial(CUDAGraphsOnCPU, CPU)
    times = (partial(seconds, takes=takes) for takes in (warm, cold, warm))
    return Replays(recorder, *times)


# ---- the clock


class FakeGPU:
    """Notes what it is asked for; every step takes `takes` milliseconds."""

    def __init__(self, takes: float) -> None:
        self.takes, self.asked = takes, []

    def ask(self, word: str) -> Any:
        return lambda: self.asked.append(word)

    def event(self) -> Any:
        gpu = self

        class Event:
            def record(self) -> None:
                self.steps_before = gpu.asked.count("step")
                gpu.asked.append("|")

            def synchronize(self) -> None:
                gpu.asked.append("wait")

            def elapsed_time(self, end: Any) -> float:
                return gpu.takes * (end.steps_before - self.steps_before)

        return Event()

    def clock(self) -> GPU:
        return GPU(self.event, self.ask("wait"), self.ask("flush"))


def test_a_cold_cache_is_flushed_before_every_replay_and_outside_its_time():
    gpu = FakeGPU(3)
    assert gpu.clock().cold_seconds(gpu.ask("step")) == pytest.approx(3e-3)
    assert " ".join(gpu.asked) == "wait flush | step | wait"


def test_a_warm_cache_has_seen_the_step_before_and_no_launch_is_waited_for():
    gpu = FakeGPU(3)
    assert gpu.clock().warm_seconds(gpu.ask("step")) == pytest.approx(3e-3)
    once, several = "wait flush step | step | wait", f"wait flush step | {'step ' * 6}| wait"
    assert " ".join(gpu.asked) == f"{once} {several}"


@pytest.mark.parametrize(("takes", "repeats"), [(0.01, 10), (15, None), (50, None)])
def test_short_steps_are_timed_several_in_a_row(takes, repeats):
    gpu = FakeGPU(takes)
    assert gpu.clock().seconds(gpu.ask("step")) == pytest.approx(takes / 1e3)
    assert gpu.asked.count("step") == 1 + (repeats or 0)
    assert "flush" not in gpu.asked


def test_a_cpu_has_no_launches_to_leave_out():
    assert replays(CPU) is None


# ---- replays


def test_replays_are_timed_and_checked():
    runs, checked = {"ours": 0, "baseline": 0}, {}
    x = torch.arange(3.0)

    def step(name: str) -> list[Tensor]:
        runs[name] += 1
        return [x * 2]

    def check(name: str, run: Any) -> None:
        assert isinstance(run, Replay)
        checked[name] = run()[0].tolist()

    compared = compare()
    steps = {name: partial(step, name) for name in runs}
    work = Work(1e9, 1e8 / 2)
    compared.time("s", steps, ours="ours", work=work, remarks={"baseline": "slow"}, replays=clocks(), check=check)
    assert runs == {
        "ours": WARM_UPS + 1,
        "baseline": WARM_UPS + 1,
    }  # Python runs them before and while they are captured
    assert checked == {"ours": [0, 2, 4], "baseline": [0, 2, 4]}
    rows = {row.baseline: row for row in compared.found.rows}
    known = {"roofline": 1, "intensity": 20, "operations_per_s": 1e9, "bytes_per_s": 1e8, "revision": "abc"}
    cold = {"cold_s": 2, "cold_p20_s": 2, "cold_p80_s": 2, "cold_ratio": 1}
    assert rows["baseline"] == Row("layer", "s", "baseline", "slow", 3, 1, 1, 1, 1, **cold, **known)


def test_cold_ratios_are_of_their_own_rounds():
    times = iter(
        [9.0, 9.0, 4.0, 2.0, 2.0, 4.0, 8.0, 2.0]
    )  # ours and baseline, not counted; then in turns, baseline first
    compared = compare()
    steps = {"ours": lambda: None, "baseline": lambda: None}
    compared.time("s", steps, ours="ours", replays=clocks()._replace(cold=lambda _: next(times)))
    (row,) = (row for row in compared.found.rows if row.baseline == "baseline")
    assert (row.median_s, row.ratio, row.cold_s, row.cold_ratio) == (1, 1, 4, 2)
    assert (row.cold_p20_s, row.cold_p80_s, row.cold_ratio_low) == (4, pytest.approx(6.4), None)


def test_short_replays_are_repeated_in_one_graph_with_a_warm_cache():
    """Half the seconds of a launch, and those of ten steps in one graph; a cold cache is for one of them."""
    runs, x = [], torch.zeros(())

    def step() -> Tensor:
        runs.append(1)
        return x.add_(1)

    def timed(run: Any) -> float:
        before = float(x)
        run()
        return 4e-6 + 1e-6 * (float(x) - before)

    compared = compare()
    compared.time("s", {"ours": step}, ours="ours", replays=clocks()._replace(warm=timed, cold=timed))
    (row,) = compared.found.rows
    assert len(runs) == WARM_UPS + 1 + TOGETHER
    assert (row.median_s, row.cold_s) == (pytest.approx(1.4e-6), pytest.approx(5e-6))
    long = Capturer(clocks(warm=SHORT))(step)
    assert isinstance(long, Replay)
    assert long.several is None


def test_a_replay_that_is_wrong_is_a_row_and_a_failure_and_the_others_are_timed():
    def check(_name: str, run: Any) -> None:
        assert run()[0].isfinite().all(), "nothing wrote it"

    class Forgetful(CUDAGraphsOnCPU):
        def capture(self, run: Any) -> Any:
            _, found = super().capture(run)
            return lambda: None, found

    compared, x = compare(), torch.arange(3.0)
    wrong = clocks()._replace(recorder=partial(Forgetful, CPU))
    steps = {"ours": lambda: [x * 2], "baseline": lambda: [x + 1]}
    launched = {"baseline": "reads the host"}
    compared.time("s", steps, ours="ours", replays=wrong, check=check, launched=launched)
    rows = {row.baseline: row for row in compared.found.rows}
    assert (rows["ours"].remark, rows["ours"].rounds) == ("fails: AssertionError: nothing wrote it", 0)
    assert (rows["baseline"].rounds, rows["baseline"].ratio) == (3, None)
    assert compared.failed == ["s, ours: AssertionError: nothing wrote it"]


def test_a_step_that_cannot_be_captured_is_timed_with_its_launches():
    x, made, checked = torch.arange(3.0), [], []

    def reads_a_value() -> list[Tensor]:
        return [x * x.sum().item()]

    def recorder() -> CUDAGraphsOnCPU:
        made.append(CUDAGraphsOnCPU(CPU))
        return made[-1]

    steps = {"baseline": reads_a_value, "another": reads_a_value, "ours": lambda: [x * 3]}
    compared = compare()
    compared.time(
        "s",
        steps,
        ours="ours",
        remarks={"baseline": "slow"},
        replays=clocks()._replace(recorder=recorder),
        check=lambda name, _: checked.append(name),
    )
    remarks = {row.baseline: row.remark for row in compared.found.rows}
    why = "not captured: timed with launches (RuntimeError: operation not permitted when stream is capturing: aten::"
    assert remarks["baseline"].startswith(f"slow; {why}")
    assert remarks["another"].startswith(why)
    assert remarks["ours"] == ""
    assert len(made) == 3  # none that broke off a capture is used again
    assert checked == ["baseline", "another", "ours"]
    assert all(row.cold_s == 2 for row in compared.found.rows)


def test_what_is_known_to_read_the_host_is_not_captured(monkeypatch):
    monkeypatch.setattr(CUDAGraphsOnCPU, "capture", lambda *_: pytest.fail("captured"))
    compared = compare()
    compared.time("s", {"ours": lambda: 1}, ours="ours", replays=clocks(), launched={"ours": "reads the host"})
    assert [row.remark for row in compared.found.rows] == ["not captured: timed with launches (reads the host)"]


def test_a_capture_that_fails_leaves_nothing_of_its_step():
    """Not even what only the collector of cycles can free."""
    made: list[weakref.ref[Any]] = []

    class Node:
        def __init__(self) -> None:
            self.itself = self
            made.append(weakref.ref(self))

    def step() -> float:
        node = Node()
        return torch.ones(3).sum().item() + bool(node)

    gc.disable()
    try:
        assert isinstance(Capturer(clocks())(step), str)
        assert [node() for node in made] == [None] * (WARM_UPS + 1)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("launched", "figure"), [([], 1), (["ours"], None), (["baseline"], None), (["ours", "baseline"], 1)]
)
def test_a_figure_is_of_two_times_of_one_kind(monkeypatch, launched, figure):
    monkeypatch.setattr(comparison, "bounds", lambda: {"a target": {"at_least": 2}})
    compared, steps = compare(), {"ours": lambda: None, "baseline": lambda: None}
    reasons = dict.fromkeys(launched, "reads the host")
    compared.time("s", steps, ours="ours", targets={"baseline": "a target"}, replays=clocks(), launched=reasons)
    assert {row.baseline: row.figure for row in compared.found.rows} == {"ours": None, "baseline": figure}


def test_a_step_that_fails_at_once_is_no_question_of_graphs():
    def wrong() -> None:
        raise RuntimeError("shapes do not fit")

    compared = compare()
    compared.time("s", {"ours": wrong}, ours="ours", replays=clocks())
    assert [row.remark for row in compared.found.rows] == ["fails: RuntimeError: shapes do not fit"]
    assert len(compared.failed) == 1


def test_foreign_code_that_fails_when_it_is_warmed_up_is_a_row():
    def wrong() -> None:
        raise RuntimeError("an illegal address")

    compared = compare()
    steps = {"ours": lambda: None, "theirs": wrong}
    compared.time("s", steps, ours="ours", replays=clocks(), foreign=["theirs"])
    assert {row.baseline: (row.remark, row.rounds) for row in compared.found.rows} == {
        "theirs": ("fails: RuntimeError: an illegal address", 0),
        "ours": ("", 3),
    }
    assert compared.failed == []


def test_a_graph_that_does_not_fit():
    class Large(CUDAGraphsOnCPU):
        def capture(self, run: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    compared = compare()
    compared.time("s", {"ours": lambda: None}, ours="ours", replays=clocks()._replace(recorder=partial(Large, CPU)))
    assert [row.remark for row in compared.found.rows] == ["does not fit in memory"]


def no_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_costs_the_others_nothing():
    """It gives back what it took, and is left out from then on."""
    calls, held = [], []

    def grows() -> None:
        calls.append(1)
        if len(calls) == 3:
            big = torch.ones(3)
            held.append(weakref.ref(big))
            no_memory()
        assert all(tensor() is None for tensor in held)

    steps = {"ours": lambda: None, "grows": grows, "baseline": lambda: None}
    timings = time_interleaved(steps, ours="ours", rounds=4, warm_up=1, measure=lambda step: step() or 1.0)
    assert {name: len(timing.ratios) for name, timing in timings.items()} == {"ours": 4, "baseline": 4}
    assert held[0]() is None


@pytest.mark.parametrize("with_replays", [True, False])
def test_where_ours_does_not_fit_there_are_no_ratios(with_replays):
    compared = compare()
    compared.time(
        "s",
        {"ours": no_memory, "baseline": lambda: None},
        ours="ours",
        targets={"baseline": "layer/PEFT"},
        replays=clocks() if with_replays else None,
        measure=lambda step: step() or 1.0,
    )
    rows = {row.baseline: row for row in compared.found.rows}
    assert rows["ours"].remark.startswith("does not fit in memory")
    baseline = rows["baseline"]
    assert (baseline.rounds, baseline.median_s, baseline.ratio, baseline.figure) == (3, 1, None, None)


def test_a_row_of_a_gpu_has_its_state_and_the_ceilings_of_its_roofline(monkeypatch):
    monkeypatch.setattr(comparison.machine, "gpu_state", lambda: {"sm_clock": "1980 MHz", "slowed": "0x4"})
    compared = replace(compare(), device=torch.device("cuda"))
    compared.time("s", {"ours": lambda: None}, ours="ours", measure=lambda _: 1.0, work=Work(1e9, 1e8))
    compared.found.machine |= {"operations_per_s": 2e9}  # as a later stage measures it
    (row,) = compared.found.rows
    assert (row.sm_clock, row.slowed, row.power) == ("1980 MHz", "0x4", None)
    assert (row.operations_per_s, row.bytes_per_s) == (1e9, 1e8)


def test_rows_of_an_earlier_comparison_stay():
    compared = compare()
    compared.time("s", {"ours": lambda: None, "baseline": lambda: None}, ours="ours", replays=clocks())
    second = {"ours": no_memory, "compiled": lambda: None}
    compared.time("s", second, ours="ours", replays=clocks(3.0), again=["ours"])
    rows = {row.baseline: row for row in compared.found.rows}
    assert rows.keys() == {"ours", "baseline", "compiled"}
    assert (rows["ours"].median_s, rows["ours"].remark) == (1, "")
    assert rows["compiled"].median_s == 3


@pytest.mark.parametrize(
    ("now", "baselines", "go_on", "known"),
    [
        ("abc", ["ours", "baseline"], True, True),
        ("abc", ["ours", "baseline"], False, False),
        ("abc", ["ours", "baseline", "another"], True, False),
        ("abd", ["ours"], True, False),
        ("abc+", ["ours"], True, False),
        ("abc", ["ours", "broken"], True, False),
    ],
)
def test_what_was_measured_of_this_revision_is_left_where_that_is_asked(now, baselines, go_on, known):
    rows = [Row("layer", "s", baseline, rounds=1, revision=now.replace("d", "c")) for baseline in ("ours", "baseline")]
    rows.append(Row("layer", "s", "broken", "fails: AssertionError: broken", revision=now))
    compared = Comparison("layer", 3, CPU, Results({"revision": now}, rows), None, go_on)
    assert compared.known("s", baselines) == known
    assert not compared.known("t", baselines)


# ---- rows


def test_warm_and_cold_in_the_files_and_the_terminal(tmp_path):
    path = tmp_path / "gpu.json"
    cold: dict[str, Any] = {"cold_s": 1.5e-3, "cold_ratio": 1.25, "cold_ratio_low": 1.2, "cold_ratio_high": 1.3}
    timed = Row("layer", "s", "ours", "", 20, 1e-3, 1e-3, 1e-3, 1, 0.9, 1.1, **cold)
    compared = compare(path)
    compared.record(timed)
    compared.record(Row("layer", "s", "baseline", "with launches", 20, 2e-3, 2e-3, 2e-3, 2, 1.9, 2.1))
    content = json.loads(path.read_text())
    assert content["schema"] == 3
    assert [row.get("cold_s") for row in content["rows"]] == [1.5e-3, None]
    assert [row.get("cold_ratio") for row in content["rows"]] == [1.25, None]
    with path.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["cold_s"], row["cold_ratio"]) for row in rows] == [("0.0015", "1.25"), ("", "")]
    assert results.read(path).rows == compared.found.rows
    ours, baseline = map(conftest.line, compared.found.rows)
    assert "1.00 ms  1.00 [0.90, 1.10]" in ours
    assert "warm L2; cold 1.50 ms  1.25 [1.20, 1.30]" in ours
    assert "L2" not in baseline


def test_a_file_of_a_cpu_has_no_cold_times(tmp_path):
    path = tmp_path / "older.json"
    row = {"benchmark": "layer", "shape": "s", "baseline": "ours", "rounds": 20, "median_s": 1.0, "ratio": 1.0}
    path.write_text(json.dumps({"schema": 3, "machine": {}, "rows": [row]}))
    assert results.read(path).rows == [Row(**row)]
    assert results.read(path).rows[0].cold_s is None


# ---- the baselines of a layer


@pytest.fixture
def layer_rows(monkeypatch):
    """The rows of a small layer on a CPU whose graphs are stand-ins, with everyone but torch.compile."""
    for name, value in {"ON_GPU": False, "DEVICE": CPU, "DTYPE": torch.float32}.items():
        monkeypatch.setattr(bench_layer, name, value)
    monkeypatch.setattr(bench_layer, "replays", lambda _: clocks())

    def rows(
        baselines: dict[str, Baseline], dropout_p: float = 0.0, *, backward: bool = True, checkout: Path | None = None
    ) -> dict[str, Row]:
        compared = compare()
        checkouts = {"--clip-lora": None, "--lorafusion": checkout}
        shape = TINY._replace(tokens=256) if dropout_p else TINY  # masks are known by what they are in the mean
        made = {name: replace(r, shapes=[shape]) for name, r in baselines.items()}
        monkeypatch.setattr(bench_layer, "BASELINES", made)
        bench_layer.compare(compared, checkouts, shape, "s", dropout_p, Work(1, 1), {}, backward=backward)
        return {row.baseline: row for row in compared.found.rows}

    return rows


ON_A_CPU = {name: baseline for name, baseline in bench_layer.BASELINES.items() if name not in (FOLDED, LORAFUSION)}
THEIRS = Baseline(
    bench_layer.lorafusion_linear,
    plain=True,
    checkout="--lorafusion",
    checked_with=bench_layer.BARELY,
    host_seed="kept",
)


@pytest.mark.parametrize("backward", [True, False])
def test_every_baseline_of_a_layer_is_captured(layer_rows, backward):
    rows = layer_rows(ON_A_CPU, backward=backward)
    assert rows.keys() == ON_A_CPU.keys()
    assert {name: row.remark for name, row in rows.items()} == {name: r.remark for name, r in ON_A_CPU.items()}
    assert {row.cold_s for row in rows.values()} == {2}


def test_every_baseline_of_a_layer_with_dropout(layer_rows):
    rows = layer_rows(ON_A_CPU, 0.25)
    assert ON_A_CPU.keys() - rows.keys() == {"merge"}
    launched = {name: row.remark for name, row in rows.items() if "not captured: timed with launches" in row.remark}
    assert launched.keys() == {"torch backend"}
    assert launched["torch backend"].endswith("(draws its seed on the host)")


@pytest.fixture
def dropped(monkeypatch):
    """A layer of 256 tokens on a CPU that drops, and what its results are without."""
    monkeypatch.setattr(bench_layer, "DEVICE", CPU)
    monkeypatch.setattr(bench_layer, "DTYPE", torch.float32)
    layer = bench_layer.make_layer(TINY._replace(tokens=256))
    truths = bench_layer.true_results(layer)
    layer.dropout_p = 0.25
    torch.manual_seed(1)
    return layer, truths


@pytest.mark.parametrize("name", [*(name for name in ON_A_CPU if name != "merge"), FLOOR])
def test_what_drops_as_it_must(dropped, name):
    layer, truths = dropped
    run = bench_layer.step(layer, ON_A_CPU[name].make(layer), ON_A_CPU[name].plan)
    bench_layer.check_dropout(truths, layer, name, run)


def mistake(kind: str, layer: bench_layer.Layer) -> Tensor:
    """y of a layer with one mistake in its dropout."""
    x, p = layer.x.detach(), layer.dropout_p
    masks = {
        "does not scale": (torch.rand_like(x) >= p).float(),
        "another rate": (torch.rand_like(x) >= 0.5).float() * 2,
        "drops nothing": torch.ones_like(x),
        "one mask": (torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) >= p).float() / (1 - p),
    }
    update = bench_layer.update_of(layer, layer.A, layer.B, "ours").float()
    return torch.nn.functional.linear(x, layer.weight, layer.bias) + (x * masks[kind]) @ update.mT


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("does not scale", "0.7[0-9]+ of the update arrives with dropout"),
        ("another rate", "drops [23].[0-9]+ times what its rate says"),
        ("drops nothing", "drops 0.000 times what its rate says"),
        ("one mask", "two runs differ by 0.000 of two independent masks"),
    ],
)
def test_what_drops_otherwise_is_not_timed(dropped, monkeypatch, kind, message):
    layer, truths = dropped
    monkeypatch.setitem(bench_layer.BASELINES, "wrong", Baseline(bench_layer.frozen))
    with pytest.raises(AssertionError, match=f"^wrong: {message}"):
        bench_layer.check_dropout(truths, layer, "wrong", lambda: [mistake(kind, layer)])


def test_a_seed_that_is_kept_repeats_its_mask(dropped, monkeypatch):
    layer, truths = dropped
    monkeypatch.setitem(bench_layer.BASELINES, "theirs", Baseline(bench_layer.frozen, host_seed="kept"))
    bench_layer.check_dropout(truths, layer, "theirs", lambda: [mistake("one mask", layer)])


@pytest.mark.parametrize("name", [OURS, PEFT])
@pytest.mark.parametrize("broken", [0, 1, 2, 3])
def test_a_layer_with_one_wrong_result(layer_rows, monkeypatch, name, broken):
    """The output, dX, dA, dB."""
    step = bench_layer.Layer.step

    def wrong(layer: bench_layer.Layer, forward: Any) -> list[Tensor]:
        found = step(layer, forward)
        found[broken] = found[broken] + 1e-3
        return found

    monkeypatch.setattr(bench_layer.Layer, "step", wrong)
    row = layer_rows({name: ON_A_CPU[name]})[name]
    assert (row.remark, row.rounds) == (f"fails: AssertionError: {name}", 0)


def test_no_compiler(layer_rows, monkeypatch):
    def compiler_is_missing(*_: Any) -> None:
        raise BackendCompilerFailed(lambda: None, RuntimeError("No working C++ compiler found\nin …"), None)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: compiler_is_missing)
    rows = layer_rows({OURS: ON_A_CPU[OURS], FOLDED: bench_layer.BASELINES[FOLDED]})
    assert rows[FOLDED].remark == "not compiled: RuntimeError: No working C++ compiler found"
    assert rows[OURS].rounds == 3


def test_where_an_option_was_not_given(layer_rows):
    rows = layer_rows({OURS: ON_A_CPU[OURS], LORAFUSION: THEIRS})
    assert (rows[LORAFUSION].remark, rows[LORAFUSION].rounds) == ("not given: --lorafusion PATH", 0)
    assert rows[OURS].rounds == 3


def test_foreign_code_that_fails_is_a_row():
    def fails() -> None:
        raise AttributeError("'NoneType' object has no attribute 'shape'\nand so on" + 200 * "!")

    compared = compare()
    assert compared.attempt("s", "theirs", fails, foreign=True) is None
    assert compared.found.rows[0].remark == "fails: AttributeError: 'NoneType' object has no attribute 'shape'"
    assert compared.failed == []


# ---- operations on factors


def test_everyone_but_a_mere_read_is_checked(monkeypatch):
    monkeypatch.setattr(bench_factors, "replays", lambda _: clocks())
    x, benchmarked = torch.arange(3.0), []

    class Benchmark:
        def pedantic(self, run: Any, rounds: int) -> None:
            benchmarked.append(run)

    def rows(**steps: Any) -> dict[str, Row]:
        compared = compare()
        named = {name.replace("_", " "): step for name, step in steps.items()}
        bench_factors.compare(Benchmark(), compared, "s", named, [x.double() * 2], {}, Work(1, 1))
        return {row.baseline: row for row in compared.found.rows}

    found = rows(extension=lambda: [x * 2], one_read_of_x=lambda: [x.sum()])
    assert {row.cold_s for row in found.values()} == {2}
    assert found["one read of x"].roofline is None
    assert len(benchmarked) == 1
    wrong = rows(extension=lambda: [x * 2], torch=lambda: [x * 2.001])["torch"]
    assert (wrong.remark.partition(":")[0], wrong.rounds) == ("fails", 0)


# ---- LoRAFusion

CHECKOUT = {
    "__init__.py": "",
    "ops/__init__.py": "",
    "ops/triton_ops/__init__.py": "",
    "ops/triton_ops/tma_utils.py": "raise AttributeError('no TMA')",
    "ops/triton_ops/config.py": """
H100_CONFIG = "tiles"
HARDWARE_CONFIGS = {"a100": "other tiles"}
def get_device_short_name():
    return "h200"
""",
    "ops/lora_v1.py": """
import warnings
from lorafusion.ops.triton_ops.config import HARDWARE_CONFIGS
from lorafusion.ops.triton_ops.fused_lora_dyw_dsa_tma import fused_lora_dyw_dsa_tma
from lorafusion.ops.triton_ops.fused_lora_xw_sb_tma import fused_lora_xw_sb_tma
from lorafusion.ops.triton_ops.tma_utils import HAS_TMA_DESC
from torch.nn import functional as F
assert not HAS_TMA_DESC
warnings.warn("no TMA")
def fused_linear_lora(x, linear_w, lora_a, lora_b, alpha, seed=None, dropout_p=0.0, linear_bias=None):
    assert x.dim() == 3
    if not dropout_p:
        raise AttributeError("no mask")
    return F.linear(x, linear_w, linear_bias) + FACTOR * F.linear(F.linear(F.dropout(x, dropout_p), lora_a), lora_b)
FACTOR = 1
""",
}


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Iterator[Path]:
    """One with the files that are imported, and their habits."""
    for name, text in CHECKOUT.items():
        path = tmp_path / "lorafusion" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(lorafusion, "PACKAGES", ())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "lorafusion"]:
        del sys.modules[name]


def test_their_layer_is_timed_with_dropout_alone(layer_rows, checkout):
    baselines = {OURS: ON_A_CPU[OURS], LORAFUSION: THEIRS}
    row = layer_rows(baselines, 0.25, checkout=checkout)[LORAFUSION]
    assert (row.remark, row.rounds, row.cold_s) == ("", 3, 2)
    row = layer_rows(baselines, checkout=checkout)[LORAFUSION]
    assert (row.remark, row.rounds) == ("fails: AttributeError: no mask", 0)
    assert str(checkout) not in sys.path
    assert sys.modules["lorafusion.ops.triton_ops.config"].HARDWARE_CONFIGS == {"a100": "other tiles", "h200": "tiles"}


def test_their_wrong_results_are_not_timed(layer_rows, checkout):
    path = checkout / "lorafusion/ops/lora_v1.py"
    path.write_text(path.read_text().replace("FACTOR = 1", "FACTOR = 2"))
    row = layer_rows({OURS: ON_A_CPU[OURS], LORAFUSION: THEIRS}, 0.25, checkout=checkout)[LORAFUSION]
    assert (row.remark.partition(":")[0], row.rounds) == ("fails", 0)


def test_a_folder_that_is_no_checkout_of_theirs(tmp_path):
    with pytest.raises(Missing, match=r"--lorafusion .*expected a checkout with lorafusion/ops/lora_v1\.py"):
        lorafusion.fused_linear_lora(tmp_path)


def test_packages_that_their_files_import(checkout, monkeypatch):
    monkeypatch.setattr(lorafusion, "PACKAGES", ("torch", "no_such_one", "nor_this"))
    with pytest.raises(Missing, match=r"^not installed: pip install no_such_one nor_this$"):
        lorafusion.fused_linear_lora(checkout)


def test_the_option_of_their_checkout():
    assert comparison.needed("--lorafusion", {"--lorafusion": Path("there")}) == Path("there")
