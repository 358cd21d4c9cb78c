import errno
import io
import itertools
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import fewshot_standin as standin
import pytest
import submitit
import yaml
from miniature_datasets import make_miniature
from rich.console import Console

from complora_kernels.fewshot import grid, jobs, slurm, sweep
from complora_kernels.fewshot.__main__ import main
from complora_kernels.fewshot.datasets import ELEVEN
from complora_kernels.fewshot.files import read_json_lines
from complora_kernels.fewshot.report import report
from complora_kernels.fewshot.sweep import SweepConfig, prepare_sweep, run_sweep

CONSOLE = Console(file=io.StringIO())
SWEEPS = Path(__file__).parents[2] / "benchmarks" / "sweeps"
CONTENT = {
    "shots": [1, 2],
    "seeds": [0, 3],
    "learning_rates": [0.001, 0.01],
    "methods": {
        "lora": {},
        "lora, wd 0.5": {"method": "lora", "weight_decay": 0.5},
        "both, k 3": {"method": "both", "subspace_k": 3, "subspace_ratio": None},
        "linear-probe": {},
    },
    "options": {"preset": "glyphs", "steps": 3, "r": 2, "batch_size": 4, "log_every": 1, "checkpoint_every": 2},
}


def write(folder, content, **changes):
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
    return SweepConfig(path, folder / "out", workers=1)


def run(config):
    return run_sweep(config, prepare_sweep(config), CONSOLE)


def without_measurements(results):
    return [{name: value for name, value in r.items() if name not in (*standin.VARYING, "versions")} for r in results]


def test_every_cell_of_a_sweep_is_run_once_under_its_label(tmp_path, trained):
    config = write(tmp_path, CONTENT)
    assert run(config) == 0
    results = read_json_lines(tmp_path / "out" / "results.jsonl")
    cells = {(r["label"], r["shots"], r["seed"], r["learning_rate"]) for r in results}
    trainable, anchors = 3 * 2 * 2 * 2, 2 * 2  # the probe has no learning rate
    assert len(results) == len(cells) == len(trained) == trainable + anchors
    assert {(r["label"], r["method"]) for r in results} == {
        (label, own.get("method", label)) for label, own in CONTENT["methods"].items()
    }
    assert {r["k"] for r in results if r["label"] == "both, k 3"} == {3}
    decayed = next(r["options"] for r in results if r["label"] == "lora, wd 0.5")
    assert decayed == {"preset": "glyphs", "weight_decay": 0.5, "steps": 3, "r": 2, "batch_size": 4}
    assert {r["data"] for r in results} == {"digits"}
    assert [r["seed"] for r in results] == sorted(r["seed"] for r in results)  # a stopped sweep is balanced
    assert (tmp_path / "out" / "runs" / "digits-both_k_3-2shot-lr0.01-seed3" / "log.jsonl").exists()
    trained.clear()
    assert run(config) == 0
    assert trained == []


@pytest.mark.long
def test_a_killed_and_resumed_sweep_gives_the_same_results(tmp_path, trained, monkeypatch):
    whole = write(tmp_path, CONTENT)
    assert run(whole) == 0
    stopped = SweepConfig(whole.file, tmp_path / "stopped", workers=1)
    step = grid.GridProgress.step

    def interrupt(self, job, done, loss):
        if (job.run.label, job.run.shots, done) == ("lora, wd 0.5", 2, 3):
            raise KeyboardInterrupt
        step(self, job, done, loss)

    monkeypatch.setattr(grid.GridProgress, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    monkeypatch.setattr(grid.GridProgress, "step", step)
    assert 0 < len(read_json_lines(tmp_path / "stopped" / "results.jsonl")) < 28
    assert run(stopped) == 0
    results = (read_json_lines(tmp_path / name / "results.jsonl") for name in ("stopped", "out"))
    found, expected = map(without_measurements, results)
    assert found == expected
    for name in ("stopped", "out"):
        report(tmp_path / name, CONSOLE)
    for table in ("table.md", "table.csv", "table.tex"):
        assert (tmp_path / "stopped" / table).read_text() == (tmp_path / "out" / table).read_text()


def test_a_failed_run_is_recorded_and_tried_again(tmp_path, trained, monkeypatch):
    config = write(tmp_path, CONTENT, shots=1, seeds=0)
    counted = jobs.train

    def fail(config, run, *rest):
        if run.label == "both, k 3" and run.learning_rate == 0.01:
            raise FloatingPointError("the loss is nan")
        return counted(config, run, *rest)

    monkeypatch.setattr(jobs, "train", fail)
    assert run(config) == 1
    name = "digits-both_k_3-1shot-lr0.01-seed0"
    assert read_json_lines(tmp_path / "out" / "failures.jsonl") == [{"run": name, "error": "the loss is nan"}]
    assert len(read_json_lines(tmp_path / "out" / "results.jsonl")) == 6
    monkeypatch.setattr(jobs, "train", counted)
    trained.clear()
    assert run(config) == 0
    assert trained == [name]


def test_a_sweep_may_grow_but_not_change_options(tmp_path, trained):
    assert run(write(tmp_path, CONTENT, shots=[1], seeds=[0], learning_rates=[0.01])) == 0
    trained.clear()
    methods = {**CONTENT["methods"], "output": {}}
    assert run(write(tmp_path, CONTENT, shots=[1, 2], seeds=[0], learning_rates=[0.01], methods=methods)) == 0
    assert len(trained) == 6
    methods["lora, wd 0.5"] = {"method": "lora", "weight_decay": 0.6}
    with pytest.raises(ValueError, match=r"--weight-decay was 0.5, now 0.6"):
        run(write(tmp_path, CONTENT, methods=methods))


def test_other_options_are_refused_before_the_first_result_too(tmp_path, trained, monkeypatch):
    def stop(self, job, done, loss):
        if done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(grid.GridProgress, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(write(tmp_path, CONTENT))
    assert not (tmp_path / "out" / "results.jsonl").exists()
    renamed = {"LoRA": {"method": "lora"}, "lora": {"weight_decay": 0.7}}
    with pytest.raises(ValueError, match=r"--weight-decay was 0.01, now 0.7"):
        run(write(tmp_path, CONTENT, methods=renamed))


def test_another_data_set_in_the_same_folder_is_another_run(tmp_path, trained):
    content = {**CONTENT, "shots": 1, "seeds": 0, "learning_rates": 0.01, "methods": ["lora"]}
    assert run(write(tmp_path, content)) == 0
    assert run(write(tmp_path, {**content, "data": ["letters", "digits"]})) == 0
    assert trained == ["digits-lora-1shot-lr0.01-seed0", "letters-lora-1shot-lr0.01-seed0"]


def test_errors_that_look_like_markup_are_shown(tmp_path, trained, monkeypatch):
    text = io.StringIO()
    shown = Console(file=text, width=200)

    def fail(config, run, *rest):
        raise ValueError("cannot read [/data/x.jpg], expected [in, out]")

    monkeypatch.setattr(jobs, "train", fail)
    config = write(tmp_path, CONTENT, shots=1, seeds=0, learning_rates=0.01, methods=["lora"])
    assert run_sweep(config, prepare_sweep(config), shown) == 1
    assert "cannot read [/data/x.jpg], expected [in, out]" in text.getvalue()


def test_a_full_disk_ends_the_sweep(tmp_path, trained, monkeypatch):
    def fail(config, run, *rest):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jobs, "train", fail)
    with pytest.raises(OSError, match="No space left"):
        run(write(tmp_path, CONTENT))
    assert not (tmp_path / "out" / "failures.jsonl").exists()


def test_wrong_parameters_of_slurm_are_refused(tmp_path):
    prepared = prepare_sweep(write(tmp_path, CONTENT))
    with pytest.raises(ValueError, match=r"slurm: \{'gpus': 2\}"):
        slurm.run_on_slurm(prepared.jobs, prepared.output, {"gpus": 2}, CONSOLE, cluster="local")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shot": 1}, r"small.yaml: shot: expected any of data, shots, seeds, learning_rates, methods, options, slurm"),
        ({"methods": ["dora"]}, r"small.yaml: method dora: expected any of lora, lora-wd, preserve, lora-plus"),
        ({"methods": {"a": {"method": "lora", "rank": 3}}}, r"small.yaml: a: option rank: expected any of"),
        ({"methods": {"a": {"method": "lora", "r": "many"}}}, r"small.yaml: a: .*many"),
        ({"methods": {"a b": {"method": "lora"}, "a_b": {"method": "both"}}}, r"two runs are called digits-a_b-1shot"),
        ({"methods": {"lora-wd": {"weight_decay": 1}}}, r"small.yaml: lora-wd: weight_decay: expected strong_weight"),
        ({"methods": []}, r"small.yaml: methods: \[\]: expected a name, or a list of at least one"),
        ({"methods": {}}, r"small.yaml: methods is empty, expected at least one"),
        ({"methods": ["lora", ["a"]]}, r"small.yaml: methods: \['lora', \['a'\]\]: expected a name"),
        ({"data": []}, r"small.yaml: data: \[\]: expected a name, or a list of at least one"),
        ({"methods": {"a": 3}}, r"small.yaml: a: 3: expected a mapping"),
        ({"methods": {"a": {"method": "lora", "workers": 3}}}, r"small.yaml: a: workers: expected outside of a"),
        ({"methods": {"a": {"method": "lora", "seeds": []}}}, r"small.yaml: a: .*seeds|--seeds \(\)"),
        ({"options": {"shots": 3}}, r"small.yaml: options: shots: expected outside of options"),
        ({"methods": {"a": {"method": "lora", "model": "ViT-X"}}}, r"small.yaml: --model ViT-X: expected one of"),
        ({"shots": [0]}, r"small.yaml: --shots 0: expected at least 1"),
        ({"shots": [900]}, r"class .* has 1\d\d"),
        ({"data": "cifar"}, r"cifar"),
        ({"options": ["r"]}, r"small.yaml: options: \['r'\]: expected a mapping"),
        ({"options": {"preset": "full"}}, r"--preset full: expected one of"),
    ],
)
def test_bad_files_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare_sweep(write(tmp_path, CONTENT, **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"- a\n", "expected a mapping"), (b"a: [", "is no YAML"), (b"a: \xe9\n", "small.yaml is not UTF-8")],
)
def test_files_that_are_no_sweep_are_refused(tmp_path, text, message, capsys):
    (tmp_path / "small.yaml").write_bytes(text)
    assert main(["sweep", str(tmp_path / "small.yaml"), "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_sweep_file_is_named(tmp_path, capsys):
    assert main(["sweep", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: expected a YAML file that describes a sweep" in capsys.readouterr().err


@pytest.mark.long
def test_submitit_runs_missing_cells_and_records_failures(tmp_path, trained, monkeypatch):
    """submitit's executor for this machine starts processes, which train the bundled model."""
    options = {"preset": "glyphs", "steps": 2, "max_test_images": 20, "threads": 1, "towers": ["image"]}
    methods = {"lora": {}, "too large": {"method": "output", "subspace_k": 999, "subspace_ratio": None}}
    content = {"shots": 1, "seeds": 0, "learning_rates": 0.01, "methods": methods, "options": options}
    prepared = prepare_sweep(write(tmp_path, content))
    folder, collect = tmp_path / "out" / "slurm", slurm.collect
    submitted, map_array = [], submitit.AutoExecutor.map_array

    def noted(executor, *arguments):
        submitted.extend(map_array(executor, *arguments))
        return submitted[-len(arguments[-1]) :]

    monkeypatch.setattr(submitit.AutoExecutor, "map_array", noted)

    def submit_and_collect() -> None:
        slurm.run_on_slurm(
            prepared.jobs, prepared.output, {"timeout_min": 5}, CONSOLE, cluster="local", seconds_between_looks=0.1
        )

    def stop(job, task, *rest):
        while not all(task.done() for task in submitted):
            time.sleep(0.1)
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm, "collect", stop)
    with pytest.raises(KeyboardInterrupt):
        submit_and_collect()
    assert not (tmp_path / "out" / "results.jsonl").exists()
    monkeypatch.setattr(slurm, "collect", collect)
    submit_and_collect()
    assert len(submitted) == 2  # found, not submitted again
    (result,) = read_json_lines(tmp_path / "out" / "results.jsonl")
    assert result["label"] == "lora"
    (failure,) = read_json_lines(tmp_path / "out" / "failures.jsonl")
    assert "subspace_k=999" in failure["error"]
    submit_and_collect()
    assert len(submitted) == 3
    failures = read_json_lines(tmp_path / "out" / "failures.jsonl")
    assert [failure["run"] for failure in failures] == ["digits-too_large-1shot-lr0.01-seed0"] * 2
    assert not list(folder.glob("*_submitted.pkl"))


def test_preempted_runs_are_queued_again(tmp_path):
    job = prepare_sweep(write(tmp_path, CONTENT)).jobs[0]
    again = slurm.ClusterRun().checkpoint(job)
    assert isinstance(again.function, slurm.ClusterRun)
    assert again.args == (job,)


def test_slurm_without_submitit_tells_how_to_install_it(tmp_path, monkeypatch):
    config = write(tmp_path, CONTENT)
    monkeypatch.setattr(slurm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install submitit"):
        prepare_sweep(SweepConfig(config.file, config.output, slurm=True))
    assert sweep.check_submitit is slurm.check_submitit


def test_options_that_yaml_reads_as_truth_values_keep_their_meaning(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("methods: [lora]\nshots: 1\noptions: {graph: off, save_adapters: no, profile: yes}\n")
    config = sweep.read_sweep(SweepConfig(path)).jobs[0].config
    assert (config.graph, config.save_adapters, config.profile) == ("off", False, True)


def test_runs_of_one_split_are_consecutive(tmp_path):
    jobs = prepare_sweep(write(tmp_path, CONTENT, data=["letters", "digits"])).jobs
    splits = [(job.run.seed, job.run.data, job.run.shots) for job in jobs]
    assert list(dict.fromkeys(splits)) == [
        (seed, data, shots) for seed in (0, 3) for data in ("letters", "digits") for shots in (1, 2)
    ]
    changes = sum(a != b for a, b in itertools.pairwise(splits))
    assert changes == 7


def test_queued_runs_bind_the_folder_to_their_options(tmp_path):
    config = write(tmp_path, CONTENT)
    prepare_sweep(config)
    (tmp_path / "out" / grid.SLURM).mkdir()
    (tmp_path / "out" / grid.SLURM / "12_0_submitted.pkl").touch()
    methods = {"lora, wd 0.5": {"method": "lora", "weight_decay": 0.6}}
    with pytest.raises(ValueError, match=r"--weight-decay was 0.5, now 0.6"):
        prepare_sweep(write(tmp_path, CONTENT, methods=methods))


def test_data_sets_whose_runs_would_share_a_name_are_refused(tmp_path):
    data = [f"folder:{make_miniature(tmp_path / name, 'folder')}" for name in ("a b", "a_b")]
    with pytest.raises(ValueError, match=r"two runs are called folder_.*_a_b_.*, expected names of methods, and of"):
        prepare_sweep(write(tmp_path, CONTENT, data=data))


@pytest.mark.parametrize(
    ("name", "protocol", "trained", "anchors"),
    [("few-shot", "few-shot", 6 * 5, 2 * 5), ("base-to-new", "base-to-new", 6, 0), ("retention", "retention", 6, 0)],
)
def test_the_bundled_sweeps_are_valid(tmp_path, name, protocol, trained, anchors):
    for data in ELEVEN:
        make_miniature(tmp_path, data, classes=2, per_class=(20, 4, 1))
    text = (SWEEPS / f"{name}.yaml").read_text().replace("data_root: /data", f"data_root: {tmp_path}")
    (tmp_path / f"{name}.yaml").write_text(text)
    found = sweep.read_sweep(SweepConfig(tmp_path / f"{name}.yaml"))
    assert {job.config.protocol for job in found.jobs} == {protocol}
    assert {job.run.data for job in found.jobs} == set(ELEVEN)
    assert {job.config.steps_for(job.run.shots) for job in found.jobs} == {500 * job.run.shots for job in found.jobs}
    assert len(found.jobs) == 11 * 3 * (trained + anchors)
    assert found.slurm["gpus_per_node"] == 1


def test_the_bundled_ablation_is_valid():
    found = sweep.read_sweep(SweepConfig(SWEEPS / "glyphs-ablation.yaml"))
    assert len(found.jobs) == 1200
    assert (len({job.run.seed for job in found.jobs}), len({job.run.title for job in found.jobs})) == (10, 40)


def test_the_choosing_among_methods_on_pictures_is_valid():
    found = sweep.read_sweep(SweepConfig(SWEEPS / "pictures-choose.yaml"))
    assert len(found.jobs) == 1000
    assert {job.config.model for job in found.jobs} == {"pictures"}
    assert {job.run.seed for job in found.jobs} == set(range(5))
    assert {job.run.data for job in found.jobs} == {"fashion", "digits"}


class Task:
    """One of submitit's on a cluster that is asked about all tasks which are known when it is asked."""

    known = 0
    asked: ClassVar[list[int]] = []

    def __init__(self, folder, job_id):
        self.job_id = job_id
        Task.known += 1
        self.paths = SimpleNamespace(
            result_pickle=folder / f"{job_id}_result.pkl", submitted_pickle=folder / f"{job_id}_submitted.pkl"
        )

    def done(self):
        Task.asked.append(Task.known)
        return self.job_id != "1_0"

    def submission(self):
        return SimpleNamespace(args=(SimpleNamespace(run=SimpleNamespace(name=self.job_id)),))


def test_a_cluster_is_asked_about_all_tasks_at_once_and_lost_ones_are_forgotten(tmp_path):
    for name in ("1_0", "1_1", "1_2"):
        (tmp_path / f"{name}_submitted.pkl").touch()
    (tmp_path / "1_1_result.pkl").touch()
    assert sorted(slurm.tasks_under_way(tmp_path, Task)) == ["1_0", "1_1"]
    assert Task.asked == [3, 3, 3]
    assert sorted(path.name for path in tmp_path.glob("*_submitted.pkl")) == ["1_0_submitted.pkl", "1_1_submitted.pkl"]


def test_arrays_have_at_most_slurms_limit_of_tasks(tmp_path, monkeypatch):
    prepared = prepare_sweep(write(tmp_path, CONTENT))
    parts = []

    def submit(executor, function, jobs):
        parts.append(len(jobs))
        return [SimpleNamespace(done=lambda: True, job=job) for job in jobs]

    monkeypatch.setattr(slurm, "MAX_ARRAY_TASKS", 10)
    monkeypatch.setattr(submitit.AutoExecutor, "map_array", submit)
    collected = []
    monkeypatch.setattr(slurm, "collect", lambda job, task, *rest: collected.append((job, task.job)))
    slurm.run_on_slurm(prepared.jobs, prepared.output, {}, CONSOLE, cluster="local")
    assert parts == [10, 10, 8]
    assert [job.run.name for job, _ in collected] == [job.run.name for job in prepared.jobs]
    assert all(job is submitted for job, submitted in collected)


def test_workers_under_torchrun_are_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = write(tmp_path, CONTENT)
    for command in (["sweep", str(config.file)], ["train", "--methods", "lora"]):
        assert main([*command, "--workers", "2", "--output", str(tmp_path / "out")]) == 2
        assert "--workers 2: expected 1 under torchrun" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
