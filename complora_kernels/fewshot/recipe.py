"""One run: draw the shots, adapt the model, train it, measure what it learned and what it forgot."""

from __future__ import annotations

import copy
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

import complora_kernels as ck
from complora_kernels.adapters.install import truncate_texts
from complora_kernels.adapters.manage import load_raw_adapter_state, raw_adapter_state
from complora_kernels.common.files import refuse_link
from complora_kernels.fewshot import config as options
from complora_kernels.fewshot.config import Run, TrainConfig
from complora_kernels.fewshot.crops import draw_boxes, resample
from complora_kernels.fewshot.datasets import Draw, draw, write_draw
from complora_kernels.fewshot.datasets.fingerprint import fingerprint
from complora_kernels.fewshot.decode import load_crops
from complora_kernels.fewshot.files import write_json
from complora_kernels.fewshot.images import DeviceImages
from complora_kernels.fewshot.logs import RunLog
from complora_kernels.fewshot.measure import Measurement
from complora_kernels.fewshot.profile import StepProfile
from complora_kernels.fewshot.resume import load_checkpoint, put_damaged_aside, random_state, save_checkpoint
from complora_kernels.fewshot.sampler import batch_indices
from complora_kernels.fewshot.setting import Setting
from complora_kernels.fewshot.team import ALONE, Team

CHECKPOINT = "checkpoint.safetensors"
DRAW = "draw.json"
ADAPTER = "adapter"
MEASURED = ("seconds", "images_per_second", "peak_memory_mib")  # of a result: what differs between equal runs

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

    A run that finds a checkpoint in its folder goes on from there, and ends with the same factors as if it had
    never been stopped; one that is damaged is renamed, and the run starts again. The checkpoint is left to the caller
    to remove, once the result is safe. The setting's own
    model stays as it is; torch's global random state is seeded.

    The processes of a team share every batch, the prompts and the images to be measured; without dropout they compute
    what one process would. The first of them writes the files. A run that is resumed by as many processes as before
    ends as if it had never been stopped; by another number of them, with other dropout masks.

    Args:
        config: the options shared by all runs.
        run: the method, the shots, the learning rate and the seed.
        setting: the pretrained model and its tasks.
        folder: where the draw, the options, the log, the checkpoint and the adapter go; created when needed.
        on_step: called with the number of steps done and the loss. It may raise to stop the run.
        team: the processes that train together, each of which calls this.

    Returns:
        The run's line in results.jsonl: accuracies are shares of 1.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
        RuntimeError: an adapter got no gradient in the first step; `graph` is "on" where a step cannot be captured.
        ValueError: more processes than images in a batch, or a checkpoint of other images.
        OSError: a file cannot be written.
        SharedError: in every process of a team, what went wrong in one.
    """
    started = time.perf_counter()
    dtype = precision_for(config.precision, setting.backbone.device)
    with team.together():
        drawn = draw(setting.new.dataset, run.shots, run.seed, config.draw)
        measurement = Measurement(config, setting, drawn, dtype, team)
    seen = fingerprint(setting.new.dataset, drawn)
    if team.leads:
        for part in (folder, folder / ADAPTER):
            refuse_link(part)
        folder.mkdir(parents=True, exist_ok=True)
        write_draw(folder / DRAW, setting.new.dataset, drawn)
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
        found = {"steps": 0, **measurement.anchor(run.method)}
    else:
        found = _train(config, run, setting, folder, on_step, team, drawn, seen, measurement)
    seconds = found.pop("seconds_before", 0.0) + time.perf_counter() - started
    return {**before, **found, "seconds": round(seconds, 2), "versions": versions()}


def _train(
    config: TrainConfig,
    run: Run,
    setting: Setting,
    folder: Path,
    on_step: Callable[[int, float], None],
    team: Team,
    drawn: Draw,
    seen: str,
    measurement: Measurement,
) -> dict[str, Any]:
    started = time.perf_counter()
    device = setting.backbone.device
    assert run.learning_rate is not None
    peak_rate, steps = run.learning_rate, config.steps_for(run.shots)

    labels = setting.new.dataset.labels[drawn.train].to(device)  # [N]
    batch_size = min(config.batch_size, len(labels))
    with team.together():
        if batch_size < team.size:
            raise ValueError(
                f"{team.size} processes share batches of {batch_size} images (--batch-size {config.batch_size}, "
                f"{len(labels)} training images), expected at least one for each"
            )
        # Data: what the model sees are the shots alone
        images = training_images(setting, drawn.train, config)
        # Model: a copy of the pretrained one; every method of a seed starts from the same factors
        torch.manual_seed(run.seed)
        model = adapted_model(config, run, setting, drawn).train()
    if team.size > 1:  # rounding differs between machines, and with it what is decomposed
        load_raw_adapter_state(model, team.agree({name: t.cpu() for name, t in raw_adapter_state(model).items()}))
        torch.manual_seed(hash((run.seed, team.rank)))  # masks of its own
    if config.recompute:
        ck.set_recompute(model, "mlp")
    logit_scale = model.logit_scale.detach().exp()  # fixed, 100 for a trained CLIP
    dtype = measurement.dtype
    model.to(dtype)  # the factors stay float32
    optimizer = make_optimizer(model, config, run, peak_rate)
    class_features = None  # [C, D], final where text is frozen
    if "text" not in config.towers:
        with torch.no_grad():
            class_features = setting.new.training_features(model, team)

    # Resume
    checkpoint = folder / CHECKPOINT
    progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "log": [], "images": seen}
    with team.together():
        if team.leads:
            put_damaged_aside(checkpoint, steps)
    found = team.collect(checkpoint.exists())
    with team.together():
        if any(found) and not all(found):
            raise ValueError(f"{checkpoint}: not every process sees it, expected a folder that all machines share")
        if all(found):
            progress = load_checkpoint(checkpoint, model, optimizer, team.rank)
        if progress.get("images", seen) != seen:
            raise ValueError(
                f"{checkpoint}: it has seen other images ({progress.get('images')}) than are drawn now ({seen}); "
                "expected the same data, or no checkpoint"
            )
    first_step = progress["step"]
    scaler = torch.amp.GradScaler(device.type) if dtype == torch.float16 else None
    if scaler is not None and progress.get("scaler"):
        scaler.load_state_dict(progress["scaler"])

    # Training
    def batch(step: int) -> tuple[Tensor, Tensor]:  # [B, 3, S, S], [B], this process's share
        indices = batch_indices(len(labels), config.batch_size, run.seed, step)
        pixels = training_pixels(images, indices, setting, config.augmentation, run.seed, step, team)
        return pixels.to(dtype), labels[team.share(indices).to(device)]

    def loss_of(model: Any, pixels: Tensor, labels: Tensor) -> Tensor:
        image_features = model.encode_image(pixels, normalize=True).float()  # [B, D]
        features = setting.new.training_features(model, team) if class_features is None else class_features
        loss = F.cross_entropy(logit_scale * image_features @ features.T, labels)
        # Shares of a batch may differ by an image: the mean over the processes is then that of the batch.
        return loss if team.size == 1 else loss * (len(labels) * team.size / batch_size)

    def learning_rate(step: Any) -> Any:
        return cosine(step, steps, peak_rate, config.final_learning_rate)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    train_step = ck.GraphedTrainStep(
        model,
        loss_of,
        optimizer,
        batch(first_step),
        schedule=learning_rate,
        scaler=scaler,
        graph={"auto": "auto", "on": True, "off": False}[config.graph],
        process_group=team.group,
    )
    train_step.counter.fill_(first_step)
    losses: list[Tensor] = []  # of the steps since the host last looked: on a GPU it does not wait for each
    good_step = first_step
    training_started = time.perf_counter()
    with (
        RunLog(config, run.name, folder if team.leads else None, progress["log"]) as log,
        StepProfile(folder if config.profile and team.leads else None, steps - first_step) as profile,
    ):
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
            values = team.mean(torch.stack(losses)).tolist()
            for i, value in enumerate(values):
                if not math.isfinite(value):
                    bad = done - len(values) + i
                    raise FloatingPointError(
                        f"the loss is {value} in step {bad} at learning rate "
                        f"{learning_rate(bad):.2g}; {describe_checkpoint(checkpoint, good_step)}"
                    )
            losses.clear()
            if is_logged:
                log.add(done, values[-1], learning_rate(step))
            if is_kept:
                random_states = team.collect(random_state(device))
                if team.leads:
                    seconds = progress["seconds"] + time.perf_counter() - started
                    scale = {} if scaler is None else scaler.state_dict()
                    state = {"step": done, "seconds": seconds, "log": log.lines, "scaler": scale, "images": seen}
                    save_checkpoint(checkpoint, model, optimizer, state, random_states)
                good_step = done
            on_step(done, values[-1])
        training_seconds = time.perf_counter() - training_started

        # Measurement
        model.eval()
        result = {
            "steps": steps,
            **measurement.trained(model),
            "loss": log.lines[-1]["loss"],
            **mean_over_layers(model),
            "seconds_before": progress["seconds"],
            "images_per_second": round((steps - first_step) * batch_size / training_seconds, 1),
            "peak_memory_mib": round(peak_memory(device) / 2**20),
        }
        log.finish(result)
    if config.save_adapters and team.leads:
        ck.save_adapter(model, folder / ADAPTER)
    return result


def adapted_model(config: TrainConfig, run: Run, setting: Setting, drawn: Draw) -> Any:
    """A copy of the pretrained model, adapted as the run asks for, in float32."""
    adapter = config.adapter(run.method, run.seed)
    model = copy.deepcopy(setting.backbone.model)
    if not adapter.source.needs_data:
        return ck.apply_complora(model, adapter, progress=False)

    # What follows the end of a text is no part of what the weights see: nothing is read there.
    truncate_texts(model)

    def calibrate(model: Any) -> None:  # on the shots, without their labels, and the prompts
        for pixels in setting.new.pixels(drawn.train):
            model.encode_image(pixels)
        setting.new.training_features(model)

    return ck.apply_complora(model, adapter, calibrate=calibrate, progress=False)


def make_optimizer(model: Any, config: TrainConfig, run: Run, learning_rate: float) -> torch.optim.AdamW:
    """AdamW over the factors; on a GPU such that a graph can hold its step."""
    factors = list(ck.adapter_parameters(model))
    on_gpu = factors[0].device.type == "cuda"
    return torch.optim.AdamW(
        factors,
        lr=torch.tensor(learning_rate, device=factors[0].device) if on_gpu else learning_rate,
        betas=(0.9, 0.999),
        weight_decay=config.strong_weight_decay if run.method == "lora-wd" else config.weight_decay,
        capturable=on_gpu,
        fused=True if on_gpu else None,
    )


def training_images(setting: Setting, indices: Tensor, config: TrainConfig) -> DeviceImages:
    """The images [N] of the shots, decoded once a draw: whole, or as they are measured where nothing augments them."""
    dataset, device = setting.new.dataset, setting.backbone.device
    budget = round(config.image_memory_gib * 2**30)
    if isinstance(dataset.images, Tensor):
        return DeviceImages.from_tensors(dataset.images[indices], device, budget_bytes=budget)
    key = (dataset.asked_as, dataset.root, *indices.tolist(), config.augmentation, budget)
    if key not in setting.decoded:
        setting.decoded.clear()
        setting.decoded[key] = _decoded(setting, [dataset.images[i] for i in indices.tolist()], config, budget)
    return setting.decoded[key]


def _decoded(setting: Setting, paths: Sequence[Path], config: TrainConfig, budget: int) -> DeviceImages:
    device = setting.backbone.device
    if config.augmentation == "none":
        crops = load_crops(paths, setting.backbone.size, **setting.backbone.resize, progress=False)
        return DeviceImages.from_tensors(crops, device, budget_bytes=budget)
    # Crops of a quarter of an image's length need no enlarging, and a photo of 100 megapixels does not stay one.
    shorter_side = 4 * max(setting.backbone.size)
    return DeviceImages.from_files(paths, device, budget_bytes=budget, shorter_side=shorter_side, progress=False)


def training_pixels(
    images: DeviceImages,
    indices: Tensor,
    setting: Setting,
    augmentation: str,
    seed: int,
    step: int,
    team: Team = ALONE,
) -> Tensor:
    """The images of a step as the model takes them.

    Args:
        images: the training set.
        indices: int64 [B], on the host.
        setting: how the model takes images, and whether they may be mirrored.
        augmentation: "none", or "crop-flip" for crops that are a function of seed and step.
        seed: that of the run.
        step: the step's number.
        team: of whose share of the images the pixels are.

    Returns:
        float32 [B, 3, S, S], on the device.
    """
    backbone = setting.backbone
    if augmentation == "none":
        indices = team.share(indices)
        return backbone.preprocess(torch.stack([images[i] for i in indices.tolist()]).to(backbone.device))
    boxes, flips = draw_boxes(images.sizes[indices], seed, step)
    flips &= setting.new.dataset.can_be_mirrored
    indices, boxes, flips = map(team.share, (indices, boxes, flips))
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
