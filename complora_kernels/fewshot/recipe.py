"""One run: draw the shots, adapt the model, train it, measure what it learned and what it forgot."""

from __future__ import annotations

import copy
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import complora_kernels as ck
from complora_kernels.fewshot import datasets
from complora_kernels.fewshot.backbone import Backbone, load_backbone
from complora_kernels.fewshot.config import Run, TrainConfig
from complora_kernels.fewshot.evaluate import Task
from complora_kernels.fewshot.files import write_atomically
from complora_kernels.fewshot.resume import load_checkpoint, save_checkpoint
from complora_kernels.fewshot.sampler import batch_indices, draw_shots

CHECKPOINT = "checkpoint.safetensors"

_PACKAGES = ("complora-kernels", "open_clip_torch", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Setting:
    """What all runs of a grid share: the pretrained model, the task it learns and the one it should keep."""

    backbone: Backbone
    new: Task
    kept: Task


def load_setting(config: TrainConfig) -> Setting:
    """Load the model and the data sets that `config` asks for."""
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    backbone = load_backbone(config.model, config.pretrained, config.activation, device)
    new, kept = (
        Task(dataset, backbone, config.template, config.test_batch_size)
        for dataset in (datasets.digits(), datasets.letters())
    )
    return Setting(backbone, new, kept)


def train(
    config: TrainConfig,
    run: Run,
    setting: Setting,
    folder: Path,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, Any]:
    """Train and measure one cell of the grid.

    A run that finds a checkpoint in its folder goes on from there, and ends with the same factors as if it had
    never been stopped. The checkpoint is left to the caller to remove, once the result is safe. The setting's own
    model stays as it is; torch's global random state is seeded.

    Args:
        config: the options shared by all runs.
        run: the method, the shots, the learning rate and the seed.
        setting: the pretrained model and its tasks.
        folder: where the log, the checkpoint and the adapter go; created when needed.
        on_step: called with the number of steps done and the loss. It may raise to stop the run.

    Returns:
        The run's line in results.jsonl: accuracies are shares of 1.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
        RuntimeError: an adapter got no gradient in the first step.
    """
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    device = setting.backbone.device
    steps = config.steps_for(run.shots)

    # Data: the shots to train on, the rest of the digits and all letters to measure on
    train_indices, rest = draw_shots(setting.new.dataset.labels, run.shots, run.seed)
    test_indices = at_most(config.max_test_images, rest)
    kept_indices = at_most(config.max_test_images, torch.arange(len(setting.kept.dataset.labels)))
    images = setting.new.dataset.images[train_indices].to(device)  # uint8 [N, 3, H, W]
    labels = setting.new.dataset.labels[train_indices].to(device)  # [N]

    # Model: a copy of the pretrained one; every method of a seed starts from the same factors
    torch.manual_seed(run.seed)
    adapter_config = config.adapter(run.method, run.seed)
    model = ck.apply_complora(copy.deepcopy(setting.backbone.model), adapter_config, progress=False).train()
    optimizer = torch.optim.AdamW(
        ck.adapter_parameters(model), lr=run.learning_rate, betas=(0.9, 0.999), weight_decay=config.weight_decay
    )
    logit_scale = model.logit_scale.detach().exp()  # fixed, 100 for a trained CLIP
    with torch.no_grad():
        class_features = model.encode_text(setting.new.tokens, normalize=True)  # [C, D], final for a frozen text tower

    # Resume
    checkpoint = folder / CHECKPOINT
    progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "log": []}
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, model, optimizer)
    first_step, log = progress["step"], progress["log"]

    # Training
    for step in range(first_step, steps):
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, run.learning_rate, config.final_learning_rate)
        batch = batch_indices(len(labels), config.batch_size, run.seed, step).to(device)
        image_features = model.encode_image(setting.backbone.preprocess(images[batch]), normalize=True)  # [B, D]
        if "text" in config.towers:
            class_features = model.encode_text(setting.new.tokens, normalize=True)  # [C, D]
        logits = logit_scale * image_features @ class_features.T  # [B, C]
        loss = F.cross_entropy(logits, labels[batch])
        if not loss.isfinite():
            rate = optimizer.param_groups[0]["lr"]
            raise FloatingPointError(
                f"{run.name}: the loss is {loss.item()} in step {step} at learning rate {rate:.2g}"
            )
        optimizer.zero_grad()
        loss.backward()
        if step == first_step:
            ck.check_gradients(model)
        optimizer.step()

        done = step + 1
        if done % config.log_every == 0 or done == steps:
            log.append({"step": done, "loss": loss.item(), "learning_rate": optimizer.param_groups[0]["lr"]})
        if done % config.checkpoint_every == 0 and done < steps:
            seconds = progress["seconds"] + time.perf_counter() - started
            save_checkpoint(checkpoint, model, optimizer, {"step": done, "seconds": seconds, "log": log})
        on_step(done, loss.item())

    # Measurement
    model.eval()
    result = {
        "run": run.name,
        **asdict(run),
        "steps": steps,
        "zero_shot_new": setting.new.zero_shot_accuracy(test_indices),
        "zero_shot_kept": setting.kept.zero_shot_accuracy(kept_indices),
        "new": setting.new.accuracy(model, test_indices),
        "kept": setting.kept.accuracy(model, kept_indices),
        "loss": log[-1]["loss"],
        **mean_over_layers(model),
        "seconds": round(progress["seconds"] + time.perf_counter() - started, 2),
        "versions": versions(),
    }
    write_atomically(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
    if config.save_adapters:
        ck.save_adapter(model, folder / "adapter")
    return result


def mean_over_layers(model: torch.nn.Module) -> dict[str, float]:
    """Means over the adapted weights of what `subspace_report` tells about each."""
    report = ck.subspace_report(model)
    columns = ("k", "energy", "share", "relative_update")
    return {column: sum(getattr(row, column) for row in report) / len(report) for column in columns}


def versions() -> dict[str, str]:
    """The versions of what computes the results."""
    packages = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "torch": torch.__version__, **packages}


def cosine(step: int, steps: int, first: float, last: float) -> float:
    """The learning rate of `step`: half a cosine from `first` at step 0 to `last` at step `steps`."""
    return last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2


def at_most(n: int | None, indices: Tensor) -> Tensor:
    """All indices, or `n` of them chosen at random, always the same ones."""
    if n is None or n >= len(indices):
        return indices
    chosen = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))[:n]
    return indices[chosen.sort().values]
