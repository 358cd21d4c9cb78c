"""Tasks on files: what one of two processes fails to do, what is kept decoded, what a step compares images with."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fewshot_standin as standin
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from complora_kernels.fewshot import evaluate
from complora_kernels.fewshot.backbone import Backbone
from complora_kernels.fewshot.datasets import FewShotSplit
from complora_kernels.fewshot.evaluate import MemoryBudget, Task
from complora_kernels.fewshot.measure import Measurement
from complora_kernels.fewshot.setting import Setting
from complora_kernels.fewshot.team import SharedError, Team

SPLIT = FewShotSplit(train=torch.arange(6), val=torch.arange(6, 12), test=torch.arange(12, 30))


def save(image: Tensor, path: Path) -> Path:
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return path


def setting_of_files(folder: Path) -> Setting:
    """The stand-in's, whose bright images are files."""
    setting = standin.setting()
    images: Any = setting.new.dataset.images
    paths = tuple(save(image, folder / f"{i}.png") for i, image in enumerate(images))
    dataset = dataclasses.replace(setting.new.dataset, images=paths)
    return dataclasses.replace(setting, new=Task(dataset, setting.backbone, ("a {}",), batch_size=2))


# ---- in a team


class Meeting:
    """Lets two threads exchange values, in the same order of kinds; a thread that waits in vain ends the test."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.said: list[tuple[str, Any]] = [("", None)] * 2

    def exchange(self, rank: int, kind: str, value: Any) -> list[Any]:
        self.said[rank] = (kind, value)
        self.barrier.wait()
        kinds, values = zip(*self.said, strict=True)
        self.barrier.wait()
        assert kinds[0] == kinds[1]
        return list(values)


@dataclass(frozen=True)
class Pair(Team):
    """One of two threads that are a team."""

    size: int = 2
    meeting: Meeting = field(default_factory=Meeting)

    def collect(self, value: Any) -> list[Any]:
        return self.meeting.exchange(self.rank, "collect", value)

    def sum(self, values: Tensor) -> Tensor:
        first, second = self.meeting.exchange(self.rank, "sum", values)
        return first + second

    def gather(self, rows: Tensor, total: int) -> Tensor:
        return torch.cat(self.meeting.exchange(self.rank, "gather", rows))[:total]


def in_two(work: Callable[[Team, Setting], Any], settings: Sequence[Setting]) -> list[Any]:
    """The results or errors of `work` in each of two threads."""
    meeting = Meeting()
    found: list[Any] = [None, None]

    def run(rank: int) -> None:
        try:
            found[rank] = work(Pair(rank, meeting=meeting), settings[rank])
        except SharedError as error:
            found[rank] = error
        except BaseException as error:
            found[rank] = error
            meeting.barrier.abort()  # the other one waits in vain

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def measurement(team: Team, setting: Setting, **options: Any) -> Measurement:
    return Measurement(standin.config(Path(), **options), setting, SPLIT, torch.float32, team)


def zero_shot_of_some(team: Team, setting: Setting) -> Any:
    """Zero-shot accuracy where the first process knows its answers, and the second one does not."""
    if team.leads:
        setting.new.zero_shot_accuracy(SPLIT.test[::2])
    return setting.new.zero_shot_accuracy(SPLIT.test, team=team)


MEASURED: dict[str, Callable[[Team, Setting], Any]] = {
    "accuracy": lambda team, setting: setting.new.accuracy(setting.backbone.model, SPLIT.test, team=team),
    "zero-shot": lambda team, setting: setting.new.zero_shot_accuracy(SPLIT.test, team=team),
    "some known": zero_shot_of_some,
    "trained": lambda team, setting: measurement(team, setting, validation=True).trained(setting.backbone.model),
    "tip-adapter": lambda team, setting: measurement(team, setting).anchor("tip-adapter"),
    "linear-probe": lambda team, setting: measurement(team, setting, validation=True).anchor("linear-probe"),
}


def and_then(work: Callable[[Team, Setting], Any]) -> Callable[[Team, Setting], Any]:
    """`work`, whatever comes of it, and what is measured after it."""

    def both(team: Team, setting: Setting) -> Any:
        try:
            found = work(team, setting)
        except SharedError as error:
            found = error
        return found, setting.kept["dark"].accuracy(setting.backbone.model, torch.arange(30), team=team)

    return both


@pytest.mark.parametrize("name", MEASURED)
def test_two_processes_measure_the_same_as_one(tmp_path, name):
    settings = [setting_of_files(tmp_path) for _ in range(3)]
    alone = and_then(MEASURED[name])(Team(), settings[2])
    assert in_two(and_then(MEASURED[name]), settings) == [alone, alone]


def damage(image: int) -> Callable[[Setting], None]:
    def cut(setting: Setting) -> None:
        path: Any = setting.new.dataset.images[image]
        path.write_bytes(path.read_bytes()[:60])

    return cut


def no_memory(encoder: str) -> Callable[[Setting], None]:
    def fail(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    return lambda setting: setattr(setting.backbone.model, encoder, fail)


FAULTS = {  # the images are in the share of the second process; all training images are
    "test image": (damage(13), "13.png cannot be decoded"),
    "validation image": (damage(7), "7.png cannot be decoded"),
    "training image": (damage(3), "3.png cannot be decoded"),
    "encode_image": (no_memory("encode_image"), "no memory"),
    "encode_text": (no_memory("encode_text"), "no memory"),
}


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *((name, fault) for name in MEASURED for fault in ("test image", "encode_image", "encode_text")),
        *((name, "validation image") for name in ("trained", "linear-probe")),
        *((name, "training image") for name in ("tip-adapter", "linear-probe")),
    ],
)
def test_an_error_of_one_process_is_raised_in_both_and_both_continue(tmp_path, name, fault):
    break_, words = FAULTS[fault]
    settings = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        settings.append(setting_of_files(tmp_path / str(rank)))
    expected = standin.setting().kept["dark"].accuracy(settings[0].backbone.model, torch.arange(30))
    whole = {encoder: getattr(settings[1].backbone.model, encoder) for encoder in ("encode_image", "encode_text")}
    break_(settings[1])

    def work(team: Team, setting: Setting) -> Any:
        try:
            MEASURED[name](team, setting)
        finally:
            for encoder in whole if team.rank else ():
                setattr(setting.backbone.model, encoder, whole[encoder])

    for error, then in in_two(and_then(work), settings):
        assert isinstance(error, SharedError)
        assert words in str(error)
        assert then == expected


# ---- decoded images


class Mean:
    """A model of any image size, whose features of an image are the means of its channels."""

    def encode_image(self, x: Tensor, normalize: bool) -> Tensor:  # [N, 3, S, S] to [N, 3]
        return x.mean((2, 3))

    def encode_text(self, tokens: Tensor, normalize: bool) -> Tensor:  # one class a channel
        return torch.eye(3)[: len(tokens)]


def task_of_photos(paths: Sequence[Path], labels: Tensor, budget: MemoryBudget | None) -> Task:
    backbone = Backbone(Mean(), standin.tokenize, lambda x: x, torch.device("cpu"), (224, 224), lambda x: x)
    return Task(
        dataclasses.replace(standin.dataset("photos", torch.empty(0), labels), images=tuple(paths)),
        backbone,
        ("a {}",),
        2,
        budget,
    )


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    """Red and green ones in turn, of three classes in turn: four of ten are named right."""
    images = torch.randint(0, 128, (10, 3, 30, 40), dtype=torch.uint8)
    images[torch.arange(10), torch.arange(10) % 2] += 100
    return [save(image, tmp_path / f"{i}.png") for i, image in enumerate(images)]


CROP = 3 * 224 * 224  # bytes


def test_images_that_are_not_measured_take_no_memory(photos):
    """ImageNet has 1.3 million training images, which would be 180 GiB."""
    n = 1_300_000
    budget = MemoryBudget(10 * CROP)
    task = task_of_photos([photos[0]] * (n - 9) + photos[1:], torch.arange(n) % 3, budget)
    few = torch.arange(n - 5, n)
    accuracy = task.accuracy(task.backbone.model, few)
    assert accuracy == task_of_photos(photos[5:], task.dataset.labels[few], None).accuracy(Mean(), torch.arange(5))
    assert budget.free == 5 * CROP


def test_two_tasks_share_a_budget_and_return_it(photos, monkeypatch):
    decoded: list[Path] = []
    load = evaluate.load_crops
    monkeypatch.setattr(
        evaluate, "load_crops", lambda paths, *rest, **options: decoded.extend(paths) or load(paths, *rest, **options)
    )
    budget, labels = MemoryBudget(8 * CROP), torch.arange(10) % 3
    first, second = (task_of_photos(photos, labels, budget) for _ in range(2))

    def asked(task: Task, indices: Tensor) -> list[Path]:
        decoded.clear()
        task.answers(task.backbone.model, indices)
        return list(decoded)

    six, four = torch.arange(6), torch.arange(4)
    assert asked(first, six) == photos[:6]
    assert asked(first, six) == []
    assert budget.free == 2 * CROP
    assert asked(second, four) == photos[:4]
    assert budget.free == 0
    assert asked(second, four) == photos[2:4]  # the rest finds no room
    first.forget()
    assert budget.free == 6 * CROP
    assert asked(second, four) == photos[2:4]
    assert asked(second, four) == []
    assert asked(first, six) == photos[:6]
    first.forget()
    second.forget()
    assert budget.free == 8 * CROP
    second.forget()
    assert asked(second, torch.tensor([4, 4])) == [photos[4]]
    assert budget.free == 7 * CROP


@pytest.mark.parametrize("crops", [0, 1, 3, 10, None])
def test_the_budget_changes_no_answer(photos, crops):
    labels = torch.arange(10) % 3
    task = task_of_photos(photos, labels, MemoryBudget(None if crops is None else crops * CROP))
    for indices in (torch.arange(10), torch.arange(10), torch.tensor([3, 9, 1, 4, 0])):
        correct = task.agrees(task.answers(task.backbone.model, indices), indices)
        assert correct.tolist() == [i % 2 == i % 3 for i in indices.tolist()]


# ---- prompts


def encoded(setting: Setting, template: str) -> Tensor:  # [C, D]
    texts = [template.replace("{}", name) for name in standin.CLASSES]
    return F.normalize(setting.backbone.model.encode_text(standin.tokenize(texts)), dim=-1)


def test_steps_use_one_template_and_measurements_the_mean_of_all():
    setting = standin.setting()
    templates = ("a {}", "the {}", "{} x")
    task = Task(setting.new.dataset, setting.backbone, templates, training_template="my {}")
    rows = []
    model, encode = setting.backbone.model, setting.backbone.model.encode_text
    model.encode_text = lambda tokens, normalize: rows.append(len(tokens)) or encode(tokens, normalize)
    features = task.training_features(model)
    assert rows == [3]
    model.encode_text = encode
    # Up to the rounding of products of other shapes
    torch.testing.assert_close(features, encoded(setting, "my {}"), rtol=0, atol=1e-6)
    mean = F.normalize(torch.stack([encoded(setting, template) for template in templates]).mean(0), dim=-1)
    torch.testing.assert_close(task.class_features(model), mean, rtol=0, atol=1e-6)
    assert (features - mean).abs().max() > 1e-2
    first = Task(setting.new.dataset, setting.backbone, templates)
    assert torch.equal(first.training_features(model), encoded(setting, "a {}"))


@pytest.mark.parametrize("templates", [("a {}",), ("a {}", "the {}")])
def test_features_of_a_step_have_the_gradients_of_their_template(templates):
    setting = standin.setting()
    model = setting.backbone.model
    weight, direction = model.token_embedding.weight, torch.randn(3, 16)
    task = Task(setting.new.dataset, setting.backbone, templates)
    (task.training_features(model) * direction).sum().backward()
    assert weight.grad is not None
    found, weight.grad = weight.grad, None
    (encoded(setting, "a {}") * direction).sum().backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-5, atol=1e-6)
    assert found.abs().max() > 1e-3


def test_with_one_template_steps_and_measurements_use_the_same_features():
    setting = standin.setting()
    model = setting.backbone.model
    assert torch.equal(setting.new.training_features(model), setting.new.class_features(model))


def test_two_processes_share_the_prompts_of_a_step(tmp_path):
    settings = [standin.setting() for _ in range(3)]
    alone = settings[2].new.training_features(settings[2].backbone.model)
    for features in in_two(lambda team, s: s.new.training_features(s.backbone.model, team), settings):
        torch.testing.assert_close(features, alone, rtol=0, atol=1e-6)
