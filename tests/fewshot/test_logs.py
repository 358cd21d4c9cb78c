import errno
import io
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fewshot_standin as standin
import matplotlib.image
import pytest

from complora_kernels.fewshot import logs
from complora_kernels.fewshot.config import Run
from complora_kernels.fewshot.files import read_json_lines
from complora_kernels.fewshot.predictions import PREDICTIONS
from complora_kernels.fewshot.recipe import train

RUN = Run("both", 2, 1e-2, 0)


def test_tensorboard_gets_the_values_of_the_log(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(standin.config(tmp_path, tensorboard=True, log_every=1), RUN, standin.setting(), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    lines = read_json_lines(tmp_path / "run" / "log.jsonl")
    for name in ("loss", "learning_rate"):
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        assert [scalar.value for scalar in scalars] == pytest.approx([line[name] for line in lines], rel=1e-6)
    assert events.Scalars("result/new")[0].value == pytest.approx(result["new"])


def test_weights_and_biases_gets_the_values_and_the_exit_code(tmp_path, monkeypatch):
    said = []
    started = SimpleNamespace(
        log=lambda values, step: said.append((step, values)), finish=lambda exit_code: said.append(exit_code)
    )
    wandb = ModuleType("wandb")
    wandb.init = lambda **options: said.append(options) or started  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(standin.config(tmp_path, wandb="clip", log_every=3), RUN, standin.setting(), tmp_path / "run")
    assert (said[0]["project"], said[0]["name"]) == ("clip", "both-2shot-lr0.01-seed0")
    assert [step for step, _ in said[1:-1]] == [3, 6, 6]
    assert said[-1] == 0

    def stop(done: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(standin.config(tmp_path, wandb="clip"), RUN, standin.setting(), tmp_path / "stopped", stop)
    assert said[-1] == 1
    first, second = (options["id"] for options in said if isinstance(options, dict))
    assert first != second  # the same name in another folder


def test_a_failed_run_leaves_its_log(tmp_path):
    def stop(done: int, loss: float) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(standin.config(tmp_path, log_every=1), RUN, standin.setting(), tmp_path / "run", stop)
    assert [line["step"] for line in read_json_lines(tmp_path / "run" / "log.jsonl")] == [1, 2, 3]
    assert (tmp_path / "run" / "loss.png").exists()


def test_each_line_is_in_the_file_at_once(tmp_path):
    seen = []

    def look(done: int, loss: float) -> None:
        lines = read_json_lines(tmp_path / "run" / "log.jsonl")
        seen.append([(line["step"], line["loss"] == loss) for line in lines][-1:])

    train(standin.config(tmp_path, log_every=2), RUN, standin.setting(), tmp_path / "run", look)
    assert seen == [[], [(2, True)], [(2, False)], [(4, True)], [(4, False)], [(6, True)]]


def test_a_killed_run_continues_with_the_lines_of_its_checkpoint(tmp_path):
    """And not with those that it wrote after it, or the one of which it wrote a part."""
    config = standin.config(tmp_path, log_every=1, checkpoint_every=2)

    def copy(done: int, loss: float) -> None:  # keeps the file as a kill would leave it
        if done == 3:
            shutil.copytree(tmp_path / "whole", tmp_path / "killed")

    train(config, RUN, standin.setting(), tmp_path / "whole", copy)
    log = tmp_path / "killed" / "log.jsonl"
    assert [line["step"] for line in read_json_lines(log)] == [1, 2, 3]
    assert not (tmp_path / "killed" / "loss.png").exists()
    with log.open("a") as file:
        file.write('{"step": 4, "lo')
    starts = []

    def look(done: int, loss: float) -> None:
        starts.append([json.loads(line)["step"] for line in log.read_text().splitlines()])

    train(config, RUN, standin.setting(), tmp_path / "killed", look)
    assert starts[0] == [1, 2, 3]
    assert log.read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    assert (tmp_path / "killed" / "loss.png").exists()


def test_a_run_that_starts_again_starts_its_log_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 9}\n')
    train(standin.config(tmp_path, log_every=3), RUN, standin.setting(), tmp_path / "run")
    assert [line["step"] for line in read_json_lines(tmp_path / "run" / "log.jsonl")] == [3, 6]


class Full(io.RawIOBase):
    """A file on a disk without room."""

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_the_run_with_its_error(tmp_path, monkeypatch):
    """Once: neither the file, whose rest cannot be written when it is closed, nor the figure says it again."""
    written = logs.write_atomically

    def no_figure(path: Path, content: bytes) -> None:
        if path.name == "loss.png":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written(path, content)

    monkeypatch.setattr(logs, "open_to_append", lambda path: io.BufferedWriter(Full()))
    monkeypatch.setattr(logs, "write_atomically", no_figure)
    steps = []
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: .*log.jsonl'$") as error:
        train(
            standin.config(tmp_path, log_every=2),
            RUN,
            standin.setting(),
            tmp_path / "run",
            lambda done, loss: steps.append(done),
        )
    assert steps == [1]  # the second step is the first that is logged
    assert error.value.errno == errno.ENOSPC
    assert error.value.__context__ is None


def test_a_process_that_does_not_lead_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with logs.RunLog(standin.config(tmp_path, tensorboard=True, wandb="x"), "run", None, []) as log:
        log.add(1, 0.5, 0.1)
        log.finish({"steps": 1, "new": 0.5})
    assert log.lines == [{"step": 1, "loss": 0.5, "learning_rate": 0.1}]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("options", "package"), [({"tensorboard": True}, "tensorboard"), ({"wandb": "x"}, "wandb")])
def test_a_logger_that_is_not_installed_is_refused(tmp_path, monkeypatch, options, package):
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"--{package}: {package} is not installed, expected `pip install {package}`"):
        logs.check_loggers(standin.config(tmp_path, **options))


def test_every_run_writes_its_options_and_its_split(tmp_path):
    train(standin.config(tmp_path, save_adapters=True), RUN, standin.setting(), tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "config.json",
        "draw.json",
        "log.jsonl",
        "loss.png",
        "adapter",
        "checkpoint.safetensors",
        PREDICTIONS,
    }
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (described["run"], described["r"]) == ("both-2shot-lr0.01-seed0", 2)
    assert "torch" in described["versions"]
    split = json.loads((tmp_path / "run" / "draw.json").read_text())
    assert (len(split["train"]), split["shots"], split["seed"]) == (6, 2, 0)
    assert matplotlib.image.imread(tmp_path / "run" / "loss.png").shape[:2] == (300, 500)
