"""One run: draw the shots, adapt the model, train it, measure what it learned and what it forgot."""

from __future__ import annotations

import copy
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

import complora_kernels as ck
from complora_kernels.fewshot import datasets
from complora_kernels.fewshot.backbone import Backbone, load_backbone
from complora_kernels.fewshot.config import Run, TrainConfig
from complora_kernels.fewshot.evaluate import Task
from complora_kernels.fewshot.files import write_atomically
from complora_kernels.fewshot.images import DeviceImages, draw_boxes, resample
from complora_kernels.fewshot.profile import StepProfile
from complora_kernels.fewshot.resume import load_checkpoint, save_checkpoint
from complora_kernels.fewshot.sampler import batch_indices, draw_shots

CHECKPOINT = "checkpoint.safetensors"
MEASURED = ("seconds", "images_per_second", "peak_memory_mib")  # of a result: what differs between equal runs

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
        RuntimeError: an adapter got no gradient in the first step; `graph` is "on" where a step cannot be captured.
    """
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    device = setting.backbone.device
    steps = config.steps_for(run.shots)

    # Data: the shots to train on, the rest of the digits and all letters to measure on
    train_indices, rest = draw_shots(setting.new.dataset.labels, run.shots, run.seed)
    test_indices = at_most(config.max_test_images, rest)
    kept_indices = at_most(config.max_test_images, torch.arange(len(setting.kept.dataset.labels)))
    budget = round(config.image_memory_gib * 2**30)
    images = DeviceImages.from_tensors(setting.new.dataset.images[train_indices], device, budget_bytes=budget)
    labels = setting.new.dataset.labels[train_indices].to(device)  # [N]

    # Model: a copy of the pretrained one; every method of a seed starts from the same factors
    torch.manual_seed(run.seed)
    adapter_config = config.adapter(run.method, run.seed)
    model = ck.apply_complora(copy.deepcopy(setting.backbone.model), adapter_config, progress=False).train()
    if config.recompute:
        ck.set_recompute(model, "mlp")
    logit_scale = model.logit_scale.detach().exp()  # fixed, 100 for a trained CLIP
    dtype = precision_for(config.precision, device)
    model.to(dtype)  # the factors stay float32
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        ck.adapter_parameters(model),
        lr=torch.tensor(run.learning_rate, device=device) if on_gpu else run.learning_rate,
        betas=(0.9, 0.999),
        weight_decay=config.weight_decay,
        capturable=on_gpu,
        fused=True if on_gpu else None,
    )
    with torch.no_grad():
        class_features = model.encode_text(
            setting.new.tokens, normalize=True
        ).float()  # [C, D], final where text is frozen

    # Resume
    checkpoint = folder / CHECKPOINT
    progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "log": []}
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, model, optimizer)
    first_step, log = progress["step"], progress["log"]
    scaler = torch.amp.GradScaler(device.type) if dtype == torch.float16 else None
    if scaler is not None and progress.get("scaler"):
        scaler.load_state_dict(progress["scaler"])

    # Training
    def batch(step: int) -> tuple[Tensor, Tensor]:  # [B, 3, S, S], [B]
        indices = batch_indices(len(labels), config.batch_size, run.seed, step)
        pixels = training_pixels(images, indices, setting, config.augmentation, run.seed, step)
        return pixels.to(dtype), labels[indices.to(device)]

    def loss_of(model: Any, pixels: Tensor, labels: Tensor) -> Tensor:
        image_features = model.encode_image(pixels, normalize=True).float()  # [B, D]
        features = class_features
        if "text" in config.towers:
            features = model.encode_text(setting.new.tokens, normalize=True).float()  # [C, D]
        return F.cross_entropy(logit_scale * image_features @ features.T, labels)

    def learning_rate(step: Any) -> Any:
        return cosine(step, steps, run.learning_rate, config.final_learning_rate)

    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    train_step = ck.GraphedTrainStep(
        model,
        loss_of,
        optimizer,
        batch(first_step),
        schedule=learning_rate,
        scaler=scaler,
        graph={"auto": "auto", "on": True, "off": False}[config.graph],
    )
    train_step.counter.fill_(first_step)
    losses: list[Tensor] = []  # of the steps since the host last looked: on a GPU it does not wait for each
    good_step = first_step
    training_started = time.perf_counter()
    with StepProfile(folder if config.profile else None, steps - first_step) as profile:
        for step in range(first_step, steps):
            profile.before_step(step - first_step)
            with record_function("data"):
                pixels, targets = batch(step)
            losses.append(train_step(pixels, targets))
            profile.after_step(step - first_step)
            if step == first_step:
                ck.check_gradients(model)

            done = step + 1
            is_logged = done % config.log_every == 0 or done == steps
            is_kept = done % config.checkpoint_every == 0 and done < steps
            if not (is_logged or is_kept or device.type == "cpu"):
                continue
            values = torch.stack(losses).tolist()
            for i, value in enumerate(values):
                if not math.isfinite(value):
                    bad = done - len(values) + i
                    raise FloatingPointError(
                        f"{run.name}: the loss is {value} in step {bad} at learning rate "
                        f"{learning_rate(bad):.2g}; {describe_checkpoint(checkpoint, good_step)}"
                    )
            losses.clear()
            if is_logged:
                log.append({"step": done, "loss": values[-1], "learning_rate": learning_rate(step)})
            if is_kept:
                seconds = progress["seconds"] + time.perf_counter() - started
                scale = {} if scaler is None else scaler.state_dict()
                state = {"step": done, "seconds": seconds, "log": log, "scaler": scale}
                save_checkpoint(checkpoint, model, optimizer, state)
                good_step = done
            on_step(done, values[-1])
    training_seconds = time.perf_counter() - training_started

    # Measurement
    model.eval()
    result = {
        "run": run.name,
        **asdict(run),
        "steps": steps,
        "precision": str(dtype).removeprefix("torch."),
        "zero_shot_new": setting.new.zero_shot_accuracy(test_indices),
        "zero_shot_kept": setting.kept.zero_shot_accuracy(kept_indices),
        "new": setting.new.accuracy(model, test_indices, dtype),
        "kept": setting.kept.accuracy(model, kept_indices, dtype),
        "loss": log[-1]["loss"],
        **mean_over_layers(model),
        "seconds": round(progress["seconds"] + time.perf_counter() - started, 2),
        "images_per_second": round((steps - first_step) * min(config.batch_size, len(labels)) / training_seconds, 1),
        "peak_memory_mib": round(peak_memory(device) / 2**20),
        "versions": versions(),
    }
    write_atomically(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
    if config.save_adapters:
        ck.save_adapter(model, folder / "adapter")
    return result


def training_pixels(
    images: DeviceImages, indices: Tensor, setting: Setting, augmentation: str, seed: int, step: int
) -> Tensor:
    """The images of a step as the model takes them.

    Args:
        images: the training set.
        indices: int64 [B], on the host.
        setting: how the model takes images, and whether they may be mirrored.
        augmentation: "none", or "crop-flip" for crops that are a function of seed and step.
        seed: that of the run.
        step: the step's number.

    Returns:
        float32 [B, 3, S, S], on the device.
    """
    backbone = setting.backbone
    if augmentation == "none":
        return backbone.preprocess(torch.stack([images[i] for i in indices.tolist()]).to(backbone.device))
    boxes, flips = draw_boxes(images.sizes[indices], seed, step)
    flips &= setting.new.dataset.can_be_mirrored
    return backbone.normalize(resample(images, indices, boxes, flips, backbone.size))


def precision_for(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the frozen weights and of what is computed with them."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device since the run began; on the CPU the most that this process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def describe_checkpoint(path: Path, step: int) -> str:
    """Where a run that diverged was last well."""
    return (
        f"the last good checkpoint is {path}, of step {step}" if path.exists() else "there is no checkpoint before it"
    )


def mean_over_layers(model: torch.nn.Module) -> dict[str, float]:
    """Means over the adapted weights of what `subspace_report` tells about each."""
    report = ck.subspace_report(model)
    columns = ("k", "energy", "share", "relative_update")
    return {column: sum(getattr(row, column) for row in report) / len(report) for column in columns}


def versions() -> dict[str, str]:
    """The versions of what computes the results."""
    packages = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "torch": torch.__version__, **packages}


def cosine(step: Any, steps: int, first: float, last: float) -> Any:
    """The learning rate of `step`: half a cosine from `first` at step 0 to `last` at step `steps`.

    A float, or a tensor of one when `step` is one.
    """
    cos = torch.cos if isinstance(step, Tensor) else math.cos
    return last + (first - last) * (1 + cos(math.pi * step / steps)) / 2


def at_most(n: int | None, indices: Tensor) -> Tensor:
    """All indices, or `n` of them chosen at random, always the same ones."""
    if n is None or n >= len(indices):
        return indices
    chosen = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))[:n]
    return indices[chosen.sort().values]
