"""`classifier.json` and `load_classifier`: a saved adapter names the images that its run was measured on alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from miniature_datasets import make_miniature
from PIL import Image
from saved_run import train
from torch.nn import functional as F

import complora_kernels as ck
from complora_kernels.common.files import sealed
from complora_kernels.fewshot import classifier as classifiers
from complora_kernels.fewshot import glyphs
from complora_kernels.fewshot.backbone import load_backbone
from complora_kernels.fewshot.classifier import Ranking
from complora_kernels.fewshot.classifier_file import CLASSIFIER_FILE
from complora_kernels.fewshot.datasets import Dataset, load_dataset, read_split
from complora_kernels.fewshot.decode import load_crops
from complora_kernels.fewshot.measure import at_most
from complora_kernels.fewshot.predictions import PREDICTIONS, read_predictions
from complora_kernels.fewshot.recipe import SPLIT_FILE

MOST = 200  # test images


@pytest.fixture(scope="module")
def of_digits(tmp_path_factory):
    """A run on images in memory."""
    return train(tmp_path_factory.mktemp("digits"), "--keep", "letters", "--max-test-images", str(MOST))


@pytest.fixture(scope="module")
def of_files(tmp_path_factory):
    """A run on files of images, with several templates, and its data set."""
    root = tmp_path_factory.mktemp("files")
    make_miniature(root, "eurosat", classes=11)
    options = ("--data", "eurosat", "--data-root", str(root), "--template", "ensemble")
    return *train(root / "out", *options), load_dataset("eurosat", root)


def measured(adapter: Path, dataset: Dataset) -> list[str]:
    """What the run called each image of its test set."""
    task = dataset.asked_as or dataset.name
    predictions = [row for row in read_predictions(adapter.parent / PREDICTIONS) if row.task == task]
    test = at_most(MOST, read_split(adapter.parent / SPLIT_FILE, dataset).test)
    assert [row.image for row in predictions] == [str(name) for name in dataset.image_names(test)]
    return [row.after for row in predictions]


def test_images_in_memory_are_named_as_the_run_was_measured(of_digits):
    adapter, result = of_digits
    dataset = load_dataset("digits")
    classifier = ck.load_classifier(adapter)
    assert classifier.classes == dataset.class_names
    test = at_most(MOST, read_split(adapter.parent / SPLIT_FILE, dataset).test)
    images = cast("torch.Tensor", dataset.images)
    names = [ranking.names[0] for ranking in classifier(images[test])]
    assert names == measured(adapter, dataset)
    labels = [dataset.class_names[label] for label in dataset.labels[test].tolist()]
    right = sum(name == label for name, label in zip(names, labels, strict=True))
    assert right / len(test) == result["new"]
    assert result["new"] > result["zero_shot_new"]


def test_files_are_named_as_the_run_was_measured(of_files):
    adapter, result, dataset = of_files
    classifier = ck.load_classifier(adapter)
    test = read_split(adapter.parent / SPLIT_FILE, dataset).test
    paths = [dataset.images[i] for i in test.tolist()]
    names = [ranking.names[0] for ranking in classifier(paths)]
    assert names == measured(adapter, dataset)
    labels = [dataset.class_names[label] for label in dataset.labels[test].tolist()]
    assert sum(name == label for name, label in zip(names, labels, strict=True)) / len(test) == result["new"]
    assert 0 < result["new"] < 1
    opened = [Image.open(path) for path in paths]
    assert classifier(opened) == classifier([str(path) for path in paths])


def test_probabilities_are_those_of_a_plain_computation(of_files):
    adapter, _, dataset = of_files
    backbone = load_backbone("glyphs")
    model: Any = ck.load_adapter(backbone.model, adapter).eval()
    paths = dataset.images[:5]
    templates = [f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")]
    with torch.no_grad():
        images = model.encode_image(glyphs.normalize(load_crops(paths, (32, 32)) / 255))
        texts = [
            [model.encode_text(backbone.tokenize([one.format(name.replace("_", " "))]))[0] for one in templates]
            for name in dataset.class_names
        ]
        classes = torch.stack([F.normalize(torch.stack(of_class), dim=-1).mean(0) for of_class in texts])
        expected = (model.logit_scale.exp() * F.cosine_similarity(images[:, None], classes, dim=-1)).softmax(-1)
    for ranking, shares in zip(ck.load_classifier(adapter)(paths, top=3), expected, strict=True):
        values, places = shares.topk(3)
        assert ranking.names == tuple(dataset.class_names[i] for i in places)
        assert ranking.probabilities == pytest.approx(values.tolist(), rel=1e-3)  # e^logit, float32


def test_one_image_gives_one_ranking_and_several_a_list(of_files):
    adapter, _, dataset = of_files
    classifier, path = ck.load_classifier(adapter), dataset.images[0]
    one = classifier(path)
    assert isinstance(one, Ranking)
    assert len(one.names) == len(one.probabilities) == 5
    assert list(one.probabilities) == sorted(one.probabilities, reverse=True)
    (every,) = classifier([path], top=100)
    assert len(every.names) == len(classifier.classes) == 11
    assert sum(every.probabilities) == pytest.approx(1, abs=1e-5)
    assert classifier(Image.open(path)) == classifier(str(path)) == one
    pixels = load_crops([path], (32, 32))
    assert classifier(pixels[0]) == one  # of the model's size already: not resized
    assert classifier(pixels) == [one]
    first, second, third = classifier([path, pixels[0], Image.open(dataset.images[-1])])
    assert first.names == second.names == one.names
    assert third.names == classifier(dataset.images[-1]).names
    assert classifier([]) == []
    assert classifier(pixels[:0]) == []


def test_a_photo_on_its_side_is_turned_upright(of_files, tmp_path):
    adapter, _, dataset = of_files
    classifier = ck.load_classifier(adapter)
    image = Image.open(dataset.images[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "side.png", exif=exif)
    assert classifier(tmp_path / "side.png") == classifier(Image.open(tmp_path / "side.png")) == classifier(image)


def test_other_names_may_be_given(of_digits):
    adapter, _ = of_digits
    images, labels = glyphs.letter_test_set()
    letters = ck.load_classifier(adapter, classes=glyphs.LETTERS)
    assert letters.classes == glyphs.LETTERS
    found = [ranking.names[0] for ranking in letters(images)]
    right = sum(name == glyphs.LETTERS[label] for name, label in zip(found, labels.tolist(), strict=True))
    assert right > 0.6 * len(images)
    digits = ck.load_classifier(adapter)
    assert [ranking.names[0] for ranking in digits(images, classes=glyphs.LETTERS)] == found
    assert digits(images[0]).names[0] in digits.classes  # its own again


def test_text_features_are_computed_once(of_digits, monkeypatch):
    classifier = ck.load_classifier(of_digits[0])
    monkeypatch.setattr(classifier.model, "encode_text", lambda *_, **__: pytest.fail("texts were encoded again"))
    for _ in range(2):
        classifier(torch.zeros(3, 8, 8, dtype=torch.uint8))


def test_a_classifier_moves(of_digits):
    classifier = ck.load_classifier(of_digits[0], device="cpu")
    assert classifier.to("meta") is classifier
    parts = (classifier.class_features(), *classifier.model.parameters())
    assert {part.device.type for part in parts} == {classifier.backbone.device.type} == {"meta"}


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (torch.zeros(3, 8, 8), ValueError, r"images is torch.float32 \[1, 3, 8, 8\], expected uint8 \[N, 3, H, W\]"),
        (torch.zeros(8, 8, dtype=torch.uint8), ValueError, r"images is torch.uint8 \[8, 8\]"),
        ([torch.zeros(1, 3, 8, 8, dtype=torch.uint8)], ValueError, r"images\[0\] is .* expected uint8 \[3, H, W\]"),
        ([3], TypeError, r"images\[0\] is a int, expected a path"),
        ([Image.new("I", (8, 8))], ValueError, r"images\[0\]: mode I, expected 8 bits a channel"),
        ("nothing.png", FileNotFoundError, r"nothing\.png"),
    ],
)
def test_what_is_no_image_is_named(of_digits, images, error, words):
    with pytest.raises(error, match=words):
        ck.load_classifier(of_digits[0])(images)


def test_arguments_are_checked(of_digits):
    adapter, _ = of_digits
    classifier = ck.load_classifier(adapter)
    with pytest.raises(ValueError, match="top=0, expected at least 1"):
        classifier(torch.zeros(3, 8, 8, dtype=torch.uint8), top=0)
    for classes in (["the letter a"], "ab"):
        with pytest.raises(ValueError, match=r"classes=.*, expected at least two names"):
            ck.load_classifier(adapter, classes=classes)
    with pytest.raises(ValueError, match="does not tell the classes 'cat', 'dog' apart"):
        ck.load_classifier(adapter, classes=["cat", "dog"])
    with pytest.raises(ValueError, match="expected cpu, cuda or auto"):
        ck.load_classifier(adapter, device="tpu")


# ---- the file


@pytest.fixture
def copied(of_digits, tmp_path):
    """An adapter's folder, taken elsewhere."""
    return Path(shutil.copytree(of_digits[0], tmp_path / "mine"))


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Changes the file as a program would, with its digest."""
    path = folder / CLASSIFIER_FILE
    content = {name: value for name, value in json.loads(path.read_text()).items() if name != "digest"}
    change(content)
    path.write_text(json.dumps(sealed(content)))
    return path


def test_the_folder_of_an_adapter_is_enough(copied, of_digits):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert ck.load_classifier(copied)(images) == ck.load_classifier(of_digits[0])(images)
    saved = json.loads((copied / CLASSIFIER_FILE).read_text())
    assert saved["run"]["accuracy"] == of_digits[1]["new"]
    assert saved["run"]["data"] == "digits"
    assert saved["preprocessing"]["mean"] == [0.25, 0.25, 0.25]
    assert saved["preprocessing"]["std"] == [0.25, 0.25, 0.25]


def test_a_folder_with_one_adapter_below_is_taken_and_of_several_the_names_are_told(of_digits, tmp_path):
    adapter, _ = of_digits
    assert ck.load_classifier(adapter.parents[2]).classes == ck.load_classifier(adapter).classes
    for name in ("a", "b"):
        shutil.copytree(adapter, tmp_path / name / "adapter")
    with pytest.raises(ValueError, match=r"below it are .*a/adapter, .*b/adapter"):
        ck.load_classifier(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected the folder of an adapter"):
        ck.load_classifier(tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(format_version=2, package_version="9.0"), "written by the newer .* 9.0"),
        (lambda content: content.pop("format_version"), "format_version=None, expected an integer"),
        (lambda content: content.pop("templates"), "it has no templates, expected one"),
        (lambda content: content["model"].pop("name"), "it.model has no name, expected one"),
        (lambda content: content.update(class_names="ab"), r"it\.class_names='ab', expected a list"),
        (lambda content: content.update(class_names=["a"]), "class_names has 1 entries, expected at least 2"),
        (lambda content: content.update(templates=["a photo"]), "expected one {} for the class name"),
        (lambda content: content.update(batch_size=0), "batch_size=0, expected at least 1"),
        (lambda content: content["model"].update(activation="relu"), "it.model.activation='relu', expected one of"),
        (lambda content: content["fingerprint"].update(tokens="0"), "makes other tokens of the prompts, such as 'a d"),
        (lambda content: content["preprocessing"].update(size=[9, 9]), r"preprocessing.size is \[9, 9\], and the mod"),
    ],
)
def test_a_file_that_does_not_fit_is_named_with_what_was_expected(copied, change, words):
    path = changed(copied, change)
    with pytest.raises(ValueError, match=words) as error:
        ck.load_classifier(copied)
    assert str(error.value).startswith(str(path))


def test_a_damaged_or_missing_file_is_named(copied):
    path = copied / CLASSIFIER_FILE
    whole = path.read_text()
    for content in (whole[:-9], whole.replace("digit seven", "digit eight"), "[]", ""):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"classifier\.json: expected what `complora train` writes"):
            ck.load_classifier(copied)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"classifier\.json is missing, expected what"):
        ck.load_classifier(copied)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("ln_final.weight", "features of the first prompts are about"),
        ("visual.conv1.weight", "features of the picture that is compared are about"),
    ],
)
def test_a_changed_model_is_found_where_no_adapted_weight_changed(copied, monkeypatch, part, words):
    def other(*arguments: Any, **options: Any) -> Any:
        backbone = load_backbone(*arguments, **options)
        weight = backbone.model.get_parameter(part)
        weight.data = weight.data.flip(0)
        return backbone

    monkeypatch.setattr(classifiers, "load_backbone", other)
    with pytest.raises(ValueError, match=words):
        ck.load_classifier(copied)


def test_half_precision_is_no_other_model(copied):
    images = glyphs.letter_test_set()[0][:40]
    half, whole = ck.load_classifier(copied, precision="bf16"), ck.load_classifier(copied)
    assert {parameter.dtype for name, parameter in half.model.named_parameters() if "lora" not in name} == {
        torch.bfloat16
    }
    same = [a.names[0] == b.names[0] for a, b in zip(half(images), whole(images), strict=True)]
    assert sum(same) > 0.8 * len(same)


def test_a_model_outside_of_the_tables_is_not_taken_from_the_file(copied, tmp_path, monkeypatch):
    monkeypatch.setattr(classifiers, "load_backbone", lambda *_, **__: pytest.fail("weights were loaded"))
    for model in ({"pretrained": "x"}, {"name": "hf-hub:a/b"}, {"name": "ViT-B-32", "pretrained": "x.pt"}):
        changed(copied, lambda content, model=model: content["model"].update(model))
        with pytest.raises(ValueError, match="outside of open_clip's tables"):
            ck.load_classifier(copied)
