"""Tuning: what is measured, how, and what is written when something fails on the way."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from failures import contents, failing
from torch import Tensor

from complora_kernels import functional, replays, tune
from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.backends import plans
from complora_kernels.backends.plans import Plan, Problem
from complora_kernels.common.files import unsealed
from complora_kernels.kernels import linear

PROBLEM = Problem("torch", "cpu", 8, 16, 48, 2, 3, "float32", "float32", False)
CONCAT, ADDMM, MERGE = Plan("concat"), Plan("addmm"), Plan("merge")
OPTIONS = ["--model-shapes", "tiny", "--batch", "1", "--rank", "2", "--rounds", "1", "--backend", "torch"]


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A plan file of its own, and a preset of 5 tokens of width 16."""
    monkeypatch.delenv("COMPLORA_PLAN", raising=False)
    monkeypatch.delenv("COMPLORA_BACKEND", raising=False)
    monkeypatch.setenv("COMPLORA_PLANS", str(tmp_path / "cache" / "plans.json"))
    monkeypatch.setitem(tune.SHAPES, "tiny", (16, 5))
    plans.reload()
    yield tmp_path / "cache" / "plans.json"
    plans.reload()


class Standin:
    """The real product, the problems it asks about, the plans that computed it, and what a test makes of its output."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compute, self.choose, self.choose_for = functional.packed_lora_linear, plans.choose, plans.choose_for
        self.asked: set[Problem] = set()
        self.chosen: list[Plan] = []
        self.ran: list[str] = []
        self.behaviour: dict[str, Callable[[Tensor], Tensor]] = {}
        monkeypatch.setattr(functional, "packed_lora_linear", self.product)
        monkeypatch.setattr(plans, "choose_for", self.spy)

    def spy(self, x: Tensor, linear: AdaptedLinear, backend: str) -> Plan:
        As, dropout = linear.As, linear.dropout_p > 0
        numbers = {"rank": max(map(len, As)), "adapters": len(As), "dtype": x.dtype, "dropout": dropout}
        self.asked.add(plans.problem(x, linear.weight, backend=backend, **numbers))
        self.chosen.append(self.choose_for(x, linear, backend))
        return self.chosen[-1]

    def product(self, *args: Any, **options: Any) -> Tensor:
        y = self.compute(*args, **options)
        self.ran.append(self.chosen[-1].name)
        return self.behaviour.get(self.ran[-1], lambda y: y)(y)


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Standin:
    return Standin(monkeypatch)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, standin: Standin) -> dict[str, float]:
    """Seconds that each plan takes by `time.perf_counter`, for tests to set."""
    seconds = {"concat": 1.0, "merge": 1.0, "addmm": 1.0}
    monkeypatch.setattr(replays.time, "perf_counter", lambda: sum(seconds[name] for name in standin.ran))
    return seconds


@pytest.mark.parametrize(
    ("preset", "model", "tower"),
    [
        ("ViT-B-32", "ViT-B-32", "vision_cfg"),
        ("ViT-B-16", "ViT-B-16", "vision_cfg"),
        ("ViT-L-14", "ViT-L-14", "vision_cfg"),
        ("text-512", "ViT-B-32", "text_cfg"),
        ("text-512", "ViT-B-16", "text_cfg"),
        ("text-768", "ViT-L-14", "text_cfg"),
    ],
)
def test_presets_are_open_clips_models(preset, model, tower):
    config = open_clip.get_model_config(model)
    assert config is not None
    tower = config[tower]
    tokens = tower.get("context_length") or (tower["image_size"] // tower["patch_size"]) ** 2 + 1
    assert tune.SHAPES[preset] == (tower["width"], tokens)


def test_every_layer_is_measured_with_the_plan_that_is_fastest(standin, clock, path, capsys):
    clock |= {"concat": 0.2, "addmm": 0.3, "merge": 0.1}
    assert tune.main([*OPTIONS, "--batch", "3", "--rounds", "2"]) == 0
    tuned = {problem: entry.measured for (problem, _), entry in plans.read(path).items()}
    layers = {(16, 48, 3), (16, 16, 1), (16, 64, 1), (64, 16, 1)}
    assert tuned.keys() == {
        Problem("torch", "cpu", 16, K, N, 2, adapters, "float32", "float32", dropout)
        for K, N, adapters in layers
        for dropout in (False, True)
    }
    assert tuned.keys() == standin.asked  # what the layers ask about, in the same words
    for problem, measured in tuned.items():
        expected = {CONCAT: 0.2, ADDMM: 0.3} | ({} if problem.dropout else {MERGE: 0.1})
        assert dict(measured) == pytest.approx(expected)
        assert standin.choose(problem) == (CONCAT if problem.dropout else MERGE)
    printed = capsys.readouterr().out
    assert (
        f"tiny fc2: {PROBLEM._replace(tokens=16, inputs=64, outputs=16, adapters=1)}\n    100000.0 µs  merge\n"
        in printed
    )


def test_plans_take_turns_and_the_median_counts(monkeypatch):
    order, clock = [], iter([0, 1, 1, 3, 3, 4, 4, 14, 14, 15, 15, 17])

    def step(plan: Plan) -> list[Tensor]:
        order.append(plan.name)
        return []

    monkeypatch.setattr(replays.time, "perf_counter", lambda: next(clock))
    steps = {plan: (lambda plan=plan: step(plan)) for plan in (CONCAT, ADDMM)}
    measured = tune.measure(steps, None, 3, print)
    assert order == ["concat", "addmm", "addmm", "concat", "concat", "addmm"]
    assert measured == [(CONCAT, statistics.median([1, 10, 1])), (ADDMM, statistics.median([2, 1, 2]))]


class Timed:
    """Graphs that are the steps themselves; a replay of a plan takes `seconds` of its own, a launched step one."""

    def __init__(self, seconds: dict[Plan, float], broken: Plan | None = None) -> None:
        self.seconds, self.broken = seconds, broken
        self.steps = {plan: lambda plan=plan: [torch.tensor(list(seconds).index(plan))] for plan in seconds}

    def plan(self, run: Any) -> Plan:
        return list(self.seconds)[int(run()[0])]

    def warm_up(self, run: Callable[[], Any]) -> None:
        pass

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        result = run()
        if self.plan(lambda: result) == self.broken:
            raise RuntimeError("it reads the host")
        return lambda: None, result

    def replays(self) -> replays.Replays:
        def warm(run: Any) -> float:
            assert isinstance(run, replays.Replay), "a step with its launches"
            return self.seconds[self.plan(run)]

        return replays.Replays(lambda: self, warm, warm, lambda run: 1.0 + self.seconds[self.plan(run)])


def test_a_gpu_is_timed_by_replays():
    timed = Timed({CONCAT: 0.2, MERGE: 0.1, ADDMM: 0.3})
    said: list[str] = []
    measured = tune.measure(timed.steps, timed.replays(), 3, said.append)
    assert measured == [(MERGE, 0.1), (CONCAT, 0.2), (ADDMM, 0.3)]
    assert said == []


def test_where_one_plan_cannot_be_captured_all_are_timed_with_their_launches():
    timed = Timed({CONCAT: 0.2, ADDMM: 0.3}, broken=ADDMM)
    said: list[str] = []
    measured = tune.measure(timed.steps, timed.replays(), 3, said.append)
    assert measured == [(CONCAT, 1.2), (ADDMM, 1.3)]
    why = "addmm cannot be captured: RuntimeError: it reads the host"
    assert said == [f"  all plans are timed with their launches: {why}"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_keeps_float32_weights(standin, path, dtype):
    assert tune.main([*OPTIONS, "--dtype", dtype, "--autocast", "--dropout", "0"]) == 0
    entries = plans.read(path)
    assert {(problem.dtype, problem.weight_dtype) for problem, _ in entries} == {(dtype, "float32")}
    assert {problem for problem, _ in entries} == standin.asked
    assert {plan.name for entry in entries.values() for plan, _ in entry.measured} == {"concat", "merge", "addmm"}


def test_dry_run_writes_nothing(standin, path, capsys):
    assert tune.main([*OPTIONS, "--dry-run"]) == 0
    assert "tiny qkv: torch, cpu, M <= 8" in capsys.readouterr().out
    assert not path.parent.exists()


def test_output(standin, path, tmp_path):
    assert tune.main([*OPTIONS, "--dropout", "0", "--output", str(tmp_path / "here.json")]) == 0
    assert len(plans.read(tmp_path / "here.json")) == len(tune.LAYERS)
    assert not path.exists()


def out_of_resources(_: Tensor) -> Tensor:
    raise RuntimeError("out of resources")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (out_of_resources, "RuntimeError: out of resources"),
        (lambda y: y + 0.01, "ArithmeticError: "),
        (lambda y: y * torch.nan, "ArithmeticError: nan away from concat, expected at most 1.0e-05"),
        (lambda y: y.detach() + 0 * y, "ArithmeticError: "),  # the right output, wrong gradients
    ],
)
def test_plan_that_fails_is_left_out_with_its_reason(standin, clock, path, capsys, broken, reason):
    clock["addmm"] = 0.1
    standin.behaviour["addmm"] = broken
    assert tune.main([*OPTIONS, "--dropout", "0.5"]) == 0
    assert f"  addmm is left out: {reason}" in capsys.readouterr().out
    assert [[plan for plan, _ in entry.measured] for entry in plans.read(path).values()] == [[CONCAT]] * 4


def test_nothing_is_written_where_no_plan_runs(standin, path):
    standin.behaviour = dict.fromkeys(plans.NAMES, out_of_resources)
    assert tune.main(OPTIONS) == 0
    assert plans.read(path) == {}


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "stopped: what was measured is kept\n"),
        (OSError("disk full"), 1, "error: disk full\n"),
    ],
)
def test_what_was_measured_is_kept(standin, path, monkeypatch, capsys, error, code, said):
    failing(monkeypatch, tune, "measure", {2}, error)
    assert tune.main([*OPTIONS, "--dropout", "0"]) == code
    assert capsys.readouterr().err.endswith(said)
    assert [problem.outputs for problem, _ in plans.read(path)] == [48, 16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "expected --batch, --rank and --rounds of at least 1, and --dropout in [0, 1)"),
        (["--dropout", "1"], "expected --batch, --rank and --rounds of at least 1, and --dropout in [0, 1)"),
        (["--autocast", "--dtype", "float32"], "--autocast with torch.float32, expected bfloat16 or float16"),
        (["--model-shapes", "ViT-Z"], "invalid choice: 'ViT-Z'"),
    ],
)
def test_bad_options(standin, path, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        tune.main([*OPTIONS, *options])
    assert message in capsys.readouterr().err
    assert standin.ran == []
    assert not path.exists()


def test_backend_without_plans_is_refused(standin, monkeypatch, capsys):
    monkeypatch.setenv("COMPLORA_BACKEND", "reference")
    with pytest.raises(SystemExit, match="2"):
        tune.main(OPTIONS[:-2])
    assert "backend='reference' has no plans, expected torch or triton" in capsys.readouterr().err


def test_file_that_cannot_be_written_is_an_error_before_anything_is_measured(standin, path, capsys):
    path.parent.write_text("")
    with pytest.raises(SystemExit, match="2"):
        tune.main(OPTIONS)
    assert str(path.parent) in capsys.readouterr().err
    assert standin.ran == []


def test_record_keeps_other_entries_and_replaces_its_own(path):
    other = PROBLEM._replace(rank=4)
    tune.record({PROBLEM: [(CONCAT, 0.1), (ADDMM, 0.2)], other: [(CONCAT, 0.1)]})
    file = unsealed(json.loads(path.read_text()))
    file["entries"][1]["versions"] = ["0.0", "0.0"]  # the same problem under other versions is kept too
    path.write_text(json.dumps(file))
    tune.record({PROBLEM: [(MERGE, 0.3)], other: [(ADDMM, 0.4)]})
    entries = plans.read(path)
    assert {key: entry.measured for key, entry in entries.items()} == {
        (PROBLEM, plans.versions()): ((MERGE, 0.3),),
        (other, ("0.0", "0.0")): ((CONCAT, 0.1),),
        (other, plans.versions()): ((ADDMM, 0.4),),
    }


@pytest.mark.parametrize(
    "measured",
    [[], [(Plan("fused"), 0.1)], [(CONCAT, 0.0)], [(CONCAT, float("nan"))], [(Plan("gemm"), 0.1)]],
)
def test_record_refuses_what_could_not_be_read(path, measured):
    tune.record({PROBLEM: [(CONCAT, 0.1)]})
    before = contents(path.parent)
    with pytest.raises((ValueError, TypeError)):
        tune.record({PROBLEM._replace(rank=4): [(CONCAT, 0.1)], PROBLEM: measured})
    assert contents(path.parent) == before


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file(path, monkeypatch, step):
    tune.record({PROBLEM: [(CONCAT, 0.1)]})
    before = contents(path.parent)
    failing(monkeypatch, os, step, {0}, OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        tune.record({PROBLEM: [(ADDMM, 0.1)]})
    assert contents(path.parent) == before
    tune.record({PROBLEM: [(ADDMM, 0.1)]})
    assert plans.choose(PROBLEM) == ADDMM


@pytest.mark.parametrize(("rank", "places"), [(32, ("given", "inside")), (33, ("given",))])
def test_fused_is_measured_with_every_tile_and_place_of_h(monkeypatch, rank, places):
    tiles = [(64, 128, 64, 4, 4), (16, 32, 32, 4, 1)]
    monkeypatch.setattr(linear, "candidate_tiles", lambda device, dtype: tiles if dtype == torch.bfloat16 else [])
    problem = PROBLEM._replace(backend="triton", rank=rank, dtype="bfloat16", dropout=True)
    fused = {Plan("fused", h, cut) for h in places for cut in tiles}
    found = tune.candidates(problem, torch.device("cpu"), torch.bfloat16)
    assert len(found) == len(set(found))
    assert set(found) == {CONCAT, ADDMM, *fused}
    tune.record({problem: [(plan, 0.1) for plan in found]})  # what is measured can be kept
