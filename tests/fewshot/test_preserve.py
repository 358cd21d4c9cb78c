"""The preservation loss in the program: its vocabulary, what a step computes, and runs that are resumed."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import fewshot_standin as standin
import pytest
import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from safetensors.torch import load_file
from torch.nn import functional as F

from complora_kernels.fewshot import glyphs, grid
from complora_kernels.fewshot.config import PRESETS, Run, TrainConfig
from complora_kernels.fewshot.datasets import choose_split
from complora_kernels.fewshot.datasets.dataset import as_clip_reads
from complora_kernels.fewshot.preservation import Preservation, draw_names
from complora_kernels.fewshot.recipe import train
from complora_kernels.fewshot.sweep import SweepConfig, prepare_sweep
from complora_kernels.fewshot.team import ALONE
from complora_kernels.fewshot.training import CHECKPOINT, RunContext, Training, prepare
from complora_kernels.fewshot.vocabulary import PACKAGED, check_vocabulary, vocabulary_of

RUN = Run("preserve", 2, 1e-2, 0)
COLOURS = ("orange", "yellow", "cyan", "purple", "pink", "white", "black", "gray", "brown", "navy", "maroon")
FASHION_MNIST = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag")


def training(tmp_path: Path, run: Run = RUN, **options: Any) -> Training:
    """A run of the stand-in, prepared."""
    setting = standin.setting()
    split = choose_split(setting.new.dataset, run.shots, run.seed)
    config = standin.config(tmp_path, **options)
    return prepare(RunContext(config, run, setting, split, "", tmp_path, torch.float32, ALONE))


# ---- the vocabulary


def test_packaged_names_are_general_ones():
    names = [as_clip_reads(name) for name in PACKAGED.read_text().splitlines()]
    assert len(names) == len(set(names)) > 400
    taken = {as_clip_reads(name) for name in (*IMAGENET_CLASSNAMES, *FASHION_MNIST, "Ankle boot", *glyphs.DIGITS)}
    assert not taken & set(names)
    assert not [name for name in names if len(name) == 1 or not name.isalpha()]


def test_packaged_names_that_share_a_word_with_a_class_are_left_out():
    config = dataclasses.replace(PRESETS["clip-lora"], model="ViT-B-16")
    whole = PACKAGED.read_text().split()
    assert list(vocabulary_of(config, [])) == whole
    left = vocabulary_of(config, ["  DOG", "golden retriever", "sun_flower", "Cat"])
    assert set(whole) - set(left) == {"dog", "cat", "sun", "flower"}  # of "sun_flower" each word
    assert list(left) == [name for name in whole if name in left]


def test_the_bundled_model_keeps_the_colours_that_it_knows():
    assert vocabulary_of(PRESETS["glyphs"], standin.CLASSES) == COLOURS
    check_vocabulary(PRESETS["glyphs"], [*glyphs.LETTERS, *glyphs.DIGITS], glyphs.load_glyph_tokenizer())


def write(tmp_path: Path, *lines: str) -> TrainConfig:
    file = tmp_path / "names.txt"
    file.write_bytes("\n".join(lines).encode())
    return standin.config(tmp_path / "out", vocabulary=str(file), methods=("preserve",), template="a {}")


def test_a_file_has_a_name_a_line(tmp_path):
    config = write(tmp_path, "\ufeffnavy", "", "  Café noir\t", "red wine\r", "")
    assert vocabulary_of(config, ["red", "wine"]) == ("navy", "Café noir", "red wine")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["navy", "DIGIT_zero"], r"--vocabulary .*names.txt: 'DIGIT_zero' is learned, or measured as kept: expected"),
        (["navy", "Letter  q", "digit six"], r"--vocabulary .*: 'Letter  q', 'digit six' are learned, or measured as"),
        (["navy", "red", " Navy"], r"--vocabulary .*: 'Navy' is there twice, expected every name once"),
        (["navy"], r"--vocabulary .*: expected at least 2 names, one a line, not 1"),
        ([], r"--vocabulary .*: expected at least 2 names, one a line, not 0"),
        (["navy", "dog", "cat"], r"--vocabulary .*: the model's tokenizer does not tell the names 'dog', 'cat' apart"),
        (["navy", "dog", "cat"], r"it does not know 'dog', 'cat', expected a model that does"),
        (["navy", "digit, zero"], r"tokenizer does not tell 'digit, zero' from the class 'digit zero', expected names"),
    ],
)
def test_bad_vocabularies_are_named_before_anything_is_written(tmp_path, lines, message):
    config = write(tmp_path, *lines)
    with pytest.raises(ValueError, match=message):
        grid.prepare(config)
    assert not (tmp_path / "out").exists()
    grid.prepare(dataclasses.replace(config, methods=("lora",)))  # which does not read it


def test_a_missing_file_and_one_that_is_no_text(tmp_path):
    config = write(tmp_path, "navy", "red")
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        grid.prepare(dataclasses.replace(config, vocabulary=str(tmp_path / "nowhere")))
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"names.txt.*expected a text file in UTF-8 with one name a line"):
        grid.prepare(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preserve": 0.0}, r"--preserve 0.0: expected more than 0"),
        ({"preserve": float("inf")}, r"--preserve inf"),
        ({"vocabulary_sample": 1}, r"--vocabulary-sample 1: expected at least 2"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        grid.prepare(standin.config(tmp_path / "out", **options))


# ---- what a step computes


def test_names_are_a_function_of_seed_and_step():
    names = draw_names(300, 64, 3, 7)
    assert names.dtype == torch.int64
    assert len(names.unique()) == 64
    assert 0 <= names.min() <= names.max() < 300
    assert torch.equal(names, draw_names(300, 64, 3, 7))
    assert not torch.equal(names, draw_names(300, 64, 3, 8))
    assert not torch.equal(names, draw_names(300, 64, 4, 7))
    assert draw_names(5, 64, 0, 0).sort().values.tolist() == [0, 1, 2, 3, 4]


def test_who_has_the_loss(tmp_path):
    config = standin.config(tmp_path, methods=("lora", "tip-adapter"))
    weights = {name: config.preservation_weight(name) for name in ("lora", "preserve", "both", "tip-adapter")}
    assert weights == {"lora": 0, "preserve": 1, "both": 0, "tip-adapter": 0}
    assert not config.preserves
    config = dataclasses.replace(config, preserve=0.3)
    weights = {name: config.preservation_weight(name) for name in ("lora", "preserve", "both", "tip-adapter")}
    assert weights == {"lora": 0.3, "preserve": 0.3, "both": 0.3, "tip-adapter": 0}
    assert config.preserves
    assert config.adapter("preserve", 0) == config.adapter("lora", 0)
    assert training(tmp_path, Run("lora", 2, 1e-2, 0)).preservation is None


@pytest.mark.parametrize("augmentation", ["none", "crop-flip"])
@pytest.mark.parametrize(("method", "preserve"), [("preserve", None), ("both", 2.5)])
def test_a_step_adds_the_weighted_divergence_to_the_cross_entropy(tmp_path, method, preserve, augmentation):
    options = {"preserve": preserve, "vocabulary_sample": 4, "augmentation": augmentation, "template": "a {}"}
    ours = training(tmp_path, Run(method, 2, 1e-2, 0), **options)
    for B in [p for name, p in ours.model.named_parameters() if ".lora_B." in name]:
        torch.nn.init.normal_(B, std=0.3, generator=torch.Generator().manual_seed(len(B)))
    plain = copy.deepcopy(ours.context.setting.backbone.model)
    pixels, labels, names, *frozen = ours.batch(3)
    assert torch.equal(names, draw_names(len(COLOURS), 4, 0, 3))
    assert len(frozen) == (augmentation == "none")

    texts = standin.tokenize([f"a {COLOURS[i]}" for i in names.tolist()])
    classes = standin.tokenize([f"a {name}" for name in standin.CLASSES])
    f, v, c = (
        ours.model.encode_image(pixels, normalize=True),
        *(ours.model.encode_text(tokens, normalize=True) for tokens in (texts, classes)),
    )
    scale = plain.logit_scale.exp()
    p = (scale * plain.encode_image(pixels, normalize=True) @ plain.encode_text(texts, normalize=True).T).softmax(-1)
    divergence = (p * (p.log() - (scale * f @ v.T).log_softmax(-1))).sum(-1).mean()
    expected = F.cross_entropy(scale * f @ c.T, labels) + (preserve or 1.0) * divergence
    assert divergence > 0.01
    loss = ours.loss(ours.model, pixels, labels, names, *frozen)
    torch.testing.assert_close(loss, expected)
    if frozen:  # those of the images of this batch
        torch.testing.assert_close(F.normalize(frozen[0]), plain.encode_image(pixels, normalize=True))


@pytest.mark.parametrize("augmentation", ["none", "crop-flip"])
@pytest.mark.parametrize("killed_at", [3, 4])
def test_a_killed_and_resumed_run_matches_an_uninterrupted_one(tmp_path, killed_at, augmentation):
    options = {"steps": 7, "vocabulary_sample": 4, "augmentation": augmentation, "template": "a {}"}
    config = standin.config(tmp_path, lora_dropout=0.3, **options)
    whole = train(config, RUN, standin.setting(), tmp_path / "whole")

    def kill(done: int, loss: float) -> None:
        if done == killed_at:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(config, RUN, standin.setting(), tmp_path / "resumed", kill)
    resumed = train(config, RUN, standin.setting(), tmp_path / "resumed")
    expected, found = (load_file(tmp_path / name / CHECKPOINT) for name in ("whole", "resumed"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for result in (whole, resumed):
        assert all(result.pop(name) > 0 for name in standin.VARYING)
    assert whole == resumed
    assert whole["preserve"] == 1
    lora = train(config, Run("lora", 2, 1e-2, 0), standin.setting(), tmp_path / "lora")
    assert "preserve" not in lora
    assert lora["loss"] != whole["loss"]


def test_a_checkpoint_of_another_vocabulary_is_refused(tmp_path):
    config = dataclasses.replace(write(tmp_path, "navy", "cyan", "pink"), steps=6)
    train(config, RUN, standin.setting(), tmp_path / "run")  # its checkpoint of step 4 remains
    write(tmp_path, "navy", "cyan", "white")
    with pytest.raises(ValueError, match=r"its run has another --vocabulary than now \(\w{12}, now \w{12}\); expected"):
        train(config, RUN, standin.setting(), tmp_path / "run")
    write(tmp_path, "navy", "cyan", "pink")
    train(config, RUN, standin.setting(), tmp_path / "run")


# ---- stopped by what the vocabulary says


@pytest.mark.parametrize("augmentation", ["none", "crop-flip"])
@pytest.mark.parametrize("method", ["lora", "preserve"])
def test_a_run_stops_at_the_first_look_above_the_limit(tmp_path, method, augmentation, monkeypatch):
    monkeypatch.setattr("complora_kernels.fewshot.training.CHECK_EVERY", 2)
    options = {"steps": 12, "template": "a {}", "augmentation": augmentation, "vocabulary_sample": 4}
    run, seen = Run(method, 2, 3e-2, 0), []
    look = Preservation.divergence

    def watched(self):
        value = look(self)
        seen.append(float(value))
        return value

    monkeypatch.setattr(Preservation, "divergence", watched)
    whole = train(standin.config(tmp_path, divergence_limit=1e6, **options), run, standin.setting(), tmp_path / "whole")
    assert (len(seen), whole["steps"]) == (5, 12)  # nothing would follow the last step
    limit = (seen[2] + max(seen[:2])) / 2 if seen[2] > max(seen[:2]) else sorted(seen)[3]
    first = next(i for i, value in enumerate(seen) if value > limit)
    config = standin.config(tmp_path, divergence_limit=limit, **options)
    stopped = train(config, run, standin.setting(), tmp_path / "stopped")
    assert stopped["steps"] == 2 * (first + 1)
    assert ("preserve" in stopped) == (method == "preserve")

    def kill(done: int, loss: float) -> None:
        if done == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(config, run, standin.setting(), tmp_path / "resumed", kill)
    resumed = train(config, run, standin.setting(), tmp_path / "resumed")
    for result in (stopped, resumed):
        assert all(result.pop(name) > 0 for name in standin.VARYING)
    assert resumed == stopped


def test_the_divergence_is_of_all_images_and_the_whole_vocabulary(tmp_path):
    ours = training(tmp_path, Run("lora", 2, 1e-2, 0), divergence_limit=1.0, template="a {}", test_batch_size=4)
    for B in [p for name, p in ours.model.named_parameters() if ".lora_B." in name]:
        torch.nn.init.normal_(B, std=0.3, generator=torch.Generator().manual_seed(len(B)))
    plain, task = ours.context.setting.backbone.model, ours.context.setting.new
    pixels: Any = task.dataset.images
    pixels = pixels[ours.context.split.train].float() / 255 - 0.5
    texts = standin.tokenize([f"a {name}" for name in COLOURS])
    with torch.no_grad():
        t, s = (
            plain.logit_scale.exp()
            * model.encode_image(pixels, normalize=True)
            @ model.encode_text(texts, normalize=True).T
            for model in (plain, ours.model)
        )
    assert ours.preservation is not None
    expected = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="batchmean", log_target=True)
    torch.testing.assert_close(ours.preservation.divergence(), expected)
    assert expected > 0.01
    assert ours.model.training
    assert len(ours.batch(0)) == 2  # no names are drawn for a loss that nothing is added to


def test_a_limit_reads_the_vocabulary_and_has_to_be_positive(tmp_path):
    assert standin.config(tmp_path, methods=("lora",), divergence_limit=0.1).preserves
    assert not standin.config(tmp_path, methods=("tip-adapter",), divergence_limit=0.1).preserves
    with pytest.raises(ValueError, match=r"--divergence-limit 0.0: expected more than 0"):
        grid.prepare(standin.config(tmp_path / "out", divergence_limit=0.0))


# ---- grids and sweeps


def test_a_folder_from_before_the_option_goes_on(tmp_path):
    config = standin.config(tmp_path, steps=2)
    grid.prepare(config)
    (tmp_path / "results.jsonl").touch()
    described = json.loads((tmp_path / "config.json").read_text())
    old = {k: v for k, v in described.items() if k not in ("digest", "preserve", "vocabulary", "vocabulary_sample")}
    assert len(old) == len(described) - 4
    (tmp_path / "config.json").write_text(json.dumps(old))
    grid.prepare(config)
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match=r"--preserve was None, now 2.0"):
        grid.prepare(dataclasses.replace(config, preserve=2.0))


def test_a_sweep_over_weights(tmp_path):
    file = tmp_path / "weights.yaml"
    file.write_text(
        "{shots: 1, seeds: 0, learning_rates: 0.01, options: {preset: glyphs},"
        "methods: {lora: {}, preserve: {}, 'both, preserve 3': {method: both, preserve: 3}}}"
    )
    jobs = prepare_sweep(SweepConfig(file, tmp_path / "out")).jobs
    weights = {job.run.label: job.config.preservation_weight(job.run.method) for job in jobs}
    assert weights == {"lora": 0, "preserve": 1, "both, preserve 3": 3}
    file.write_text(file.read_text().replace("preserve: {}", "preserve: {vocabulary: nowhere.txt}"))
    with pytest.raises(FileNotFoundError, match=r"weights.yaml: .*nowhere.txt"):
        prepare_sweep(SweepConfig(file, tmp_path / "other"))
