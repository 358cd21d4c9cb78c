"""The plan table: what may run, what is chosen, and a file that is shared, never trusted and never in the way."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from complora_kernels.backends import plans
from complora_kernels.backends.plans import Plan, Problem
from complora_kernels.tune import record

HALF = Problem("torch", "cpu", 512, 64, 192, 4, 3, "bfloat16", "bfloat16", False)
FLOAT = HALF._replace(dtype="float32", weight_dtype="float32")
AUTOCAST = HALF._replace(weight_dtype="float32")
TRITON = HALF._replace(backend="triton", device="NVIDIA H100")
CONCAT, ADDMM, MERGE = Plan("concat"), Plan("addmm"), Plan("merge")
TILED = Plan("fused", "inside", (64, 128, 32, 4, 3))


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The plan file, in a folder of its own, and a process that has read none and is told of none."""
    monkeypatch.delenv("COMPLORA_PLAN", raising=False)
    monkeypatch.setenv("COMPLORA_PLANS", str(tmp_path / "cache" / "plans.json"))
    plans.reload()
    yield tmp_path / "cache" / "plans.json"
    plans.reload()


def write(path: Path, content: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode(errors="surrogatepass"))


def entry(of: Problem = HALF, **changes: Any) -> dict[str, Any]:
    """An entry as it is written on disk."""
    written: dict[str, Any] = {
        "problem": of._asdict(),
        "measured": [[["concat", "given", None], 0.5]],
        "versions": list(plans.versions()),
        "date": "2026-01-31",
    }
    return written | changes


def file_of(*entries: Any, schema: Any = 1) -> str:
    return json.dumps({"schema": schema, "entries": list(entries)})


def run(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("problem", "exact", "fast"),
    [
        (HALF, "concat", "concat merge addmm"),
        (HALF._replace(dropout=True), "concat", "concat addmm"),
        (AUTOCAST, "concat merge", "concat merge addmm"),
        (AUTOCAST._replace(dropout=True), "concat", "concat addmm"),
        (FLOAT, "concat merge addmm", "concat merge addmm"),
        (FLOAT._replace(dropout=True, dtype="float64"), "concat addmm", "concat addmm"),
        (TRITON, "fused concat", "fused concat merge addmm"),
        (TRITON._replace(rank=64, dtype="float16"), "fused concat", "fused concat merge addmm"),
        (TRITON._replace(rank=65), "concat", "concat merge addmm"),
        (TRITON._replace(dtype="float32", weight_dtype="float32", dropout=True), "fused concat addmm", None),
        (TRITON._replace(dtype="float64", weight_dtype="float64"), "concat merge addmm", None),
    ],
)
def test_eligible(problem, exact, fast):
    assert plans.eligible(problem) == plans.eligible(problem, "exact") == tuple(exact.split())
    assert plans.eligible(problem, "fast") == tuple((fast or exact).split())


@pytest.mark.parametrize(
    ("problem", "exact", "fast"),
    [
        (HALF, CONCAT, ADDMM),
        (AUTOCAST._replace(dtype="float16"), CONCAT, ADDMM),
        (FLOAT, ADDMM, ADDMM),
        (FLOAT._replace(dtype="float64", dropout=True), ADDMM, ADDMM),
        (TRITON._replace(tokens=4096), Plan("fused", "inside"), Plan("fused", "inside")),
        (TRITON._replace(tokens=8192), Plan("fused", "given"), Plan("fused", "given")),
        (TRITON._replace(dtype="float32", rank=64), Plan("fused", "inside"), Plan("fused", "inside")),
        (TRITON._replace(rank=65), CONCAT, CONCAT),
        (TRITON._replace(dtype="float64", weight_dtype="float64"), ADDMM, ADDMM),
    ],
)
def test_shipped(problem, exact, fast):
    assert plans.choose(problem) == plans.choose(problem, "exact") == exact
    assert plans.choose(problem, "fast") == fast


@pytest.mark.parametrize("ask", [plans.eligible, plans.choose])
def test_unknown_precision_is_refused(ask):
    with pytest.raises(ValueError, match=r"^precision='high', expected 'exact' or 'fast'$"):
        ask(HALF, "high")


@pytest.mark.parametrize(("rows", "bucket"), [(0, 1), (1, 1), (2, 2), (3, 4), (512, 512), (513, 1024)])
def test_problem(rows, bucket):
    x, weight = torch.empty(rows, 3), torch.empty(12, 3, dtype=torch.float16)
    asked = plans.problem(x, weight, backend="triton", rank=2, adapters=3, dtype=torch.bfloat16, dropout=True)
    assert asked == Problem("triton", "cpu", bucket, 3, 12, 2, 3, "bfloat16", "float16", True)


@pytest.mark.parametrize(
    ("problem", "name", "plan"),
    [
        (FLOAT, "concat", CONCAT),
        (FLOAT, "merge", MERGE),
        (TRITON, "fused", Plan("fused", "inside")),
        (TRITON, "concat", CONCAT),
        (FLOAT, "auto", ADDMM),
    ],
)
def test_variable_forces_an_eligible_plan(monkeypatch, problem, name, plan):
    shipped = plans.choose(problem)
    monkeypatch.setenv("COMPLORA_PLAN", name)
    assert plans.choose(problem) == plan
    monkeypatch.delenv("COMPLORA_PLAN")
    assert plans.choose(problem) == shipped


@pytest.mark.parametrize(
    ("problem", "name", "reason", "expected"),
    [
        (HALF, "addmm", "it rounds twice in bfloat16", "auto, concat"),
        (HALF, "merge", "a bfloat16 weight loses small updates", "auto, concat"),
        (FLOAT._replace(dropout=True), "merge", "with dropout no one weight serves all tokens", "auto, concat, addmm"),
        (FLOAT, "fused", "its kernels are not those of the torch backend", "auto, concat, merge, addmm"),
        (TRITON._replace(rank=65), "fused", "its kernels support no float64 and no rank above 64", "auto, concat"),
        (HALF, "fuse", "unknown", "auto, concat"),
    ],
)
def test_variable_names_a_plan_that_is_not_eligible(monkeypatch, problem, name, reason, expected):
    monkeypatch.setenv("COMPLORA_PLAN", name)
    with pytest.raises(ValueError, match=r"^COMPLORA_PLAN=") as caught:
        plans.choose(problem)
    message = f"COMPLORA_PLAN={name!r} cannot compute ({problem}): {reason}; expected one of {expected}"
    assert str(caught.value) == message


def test_variable_may_name_an_inexact_plan_where_precision_is_fast(monkeypatch):
    monkeypatch.setenv("COMPLORA_PLAN", "merge")
    assert plans.choose(HALF, "fast") == MERGE


def test_override_wins_and_ends(monkeypatch):
    monkeypatch.setenv("COMPLORA_PLAN", "concat")
    with pytest.raises(RuntimeError, match="stop"), plans.override(ADDMM):  # noqa: PT012
        assert plans.choose(HALF) == ADDMM  # whatever its precision
        with plans.override(MERGE):
            assert plans.choose(HALF) == MERGE
        assert plans.choose(HALF) == ADDMM
        raise RuntimeError("stop")
    assert plans.choose(HALF) == CONCAT


def test_override_holds_on_its_own_thread_alone():
    with plans.override(CONCAT), ThreadPoolExecutor(1) as thread:
        assert plans.choose(FLOAT) == CONCAT
        assert thread.submit(plans.choose, FLOAT).result() == ADDMM
    assert plans.choose(FLOAT) == ADDMM


def test_override_by_a_plan_that_cannot_run_is_refused():
    with plans.override(TILED), pytest.raises(ValueError, match=r"^plans.override\(fused, .* of the torch backend$"):
        plans.choose(HALF)
    with plans.override(Plan("fuse")), pytest.raises(ValueError, match=r"unknown$"):
        plans.choose(HALF)


def test_fastest_eligible_plan_is_chosen(monkeypatch):
    record({HALF: [(CONCAT, 0.3), (ADDMM, 0.2), (MERGE, 0.1)], TRITON: [(CONCAT, 0.2), (TILED, 0.1)]})
    assert plans.choose(HALF) == CONCAT
    assert plans.choose(HALF, "fast") == MERGE
    assert plans.choose(TRITON) == TILED
    assert plans.choose(HALF._replace(tokens=1024)) == CONCAT
    assert plans.choose(HALF._replace(tokens=1024), "fast") == ADDMM
    monkeypatch.setenv("COMPLORA_PLAN", "concat")
    assert plans.choose(TRITON) == CONCAT
    monkeypatch.setenv("COMPLORA_PLAN", "fused")
    assert plans.choose(TRITON) == TILED  # as it was tuned


def test_fast_plans_alone_leave_the_shipped_one_exact():
    record({HALF: [(ADDMM, 0.2)]})
    assert plans.choose(HALF) == CONCAT


@pytest.mark.parametrize("versions", [("0.0", plans.versions()[1]), (plans.versions()[0], "0.0")])
def test_other_versions_are_not_used(path, versions):
    write(path, file_of(entry(FLOAT, versions=versions)))
    assert plans.choose(FLOAT) == ADDMM
    assert plans.describe()[-1].endswith(f"  not used: tuned with torch {versions[0]}, triton {versions[1]}")


def test_where_the_file_is(monkeypatch, path, tmp_path):
    assert plans.plan_file() == path
    monkeypatch.delenv("COMPLORA_PLANS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plans.plan_file() == tmp_path / "complora_kernels" / "plans.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plans.plan_file() == tmp_path / ".cache" / "complora_kernels" / "plans.json"


def test_file_is_read_once_until_reload(path):
    assert plans.choose(FLOAT) == ADDMM
    write(path, file_of(entry(FLOAT)))
    assert plans.choose(FLOAT) == plans.choose(FLOAT._replace(rank=8)) == ADDMM
    plans.reload()
    assert plans.choose(FLOAT) == CONCAT
    path.unlink()
    assert plans.choose(FLOAT) == CONCAT


def test_choosing_writes_nothing(path):
    plans.choose(FLOAT)
    plans.describe()
    assert not path.parent.exists()


BAD_FIELDS: dict[str, Any] = {
    "tokens": 1.5,
    "inputs": "64",
    "rank": True,
    "outputs": 0,
    "dtype": None,
    "dropout": 0,
    "more": 1,
}
BAD_MEASURED: list[Any] = [
    [],
    None,
    [[["gemm", "given", None], 0.5]],  # an unknown plan
    [[["fused", "given", None], 0.5]],  # not eligible on the torch backend
    [[["concat", "given", None], 0.5], [["fused", "given", None], 0.6]],
    [[["concat", "inside", None], 0.5]],  # h and tiles belong to fused
    [[["concat", "given", [64, 64, 32, 4, 3]], 0.5]],
    [[["concat", "given"], 0.5]],
    [[["concat", "given", None], "0.5"]],
    [[["concat", "given", None], -0.5]],
    [[["concat", "given", None], float("nan")]],
    [[["concat", "given", None], float("inf")]],
    [[["concat", "given", None], True]],
]
BAD_FUSED: list[Any] = [
    ["fused", "outside", None],
    *(["fused", "given", tiles] for tiles in ([64, 64, 32, 4], [64, 48, 32, 4, 3], [64, 64, 32, 4, 0], [], 0, "64643")),
    ["fused", "given", [64.0, 64, 32, 4, 3]],
]
DAMAGED_ENTRIES: dict[str, Any] = {
    "no record": 3,
    "an unknown field": entry(note=""),
    "no date": entry(date=None),
    "one version": entry(versions=["2.11"]),
    "no versions": entry(versions=None),
    "no problem": entry(problem=None),
    **{f"{name}={value!r}": entry(problem=HALF._asdict() | {name: value}) for name, value in BAD_FIELDS.items()},
    **{f"measured={value}": entry(measured=value) for value in BAD_MEASURED},
    **{f"plan={value}": entry(TRITON, measured=[[value, 0.5]]) for value in BAD_FUSED},
}
DAMAGED = {
    "empty": "",
    "cut short": file_of(entry(FLOAT))[:-1],
    "not text": "\ud800",
    "nested too deep": "[" * 100_000,
    "a list": "[]",
    "no schema": "{}",
    "another schema": file_of(entry(FLOAT), schema=2),
    "no entries": '{"schema": 1}',
    "entries are no list": '{"schema": 1, "entries": 3}',
    **{name: file_of(entry(FLOAT), damaged) for name, damaged in DAMAGED_ENTRIES.items()},
}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        each.getMessage() for each in caplog.records if (each.name, each.levelname) == ("complora_kernels", "WARNING")
    ]


def test_whole_file_is_used(path, caplog):
    write(path, file_of(entry(FLOAT), entry(TRITON, measured=[[[*TILED], 0.5]])))
    assert (plans.choose(FLOAT), plans.choose(TRITON)) == (CONCAT, TILED)
    assert [each.name for each in path.parent.iterdir()] == ["plans.json"]
    assert warnings(caplog) == []


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_file_is_renamed_and_rebuilt(path, caplog, content):
    write(path, content)
    before = path.read_bytes()
    assert plans.choose(FLOAT) == plans.choose(FLOAT, "fast") == ADDMM
    assert plans.choose(HALF) == CONCAT
    assert path.with_name("plans.json.damaged-1").read_bytes() == before
    assert not path.exists()
    (message,) = warnings(caplog)
    assert message.startswith(f"{path} is damaged (")
    assert message.endswith(": renamed to plans.json.damaged-1, the shipped plans are used")
    record({FLOAT: [(CONCAT, 0.1)]})
    assert plans.choose(FLOAT) == CONCAT


def test_damaged_files_are_all_kept(path):
    for number in (1, 2, 3):
        write(path, f"damage {number}")
        if number == 2:
            record({FLOAT: [(CONCAT, 0.1)]})  # a writer does the same
            assert plans.choose(FLOAT) == CONCAT
        plans.reload()
        plans.choose(HALF)
    kept = {each.name: each.read_text() for each in path.parent.glob("*.damaged-*")}
    assert kept == {f"plans.json.damaged-{number}": f"damage {number}" for number in (1, 2, 3)}


def test_file_that_another_process_has_rebuilt_is_not_renamed(path, monkeypatch, caplog):
    write(path, "damaged")

    @contextlib.contextmanager
    def lock(locked: Path) -> Iterator[None]:
        """By the time the lock is ours, another process has had it."""
        write(locked, file_of(entry(FLOAT)))
        yield

    monkeypatch.setattr(plans, "lock", lock)
    assert plans.choose(FLOAT) == CONCAT
    assert [each.name for each in path.parent.iterdir()] == ["plans.json"]
    assert warnings(caplog) == []


def is_a_folder(path: Path, _patch: pytest.MonkeyPatch) -> None:
    path.mkdir(parents=True)


def folder_is_a_file(path: Path, _patch: pytest.MonkeyPatch) -> None:
    path.parent.write_text("")


def damaged_in_a_read_only_folder(path: Path, patch: pytest.MonkeyPatch) -> None:
    write(path, "damaged")

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    patch.setattr(plans, "lock", refuse)


def no_home(_path: Path, patch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise RuntimeError("Could not determine home directory.")

    patch.delenv("COMPLORA_PLANS")
    patch.delenv("XDG_CACHE_HOME", raising=False)
    patch.setattr(Path, "home", refuse)


@pytest.mark.parametrize("prevent", [is_a_folder, folder_is_a_file, damaged_in_a_read_only_folder, no_home])
def test_file_out_of_reach_is_no_obstacle(path, caplog, monkeypatch, prevent: Callable[..., None]):
    prevent(path, monkeypatch)
    assert (plans.choose(HALF), plans.choose(FLOAT), plans.choose(FLOAT)) == (CONCAT, ADDMM, ADDMM)
    (message,) = warnings(caplog)
    assert message.startswith("the plan file cannot be used, the shipped plans are: ")
    with pytest.raises((OSError, RuntimeError)):
        record({FLOAT: [(CONCAT, 0.1)]})


def test_two_processes_write_at_once(path, tmp_path):
    writer = """
import sys, time
from pathlib import Path
from complora_kernels.backends.plans import Plan, Problem
from complora_kernels.tune import record

folder, first = Path(sys.argv[1]), int(sys.argv[2])
(folder / f"ready {first}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
for rank in range(first, first + 20):
    record({Problem("torch", "cpu", 512, 64, 64, rank, 1, "float32", "float32", False): [(Plan("concat"), 1.0)]})
"""
    with run(writer, str(tmp_path), "1") as one, run(writer, str(tmp_path), "101") as other:
        while len(list(tmp_path.glob("ready *"))) < 2 and one.poll() is other.poll() is None:
            time.sleep(0.01)
        (tmp_path / "go").touch()
    assert (one.returncode, other.returncode) == (0, 0)
    ranks = [each["problem"]["rank"] for each in json.loads(path.read_text())["entries"]]
    assert sorted(ranks) == [*range(1, 21), *range(101, 121)]
    assert sorted(each.name for each in path.parent.iterdir()) == ["plans.json", "plans.json.lock"]


def test_killed_writer_blocks_nobody(path):
    path.parent.mkdir()
    holder = """
import sys, time
from pathlib import Path
from complora_kernels.backends import plans

with plans.lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
    with run(holder, str(path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(TimeoutError), plans.lock(path, seconds=0):
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        record({FLOAT: [(CONCAT, 0.1)]})
    assert plans.choose(FLOAT) == CONCAT


def test_describe(monkeypatch):
    def rows() -> list[list[str]]:
        return [re.split("  +", row) for row in plans.describe()]

    shipped = rows()
    assert {source for _, _, source in shipped} == {"shipped"}
    assert ["triton, M <= 4096", "fused, h inside", "shipped"] in shipped
    record({FLOAT: [(CONCAT, 0.1)], TRITON: [(TILED, 0.1)]})
    problems = [
        "torch, cpu, M <= 512, K=64, N=192, 3 x r=4, float32, weight float32",
        "triton, NVIDIA H100, M <= 512, K=64, N=192, 3 x r=4, bfloat16, weight bfloat16",
    ]
    tiled = "fused, h inside, 64x128x32, 4 warps, 3 stages"
    assert rows() == [*shipped, [problems[0], "concat", "tuned"], [problems[1], tiled, "tuned"]]
    monkeypatch.setenv("COMPLORA_PLAN", "addmm")
    assert rows() == [
        ["every problem that it may compute", "addmm", "COMPLORA_PLAN"],
        *shipped,
        [problems[0], "addmm", "COMPLORA_PLAN"],
        [problems[1], "none", "COMPLORA_PLAN: not eligible"],
    ]


def test_compile_takes_the_plan_for_a_constant_and_one_for_any_number_of_tokens():
    """That of the most tokens that were measured: 128, not 64."""
    asked = []
    weight = torch.empty(12, 3)

    def forward(x: torch.Tensor) -> torch.Tensor:
        problem = plans.problem(x, weight, backend="torch", rank=2, adapters=3, dtype=torch.float32, dropout=False)
        plan = plans.choose(problem)
        return x + 1 if plan.name == "concat" and plan.tiles is None else x - 1

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable[..., Any]:
        asked.append(graph)
        return graph.forward

    small = FLOAT._replace(inputs=3, outputs=12, rank=2, tokens=64)
    record({small: [(MERGE, 0.1)], small._replace(tokens=128): [(CONCAT, 0.1)]})
    compiled = torch.compile(forward, fullgraph=True, backend=backend)
    for rows in (100, 65, 40, 200, 256, 5000):
        x = torch.zeros(rows, 3)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), torch.ones_like(x))
        assert len(asked) == 1
