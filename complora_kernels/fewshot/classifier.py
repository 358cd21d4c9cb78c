"""`load_classifier`: a saved adapter as a function from images to the names of classes and their probabilities."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import torch
from PIL import Image
from torch import Tensor

import complora_kernels as ck
from complora_kernels.fewshot.adapter_folder import check_trusted, find_adapter, of_another_model
from complora_kernels.fewshot.backbone import Backbone, check_backbone, load_backbone
from complora_kernels.fewshot.checks import check_device
from complora_kernels.fewshot.classifier_file import CLASSIFIER_FILE, check_same, read_classifier
from complora_kernels.fewshot.datasets import Dataset
from complora_kernels.fewshot.decode import cropper, for_each_file
from complora_kernels.fewshot.evaluate import Task
from complora_kernels.fewshot.recipe import precision_for

One: TypeAlias = "str | os.PathLike[str] | Image.Image | Tensor"
"""A file, an image of Pillow, or uint8 [3, H, W]."""

Precision = Literal["auto", "fp32", "bf16", "fp16"]


class Ranking(NamedTuple):
    """The most probable classes of an image, the most probable first."""

    names: tuple[str, ...]
    probabilities: tuple[float, ...]  # among all classes of the classifier, which sum to 1


class Classifier:
    """Names images. `load_classifier` makes one.

    Attributes:
        model: the adapted model, in eval mode.
        classes: the names that images are given.
        templates: the prompts, each with {} for the class name; the features of several are averaged.
        backbone: the tokenizer and the preprocessing of the model.
        batch_size: images per forward pass.
    """

    def __init__(
        self, model: Any, backbone: Backbone, templates: Sequence[str], classes: Sequence[str], batch_size: int = 256
    ):
        self.model, self.backbone = model, backbone
        self.templates, self.batch_size = tuple(templates), batch_size
        self.classes = _as_names(classes)
        self._features: dict[tuple[str, ...], Tensor] = {}  # float32 [C, D] of the last classes
        self.class_features()

    @overload
    def __call__(
        self, images: str | os.PathLike[str] | Image.Image, *, top: int = ..., classes: Sequence[str] | None = ...
    ) -> Ranking: ...
    @overload  # by the number of dimensions: one, or a list
    def __call__(self, images: Tensor, *, top: int = ..., classes: Sequence[str] | None = ...) -> Any: ...
    @overload
    def __call__(
        self, images: Sequence[One], *, top: int = ..., classes: Sequence[str] | None = ...
    ) -> list[Ranking]: ...
    def __call__(self, images: Any, *, top: int = 5, classes: Sequence[str] | None = None) -> Any:
        """The `top` most probable classes of an image, or of each of several.

        Args:
            images: the path of a file, an image of Pillow, or a uint8 tensor [3, H, W], of any size; or several: a
                sequence of these, or a uint8 tensor [N, 3, H, W]. Files and Pillow's images are turned upright, resized
                and cropped as in training and evaluation; tensors are resized to the model's size.
            top: the number of classes that are given, at most all.
            classes: other names than the classifier's, for this call. Their features are kept until the next ones.

        Returns:
            A `Ranking` for one image, a list of them for several.

        Raises:
            TypeError: an image is of another type.
            ValueError: `top` is below 1; a tensor has another dtype or shape; a file cannot be decoded, and is named;
                or the tokenizer does not tell two classes apart.
            OSError: a file cannot be read.
        """
        if top < 1:
            raise ValueError(f"top={top}, expected at least 1")
        if isinstance(images, Tensor) and images.ndim == 3:
            return self(images[None], top=top, classes=classes)[0]
        if isinstance(images, (str, os.PathLike, Image.Image)):
            return self([images], top=top, classes=classes)[0]
        names = self.classes if classes is None else _as_names(classes)
        features = self.class_features(names)
        with torch.no_grad():
            return [row for pixels in self._inputs(images) for row in self._ranked(pixels, features, names, top)]

    def of_files(self, paths: Sequence[Path], *, top: int = 5) -> Iterator[tuple[Path, Ranking | Exception]]:
        """Each file with its most probable classes, or with the error of one that cannot be read."""
        features, crop_of = self.class_features(), cropper(self.backbone.size, **self.backbone.resize)

        def read(_: int, path: str | Path) -> Tensor | Exception:
            try:
                return crop_of(path)
            except MemoryError:
                return ValueError(f"{path} is not decoded: there is not enough memory for it")
            except (OSError, ValueError) as error:
                return error

        for start in range(0, len(paths), self.batch_size):
            batch = paths[start : start + self.batch_size]
            crops = for_each_file(read, batch, None, progress=False)
            whole = [crop for crop in crops if isinstance(crop, Tensor)]
            found: list[Ranking] = []
            if whole:
                with torch.no_grad():
                    found = self._ranked(self._normalized(torch.stack(whole)), features, self.classes, top)
            ranked = iter(found)
            for path, crop in zip(batch, crops, strict=True):
                yield path, next(ranked) if isinstance(crop, Tensor) else crop

    @torch.no_grad()
    def class_features(self, classes: Sequence[str] | None = None) -> Tensor:  # float32 [C, D]
        """The normalised features of the classes, or of other ones, computed once."""
        names = self.classes if classes is None else _as_names(classes)
        if names not in self._features:
            nothing = torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0, dtype=torch.long)
            empty = torch.empty(0, dtype=torch.long)
            dataset = Dataset("the classifier", *nothing, names, empty, empty, empty)
            task = Task(dataset, self.backbone, self.templates, self.batch_size)
            own = {self.classes: self._features[self.classes]} if self._features else {}
            self._features = {**own, names: task.class_features(self.model)}
        return self._features[names]

    def to(self, device: str | torch.device) -> Classifier:
        """Move the model and the features of its classes to a device; returns the same classifier."""
        device = torch.device(device)
        self.model.to(device)
        self.backbone = self.backbone.to(device)
        self._features = {names: features.to(device) for names, features in self._features.items()}
        return self

    def __repr__(self) -> str:
        return f"Classifier({len(self.classes)} classes, on {self.backbone.device})"

    def _ranked(self, pixels: Tensor, class_features: Tensor, names: tuple[str, ...], top: int) -> list[Ranking]:
        """The classes of inputs of the model, [N, 3, S, S], by `softmax(s cos(image, class))`, s the model's scale."""
        dtype = next(self.model.parameters()).dtype
        image_features = self.model.encode_image(pixels.to(dtype), normalize=True).float()  # [N, D]
        cosines = image_features @ class_features.T  # [N, C]: their order is that of an evaluation, to the last bit
        places = cosines.topk(min(top, len(names))).indices
        shares = (self.model.logit_scale.float().exp() * cosines).softmax(-1).gather(1, places)
        return [
            Ranking(tuple(names[i] for i in own), tuple(of_own))
            for own, of_own in zip(places.tolist(), shares.tolist(), strict=True)
        ]

    def _inputs(self, images: Sequence[One] | Tensor) -> Iterator[Tensor]:
        """The images in batches, as inputs of the model: float32 [B, 3, S, S], on its device."""
        if isinstance(images, Tensor):
            _check_pixels(images, "images", "[N, 3, H, W]")
            for batch in images.split(self.batch_size) if len(images) else ():
                yield self.backbone.preprocess(batch.to(self.backbone.device))
            return
        crop_of = cropper(self.backbone.size, **self.backbone.resize)

        def read(i: int, image: Any) -> Tensor:
            if isinstance(image, Tensor):
                return image
            try:
                return crop_of(image)
            except (OSError, ValueError) as error:
                if isinstance(image, Image.Image):  # a file is named already
                    raise ValueError(f"images[{i}]: {error}") from error
                raise

        for i, image in enumerate(images):
            if isinstance(image, Tensor):
                _check_pixels(image, f"images[{i}]", "[3, H, W]")
            elif not isinstance(image, (str, os.PathLike, Image.Image)):
                raise TypeError(
                    f"images[{i}] is a {type(image).__name__}, expected a path, an image of Pillow or a tensor"
                )
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            crops = for_each_file(lambda i, image, start=start: read(start + i, image), batch, None, progress=False)  # pyright: ignore[reportArgumentType]
            yield torch.cat(
                [
                    self.backbone.preprocess(crop[None].to(self.backbone.device))
                    if isinstance(image, Tensor)
                    else self._normalized(crop[None])
                    for image, crop in zip(batch, crops, strict=True)
                ]
            )

    def _normalized(self, crops: Tensor) -> Tensor:  # uint8 [N, 3, S, S] to float32
        return self.backbone.normalize(crops.to(self.backbone.device).float() / 255)


def load_classifier(
    adapter: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    classes: Sequence[str] | None = None,
    model: str | None = None,
    pretrained: str | None = None,
    activation: Literal["auto", "gelu", "quick-gelu"] | None = None,
    precision: Precision | None = None,
) -> Classifier:
    """Load what `complora train` saved as a function that names images.

        classifier = ck.load_classifier("runs/glyphs/runs/both-16shot-lr0.01-seed0/adapter")
        names, probabilities = classifier("seven.png")

    Files are read, turned, resized and cropped as in training and evaluation. The model computes as it was measured;
    its features of the first prompts and of a fixed picture are compared with those of the training.

    Args:
        adapter: the folder of an adapter with its `classifier.json`, or a folder with exactly one such below it.
        device: "cpu", "cuda", or "auto": CUDA where there is one. `Classifier.to` moves it.
        classes: other names than those that were learned (open vocabulary); at least two.
        model: the model's name, as for `complora train`. A file or a folder of weights, and a model of a hub, are not
            taken from `classifier.json`, which may come from somebody else: they have to be named here.
        pretrained: the weights, as for `complora train`; see `model`.
        activation: as for `complora train`.
        precision: as for `complora train`; None: that of the training.

    Raises:
        FileNotFoundError: a file or the weights are missing.
        OSError: a file cannot be read.
        ValueError: a file is damaged or of a newer version; there are several adapters in the folder, which are named;
            an argument cannot work; or the model, its tokenizer or its preprocessing is not that of the training.
    """
    folder = find_adapter(Path(adapter))
    path = folder / CLASSIFIER_FILE
    saved = read_classifier(folder)
    known = {"model": saved["model"]["name"], **{name: saved["model"][name] for name in ("pretrained", "activation")}}
    asked = {"model": model, "pretrained": pretrained, "activation": activation}
    given = {name: value for name, value in asked.items() if value is not None}
    check_trusted(path, known, given)
    chosen = {**known, **given}
    check_device(str(device))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with of_another_model(folder, asked):
        check_backbone(**chosen)
    backbone = load_backbone(**chosen, device=device)
    with of_another_model(folder, asked):
        adapted = ck.load_adapter(backbone.model, folder, progress=sys.stderr.isatty())
    adapted.to(precision_for(saved["precision"] if precision is None else precision, backbone.device)).eval()
    check_same(saved, adapted, backbone, path)
    names = saved["class_names"] if classes is None else classes
    return Classifier(adapted, backbone, saved["templates"], names, saved["batch_size"])


def _as_names(classes: Sequence[str]) -> tuple[str, ...]:
    if isinstance(classes, str) or len(classes) < 2:
        raise ValueError(f"classes={classes!r}, expected at least two names")
    return tuple(classes)


def _check_pixels(image: Tensor, name: str, shape: str) -> None:
    dimensions = shape.count(",") + 1
    if image.dtype != torch.uint8 or image.ndim != dimensions or image.shape[-3] != 3 or 0 in image.shape[-2:]:
        raise ValueError(
            f"{name} is {image.dtype} {list(image.shape)}, expected uint8 {shape} of values from 0 to 255 "
            "(torchvision.transforms.v2.functional.to_dtype(image, torch.uint8, scale=True) makes them of floats)"
        )
