import json
import sys
from types import ModuleType, SimpleNamespace

import fewshot_standin as standin
import matplotlib.image
import pytest

from complora_kernels.fewshot import logs
from complora_kernels.fewshot.config import Run
from complora_kernels.fewshot.files import read_json_lines
from complora_kernels.fewshot.recipe import train

RUN = Run("both", 2, 1e-2, 0)


def test_tensorboard_gets_what_the_log_gets(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(standin.config(tmp_path, tensorboard=True, log_every=1), RUN, standin.setting(), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    lines = read_json_lines(tmp_path / "run" / "log.jsonl")
    for name in ("loss", "learning_rate"):
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        assert [scalar.value for scalar in scalars] == pytest.approx([line[name] for line in lines], rel=1e-6)
    assert events.Scalars("result/new")[0].value == pytest.approx(result["new"])


def test_weights_and_biases_gets_them_and_learns_how_it_ended(tmp_path, monkeypatch):
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


def test_a_run_that_ends_badly_leaves_its_log(tmp_path):
    def stop(done: int, loss: float) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(standin.config(tmp_path, log_every=1), RUN, standin.setting(), tmp_path / "run", stop)
    assert [line["step"] for line in read_json_lines(tmp_path / "run" / "log.jsonl")] == [1, 2, 3]
    assert (tmp_path / "run" / "loss.png").exists()


@pytest.mark.parametrize(("options", "package"), [({"tensorboard": True}, "tensorboard"), ({"wandb": "x"}, "wandb")])
def test_a_logger_that_is_not_installed_says_so(tmp_path, monkeypatch, options, package):
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"--{package}: {package} is not installed, expected `pip install {package}`"):
        logs.check_loggers(standin.config(tmp_path, **options))


def test_every_run_describes_itself(tmp_path):
    train(standin.config(tmp_path, save_adapters=True), RUN, standin.setting(), tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "draw.json", "log.jsonl", "loss.png", "adapter", "checkpoint.safetensors"}
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (described["run"], described["r"]) == ("both-2shot-lr0.01-seed0", 2)
    assert "torch" in described["versions"]
    drawn = json.loads((tmp_path / "run" / "draw.json").read_text())
    assert (len(drawn["train"]), drawn["shots"], drawn["seed"]) == (6, 2, 0)
    assert matplotlib.image.imread(tmp_path / "run" / "loss.png").shape[:2] == (300, 500)
