"""accelerate, Lightning and transformers' `Trainer`, called as their users call them, take the steps of a plain loop.

In float64 on one process of the CPU, with the models of every library.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from model_zoo import ALL, REPRESENTATIVES, adapted, make
from rows import Row, in_float32
from small_clip import assert_close
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import complora_kernels as ck

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),  # by Lightning
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),  # advice of Lightning's
]
STEPS = 3
# Of what three steps change in float64: the samples of a batch are summed in another order.
TOLERANCE = 1e-9


class Task(nn.Module):
    """An adapted model and its loss."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.model, self.features = adapted(row, *ALL), row.features

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.features(self.model, batch) - 1).square().mean()}


def sgd(model: nn.Module) -> torch.optim.SGD:
    """Not AdamW, which would hide a gradient of another size."""
    return torch.optim.SGD(ck.adapter_parameters(model), lr=1e-2, momentum=0.9)


def samples(row: Row) -> list[dict[str, Tensor]]:
    """The batch of a row as a data set."""
    count = len(next(iter(row.inputs.values())))
    return [{name: values[i] for name, values in row.inputs.items()} for i in range(count)]


def factors(model: nn.Module) -> Tensor:
    return torch.cat([factor.detach().flatten() for factor in ck.adapter_parameters(model)])


def by_a_plain_loop(task: Task, row: Row, precision: torch.dtype | None = None) -> Tensor:
    """The factors after three steps."""
    optimizer = sgd(task.train())
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            loss = task(**row.inputs)["loss"]
        loss.backward()
        optimizer.step()
    return factors(task)


def by_accelerate(task: Task, row: Row, _folder: Path) -> None:
    """With the gradients of single samples accumulated."""
    data: Any = samples(row)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(data))
    model, optimizer, loader = accelerator.prepare(task, sgd(task), DataLoader(data))
    model.train()
    for _ in range(STEPS):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()


class Lightning(lightning.LightningModule):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def training_step(self, batch: dict[str, Tensor], _index: int) -> Tensor:
        return self.task(**batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.task)


def by_lightning(task: Task, row: Row, folder: Path, *, epochs: int = STEPS, resume: bool = False) -> None:
    data: Any = samples(row)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    checkpoint = folder / "last.ckpt"
    loader = DataLoader(data, batch_size=len(data))
    trainer.fit(Lightning(task.train()), loader, ckpt_path=checkpoint if resume else None)
    trainer.save_checkpoint(checkpoint)


def by_transformers(task: Task, row: Row, folder: Path, *, epochs: int = STEPS, resume: bool = False) -> None:
    trained_by_transformers(task, samples(row), folder, epochs, resume)


def trained_by_transformers(model: Any, data: Any, folder: Path, epochs: int = STEPS, resume: bool = False) -> Tensor:
    """The factors after the training of a model whose call gives a loss."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=len(data),
        lr_scheduler_type="constant",
        max_grad_norm=0,
        remove_unused_columns=False,
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(sgd(model), None))
    trainer.train(resume_from_checkpoint=resume)
    return factors(model)


TRAINERS: dict[str, Callable[[Task, Row, Path], None]] = {
    "accelerate": by_accelerate,
    "Lightning": by_lightning,
    "transformers": by_transformers,
}


@pytest.fixture(autouse=True)
def forgotten():
    """What accelerate keeps of one training for the next."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("train", TRAINERS.values(), ids=TRAINERS)
@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_steps_are_those_of_a_plain_loop(name, train, tmp_path):
    row = make(name)
    plain, task = Task(row), Task(row)
    task.load_state_dict(plain.state_dict())
    before = factors(task)
    expected = by_a_plain_loop(plain, row)
    train(task, row, tmp_path)
    assert_close(factors(task) - before, expected - before, TOLERANCE)
    for path, weight in row.model.named_parameters():
        assert torch.equal(task.model.get_parameter(path), weight)


@pytest.mark.parametrize("train", [by_lightning, by_transformers])
def test_a_training_goes_on_from_its_checkpoint(train, tmp_path):
    row = make("timm ViT")
    plain, first, second = Task(row), Task(row), Task(row)
    before = factors(plain)
    first.load_state_dict(plain.state_dict())
    train(first, row, tmp_path, epochs=1)
    train(second, row, tmp_path, resume=True)
    assert_close(factors(second) - before, by_a_plain_loop(plain, row) - before, TOLERANCE)


def test_a_model_of_transformers_goes_on_from_what_its_trainer_saved(tmp_path):
    """Without a module around it; what is saved of it has the adapter too."""
    row = make("CLIPForImageClassification, sdpa")
    data = [sample | {"labels": torch.tensor(i)} for i, sample in enumerate(samples(row))]
    whole, first, second = (adapted(row, *ALL) for _ in range(3))
    first.load_state_dict(whole.state_dict())
    before = factors(whole)
    expected = trained_by_transformers(whole, data, tmp_path / "whole")
    trained_by_transformers(first, data, tmp_path / "parts", epochs=1)
    resumed = trained_by_transformers(second, data, tmp_path / "parts", resume=True)
    assert_close(resumed - before, expected - before, TOLERANCE)
    loaded = ck.load_adapter(make("CLIPForImageClassification, sdpa").model, tmp_path / "parts/checkpoint-3/complora")
    with torch.no_grad():
        # The factors in its files are folded and in float32.
        assert_close(row.features(loaded, row.inputs), row.features(whole.eval(), row.inputs), 1e-6)


@pytest.mark.parametrize("name", ["CLIPModel, sdpa", "timm ViT", "open_clip CLIP"])
def test_mixed_precision_of_accelerate_is_autocast(name):
    row = make(name)
    row = row._replace(model=row.model.float(), inputs=in_float32(row.inputs))
    plain, task = Task(row), Task(row)
    task.load_state_dict(plain.state_dict())
    before = factors(task)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer = accelerator.prepare(task.train(), sgd(task))
    for _ in range(STEPS):
        accelerator.backward(model(**row.inputs)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    # The same operations in the same order.
    assert_close(factors(task) - before, by_a_plain_loop(plain, row, torch.bfloat16) - before, 1e-6)
