"""`make reproduce` on data sets in miniature: what is missing, what runs, and the table beside published numbers."""

import csv
import statistics

import pytest
from miniature_datasets import make_miniature

from benchmarks import reproduce
from complora_kernels.fewshot.datasets import ELEVEN
from complora_kernels.fewshot.files import read_json_lines

NAMES = ["dtd", "oxford_pets", "eurosat"]
FEW = [
    *("model=glyphs", "pretrained=null", "preset=glyphs", "steps=3", "batch_size=4", "methods=[lora, output]"),
    *("shots=[4]", "seeds=[1, 2]", "learning_rates=[0.01]", "template=a {}", "max_test_images=8", "draw=own"),
]


def cells(text, first):
    """The cells of the rows that begin with a name, by the names of the columns."""
    found, head = [], None
    for line in text.splitlines():
        row = [cell.strip() for cell in line[1:-1].split("|")] if line.startswith("|") else None
        head = row if row and row[-1] in ("mean", NAMES[-1]) else head
        if row and row[0] == first:
            assert head is not None
            found.append(dict(zip(head, row, strict=True)))
    return found


def test_order_of_size_has_each_of_the_eleven():
    assert sorted(reproduce.BY_SIZE) == sorted(ELEVEN)


def test_published_numbers_agree_with_their_means():
    tables = reproduce.tomllib.loads(reproduce.PUBLISHED.read_text())["table"]
    (figure,) = (table for table in tables if table["name"] == "CLIP-LoRA")
    for shots in figure["shots"].values():
        assert set(shots) == {*ELEVEN, "mean"}
        assert statistics.mean(shots[name] for name in ELEVEN) == pytest.approx(shots["mean"], abs=0.1)


@pytest.mark.long
def test_data_sets_that_are_missing_are_named_and_come_later(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("complora_kernels.fewshot.report.folder.write_figures", lambda *_: [])
    root, output = tmp_path / "data", tmp_path / "out"
    command = ["--data", str(root), "--output", str(output), "--names", *NAMES, "--set", *FEW]
    root.mkdir()
    assert reproduce.main(command) == 2
    said = capsys.readouterr().err
    assert all(f"{name} is missing: " in said for name in NAMES)
    assert "error: none of dtd, oxford_pets, eurosat is in" in said
    assert not output.exists()

    make_miniature(root, "oxford_pets", classes=4, per_class=(8, 2, 4))
    assert reproduce.main(command) == 0
    assert "1 of 3 data sets are there: oxford_pets" in capsys.readouterr().err
    text = (output / reproduce.TABLE).read_text()
    assert "Not there: dtd, eurosat." in text
    (published,) = cells(text, "CLIP-LoRA, published")
    assert published == {
        "": "CLIP-LoRA, published",
        "dtd": "63.8",
        "oxford_pets": "91",
        "eurosat": "84.9",
        "mean": "77.4",
    }
    measured, difference = cells(text, "output")
    assert (measured["dtd"], measured["mean"]) == ("", "")

    first = read_json_lines(output / "results.jsonl")
    new = {method: [line["new"] for line in first if line["method"] == method] for method in ("lora", "output")}
    mean, deviation = statistics.mean(new["output"]), statistics.stdev(new["output"])
    assert measured["oxford_pets"] == f"{100 * mean:.1f} ± {100 * deviation:.1f}"
    gain = statistics.mean(a - b for a, b in zip(new["output"], new["lora"], strict=True))
    assert difference["oxford_pets"].startswith(f"{100 * gain:+.1f} [")

    for name in ("dtd", "eurosat"):
        make_miniature(root, name, classes=4, per_class=(8, 2, 4))
    assert reproduce.main(command) == 0
    lines = read_json_lines(output / "results.jsonl")
    assert lines[: len(first)] == first  # what was there was not run again
    assert sorted({line["data"] for line in lines}) == sorted(NAMES)
    text = (output / reproduce.TABLE).read_text()
    assert "Not there" not in text
    measured = cells(text, "lora")[0]
    with (output / "table.csv").open() as file:
        assert any(row["method"] == "lora" for row in csv.DictReader(file))
    assert measured["mean"] != ""


def test_an_option_without_a_value(tmp_path, capsys):
    with pytest.raises(SystemExit):
        reproduce.main(["--data", str(tmp_path), "--set", "steps"])
    assert "--set steps: expected OPTION=VALUE" in capsys.readouterr().err
