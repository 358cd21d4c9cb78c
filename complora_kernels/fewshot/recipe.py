"""One run: chooses the few-shot split, trains the adapted model, and measures what it has learned and retained."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import complora_kernels as ck
from complora_kernels.common.files import refuse_link
from complora_kernels.fewshot import config as options
from complora_kernels.fewshot.classifier_file import write_classifier
from complora_kernels.fewshot.config import Run, TrainConfig
from complora_kernels.fewshot.datasets import choose_split, write_split
from complora_kernels.fewshot.datasets.few_shot_split import fingerprint
from complora_kernels.fewshot.files import write_json
from complora_kernels.fewshot.logs import RunLog
from complora_kernels.fewshot.measure import Measurement
from complora_kernels.fewshot.predictions import PREDICTIONS, write_predictions
from complora_kernels.fewshot.profile import StepProfile
from complora_kernels.fewshot.setting import Setting
from complora_kernels.fewshot.team import ALONE, Team
from complora_kernels.fewshot.training import RunContext, Training, prepare, take_steps

SPLIT_FILE = "draw.json"
ADAPTER = "adapter"

_PACKAGES = ("complora-kernels", "open_clip_torch", "numpy", "scikit-learn")


def train(
    config: TrainConfig,
    run: Run,
    setting: Setting,
    folder: Path,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    team: Team = ALONE,
) -> dict[str, Any]:
    """Train and measure one cell of the grid.

    A run that finds a checkpoint in its folder continues from there, and ends with the same factors as if it had never
    been stopped. A damaged checkpoint is renamed, and the run starts again. The caller removes the checkpoint, once the
    result is safe. The model of the setting stays unchanged; torch's global random state is seeded.

    The processes of a team share every batch, the prompts and the images to be measured; without dropout they compute
    the same as one process. The first of them writes the files. A run that is resumed by as many processes as before
    ends as if it had never been stopped; by another number of processes, it continues with other dropout masks.

    Args:
        config: the options shared by all runs.
        run: the method, the shots, the learning rate and the seed.
        setting: the pretrained model and its tasks.
        folder: the folder of the split, the options, the log, the checkpoint and the adapter; created when needed.
        on_step: called with the number of steps done and the loss. It may raise to stop the run.
        team: the processes that train together, each of which calls this.

    Returns:
        The run's line in results.jsonl; accuracies are between 0 and 1.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
        RuntimeError: an adapter got no gradient in the first step; `graph` is "on" where a step cannot be captured.
        ValueError: there are more processes than images in a batch, or the checkpoint is of other images.
        OSError: a file cannot be written.
        SharedError: in every process of a team, the error of one of them.
    """
    started = time.perf_counter()
    dtype = precision_for(config.precision, setting.backbone.device)
    with team.together():
        split = choose_split(setting.new.dataset, run.shots, run.seed, config.draw)
        measurement = Measurement(config, setting, split, dtype, team)
    seen = fingerprint(setting.new.dataset, split)
    if team.leads:
        for part in (folder, folder / ADAPTER):
            refuse_link(part)
        folder.mkdir(parents=True, exist_ok=True)
        write_split(folder / SPLIT_FILE, setting.new.dataset, split)
        root = None if config.data_root is None else str(config.data_root)
        described = {"run": run.name, **options.to_json(config), "data_root": root, "versions": versions()}
        write_json(folder / "config.json", described)
    before = {
        "run": run.name,
        "data": config.data,
        "protocol": config.protocol,
        "method": run.method,
        "label": run.title,
        "options": options.changed(config),
        "shots": run.shots,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "images": seen,
        "precision": str(dtype).removeprefix("torch."),
        **measurement.zero_shot(),
    }
    if run.learning_rate is None:
        found = {"steps": 0, **measurement.anchor(run.method, run.seed)}
    else:
        context = RunContext(config, run, setting, split, seen, folder, dtype, team)
        found = _train(context, measurement, on_step)
    answers = measurement.answers() if config.save_predictions else {}
    if config.save_predictions and team.leads:
        write_predictions(folder / PREDICTIONS, answers)
    seconds = found.pop("seconds_before", 0.0) + time.perf_counter() - started
    return {**before, **found, "seconds": round(seconds, 2), "versions": versions()}


def _train(context: RunContext, measurement: Measurement, on_step: Callable[[int, float], None]) -> dict[str, Any]:
    """Train the model of a run, measure it and save its adapter; returns a part of the run's result."""
    training = prepare(context)
    written_to = context.folder if context.team.leads else None
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(context.device)
    train_step = training.train_step()
    started = time.perf_counter()
    with (
        RunLog(context.config, context.run.name, written_to, training.progress["log"]) as log,
        StepProfile(written_to if context.config.profile else None, context.steps - training.first_step) as profile,
    ):
        done = take_steps(training, train_step, log, profile, on_step)
        result = _measure(training, measurement, log, done, time.perf_counter() - started)
        log.finish(result)
    if context.config.save_adapters and context.team.leads:
        _save(training, result, context.folder / ADAPTER)
    return result


def _save(training: Training, result: dict[str, Any], folder: Path) -> None:
    """Save the adapter, and with it what else is needed to classify images."""
    context, task = training.context, training.context.setting.new
    ck.save_adapter(training.model, folder)
    run = {
        "name": context.run.name,
        "data": context.config.data,
        "protocol": context.config.protocol,
        "method": context.run.method,
        "shots": context.run.shots,
        "learning_rate": context.run.learning_rate,
        "seed": context.run.seed,
        "steps": result["steps"],
        "accuracy": result["new"],
    }
    write_classifier(
        folder,
        training.model,
        context.setting.backbone,
        class_names=task.dataset.class_names,
        templates=task.templates,
        options=context.config,
        run=run,
    )


def _measure(training: Training, measurement: Measurement, log: RunLog, done: int, seconds: float) -> dict[str, Any]:
    """The part of a run's result that its training determines: `done` steps, the last of them in `seconds`."""
    context, model = training.context, training.model.eval()
    trained = (done - training.first_step) * training.batch_size  # images
    return {
        "steps": done,
        **measurement.trained(model),
        "loss": log.lines[-1]["loss"],
        **mean_over_layers(model),
        **({} if training.preservation is None else training.preservation.described()),
        "seconds_before": training.progress["seconds"],
        "images_per_second": round(trained / seconds, 1),
        "peak_memory_mib": round(peak_memory(context.device) / 2**20),
    }


def precision_for(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the frozen weights and of the computations with them."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def peak_memory(device: torch.device) -> int:
    """The most bytes in use: on a GPU since the training began, on the CPU since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def mean_over_layers(model: torch.nn.Module) -> dict[str, float]:
    """Means over the adapted weights of the columns of `subspace_report`."""
    report = ck.subspace_report(model)
    columns = ("k", "energy", "share", "relative_update")
    return {column: sum(getattr(row, column) for row in report) / len(report) for column in columns}


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that compute the results."""
    packages = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "torch": torch.__version__, **packages}
