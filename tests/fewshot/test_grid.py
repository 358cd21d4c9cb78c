import dataclasses
import errno
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import fewshot_standin as standin
import pytest
import torch
from miniature_datasets import make_miniature
from rich.console import Console

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.common.files import write_atomically
from complora_kernels.fewshot import grid, jobs, running
from complora_kernels.fewshot.__main__ import main, parse
from complora_kernels.fewshot.checks import check_device
from complora_kernels.fewshot.config import PRESETS, TrainConfig, check
from complora_kernels.fewshot.datasets import choose_split
from complora_kernels.fewshot.files import append_json_line, read_json_lines
from complora_kernels.fewshot.measure import scaled_update
from complora_kernels.fewshot.profile import PROFILE
from complora_kernels.fewshot.progress import GridProgress
from complora_kernels.fewshot.recipe import train
from complora_kernels.fewshot.report import report
from complora_kernels.fewshot.training import CHECKPOINT

CONSOLE = Console(file=io.StringIO())

# A shell lets what it starts in the background ignore Ctrl-C, and what that starts.
PROGRAM = """
import signal, sys
from complora_kernels.fewshot.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
"""


def run(config: TrainConfig) -> list[dict]:
    grid.prepare(config)
    return grid.run_grid(config, CONSOLE)


def test_every_cell_of_the_grid_is_trained_once(tmp_path, trained):
    config = standin.config(
        tmp_path / "out", methods=("lora", "both"), shots=(1, 2), seeds=(0, 3), learning_rates=(1e-3, 1e-2), steps=3
    )
    results = run(config)
    cells = {(r["method"], r["shots"], r["seed"], r["learning_rate"]) for r in results}
    assert len(results) == len(cells) == len(trained) == 16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["shots"] == [1, 2]
    assert not list(tmp_path.rglob(CHECKPOINT))
    assert all((tmp_path / "out" / "runs" / name / "log.jsonl").exists() for name in trained)


def test_finished_runs_are_not_repeated_and_the_stopped_one_continues(tmp_path, trained, monkeypatch):
    config = standin.config(tmp_path / "out", methods=("lora", "output", "both"), lora_dropout=0.2)
    whole = standin.config(tmp_path / "whole", methods=config.methods, lora_dropout=0.2)
    expected = run(whole)
    trained.clear()

    step = grid.GridProgress.step

    def interrupt(self, job, done, loss):
        if (job.run.method, done) == ("output", 5):
            raise KeyboardInterrupt
        step(self, job, done, loss)

    monkeypatch.setattr(grid.GridProgress, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert [r["method"] for r in read_json_lines(tmp_path / "out" / "results.jsonl")] == ["lora"]
    monkeypatch.setattr(grid.GridProgress, "step", step)
    trained.clear()
    found = run(config)
    assert [name.split("-")[0] for name in trained] == ["output", "both"]
    for result in expected + found:
        assert all(result.pop(name) > 0 for name in standin.VARYING)
    assert found == expected
    trained.clear()
    assert len(run(config)) == 3
    assert trained == []


def test_trained_adapter_is_saved_and_computes_the_measured_accuracy(tmp_path, trained):
    config = standin.config(tmp_path / "out", save_adapters=True, steps=20, lora_dropout=0.8)
    (result,) = run(config)
    setting = standin.setting()
    model = ck.load_adapter(setting.backbone.model, tmp_path / "out" / "runs" / result["run"] / "adapter").eval()
    assert setting.kept["dark"].accuracy(model, torch.arange(30)) == result["kept"]
    assert setting.new.accuracy(model, choose_split(setting.new.dataset, 2, 0).test) == result["new"]


def test_folder_with_results_of_other_options_is_refused(tmp_path, trained):
    run(standin.config(tmp_path, steps=2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"--r was 2, now 4; --shots was \[2\], now \[2, 3\]"):
        run(standin.config(tmp_path, steps=2, shots=(2, 3), r=4))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    run(standin.config(tmp_path, steps=2, workers=2, checkpoint_every=7))  # these change no result


def test_a_folder_from_before_updates_could_be_bounded_goes_on_without_a_bound(tmp_path, trained):
    run(standin.config(tmp_path, steps=2))
    path = tmp_path / "config.json"
    options = {name: value for name, value in json.loads(path.read_text()).items() if "update_bound" not in name}
    path.write_text(json.dumps({name: value for name, value in options.items() if name != "digest"}))
    run(standin.config(tmp_path, steps=2))
    with pytest.raises(ValueError, match=r"--update-bound was None, now 0\.1"):
        run(standin.config(tmp_path, steps=2, update_bound=0.1))
    assert len(trained) == 1


def test_bounded_updates_are_trained_and_saved(tmp_path, trained):
    bound = {"update_bound": 1e-3, "save_adapters": True, "learning_rates": (0.1,)}
    for result in run(standin.config(tmp_path, methods=("lora", "both"), **bound)):
        assert 0 < result["relative_update"] <= 1e-3 * (1 + 1e-6)  # float32
        model = ck.load_adapter(standin.setting().backbone.model, tmp_path / "runs" / result["run"] / "adapter")
        updates = [row.relative_update for row in ck.subspace_report(model)]
        assert sum(updates) / len(updates) == pytest.approx(result["relative_update"], rel=1e-6)


@pytest.mark.parametrize("update_bound", [None, 1e-3])
def test_a_share_of_an_update_is_one_of_the_bounded_update(update_bound):
    config = ck.CompLoRAConfig(r=2, sides="both", update_bound=update_bound)
    model = ck.apply_complora(standin.setting().backbone.model, config)
    with torch.no_grad():
        for factor in ck.adapter_parameters(model):
            factor.normal_()
    layers = adapted_layers(model).values()
    deltas = lambda: [layer.get_delta_weight(name) for layer in layers for name in layer.weights]
    factors = [factor.detach().clone() for factor in ck.adapter_parameters(model)]
    before = deltas()
    with scaled_update(model, 0.5):
        for half, whole in zip(deltas(), before, strict=True):
            assert (half - 0.5 * whole).norm() < 1e-5 * whole.norm()  # factors that are folded twice, in float32
    assert all(map(torch.equal, ck.adapter_parameters(model), factors))


def test_failure_in_a_run_keeps_what_was_finished(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(
        jobs, "train", lambda config, run, *rest: 1 / 0 if run.method == "both" else train(config, run, *rest)
    )
    with pytest.raises(RuntimeError, match=r"run both-2shot-lr0.01-seed0 failed: division by zero"):
        run(standin.config(tmp_path, methods=("lora", "both"), steps=2))
    assert [r["method"] for r in read_json_lines(tmp_path / "results.jsonl")] == ["lora"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": (0,)}, r"--shots 0: expected at least 1"),
        ({"shots": ()}, r"--shots \(\): expected at least one value"),
        ({"seeds": (1, 1)}, r"--seeds \(1, 1\): expected every value once"),
        ({"keep": ("letters", "letters")}, r"--keep \('letters', 'letters'\): expected every value once"),
        ({"seeds": (-1,)}, r"--seeds -1: expected at least 0"),
        ({"methods": ("lora", "dora")}, r"--methods dora: expected any of lora, lora-wd, preserve, lora-plus"),
        ({"learning_rates": (0.0,)}, r"--learning-rates 0.0: expected more than 0"),
        ({"learning_rates": (float("nan"),)}, r"--learning-rates nan"),
        ({"steps": 0}, r"--steps 0: expected at least 1"),
        ({"workers": 0}, r"--workers 0: expected at least 1"),
        ({"checkpoint_every": 0}, r"--checkpoint-every 0"),
        ({"template": "a photo"}, r"--template a photo: expected one \{\}"),
        ({"r": 0}, r"r=0"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0"),
        ({"subspace_k": 3, "subspace_ratio": 0.5}, r"subspace_k"),
        ({"subspace_energy": 1.5}, r"subspace_energy"),
        ({"update_bound": 0.0}, r"update_bound=0.0, expected None or a number above 0"),
        ({"update_bound": -1.0}, r"update_bound=-1.0, expected None or a number above 0"),
        ({"update_bound": 1.0, "update_bound_norm": "nuclear"}, r"update_bound_norm='nuclear', expected one of"),
        (
            {"methods": ("both", "lora"), "update_bound": 1.0, "update_bound_relative_to": "gap"},
            r"update_bound_relative_to='gap', expected another one with sides='none'",
        ),
        ({"target_modules": ("query",)}, r"target_modules"),
        ({"shots": (200,)}, r"shots=200: class 'digit zero' has 178 training images"),
        ({"device": "quantum"}, r"--device quantum: expected cpu, cuda or auto"),
    ],
)
def test_bad_options_are_named_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        grid.prepare(standin.config(tmp_path / "out", **options))
    assert list(tmp_path.iterdir()) == []


def test_presets_are_valid():
    for config in PRESETS.values():
        check(config)
    recipe = PRESETS["clip-lora"]  # CLIP-LoRA's: r 2, alpha 1, rsLoRA, dropout 0.25, 500 steps a shot
    adapter = recipe.adapter("lora", 0)
    assert (adapter.r, adapter.lora_alpha, adapter.use_rslora, adapter.lora_dropout) == (2, 1, True, 0.25)
    assert recipe.steps_for(16) == 8000
    assert adapter.target_modules == ("q", "k", "v")
    assert set(adapter.towers) == {"image", "text"}


def test_methods_differ_in_the_subspace_alone():
    config = PRESETS["glyphs"]
    output, random = config.adapter("output", 3), config.adapter("random", 3)
    assert (output.sides, output.subspace_source, output.subspace_ratio) == ("output", "weight", 0.5)
    assert (random.sides, random.subspace_source, random.subspace_seed) == ("output", "random", 3)
    assert config.adapter("random-both", 3).sides == config.adapter("both", 3).sides == "both"
    assert config.adapter("lora", 3).sides == "none"


def test_unwritable_output_folder_is_an_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", "--output", str(tmp_path / "file" / "out")]) == 2
    assert "--output" in capsys.readouterr().err


def test_options_of_the_command_line(tmp_path):
    config = parse(["train", "--shots", "1", "4", "--no-save-adapters", "--output", str(tmp_path)])
    assert isinstance(config, TrainConfig)
    assert (config.preset, config.shots, config.save_adapters) == ("pictures", (1, 4), False)
    config = parse(["train", "--model", "ViT-B-16", "--pretrained", "weights.pt", "--steps", "2"])
    assert isinstance(config, TrainConfig)
    assert (config.preset, config.r, config.steps, config.lora_dropout) == ("clip-lora", 2, 2, 0.25)
    config = parse(["train", "--preset", "glyphs-full"])
    assert config == PRESETS["glyphs-full"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--shot", "1"], "--shot"),
        (["train", "--methods", "dora"], "dora"),
        (["train", "--shots", "many"], "many"),
        (["fly"], "fly"),
        ([], "train"),
    ],
)
def test_unreadable_command_lines_return_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--preset", "full"], "--preset full: expected one of pictures, glyphs, glyphs-full, clip-lora"),
        (["train", "--shots", "0"], "--shots 0: expected at least 1"),
        (["report", "nowhere"], "nowhere: expected a folder"),
    ],
)
def test_bad_input_prints_one_line_and_returns_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--help"])
    assert exit_.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())  # joins the wrapped lines
    for name in PRESETS["glyphs"].__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in shown
    assert "The paper's choice is not known" in shown


def test_incomplete_last_lines_are_dropped(tmp_path):
    path = tmp_path / "results.jsonl"
    assert read_json_lines(path) == []
    append_json_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2, "b')
    assert read_json_lines(path) == [{"a": 1}]
    append_json_line(path, {"a": 3})
    assert read_json_lines(path) == [{"a": 1}, {"a": 3}]
    assert path.read_text().count("\n") == 2


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_tells_runs_loss_and_time_left(tmp_path, terminal, monkeypatch):
    shown = io.StringIO()
    config = standin.config(tmp_path, methods=("lora", "both"))
    first, second = (grid.Job(config, run) for run in config.runs())
    clock = itertools.count(0, 40)  # a look at the clock every 40 seconds
    monkeypatch.setattr("complora_kernels.fewshot.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    console = Console(file=shown, force_terminal=terminal, width=120)
    with GridProgress([first, second], finished=1, console=console) as progress:
        progress.step(first, 3, 0.125)
        measured = {"images_per_second": 1234.5, "peak_memory_mib": 2048}
        progress.finish(first, {"loss": 0.1, "new": 0.5, "kept": 0.75, **measured})
        progress.step(second, 1, 2.0)
    text = shown.getvalue()
    assert "2/3 lora-2shot-lr0.01-seed0: loss 0.100, new 50.0%, retained 75.0%, 1234 images/s, 2.0 GiB" in text
    if terminal:
        assert "2 of 3 runs" in text
        assert "both-2shot-lr0.01-seed0  loss 2.000" in text
    else:
        assert "lora-2shot-lr0.01-seed0: step 3 of 6, loss 0.125; 6 min left" in text  # 120 s for 3 of 12 steps
        assert "\x1b" not in text


@pytest.mark.long
def test_the_grid_continues_after_killed_and_interrupted_workers(tmp_path):
    # Two worker processes on the bundled model: a kill, then Ctrl-C, then to the end in this process.
    arguments = "--shots 1 --seeds 0 --learning-rates 0.003 --methods lora output both --max-test-images 20 --steps 60"
    options = [*arguments.split(), "--towers", "image", "--lora-dropout", "0.1"]
    options += ["--checkpoint-every", "5", "--no-save-adapters"]
    folder = tmp_path / "stopped"
    command = ["train", *options, "--output", str(folder), "--workers"]

    def start() -> subprocess.Popen[str]:
        line = [sys.executable, "-c", PROGRAM, *command, "2"]
        process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started = time.time()
        while not any(path.stat().st_mtime > started for path in folder.rglob(CHECKPOINT)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        return process

    process = start()
    process.kill()  # the parent alone: its workers notice and end
    process.communicate(timeout=120)  # returns when the last of them has closed the pipes
    process = start()
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "The same command goes on from the last checkpoints: complora train --shots 1" in error
    assert "Traceback" not in error

    stopped, whole = (parse([*command, "1"]), parse(["train", *options, "--output", str(tmp_path / "whole")]))
    assert isinstance(stopped, TrainConfig)
    assert isinstance(whole, TrainConfig)
    found, expected = run(stopped), run(dataclasses.replace(whole, workers=1))
    for result in found + expected:
        assert all(result.pop(name) > 0 for name in standin.VARYING)
    assert sorted(found, key=lambda result: result["run"]) == sorted(expected, key=lambda result: result["run"])
    assert len(found) == 3
    for output in (folder, tmp_path / "whole"):
        report(output, CONSOLE)
    for table in ("table.md", "table.csv", "table.tex"):
        assert (folder / table).read_text() == (tmp_path / "whole" / table).read_text()


def test_a_failed_first_run_does_not_bind_the_folder_to_its_options(tmp_path, capsys):
    command = [
        "train",
        "--preset",
        "glyphs",
        "--shots",
        "1",
        "--seeds",
        "0",
        "--methods",
        "output",
        "--learning-rates",
        "0.01",
    ]
    command += ["--steps", "1", "--max-test-images", "8", "--workers", "1", "--output", str(tmp_path / "out")]
    assert main([*command, "--subspace-k", "999"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "error: run output-1shot-lr0.01-seed0 failed: subspace_k=999, expected at most min(out, in)=128"
    )
    assert main([*command, "--subspace-k", "64"]) == 0


def test_checkpoints_bind_the_folder_to_their_options(tmp_path):
    config = standin.config(tmp_path)
    grid.prepare(config)
    checkpoint = tmp_path / "runs" / config.runs()[0].name / CHECKPOINT
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    with pytest.raises(ValueError, match="holds results of other options"):
        grid.prepare(dataclasses.replace(config, r=3))


def test_pretraining_into_an_unwritable_folder_returns_2(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["pretrain-glyphs", "--output", str(tmp_path / "file" / "below")]) == 2
    assert "expected a folder that can be written to" in capsys.readouterr().err


def test_results_of_other_images_are_refused(tmp_path, capsys):
    """Two data sets of one name and one layout, split in another way: nothing in the options tells them apart."""
    roots = [tmp_path / "a", tmp_path / "b"]
    for root in roots:
        make_miniature(root, "dtd")
    path = roots[1] / "dtd" / "split_zhou_DescribableTextures.json"
    splits = json.loads(path.read_text())
    path.write_text(json.dumps({**splits, "train": splits["train"][::-1]}))
    command = ["train", "--data", "dtd", "--methods", "linear-probe", "--shots", "1", "--seeds", "0", "--workers", "1"]
    command += ["--template", "default", "--output", str(tmp_path / "out"), "--data-root"]
    assert main([*command, str(roots[0])]) == 0
    assert main([*command, str(roots[0]), "--no-save-adapters"]) == 0
    assert main([*command, str(roots[1])]) == 2
    error = capsys.readouterr().err
    assert "the result of linear-probe-1shot-seed0 is of other images" in error
    assert "expected the same data, or another folder" in error


def test_a_checkpoint_of_other_images_is_refused(tmp_path, trained, monkeypatch):
    config = standin.config(tmp_path / "out")
    (run_,) = config.runs()

    def stop(done, loss):
        if done == 4:
            raise KeyboardInterrupt

    folder = tmp_path / "out" / "runs" / run_.name
    with pytest.raises(KeyboardInterrupt):
        train(config, run_, standin.setting(), folder, stop)
    other = standin.setting()
    swapped = dataclasses.replace(other.new.dataset, train=other.new.dataset.train.flip(0)[:24])
    other.new.dataset = swapped
    with pytest.raises(ValueError, match=r"its run has seen other images .* expected the same data"):
        train(config, run_, other, folder)
    assert train(config, run_, standin.setting(), folder)["steps"] == config.steps


@pytest.mark.parametrize(("interrupted", "code"), [(KeyboardInterrupt, 130), (RuntimeError("CUDA out of memory"), 1)])
def test_interrupted_short_commands_end_without_a_traceback(tmp_path, capsys, monkeypatch, interrupted, code):
    def stop(*arguments):
        raise interrupted

    monkeypatch.setattr(running, "evaluate", stop)
    assert main(["eval", str(tmp_path)]) == code
    assert capsys.readouterr().err.startswith("stopped" if code == 130 else "error: CUDA out of memory")


def test_a_profile_is_shown_where_the_first_method_trains_nothing(tmp_path, capsys):
    command = ["train", "--methods", "linear-probe", "lora", "--shots", "1", "--seeds", "0", "--learning-rates", "0.01"]
    command += ["--steps", "2", "--max-test-images", "8", "--workers", "1", "--towers", "image", "--profile"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    profile = (tmp_path / "runs" / "lora-1shot-lr0.01-seed0" / PROFILE).read_text()
    assert profile.splitlines()[0].strip() in capsys.readouterr().out


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda:1")
    check_device("cuda")
    with pytest.raises(ValueError, match=r"--device cuda:2: expected at most cuda:1"):
        check_device("cuda:2")


def test_two_commands_do_not_work_in_one_folder(tmp_path, capsys):
    command = ["train", "--methods", "linear-probe", "--shots", "1", "--seeds", "0", "--max-test-images", "8"]
    with grid.held(tmp_path):
        assert main([*command, "--output", str(tmp_path)]) == 1
    assert f"--output {tmp_path}: another process works in it, expected another folder" in capsys.readouterr().err
    assert not (tmp_path / "results.jsonl").exists()
    assert main([*command, "--output", str(tmp_path)]) == 0


@pytest.mark.parametrize("name", ["runs", "figures"])
def test_a_file_in_place_of_a_folder_is_found_before_anything_is_computed(tmp_path, capsys, name):
    (tmp_path / name).touch()
    assert main(["train", "--output", str(tmp_path)]) == 2
    assert f"--output {tmp_path / name}: expected a folder that can be written to" in capsys.readouterr().err


def test_validation_without_validation_images_is_refused(tmp_path, capsys):
    assert main(["train", "--preset", "glyphs", "--validation", "--output", str(tmp_path / "out")]) == 2
    assert "--validation: --draw own chooses no validation images from digits" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_error_of_a_run_tells_how_to_continue(tmp_path, capsys, trained, monkeypatch):
    def fail(config, run, *rest):
        if run.method == "both":
            raise OSError(errno.ENOSPC, "No space left on device")
        return train(config, run, *rest)

    monkeypatch.setattr(jobs, "train", fail)
    command = ["train", "--methods", "lora", "both", "--shots", "1", "--seeds", "0", "--learning-rates", "0.01"]
    command += ["--steps", "2", "--batch-size", "4", "--workers", "1", "--output", str(tmp_path)]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "error: [Errno 28] No space left on device\n1 of 2 runs are finished. The same command goes on" in error
