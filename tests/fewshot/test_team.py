import json
import math
import subprocess
import sys
from typing import Any

import fewshot_standin as standin
import fewshot_team
import pytest
import torch
from miniature_datasets import make_miniature
from torch.multiprocessing.spawn import spawn

from complora_kernels.fewshot.config import Run
from complora_kernels.fewshot.datasets import load_dataset
from complora_kernels.fewshot.files import read_json_lines
from complora_kernels.fewshot.recipe import train
from complora_kernels.fewshot.team import SharedError, Team

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folder in which two processes have done everything of `fewshot_team`."""
    folder = tmp_path_factory.mktemp("team")
    spawn(fewshot_team.work, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("case", fewshot_team.CASES)
def test_two_processes_compute_the_same_as_one(found, tmp_path, case):
    options = fewshot_team.CASES[case]
    expected = train(standin.config(tmp_path, **options), fewshot_team.RUN, standin.setting(), tmp_path / "run")
    results = [json.loads((found / f"{case}-{rank}.json").read_text()) for rank in range(2)]
    assert results[0]["tasks"] == results[1]["tasks"]
    alone, together = (read_json_lines(folder / "log.jsonl") for folder in (tmp_path / "run", found / case))
    assert len(alone) == len(together) == 8
    for ours, theirs in zip(together, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-4)  # sums in another order, eight steps long
    assert results[0]["relative_update"] == pytest.approx(expected["relative_update"], rel=1e-3)
    for name in ("zero_shot_new", "zero_shot_kept"):
        assert results[0][name] == expected[name]
    for name in ("new", "kept"):
        assert results[0][name] == pytest.approx(expected[name], abs=0.05)  # one image at the edge
    assert expected.keys() == results[0].keys()


def test_a_killed_team_resumes(found):
    whole, resumed = (read_json_lines(found / name / "log.jsonl") for name in ("whole", "resumed"))
    assert whole == resumed
    assert whole != read_json_lines(found / "one size" / "log.jsonl")  # there without dropout


def test_ensembles_and_uneven_prompts_are_gathered(found):
    features, grads = (torch.load(found / f"{name}.pt") for name in ("features", "grads"))
    rows = torch.arange(10.0).view(5, 2).requires_grad_()
    (1.0 * rows + 2.0 * rows).sum().backward()  # the sum of both processes' losses
    assert rows.grad is not None
    assert torch.equal(features, rows.detach())
    assert torch.equal(grads, rows.grad)


def test_a_single_process_is_a_team():
    alone = Team()
    values = torch.arange(4.0)
    for same in (alone.share(values), alone.rows_of(values), alone.gather(values, 4), alone.sum(values)):
        assert same is values
    assert alone.agree(3) == 3
    alone.wait()


def test_more_processes_than_images_are_refused(tmp_path):
    with pytest.raises(SharedError, match=r"7 processes share batches of 4 images .* expected at least one for each"):
        train(standin.config(tmp_path), Run("lora", 2, 1e-2, 0), standin.setting(), tmp_path, team=Alone(0, 7))


class Alone(Team):
    """One of several, which says nothing to the others."""

    def sum(self, values):
        return values

    def collect(self, value):
        return [value]


def test_torchrun_gives_the_results_of_one_process(tmp_path):
    options = "--methods both --shots 1 --seeds 0 --learning-rates 0.01 --steps 4 --max-test-images 40 --batch-size 10"
    options += " --towers image --log-every 1"
    command = ["-m", "complora_kernels.fewshot", "train", *options.split(), "--workers", "1", "--output"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for folder, line in (("alone", []), ("together", torchrun)):
        done = subprocess.run(
            [sys.executable, *line, *command, str(tmp_path / folder)], capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
    (alone,), (together,) = (read_json_lines(tmp_path / name / "results.jsonl") for name in ("alone", "together"))
    assert done.stdout.count("1/1 both-1shot-lr0.01-seed0") == 1
    for name in alone.keys() - {*standin.VARYING, "versions", "share", "tasks"}:  # the share is rounding alone
        value = alone[name]
        assert together[name] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), name
    assert together["tasks"]["letters"] == pytest.approx(alone["tasks"]["letters"], rel=1e-3)
    assert math.isfinite(together["loss"])


def test_a_team_records_failed_runs_and_continues(tmp_path):
    """One that diverges in both processes, and one whose damaged test image only one of them is given."""
    folder = make_miniature(tmp_path, "folder")
    dataset = load_dataset(f"folder:{folder}")
    assert dataset.test is not None
    damaged: Any = dataset.images[dataset.test[1]]
    damaged.write_bytes(damaged.read_bytes()[:60])
    (tmp_path / "two.yaml").write_text(
        f"""
        data: ["folder:{folder}", digits]
        shots: 1
        seeds: 0
        learning_rates: [1.0e+30, 0.003]
        methods: [lora]
        options: {{preset: glyphs, steps: 3, max_test_images: 20, towers: [image], batch_size: 4}}
        """
    )
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "complora_kernels.fewshot"]
    command += ["sweep", str(tmp_path / "two.yaml"), "--output", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr
    failures = read_json_lines(tmp_path / "out" / "failures.jsonl")
    assert len(failures) == 3
    assert all(failure["error"].startswith(f"{damaged} cannot be decoded") for failure in failures[:2])
    assert [failure["run"] for failure in failures[2:]] == ["digits-lora-1shot-lr1e+30-seed0"]
    (result,) = read_json_lines(tmp_path / "out" / "results.jsonl")
    assert result["learning_rate"] == 0.003
