"""The gallery of a report: which images it shows, where they come from, and what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matplotlib.image import AxesImage
from miniature_datasets import draw_image
from rich.console import Console

from complora_kernels.fewshot.__main__ import main
from complora_kernels.fewshot.datasets import load_dataset
from complora_kernels.fewshot.predictions import PREDICTIONS, Prediction, read_predictions
from complora_kernels.fewshot.report import gallery, report


def prediction(task: str, image: int, label: str, before: str, after: str) -> Prediction:
    return Prediction(task, str(image), label, before, after)


def test_rows_hold_what_was_won_and_lost():
    predictions = [
        prediction("digits", 0, "a", "b", "a"),
        prediction("digits", 1, "a", "a", "b"),
        prediction("digits", 2, "a", "b", "c"),
        prediction("digits", 3, "a", "a", "a"),
        *(prediction("letters", n, "x", "x", "y") for n in range(20)),
    ]
    won, lost, forgotten = gallery.rows(predictions)
    assert (won.total, won.of, won.found) == (1, 4, predictions[:1])
    assert (lost.total, lost.of, lost.found) == (1, 4, predictions[1:2])
    assert (forgotten.total, forgotten.of, len(forgotten.found)) == (20, 20, gallery.COLUMNS)
    assert forgotten.found[0] == predictions[4]
    assert forgotten.found[-1] == predictions[-1]


def test_the_images_are_those_of_the_data_sets():
    predictions = [prediction("digits", 5, "digit five", "digit six", "digit five")]
    figure = gallery.draw_gallery(predictions, {"data": "digits", "protocol": "few-shot"}, "a title")
    assert figure is not None
    (drawn,) = [
        child for axes in figure.subfigs[0].axes for child in axes.get_children() if isinstance(child, AxesImage)
    ]
    image = load_dataset("digits").images[5]
    assert isinstance(image, torch.Tensor)
    pixels = torch.from_numpy(drawn.get_array()).permute(2, 0, 1)
    assert figure.subfigs[0].axes[0].get_title() == "digit six\n→ digit five"
    torch.testing.assert_close(pixels[:, 6::12, 6::12], image, rtol=0, atol=0)
    assert gallery.draw_gallery([predictions[0]._replace(before="digit five")], {"data": "digits"}, "") is None


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A finished run on a folder of two classes."""
    for colour, name in (("red", "digit one"), ("dark_blue", "letter w")):
        for number in range(8):
            draw_image(tmp_path / "data" / name / f"{number}.png", colour, number)
    options = ["--preset", "glyphs", "--data", f"folder:{tmp_path / 'data'}", "--keep", "letters", "--shots", "2"]
    options += ["--methods", "lora", "--seeds", "0", "--learning-rates", "0.02", "--steps", "20", "--workers", "1"]
    assert main(["train", *options, "--output", str(tmp_path / "out")]) == 0
    return tmp_path / "out"


def test_a_report_has_a_gallery_of_files(trained):
    (run,) = (trained / "runs").iterdir()
    predictions = read_predictions(run / PREDICTIONS)
    assert {each.image for each in predictions if each.task != "letters"} <= {
        f"{name}/{number}.png" for name in ("digit one", "letter w") for number in range(8)
    }
    assert (trained / "figures" / gallery.GALLERY).is_file()


def test_a_report_without_its_images_says_so(trained, tmp_path, capsys):
    (tmp_path / "data").rename(tmp_path / "moved")
    report(trained, Console())
    assert "no gallery: " in capsys.readouterr().out
    assert not (trained / "figures" / gallery.GALLERY).exists()
    assert (trained / "table.md").is_file()
