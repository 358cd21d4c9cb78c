"""How a GPU is timed, with stand-ins for its clock and its graphs; and the rivals of a layer that only a GPU has."""

from __future__ import annotations

import csv
import json
import sys
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

from benchmarks import bench_layer, comparison, conftest, lorafusion, results
from benchmarks.bench_layer import FOLDED, LORAFUSION, OURS, PEFT, Rival, Shape
from benchmarks.comparison import Comparison, Missing, Work
from benchmarks.interleaved import GPU, Replays, captured, replays
from benchmarks.results import Results, Row
from complora_kernels.graphs import WARM_UPS

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
    return Replays(recorder, partial(seconds, takes=warm), partial(seconds, takes=cold))


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
    runs, checked = {"ours": 0, "rival": 0}, {}
    x = torch.arange(3.0)

    def step(name: str) -> list[Tensor]:
        runs[name] += 1
        return [x * 2]

    def check(name: str, found: list[Tensor]) -> None:
        checked[name] = found[0].tolist()

    compared = compare()
    steps = {name: partial(step, name) for name in runs}
    work = Work(1e9, 1e8 / 2)
    compared.time("s", steps, ours="ours", work=work, remarks={"rival": "slow"}, replays=clocks(), check=check)
    assert runs == {"ours": WARM_UPS + 1, "rival": WARM_UPS + 1}  # Python runs them before and while they are captured
    assert checked == {"ours": [0, 2, 4], "rival": [0, 2, 4]}
    rows = {row.rival: row for row in compared.found.rows}
    assert rows["rival"] == Row(
        "layer", "s", "rival", "slow", 3, 1, 1, 1, 1, cold_s=2, cold_ratio=1, roofline=1, intensity=20, revision="abc"
    )


def test_cold_ratios_are_of_their_own_rounds():
    times = iter([9.0, 9.0, 4.0, 2.0, 2.0, 4.0, 8.0, 2.0])  # ours and rival, not counted; then in turns, rival first
    compared = compare()
    steps = {"ours": lambda: None, "rival": lambda: None}
    compared.time("s", steps, ours="ours", replays=clocks()._replace(cold=lambda _: next(times)))
    (row,) = (row for row in compared.found.rows if row.rival == "rival")
    assert (row.median_s, row.ratio, row.cold_s, row.cold_ratio) == (1, 1, 4, 2)


def test_a_replay_that_is_wrong_ends_the_benchmark():
    def check(_name: str, found: list[Tensor]) -> None:
        assert found[0].isfinite().all(), "nothing wrote it"

    class Forgetful(CUDAGraphsOnCPU):
        def capture(self, run: Any) -> Any:
            _, found = super().capture(run)
            return lambda: None, found

    compared, x = compare(), torch.arange(3.0)
    wrong = clocks()._replace(recorder=partial(Forgetful, CPU))
    with pytest.raises(AssertionError, match="nothing wrote it"):
        compared.time("s", {"ours": lambda: [x * 2]}, ours="ours", replays=wrong, check=check)
    assert compared.found.rows == []


def test_a_step_that_cannot_be_captured_is_timed_with_its_launches():
    x, made, checked = torch.arange(3.0), [], []

    def reads_a_value() -> list[Tensor]:
        return [x * x.sum().item()]

    def recorder() -> CUDAGraphsOnCPU:
        made.append(CUDAGraphsOnCPU(CPU))
        return made[-1]

    steps = {"rival": reads_a_value, "another": reads_a_value, "ours": lambda: [x * 3]}
    compared = compare()
    compared.time(
        "s",
        steps,
        ours="ours",
        remarks={"rival": "slow"},
        replays=clocks()._replace(recorder=recorder),
        check=lambda name, _: checked.append(name),
    )
    remarks = {row.rival: row.remark for row in compared.found.rows}
    why = "not captured: timed with launches (RuntimeError: operation not permitted when stream is capturing: aten::"
    assert remarks["rival"].startswith(f"slow; {why}")
    assert remarks["another"].startswith(why)
    assert remarks["ours"] == ""
    assert len(made) == 3  # none that broke off a capture is used again
    assert checked == ["ours"]
    assert all(row.cold_s == 2 for row in compared.found.rows)


def test_a_step_that_fails_at_once_is_no_question_of_graphs():
    def wrong() -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        captured({"ours": wrong}, clocks().recorder)


def test_a_graph_that_does_not_fit():
    class Large(CUDAGraphsOnCPU):
        def capture(self, run: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    compared = compare()
    compared.time("s", {"ours": lambda: None}, ours="ours", replays=clocks()._replace(recorder=partial(Large, CPU)))
    assert [row.remark for row in compared.found.rows] == ["does not fit in memory beside the others"]


# ---- rows


def test_warm_and_cold_in_the_files_and_the_terminal(tmp_path):
    path = tmp_path / "gpu.json"
    timed = Row("layer", "s", "ours", "", 20, 1e-3, 1e-3, 1e-3, 1, 0.9, 1.1, cold_s=1.5e-3, cold_ratio=1.25)
    compared = compare(path)
    compared.record(timed)
    compared.record(Row("layer", "s", "rival", "with launches", 20, 2e-3, 2e-3, 2e-3, 2, 1.9, 2.1))
    content = json.loads(path.read_text())
    assert content["schema"] == 1
    assert [row.get("cold_s") for row in content["rows"]] == [1.5e-3, None]
    assert [row.get("cold_ratio") for row in content["rows"]] == [1.25, None]
    with path.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["cold_s"], row["cold_ratio"]) for row in rows] == [("0.0015", "1.25"), ("", "")]
    assert results.read(path).rows == compared.found.rows
    ours, rival = map(conftest.line, compared.found.rows)
    assert "1.00 ms  1.00 [0.90, 1.10]" in ours
    assert "warm L2; cold 1.50 ms  1.25" in ours
    assert "L2" not in rival


def test_an_older_file_has_no_cold_times(tmp_path):
    path = tmp_path / "older.json"
    row = {"benchmark": "layer", "shape": "s", "rival": "ours", "rounds": 20, "median_s": 1.0, "ratio": 1.0}
    path.write_text(json.dumps({"schema": 1, "machine": {}, "rows": [row]}))
    assert results.read(path).rows == [Row(**row)]
    assert results.read(path).rows[0].cold_s is None


# ---- the rivals of a layer


@pytest.fixture
def layer_rows(monkeypatch):
    """The rows of a small layer on a CPU whose graphs are stand-ins, with everyone but torch.compile."""
    for name, value in {"ON_GPU": False, "DEVICE": CPU, "DTYPE": torch.float32}.items():
        monkeypatch.setattr(bench_layer, name, value)
    monkeypatch.setattr(bench_layer, "replays", lambda _: clocks())

    def rows(
        rivals: dict[str, Rival], dropout_p: float = 0.0, *, backward: bool = True, checkout: Path | None = None
    ) -> dict[str, Row]:
        monkeypatch.setattr(bench_layer, "RIVALS", {name: replace(r, shapes=[TINY]) for name, r in rivals.items()})
        compared = compare()
        checkouts = {"--clip-lora": None, "--lorafusion": checkout}
        bench_layer.compare(compared, checkouts, TINY, "s", dropout_p, Work(1, 1), {}, backward=backward)
        return {row.rival: row for row in compared.found.rows}

    return rows


ON_A_CPU = {name: rival for name, rival in bench_layer.RIVALS.items() if name not in (FOLDED, LORAFUSION)}
THEIRS = Rival(bench_layer.lorafusion_linear, plain=True, checkout="--lorafusion", checked_with=bench_layer.BARELY)


@pytest.mark.parametrize("backward", [True, False])
def test_every_rival_of_a_layer_is_captured(layer_rows, backward):
    rows = layer_rows(ON_A_CPU, backward=backward)
    assert rows.keys() == ON_A_CPU.keys()
    assert {name: row.remark for name, row in rows.items()} == {name: r.remark for name, r in ON_A_CPU.items()}
    assert {row.cold_s for row in rows.values()} == {2}


def test_every_rival_of_a_layer_with_dropout(layer_rows):
    rows = layer_rows(ON_A_CPU, 0.25)
    assert ON_A_CPU.keys() - rows.keys() == {"merge"}
    launched = {name for name, row in rows.items() if "not captured: timed with launches" in row.remark}
    assert launched == {"torch backend"}  # its seeds are numbers of the host


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
    with pytest.raises(AssertionError, match=name):
        layer_rows({name: ON_A_CPU[name]})


def test_no_compiler(layer_rows, monkeypatch):
    def compiler_is_missing(*_: Any) -> None:
        raise BackendCompilerFailed(lambda: None, RuntimeError("No working C++ compiler found\nin …"), None)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: compiler_is_missing)
    rows = layer_rows({OURS: ON_A_CPU[OURS], FOLDED: bench_layer.RIVALS[FOLDED]})
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
    with pytest.raises(AttributeError):
        compared.attempt("s", "ours", fails)


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
    rivals = {OURS: ON_A_CPU[OURS], LORAFUSION: THEIRS}
    row = layer_rows(rivals, 0.25, checkout=checkout)[LORAFUSION]
    assert (row.remark, row.rounds, row.cold_s) == ("", 3, 2)
    row = layer_rows(rivals, checkout=checkout)[LORAFUSION]
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
