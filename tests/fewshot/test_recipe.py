import copy
import dataclasses
import json
import math
import re
from typing import Any

import fewshot_standin as standin
import pytest
import torch
from miniature_datasets import make_miniature
from safetensors.torch import load_file
from torch.nn import functional as F

from complora_kernels.fewshot import images
from complora_kernels.fewshot.batches import batch_indices, training_pixels
from complora_kernels.fewshot.config import Run
from complora_kernels.fewshot.datasets import choose_split
from complora_kernels.fewshot.evaluate import Task
from complora_kernels.fewshot.files import read_json_lines
from complora_kernels.fewshot.images import DeviceImages
from complora_kernels.fewshot.measure import at_most
from complora_kernels.fewshot.methods import Method
from complora_kernels.fewshot.predictions import PREDICTIONS, read_predictions
from complora_kernels.fewshot.profile import PROFILE, TRACE
from complora_kernels.fewshot.recipe import train
from complora_kernels.fewshot.setting import Settings
from complora_kernels.fewshot.training import CHECKPOINT, cosine

RUN = Run("both", 2, 1e-2, 0)


class Killed(Exception):
    pass


def test_measured_accuracy_matches_a_plain_recomputation():
    setting = standin.setting()
    model, data = setting.backbone.model, setting.new.dataset
    images: Any = data.images
    texts = torch.stack([model.encode_text(standin.tokenize([f"a {name}"]))[0] for name in data.class_names])
    expected = []
    for image, label in zip(images, data.labels, strict=True):
        feature = model.encode_image(image[None].float() / 255 - 0.5)[0]
        cosines = torch.nn.functional.cosine_similarity(feature[None], texts)
        expected.append(bool(cosines.argmax() == label))
    setting.new.batch_size, every = 7, torch.arange(30)
    assert setting.new.agrees(setting.new.answers(model, every), every).tolist() == expected
    some = torch.tensor([3, 4, 11, 12, 29])
    share = sum(expected[i] for i in some) / 5
    assert setting.new.accuracy(model, some) == pytest.approx(share)
    assert setting.new.zero_shot_accuracy(some) == pytest.approx(share)
    assert setting.new.zero_shot_accuracy(torch.arange(30)) == pytest.approx(sum(expected) / 30)


def test_zero_shot_answers_are_computed_once(monkeypatch):
    setting = standin.setting()
    asked = []
    encode = setting.backbone.model.encode_image
    monkeypatch.setattr(
        setting.backbone.model, "encode_image", lambda x, normalize: asked.append(len(x)) or encode(x, normalize)
    )
    for _ in range(2):
        setting.new.zero_shot_accuracy(torch.arange(10))
    setting.new.zero_shot_accuracy(torch.arange(14))
    assert asked == [10, 4]


@pytest.mark.parametrize("method", ["lora", "output", "input", "both", "random", "random-both"])
def test_a_run_learns_and_leaves_the_pretrained_model_unchanged(tmp_path, method):
    setting = standin.setting()
    before = copy.deepcopy(setting.backbone.model.state_dict())
    config = standin.config(tmp_path, steps=40, log_every=1)
    result = train(config, Run(method, 2, 3e-2, 0), setting, tmp_path / "run")
    losses = [line["loss"] for line in read_json_lines(tmp_path / "run" / "log.jsonl")]
    assert len(losses) == 40
    assert losses[-1] < 0.5 * losses[0]
    assert result["new"] > result["zero_shot_new"]
    assert result["relative_update"] > 0
    assert result["share"] < 1e-9  # the projection is exact up to float32 rounding, here squared
    assert result["k"] == (0 if method == "lora" else 16)
    after = setting.backbone.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_result_measures_images_that_were_not_trained_on(tmp_path):
    setting = standin.setting()
    result = train(standin.config(tmp_path, max_test_images=9), RUN, setting, tmp_path / "run")
    rest = choose_split(setting.new.dataset, 2, 0).test
    assert result["zero_shot_new"] == standin.setting().new.zero_shot_accuracy(at_most(9, rest))
    assert result["zero_shot_kept"] == standin.setting().kept["dark"].zero_shot_accuracy(at_most(9, torch.arange(30)))
    assert {"method": "both", "shots": 2, "learning_rate": 1e-2, "seed": 0}.items() <= result.items()
    assert result["versions"]["torch"] == torch.__version__


def test_predictions_are_not_kept_where_nobody_asks_for_them(tmp_path):
    kept = train(standin.config(tmp_path), RUN, standin.setting(), tmp_path / "kept")
    bare = train(standin.config(tmp_path, save_predictions=False), RUN, standin.setting(), tmp_path / "bare")
    assert (tmp_path / "kept" / PREDICTIONS).exists()
    assert not (tmp_path / "bare" / PREDICTIONS).exists()
    assert [bare[name] for name in ("new", "kept", "tasks")] == [kept[name] for name in ("new", "kept", "tasks")]


def test_the_predictions_of_a_run_are_those_that_its_accuracies_count(tmp_path):
    result = train(standin.config(tmp_path, steps=40, interpolations=(0.5,)), RUN, standin.setting(), tmp_path / "run")
    predictions = read_predictions(tmp_path / "run" / PREDICTIONS)
    new, dark = ([each for each in predictions if (each.task == "dark") == kept] for kept in (False, True))
    shares = [
        sum(getattr(each, when) == each.label for each in part) / len(part)
        for part in (new, dark)
        for when in ("before", "after")
    ]
    expected = [result[name] for name in ("zero_shot_new", "new", "zero_shot_kept", "kept")]
    assert shares == pytest.approx(expected)
    assert result["new"] > result["zero_shot_new"]
    test = choose_split(standin.setting().new.dataset, 2, 0).test
    assert [int(each.image) for each in new] == test.tolist()


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "task,image,label,before,after\nx,1\n"])
def test_damaged_predictions_are_named(tmp_path, content):
    path = tmp_path / PREDICTIONS
    path.write_text(content)
    with pytest.raises(ValueError, match=r"predictions\.csv"):
        read_predictions(path)


def factors(folder):
    return load_file(folder / CHECKPOINT)


@pytest.mark.parametrize(
    ("towers", "precision"),
    [(("image",), "fp32"), (("text",), "fp32"), (("image", "text"), "fp32"), (("image",), "fp16")],
)
@pytest.mark.parametrize("killed_at", [3, 4])
def test_a_killed_and_resumed_run_matches_an_uninterrupted_one(tmp_path, killed_at, towers, precision, monkeypatch):
    # The first scale overflows in the first steps, and is halved from then on.
    monkeypatch.setattr(torch.amp.GradScaler.__init__, "__defaults__", ("cuda", 2.0**26, 2.0, 0.5, 2000, True))
    options = {"lora_dropout": 0.3, "steps": 7, "checkpoint_every": 2}
    config = standin.config(tmp_path, towers=towers, precision=precision, **options)
    whole = train(config, RUN, standin.setting(), tmp_path / "whole")

    def kill(done: int, loss: float) -> None:
        if done == killed_at:
            raise Killed

    with pytest.raises(Killed):
        train(config, RUN, standin.setting(), tmp_path / "resumed", kill)
    torch.rand(17)  # whatever else happened to the random state in between
    steps = []
    resumed = train(config, RUN, standin.setting(), tmp_path / "resumed", lambda done, loss: steps.append(done))
    assert steps == list(range(1 + killed_at // 2 * 2, 8))

    expected, found = factors(tmp_path / "whole"), factors(tmp_path / "resumed")
    assert any(name.startswith("adapter.") for name in expected)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("whole", "resumed")]
    assert logs[0] == logs[1]
    for result in (whole, resumed):
        assert all(result.pop(name) > 0 for name in standin.VARYING)
    assert whole == resumed


def test_runs_of_one_seed_share_initial_factors_and_batches(tmp_path):
    # At this learning rate nothing moves: the same losses are the same batches.
    def start(method: Method) -> tuple[dict[str, torch.Tensor], list[float]]:
        losses = []
        config = standin.config(tmp_path, steps=3, checkpoint_every=1)
        train(
            config, Run(method, 2, 1e-9, 4), standin.setting(), tmp_path / method, lambda _, loss: losses.append(loss)
        )
        return {name: value for name, value in factors(tmp_path / method).items() if ".lora_A." in name}, losses

    expected_factors, expected_losses = start("lora")
    for method in ("output", "random"):
        found_factors, found_losses = start(method)
        for name, value in expected_factors.items():
            torch.testing.assert_close(found_factors[name], value, rtol=0, atol=1e-7)  # two steps of 1e-9, rounded
        assert found_losses == pytest.approx(expected_losses, rel=1e-5)


def test_a_run_that_diverges_names_the_step(tmp_path):
    setting = standin.setting()
    setting.backbone.model.logit_scale.data.fill_(1e9)  # exp overflows
    with pytest.raises(
        FloatingPointError,
        match=r"^the loss is nan in step 0 at learning rate 0.01; "
        "there is no checkpoint before it",
    ):
        train(standin.config(tmp_path), RUN, setting, tmp_path / "run")


def test_run_that_diverges_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    broken, numbers = F.cross_entropy, iter(range(100))
    monkeypatch.setattr(F, "cross_entropy", lambda *args: broken(*args) * (math.nan if next(numbers) == 5 else 1))
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan in step 5 .* checkpoint is .*run.*, of step 4"
    ) as error:
        train(standin.config(tmp_path, steps=8), RUN, standin.setting(), tmp_path / "run")
    assert str(tmp_path / "run" / CHECKPOINT) in str(error.value)
    monkeypatch.undo()
    assert train(standin.config(tmp_path, steps=8), RUN, standin.setting(), tmp_path / "run")["steps"] == 8


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("towers", [("image",), ("image", "text")])
def test_half_precision_learns_what_float32_learns(tmp_path, precision, towers):
    def run(precision: str) -> dict[str, Any]:
        config = standin.config(tmp_path, steps=40, precision=precision, towers=towers)
        return train(config, Run("both", 2, 3e-2, 0), standin.setting(), tmp_path / precision)

    half, single = run(precision), run("fp32")
    assert (half["precision"], single["precision"]) == ({"bf16": "bfloat16", "fp16": "float16"}[precision], "float32")
    assert half["loss"] == pytest.approx(single["loss"], abs=0.15)  # 40 steps apart at a high rate
    assert half["new"] > half["zero_shot_new"] == pytest.approx(single["zero_shot_new"], abs=0.1)  # three of 30 images


def test_the_pretrained_model_is_measured_in_the_dtype_of_the_run(tmp_path):
    setting = standin.setting()
    result = train(standin.config(tmp_path, steps=1, precision="bf16"), RUN, setting, tmp_path / "run")
    rest = choose_split(setting.new.dataset, 2, 0).test
    plain = copy.deepcopy(setting.backbone.model).bfloat16()
    assert result["zero_shot_new"] == standin.setting().new.accuracy(plain, rest, torch.bfloat16)
    assert next(setting.backbone.model.parameters()).dtype == torch.float32


def test_fp16_scales_its_loss(tmp_path, monkeypatch):
    scales = []
    original = torch.amp.GradScaler.scale
    monkeypatch.setattr(torch.amp.GradScaler, "scale", lambda *args: scales.append(1) or original(*args))
    train(standin.config(tmp_path, steps=3, precision="fp16"), RUN, standin.setting(), tmp_path / "fp16")
    assert len(scales) == 3


def test_recomputing_changes_nothing_but_memory(tmp_path):
    results = [
        train(standin.config(tmp_path, recompute=recompute), RUN, standin.setting(), tmp_path / str(recompute))
        for recompute in (False, True)
    ]
    logs = [read_json_lines(tmp_path / str(recompute) / "log.jsonl") for recompute in (False, True)]
    assert logs[0] == logs[1]
    assert results[0]["new"] == results[1]["new"]


def test_crops_depend_on_seed_and_step(tmp_path):
    setting = standin.setting()
    pictures: Any = setting.new.dataset.images
    images = DeviceImages.from_tensors(pictures[:6], "cpu")
    indices = torch.tensor([4, 1])

    def pixels(step: int, seed: int = 0) -> torch.Tensor:
        return training_pixels(images, indices, setting, "crop-flip", seed, step)

    assert pixels(3).shape == (2, 3, 16, 16)
    assert torch.equal(pixels(3), pixels(3))
    assert not torch.equal(pixels(3), pixels(4))
    assert not torch.equal(pixels(3), pixels(3, seed=1))
    whole = training_pixels(images, indices, setting, "none", 0, 3)
    assert torch.equal(whole, setting.backbone.preprocess(pictures[indices]))


@pytest.mark.parametrize("can_be_mirrored", [False, True])
def test_characters_are_not_mirrored(can_be_mirrored):
    setting = standin.setting()
    setting.new.dataset = dataclasses.replace(setting.new.dataset, can_be_mirrored=can_be_mirrored)
    ramp = torch.arange(16, dtype=torch.uint8).mul(16).expand(1, 3, 16, 16)  # brighter to the right
    images = DeviceImages.from_tensors(ramp, "cpu")
    slopes = set()
    for step in range(20):
        pixels = training_pixels(images, torch.tensor([0]), setting, "crop-flip", 0, step)
        slopes.add(bool(pixels[0, 0, 0, -1] > pixels[0, 0, 0, 0]))
    assert slopes == ({True, False} if can_be_mirrored else {True})


def test_a_profile_lists_phases_and_operations(tmp_path):
    train(standin.config(tmp_path, steps=14, profile=True), RUN, standin.setting(), tmp_path / "run")
    text = (tmp_path / "run" / PROFILE).read_text()
    assert "mean of 8" in text
    assert all(phase in text for phase in ("data (host)", "forward (host)", "backward (host)", "optimizer (host)"))
    assert re.search(r"aten::\w+ +\d+ +\d+\.\d\d +\d+\.\d%", text)
    events = json.loads((tmp_path / "run" / TRACE).read_text())["traceEvents"]
    assert sum(event.get("name") == "data" for event in events) == 8


def test_a_stopped_run_ends_its_profiler(tmp_path):
    def stop(done: int, loss: float) -> None:
        if done == 6:
            raise Killed

    with pytest.raises(Killed):
        train(standin.config(tmp_path, steps=14, profile=True), RUN, standin.setting(), tmp_path / "run", stop)
    with torch.profiler.profile(acc_events=True):  # there can be only one
        pass


def test_learning_rate_follows_torchs_cosine():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 17, eta_min=1e-6)
    for step in range(17):
        assert cosine(step, 17, 3e-3, 1e-6) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()
    assert cosine(17, 17, 3e-3, 1e-6) == pytest.approx(1e-6)
    counted = torch.tensor(5.0, dtype=torch.float64)  # a graph's counter is a tensor
    assert cosine(counted, 17, 3e-3, 1e-6).item() == pytest.approx(cosine(5, 17, 3e-3, 1e-6), rel=1e-14)


def test_at_most_takes_a_fixed_part():
    indices = torch.arange(50) * 2
    assert at_most(None, indices) is indices
    assert at_most(50, indices) is indices
    part = at_most(7, indices)
    assert len(set(part.tolist())) == 7
    assert set(part.tolist()) <= set(indices.tolist())
    assert torch.equal(part, at_most(7, indices))


def test_logit_scale_multiplies_the_cosines(tmp_path):
    setting = standin.setting()
    losses = []
    config = standin.config(tmp_path, steps=1)
    train(config, RUN, setting, tmp_path / "run", lambda done, loss: losses.append(loss))
    shots = choose_split(setting.new.dataset, 2, 0).train
    model = setting.backbone.model
    assert math.exp(model.logit_scale.item()) == pytest.approx(1 / 0.07)
    # B is zero, so that the first loss is the pretrained model's
    batch = shots[batch_indices(6, 4, 0, 0)]
    images: Any = setting.new.dataset.images
    image = model.encode_image(images[batch].float() / 255 - 0.5)
    text = model.encode_text(setting.new.tokens)
    cosines = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1)
    expected = torch.nn.functional.cross_entropy(cosines / 0.07, setting.new.dataset.labels[batch])
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)


def test_images_are_decoded_once_for_all_runs_of_a_split(tmp_path, monkeypatch):
    make_miniature(tmp_path, "dtd")
    decoded = []
    open_image = images.open_image
    monkeypatch.setattr(images, "open_image", lambda path, *rest: (decoded.append(path), open_image(path, *rest))[1])
    settings = Settings()
    few = {"data": "dtd", "data_root": tmp_path, "template": "default", "augmentation": "crop-flip", "steps": 1}
    config = standin.config(tmp_path / "out", **few, methods=("lora", "both"), max_test_images=1)
    for each in config.runs():
        train(config, each, settings.load(config, "cpu"), tmp_path / each.name)
    shots = set(json.loads((tmp_path / config.runs()[0].name / "draw.json").read_text())["train"])
    assert len(shots) == 8
    assert sum(str(path).endswith(tuple(shots)) for path in decoded) == len(shots)
    seeds = standin.config(tmp_path / "out", **few, seeds=(1,), max_test_images=1)
    other = train(seeds, seeds.runs()[0], settings.load(seeds, "cpu"), tmp_path / "other")
    assert len(settings.load(seeds, "cpu").decoded) == 1
    assert (
        other["images"] != train(config, config.runs()[0], settings.load(config, "cpu"), tmp_path / "again")["images"]
    )


@pytest.mark.parametrize("towers", [("image",), ("image", "text")])
def test_runs_train_with_one_template_and_measure_with_all(tmp_path, towers):
    setting = standin.setting()
    bright = setting.new
    tasks = [
        Task(bright.dataset, bright.backbone, ("a {}", "b {}"), training_template=text) for text in ("a {}", "c {}")
    ]
    results = [
        train(standin.config(tmp_path, towers=towers), RUN, dataclasses.replace(setting, new=task), tmp_path / text)
        for task, text in zip(tasks, ("a", "c"), strict=True)
    ]
    assert results[0]["zero_shot_new"] == results[1]["zero_shot_new"]
    assert results[0]["loss"] != results[1]["loss"]
