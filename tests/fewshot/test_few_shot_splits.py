"""Few-shot splits against transcriptions of each rule, and splits read from files against those that were written."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import sys
import types
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from miniature_datasets import make_miniature

from complora_kernels.common.files import unsealed
from complora_kernels.fewshot.config import Run
from complora_kernels.fewshot.datasets import (
    ELEVEN,
    Dataset,
    FewShotSplit,
    base_and_new,
    choose_split,
    digits,
    letters,
    load_dataset,
    read_split,
    write_split,
)

# The labels of the images in each list: classes neither in order nor together, of 3 to 7 images.
TRAIN = [2, 0, 2, 1, 0, 2, 3, 1, 0, 2, 3, 1, 0, 2, 3, 1, 0, 3, 2, 3, 1, 2]
VAL = [1, 3, 0, 1, 2, 2, 3, 0, 1, 2, 3, 0, 1, 1]
TEST = [0, 1, 2, 3, 3]
KINDS = ["own", "coop", "clip-lora"]


def split_dataset(train: list[int] = TRAIN, val: list[int] = VAL, test: list[int] | None = TEST) -> Dataset:
    """A data set in memory whose three lists have these labels."""
    labels = torch.tensor([*train, *val, *(test or [])])
    parts = torch.arange(len(labels)).split([len(train), len(val), len(test or [])])
    names = tuple("abcdefgh"[: int(labels.max()) + 1])
    images = torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8)
    return Dataset("made up", images, labels, names, parts[0], parts[1], None if test is None else parts[2])


def labels_of(dataset: Dataset, indices: torch.Tensor) -> Counter[int]:
    """The number of images of each label."""
    return Counter(dataset.labels[indices].tolist())


# ---- the own rule


def test_the_splits_of_the_digits_are_those_of_the_published_results():
    """The published results are 1,000 runs over 10 seeds."""
    digest = hashlib.sha256()
    dataset = digits()
    for seed in range(10):
        for shots in (1, 2, 4, 8, 16):
            split = choose_split(dataset, shots, seed)
            digest.update(repr((split.train.tolist(), split.test.tolist())).encode())
            assert len(split.val) == 0
    assert digest.hexdigest()[:16] == "f4c95ac8f5bd1d3f"


@pytest.mark.parametrize("seed", [0, 1, 5])
@pytest.mark.parametrize("shots", [1, 2, 4])
def test_the_own_rule_takes_the_beginning_of_a_permutation_of_each_class(shots, seed):
    dataset = split_dataset()
    generator = np.random.default_rng(seed)
    train = []
    for label in range(4):
        members = [i for i, other in enumerate(TRAIN) if other == label]
        train += [members[i] for i in generator.permutation(len(members))[:shots]]
    generator = np.random.default_rng((seed, 0, 2))
    val = []
    for label in range(4):
        members = [len(TRAIN) + i for i, other in enumerate(VAL) if other == label]
        val += [members[i] for i in generator.permutation(len(members))[: min(shots, 4)]]
    split = choose_split(dataset, shots, seed)
    assert split.train.tolist() == train
    assert split.val.tolist() == val
    assert split.test.tolist() == list(range(len(TRAIN) + len(VAL), len(dataset.labels)))
    assert (split.shots, split.seed, split.kind) == (shots, seed, "own")


def test_small_splits_of_the_own_rule_are_part_of_larger_ones():
    dataset = split_dataset()
    for seed in range(5):
        splits = [choose_split(dataset, shots, seed) for shots in (1, 2, 3, 4, 5)]
        for small, large in pairwise(splits):
            assert set(small.train.tolist()) < set(large.train.tolist())
            assert set(small.val.tolist()) <= set(large.val.tolist())
        assert labels_of(dataset, splits[-1].val) == {0: 3, 1: 4, 2: 3, 3: 3}  # at most four, or all that there are


def test_training_images_of_the_own_rule_do_not_depend_on_validation_images():
    with_val, without = split_dataset(), split_dataset(val=[])
    for seed in range(5):
        assert choose_split(with_val, 2, seed).train.tolist() == choose_split(without, 2, seed).train.tolist()
    assert choose_split(without, 2, 0).val.tolist() == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_images_left_are_the_test_set_of_a_data_set_without_one(kind):
    dataset = split_dataset(test=None)
    split = choose_split(dataset, 2, 3, kind)
    assert sorted(split.train.tolist() + split.test.tolist()) == dataset.train.tolist()
    without_val = split_dataset(val=[], test=None)
    split = choose_split(without_val, 2, 3, kind)
    together = split.train.tolist() + split.val.tolist() + split.test.tolist()
    assert sorted(together) == without_val.train.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_splits_depend_on_the_seed_and_leave_global_random_states_unchanged(kind):
    dataset = split_dataset()
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002
    splits = [choose_split(dataset, 2, seed, kind).train.tolist() for seed in (0, 1, 2, 1)]
    assert splits[1] == splits[3]
    assert len({tuple(split) for split in splits}) == 3
    assert (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()) == states  # noqa: NPY002


def test_a_class_with_too_few_images_is_named():
    with pytest.raises(
        ValueError, match=r"shots=6: class 'a' has 5 training images \(of 9 in all\), expected at least 6$"
    ):
        choose_split(split_dataset(), 6, 0)
    with pytest.raises(
        ValueError, match=r"shots=2: class 'b' has 1 training image \(of 2 in all\), expected at least 2$"
    ):
        choose_split(split_dataset([0, 0, 1], [], [0, 1]), 2, 0)
    assert labels_of(split_dataset(), choose_split(split_dataset(), 5, 0).train) == dict.fromkeys(range(4), 5)
    with pytest.raises(
        ValueError, match=r"'a' has 5 training images \(of 8 in all\), expected at least 6, to test on the rest"
    ):
        choose_split(split_dataset(test=None), 5, 0)
    with pytest.raises(
        ValueError,
        match=r"shots=4: class 'c' has 7 training images \(of 8 in all\), expected at least 8: in CLIP-LoRA's split 4",
    ):
        choose_split(split_dataset(val=[]), 4, 0, "clip-lora")


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_the_message_about_too_few_images_counts_training_images_and_all_images(tmp_path, kind):
    path = make_miniature(tmp_path, kind, per_class=(5, 2, 3))
    with pytest.raises(
        ValueError, match=r"shots=6: class 'dark_blue' has 5 training images \(of 10 in all\), expected"
    ):
        choose_split(load_dataset(f"{kind}:{path}"), 6, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_that_give_no_split_are_refused(kind, tmp_path):
    make_miniature(tmp_path, "imagenet_a")
    with pytest.raises(ValueError, match=r"imagenet_a is for testing only: it has no training images for 2 shots"):
        choose_split(load_dataset("imagenet_a", tmp_path), 2, 0, kind)
    with pytest.raises(ValueError, match=r"shots=0: expected at least 1"):
        choose_split(split_dataset(), 0, 0, kind)
    with pytest.raises(ValueError, match=r"seed=-1: expected at least 0"):
        choose_split(split_dataset(), 1, -1, kind)
    with pytest.raises(ValueError, match=r"--draw coco: expected own, coop, clip-lora, or a .json or .pkl file"):
        choose_split(split_dataset(), 1, 0, "coco")


def test_a_split_that_leaves_nothing_to_test_on_is_refused():
    with pytest.raises(ValueError, match=r"made up: a split with 22 training images leaves none to test on"):
        choose_split(split_dataset(test=None), 7, 0, "coop")


# ---- CoOp's and CLIP-LoRA's rules, transcribed from their code, which uses Python's global random numbers


def sampled(labels: list[int], first: int, n: int, otherwise: str) -> list[int]:
    """n items of each class, in the order of the classes' first items; `otherwise` is for classes of fewer items."""
    order: list[int] = []
    for label in labels:
        if label not in order:
            order.append(label)
    chosen = []
    for label in order:
        items = [first + i for i in range(len(labels)) if labels[i] == label]
        if n <= len(items):
            chosen += random.sample(items, n)
        elif otherwise == "all":
            chosen += items
        else:
            chosen += random.choices(items, k=n)
    return chosen


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shots", [1, 2, 4, 6, 16])
def test_coops_rule(shots, seed):
    random.seed(seed)
    train = sampled(TRAIN, 0, shots, "all")
    val = sampled(VAL, len(TRAIN), min(shots, 4), "all")
    split = choose_split(split_dataset(), shots, seed, "coop")
    assert (split.train.tolist(), split.val.tolist()) == (train, val)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shots", [1, 2, 4, 6, 16])
def test_clip_loras_rule(shots, seed):
    random.seed(seed)
    val = sampled(VAL, len(TRAIN), min(shots, 4), "repeat")
    train = sampled(TRAIN, 0, shots, "repeat")
    split = choose_split(split_dataset(), shots, seed, "clip-lora")
    assert (split.train.tolist(), split.val.tolist()) == (train, val)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shots", [1, 2])
def test_clip_loras_rule_on_imagenet(tmp_path, shots, seed):
    """One sample of a class gives its training and its validation images."""
    make_miniature(tmp_path, "imagenet", per_class=(6, 0, 2))
    dataset = load_dataset("imagenet", tmp_path)
    random.seed(seed)
    train, val = [], []
    for label in range(4):
        chosen = random.sample(range(6 * label, 6 * label + 6), 2 * shots)
        train += chosen[:shots]
        val += chosen[shots:]
    split = choose_split(dataset, shots, seed, "clip-lora")
    assert (split.train.tolist(), split.val.tolist()) == (train, val)


@pytest.mark.parametrize("spelling", [0, 1])
def test_coops_split_of_imagenet_needs_coops_file(tmp_path, spelling):
    """CoOp samples from lists in the order of the file system, also for the halves."""
    folder = make_miniature(tmp_path, "imagenet", spelling=spelling)
    whole = load_dataset("imagenet", tmp_path)
    for dataset in (whole, *base_and_new(whole)):
        with pytest.raises(
            ValueError,
            match=rf"--draw coop: {folder}/split_fewshot/shot_2-seed_1.pkl is missing, .* --draw own or clip-lora$",
        ):
            choose_split(dataset, 2, 1, "coop")


@pytest.mark.parametrize("name", [name for name in ELEVEN if name != "imagenet"])
def test_coops_split_of_the_other_ten_data_sets_needs_no_file(tmp_path, name):
    make_miniature(tmp_path, name)
    whole = load_dataset(name, tmp_path)
    for dataset in (whole, *base_and_new(whole)):
        split = choose_split(dataset, 2, 1, "coop")
        assert labels_of(dataset, split.train) == dict.fromkeys(range(len(dataset.class_names)), 2)


# ---- halves


@pytest.mark.parametrize("test", [TEST, None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_half_gets_its_part_of_the_split_of_the_whole(kind, test):
    whole = split_dataset(test=test)
    assert isinstance(whole.images, torch.Tensor)
    whole.images[:, 0, 0, 0] = torch.arange(len(whole.images))
    split = choose_split(whole, 3, 1, kind)
    for half, labels in zip(base_and_new(whole), ((0, 1), (2, 3)), strict=True):
        part = choose_split(half, 3, 1, kind)
        for ours, theirs in ((part.train, split.train), (part.val, split.val), (part.test, split.test)):
            expected = [i for i in theirs.tolist() if whole.labels[i] in labels]
            assert isinstance(half.images, torch.Tensor)
            assert half.images[ours, 0, 0, 0].tolist() == expected


# ---- the program's own files


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_miniature(tmp_path_factory.mktemp("original"), "oxford_pets", per_class=(6, 5, 2))


@pytest.fixture
def pets(tmp_path: Path, original: Path) -> Dataset:
    shutil.copytree(original, tmp_path / "oxford_pets", copy_function=os.link)
    return load_dataset("oxford_pets", tmp_path)


def same(a: FewShotSplit, b: FewShotSplit) -> bool:
    return all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("train", "val", "test"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_split_is_read_again(tmp_path, pets, kind):
    for dataset in (pets, digits(), split_dataset(), split_dataset(val=[], test=None)):
        split = choose_split(dataset, 2, 7, kind)
        path = tmp_path / "runs" / f"{dataset.name} 2 7.json"
        write_split(path, dataset, split)
        again = choose_split(dataset, 2, 0, str(path))
        assert same(again, split)
        assert (again.shots, again.seed, again.kind) == (2, 7, kind)
        assert same(read_split(path, dataset), split)
        assert same(choose_split(dataset, 2, 7, f"{tmp_path}/runs/{dataset.name} {{shots}} {{seed}}.json"), split)
        assert [file.name for file in path.parent.glob(f"*{dataset.name}*")] == [path.name]


@pytest.mark.parametrize("name", ["oxford_pets", "folder:{}/my data/", "csv:{}/my data/table.csv", "digits"])
def test_placeholders_in_a_path_have_the_spelling_of_runs_names(tmp_path, name, monkeypatch):
    """Thus runs on several data sets can use the splits of an earlier sweep again."""
    make_miniature(tmp_path, "oxford_pets")
    make_miniature(tmp_path, "csv").parent.rename(tmp_path / "my data")
    name = name.format(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    dataset = load_dataset(name, tmp_path)
    split = choose_split(dataset, 1, 2)
    run = Run("lora", 1, 0.0002, 2, data=name)
    write_split(tmp_path / "runs" / run.name / "draw.json", dataset, split)
    for root in ("~", tmp_path):
        path = f"{root}/runs/{{data}}-lora-{{shots}}shot-lr0.0002-seed{{seed}}/draw.json"
        assert same(choose_split(dataset, 1, 2, path), split)
        for half in base_and_new(dataset):
            assert same(choose_split(half, 1, 2, path), choose_split(half, 1, 2))
    with pytest.raises(FileNotFoundError, match=r"made_up-lora-1shot-lr0.0002-seed2/draw.json: there is no such file"):
        choose_split(split_dataset(), 1, 2, path)


def test_unknown_placeholders_are_named_where_there_is_no_such_file(tmp_path, pets):
    path = f"{tmp_path}/{{foo}}{{shots}}.json"
    with pytest.raises(
        FileNotFoundError,
        match=rf"there is no file {tmp_path}/\{{foo\}}2.json, and \{{foo\}} is no placeholder, expected "
        r"\{data\}, \{shots\}, \{seed\}$",
    ):
        choose_split(pets, 2, 0, path)
    write_split(tmp_path / "{foo}2.json", pets, choose_split(pets, 2, 0))
    assert same(choose_split(pets, 2, 0, path), choose_split(pets, 2, 0))


def test_file_names_that_are_not_utf8_are_written_and_read(tmp_path):
    folder = make_miniature(tmp_path, "folder")
    for path in sorted(folder.rglob("*.png")):
        path.rename(path.with_name(os.fsdecode(path.name.encode("latin-1"))))
    dataset = load_dataset(f"folder:{folder}")
    split = choose_split(dataset, 2, 0)
    write_split(tmp_path / "draw.json", dataset, split)
    assert same(read_split(tmp_path / "draw.json", dataset), split)


def test_the_file_of_a_split_names_the_images(tmp_path, pets):
    write_split(tmp_path / "draw.json", pets, choose_split(pets, 1, 0))
    content = json.loads((tmp_path / "draw.json").read_text())
    assert set(content) == {"dataset", "shots", "seed", "kind", "train", "val", "digest"}
    assert content["dataset"] == "oxford_pets"
    assert len(content["train"]) == len(content["val"]) == 4
    assert all((tmp_path / "oxford_pets" / name).is_file() for name in content["train"] + content["val"])


def test_the_file_of_a_split_serves_a_moved_data_set_and_its_halves(tmp_path, pets):
    split = choose_split(pets, 2, 0)
    write_split(tmp_path / "draw.json", pets, split)
    (tmp_path / "oxford_pets").rename(tmp_path / "OxfordPets")
    moved = load_dataset("oxford_pets", tmp_path)
    assert same(read_split(tmp_path / "draw.json", moved), split)
    base, new = base_and_new(moved)
    for half in (base, new):
        assert same(choose_split(half, 2, 5, str(tmp_path / "draw.json")), choose_split(half, 2, 0))
    write_split(tmp_path / "half.json", base, choose_split(base, 2, 0))
    assert same(read_split(tmp_path / "half.json", base), choose_split(base, 2, 0))
    with pytest.raises(ValueError, match=r"half.json: a split of oxford_pets-base, expected one of oxford_pets-new"):
        read_split(tmp_path / "half.json", new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train": ["images/None.jpg"]},
            r"train\[0\] is 'images/None.jpg', which oxford_pets does not have to train on",
        ),
        (
            {"val": ["images/Red_12.jpg"]},
            r"val\[0\] is 'images/Red_12.jpg', which oxford_pets does not have to validate",
        ),
        ({"train": ["images/Red_1.jpg", 3]}, r"train\[1\] is 3, which oxford_pets does not have to train on"),
        ({"train": ["images/Red_1.jpg", ["x"]]}, r"train\[1\] is \['x'\], which oxford_pets does not have"),
        ({"train": []}, r"train is empty, expected images to train on"),
        ({"dataset": "dtd"}, r"a split of dtd, expected one of oxford_pets"),
        ({"dataset": None}, r"expected a file written by an earlier run, with dataset, train and val"),
        ({"val": "images/Red_7.jpg"}, r"expected a file written by an earlier run, with dataset, train and val"),
        ({"shots": 8}, r"a split with 8 images per class, expected 2"),
        ({"shots": None, "train": ["images/Red_1.jpg"]}, r"a split with 1 images per class, expected 2"),
    ],
)
def test_the_message_about_a_wrong_file_names_the_mistake(tmp_path, pets, change, message):
    path = tmp_path / "draw.json"
    write_split(path, pets, choose_split(pets, 2, 0))
    path.write_text(json.dumps({**unsealed(json.loads(path.read_text())), **change}))
    with pytest.raises(ValueError, match=rf"{path}: {message}"):
        choose_split(pets, 2, 0, str(path))


def test_a_file_that_trains_on_test_images_is_refused(tmp_path, pets):
    """Red_12.jpg is a test image. The letters are an exception: all of them are training and test images."""
    path = tmp_path / "draw.json"
    write_split(path, pets, choose_split(pets, 2, 0))
    content = unsealed(json.loads(path.read_text()))
    path.write_text(json.dumps({**content, "train": ["images/Red_12.jpg", *content["train"][1:]]}))
    with pytest.raises(
        ValueError, match=r"train\[0\] is 'images/Red_12.jpg', which oxford_pets does not have to train on"
    ):
        read_split(path, pets)
    write_split(path, letters(), choose_split(letters(), 1, 0))
    assert same(read_split(path, letters()), choose_split(letters(), 1, 0))


def test_files_that_hold_no_split_are_refused(tmp_path, pets):
    with pytest.raises(FileNotFoundError, match=r"none.json: there is no such file, expected a split of oxford_pets"):
        choose_split(pets, 2, 0, str(tmp_path / "none.json"))
    for content in (b"{", b"\xff", b"[]", b"3"):
        (tmp_path / "draw.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"draw.json: expected (JSON|a file written by an earlier run)"):
            choose_split(pets, 2, 0, str(tmp_path / "draw.json"))


def test_an_interrupted_write_leaves_the_old_file(tmp_path, pets, monkeypatch):
    path = tmp_path / "draw.json"
    write_split(path, pets, choose_split(pets, 2, 0))
    before = path.read_bytes()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_split(path, pets, choose_split(pets, 2, 1))
    assert path.read_bytes() == before
    assert list(tmp_path.glob("*.json*")) == list(tmp_path.glob("*draw*")) == [path]


# ---- CoOp's files


class Datum:
    """The class of Dassl: four plain values under these names."""

    def __init__(self, impath: Any, label: Any, classname: Any, domain: Any = 0):
        self._impath = impath
        self._label = label
        self._domain = domain
        self._classname = classname


@pytest.fixture
def dassl(monkeypatch) -> None:
    """Lets `pickle.dumps` find the module of `Datum`; the program that reads the pickle has no such module."""
    module: Any = types.ModuleType("dassl.data.datasets.base_dataset")
    module.Datum = Datum
    monkeypatch.setattr(Datum, "__module__", module.__name__)
    for name in ("dassl", "dassl.data", "dassl.data.datasets"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def data(dataset: Dataset, indices: list[int], root: str) -> list[Datum]:
    """The records of these images in CoOp's file."""
    images, labels = dataset.image_names(torch.tensor(indices)), dataset.labels[indices].tolist()
    return [
        Datum(f"{root}{name}", label, dataset.class_names[label]) for name, label in zip(images, labels, strict=True)
    ]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("root", ["/data/datasets/oxford_pets/", "C:\\data\\oxford_pets\\", "", "./images/images/x/"])
@pytest.mark.usefixtures("dassl")
def test_coops_files_are_read_with_paths_of_any_machine(tmp_path, pets, root, protocol):
    train, val = [1, 7, 20, 14], [24, 29, 34, 39]
    content = {"train": data(pets, train, root), "val": data(pets, val, root)}
    folder = tmp_path / "oxford_pets" / "split_fewshot"
    folder.mkdir()
    (folder / "shot_1-seed_3.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    split = choose_split(pets, 1, 3, "coop")
    assert (split.train.tolist(), split.val.tolist(), split.test.tolist()) == (train, val, list(range(44, 52)))
    assert (split.shots, split.seed, split.kind) == (1, 3, "coop")
    assert choose_split(pets, 1, 2, "coop").train.tolist() != train  # there is no file of this seed
    assert same(choose_split(pets, 1, 9, str(folder / "shot_1-seed_3.pkl")), split)
    assert same(choose_split(pets, 1, 3, f"{folder}/shot_{{shots}}-seed_{{seed}}.pkl"), split)
    with pytest.raises(ValueError, match=r"shot_1-seed_3.pkl: a split with 1 images per class, expected 2"):
        choose_split(pets, 2, 3, str(folder / "shot_1-seed_3.pkl"))
    for half, first in zip(base_and_new(pets), (0, 2), strict=True):
        part = choose_split(half, 1, 3, "coop")
        assert half.image_names(part.train) == pets.image_names(torch.tensor(train[first : first + 2]))


@pytest.mark.usefixtures("dassl")
def test_coops_file_of_imagenet_has_no_validation_images(tmp_path):
    """CoOp validates ImageNet on the test set. The paths in the file have a folder images/ that is not here."""
    make_miniature(tmp_path, "imagenet", spelling=1)
    dataset = load_dataset("imagenet", tmp_path)
    path = tmp_path / "shots.pkl"
    path.write_bytes(pickle.dumps({"train": data(dataset, [0, 3, 6, 9], "/d/imagenet/images/")}))
    split = choose_split(dataset, 1, 0, str(path))
    assert (split.train.tolist(), split.val.tolist()) == ([0, 3, 6, 9], [])
    assert (split.shots, split.seed) == (None, None)
    cached = tmp_path / "imagenet" / "split_fewshot" / "shot_1-seed_5.pkl"
    cached.parent.mkdir()
    path.rename(cached)
    assert same(choose_split(dataset, 1, 5, "coop"), split)
    assert [choose_split(half, 1, 5, "coop").train.tolist() for half in base_and_new(dataset)] == [[0, 3], [0, 3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train": [Datum("/d/images/Gone.jpg", 0, "red")]},
            r"train\[0\] is '/d/images/Gone.jpg', which oxford_pets does",
        ),
        (
            {"train": [Datum("/d/images/Red_12.jpg", 0, "red")]},
            r"train\[0\] is '/d/images/Red_12.jpg', which oxford_pets",
        ),
        (
            {"train": [Datum("/d/images/Red_1.jpg", 2, "red")]},
            r"train\[0\], /d/images/Red_1.jpg, has label 2, in oxford_p",
        ),
        ({"train": [Datum(["/d"], 2, "red")]}, r"expected a pickle .*\(the state of a Datum"),
        ({"train": [Datum("/d/images/Red_1.jpg", None, "red")]}, r"expected a pickle .*\(the state of a Datum"),
        ({"train": ["/d/images/Red_1.jpg"]}, r"train\[0\] is a str, expected a Datum of Dassl"),
        ({"train": [Datum]}, r"train\[0\] is a type, expected a Datum of Dassl"),
        ({"train": {}}, r"train is a dict, expected a list"),
        ({"train": []}, r"train is empty, expected images to train on"),
        ({"test": []}, r"expected a dict with the lists train and val"),
    ],
)
@pytest.mark.usefixtures("dassl")
def test_the_message_about_a_wrong_file_of_coops_names_the_mistake(tmp_path, pets, change, message):
    path = tmp_path / "shots.pkl"
    path.write_bytes(pickle.dumps({"train": data(pets, [0], ""), **change}))
    with pytest.raises(ValueError, match=rf"{path}(: )?{message}"):
        read_split(path, pets)


def test_a_split_of_image_files_is_refused_for_images_in_memory(tmp_path):
    (tmp_path / "shots.pkl").write_bytes(pickle.dumps({"train": []}))
    with pytest.raises(
        ValueError, match=r"shots.pkl: a split of image files, expected one of digits, whose images are no files"
    ):
        read_split(tmp_path / "shots.pkl", digits())


class Calls:
    """An object whose pickle calls a function of the writer's choice."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "asked"),
    [
        (os.system, "posix.system"),
        (eval, "builtin.*eval"),
        (getattr, "builtin.*getattr"),
        (Path, "pathlib.*Path"),
        (list, "list"),
    ],
)
@pytest.mark.usefixtures("dassl")
def test_a_pickle_that_calls_other_functions_is_refused_without_calling_them(tmp_path, pets, function, asked, protocol):
    mark = tmp_path / "ran"
    arguments = {os.system: f"touch {mark}", eval: f"open({str(mark)!r}, 'w')"}.get(function, "x")
    path = tmp_path / "shots.pkl"
    path.write_bytes(pickle.dumps({"train": [Calls(function, arguments)]}, protocol=protocol))
    with pytest.raises(
        ValueError, match=rf"{path}: expected a pickle of Dassl's Datum .*\((it asks for .*{asked}|it uses the instr)"
    ):
        read_split(path, pets)
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.usefixtures("dassl")
def test_a_pickle_cannot_call_or_change_the_known_class(tmp_path, pets, protocol):
    """The class is not called with arguments, and the instruction BUILD sets nothing on it."""
    path = tmp_path / "shots.pkl"
    path.write_bytes(pickle.dumps({"train": [Calls(Datum, "os", "system")]}, protocol=protocol))
    with pytest.raises(ValueError, match=r"shots.pkl: expected a pickle of Dassl"):
        read_split(path, pets)
    name = b"cdassl.data.datasets.base_dataset\nDatum\n"
    for state in (b"}X\x01\x00\x00\x00aK\x01s", b"N}X\x01\x00\x00\x00aK\x01s\x86"):
        path.write_bytes(b"\x80\x02}X\x05\x00\x00\x00train]" + name + state + b"bas.")
        with pytest.raises(ValueError, match=r"shots.pkl: expected a pickle of Dassl"):
            read_split(path, pets)
    path.write_bytes(b"\x80\x02}X\x05\x00\x00\x00train](" + name + b")\x81es.")  # a Datum without its state
    with pytest.raises(ValueError, match=r"train\[0\] is a Record, expected a Datum of Dassl"):
        read_split(path, pets)


@pytest.mark.usefixtures("dassl")
def test_a_damaged_pickle_is_named(tmp_path, pets):
    whole = pickle.dumps({"train": data(pets, [0, 6], "")})
    path = tmp_path / "shots.pkl"
    for content in (whole[: len(whole) // 2], b"", b"no pickle", b"\x80\x02cno.such\nmodule\n."):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path}: expected a pickle of Dassl's Datum objects alone"):
            read_split(path, pets)
    with pytest.raises(FileNotFoundError, match=r"gone.pkl: there is no such file, expected a split of oxford_pets"):
        read_split(tmp_path / "gone.pkl", pets)
