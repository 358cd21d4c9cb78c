"""Trains the model of a run: prepares it, continues from its checkpoint, and takes the optimizer steps."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

import complora_kernels as ck
from complora_kernels.adapters.install import truncate_texts
from complora_kernels.adapters.manage import load_raw_adapter_state, raw_adapter_state
from complora_kernels.fewshot.batches import batch_indices, training_images, training_pixels
from complora_kernels.fewshot.config import Run, TrainConfig
from complora_kernels.fewshot.datasets import FewShotSplit
from complora_kernels.fewshot.images import DeviceImages
from complora_kernels.fewshot.logs import RunLog
from complora_kernels.fewshot.preservation import Preservation, preservation_of
from complora_kernels.fewshot.profile import StepProfile
from complora_kernels.fewshot.resume import load_checkpoint, put_damaged_aside, random_state, save_checkpoint
from complora_kernels.fewshot.setting import Setting
from complora_kernels.fewshot.team import Team

CHECKPOINT = "checkpoint.safetensors"
CHECK_EVERY = 10
"""Steps between two looks at the divergence that may stop a run."""


@dataclass(frozen=True)
class RunContext:
    """A run with everything that it reads."""

    config: TrainConfig  # the options shared by all runs
    run: Run
    setting: Setting  # the pretrained model and its tasks
    split: FewShotSplit  # the images of the new task
    fingerprint: str  # fingerprint of the split's images
    folder: Path  # the run's folder
    dtype: torch.dtype  # dtype of the frozen weights
    team: Team  # the processes that train together

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.setting.backbone.device

    @property
    def steps(self) -> int:
        """The number of optimizer steps of the whole run."""
        return self.config.steps_for(self.run.shots)


@dataclass(frozen=True)
class Training:
    """A model in training, as `prepare` makes it and `take_steps` trains it."""

    context: RunContext
    started: float  # `time.perf_counter` at the beginning
    images: DeviceImages  # the N training images
    labels: Tensor  # int64 [N], on the device
    model: Any  # the adapted model
    logit_scale: Tensor  # float32 [], constant: 100 for a trained CLIP
    class_features: Tensor | None  # float32 [C, D], where the text tower is frozen; None: each step computes them
    preservation: Preservation | None  # keeps the frozen model's similarities to general names
    optimizer: torch.optim.AdamW  # updates the factors
    scaler: torch.amp.GradScaler | None  # scales the loss of float16
    progress: dict[str, Any]  # from the checkpoint: the steps done, the seconds they took and their log

    @property
    def batch_size(self) -> int:
        """Images per step, over all processes."""
        return min(self.context.config.batch_size, len(self.labels))

    @property
    def first_step(self) -> int:
        """The number of steps that were done before the checkpoint."""
        return self.progress["step"]

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """This process's share of a step's images, [B, 3, S, S], their labels, [B], and what the preservation reads."""
        context, config, seed = self.context, self.context.config, self.context.run.seed
        indices = batch_indices(len(self.labels), config.batch_size, seed, step)
        pixels = training_pixels(self.images, indices, context.setting, config.augmentation, seed, step, context.team)
        own = context.team.share(indices).to(context.device)
        preserved = () if self.preservation is None else self.preservation.batch(own, seed, step)
        return pixels.to(context.dtype), self.labels[own], *preserved

    def loss(self, model: Any, pixels: Tensor, labels: Tensor, *preserved: Tensor) -> Tensor:
        """The cross-entropy [] of this process's share of a batch, with the preservation loss where there is one."""
        team, features = self.context.team, self.class_features
        image_features = model.encode_image(pixels, normalize=True).float()  # [B, D]
        if features is None:
            features = self.context.setting.new.training_features(model, team)  # [C, D]
        loss = F.cross_entropy(self.logit_scale * image_features @ features.T, labels)
        if self.preservation is not None and self.preservation.weight:
            loss = loss + self.preservation(pixels, image_features, *preserved)
        # Shares of a batch may differ by an image: with this factor the mean over processes is that over the batch.
        return loss if team.size == 1 else loss * (len(labels) * team.size / self.batch_size)

    def has_drifted(self, done: int) -> bool:
        """Whether the run is to be stopped after `done` steps, since it says other things than the frozen model."""
        if self.preservation is None or self.preservation.limit is None or done % CHECK_EVERY:
            return False
        return float(self.context.team.mean(self.preservation.divergence())) > self.preservation.limit

    def learning_rate(self, step: Any) -> Any:
        """The learning rate of a step, a float or a tensor as `step` is."""
        context = self.context
        assert context.run.learning_rate is not None
        return cosine(step, context.steps, context.run.learning_rate, context.config.final_learning_rate)

    def train_step(self) -> ck.GraphedTrainStep:
        """One optimizer step as a function of a batch; on a GPU a CUDA graph."""
        train_step = ck.GraphedTrainStep(
            self.model,
            self.loss,
            self.optimizer,
            self.batch(self.first_step),
            schedule=self.learning_rate,
            scaler=self.scaler,
            graph={"auto": "auto", "on": True, "off": False}[self.context.config.graph],
            process_group=self.context.team.group,
        )
        train_step.counter.fill_(self.first_step)
        return train_step

    def save(self, done: int, log: RunLog) -> None:
        """Write the checkpoint after `done` steps."""
        context = self.context
        random_states = context.team.collect(random_state(context.device))
        if context.team.leads:
            progress = {
                "step": done,
                "seconds": self.progress["seconds"] + time.perf_counter() - self.started,
                "log": log.lines,
                "scaler": {} if self.scaler is None else self.scaler.state_dict(),
                "images": context.fingerprint,
                "vocabulary": None if self.preservation is None else self.preservation.fingerprint,
            }
            save_checkpoint(context.folder / CHECKPOINT, self.model, self.optimizer, progress, random_states)


def prepare(context: RunContext) -> Training:
    """Load the training images, adapt a copy of the model, and restore the checkpoint where there is one."""
    started = time.perf_counter()
    config, run, setting, team = context.config, context.run, context.setting, context.team
    labels = setting.new.dataset.labels[context.split.train].to(context.device)  # [N]
    with team.together():
        if min(config.batch_size, len(labels)) < team.size:
            raise ValueError(
                f"{team.size} processes share batches of {min(config.batch_size, len(labels))} images "
                f"(--batch-size {config.batch_size}, {len(labels)} training images), expected at least one for each"
            )
        images = training_images(setting, context.split.train, config)
        torch.manual_seed(run.seed)  # every method of a seed starts from the same factors
        model = adapted_model(context).train()
    if team.size > 1:  # rounding differs between machines, and with it the decompositions
        load_raw_adapter_state(model, team.agree({name: t.cpu() for name, t in raw_adapter_state(model).items()}))
        torch.manual_seed(hash((run.seed, team.rank)))  # each process has its own dropout masks
    if config.recompute:
        ck.set_recompute(model, "mlp")
    logit_scale = model.logit_scale.detach().exp()
    model.to(context.dtype)  # the factors stay float32
    optimizer = make_optimizer(model, context)
    class_features = None
    if "text" not in adapter_of(context).towers:
        with torch.no_grad():
            class_features = setting.new.training_features(model, team)
    with team.together():
        preservation = preservation_of(context, model, images, logit_scale)
    progress = _restore(context, model, optimizer, preservation)
    scaler = torch.amp.GradScaler(context.device.type) if context.dtype == torch.float16 else None
    if scaler is not None and progress.get("scaler"):
        scaler.load_state_dict(progress["scaler"])
    parts = (model, logit_scale, class_features, preservation, optimizer, scaler)
    return Training(context, started, images, labels, *parts, progress)


def _restore(
    context: RunContext, model: Any, optimizer: torch.optim.Optimizer, preservation: Preservation | None
) -> dict[str, Any]:
    """Restore model, optimizer and random state from the checkpoint, and return the progress of the run so far."""
    checkpoint, team = context.folder / CHECKPOINT, context.team
    progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "log": []}
    with team.together():
        if team.leads:
            put_damaged_aside(checkpoint, context.steps)
    found = team.collect(checkpoint.exists())
    with team.together():
        if any(found) and not all(found):
            raise ValueError(f"{checkpoint}: not every process sees it, expected a folder that all machines share")
        if all(found):
            progress = load_checkpoint(checkpoint, model, optimizer, team.rank)
        seen = progress.get("images", context.fingerprint)
        if seen != context.fingerprint:
            raise ValueError(
                f"{checkpoint}: its run has seen other images ({seen}) than it would see now ({context.fingerprint}); "
                "expected the same data, or no checkpoint"
            )
        names = None if preservation is None else preservation.fingerprint
        if progress.get("vocabulary", names) != names:
            raise ValueError(
                f"{checkpoint}: its run has another --vocabulary than now ({progress['vocabulary']}, now {names}); "
                "expected the same names, or no checkpoint"
            )
    return progress


def take_steps(
    training: Training,
    train_step: ck.GraphedTrainStep,
    log: RunLog,
    profile: StepProfile,
    on_step: Callable[[int, float], None],
) -> int:
    """Take the optimizer steps that are left, with a log line and a checkpoint every few of them.

    Returns:
        The number of steps that the run has taken: fewer than it has where the divergence passed its limit.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
        RuntimeError: an adapter got no gradient in the first step.
    """
    context, config = training.context, training.context.config
    losses: list[Tensor] = []  # the losses since the host last read them: on a GPU it does not wait for each step
    first_step = last_saved = training.first_step
    for step in range(first_step, context.steps):
        profile.before_step(step - first_step)
        with record_function("data"):
            batch = training.batch(step)
        losses.append(train_step(*batch))
        profile.after_step(step - first_step)
        if step == first_step:
            ck.check_gradients(training.model)

        done = step + 1
        is_over = done == context.steps or training.has_drifted(done)
        is_logged = done % config.log_every == 0 or is_over
        is_saved = done % config.checkpoint_every == 0 and not is_over
        if not (is_logged or is_saved or context.device.type == "cpu"):
            continue
        values = context.team.mean(torch.stack(losses)).tolist()
        losses.clear()
        for i, value in enumerate(values, done - len(values)):
            if not math.isfinite(value):
                path, rate = context.folder / CHECKPOINT, training.learning_rate(i)
                last = f"the last good checkpoint is {path}, of step {last_saved}"
                raise FloatingPointError(
                    f"the loss is {value} in step {i} at learning rate {rate:.2g}; "
                    f"{last if path.exists() else 'there is no checkpoint before it'}"
                )
        if is_logged:
            log.add(done, values[-1], training.learning_rate(step))
        if is_saved:
            training.save(done, log)
            last_saved = done
        on_step(done, values[-1])
        if is_over:
            return done
    return context.steps


def adapted_model(context: RunContext) -> Any:
    """A copy of the pretrained model in float32, with the adapters of the run's method."""
    setting, method, adapter = context.setting, context.run.method, adapter_of(context)
    model = copy.deepcopy(setting.backbone.model)
    if method == "prilora":
        adapter = ck.rising_ranks(model, adapter, max(1, adapter.r // 2), adapter.r + adapter.r // 2)
    if not adapter.protects_activations and method != "eva":
        return ck.apply_complora(model, adapter, progress=False)

    # Nothing is read behind the end of a text: the activations there are not to be protected.
    truncate_texts(model)

    def calibrate(model: Any) -> None:  # runs the model on the shots, without their labels, and on the prompts
        for pixels in setting.new.pixels(context.split.train):
            model.encode_image(pixels)
        setting.new.training_features(model)

    if method == "eva":
        return ck.apply_eva(model, adapter, calibrate, progress=False)
    return ck.apply_complora(model, adapter, calibrate=calibrate, progress=False)


def adapter_of(context: RunContext) -> ck.CompLoRAConfig:
    """The adapter that the method of a run asks for."""
    return context.config.adapter(context.run.method, context.run.seed)


def make_optimizer(model: Any, context: RunContext) -> torch.optim.AdamW:
    """AdamW over the factors; on a GPU in the form whose step a CUDA graph can hold."""
    config, run = context.config, context.run
    assert run.learning_rate is not None
    factors = list(ck.adapter_parameters(model))
    on_gpu = factors[0].device.type == "cuda"
    return torch.optim.AdamW(
        factors,
        lr=torch.tensor(run.learning_rate, device=factors[0].device) if on_gpu else run.learning_rate,
        betas=(0.9, 0.999),
        weight_decay=config.strong_weight_decay if run.method == "lora-wd" else config.weight_decay,
        capturable=on_gpu,
        fused=True if on_gpu else None,
    )


def cosine(step: Any, steps: int, first: float, last: float) -> Any:
    """The learning rate of `step`: half a cosine from `first` at step 0 to `last` at step `steps`.

    It is a float, or a tensor where `step` is a tensor.
    """
    cos = torch.cos if isinstance(step, Tensor) else math.cos
    return last + (first - last) * (1 + cos(math.pi * step / steps)) / 2
