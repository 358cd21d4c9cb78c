"""Files that were damaged: each is named with what is wrong, and nothing else is taken for what was written."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fewshot_standin as standin
import pytest
import torch
from damage import RESULT, outcome
from failures import contents
from rich.console import Console
from torch import nn

import complora_kernels as ck
from complora_kernels import tune
from complora_kernels.backends import plans
from complora_kernels.common.files import open_to_append, reading, unsealed, write_atomically
from complora_kernels.fewshot import jobs
from complora_kernels.fewshot.__main__ import main
from complora_kernels.fewshot.config import Run
from complora_kernels.fewshot.datasets import choose_split, read_split, write_split
from complora_kernels.fewshot.decode import open_image
from complora_kernels.fewshot.files import append_json_line, read_json, write_json
from complora_kernels.fewshot.grid import open_folder
from complora_kernels.fewshot.outcomes import failures_of, results_of
from complora_kernels.fewshot.recipe import train
from complora_kernels.fewshot.report import report
from complora_kernels.fewshot.resume import load_checkpoint, put_damaged_aside, random_state, save_checkpoint
from complora_kernels.fewshot.setting import Settings
from complora_kernels.fewshot.training import CHECKPOINT

PROBLEM = plans.Problem("torch", "cpu", 64, 16, 16, 2, 1, "float32", "float32", False)


def results(folder: Path) -> tuple[Path, Callable[[], Any]]:
    for seed in range(2):
        append_json_line(folder / "results.jsonl", {**RESULT, "seed": seed, "run": f"lora-seed{seed}"})
    return folder / "results.jsonl", lambda: results_of(folder)


def failures(folder: Path) -> tuple[Path, Callable[[], Any]]:
    append_json_line(folder / "failures.jsonl", {"run": "a", "error": "it failed"})
    return folder / "failures.jsonl", lambda: failures_of(folder)


def description(folder: Path) -> tuple[Path, Callable[[], Any]]:
    write_json(folder / "config.json", {"model": "glyphs", "r": 8, "learning_rates": [0.01], "template": "a {}"})
    return folder / "config.json", lambda: read_json(folder / "config.json")


def few_shot_split(folder: Path) -> tuple[Path, Callable[[], Any]]:
    dataset = standin.setting().new.dataset
    write_split(folder / "draw.json", dataset, choose_split(dataset, 2, 0))

    def read() -> Any:
        found = read_split(folder / "draw.json", dataset)
        return found.train.tolist(), found.val.tolist(), found.test.tolist(), found.shots, found.seed, found.kind

    return folder / "draw.json", read


def measured_plans(folder: Path) -> tuple[Path, Callable[[], Any]]:
    path = folder / "plans.json"
    tune.record({PROBLEM: [(plans.Plan("addmm"), 0.125), (plans.Plan("concat"), 0.25)]}, path)

    def read() -> Any:
        found = plans.read(path, locked=True)
        if not path.exists():
            (aside,) = folder.glob("plans.json.damaged-*")
            aside.unlink()
            raise ValueError(f"{path}: renamed")
        return found

    return path, read


def adapted() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4))
    ck.apply_complora(model, ck.CompLoRAConfig(r=2, subspace_k=1, target_modules="0"), progress=False)
    return model, torch.optim.AdamW(ck.adapter_parameters(model))


def checkpoint(folder: Path) -> tuple[Path, Callable[[], Any]]:
    model, optimizer = adapted()
    model(torch.randn(3, 5)).square().sum().backward()
    optimizer.step()
    path = folder / CHECKPOINT
    save_checkpoint(path, model, optimizer, {"step": 1, "log": [0.5]}, [random_state(torch.device("cpu"))])

    def read() -> Any:
        before = torch.get_rng_state()
        model, optimizer = adapted()
        progress = load_checkpoint(path, model, optimizer)
        state = [*ck.adapter_parameters(model), *optimizer.state_dict()["state"][0].values(), torch.get_rng_state()]
        torch.set_rng_state(before)
        return progress, [tensor.tolist() for tensor in state]

    return path, read


FILES = (results, failures, description, few_shot_split, measured_plans, checkpoint)


def damages(whole: bytes) -> Iterator[bytes]:
    """Bits that flipped, ends that are missing, parts that were overwritten."""
    chance = random.Random(1)
    for place in chance.sample(range(len(whole)), min(90, len(whole))):
        yield whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :]
    for end in chance.sample(range(len(whole)), min(20, len(whole))):
        yield whole[:end]
        yield whole[:end] + b"\0" * (len(whole) - end)
        yield whole[:end] + chance.randbytes(8) + whole[end + 8 :]
    endless = (b"[" * 100_000, b'{"a": ' * 100_000, b"9" * 5000)
    yield from (content + b"\n" for content in (b"", b"\xff\xfe", b"null", *endless))


@pytest.mark.parametrize("make", FILES)
def test_a_damaged_file_is_refused_by_name_or_reads_as_before(tmp_path, make):
    path, read = make(tmp_path)
    whole, expected = path.read_bytes(), read()
    is_lines = path.suffix == ".jsonl"
    refused = 0
    for content in damages(whole):
        path.write_bytes(content)
        found, error = outcome(read)
        if error:
            assert str(path) in error
            refused += 1
        elif is_lines:  # incomplete last lines are dropped
            assert [known(*pair) for pair in zip(found, expected, strict=False)] == expected[: len(found)]
        else:
            assert known(found, expected) == expected
    assert refused > 60


def known(found: Any, expected: Any) -> Any:
    """Without keys that nobody asks for: such a one is that of the digest, once a bit of it has flipped."""
    return {name: found[name] for name in expected} if isinstance(expected, dict) else found


OTHERS = (None, 3, -1, 0.5, 1e400, 10**400, "x", True, [], {}, [1], {"a": 1})


def swaps(value: Any) -> Iterator[Any]:
    """A JSON value with one part of it exchanged for one of another type, or left out."""
    yield from OTHERS
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        for other in swaps(part):
            changed = value.copy()
            changed[key] = other
            yield changed
        changed = value.copy()
        del changed[key]
        yield changed


def test_results_with_values_of_other_types_are_refused(tmp_path, capsys, monkeypatch):
    """The report ends well, where nobody reads what was exchanged, or names file and line."""
    monkeypatch.setattr("complora_kernels.fewshot.report.folder.write_figures", lambda *_: [])
    path = tmp_path / "results.jsonl"
    refused = 0
    for n, line in enumerate(swaps(RESULT)):
        path.write_text(f"{json.dumps(RESULT)}\n{json.dumps(line)}\n")
        if n % 7 and isinstance(line, dict):  # the whole report takes its time
            _, error = outcome(lambda: results_of(tmp_path))
            assert not error or f"{path}, line 2: expected" in error
            continue
        code, said = main(["report", str(tmp_path)]), capsys.readouterr().err
        assert (code, said) == (0, "") or said.startswith(f"error: {path}, line 2: expected")
        assert (code, said.count("\n")) in ((0, 0), (2, 1))
        refused += code == 2
    assert refused > 20


@pytest.mark.parametrize("make", [failures, description, few_shot_split, measured_plans])
def test_values_of_other_types_are_refused_by_name(tmp_path, make):
    path, read = make(tmp_path)
    written = unsealed(json.loads(path.read_text()))
    expected = read()
    for content in swaps(written):
        path.write_text(json.dumps(content) + "\n")
        found, error = outcome(read)
        assert str(path) in error if error else type(found) is type(expected)


@pytest.mark.parametrize("name", ["results.jsonl", "failures.jsonl", "config.json"])
@pytest.mark.parametrize("command", ["report", "train", "sweep"])
def test_commands_on_damaged_files_print_one_line_and_return_2(tmp_path, capsys, name, command):
    output, sweep = tmp_path / "out", tmp_path / "sweep.yaml"
    output.mkdir()
    sweep.write_text("{shots: 1, seeds: 0, methods: [lora], learning_rates: 0.01}")
    append_json_line(output / "results.jsonl", {**RESULT, "images": None})
    with (output / name).open("ab") as file:
        file.write(b'{"run": "a", "x": }\n')
    before = contents(output)
    arguments = {
        "report": [str(output)],
        "train": ["--output", str(output)],
        "sweep": [str(sweep), "--output", str(output)],
    }
    assert main([command, *arguments[command]]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {output / name}")
    assert said.count("\n") == 1
    assert contents(output) == before


def test_a_run_with_a_damaged_checkpoint_starts_again(tmp_path, caplog):
    """And ends with the same factors; what was there is kept under another name."""

    class Killed(Exception):
        pass

    def kill(done: int, loss: float) -> None:
        if done == 5:
            raise Killed

    run = Run("both", 2, 1e-2, 0)
    config = standin.config(tmp_path, methods=("both",))
    expected = train(config, run, standin.setting(), tmp_path / "whole")
    with pytest.raises(Killed):
        train(config, run, standin.setting(), tmp_path / "run", kill)
    path = tmp_path / "run" / CHECKPOINT
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)
    result = train(config, run, standin.setting(), tmp_path / "run")
    measured = ("run", *standin.VARYING)
    assert [(k, v) for k, v in result.items() if k not in measured] == [
        (k, v) for k, v in expected.items() if k not in measured
    ]
    assert path.with_name(f"{path.name}.damaged-1").read_bytes() == content
    (warning,) = [record.getMessage() for record in caplog.records if "starts again" in record.getMessage()]
    assert warning.startswith(f"{path}: expected the checkpoint of an unfinished run (it does not match its digest)")


def test_a_checkpoint_without_a_digest_is_put_aside(tmp_path, caplog):
    from safetensors.torch import save_file

    path = tmp_path / CHECKPOINT
    put_damaged_aside(path, 1)  # nothing there
    save_file({"adapter.x": torch.zeros(1)}, path, metadata={"progress": "{}"})
    put_damaged_aside(path, 1)
    assert [each.name for each in tmp_path.iterdir()] == [f"{CHECKPOINT}.damaged-1"]
    assert "there is no 'digest'" in caplog.text


def test_errors_of_parsers_name_the_file():
    for error in (KeyError("a"), RecursionError("deep"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), EOFError()):
        with pytest.raises(ValueError, match=r"^/a/b: expected a file \(.+\)$"), reading("/a/b", "a file"):
            raise error
    with pytest.raises(OSError, match="/a/b"), reading("/a/b", "a file"):
        raise OSError("without a number")
    for kind in (MemoryError, KeyboardInterrupt):
        with pytest.raises(kind), reading("/a/b", "a file"):
            raise kind


def test_nothing_is_written_through_a_link(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "out"
    folder.mkdir()
    victim.write_text("precious")
    for name in ("config.json", ".config.json.partial", "results.jsonl", "log.jsonl"):
        (folder / name).symlink_to(victim)
    write_atomically(folder / "config.json", "{}")
    assert (folder / "config.json").read_text() == "{}"
    for name in ("results.jsonl", "log.jsonl"):
        with pytest.raises(OSError, match=rf"symbolic link.*{name}"):
            append_json_line(folder / name, {"a": 1})
    os.mkfifo(folder / "pipe")
    with pytest.raises(OSError, match=r"plain file.*pipe"):
        open_to_append(folder / "pipe")
    assert victim.read_text() == "precious"
    assert not list(folder.glob(".config.json.*[!l]"))


def test_errors_of_a_full_disk_and_of_missing_memory_name_the_file(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/table.md'"):
        write_atomically(tmp_path / "table.md", "x")
    with pytest.raises(OSError, match=r"No space left on device: '.*/results.jsonl'"):
        append_json_line(tmp_path / "results.jsonl", {"a": 1})
    assert jobs.sendable(OSError(28, "No space left on device", "/a/b")).filename == "/a/b"


def test_a_run_without_memory_fails_alone_and_is_named(tmp_path, trained, monkeypatch, capsys):
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("{shots: 1, seeds: 0, methods: [lora, output], learning_rates: 0.01, options: {steps: 2, r: 2}}")

    def poor(config, run, *rest):
        if run.method == "lora":
            raise MemoryError
        return train(config, run, *rest)

    monkeypatch.setattr(jobs, "train", poor)
    assert main(["sweep", str(sweep), "--output", str(tmp_path / "out"), "--workers", "1"]) == 1
    assert failures_of(tmp_path / "out") == [{"run": "digits-lora-1shot-lr0.01-seed0", "error": "not enough memory"}]
    assert [result["method"] for result in results_of(tmp_path / "out")] == ["output"]


def test_advice_to_repeat_the_command_is_given_only_where_it_helps(tmp_path, trained, monkeypatch, capsys):
    def fail(error: Exception) -> str:
        monkeypatch.setattr(jobs, "train", lambda *_: (_ for _ in ()).throw(error))
        command = ["train", "--methods", "lora", "--shots", "1", "--seeds", "0", "--learning-rates", "0.01"]
        assert main([*command, "--steps", "2", "--workers", "1", "--output", str(tmp_path / "out")]) == 1
        return capsys.readouterr().err

    assert "would diverge again" in fail(FloatingPointError("the loss is nan"))
    assert "Once the cause is gone, the same command" in fail(ValueError("a.jpg is damaged"))
    assert "The same command goes on" in fail(OSError(28, "No space left on device"))


def progress_of(step: Any = 2, seconds: Any = 0.5, **others: Any) -> dict[str, Any]:
    return {"step": step, "seconds": seconds, "log": [], **others}


LIES = (
    None,
    [],
    {},
    *(progress_of(step=step) for step in (None, -1, 1.5, True, "2", 4, 10**30)),
    *(progress_of(seconds=seconds) for seconds in (None, "x", [1])),
    *(progress_of(log=log) for log in (None, {}, "x", 1, [1], [{}], [{"step": 1, "loss": "x", "learning_rate": 0.1}])),
)


@pytest.mark.parametrize("lie", LIES)
def test_a_checkpoint_with_impossible_progress_is_put_aside(tmp_path, caplog, lie):
    """Though it has the digest of what it says."""
    model, optimizer = adapted()
    save_checkpoint(tmp_path / CHECKPOINT, model, optimizer, progress_of(), [])
    put_damaged_aside(tmp_path / CHECKPOINT, 4)
    assert (tmp_path / CHECKPOINT).exists()
    save_checkpoint(tmp_path / CHECKPOINT, model, optimizer, lie, [])
    put_damaged_aside(tmp_path / CHECKPOINT, 4)
    assert not (tmp_path / CHECKPOINT).exists()
    assert f"{tmp_path / CHECKPOINT}: expected the checkpoint of an unfinished run" in caplog.text


@pytest.mark.parametrize("moment", [None, torch.zeros(3), torch.zeros(2, 5, dtype=torch.int8)])
def test_moments_that_fit_no_factor_are_refused(tmp_path, moment):
    model, optimizer = adapted()
    model(torch.randn(3, 5)).square().sum().backward()
    optimizer.step()
    moments = optimizer.state[next(iter(ck.adapter_parameters(model)))]
    moments.pop("exp_avg")
    moments |= {} if moment is None else {"exp_avg": moment}
    save_checkpoint(tmp_path / CHECKPOINT, model, optimizer, progress_of(), [])
    other, its = adapted()
    before = [factor.clone() for factor in ck.adapter_parameters(other)]
    with pytest.raises(ValueError, match=f"^{tmp_path / CHECKPOINT}: .*the moments of factor 0 do not fit it"):
        load_checkpoint(tmp_path / CHECKPOINT, other, its)
    assert all(map(torch.equal, ck.adapter_parameters(other), before))


@pytest.mark.parametrize("make", [results, failures, description, few_shot_split, measured_plans, checkpoint])
def test_reading_a_pipe_in_place_of_a_file_does_not_wait(tmp_path, make):
    path, read = make(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises((OSError, ValueError), match=f"{path}"):
        read()


def test_a_device_in_place_of_an_image_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(OSError, match=f"expected a plain file: .*{name}"):
            open_image(tmp_path / name)


def test_an_unforeseen_error_fails_its_run_alone(tmp_path, monkeypatch):
    """A sweep continues with the next run."""

    def train(*_: Any) -> None:
        raise KeyError("step")

    monkeypatch.setattr(jobs, "train", train)
    monkeypatch.setattr(Settings, "load", lambda *_: None)
    config = standin.config(tmp_path)
    error = jobs.result_of(jobs.Job(config, config.runs()[0]), Settings(), lambda done, loss: None)
    assert isinstance(error, RuntimeError)
    assert str(error) == "KeyError: 'step'"


def test_a_link_in_place_of_a_folder_is_not_followed(tmp_path):
    """Into the folder of another run, say, whose files would be exchanged."""
    elsewhere, output = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    output.mkdir()
    results(output)
    config = standin.config(tmp_path, methods=("both",))
    run = Run("both", 2, 1e-2, 0)
    for name in ("figures", "runs"):
        (output / name).symlink_to(elsewhere)
        with pytest.raises(OSError, match=rf"symbolic link.*{name}"):
            open_folder(output, {})
        if name == "figures":
            with pytest.raises(OSError, match=r"symbolic link.*figures"):
                report(output, Console(file=io.StringIO()))
        (output / name).unlink()
    (output / "run").symlink_to(elsewhere)
    with pytest.raises(OSError, match=r"symbolic link.*run"):
        train(config, run, standin.setting(), output / "run")
    (output / "run").unlink()
    (output / "run").mkdir()
    (output / "run" / "adapter").symlink_to(elsewhere)
    with pytest.raises(OSError, match=r"symbolic link.*adapter"):
        train(config, run, standin.setting(), output / "run")
    assert not list(elsewhere.iterdir())
