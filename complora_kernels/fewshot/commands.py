"""The commands of `complora` by name, and the options of those on what was trained.

Nothing heavy is imported here: help, versions and the answer to a typing error come at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")]
"""Names that need not be given."""


class Command(NamedTuple):
    """Where the options of a command are, and what it does."""

    module: str  # below `complora_kernels.fewshot`
    name: str  # of the class of its options
    summary: str  # the first sentence of that class

    def options(self) -> Any:
        """The class of its options, a dataclass."""
        return getattr(import_module(f"complora_kernels.fewshot.{self.module}"), self.name)


COMMANDS: Mapping[str, Command] = {
    "train": Command(
        "config",
        "TrainConfig",
        "Adapt a CLIP to a few images per class, and measure what it learns and what it forgets.",
    ),
    "predict": Command(
        "commands",
        "PredictConfig",
        "Name images by a saved adapter: the most probable classes of each, with their probabilities.",
    ),
    "report": Command(
        "commands",
        "ReportConfig",
        "Print the tables of a results folder and write its files and figures again, also of an unfinished grid.",
    ),
    "eval": Command(
        "commands",
        "EvalConfig",
        "Measure a saved adapter: the accuracy of the pretrained and of the adapted model on the test images of data "
        "sets.",
    ),
    "export": Command(
        "commands",
        "ExportConfig",
        "Write a saved adapter for other programs: at least one of --merged, --onnx and --peft.",
    ),
    "sweep": Command("sweep", "SweepConfig", "Do every run of a YAML file, and report them together."),
    "doctor": Command(
        "commands",
        "DoctorConfig",
        "Print versions, devices, memory, where files are kept, and what one product gives on each backend.",
    ),
    "pretrain-glyphs": Command(
        "pretrain",
        "PretrainConfig",
        "Train the bundled small CLIP from random weights; the defaults made the weights of the package.",
    ),
    "pretrain-pictures": Command(
        "pictures.pretrain",
        "PicturesConfig",
        "Train the pictures model from random weights; the defaults made the weights of the package.",
    ),
}


@dataclass(frozen=True)
class ReportConfig:
    """Print the tables of a results folder and write its files and figures again, also of an unfinished grid."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """The --output of `complora train` or `complora sweep`."""


@dataclass(frozen=True)
class PredictConfig:
    """Name images by a saved adapter: the most probable classes of each, with their probabilities.

    Images are read as in training. One that cannot be read is named at the end, and the rest go on.
    """

    adapter: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ADAPTER")]
    """The adapter's folder, or one with a single adapter below it, such as runs/mine/runs/both-1shot-lr0.01-seed0."""
    images: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="IMAGE|FOLDER ...", help_behavior_hint="(at least one)"),
    ]
    """Files of images, and folders, whose images are found in the folders below them too."""
    top: int = 5
    """The number of classes that are given for each image, at most all."""
    classes: Names = ()
    """Names to choose from, at least two; none given: those that were learned."""
    json: bool = False
    """Print JSON: a list of objects with the image and its predictions."""
    csv: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write a table with the columns image, rank, name and probability; - prints it."""
    batch_size: int | None = None
    """Images per forward pass; None: as in training."""
    device: str = "auto"
    """As for complora train."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = None
    """As for complora train; None: that of the training."""
    model: str | None = None
    """As for complora train. Only a model or weights outside of open_clip's tables have to be named here."""
    pretrained: str | None = None
    """As for complora train."""
    activation: Literal["auto", "gelu", "quick-gelu"] | None = None
    """As for complora train."""


@dataclass(frozen=True)
class EvalConfig:
    """Measure a saved adapter: the accuracy of the pretrained and of the adapted model on the test images of data sets.

    Options that are not given are those of the run that trained the adapter, where its config.json lies beside it. Only
    a model or weights outside of open_clip's tables have to be named here too.
    """

    adapter: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ADAPTER")]
    """The adapter's folder, or one with a single adapter below it, such as runs/mine/runs/both-1shot-lr0.01-seed0."""
    data: Names = ()
    """Data sets, named as for complora train; none given: those of the run."""
    model: str | None = None
    """As for complora train."""
    pretrained: str | None = None
    """As for complora train."""
    activation: Literal["auto", "gelu", "quick-gelu"] | None = None
    """As for complora train."""
    data_root: Path | None = None
    """As for complora train."""
    download: bool = False
    """As for complora train."""
    template: str | None = None
    """As for complora train."""
    max_test_images: int | None = None
    """As for complora train."""
    test_batch_size: int | None = None
    """As for complora train."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = None
    """As for complora train."""
    device: str = "auto"
    """As for complora train."""
    output: Path | None = None
    """A JSON file for the accuracies."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a saved adapter for other programs: at least one of --merged, --onnx and --peft.

    Each file is written as a whole, or not at all.
    """

    adapter: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ADAPTER")]
    """The adapter's folder, or one with a single adapter below it, such as runs/mine/runs/both-1shot-lr0.01-seed0."""
    merged: Path | None = None
    """A .safetensors file for the whole model with the update in its weights: a plain checkpoint of open_clip, in
    float32."""
    onnx: Path | None = None
    """A .onnx file for a classifier: the image tower with the features of the class names as constants. It takes pixels
    in [0, 1], float32 [N, 3, height, width] for any N, resized and cropped as the file's metadata say, and gives
    probabilities [N, classes]. It needs pip install 'complora-kernels[onnx]'."""
    peft: Path | None = None
    """A folder for the adapter in PEFT's format; see complora_kernels.export_peft for the modules that PEFT sees."""
    classes: Names = ()
    """Other names of classes for --onnx; none given: those that were learned."""
    model: str | None = None
    """As for complora train."""
    pretrained: str | None = None
    """As for complora train."""
    activation: Literal["auto", "gelu", "quick-gelu"] | None = None
    """As for complora train."""


@dataclass(frozen=True)
class DoctorConfig:
    """Print versions, devices, memory, where files are kept, and what one product gives on each backend."""
