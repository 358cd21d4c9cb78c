"""Data sets against the images in them: miniatures, in which an image's colour is its class."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import open_clip
import pytest
import torch
import torchvision.datasets
from miniature_datasets import COLOURS, MINIATURES, WNIDS, colour_of, draw_image, make_miniature
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from PIL import Image, PngImagePlugin
from torch import Tensor

from complora_kernels.fewshot import decode
from complora_kernels.fewshot.datasets import (
    DOMAIN_SHIFTS,
    ELEVEN,
    NAMES,
    Dataset,
    base_and_new,
    check_dataset,
    digits,
    letters,
    load_dataset,
    pictures,
)
from complora_kernels.fewshot.datasets.dataset import check_distinct
from complora_kernels.fewshot.datasets.downloads import SIZES, Size
from complora_kernels.fewshot.datasets.layouts import LAYOUTS
from complora_kernels.fewshot.datasets.ratio import ratio_split
from complora_kernels.fewshot.decode import load_crops
from complora_kernels.fewshot.templates import prompts

BY_JSON = [name for name in ELEVEN if name not in ("imagenet", "fgvc_aircraft")]
FIRST_FOUR = ("red", "green", "dark_blue", "yellow")


def colours(dataset: Dataset, indices: Tensor) -> list[str]:
    """The colours of the images of these indices."""
    assert isinstance(dataset.images, tuple)
    return [colour_of(dataset.images[i]) for i in indices.tolist()]


def names(dataset: Dataset, indices: Tensor) -> list[str]:
    """The class names of the images of these indices."""
    return [dataset.class_names[label].replace(" ", "_") for label in dataset.labels[indices].tolist()]


def edit(path: Path, change: Any) -> Path:
    """Change what a JSON file holds."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """The split file of a miniature in place."""
    return make_miniature(tmp_path, "oxford_pets") / "split_zhou_OxfordPets.json"


# ---- the known data sets


@pytest.mark.parametrize("spelling", [0, 1])
@pytest.mark.parametrize("name", ELEVEN)
def test_labels_and_class_names_match_the_images(tmp_path, name, spelling):
    folder = make_miniature(tmp_path, name, spelling=spelling)
    dataset = load_dataset(name, tmp_path)
    assert (dataset.name, dataset.root, dataset.can_be_mirrored) == (name, folder, True)
    assert dataset.test is not None
    for indices, n in ((dataset.train, 3), (dataset.val, 0 if name == "imagenet" else 1), (dataset.test, 2)):
        assert (indices.dtype, dataset.labels.dtype) == (torch.int64, torch.int64)
        assert Counter(dataset.labels[indices].tolist()) == {label: n for label in range(4) if n}
        if name != "imagenet" or spelling == 0:
            assert names(dataset, indices) == colours(dataset, indices)
    everything = torch.cat([dataset.train, dataset.val, dataset.test])
    assert sorted(everything.tolist()) == list(range(len(dataset.images)))
    assert len(set(dataset.images)) == len(dataset.images)


@pytest.mark.parametrize("name", DOMAIN_SHIFTS)
def test_shifted_domains_are_for_testing_only(tmp_path, name):
    make_miniature(tmp_path, name)
    dataset = load_dataset(name, tmp_path)
    assert dataset.test is not None
    assert len(dataset.train) == len(dataset.val) == 0
    assert Counter(dataset.labels[dataset.test].tolist()) == dict.fromkeys(range(4), 2)
    assert names(dataset, dataset.test) == colours(dataset, dataset.test)


def test_labels_of_files_are_those_of_the_split(tmp_path):
    """The order of the lists does not matter."""
    folder = make_miniature(tmp_path, "dtd")
    edit(folder / "split_zhou_DescribableTextures.json", lambda split: [part.reverse() for part in split.values()])
    dataset = load_dataset("dtd", tmp_path)
    assert dataset.class_names == FIRST_FOUR
    assert dataset.labels[dataset.train].tolist() == [3] * 3 + [2] * 3 + [1] * 3 + [0] * 3
    assert dataset.image_names(dataset.train[:2]) == ["images/yellow/yellow_0021.jpg", "images/yellow/yellow_0020.jpg"]
    assert names(dataset, dataset.train) == colours(dataset, dataset.train)


def test_folders_of_numbers_are_ordered_as_numbers(tmp_path):
    """10 comes after 2, other than in torchvision's ImageFolder."""
    make_miniature(tmp_path, "imagenet_v2", classes=12)
    dataset = load_dataset("imagenet_v2", tmp_path)
    assert dataset.test is not None
    assert names(dataset, dataset.test) == colours(dataset, dataset.test)
    assert dataset.class_names[10] == "orange"


def test_imagenets_class_names_are_known_without_a_file(tmp_path):
    make_miniature(tmp_path, "imagenet", spelling=1)
    dataset = load_dataset("imagenet", tmp_path)
    assert (
        dataset.class_names
        == tuple(IMAGENET_CLASSNAMES[:4])
        == ("tench", "goldfish", "great white shark", "tiger shark")
    )
    for name in ("imagenet_a", "imagenet_sketch"):
        folder = make_miniature(tmp_path, name)
        (folder / "classnames.txt").unlink()
        assert load_dataset(name, tmp_path).class_names == dataset.class_names


def test_imagenets_file_of_class_names_serves_its_variants(tmp_path):
    make_miniature(tmp_path, "imagenet")
    folder = make_miniature(tmp_path, "imagenet_r", classes=2)
    (folder / "classnames.txt").unlink()
    assert load_dataset("imagenet_r", tmp_path).class_names == ("red", "green")


def test_without_the_file_and_without_timm_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    make_miniature(tmp_path, "imagenet", spelling=1)
    monkeypatch.setitem(sys.modules, "timm.data.imagenet_info", None)
    with pytest.raises(FileNotFoundError, match=r"imagenet/classnames.txt is missing, .*DATASETS.md#imagenet says"):
        load_dataset("imagenet", tmp_path)


def test_two_classes_of_imagenet_may_have_one_name(tmp_path):
    folder = make_miniature(tmp_path, "imagenet")
    (folder / "classnames.txt").write_text("".join(f"{wnid} missile\n" for wnid in WNIDS[:4]))
    assert load_dataset("imagenet", tmp_path).class_names == ("missile",) * 4


def test_loading_a_data_set_reads_no_image(tmp_path):
    for name in MINIATURES:
        make_miniature(tmp_path, name)
    for path in tmp_path.rglob("*"):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            path.write_bytes(b"")
    for name in (*ELEVEN, *DOMAIN_SHIFTS, f"folder:{tmp_path}/my folder", f"csv:{tmp_path}/my csv/table.csv"):
        check_dataset(name, tmp_path)
        load_dataset(name, tmp_path)


def test_names_list_every_known_data_set():
    assert sorted(NAMES) == sorted(["digits", "letters", *pictures.NAMES, *ELEVEN, *DOMAIN_SHIFTS])


# ---- what is missing


@pytest.mark.parametrize("name", [*ELEVEN, *DOMAIN_SHIFTS])
def test_a_missing_data_set_is_described(tmp_path, name):
    """The message has a tree, whose names are all in the miniature."""
    with pytest.raises(FileNotFoundError, match=rf"{name}: there is no folder {tmp_path}.*; expected in") as raised:
        load_dataset(name, tmp_path)
    with pytest.raises(FileNotFoundError) as checked:
        check_dataset(name, tmp_path)
    assert str(checked.value) == str(raised.value)
    make_miniature(tmp_path, name)
    lines = str(raised.value).splitlines()
    tree = [line.split()[0] for line in lines[1:] if line.startswith("  ")]
    present = {path.name + ("/" if path.is_dir() else "") for path in tmp_path.rglob("*")}
    assert len(tree) >= 2
    assert set(tree) <= present
    assert "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md#" in lines[-2]
    assert lines[-1].startswith(("Or let torchvision download", "There is no download: "))


@pytest.mark.parametrize("check", [load_dataset, check_dataset])
def test_a_missing_part_is_named(tmp_path, check):
    for name, part in (
        ("oxford_pets", "oxford_pets/split_zhou_OxfordPets.json"),
        ("dtd", "dtd/images"),
        ("fgvc_aircraft", "fgvc_aircraft/variants.txt"),
        ("imagenet", "imagenet/images/val"),
    ):
        make_miniature(tmp_path, name)
        path = tmp_path / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        with pytest.raises(FileNotFoundError, match=rf"{name}: {path} is missing; expected in {tmp_path}"):
            check(name, tmp_path)


@pytest.mark.parametrize("check", [load_dataset, check_dataset])
def test_unknown_names_and_no_folder_are_refused(check, tmp_path):
    for name in ("cifar10", "folder:", "csv", "digits:x"):
        with pytest.raises(
            ValueError,
            match=rf"data set '{name}': expected digits, letters, fashion, .*, imagenet, .*, ucf101, folder:PATH or "
            r"csv:PATH; for testing only: imagenet_v2, imagenet_sketch, imagenet_a, imagenet_r$",
        ):
            check(name, tmp_path)
    with pytest.raises(
        ValueError, match=r"data set 'dtd': no folder of data sets is given, expected the one that holds dtd/"
    ):
        check("dtd")
    with pytest.raises(FileNotFoundError, match=rf"dtd: there is no folder {tmp_path}/none; expected in"):
        check("dtd", tmp_path / "none")


# ---- splits that do not hold together


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["val"].append(["Gone.jpg", 0, "red"]), r"val\[4\] names .*/images/Gone.jpg, and there is no such"),
        (lambda s: s["test"][3].__setitem__(2, "lime"), r"test\[3\] calls label 1 'lime', train\[3\] calls it 'green'"),
        (
            lambda s: [e.__setitem__(1, 9) for p in s.values() for e in p if e[1] == 2],
            r"no image has label 2, expected .* 0 to 9",
        ),
        (
            lambda s: s["train"][2].__setitem__(1, -1),
            r"train\[2\] is \['Red_3.jpg', -1, 'red'\], expected \[file, label",
        ),
        (
            lambda s: s["train"][2].__setitem__(1, "0"),
            r"train\[2\] is \['Red_3.jpg', '0', 'red'\], expected \[file, label",
        ),
        (lambda s: s["train"][2].__setitem__(1, True), r"train\[2\] is \['Red_3.jpg', True, 'red'\], expected"),
        (lambda s: s["train"].__setitem__(1, "Red_2.jpg"), r"train\[1\] is Red_2.jpg, expected \[file, label from 0"),
        (lambda s: s.pop("val"), r"expected an object with the three lists train, val, test"),
        (lambda s: s.__setitem__("test", []), r"there are no images to test on"),
        (lambda s: s.__setitem__("train", s["train"][3:]), r"class 'red' \(label 0\) has no train image"),
        (
            lambda s: [e.__setitem__(2, "dark blue") for p in s.values() for e in p if e[1] == 0],
            r"classes 0 and 2 are called 'dark blue' and 'dark_blue', expected names that differ in more than case, b",
        ),
        (
            lambda s: [e.__setitem__(2, " Yellow ") for p in s.values() for e in p if e[1] == 1],
            r"classes 1 and 3 are called ' Yellow ' and 'yellow', expected names that differ in more than case, b",
        ),
        (lambda s: s["train"][2].__setitem__(2, " "), r"train\[2\] is \['Red_3.jpg', 0, ' '\], expected \[file, label"),
    ],
)
def test_the_message_about_a_wrong_split_names_the_entry(pets, change, message):
    edit(pets, change)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{pets}: {message}"):
        load_dataset("oxford_pets", pets.parents[1])


def test_a_split_that_is_no_json_is_named(pets):
    for content in (b"{", b"\xff\xfe", b"[1]"):
        pets.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{pets}: expected (JSON|an object)"):
            load_dataset("oxford_pets", pets.parents[1])


def test_errors_in_the_files_of_aircraft_name_the_line(tmp_path):
    folder = make_miniature(tmp_path, "fgvc_aircraft")
    lines = folder / "images_variant_val.txt"
    (folder / "images" / "0000014.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{lines}, line 2 names .*0000014.jpg, and there is no such file"):
        load_dataset("fgvc_aircraft", tmp_path)
    lines.write_text(lines.read_text().replace(" green", " concorde"))
    with pytest.raises(ValueError, match=rf"{lines}, line 2: '0000014 concorde', expected an image and a class of var"):
        load_dataset("fgvc_aircraft", tmp_path)
    with (folder / "variants.txt").open("a") as file:
        file.write("red\n")
    lines.write_text(lines.read_text().replace(" concorde", " green"))
    draw_image(folder / "images" / "0000014.jpg", "green", 14)
    with pytest.raises(ValueError, match=r"classes 0 and 4 are called 'red' and 'red', expected names that differ"):
        load_dataset("fgvc_aircraft", tmp_path)


@pytest.mark.parametrize("check", [load_dataset, check_dataset])
def test_a_class_in_only_one_of_train_and_val_is_named(tmp_path, check):
    folder = make_miniature(tmp_path, "imagenet")
    shutil.rmtree(folder / "images" / "val" / WNIDS[2])
    with pytest.raises(ValueError, match=rf"the class '{WNIDS[2]}' is in train/ and not in val/, expected it in both"):
        check("imagenet", tmp_path)


@pytest.mark.parametrize("check", [load_dataset, check_dataset])
@pytest.mark.parametrize(
    ("split", "advice"), [("val", r"run, in that folder, .*/valprep\.sh"), ("train", r"as .*/extract_ILSVRC\.sh does")]
)
def test_images_of_imagenet_must_be_sorted(tmp_path, check, split, advice):
    """The archives have the images without folders of classes."""
    images = make_miniature(tmp_path, "imagenet") / "images" / split
    for path in images.rglob("*.JPEG"):
        path.rename(images / path.name)
    for path in images.glob("n*[!G]"):
        path.rmdir()
    with pytest.raises(ValueError, match=rf"{images}: there are no folders of classes, expected n0.*: .*{advice}"):
        check("imagenet", tmp_path)


@pytest.mark.parametrize("check", [load_dataset, check_dataset])
def test_unknown_classes_of_imagenet_are_named(tmp_path, check):
    folder = make_miniature(tmp_path, "imagenet")
    for split in ("train", "val"):
        (folder / "images" / split / WNIDS[1]).rename(folder / "images" / split / "n00000000")
    with pytest.raises(ValueError, match=r"the folder 'n00000000' is no class of ImageNet, or classnames.txt lacks it"):
        check("imagenet", tmp_path)


def test_empty_and_unknown_classes_of_shifted_domains_are_named(tmp_path):
    folder = make_miniature(tmp_path, "imagenet_sketch")
    for path in (folder / "images" / WNIDS[1]).iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(ValueError, match=r"images: class 'green' \(label 1\) has no test image"):
        load_dataset("imagenet_sketch", tmp_path)
    (folder / "images" / WNIDS[1]).rename(folder / "images" / "n00000000")
    with pytest.raises(ValueError, match=r"the folder 'n00000000' is no class of ImageNet, or classnames.txt lacks it"):
        load_dataset("imagenet_sketch", tmp_path)


@pytest.mark.parametrize("check", [load_dataset, check_dataset])
def test_errors_in_classnames_txt_name_the_line(tmp_path, check):
    folder = make_miniature(tmp_path, "imagenet")
    for lines, message in (
        ("n01440764", "expected a folder name, a"),
        ("n1 a\n\nn1 b", "the folder 'n1' has a name alr"),
    ):
        (folder / "classnames.txt").write_text(lines)
        with pytest.raises(ValueError, match=rf"classnames.txt, line {len(lines.splitlines())}: .*{message}"):
            check("imagenet", tmp_path)
    (folder / "classnames.txt").write_bytes("\ufeffn01440764 é\r\nn01443537 ".encode() + b"\xe9\r\n")
    with pytest.raises(ValueError, match=r"classnames.txt, line 2: .*, expected text in UTF-8"):
        check("imagenet", tmp_path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_files_may_have_the_line_ends_of_any_system(tmp_path, end):
    folder = make_miniature(tmp_path, "imagenet")
    path = folder / "classnames.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", end.encode()))
    assert load_dataset("imagenet", tmp_path).class_names == ("red", "green", "dark blue", "yellow")
    make_miniature(tmp_path, "csv")
    path = tmp_path / "my csv" / "table.csv"
    path.write_bytes(path.read_bytes().replace(b"\r\n", end.encode()))
    assert load_dataset(f"csv:{path}").class_names == tuple(sorted(FIRST_FOUR))


# ---- one's own


def test_a_folder_of_classes_is_split_by_the_names_of_its_files(tmp_path):
    folder = make_miniature(tmp_path, "folder", per_class=(5, 2, 3))
    (folder / "red" / "notes.txt").write_text("no image")
    (folder / "red" / ".hidden.png").write_bytes(b"")
    (folder / ".git").mkdir()
    dataset = load_dataset(f"folder:{folder}")
    assert dataset.test is not None
    assert dataset.name == "my folder"
    assert dataset.class_names == tuple(sorted(FIRST_FOUR))
    for indices, n in ((dataset.train, 5), (dataset.val, 2), (dataset.test, 3)):
        assert Counter(names(dataset, indices)) == dict.fromkeys(FIRST_FOUR, n)
        assert names(dataset, indices) == colours(dataset, indices)
    first = dataset.image_names(dataset.test)
    # The first three of the ten by `printf 'dark_blue/0 é.png' | sha256sum`
    assert first[:3] == ["dark_blue/3 é.png", "dark_blue/5 é.png", "dark_blue/8 é.png"]
    shutil.move(folder, tmp_path / "moved")
    moved = load_dataset(f"folder:{tmp_path}/moved")
    assert moved.test is not None
    assert moved.image_names(moved.test) == first


def test_the_split_does_not_depend_on_order_or_other_images():
    files = [f"{label}/{i}.jpg" for label in "ab" for i in range(20)]
    entries = [(Path(file), "ab".index(file[0])) for file in files]
    split = ratio_split(entries, files, "ab", Path())
    assert {part: len(found) for part, found in split.items()} == {"train": 20, "val": 8, "test": 12}
    backwards = ratio_split(entries[::-1], files[::-1], "ab", Path())
    assert {part: set(found) for part, found in split.items()} == {
        part: set(found) for part, found in backwards.items()
    }
    without_b = ratio_split(entries[:20], files[:20], "ab", Path())
    assert without_b["test"] == [entry for entry in split["test"] if entry[1] == 0]


def test_the_split_does_not_depend_on_the_unicode_form_of_a_name():
    tested = []
    for form in ("caf\u00e9", "cafe\u0301"):
        files = [f"{form} {i}.jpg" for i in range(20)]
        split = ratio_split([(Path(str(i)), 0) for i in range(20)], files, ["a"], Path())
        tested.append([path for path, _ in split["test"]])
    assert tested[0] == tested[1]


@pytest.mark.parametrize(
    ("n", "shares"), [(2, (1, 0, 1)), (3, (1, 1, 1)), (4, (2, 1, 1)), (10, (5, 2, 3)), (99, (49, 20, 30))]
)
def test_small_classes_can_be_split(n, shares):
    files = [str(i) for i in range(n)]
    split = ratio_split([(Path(file), 0) for file in files], files, ["a"], Path())
    assert tuple(len(split[part]) for part in ("train", "val", "test")) == shares


def test_a_class_of_one_image_cannot_be_split(tmp_path):
    folder = make_miniature(tmp_path, "folder")
    draw_image(folder / "white" / "alone.png", "white", 0)
    with pytest.raises(ValueError, match=r"my folder: class 'white' has 1 image, expected at least 2 to split it"):
        load_dataset(f"folder:{folder}")


@pytest.mark.parametrize("parts", [("train", "val", "test"), ("train", "test")])
def test_a_folder_with_a_split_keeps_it(tmp_path, parts):
    for part in parts:
        for colour in FIRST_FOUR:
            for number in range(len(part)):
                draw_image(tmp_path / part / colour / f"{number}.JPG", colour, number)
    (tmp_path / "other").mkdir()
    dataset = load_dataset(f"folder:{tmp_path}")
    assert dataset.test is not None
    for indices, part in ((dataset.train, "train"), (dataset.val, "val"), (dataset.test, "test")):
        n = len(part) if part in parts else 0
        assert Counter(names(dataset, indices)) == {colour: n for colour in FIRST_FOUR if n}
        assert names(dataset, indices) == colours(dataset, indices)
    assert dataset.image_names(dataset.test[:1]) == ["test/dark_blue/0.JPG"]


def test_classes_of_a_folder_can_be_named(tmp_path):
    folder = make_miniature(tmp_path, "folder")
    (folder / "red").rename(folder / "0 red")
    lines = ["green the green one", "dark_blue  dark blue", "0 red\tred", "yellow yellow"]
    (folder / "classnames.txt").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    dataset = load_dataset(f"folder:{folder}")
    assert dataset.class_names == ("red", "dark blue", "the green one", "yellow")
    (folder / "classnames.txt").write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match=r"classnames.txt: there is no line for the folder 'green'"):
        load_dataset(f"folder:{folder}")
    for extra in ("grey grey", "0 red"):
        (folder / "classnames.txt").write_text("\n".join(["", *lines[:2], extra]))
        with pytest.raises(
            ValueError,
            match=rf"{folder}/classnames.txt, line 4: there is no folder '{extra.split()[0]}', expected one of "
            r"'0 red', 'dark_blue', 'green', 'yellow'; a tab behind a folder's name allows blanks in it",
        ):
            load_dataset(f"folder:{folder}")


def lay_split(folder: Path, kind: str, tested: int) -> str:
    """Nine classes with an image to train on, the first of which have one to test on; as `load_dataset` calls them."""
    rows = ["path,label,split"]
    for part, n in (("train", 9), ("test", tested)):
        for label in range(n):
            draw_image(folder / part / f"class {label}" / "0.png", "red", label)
            rows.append(f"{part}/class {label}/0.png,class {label},{part}")
    return f"csv:{table(folder, *rows)}" if kind == "csv" else f"folder:{folder}"


@pytest.mark.parametrize("kind", ["folder", "csv"])
@pytest.mark.parametrize(
    ("tested", "named"),
    [
        (8, "'class 8'"),
        (4, "'class 4', 'class 5', 'class 6', 'class 7', 'class 8'"),
        (2, "'class 2', 'class 3', 'class 4', 'class 5', 'class 6' and 2 more"),
    ],
)
def test_classes_without_a_test_image_are_named_once(tmp_path, caplog, kind, tested, named):
    name = lay_split(tmp_path, kind, tested)
    for _ in range(2):
        load_dataset(name)
    path = name.partition(":")[2]
    assert caplog.record_tuples == [
        (
            "complora_kernels",
            logging.WARNING,
            f"{path}: there is no image to test on of {named}, which the accuracy leaves out",
        )
    ]


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_no_warning_where_all_classes_have_test_images(tmp_path, caplog, kind):
    load_dataset(lay_split(tmp_path / "given", kind, 9))
    load_dataset(f"{kind}:{make_miniature(tmp_path, kind)}")
    assert not caplog.records


@pytest.mark.parametrize("kind", ["folder", "csv", "oxford_pets"])
def test_a_single_class_is_refused(tmp_path, kind):
    path = make_miniature(tmp_path, kind, classes=1)
    name = kind if kind == "oxford_pets" else f"{kind}:{path}"
    with pytest.raises(ValueError, match=rf"{path}.*: there is 1 class, 'red', expected at least 2"):
        load_dataset(name, tmp_path)


def test_names_with_blanks_and_of_any_script_work(tmp_path):
    folder = tmp_path / "mes données"
    for label, colour in enumerate(FIRST_FOUR[:2]):
        for number in range(4):
            draw_image(folder / f"класс {label}" / f"图 {number} ü.png", colour, number)
    dataset = load_dataset(f"folder:{folder}")
    assert dataset.class_names == ("класс 0", "класс 1")
    assert isinstance(dataset.images, tuple)
    assert load_crops(dataset.images, (8, 8)).shape == (8, 3, 8, 8)


# ---- folders as people have them


@pytest.fixture
def plugins(monkeypatch) -> None:
    """Pillow's formats as they are before any plugin, whatever a test adds; without pillow-heif."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(decode, "register_plugins", decode.register_plugins.__wrapped__)
    decode.register_plugins()
    for registry in ("ID", "OPEN", "EXTENSION"):
        monkeypatch.setattr(Image, registry, getattr(Image, registry).copy())


@pytest.mark.usefixtures("plugins")
def test_every_file_is_read_or_counted_once(tmp_path, caplog):
    """Images may have any suffix and lie in folders below; files of operating systems do not count."""
    photos = ["0.JPG", "1.jfif", "2.jpe", "3.jpeg", "album/4.jpg", "album/of 2020/5.PNG", "album 2/4.jpg", "6.Jfif"]
    data = tmp_path / "data"
    for colour in ("red", "green"):
        for number, name in enumerate(photos):
            draw_image(tmp_path / "plain.png", colour, number)
            (data / colour / name).parent.mkdir(parents=True, exist_ok=True)
            with Image.open(tmp_path / "plain.png") as image:
                image.save(data / colour / name, format="PNG" if name.endswith("PNG") else "JPEG")
    left_behind = ("Thumbs.db", "desktop.ini", ".DS_Store", "._0.JPG", "@eaDir/0.jpg", "__MACOSX/0.jpg", ".git/0.jpg")
    for name in left_behind:
        write(data / "red" / name, "")
        write(data / name, "")
    load_dataset(f"folder:{data}")
    assert not caplog.records
    for name in ("red/7.HEIC", "green/8.heic", "red/album/notes.txt", "green/of no suffix", "beside.jpg"):
        write(data / name, "")
    load_dataset(f"folder:{data}")
    dataset = load_dataset(f"folder:{data}")
    assert dataset.test is not None
    everything = torch.cat([dataset.train, dataset.val, dataset.test])
    expected = sorted(f"{colour}/{name}" for colour in ("red", "green") for name in photos)
    assert sorted(map(str, dataset.image_names(everything))) == expected
    assert names(dataset, everything) == colours(dataset, everything)
    assert caplog.messages == [
        f"{data}: left out are files without the suffix of an image: 2 .heic (such as 'green/8.heic'), 1 without a "
        "suffix (such as 'green/of no suffix'), 1 .txt (such as 'red/album/notes.txt'); images outside of the folders "
        "of classes: 1 (such as 'beside.jpg'); .heic and .heif are read where pillow-heif is installed"
    ]


@pytest.mark.usefixtures("plugins")
def test_formats_of_pillows_plugins_are_read(tmp_path, monkeypatch):
    """Here PNG files by another suffix, as a plugin of Pillow's would have them; pillow-heif registers itself so."""

    class Plugin(PngImagePlugin.PngImageFile):
        format = "HEIF"

    def register() -> None:
        Image.register_open("HEIF", Plugin)
        Image.register_extension("HEIF", ".heic")

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    for colour in ("red", "green"):
        for number in range(3):
            draw_image(tmp_path / colour / f"{number}.png", colour, number)
            (tmp_path / colour / f"{number}.png").rename(tmp_path / colour / f"{number}.HEIC")
    dataset = load_dataset(f"folder:{tmp_path}")
    assert len(dataset.images) == 6
    assert names(dataset, dataset.train) == colours(dataset, dataset.train)


def test_links_are_followed_once(tmp_path):
    """Into other folders; those to themselves, to a folder above or to nothing do not hang."""
    folder = make_miniature(tmp_path, "folder")
    plain = load_dataset(f"folder:{folder}")
    more = tmp_path / "more"
    draw_image(more / "7.png", "red", 7)
    (folder / "red" / "a").symlink_to(more)
    (folder / "red" / "b").symlink_to(more)
    (folder / "red" / "up").symlink_to(folder)
    (folder / "red" / "itself").symlink_to("itself")
    (folder / "itself").symlink_to("itself")
    (more / "loop").symlink_to(folder / "red")
    dataset = load_dataset(f"folder:{folder}")
    assert isinstance(dataset.images, tuple)
    assert set(dataset.images) - set(plain.images) == {folder / "red" / "a" / "7.png"}
    (folder / "red" / "dead.jpg").symlink_to("dead.jpg")
    dataset = load_dataset(f"folder:{folder}")
    assert isinstance(dataset.images, tuple)
    with pytest.raises(OSError, match=r"dead.jpg"):
        load_crops(dataset.images, (8, 8))


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("Train", "valid", "TEST"), ("training", "Validation", "testing"), ("train", "VAL", "Test")],
)
def test_folders_of_splits_have_several_names(tmp_path, train, val, test):
    for part, n in ((train, 2), (val, 1), (test, 3)):
        for colour in FIRST_FOUR:
            for number in range(n):
                draw_image(tmp_path / part / colour / f"{number}.png", colour, number)
    dataset = load_dataset(f"folder:{tmp_path}")
    assert dataset.test is not None
    for indices, part, n in ((dataset.train, train, 2), (dataset.val, val, 1), (dataset.test, test, 3)):
        assert Counter(names(dataset, indices)) == dict.fromkeys(FIRST_FOUR, n)
        assert {str(name).partition("/")[0] for name in dataset.image_names(indices)} == {part}


def test_images_outside_of_the_folders_of_classes_are_counted(tmp_path, caplog):
    for path in ("train/red", "train/green", "test/red", "test/green", "extra/red", "extra/blue"):
        draw_image(tmp_path / path / "0.png", "red", 0)
    draw_image(tmp_path / "train" / "overview.png", "red", 0)
    assert len(load_dataset(f"folder:{tmp_path}").images) == 4
    (tmp_path / "valid").mkdir()
    (tmp_path / "Val").mkdir()
    with pytest.raises(ValueError, match=rf"{tmp_path}: 'Val', 'valid' are all called like val/, expected one of them"):
        load_dataset(f"folder:{tmp_path}")
    (tmp_path / "val").mkdir()
    assert len(load_dataset(f"folder:{tmp_path}").images) == 4
    assert caplog.messages == [
        f"{tmp_path}: left out are images outside of the folders of classes: 3 (such as 'extra/blue/0.png')"
    ]


def test_a_folder_alone_in_the_given_one_is_the_data_set(tmp_path, caplog):
    """Unpacking an archive into a folder of its name gives such a layout."""
    inner = make_miniature(tmp_path / "my folder" / "my folder", "folder")
    write(tmp_path / "my folder" / "__MACOSX" / "0.jpg", "")
    plain = load_dataset(f"folder:{inner}")
    assert not caplog.records
    dataset = load_dataset(f"folder:{tmp_path}")
    assert dataset.test is not None
    assert plain.test is not None
    assert dataset.image_names(dataset.test) == plain.image_names(plain.test)
    assert caplog.messages == [
        f"{tmp_path}: the data set is the folder 'my folder/my folder/my folder', because it is alone there"
    ]


def test_a_warning_names_classes_that_hold_only_folders(tmp_path, caplog):
    """They may be parts of something else: a/red, b/red."""
    for path in ("a/red/0", "a/red/1", "b/red/0", "b/green/0"):
        draw_image(tmp_path / f"{path}.png", "red", 0)
    assert load_dataset(f"folder:{tmp_path}").class_names == ("a", "b")
    assert caplog.messages == [f"{tmp_path}: 'a', 'b' hold images in folders below alone, and are taken for classes"]


def test_a_class_without_images_or_with_anothers_name_is_refused(tmp_path):
    folder = make_miniature(tmp_path, "folder")
    (folder / "white").mkdir()
    with pytest.raises(ValueError, match=r"my folder: class 'white' \(label 3\) has no train image"):
        load_dataset(f"folder:{folder}")
    (folder / "white").rmdir()
    for number in range(2):
        draw_image(folder / "Red" / f"{number}.png", "red", 0)
    with pytest.raises(ValueError, match=r"classes 0 and 3 are called 'Red' and 'red', expected names that differ in"):
        load_dataset(f"folder:{folder}")
    shutil.rmtree(folder / "Red")
    (folder / "red").rename(folder / "two\nlines\t")
    assert load_dataset(f"folder:{folder}").class_names[2] == "two\nlines\t"


@pytest.mark.parametrize("name", ["train", "val", "test"])
@pytest.mark.parametrize("other", ["", "@eaDir"])
def test_a_class_may_have_the_name_of_a_split(tmp_path, name, other):
    folder = make_miniature(tmp_path, "folder")
    (folder / "red").rename(folder / name)
    if other:
        (folder / name / other).mkdir()
    dataset = load_dataset(f"folder:{folder}")
    assert dataset.class_names == tuple(sorted({*FIRST_FOUR, name} - {"red"}))
    assert [found.replace(name, "red") for found in names(dataset, dataset.train)] == colours(dataset, dataset.train)
    assert len(dataset.images) == 24


def test_two_classes_may_have_names_of_splits(tmp_path):
    folder = make_miniature(tmp_path, "folder")
    (folder / "red").rename(folder / "train")
    (folder / "green").rename(folder / "test")
    assert load_dataset(f"folder:{folder}").class_names == ("dark_blue", "test", "train", "yellow")


def test_images_beside_the_folders_of_a_split_are_no_class(tmp_path):
    for part in ("train", "test"):
        draw_image(tmp_path / part / "overview.png", "white", 0)
        for colour in FIRST_FOUR:
            draw_image(tmp_path / part / colour / "0.png", colour, 0)
    assert len(load_dataset(f"folder:{tmp_path}").images) == 8


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Cat", "cat"),
        ("big_cat", "big  CAT"),
        ("cat ", "_cat"),
        ("caf\u00e9", "cafe\u0301"),
        ("cat", "cats"),
        ("big cat", "bigcat"),
        ("Ma\u00dfe", "Masse"),
    ],
)
def test_class_names_must_differ_in_clips_tokens(one, other):
    tokens = open_clip.tokenize(prompts("a photo of a {}.", [one, other]))
    if torch.equal(tokens[0], tokens[1]):
        with pytest.raises(
            ValueError, match=f"x: classes 0 and 2 are called {one!r} and {other!r}, expected names that"
        ):
            check_distinct([one, "dog", other], Path("x"))
    else:
        check_distinct([one, "dog", other], Path("x"))


def test_class_names_that_are_not_utf8_are_refused(tmp_path):
    """Files may have them; of a class it makes no prompt."""
    folder = make_miniature(tmp_path, "folder")
    (folder / "red" / "0 é.png").rename(folder / "red" / os.fsdecode(b"\xe9.png"))
    assert len(load_dataset(f"folder:{folder}").images) == 24
    (folder / "red").rename(folder / os.fsdecode(b"\xe9"))
    with pytest.raises(ValueError, match=r"my folder: class '.udce9' \(label 3\) has a name that is not UTF-8"):
        load_dataset(f"folder:{folder}")


def test_folders_of_another_layout_are_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"folder:{tmp_path}/none: there is no such folder, expected\n  train/CLASS"
    ):
        load_dataset(f"folder:{tmp_path}/none")
    with pytest.raises(FileNotFoundError, match=r"there are no folders of classes, expected\n  train/CLASS"):
        check_dataset(f"folder:{tmp_path}")
    draw_image(tmp_path / "train" / "red" / "0.png", "red", 0)
    with pytest.raises(FileNotFoundError, match=r"there is train/CLASS/ and no test/CLASS/, expected\n  train/CLASS"):
        load_dataset(f"folder:{tmp_path}")
    draw_image(tmp_path / "test" / "0.png", "red", 0)  # an image without a class
    with pytest.raises(FileNotFoundError, match=r"there is train/CLASS/ and no test/CLASS/, expected\n  train/CLASS"):
        load_dataset(f"folder:{tmp_path}")
    (tmp_path / "test" / "0.png").unlink()
    (tmp_path / "train").rename(tmp_path / "learning")
    draw_image(tmp_path / "test" / "red" / "0.png", "red", 0)
    with pytest.raises(FileNotFoundError, match=r"there is test/CLASS/ and no train/CLASS/, expected\n  train/CLASS"):
        load_dataset(f"folder:{tmp_path}")
    (tmp_path / "learning").rename(tmp_path / "train")
    draw_image(tmp_path / "test" / "green" / "0.png", "green", 0)
    with pytest.raises(ValueError, match=rf"{tmp_path}: class 'green' \(label 0\) has no train image"):
        load_dataset(f"folder:{tmp_path}")


def table(folder: Path, *rows: str) -> Path:
    (folder / "table.csv").write_text("\n".join(rows) + "\n", encoding="utf-8-sig")
    return folder / "table.csv"


def test_a_table_is_split_like_the_folder_of_its_images(tmp_path):
    by_table = load_dataset(f"csv:{make_miniature(tmp_path, 'csv', per_class=(5, 2, 3))}")
    by_folder = load_dataset(f"folder:{make_miniature(tmp_path, 'folder', per_class=(5, 2, 3))}")
    assert by_table.name == "table"
    assert by_table.test is not None
    assert by_folder.test is not None
    assert by_table.class_names == by_folder.class_names
    for ours, theirs in (
        (by_table.train, by_folder.train),
        (by_table.val, by_folder.val),
        (by_table.test, by_folder.test),
    ):
        assert set(by_table.image_names(ours)) == set(by_folder.image_names(theirs))
        assert names(by_table, ours) == colours(by_table, ours)


def test_a_table_with_a_split_keeps_it(tmp_path):
    (tmp_path / "lists").mkdir()
    rows = ["split,note,label,path"]
    for i, (colour, part) in enumerate((c, p) for c in FIRST_FOUR for p in ("train", "test", "val")):
        draw_image(tmp_path / f"{i}, é.png", colour, i)
        rows.append(f'{part},"two\nlines","{colour}","../{i}, é.png"')
    dataset = load_dataset(f"csv:{table(tmp_path / 'lists', *rows)}")
    assert dataset.test is not None
    assert dataset.class_names == tuple(sorted(FIRST_FOUR))
    for indices in (dataset.train, dataset.val, dataset.test):
        assert names(dataset, indices) == colours(dataset, indices) == list(FIRST_FOUR)
    assert dataset.image_names(dataset.test[:1]) == ["../1, é.png"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("path,name", "a.png,x"), r": the columns are path, name, expected path,label\[,split\]"),
        ((), r": the columns are missing, expected path,label\[,split\]"),
        (
            ("path;label", "a.png;x"),
            r": the columns are path;label, expected .*, each once and with commas between them",
        ),
        (
            ("path,label,path", "a.png,x,b.png"),
            r": the columns are path, label, path, expected path,label.*, each once",
        ),
        (("path,label", "a.png,x", "gone.png,x"), r", line 3 names .*gone.png, and there is no such file"),
        (("path,label", "a.png"), r", line 2: label is empty"),
        (("path,label", ",x"), r", line 2: path is empty"),
        (
            ("path,label,split", "a.png,x,train", "b.png,x,valid"),
            r", line 3: split is 'valid', expected train, val, test",
        ),
        (
            ("path,label", "a.png,x", "b.png,x", "a.png,y"),
            r", line 4: 'a.png' is the image of line 2 too, expected it on",
        ),
        (("path,label,split", "a.png,x,train", "./a.png,x,test"), r", line 3: './a.png' is the image of line 2 too"),
        (("path,label", "up/../a.png,x", "b.png,x", "a.png,y"), r", line 4: 'a.png' is the image of line 2 too"),
        (("path,label", "a.png,x", "", "folder,x"), r", line 4 names .*folder, and there is no such file"),
        (("path,label", "a.png,x", "dead.png,x"), r", line 3 names .*dead.png, and there is no such file"),
        (("path,label", "a.png,x, big", "b.png,x"), r", line 2: 3 cells, expected 2; a cell with a comma needs quotes"),
        (("path,label", 'a.png,"x', "b.png,x"), r", line 3: unexpected end of data, expected a table with the columns"),
        (("path,label", "a.png,x", "b.png," + 200_000 * "x"), r", line 3: field larger than .*, expected a table with"),
        (("path,label", "a.png,Cat", "b.png,cat"), r": class 'Cat' has 1 image"),
        (
            ("path,label,split", "a.png,Cat,train", "b.png,cat,test"),
            r": classes 0 and 1 are called 'Cat' and 'cat', expected names that differ in",
        ),
        (("path,label", "a.png,x", "b.png,y"), r": class 'x' has 1 image, expected at least 2 to split it"),
        (("path,label,split", "a.png,x,train"), r": there are no images to test on"),
        (("path,label",), r": there are no images to test on"),
    ],
)
def test_errors_in_a_table_name_the_line(tmp_path, rows, message):
    for name in ("a", "b"):
        draw_image(tmp_path / f"{name}.png", "red", 0)
    (tmp_path / "folder").mkdir()
    (tmp_path / "dead.png").symlink_to("nowhere")
    path = table(tmp_path, *rows)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{path}{message}"):
        check_dataset(f"csv:{path}")


def test_absolute_and_relative_paths_of_a_table_name_the_same_image(tmp_path, monkeypatch):
    draw_image(tmp_path / "a.png", "red", 0)
    table(tmp_path, "path,label,split", "a.png,x,train", f"{tmp_path}/a.png,x,test")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"table.csv, line 3: '{tmp_path}/a.png' is the image of line 2 too"):
        load_dataset("csv:table.csv")


def test_a_table_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "table.csv").write_bytes("path,label\na.png,x\né.png,x\n".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{tmp_path}/table.csv, line 3: .*0xe9.*, expected text in UTF-8"):
        check_dataset(f"csv:{tmp_path}/table.csv")


def test_a_table_may_have_blanks_and_empty_cells_at_its_ends(tmp_path):
    for number in range(4):
        draw_image(tmp_path / f"{number}.png", "red", number)
    path = table(tmp_path, "", "label, path", '"a, b", 0.png,', "", ' "a, b",1.png', "c,2.png", "c,3.png")
    assert load_dataset(f"csv:{path}").class_names == ("a, b", "c")


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"csv:.*none.csv: there is no such file, expected a table with the columns"
    ):
        load_dataset(f"csv:{tmp_path}/none.csv")


# ---- downloads: torchvision's own classes on what they would have downloaded


def lay_download(root: Path, name: str) -> None:
    """Write the files that torchvision finds after a download, and accepts."""
    from scipy.io import savemat

    folder = root / "torchvision" / name
    colours = list(COLOURS)[:4]
    files = [(colour, number) for colour in colours for number in range(1, 11)]
    splits = {"train": range(1, 6), "val": range(6, 8), "test": range(8, 11)}
    if name == "dtd":
        for part, numbers in splits.items():
            lines = "".join(f"{colour}/{number}.jpg\n" for colour, number in files if number in numbers)
            write(folder / "dtd" / "dtd" / "labels" / f"{part}1.txt", lines)
        images = {file: folder / "dtd" / "dtd" / "images" / file[0] / f"{file[1]}.jpg" for file in files}
    elif name == "food101":
        for part, numbers in {"train": range(1, 8), "test": range(8, 11)}.items():
            lists = {colour: [f"{colour}/{number}" for number in numbers] for colour in colours}
            write(folder / "food-101" / "meta" / f"{part}.json", json.dumps(lists))
        images = {file: folder / "food-101" / "images" / file[0] / f"{file[1]}.jpg" for file in files}
    elif name == "fgvc_aircraft":
        data = folder / "fgvc-aircraft-2013b" / "data"
        for part, numbers in splits.items():
            lines = "".join(f"{colour}{number} {colour}\n" for colour, number in files if number in numbers)
            write(data / f"images_variant_{part}.txt", lines)
        write(data / "variants.txt", "\n".join(colours))
        images = {file: data / "images" / f"{file[0]}{file[1]}.jpg" for file in files}
    elif name == "oxford_pets":
        data = folder / "oxford-iiit-pet"
        for part, numbers in {"trainval": range(1, 8), "test": range(8, 11)}.items():
            lines = (
                f"{colour}_{number} {colours.index(colour) + 1} 1 1" for colour, number in files if number in numbers
            )
            write(data / "annotations" / f"{part}.txt", "\n".join(lines))
        images = {file: data / "images" / f"{file[0]}_{file[1]}.jpg" for file in files}
    elif name == "oxford_flowers":
        data = folder / "flowers-102"
        data.mkdir(parents=True)
        savemat(data / "imagelabels.mat", {"labels": [[colours.index(colour) + 1 for colour, _ in files]]})
        ids = {part: [i for i, (_, n) in enumerate(files, 1) if n in numbers] for part, numbers in splits.items()}
        savemat(data / "setid.mat", {"trnid": [ids["train"]], "valid": [ids["val"]], "tstid": [ids["test"]]})
        images = {file: data / "jpg" / f"image_{i:05d}.jpg" for i, file in enumerate(files, 1)}
    elif name == "caltech101":
        data = folder / "caltech101" / "101_ObjectCategories"
        images = {file: data / file[0] / f"image_{file[1]:04d}.jpg" for file in files}
        for extra in ("BACKGROUND_Google", "Faces_easy"):
            draw_image(data / extra / "image_0001.jpg", "white", 0)
    elif name == "eurosat":
        images = {file: folder / "eurosat" / "2750" / file[0] / f"{file[1]}.jpg" for file in files}
    else:
        data = folder / "SUN397"
        write(data / "ClassName.txt", "".join(f"/{colour[0]}/{colour}\n" for colour in colours))
        images = {file: data / file[0][0] / file[0] / f"sun_{file[1]}.jpg" for file in files}
    for (colour, number), path in images.items():
        draw_image(path, colour, number)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


SHARES = {
    "food101": (7, 0, 3),
    "oxford_pets": (7, 0, 3),
    **dict.fromkeys(("dtd", "oxford_flowers", "fgvc_aircraft"), (5, 2, 3)),
    **dict.fromkeys(("caltech101", "eurosat", "sun397"), (5, 2, 3)),  # split by us
}


@pytest.fixture
def small(monkeypatch) -> None:
    """Downloads are expected to be as large as `lay_download` makes them."""
    for name, shares in SHARES.items():
        images = tuple(4 * share for share in shares if share)
        monkeypatch.setitem(SIZES, name, Size(images, 4))
    for name in ("caltech101", "eurosat", "sun397"):
        monkeypatch.setitem(SIZES, name, Size((40,), 4))
    monkeypatch.setitem(SIZES, "caltech101", Size((41,), 5))  # the face is left out later
    monkeypatch.setattr(torchvision.datasets.flowers102, "check_integrity", lambda *_: True)  # accepts the checksums
    monkeypatch.setattr(torchvision.datasets.Flowers102, "classes", list(COLOURS)[:4])


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.usefixtures("small")
def test_downloads_have_splits_and_class_names(tmp_path, name, monkeypatch):
    lay_download(tmp_path, name)
    check_dataset(name, tmp_path, download=True)
    dataset = load_dataset(name, tmp_path, download=True)
    assert dataset.test is not None
    for indices, n in zip((dataset.train, dataset.val, dataset.test), SHARES[name], strict=True):
        assert Counter(dataset.labels[indices].tolist()) == {label: n for label in range(4) if n}
        assert [found.lower() for found in names(dataset, indices)] == colours(dataset, indices)
        assert dataset.image_names(indices) == sorted(map(str, dataset.image_names(indices)))
    for attribute in (
        "DTD",
        "Flowers102",
        "Food101",
        "FGVCAircraft",
        "OxfordIIITPet",
        "SUN397",
        "Caltech101",
        "EuroSAT",
    ):
        monkeypatch.delattr(torchvision.datasets, attribute)
    check_dataset(name, tmp_path)
    again = load_dataset(name, tmp_path)
    assert again.images == dataset.images
    assert torch.equal(again.labels, dataset.labels)


def test_sizes_list_every_data_set_with_a_download():
    """The published sizes: Caltech101 without its 467 background images, FGVC-Aircraft with a third in each split."""
    assert {name: (sum(size.images), size.classes) for name, size in SIZES.items()} == {
        "caltech101": (9144 - 467, 102 - 1),
        "oxford_pets": (7349, 37),
        "oxford_flowers": (8189, 102),
        "food101": (101 * 1000, 101),
        "fgvc_aircraft": (100 * 100, 100),
        "sun397": (108_754, 397),
        "dtd": (47 * 120, 47),
        "eurosat": (27_000, 10),
    }
    assert set(SIZES) == {name for name in ELEVEN if LAYOUTS[name].downloads}


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.usefixtures("small")
def test_an_interrupted_download_is_refused(tmp_path, name):
    """Torchvision lists what an archive's unpacking left behind."""
    lay_download(tmp_path, name)
    folder = tmp_path / "torchvision" / name
    kept = [path for path in sorted(folder.rglob("*.jpg")) if "Faces_easy" not in path.parts]
    kept[-1].unlink()  # the only test image of the last class
    for _ in range(2):
        with pytest.raises(
            OSError,
            match=rf"{name}: {folder} has (40|39|28 \+ 11|20 \+ 8 \+ 11) images of [45] classes, expected "
            r"(41|40|28 \+ 12|20 \+ 8 \+ 12) of [45]: the download was interrupted; delete this folder and try again",
        ):
            load_dataset(name, tmp_path, download=True)
        assert not (folder / "split.json").exists()
    shutil.rmtree(folder)
    lay_download(tmp_path, name)
    assert load_dataset(name, tmp_path, download=True).root == folder


@pytest.mark.usefixtures("small")
def test_classes_that_a_download_lacks_are_counted(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "eurosat", Size((40,), 5))
    lay_download(tmp_path, "eurosat")
    with pytest.raises(OSError, match=r"eurosat has 40 images of 4 classes, expected 40 of 5: the download was int"):
        load_dataset("eurosat", tmp_path, download=True)


@pytest.mark.parametrize(
    ("name", "lost", "instead"),
    [
        ("caltech101", "caltech101/101_ObjectCategories/BACKGROUND_Google", None),
        ("food101", "food-101/meta/test.json", b'{"red": ["red/'),
        ("food101", "food-101/meta/train.json", None),
        ("fgvc_aircraft", "fgvc-aircraft-2013b/data/variants.txt", b"red\n"),
        ("oxford_pets", "oxford-iiit-pet/annotations/test.txt", b"red_8 1"),
        ("sun397", "SUN397/ClassName.txt", b"/r/red\n"),
    ],
)
def test_missing_lists_of_an_interrupted_download_are_an_error_with_advice(tmp_path, name, lost, instead):
    lay_download(tmp_path, name)
    folder = tmp_path / "torchvision" / name
    path = folder / lost
    assert path.exists()
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if instead is not None:
        path.write_bytes(instead)
    with pytest.raises(
        OSError,
        match=rf"(?s){name}: torchvision's download failed: .*; if an earlier one was interrupted, delete {folder} and "
        rf"try again\n{name}: there is no folder",
    ):
        load_dataset(name, tmp_path, download=True)


def test_downloads_have_coops_class_names_where_their_own_are_poor(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "eurosat", Size((12,), 3))
    monkeypatch.setitem(SIZES, "sun397", Size((8,), 2))
    data = tmp_path / "torchvision" / "eurosat" / "eurosat" / "2750"
    for number in range(4):
        for name in ("AnnualCrop", "SeaLake", "River"):
            draw_image(data / name / f"{number}.jpg", "green", number)
    assert load_dataset("eurosat", tmp_path, download=True).class_names == ("Annual Crop Land", "River", "Sea or Lake")
    data = tmp_path / "torchvision" / "sun397" / "SUN397"
    write(data / "ClassName.txt", "/a/abbey\n/c/church/outdoor\n")
    for number in range(4):
        draw_image(data / "a" / "abbey" / f"sun_{number}.jpg", "green", number)
        draw_image(data / "c" / "church" / "outdoor" / f"sun_{number}.jpg", "green", number)
    assert load_dataset("sun397", tmp_path, download=True).class_names == ("abbey", "outdoor church")


def test_coops_layout_takes_precedence_over_a_download(tmp_path, monkeypatch):
    make_miniature(tmp_path, "dtd")
    monkeypatch.delattr(torchvision.datasets, "DTD")
    assert load_dataset("dtd", tmp_path, download=True).root == tmp_path / "dtd"


def test_a_failed_download_gives_advice(tmp_path, monkeypatch):
    def no_network(self: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.DTD, "_download", no_network)
    with pytest.raises(
        OSError, match=r"dtd: torchvision's download failed: .*no route to host.*\ndtd: there is no folder"
    ):
        load_dataset("dtd", tmp_path, download=True)


@pytest.mark.parametrize("check", [load_dataset, check_dataset])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("stanford_cars", "torchvision's download of it is dead"),
        ("imagenet", "torchvision does not download it"),
        ("ucf101", "torchvision does not have it"),
    ],
)
def test_the_message_tells_that_a_data_set_has_no_download(tmp_path, check, name, reason):
    with pytest.raises(FileNotFoundError, match=rf"(?s){name}: there is no folder .*There is no download: {reason}"):
        check(name, tmp_path, download=True)


# ---- halves


@pytest.mark.parametrize("name", ["digits", "oxford_pets", "imagenet_v2"])
def test_halves_divide_the_classes(tmp_path, name):
    if name != "digits":
        make_miniature(tmp_path, name, classes=5)
    whole = load_dataset(name, tmp_path)
    n = len(whole.class_names)
    halves = base_and_new(whole)
    assert [half.name for half in halves] == [f"{name}-base", f"{name}-new"]
    assert halves[0].class_names == whole.class_names[: (n + 1) // 2]
    assert halves[1].class_names == whole.class_names[(n + 1) // 2 :]
    for half, labels in zip(halves, (range((n + 1) // 2), range((n + 1) // 2, n)), strict=True):
        members = [i for i, label in enumerate(whole.labels.tolist()) if label in labels]
        assert len(half.images) == len(half.labels) == len(members)
        assert half.labels.tolist() == [label - labels[0] for label in whole.labels[members].tolist()]
        assert (half.can_be_mirrored, half.root) == (whole.can_be_mirrored, whole.root)
        for ours, theirs in ((half.train, whole.train), (half.val, whole.val), (half.test, whole.test)):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                expected = [i for i in theirs.tolist() if whole.labels[i] in labels]
                for i, j in zip(ours.tolist(), expected, strict=True):
                    same = half.images[i] == whole.images[j]
                    assert same.all() if isinstance(same, Tensor) else same


def test_a_single_class_has_no_halves():
    one = dataclasses.replace(digits(), class_names=("digit",))
    with pytest.raises(ValueError, match=r"digits has 1 class, expected at least 2"):
        base_and_new(one)


# ---- the bundled ones


def test_digits_are_the_scans_of_scikit_learn():
    from sklearn.datasets import load_digits

    scans: Any = load_digits()
    ours = digits()
    assert isinstance(ours.images, Tensor)
    assert ours.images.dtype == torch.uint8
    assert ours.images.shape == (1797, 3, 8, 8)
    grey = torch.from_numpy(scans.images / 16 * 255)
    for channel in range(3):
        assert (ours.images[:, channel] - grey).abs().max() <= 0.5
    assert ours.labels.tolist() == scans.target.tolist()
    assert ours.class_names[7] == "digit seven"
    assert ours.train.tolist() == list(range(1797))
    assert (len(ours.val), ours.test, ours.can_be_mirrored) == (0, None, False)
    assert np.array_equal(load_dataset("digits").labels, ours.labels)
    check_dataset("digits")


def test_letters_are_labelled_by_their_names():
    ours = letters()
    assert ours.images[:].shape[1:] == (3, 32, 32)  # pyright: ignore[reportAttributeAccessIssue]
    assert len(ours.images) == len(ours.labels)
    assert Counter(ours.labels.tolist()) == dict.fromkeys(range(26), len(ours.labels) // 26)
    assert ours.class_names[16] == "letter q"
    assert ours.test is not None
    assert ours.train.tolist() == ours.test.tolist() == list(range(len(ours.labels)))
    assert (len(ours.val), ours.can_be_mirrored) == (0, False)
