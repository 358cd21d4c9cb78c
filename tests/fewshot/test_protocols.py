"""Every protocol on made-up miniatures of the data sets, with the bundled CLIP, from the command line to the tables."""

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, cast

import pytest
import saved_run
import torch
from miniature_datasets import draw_image, make_miniature
from numerics import share_named_right
from torch.nn import functional as F

import complora_kernels as ck
from complora_kernels.fewshot.__main__ import main
from complora_kernels.fewshot.backbone import load_backbone
from complora_kernels.fewshot.config import GLYPHS
from complora_kernels.fewshot.datasets import DOMAIN_SHIFTS, ELEVEN, Dataset, base_and_new, choose_split, load_dataset
from complora_kernels.fewshot.decode import load_crops
from complora_kernels.fewshot.files import read_json_lines
from complora_kernels.fewshot.measure import columns_of
from complora_kernels.fewshot.predictions import PREDICTIONS
from complora_kernels.fewshot.recipe import SPLIT_FILE
from complora_kernels.fewshot.setting import NEW_CLASSES

FEW = [*saved_run.FEW, "--template", "a photo of a {}."]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Data sets with so many classes that no accuracy is 100%, before or after training."""
    folder = tmp_path_factory.mktemp("data sets with a spáce")
    for name in (*ELEVEN, *DOMAIN_SHIFTS):
        make_miniature(folder, name, classes=11)
    return folder


def train(folder, root, *options):
    """The results of a grid that ends well."""
    output = folder / "out"
    assert main(["train", *FEW, "--data-root", str(root), "--output", str(output), *options]) == 0
    return read_json_lines(output / "results.jsonl")


def by_hand(
    folder: Path,
    result: dict[str, Any],
    dataset: Dataset,
    templates: Sequence[str] = ("a photo of a {}.",),
    *,
    split: str = "test",
) -> tuple[Any, Any]:
    """The shares of a split's images that CLIP names right, without and with the saved adapter of a run."""
    backbone = load_backbone(GLYPHS)
    indices, files = getattr(dataset, split), cast("tuple[Path, ...]", dataset.images)
    images = backbone.normalize(load_crops([files[i] for i in indices.tolist()], backbone.size) / 255)
    names = [name.replace("_", " ") for name in dataset.class_names]
    texts = [backbone.tokenize([template.replace("{}", name) for name in names]) for template in templates]

    def share(model: Any) -> Any:
        with torch.no_grad():
            classes = torch.stack([F.normalize(model.encode_text(tokens), dim=-1) for tokens in texts]).mean(0)
            cosines = F.cosine_similarity(model.encode_image(images)[:, None], classes, dim=-1)
        return share_named_right(cosines, dataset.labels[indices])

    before = share(backbone.model)
    return before, share(ck.load_adapter(backbone.model, folder / "out" / "runs" / result["run"] / "adapter").eval())


@pytest.mark.parametrize("name", ELEVEN)
def test_few_shot_on_each_data_set(root, tmp_path, name):
    (result,) = train(tmp_path, root, "--data", name)
    assert (result["data"], result["protocol"], result["kept"], result["tasks"]) == (name, "few-shot", None, {})
    assert (result["zero_shot_new"], result["new"]) == by_hand(tmp_path, result, load_dataset(name, root))
    assert 0 < result["zero_shot_new"] < result["new"] - 0.3  # three of ten images more
    folder = tmp_path / "out" / "runs" / result["run"]
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", SPLIT_FILE, "log.jsonl", "loss.png", "adapter", PREDICTIONS)
    }
    assert json.loads((folder / "config.json").read_text())["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(("protocol", "kept"), [("transfer", ELEVEN), ("domain-shift", DOMAIN_SHIFTS)])
def test_transfer_and_domain_shift_from_imagenet(root, tmp_path, protocol, kept):
    (result,) = train(tmp_path, root, "--data", "imagenet", "--protocol", protocol)
    tasks = {name: list(by_hand(tmp_path, result, load_dataset(name, root))) for name in kept if name != "imagenet"}
    assert result["tasks"] == tasks
    assert list(result["tasks"]) == list(tasks)
    before, after = zip(*result["tasks"].values(), strict=True)
    assert (result["zero_shot_kept"], result["kept"]) == pytest.approx((mean(before), mean(after)))
    assert before != after


@pytest.mark.parametrize("name", ELEVEN)
def test_retention_measures_the_other_data_sets_before_and_after(root, tmp_path, name):
    (result,) = train(tmp_path, root, "--data", name, "--protocol", "retention")
    others = [other for other in ELEVEN if other != name]
    assert list(result["tasks"]) == others
    before, after = zip(*result["tasks"].values(), strict=True)
    assert (result["zero_shot_kept"], result["kept"]) == pytest.approx((mean(before), mean(after)))
    assert before != after
    for other in (others[0], others[ELEVEN.index(name) - 1]):
        assert result["tasks"][other] == list(by_hand(tmp_path, result, load_dataset(other, root)))


def row_of(table: Path, method: str) -> dict[str, str]:
    """The only row of a method, by the names of the columns."""
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table.read_text().splitlines()
        if line.startswith("|")
    ]
    (row,) = (line for line in lines if line[0] == method)
    return dict(zip(lines[0], row, strict=True))


@pytest.mark.parametrize("name", ELEVEN)
def test_base_to_new_learns_base_classes_and_measures_new_ones(root, tmp_path, name):
    options = ("--data", name, "--protocol", "base-to-new")
    (result,) = train(tmp_path, root, *options)
    whole = load_dataset(name, root)
    base, new = base_and_new(whole)
    assert (*base.class_names, *new.class_names) == whole.class_names
    assert (len(base.class_names), len(new.class_names)) == (6, 5)
    assert list(result["tasks"]) == [NEW_CLASSES]
    # Each half is named among its own classes
    learned, kept = (result["zero_shot_new"], result["new"]), (result["zero_shot_kept"], result["kept"])
    assert learned == by_hand(tmp_path, result, base)
    assert kept == by_hand(tmp_path, result, new)
    assert kept == tuple(result["tasks"][NEW_CLASSES])
    assert (learned[0], kept[0]) != (learned[1], kept[1])
    for method, share, other in (("output", learned[1], kept[1]), ("zero-shot", learned[0], kept[0])):
        numbers = (share, other, 2 * share * other / (share + other))
        cell = row_of(tmp_path / "out" / "table.md", method)["2 shots"]
        assert cell == " / ".join(f"{100 * number:.1f}" for number in numbers)


def test_base_to_new_of_the_digits_does_not_measure_letters(tmp_path):
    (result,) = train(tmp_path, tmp_path, "--protocol", "base-to-new", "--max-test-images", "20")
    assert list(result["tasks"]) == [NEW_CLASSES]
    (result,) = train(
        tmp_path / "more", tmp_path, "--protocol", "base-to-new", "--max-test-images", "20", "--keep", "letters"
    )
    assert list(result["tasks"]) == [NEW_CLASSES, "letters"]
    assert result["kept"] == result["tasks"][NEW_CLASSES][1]
    assert result["zero_shot_kept"] == result["tasks"][NEW_CLASSES][0]


def test_anchors_classify_the_same_classes_in_other_data_sets(root, tmp_path):
    methods = ("--methods", "tip-adapter", "linear-probe", "--keep", "eurosat")
    for result in train(tmp_path, root, "--data", "imagenet", "--protocol", "domain-shift", *methods):
        same = [before == after for before, after in result["tasks"].values()]
        assert same[-1]  # EuroSAT has other classes
        assert not all(same[:-1])  # the answers to random images differ in some places
    assert columns_of(("b", "a"), ("a", "b", "c")) == [[1], [0]]
    assert columns_of(("a", "d"), ("a", "b", "c")) is None
    twins = ("a", "missile", "b", "missile")
    assert columns_of(twins, twins) == [[0], [1], [2], [3]]
    assert columns_of(("missile", "b", "missile"), twins) == [[1], [2], [3]]
    assert columns_of(("a", "missile"), twins) == [[0], [1, 3]]  # it is unknown which of the two is meant


def test_anchors_interpolation_validation_and_ensembles(root, tmp_path):
    results = train(
        tmp_path,
        root,
        *("--data", "dtd", "--keep", "imagenet", "--methods", "lora", "tip-adapter", "linear-probe", "activations"),
        *("--interpolations", "0.5", "0.25", "--validation", "--template", "clip"),
    )
    lora, tip, probe, activations = results
    assert [r["method"] for r in results] == ["lora", "tip-adapter", "linear-probe", "activations"]
    assert [i["share"] for i in lora["interpolated"]] == [0.5, 0.25]
    assert lora["interpolated"][0].keys() == {"share", "new", "kept", "tasks", "val"}
    for anchor in (tip, probe):
        assert anchor["learning_rate"] is None
        assert anchor["kept"] == anchor["zero_shot_kept"]
    dtd, eurosat = load_dataset("dtd", root), load_dataset("eurosat", root)
    for trained in (lora, activations):
        assert trained["new"] == by_hand(tmp_path, trained, dtd, ["{} texture."])[1]
        assert trained["val"] == by_hand(tmp_path, trained, dtd, ["{} texture."], split="val")[1]
    assert all(anchor["new"] > anchor["zero_shot_new"] for anchor in (tip, probe))
    assert activations["k"] > 0
    shutil.rmtree(tmp_path / "out")
    (ensemble,) = train(tmp_path, root, "--data", "eurosat", "--template", "ensemble", "--methods", "lora")
    templates = [f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")]
    assert (ensemble["zero_shot_new"], ensemble["new"]) == by_hand(tmp_path, ensemble, eurosat, templates)


def test_the_split_of_an_earlier_run_is_used_again(root, tmp_path):
    (first,) = train(tmp_path, root, "--data", "dtd", "--draw", "clip-lora")
    written = tmp_path / "out" / "runs" / first["run"] / SPLIT_FILE
    (second,) = train(tmp_path / "again", root, "--data", "dtd", "--draw", str(written), "--seeds", "1")
    assert (first["loss"], first["new"]) == (second["loss"], second["new"])


def test_a_run_learns_from_images_in_class_folders(tmp_path):
    folder = make_miniature(tmp_path, "folder")
    (result,) = train(tmp_path, tmp_path, "--data", f"folder:{folder}", "--augmentation", "crop-flip")
    assert result["data"] == f"folder:{folder}"
    assert (tmp_path / "out" / "table.md").exists()


def test_an_adapter_is_measured_again_and_exported(root, tmp_path, capsys):
    (result,) = train(tmp_path, root, "--data", "dtd", "--keep", "eurosat")
    adapter = str(tmp_path / "out" / "runs" / result["run"] / "adapter")
    saved = tmp_path / "accuracies.json"
    assert main(["eval", adapter, "--data-root", str(root), "--output", str(saved)]) == 0
    expected = {"dtd": [result["zero_shot_new"], result["new"]], **result["tasks"]}
    assert json.loads(saved.read_text()) == expected
    assert main(["eval", adapter, "--data", "ucf101", "--data-root", str(root), "--output", str(saved)]) == 0
    assert list(json.loads(saved.read_text())) == ["ucf101"]
    assert (
        main(["eval", adapter, "--data", "dtd", "--max-test-images", "3", "--output", str(saved)]) == 0
    )  # its root too
    assert json.loads(saved.read_text())["dtd"][1] * 3 % 1 == pytest.approx(0)
    for name in ("cat", "dog"):  # words that the bundled model does not know
        for number in range(2):
            draw_image(tmp_path / "pets" / name / f"{number}.png", "red", number)
    capsys.readouterr()
    assert main(["eval", adapter, "--data", "ucf101", f"folder:{tmp_path}/pets", "--data-root", str(root)]) == 2
    assert "does not tell the classes 'cat', 'dog' apart" in capsys.readouterr().err
    assert main(["eval", adapter, "--device", "tpu"]) == 2
    assert "--device tpu: expected cpu, cuda or auto" in capsys.readouterr().err
    assert main(["export", adapter, "--peft", str(tmp_path / "peft")]) == 0
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert main(["eval", str(tmp_path / "nothing")]) == 2
    assert "nothing: expected the folder of an adapter" in capsys.readouterr().err


def test_sweep_over_data_sets_and_its_report(root, tmp_path, capsys):
    text = f"""
        data: [dtd, eurosat, oxford_pets]
        shots: [1, 2]
        seeds: [1, 2]
        learning_rates: 3e-3
        methods:
          lora: {{}}
          "output, energy 0.8": {{method: output, subspace_energy: 0.8, subspace_ratio: null}}
        options: {{preset: glyphs, steps: 1, data_root: "{root}", template: clip, augmentation: crop-flip}}
    """
    (tmp_path / "pets.yaml").write_text(text)
    command = ["sweep", str(tmp_path / "pets.yaml"), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main(command) == 0
    results = read_json_lines(tmp_path / "out" / "results.jsonl")
    assert len(results) == 3 * 2 * 2 * 2
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"table.md", "table.csv", "table.tex", "figures"}
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(word in table for word in ("eurosat", "oxford_pets", "output, energy 0.8"))
    before = table
    (tmp_path / "out" / "table.md").unlink()
    assert main(["report", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "table.md").read_text() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "dtds"], "dtds"),
        (["--data", "dtd", "--keep", "nowhere"], "nowhere"),
        (["--data", "dtd", "--shots", "100"], "shots=100"),
        (["--data", "dtd", "--protocol", "base-to-old"], "base-to-old"),
        (["--data", "dtd", "--methods", "loras"], "loras"),
        (["--data", "dtd", "--template", "a photo"], "--template a photo: expected one {}"),
        (["--data", "dtd", "--interpolations", "1.5"], "--interpolations 1.5: expected shares between 0 and 1"),
        (["--data", "dtd", "--draw", "theirs"], "theirs"),
        (["--data", "dtd", "--draw", "a.json", "--seeds", "1", "2"], "expected {seed} in the path"),
        (["--data", "folder:/nowhere"], "/nowhere"),
        (["--data", "dtd", "--wandb", "clip"], "pip install wandb"),
    ],
)
def test_bad_options_are_named(root, tmp_path, options, message, capsys):
    arguments = ["train", *FEW, "--data-root", str(root), "--output", str(tmp_path / "out"), *options]
    with contextlib.suppress(SystemExit):  # raised for errors that the parser finds
        assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_data_set_tells_its_layout(tmp_path, capsys):
    arguments = ["train", *FEW, "--data", "dtd", "--data-root", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in ("dtd", "images", "split_zhou_DescribableTextures.json", str(tmp_path)))


def test_a_full_disk_stops_the_grid_and_keeps_what_is_finished(root, tmp_path, monkeypatch, capsys):
    from complora_kernels.common import files

    output = tmp_path / "out"
    write = files.write_atomically
    splits = []

    def full(path, content):
        if path.name == SPLIT_FILE:
            splits.append(path)
        if len(splits) > 1:
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr("complora_kernels.fewshot.files.write_atomically", full)
    monkeypatch.setattr("complora_kernels.fewshot.logs.write_atomically", full)
    monkeypatch.setattr("complora_kernels.fewshot.datasets.saved_splits.write_atomically", full)
    arguments = ["train", *FEW, "--data", "dtd", "--data-root", str(root), "--output", str(output), "--seeds", "1", "2"]
    assert main(arguments) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [result["seed"] for result in read_json_lines(output / "results.jsonl")] == [1]
    monkeypatch.undo()
    assert main(arguments) == 0
    assert [result["seed"] for result in read_json_lines(output / "results.jsonl")] == [1, 2]


def test_a_corrupted_image_is_named(root, tmp_path, capsys):
    copy = tmp_path / "data"
    shutil.copytree(root / "dtd", copy / "dtd")
    dataset = load_dataset("dtd", copy)
    files: Any = dataset.images
    broken = files[choose_split(dataset, 2, 1).train[0]]
    broken.write_bytes(broken.read_bytes()[:40])
    arguments = ["train", *FEW, "--data", "dtd", "--data-root", str(copy), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--augmentation", "crop-flip"]) == 1
    assert str(broken) in capsys.readouterr().err
