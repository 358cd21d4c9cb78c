"""`complora predict`, `eval` and `export` on a saved adapter, from the command line to what they print and write."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from miniature_datasets import draw_image, make_miniature
from safetensors.torch import load_file
from saved_run import train

import complora_kernels as ck
from complora_kernels.fewshot import export as exporting
from complora_kernels.fewshot import predict as predicting
from complora_kernels.fewshot.__main__ import main
from complora_kernels.fewshot.backbone import load_backbone
from complora_kernels.fewshot.decode import load_crops
from complora_kernels.fewshot.glyphs import load_glyph_clip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run")
    make_miniature(root, "eurosat", classes=4)
    folder, _ = train(root / "out", "--data", "eurosat", "--data-root", str(root), "--template", "a photo of a {}.")
    return folder


@pytest.fixture(scope="module")
def classifier(adapter):
    return ck.load_classifier(adapter)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder with three images, one of them in a folder below, and a file that is no image."""
    folder = tmp_path / "photos"
    for number, name in enumerate(("a.png", "b.jpg", "below/c.png")):
        draw_image(folder / name, ("red", "green", "yellow")[number], number)
    (folder / "notes.txt").write_text("no image")
    return folder


def said(capsys: Any, *arguments: Any) -> tuple[str, str]:
    """What a command prints on both streams."""
    assert main([str(argument) for argument in arguments]) == 0
    found = capsys.readouterr()
    return found.out, found.err


def test_a_folder_is_named_in_a_table(adapter, classifier, photos, capsys):
    out, err = said(capsys, "predict", adapter, photos, "--top", "2")
    assert err == ""
    paths = [photos / "a.png", photos / "b.jpg", photos / "below" / "c.png"]
    rankings = classifier(paths, top=2)
    rows = [(name, f"{100 * share:.1f}") for ranking in rankings for name, share in zip(*ranking, strict=True)]
    assert re.findall(r"(\w+) +(\d+\.\d) *$", out, re.MULTILINE) == rows


def test_json_and_csv_hold_what_the_classifier_says(adapter, classifier, photos, tmp_path, capsys):
    paths = [photos / "b.jpg", photos / "a.png"]
    rankings = classifier(paths, top=3)
    out, _ = said(capsys, "predict", adapter, *paths, "--top", "3", "--json")
    expected = [
        {
            "image": str(path),
            "predictions": [
                {"name": n, "probability": pytest.approx(p, rel=1e-4)} for n, p in zip(*ranking, strict=True)
            ],
        }
        for path, ranking in zip(paths, rankings, strict=True)
    ]
    assert json.loads(out) == expected
    table = tmp_path / "new" / "table.csv"
    out, _ = said(capsys, "predict", adapter, *paths, "--top", "3", "--csv", table)
    assert out == f"wrote {table}: 2 images\n"
    printed, _ = said(capsys, "predict", adapter, *paths, "--top", "3", "--csv", "-")
    assert printed == table.read_text()
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert [(row["image"], row["rank"], row["name"]) for row in rows] == [
        (str(path), str(rank), name)
        for path, ranking in zip(paths, rankings, strict=True)
        for rank, name in enumerate(ranking.names, 1)
    ]
    shares = [share for ranking in rankings for share in ranking.probabilities]
    assert [float(row["probability"]) for row in rows] == pytest.approx(shares, rel=1e-4)


def test_images_that_cannot_be_read_are_named_at_the_end_and_the_rest_go_on(adapter, photos, capsys):
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:80])
    out, err = said(capsys, "predict", adapter, photos, "nothing.png", "--json", "--batch-size", "2")
    assert [Path(row["image"]).name for row in json.loads(out)] == ["a.png", "b.jpg", "c.png"]
    assert f"not read: {photos}/broken.png cannot be decoded" in err
    assert "nothing.png" in err
    assert err.endswith("2 of 5 images could not be read\n")
    assert main(["predict", str(adapter), str(photos / "broken.png")]) == 1
    found = capsys.readouterr()
    assert found.out == ""
    assert "1 of 1 images could not be read" in found.err


def test_other_names_and_the_folder_of_a_run(adapter, photos, capsys):
    run = adapter.parents[2]
    out, _ = said(capsys, "predict", run, photos / "a.png", "--json", "--classes", "green", "red", "cyan")
    (row,) = json.loads(out)
    assert {each["name"] for each in row["predictions"]} == {"green", "red", "cyan"}
    assert row["predictions"][0]["name"] == "red"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected at least one image or folder"),
        (["x.png", "--top", "0"], "--top 0: expected at least 1"),
        (["x.png", "--batch-size", "0"], "--batch-size 0: expected at least 1"),
        (["x.png", "--json", "--csv", "-"], "--json and --csv -: expected one of them"),
        (["{empty}"], "expected a folder with images in it or below it"),
        (["x.png", "--csv", "{empty}"], "a folder, expected a file or -"),
    ],
)
def test_options_are_checked_before_the_model_is_loaded(adapter, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(predicting, "load_classifier", lambda *_, **__: pytest.fail("the model was loaded"))
    assert main(["predict", str(adapter), *(argument.format(empty=tmp_path) for argument in arguments)]) == 2
    assert words in capsys.readouterr().err


def test_the_only_adapter_of_a_run_folder_is_measured_and_of_several_the_names_are_told(adapter, tmp_path, capsys):
    output = adapter.parents[2]
    (line,) = (output / "results.jsonl").read_text().splitlines()
    saved = tmp_path / "accuracies.json"
    said(capsys, "eval", output, "--output", saved)
    result = json.loads(line)
    assert json.loads(saved.read_text()) == {"eurosat": [result["zero_shot_new"], result["new"]]}
    for name in ("a", "b"):
        shutil.copytree(adapter.parent, tmp_path / "two" / name)
    assert main(["eval", str(tmp_path / "two")]) == 2
    assert "two/a/adapter" in (err := capsys.readouterr().err)
    assert "two/b/adapter" in err


# ---- export


def test_merged_weights_are_a_plain_checkpoint_of_the_model(adapter, classifier, tmp_path, capsys):
    path = tmp_path / "new" / "merged.safetensors"
    out, _ = said(capsys, "export", adapter, "--merged", path)
    assert out.startswith(f"wrote {path}")
    plain, weights = load_glyph_clip()[0], load_file(path)
    before = {name: weight.clone() for name, weight in plain.state_dict().items()}
    assert {name: weight.shape for name, weight in weights.items()} == {n: w.shape for n, w in before.items()}
    plain.load_state_dict(weights)
    changed = {name for name, weight in weights.items() if not torch.equal(weight, before[name])}
    assert changed
    assert all("attn.in_proj_weight" in name for name in changed)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain.encode_image(images), classifier.model.encode_image(images))


def test_a_classifier_in_onnx_gives_the_probabilities_of_torch(adapter, classifier, photos, tmp_path, capsys):
    path = tmp_path / "classifier.onnx"
    said(capsys, "export", adapter, "--onnx", path)
    session = onnxruntime.InferenceSession(path)
    metadata = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    assert tuple(metadata["classes"]) == classifier.classes
    assert metadata["size"] == [32, 32]
    assert (metadata["resize_mode"], metadata["interpolation"]) == ("shortest", "bicubic")
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("pixels", "tensor(float)", [3, 32, 32])
    paths = [photos / "a.png", photos / "b.jpg", photos / "below" / "c.png"]
    for batch in (paths, paths[:1]):
        pixels = load_crops(batch, (32, 32)).float() / 255
        (shares,) = session.run(["probabilities"], {"pixels": pixels.numpy()})
        for row, ranking in zip(torch.from_numpy(shares), classifier(batch, top=4), strict=True):
            expected = dict(zip(*ranking, strict=True))
            assert row.tolist() == pytest.approx([expected[name] for name in classifier.classes], rel=1e-3, abs=1e-6)
    names = {node.name for node in session.get_outputs()}
    assert names == {"probabilities"}
    assert path.stat().st_size < 4 * sum(weight.numel() for weight in load_backbone("glyphs").model.parameters())


def test_an_adapter_for_peft(adapter, tmp_path, capsys):
    said(capsys, "export", adapter, "--peft", tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected at least one of --merged, --onnx and --peft"),
        (["--merged", "x.pt"], "--merged x.pt: expected a file that ends in .safetensors"),
        (["--onnx", "x"], "--onnx x: expected a file that ends in .onnx"),
        (["--merged", "x.safetensors", "--classes", "a", "b"], "--classes: expected --onnx too"),
        (["--onnx", "{file}/x.onnx"], "--onnx {file}: expected a folder that can be written to"),
        (["--peft", "{file}"], "--peft {file}: expected a folder that can be written to"),
    ],
)
def test_options_of_export_are_checked(adapter, tmp_path, capsys, arguments, words):
    file = tmp_path / "file"
    file.touch()
    assert main(["export", str(adapter), *(argument.format(file=file) for argument in arguments)]) == 2
    assert words.format(file=file) in capsys.readouterr().err


def test_nothing_is_written_where_a_part_fails(adapter, tmp_path, capsys, monkeypatch):
    def fail(classifier: Any) -> bytes:
        raise ValueError("it cannot be translated")

    monkeypatch.setattr(exporting, "onnx_bytes", fail)
    command = ["export", str(adapter), "--onnx", str(tmp_path / "x.onnx"), "--merged", str(tmp_path / "x.safetensors")]
    assert main([*command, "--peft", str(tmp_path / "peft")]) == 2
    assert "it cannot be translated" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_checkpoint_of_open_clip_is_loaded_by_it(tmp_path, monkeypatch, capsys):
    """A model that open_clip knows by its name, and whose weights are a file."""
    import open_clip
    from tiny_clip_files import TINY

    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS, "tiny": TINY})
    base: Any = open_clip.create_model("tiny", require_pretrained=False).eval()
    torch.save(base.state_dict(), tmp_path / "weights.pt")
    ck.apply_complora(base, ck.CompLoRAConfig(r=2, subspace_k=4), progress=False)
    with torch.no_grad():
        for factor in ck.adapter_parameters(base):
            factor.normal_(std=0.3)
    ck.save_adapter(base, tmp_path / "adapter")
    path = tmp_path / "merged.safetensors"
    options = ("--model", "tiny", "--pretrained", tmp_path / "weights.pt")
    out, _ = said(capsys, "export", tmp_path / "adapter", "--merged", path, *options)
    assert f"open_clip.create_model('tiny', pretrained={str(path)!r}) loads it" in out
    loaded: Any = open_clip.create_model("tiny", pretrained=str(path)).eval()
    texts = open_clip.get_tokenizer("tiny")(["a", "b c"])
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode_text(texts), base.encode_text(texts), rtol=1e-4, atol=1e-5)
