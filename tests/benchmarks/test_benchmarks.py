"""What the benchmarks make of their measurements: intervals, results files, tables, and the stages of `make gpu`."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from open_clip.model import CLIP

from benchmarks import (
    baselines,
    bench_layer,
    bench_libraries,
    bench_memory,
    bench_step,
    bench_train,
    comparison,
    machine,
    readme_figure,
    report,
    results,
    targets,
)
from benchmarks.comparison import Comparison, Work
from benchmarks.interleaved import Timing, time_interleaved
from benchmarks.results import Results, Row

ROOT = Path(__file__).parents[2]
MACHINE = {"cpu": "a CPU", "threads": 2, "torch": "2", "triton": "3", "peft": "0", "revision": "abc"}
LIMITS: dict[str, Any] = {"operations_per_s": 1e9, "bytes_per_s": 1e8}


def compare(path: Path | None = None) -> Comparison:
    return Comparison("layer", 3, torch.device("cpu"), Results({**MACHINE, **LIMITS}, []), path)


# ---- statistics


def test_every_round_in_alternating_order_after_warm_up():
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = iter(range(1, 100))

    def measure(step: Any) -> float:
        step()
        return float(next(times))

    timings = time_interleaved(steps, ours="a", rounds=4, measure=measure, warm_up=2)
    assert "".join(calls) in ("abba" * 3, "baab" * 3)
    assert sorted(timings["a"].seconds + timings["b"].seconds) == list(range(5, 13))
    pairs = zip(timings["b"].seconds, timings["a"].seconds, strict=True)
    assert timings["b"].ratios == [b / a for b, a in pairs]
    assert timings["a"].ratios == [1.0] * 4


def test_the_interval_of_a_median():
    """Of 20 values the 6th and the 15th: outside lie at most 5 heads, or tails, of 20 coins, each in 2.1% of all."""
    ratios = [float(n) for n in range(1, 21)]
    assert Timing(ratios, ratios[::-1]).ratio() == (10.5, 6.0, 15.0)
    assert Timing([1.0] * 5, [3.0, 1.0, 2.0, 5.0, 4.0]).ratio() == (3.0, None, None)
    assert Timing([1.0] * 6, [3.0, 1.0, 2.0, 5.0, 4.0, 6.0]).ratio() == (3.5, 1.0, 6.0)


def test_percentiles_of_the_seconds():
    assert Timing([float(n) for n in range(11)], [1.0]).spread() == (2.0, 5.0, 8.0)
    assert Timing([7.0], [1.0]).spread() == (7.0, 7.0, 7.0)


# ---- rows


def test_rows_of_a_comparison(monkeypatch):
    monkeypatch.setattr(comparison, "bounds", lambda: {"floor": {"at_most": 2}, "baseline": {"at_least": 2}})
    seconds = {"ours": 2.0, "floor": 1.0, "baseline": 5.0}
    current: list[str] = []
    steps = {name: lambda name=name: current.append(name) for name in seconds}

    def measure(step: Any) -> float:
        step()
        return seconds[current[-1]]

    compared = compare()
    targets, work = {"floor": "floor", "baseline": "baseline"}, Work(1e9, 1e8 / 2)
    compared.time(
        "a shape",
        steps,
        ours="ours",
        work=work,
        floors={"floor": Work(1e8, 0)},
        targets=targets,
        remarks={"baseline": "slow"},
        measure=measure,
    )
    rows = {row.baseline: row for row in compared.found.rows}
    assert rows["ours"] == Row(
        "layer", "a shape", "ours", "", 3, 2, 2, 2, 1, roofline=0.5, intensity=20, **LIMITS, revision="abc"
    )
    assert (rows["floor"].roofline, rows["floor"].intensity) == (0.1, None)
    assert (rows["baseline"].ratio, rows["baseline"].figure, rows["baseline"].remark) == (2.5, 2.5, "slow")
    assert (rows["floor"].ratio, rows["floor"].figure) == (0.5, 2.0)  # ours takes twice the time of the floor


def test_a_comparison_that_does_not_fit():
    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    compared = compare()
    compared.time("s", {"ours": too_large, "baseline": too_large}, ours="ours")
    assert [row.remark for row in compared.found.rows] == ["does not fit in memory beside the others"] * 2
    compared.time("s", {"ours": lambda: None, "baseline": too_large}, ours="ours")
    assert {row.baseline: row.rounds for row in compared.found.rows} == {"ours": 3, "baseline": 0}


def test_a_baseline_that_is_not_there_or_does_not_fit():
    def missing() -> None:
        raise ModuleNotFoundError("No module named 'peft'", name="peft")

    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def not_given() -> None:
        raise comparison.Missing("not given: --clip-lora PATH")

    compared = compare()
    assert compared.attempt("s", "PEFT", missing) is None
    assert compared.attempt("s", "theirs", not_given) is None
    assert compared.attempt("s", "dense", too_large) is None
    assert compared.attempt("s", "ours", lambda: 3) == 3
    remarks = {row.baseline: row.remark for row in compared.found.rows}
    assert remarks == {
        "PEFT": "not installed: pip install peft",
        "theirs": "not given: --clip-lora PATH",
        "dense": "does not fit in memory",
    }

    def wrong() -> None:
        raise AssertionError("apart")

    assert compared.attempt("s", "wrong", wrong) is None
    assert compared.attempt("s", "another", lambda: 4) == 4
    assert compared.found.rows[-1].remark == "fails: AssertionError: apart"
    assert compared.failed == ["s, wrong: AssertionError: apart"]


BENCHMARK = """
from benchmarks import conftest
from benchmarks.comparison import Comparison

conftest.described_with = lambda _: {"revision": "abc"}

def wrong():
    raise AssertionError("apart")

def test_one(comparison):
    comparison.attempt("s", "ours", wrong)
    assert comparison.attempt("s", "baseline", lambda: 1) == 1

def test_another(comparison):
    assert comparison.attempt("t", "ours", lambda: 1) == 1
"""


def test_a_check_of_ours_that_fails_fails_the_run_when_all_is_measured(tmp_path):
    (tmp_path / "bench_x.py").write_text(BENCHMARK)
    command = [sys.executable, "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", "-p", "no:cacheprovider"]
    command += ["-p", "benchmarks.conftest", tmp_path / "bench_x.py", "--results", tmp_path / "found.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 passed, 1 error" in done.stdout
    assert "s, ours: AssertionError: apart" in done.stdout
    assert [row.remark for row in results.read(tmp_path / "found.json").rows] == ["fails: AssertionError: apart"]


# ---- files


def test_a_file_after_every_row(tmp_path):
    """An interrupted run keeps what it measured, and the next one goes on with it."""
    path = tmp_path / "new" / "machine.json"
    compared = compare(path)
    compared.record(Row("layer", "s", "ours", rounds=1, median_s=1.0))
    assert results.read(path).rows == compared.found.rows
    compared.record(Row("layer", "s", "baseline", "does not fit in memory"))
    compared.record(Row("layer", "s", "ours", rounds=1, median_s=2.0))
    found = results.read(path)
    assert [(row.baseline, row.median_s) for row in found.rows] == [("baseline", None), ("ours", 2.0)]
    assert found.machine == compared.found.machine
    with path.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["baseline"] for row in rows] == ["baseline", "ours"]
    assert (rows[0]["median_s"], rows[1]["median_s"]) == ("", "2.0")
    assert sorted(path.parent.iterdir()) == [path.with_suffix(".csv"), path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema": 1, "machine": {}, "rows": []}', "schema=1, expected 3"),
        ('{"schema": 3, "machine": {}, "rows": [{"speed": 1}, {"age": 2}]}', "rows with age, speed, expected fields"),
        ('{"machine": {}, "rows": []}', "no results file"),
        ("[]", "no results file"),
        ("{", "no results file"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        results.read(path)
    assert "other.json" in str(error.value)


@pytest.mark.long
def test_a_benchmark_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_accuracy.py", "-k", "0.01", "--results", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (path,) = tmp_path.glob("*.json")
    assert f"kept in {path}" in done.stdout
    found = results.read(path)
    assert found.machine["bytes_per_s"] > 0
    assert found.machine["revision"] == found.rows[0].revision
    shares = {row.baseline: row.share for row in found.rows}
    assert shares.keys() == {"complora_linear", "addmm", "PEFT lora.Linear"}
    assert all(share is not None and abs(share - 1) < 0.05 for share in shares.values())


def test_every_target_is_measured_and_every_figure_wanted():
    sources = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("bench_*.py"))
    named = set(re.findall(r'"((?:layer|factors|step|memory|host)/[^"]*)"', sources))
    read = {name for name in named if name.endswith("k={k}")}
    named = named - read | {name.replace("{k}", k) for name in read for k in ("64", "384")}
    wanted = {name for name in comparison.bounds() if not name.startswith("model/")}  # which the model gives
    assert named <= wanted
    with_dropout = {f"{name}, dropout" for name in named if name.startswith("layer/")}
    assert wanted <= named | with_dropout


# ---- the baselines of a step


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, ...]:
    """What `prepare` takes after the name of a baseline, of a CLIP with two small blocks in each tower."""
    torch.manual_seed(0)
    image: Any = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
    text: Any = {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    plain = CLIP(32, image, text, quick_gelu=True).to(bench_step.DEVICE, bench_step.DTYPE).requires_grad_(False)
    case = bench_step.Case("tiny", 4, {}, r=4, prompts=5)
    ours = bench_step.make_ours(plain, case.config)
    weights, batch = baselines.adapters(ours), bench_step.make_batch(case, plain)
    truth, _ = bench_step.true_results(case, plain, weights, batch)
    return case, plain, ours, weights, batch, truth, {}


BASELINES = (
    "ours on transformers' CLIP",
    "PEFT eager",
    "PEFT on transformers' CLIP",
    "PEFT eager, prompts cut",
    "dense P_perp",
    "merge",
    "addmm",
)


@pytest.mark.parametrize("name", [bench_step.OURS, *BASELINES])
def test_a_baseline_computes_what_ours_does(tiny, name):
    bench_step.prepare(name, *tiny)


@pytest.mark.parametrize("broken", ["text_model.encoder.layers.1.mlp.fc2", "visual_projection"])
def test_a_baseline_with_another_weight_is_not_timed(tiny, monkeypatch, broken):
    def make(*given: Any) -> baselines.Trainee:
        trainee = bench_step.transformers_clip.by_peft(*given)
        layer = trainee.model.clip.get_submodule(broken)
        weight = next(
            parameter for name, parameter in layer.named_parameters() if "lora" not in name and "weight" in name
        )
        weight.data = weight.flip(0)  # a copy: the others share the weight
        return trainee

    monkeypatch.setitem(bench_step.BASELINES, "broken", bench_step.Baseline(make))
    with pytest.raises(AssertionError, match="apart"):
        bench_step.prepare("broken", *tiny)


def vit_of_timm() -> bench_libraries.ImageModel:
    sizes: dict[str, Any] = {"patch_size": 112, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    return bench_libraries.ImageModel(model, lambda model, images: model(images))


@pytest.mark.parametrize("broken", [None, "blocks.1.attn.proj", "blocks.0.norm1"])
def test_models_of_other_libraries_are_timed_where_they_compute_the_same(broken):
    plain = bench_libraries.make_plain(vit_of_timm)
    ours = bench_libraries.make_ours(plain)
    weights, batch = bench_libraries.adapters(ours), bench_libraries.make_batch(plain, 2)
    truth, work = bench_libraries.true_results(plain, weights, batch)
    assert work.operations > 0
    assert len(weights) == 8
    for trainee in (bench_libraries.by_ours(ours), bench_libraries.by_peft(plain, weights)):
        if broken is None:
            bench_libraries.prepare(trainee, weights, batch, truth)
            continue
        for name, parameter in trainee.model.model.get_submodule(broken).named_parameters():
            if "weight" in name and "lora" not in name:
                parameter.data = parameter.flip(0) + 0.1
        with pytest.raises(AssertionError, match="apart"):
            bench_libraries.prepare(trainee, weights, batch, truth)


def test_a_baseline_that_cannot_be_compiled_is_a_row(tiny, monkeypatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("an operation is unknown")

    monkeypatch.setattr(torch, "compile", lambda _: fail)
    compared = compare()
    prepare = lambda: bench_step.prepare("PEFT, torch.compile", *tiny)
    assert compared.attempt("s", "PEFT, torch.compile", prepare) is None
    assert [row.remark for row in compared.found.rows] == ["cannot be compiled: RuntimeError: an operation is unknown"]


@pytest.mark.parametrize(
    ("on_gpu", "names"), [(False, ["CLIP-LoRA's own code"]), (True, ["CLIP-LoRA's layer", "CLIP-LoRA's own code"])]
)
def test_a_checkout_replaces_our_copy_where_time_is_short(monkeypatch, on_gpu, names):
    monkeypatch.setattr(bench_step, "ON_GPU", on_gpu)
    case = bench_step.Case("m", 1, {"CLIP-LoRA's layer": None, "CLIP-LoRA's own code": None})
    assert bench_step.compared(case, {"--clip-lora": Path("there")}) == names
    assert bench_step.compared(case, {"--clip-lora": None}) == list(case.baselines)


def test_every_case_names_baselines_that_there_are():
    for case in (*bench_step.GPU_CASES, *bench_step.CPU_CASES, bench_train.GPU_CASE, bench_train.CPU_CASE):
        assert {*case.baselines, *case.extra} <= bench_step.BASELINES.keys()
        assert not any(bench_step.BASELINES[name].make is None and "," not in name for name in case.baselines)


def test_a_baseline_encodes_whole_texts_where_there_are_texts():
    image, both = (bench_step.Case("m", 1, {}, prompts=prompts) for prompts in (0, 100))
    whole = {name for name in bench_step.BASELINES if bench_step.WHOLE in bench_step.remark(name, both)}
    assert {"PEFT eager", "PEFT, torch.compile", "CLIP-LoRA's own code", "dense P_perp"} <= whole
    assert not any("cut" in name or "ours" in name for name in whole)
    assert not any(bench_step.WHOLE in bench_step.remark(name, image) for name in bench_step.BASELINES)
    assert bench_step.remark(bench_step.OURS, both) == ""


def test_until_trained_compares_graphs_with_a_graph(monkeypatch):
    monkeypatch.setattr(bench_train, "CASE", bench_train.GPU_CASE)
    found = {name: bench_step.BASELINES[name] for name in bench_train.GPU_CASE.baselines}
    assert any(baseline.graphed and baseline.cut for baseline in found.values())
    assert any(not baseline.graphed and baseline.cut for baseline in found.values())
    said = bench_train.remark("torch.compile of folded factors")
    assert bench_step.WHOLE in said
    assert "not in its time" not in said


def test_compiled_baselines_come_after_the_rows_of_all_others(monkeypatch, tiny):
    """And their steps are checked in training, as they are timed."""
    case, plain, *_ = tiny
    names = {"PEFT, torch.compile": None, "PEFT eager": None, "dense P_perp": None}
    monkeypatch.setattr(bench_step, "make_plain", lambda _: plain)
    compared, order = compare(), []

    def compile_(function: Any) -> Any:
        order.append({row.baseline: row.rounds for row in compared.found.rows})

        def run(model: Any, *batch: Any) -> Any:
            order.append(model.training)
            return function(model, *batch)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    recorded, record = [], compared.record
    compared.record = lambda row: (recorded.append(row.baseline), record(row))  # pyright: ignore
    bench_step.test_step(compared, {}, False, "all", replace(case, baselines=names))
    assert sorted(recorded) == sorted(
        [bench_step.OURS, *names]
    )  # ours once: its time is that beside the targets' baselines
    assert order[0] == {bench_step.OURS: 3, "PEFT eager": 3, "dense P_perp": 3}
    assert set(order[1:]) == {True}
    assert {row.baseline for row in compared.found.rows} == {bench_step.OURS, *names}


@pytest.fixture(scope="module")
def dropping(tiny) -> tuple[Any, ...]:
    case, plain, *_ = tiny
    case = replace(case, lora_dropout=0.25)
    ours = bench_step.make_ours(plain, case.config)
    weights, batch = baselines.adapters(ours), bench_step.make_batch(case, plain)
    truth, _ = bench_step.true_results(case, plain, weights, batch)
    return case, plain, ours, weights, batch, truth, {}


@pytest.mark.parametrize("name", [bench_step.OURS, "PEFT eager", "dense P_perp"])
def test_steps_with_dropout_draw_their_masks(dropping, name):
    bench_step.prepare(name, *dropping)


def test_a_baseline_that_drops_nothing_is_not_timed(dropping, monkeypatch):
    def make(plain: Any, weights: Any, config: Any) -> baselines.Trainee:
        return baselines.by_linear(baselines.DenseProjectorLinear, plain, weights, replace(config, lora_dropout=0.0))

    monkeypatch.setitem(bench_step.BASELINES, "drops nothing", bench_step.Baseline(make))
    with pytest.raises(AssertionError, match="drops nothing: the losses"):
        bench_step.prepare("drops nothing", *dropping)


def test_steps_with_dropout_that_are_wrong(dropping):
    truth = dropping[5]
    loss = float(truth["adapted"]["loss"])
    with pytest.raises(AssertionError, match=r"ours: the losses .* have the same masks"):
        bench_step.check_dropout("ours", lambda: torch.tensor(loss), truth)
    losses = iter(1.3 * loss + 0.01 * loss * n for n in range(4))
    with pytest.raises(AssertionError, match="without dropout"):
        bench_step.check_dropout("ours", lambda: torch.tensor(next(losses)), truth)


def test_the_frozen_model_has_a_floor_of_its_own(tiny):
    case, plain, _, weights, batch, *_ = tiny
    _, work = bench_step.true_results(replace(case, baselines={"frozen model": None}), plain, weights, batch)
    assert 0 < work["frozen"].operations < work["adapted"].operations
    assert "which ours leaves out" in bench_step.BASELINES["frozen model"].remark


def test_memory_of_a_step_that_ours_does_not_fit_into(tiny, monkeypatch):
    case, plain, *_ = tiny
    monkeypatch.setattr(bench_memory, "make_plain", lambda _: plain)
    make = bench_memory.make_trainee

    def make_theirs(name: str, *given: Any) -> baselines.Trainee:
        if name == bench_step.OURS:
            raise torch.OutOfMemoryError
        return make(name, *given)

    def rows() -> dict[str, Row]:
        compared = compare()
        bench_memory.test_memory_of_a_step(compared, {}, replace(case, baselines={"PEFT eager": "memory/PEFT"}))
        return {row.baseline: row for row in compared.found.rows}

    found = rows()
    ours, theirs = found[bench_step.OURS].peak_bytes, found["PEFT eager"].peak_bytes
    assert ours is not None
    assert theirs is not None
    assert found["PEFT eager"].figure == ours / theirs
    monkeypatch.setattr(bench_memory, "make_trainee", make_theirs)
    found = rows()
    assert found[bench_step.OURS].remark == "does not fit in memory"
    assert (found["PEFT eager"].peak_bytes, found["PEFT eager"].figure) == (theirs, None)


# ---- until trained


def test_a_run_of_its_own_finds_nothing_compiled(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "full")
    found = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        found.append((command[-1], [Path(options["env"][variable]) for variable in bench_train.CACHES]))
        assert all(path.parent.is_dir() for path in found[-1][1])
        return subprocess.CompletedProcess(command, 0, stdout="a word\n12.5\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert [bench_train.in_fresh_process(name) for name in ("ours", "theirs")] == [12.5, 12.5]
    assert [name for name, _ in found] == ["ours", "theirs"]
    caches = [path for _, paths in found for path in paths]
    assert len(set(caches)) == 2 * len(bench_train.CACHES)
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, bench_train.NO_MEMORY, stdout="")
    )
    with pytest.raises(torch.OutOfMemoryError):
        bench_train.in_fresh_process("large")
    assert not any(path.exists() for path in caches)
    assert os.environ["TRITON_CACHE_DIR"] == "full"


def test_a_row_after_every_run(monkeypatch):
    seconds = {bench_step.OURS: 10.0, "PEFT eager": 25.0}
    rows_before: list[int] = []
    compared = compare()

    def run(name: str) -> float:
        rows_before.append(len(compared.found.rows))
        return seconds[name]

    monkeypatch.setattr(bench_train, "in_fresh_process", run)
    names = (bench_step.OURS, "CLIP-LoRA's layer", "PEFT eager", "dense P_perp")
    bench_train.each_alone(compared, "s", names)
    assert rows_before == [0, 1, 2, 3]
    rows = compared.found.rows
    assert [row.ratio for row in rows] == [1.0, None, 2.5, None]
    assert rows[1].remark.startswith("fails: KeyError")
    assert rows[2].remark.endswith("nothing to decompose")
    del seconds[bench_step.OURS]

    def run_without_ours(name: str) -> float:
        if name == bench_step.OURS:
            raise torch.OutOfMemoryError
        return seconds[name]

    monkeypatch.setattr(bench_train, "in_fresh_process", run_without_ours)
    compared = compare()
    bench_train.each_alone(compared, "s", (bench_step.OURS, "PEFT eager"))
    rows = compared.found.rows
    assert [(row.remark.partition(";")[0], row.ratio) for row in rows] == [
        ("does not fit in memory", None),
        ("plain LoRA: no projection", None),
    ]


def test_a_run_that_does_not_fit_says_so_by_its_exit_code(monkeypatch):
    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_train, "make_model", too_large)
    with pytest.raises(SystemExit) as stopped:
        bench_train.main(bench_step.OURS)
    assert stopped.value.code == bench_train.NO_MEMORY


# ---- the report


def sample() -> Results:
    rows = [
        Row("layer", "768", "complora_linear", "", 20, 0.1, 0.1, 0.1, 1, 1, 1, roofline=0.8, intensity=20.0),
        Row("layer", "768", "PEFT", "projects nothing", 20, 0.2, 0.2, 0.2, 2, 1.9, 2.1, roofline=0.4, intensity=20.0),
        Row("layer", "3072", "complora_linear", "", 20, 1.5, 1.5, 1.5, 1, 1, 1),
        Row("layer", "3072", "PEFT", "does not fit in memory"),
        Row("memory", "768", "ours", rounds=1, peak_bytes=3 << 20),
        Row("accuracy", "|ΔW|", "ours", rounds=1, share=0.987),
    ]
    return Results({**MACHINE, **LIMITS}, rows)


def test_tables():
    text = report.tables([sample()])
    assert "### a CPU\n\nthreads 2, torch 2, triton 3, peft 0, revision abc." in text
    assert "|  | complora_linear | PEFT |" in text
    assert "| 768 | 100 ms | 2.00 [1.90, 2.10] |" in text
    assert "| 3072 | 1.5 s | does not fit in memory |" in text
    assert "| step/PEFT | NVIDIA H200 | not yet measured (at least 1.9) |" in text
    assert "- PEFT: projects nothing" in text
    assert "| 768 | 3 MiB |" in text
    assert "| \\|ΔW\\| | 0.99 |" in text


def test_a_ratio_of_few_rounds():
    assert report.ratio(Row("train", "s", "PEFT", rounds=3, ratio=1.25)) == "1.25 (3 rounds)"
    assert report.ratio(Row("train", "s", "PEFT", rounds=1, ratio=1.25)) == "1.25 (1 round)"


GPU = {"gpu": "NVIDIA H200", "cuda": "13.0", "driver_version": "580.1", "power.limit": "700.00 W"}


def test_the_head_of_a_table_names_the_gpu_and_all_revisions():
    rows = [Row("layer", "s", name, revision=revision) for name, revision in (("a", "one"), ("b", "two"), ("c", "one"))]
    head = report.tables([Results({**MACHINE, **GPU}, rows)]).partition("\n\n####")[0]
    assert head == (
        "### NVIDIA H200\n\ndriver_version 580.1, cuda 13.0, power.limit 700.00 W, threads 2, torch 2, triton 3, "
        "peft 0, revisions one two."
    )


def test_warm_and_cold_times_and_launches_in_a_table():
    cold = {"cold_s": 0.2, "cold_ratio": 1.5, "cold_ratio_low": 1.4, "cold_ratio_high": 1.6}
    why = f"{comparison.NOT_CAPTURED} (RuntimeError: one reason; or two)"
    times: Any = (20, 0.1, 0.1, 0.1, 1, 0.9, 1.1)
    rows = [
        Row("layer", "768", "complora_linear", "", *times, **cold),
        Row("layer", "768", "baseline", "slow; encodes all", *times, **cold),
        Row("layer", "3072", "complora_linear", "", *times),
        Row("layer", "3072", "baseline", f"slow; {why}", *times),
        Row("layer", "3072", "another", why, *times, **cold),
    ]
    text = report.tables([Results({**MACHINE, **GPU}, rows)])
    assert f"#### One layer, forward and backward\n\n{report.WARM_AND_COLD}" in text
    assert "|  | complora_linear | baseline | another |\n" in text
    assert "| 768 | 100 ms; cold 200 ms | 1.00 [0.90, 1.10]; cold 1.50 [1.40, 1.60]† |  |\n" in text
    assert "| 3072 | 100 ms | 1.00 [0.90, 1.10]‡ | 1.00 [0.90, 1.10]; cold 1.50 [1.40, 1.60] |\n" in text
    assert "\n\n- baseline: slow\n- another: " in text
    assert f"\n- † encodes all\n- ‡ {comparison.NOT_CAPTURED}\n" in text
    assert "one reason" not in text
    assert report.WARM_AND_COLD not in report.tables([sample()])


def test_many_baselines_continue_in_a_second_table():
    rows = [Row("layer", shape, "complora_linear", "", 20, 0.1) for shape in ("768", "3072")]
    times: Any = (20, 0.1, 0.1, 0.1, 1, 0.9, 1.1)
    rows += [Row("layer", "768", f"baseline {number}", "", *times) for number in range(6)]
    first, second = report.table(rows).split("\n\n")
    assert first.startswith(f"|  | complora_linear | {' | '.join(f'baseline {n}' for n in range(5))} |\n")
    assert second == "|  | complora_linear | baseline 5 |\n| --- | --- | --- |\n| 768 | 100 ms | 1.00 [0.90, 1.10] |"


def test_marks_do_not_run_out():
    notes: dict[str, str] = {}
    marks = [report.mark(str(number), notes) for number in range(12)]
    assert len(set(marks)) == 12
    assert report.mark("3", notes) == marks[3]


def test_every_row_is_under_the_roof_that_it_was_measured_with():
    row = sample().rows[0]
    assert report.ceilings(row, sample()) == (1e9, 1e8)
    assert report.ceilings(replace(row, operations_per_s=4e9, bytes_per_s=2e8), sample()) == (4e9, 2e8)
    assert (report.under((4e9, 2e8), 5), report.under((4e9, 2e8), 50)) == (1e9, 4e9)


AT_MOST, AT_LEAST = {"id": "most", "at_most": 1.25}, {"id": "least", "at_least": 2.0, "reason": "a reason"}


@pytest.mark.parametrize(
    ("target", "value", "interval", "words"),
    [
        (AT_LEAST, 2.5, (2.0, 2.9), "met: 2.50 [2.00, 2.90] (at least 2)"),
        (AT_LEAST, 2.1, (1.9, 2.3), "met, within noise: 2.10 [1.90, 2.30] (at least 2)"),
        (AT_LEAST, 1.9, (1.8, 2.1), "missed by 5%, within noise: 1.90 [1.80, 2.10] (at least 2) a reason"),
        (AT_LEAST, 1.8, (1.7, 1.9), "missed by 10%: 1.80 [1.70, 1.90] (at least 2) a reason"),
        (AT_LEAST, 1.8, None, "missed by 10%: 1.80 (at least 2) a reason"),
        (AT_MOST, 1.1, (1.0, 1.25), "met: 1.10 [1.00, 1.25] (at most 1.25)"),
        (AT_MOST, 1.2, (1.1, 1.3), "met, within noise: 1.20 [1.10, 1.30] (at most 1.25)"),
        (AT_MOST, 1.3, (1.2, 1.4), "missed by 4%, within noise: 1.30 [1.20, 1.40] (at most 1.25)"),
        (AT_MOST, 1.5, (1.4, 1.6), "missed by 20%: 1.50 [1.40, 1.60] (at most 1.25)"),
        (AT_MOST, 1.1, None, "met: 1.10 (at most 1.25)"),
    ],
)
def test_a_bound_within_the_interval_is_noise(target, value, interval, words):
    assert targets.verdict(target, targets.Figure(value, interval)) == words


def test_the_interval_of_an_upper_bound_is_that_of_the_reciprocal(monkeypatch):
    monkeypatch.setattr(targets, "bounds", lambda: {"most": AT_MOST, "least": AT_LEAST})
    ratios: dict[str, Any] = {"ratio": 0.8, "ratio_low": 0.5, "ratio_high": 1.0}
    rows = [
        Row("layer", "s", "floor", **ratios, target="most", figure=1.25),
        Row("layer", "s", "baseline", **ratios, target="least", figure=0.8),
        Row("memory", "s", "baseline", target="of another file", figure=0.4),
    ]
    assert targets.measured([Results({**MACHINE}, rows)]) == {
        ("most", "a CPU"): (1.25, (1.0, 2.0)),
        ("least", "a CPU"): (0.8, (0.5, 1.0)),
        ("of another file", "a CPU"): (0.4, None),
    }


def run_report(folder: Path, page: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.report", "--results", str(folder), "--page", str(page)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_report_of_a_folder(tmp_path):
    page, folder = tmp_path / "speed.md", tmp_path / "results"
    page.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    results.write(folder / "a.json", sample())
    done = run_report(folder, page)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n### a CPU")
    assert text.endswith(f"\n{report.END}\nafter\n")
    assert "stale" not in text
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("speed-up.png", "roofline.png"))
    (folder / "b.json").write_text('{"schema": 7}')
    failed = run_report(folder, page)
    assert failed.returncode != 0
    assert "b.json has schema=7, expected 3" in failed.stderr
    assert page.read_text() == text


def test_a_page_without_a_place_for_the_tables(tmp_path):
    page = tmp_path / "speed.md"
    page.write_text("nothing")
    failed = run_report(tmp_path, page)
    assert failed.returncode != 0
    assert report.BEGIN in failed.stderr
    assert page.read_text() == "nothing"


def test_the_page_has_what_the_results_files_say():
    text = (ROOT / "docs" / "speed.md").read_text()
    between = text.partition(report.BEGIN)[2].partition(report.END)[0].strip()
    assert between == report.tables(results.read_all(ROOT / "benchmarks" / "results")), "make report"


def test_the_figure_of_the_readme(tmp_path):
    """It has all that it is to show, and the README's table says the same in numbers."""
    files, text = results.read_all(ROOT / "benchmarks" / "results"), (ROOT / "README.md").read_text(encoding="utf-8")
    memory, times = readme_figure.memory(files), readme_figure.times(files)
    assert list(memory) == list(readme_figure.MEMORY_OF.values())
    assert set(times) == set(readme_figure.TIMES.values())
    peft, ours, recomputed = (f"{mib:.0f}" for mib in memory.values())
    assert f"| {ours} MiB; {recomputed} with the MLPs recomputed | {peft} MiB |" in text
    full, *others = (row.ratio or 0.0 for row in sorted(times.values(), key=lambda row: -(row.ratio or 0.0)))
    cut, *without_prompts = others
    assert (
        f"| 1 | {min(others):.2f} to {without_prompts[0]:.2f}, with 100 prompts {cut:.2f}, of full length {full:.2f} |"
        in text
    )
    readme_figure.draw(files, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


# ---- the machine


def test_tables_and_results_are_no_change_of_the_code(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    files = [tmp_path / name for name in ("docs/speed.md", "benchmarks/results/a.json", "code.py")]
    for file in files:
        file.write_text("one")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    commit = machine.revision(tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", commit)
    for file in files[:2]:
        file.write_text("two")
    assert machine.revision(tmp_path) == commit
    files[2].write_text("two")
    assert machine.revision(tmp_path) == f"{commit}+"
    assert machine.revision(tmp_path / "benchmarks") == "unknown"  # a folder within is no checkout


def test_what_nvidia_smi_says_of_a_moment(tmp_path, monkeypatch):
    assert "transformers" in machine.describe()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.gpu_state() == {}
    script = tmp_path / "nvidia-smi"
    script.write_text('#!/bin/sh\ncase "$1" in *clocks.sm,power.draw,*) echo "1980 MHz, 650.10 W, 0x0000" ;; esac\n')
    script.chmod(0o755)
    assert machine.gpu_state() == {"sm_clock": "1980 MHz", "power": "650.10 W", "slowed": "0x0000"}


# ---- make gpu

STUB = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in
  *"$FAIL"*) echo "it broke"; exit 3 ;;
esac
"""


STAGES = 17  # but for those that are always done


@pytest.fixture
def gpu(tmp_path):
    """Runs a copy of the script where `python` notes what it is asked for, and fails at one thing; its clock stands."""
    (tmp_path / "benchmarks").mkdir()
    script = tmp_path / "benchmarks" / "gpu.sh"
    script.write_bytes((ROOT / "benchmarks" / "gpu.sh").read_bytes())
    for name, source in (("python", STUB), ("nvidia-smi", '#!/bin/sh\necho "$GPU"\n')):
        (tmp_path / name).write_text(source)
        (tmp_path / name).chmod(0o755)
    calls, clock = tmp_path / "calls", tmp_path / "clock"

    def run(fail: str = "no such thing", *, seconds: int = 0, **variables: str) -> tuple[int, str, str]:
        calls.write_text("")
        clock.write_text(f"unset SECONDS\nSECONDS={seconds}\n")  # bash reads it first: no longer counts by itself
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        variables = {"COMPLORA_REVISION": "abc", "GPU": "NVIDIA H200"} | variables
        variables |= {"PATH": path, "PYTHON": str(tmp_path / "python"), "CALLS": str(calls), "FAIL": fail}
        variables["BASH_ENV"] = str(clock)
        done = subprocess.run(["bash", script], env=os.environ | variables, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr, calls.read_text()

    return run


def test_every_stage_and_none_twice(gpu):
    code, output, calls = gpu()
    assert code == 0, output
    for asked in ("benchmarks.gpu --results", "benchmarks.machine", "setup.py build_ext", "test_triton.py"):
        assert asked in calls
    assert calls.startswith("-m benchmarks.gpu.environment\n")  # what is missing is said first
    assert "complora_kernels.tune" not in calls
    for path in (ROOT / "benchmarks").glob("bench_*.py"):
        assert (f"benchmarks/{path.name}" in calls) == (path.stem != "bench_host")  # which no GPU changes
    code, output, calls = gpu()
    assert (code, output.count("done before")) == (0, STAGES)
    again = ["benchmarks.machine", "complora_kernels.backends", "build_ext", "benchmarks.report", "benchmarks.targets"]
    assert [call.split()[1] for call in calls.splitlines()[2:]] == again
    _, _, calls = gpu(STAGES="tune bench_step")
    assert "complora_kernels.tune" in calls
    assert re.findall(r"bench_step.py -k (\S+)", calls) == [f"case-{n}" for n in (1, 2, 3, 4, 1, 2)]
    assert "bench_layer.py" not in calls
    _, _, calls = gpu(STAGES="bench_step-3")
    assert re.findall(r"bench_\S+ -k \S+", calls) == ["bench_step.py -k case-3"]
    _, _, calls = gpu(STAGES="bench_layer")
    shapes = ["backward and shape-1", "not (backward and shape-1)", "backward and shape-1"]
    assert re.findall(r"-k (.*?)(?: --compiled \w+)? -q", calls) == shapes


def test_another_gpu_or_revision_does_all_again(gpu):
    gpu()
    for variables in ({"GPU": "NVIDIA H100 80GB HBM3"}, {"COMPLORA_REVISION": "abd"}):
        code, output, calls = gpu(**variables)
        assert (code, output.count("done before")) == (0, 0)
        assert "bench_step.py -k case-4" in calls
    _, output, _ = gpu()
    assert output.count("done before") == STAGES


def waiting(output: str) -> list[str]:
    return re.findall(r"^(\S+): waits for the next call", output, re.MULTILINE)


def test_a_stage_begins_where_its_estimate_fits_the_limit_of_the_call(gpu):
    """Of the limit of a call 15 seconds are for closing."""
    code, output, calls = gpu(seconds=150)  # of 240
    assert (code, waiting(output)) == (0, [])
    assert "bench_train.py" in calls
    _, output, calls = gpu(seconds=442, COMPLORA_REVISION="abd", LIMIT="500")
    assert "-m benchmarks.gpu --results" not in calls  # is to take 60 s, 43 are left
    assert waiting(output) == [
        "first",
        "extension",
        "bench_layer-2",
        "tests",
        "bench_train-1",
        "bench_step-5",
        "bench_step-6",
    ]
    assert f"make gpu again goes on with: {' '.join(waiting(output))}" in output
    _, output, _ = gpu(seconds=442, COMPLORA_REVISION="abd")  # the second call: of 500, not of 240
    assert "first" in waiting(output)
    assert "43 s are left" in output
    _, output, _ = gpu(seconds=200, COMPLORA_REVISION="abe")
    assert "25 s are left" in output


def test_the_first_program_goes_on_in_the_next_call(gpu):
    code, output, _ = gpu("benchmarks.gpu --results")  # with 3: entries wait
    assert (code, "first: goes on in the next call" in output) == (0, True)
    _, output, calls = gpu()
    assert "first: done in" in output
    assert re.search(r"benchmarks.gpu --results \S+ --limit 225 --cache build/gpu-cache/kernels.zip", calls)
    _, output, _ = gpu(seconds=100, LIMIT="200", COMPLORA_REVISION="abd", STAGES="first")
    _, _, calls = gpu(seconds=100, LIMIT="200", COMPLORA_REVISION="abd", STAGES="first")
    assert re.search(r"--limit 8[45] ", calls)  # what is left of 100


def test_what_torch_compiles_comes_last(gpu):
    _, _, calls = gpu()
    asked = re.findall(r"--compiled (\w+)", calls)
    assert asked == ["without"] * 3 + ["only"] * 3
    others = [line for line in calls.splitlines() if "benchmarks/bench_" in line]
    assert all("only" in line for line in others[-3:])


def test_a_warning_costs_no_figure(tmp_path):
    """What `bench` of the script says overrides what pyproject.toml makes of warnings."""
    option = re.search(r'pytest "benchmarks/\$1.py" .* (-W \S+)', (ROOT / "benchmarks/gpu.sh").read_text())
    assert option is not None
    test = tmp_path / "test_warns.py"
    test.write_text("import warnings\ndef test():\n    warnings.warn('of these versions')\n")
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "-p", "no:cacheprovider", test]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1
    done = subprocess.run([*command, *option[1].split()], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "of these versions" in done.stdout


def test_the_stages_of_a_layer_begin_with_what_its_targets_are_about():
    shapes = [f"shape-{n}" for n in range(1, len(bench_layer.GPU_SHAPES) + 1)]
    assert [shape for shape in shapes if "shape-1" in shape] == ["shape-1"]
    first, _, fits, *_ = bench_layer.GPU_SHAPES
    assert (first.tokens, first.inputs, first.outputs, first.rank) == (256 * 197, 768, 768, 16)
    assert fits == first._replace(tokens=32 * 197)


def test_every_case_of_a_step_has_its_stage():
    found = r'"bench_step-\d \d+ \d+ bench bench_step -k case-(\d)( --compiled \w+)?"'
    stages = re.findall(found, (ROOT / "benchmarks/gpu.sh").read_text())
    compiling = [
        str(n)
        for n, case in enumerate(bench_step.GPU_CASES, 1)
        if any(bench_step.BASELINES[name].compiled for name in case.baselines)
    ]
    whole = [(str(n), " --compiled without" if str(n) in compiling else "") for n in range(1, 5)]
    assert len(bench_step.GPU_CASES) == 4
    assert stages == [*whole, *((n, " --compiled only") for n in compiling)]


def test_a_case_that_was_stopped_costs_no_other(gpu):
    code, output, calls = gpu("case-2 --compiled without")
    assert (code, output.count("failed")) == (1, 1)
    assert "bench_step-2: failed with 3" in output
    assert "case-3" in calls
    code, output, calls = gpu()
    assert (code, output.count("done before")) == (0, STAGES - 1)
    assert re.findall(r"-k (\S+)", calls) == ["case-2"]


def test_the_logs_come_back_in_one_file(gpu, tmp_path):
    gpu("tests/backends/test_triton.py")
    folder = tmp_path / "benchmarks" / "results"
    with tarfile.open(folder / "logs.tar.gz") as packed:
        log = packed.extractfile("logs/tests.log")
        assert log is not None
        assert log.read() == (folder / "logs" / "tests.log").read_bytes()
        found = {"done/abc-NVIDIA-H200/bench_memory", "done/abc-NVIDIA-H200/report", "logs/report.log"}
        assert found <= set(packed.getnames())


def test_a_stage_that_fails_is_named_and_done_again(gpu):
    code, output, calls = gpu("tests/backends/test_triton.py")
    assert code == 1
    assert "tests: failed with 3, see benchmarks/results/logs/tests.log" in output
    assert "it broke" in output
    assert "bench_train.py" in calls
    code, output, calls = gpu()
    assert code == 0
    assert "tests/backends/test_triton.py" in calls
    assert "bench_train.py" not in calls


def test_no_gpu(gpu):
    code, output, calls = gpu("is_available")
    assert code == 2
    assert "sees no GPU" in output
    assert len(calls.splitlines()) == 2
