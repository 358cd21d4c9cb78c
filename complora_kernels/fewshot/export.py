"""`complora export`: a saved adapter as plain weights, as a classifier in ONNX, or in PEFT's format."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save
from torch import Tensor, nn

import complora_kernels as ck
from complora_kernels.common.files import write_atomically
from complora_kernels.fewshot.adapter_folder import find_adapter, of_another_model, options_of
from complora_kernels.fewshot.backbone import Backbone, check_backbone
from complora_kernels.fewshot.classifier import Classifier, load_classifier
from complora_kernels.fewshot.classifier_file import preprocessing_of, read_classifier
from complora_kernels.fewshot.commands import ExportConfig
from complora_kernels.fewshot.config import BUNDLED, TrainConfig
from complora_kernels.fewshot.escapes import say
from complora_kernels.fewshot.files import check_writable
from complora_kernels.fewshot.setting import Settings


def export(config: ExportConfig, console: Console) -> None:
    """Write what is asked for. Everything is computed before the first file is written.

    Raises:
        FileNotFoundError: the adapter or the weights are missing.
        ValueError: nothing is asked for; the adapter is of other weights; a package is missing; or PEFT's format cannot
            hold it.
        OSError: a file cannot be written.
    """
    _check(config)
    config = dataclasses.replace(config, adapter=find_adapter(config.adapter))
    options = options_of(config.adapter, vars(config))
    if config.onnx is not None:
        read_classifier(config.adapter)  # its errors come before long computations
    with of_another_model(config.adapter, vars(config)):
        check_backbone(options.model, options.pretrained, options.activation)
    if config.peft is not None:
        check_writable(config.peft, "--peft")
    for option, path in (("--merged", config.merged), ("--onnx", config.onnx)):
        if path is not None:
            check_writable(path.parent, option)
    files: dict[Path, bytes] = {}
    if config.onnx is not None:
        files[config.onnx] = _onnx_of(config, options)
    if config.merged is not None or config.peft is not None:
        backbone = Settings().backbone(options, "cpu")
        with of_another_model(config.adapter, vars(config)):
            model = ck.load_adapter(backbone.model, config.adapter)
        if config.merged is not None:
            plain = ck.merge_and_unload(copy.deepcopy(model))
            # Cloned, because safetensors refuses weights that share memory
            weights = {
                name: weight.clone(memory_format=torch.contiguous_format) for name, weight in plain.state_dict().items()
            }
            files[config.merged] = save(weights, metadata={"format": "pt"})
        if config.peft is not None:
            ck.export_peft(model, config.peft)
            say(console, f"wrote {config.peft}: an adapter for peft.PeftModel.from_pretrained", soft_wrap=True)
    for path, content in files.items():
        write_atomically(path, content)
        say(console, f"wrote {path}: {_use(path, config, options)}", soft_wrap=True)


def _check(config: ExportConfig) -> None:
    if config.merged is config.onnx is config.peft is None:
        raise ValueError("expected at least one of --merged, --onnx and --peft")
    for option, path in (("merged", config.merged), ("onnx", config.onnx)):
        suffix = ".safetensors" if option == "merged" else ".onnx"
        if path is not None and path.suffix != suffix:
            raise ValueError(f"--{option} {path}: expected a file that ends in {suffix}")
        if path is not None and path.is_dir():
            raise ValueError(f"--{option} {path}: a folder, expected a file")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if config.onnx is not None and missing:
        raise ValueError(f"--onnx needs {' and '.join(missing)}: pip install 'complora-kernels[onnx]'")
    if config.classes and config.onnx is None:
        raise ValueError("--classes: expected --onnx too, which alone holds names of classes")


def _use(path: Path, config: ExportConfig, options: TrainConfig) -> str:
    if path == config.onnx:
        return "pixels in [0, 1] to probabilities; its metadata have the names of the classes"
    if options.model in BUNDLED:
        return f"a checkpoint of the {options.model} model"
    return f"open_clip.create_model({options.model!r}, pretrained={str(path)!r}) loads it"


class ImageClassifier(nn.Module):
    """The image tower of a classifier and the features of its classes, without the text tower.

    Takes pixels in [0, 1], float32 [N, 3, S, S], to probabilities [N, C].
    """

    def __init__(self, classifier: Classifier):
        super().__init__()
        preprocessing = preprocessing_of(classifier.backbone)
        self.model = classifier.model
        self.register_buffer("mean", torch.tensor(preprocessing["mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(preprocessing["std"])[:, None, None])
        scaled = classifier.model.logit_scale.detach().float().exp() * classifier.class_features()
        self.register_buffer("scaled_features", scaled.T.contiguous())  # [D, C]

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.model.encode_image((pixels - self.mean) / self.std, normalize=True)  # pyright: ignore[reportOperatorIssue]
        return (features @ self.scaled_features).softmax(-1)


def _onnx_of(config: ExportConfig, options: TrainConfig) -> bytes:
    """The classifier as a program of ONNX."""
    classifier = load_classifier(
        config.adapter,
        device="cpu",
        classes=config.classes or None,
        model=options.model,
        pretrained=options.pretrained,
        activation=options.activation,
        precision="fp32",
    )
    ck.merge_and_unload(classifier.model)
    return onnx_bytes(classifier)


def onnx_bytes(classifier: Classifier) -> bytes:
    """A classifier of a plain model in float32 on the CPU as a program of ONNX with a dynamic batch.

    Raises:
        ValueError: torch cannot translate the model.
    """
    height, width = classifier.backbone.size
    example = torch.rand(2, 3, height, width)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter, about its own code
        try:
            program = torch.onnx.export(
                ImageClassifier(classifier).eval(),
                (example,),
                dynamo=True,
                verbose=False,
                input_names=["pixels"],
                output_names=["probabilities"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ValueError(f"--onnx: torch {torch.__version__} cannot translate this model: {error}") from error
    assert program is not None
    proto = program.model_proto
    for name, value in metadata_of(classifier.backbone, classifier.classes).items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = name, json.dumps(value)
    return proto.SerializeToString()


def metadata_of(backbone: Backbone, classes: tuple[str, ...]) -> dict[str, Any]:
    """What a user of the exported classifier needs beside it, as values of JSON."""
    preprocessing = preprocessing_of(backbone)
    return {"classes": classes, **{name: preprocessing[name] for name in ("size", "resize_mode", "interpolation")}}
