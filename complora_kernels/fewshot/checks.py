"""Checks that find options that cannot work before anything is computed."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from complora_kernels.fewshot import config as options
from complora_kernels.fewshot import datasets
from complora_kernels.fewshot.backbone import check_backbone, load_tokenizer
from complora_kernels.fewshot.config import TrainConfig
from complora_kernels.fewshot.datasets.few_shot_split import fingerprint
from complora_kernels.fewshot.logs import check_loggers
from complora_kernels.fewshot.setting import load
from complora_kernels.fewshot.team import is_started_together
from complora_kernels.fewshot.templates import templates_for, training_template
from complora_kernels.fewshot.tokens import Tokenizer, check_told_apart, warn_of_truncation
from complora_kernels.fewshot.vocabulary import check_vocabulary


def check_options(config: TrainConfig) -> None:
    """Raise a ValueError or a FileNotFoundError for options that cannot work with any data."""
    options.check(config)
    check_backbone(config.model, config.pretrained, config.activation)
    check_device(config.device)
    check_workers(config.workers)
    if config.graph == "on" and (config.device == "cpu" or not torch.cuda.is_available()):
        raise ValueError(f"--graph on: expected auto or off on a CPU (--device {config.device})")
    check_loggers(config)


def check_device(device: str) -> None:
    """Raise a ValueError for an unknown device, or one that this machine does not have."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device {device}: expected cpu, cuda or auto")
    if not device.startswith("cuda"):
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        raise ValueError(f"--device {device}: expected cpu, because torch finds no CUDA device")
    if int(device.partition(":")[2] or 0) >= gpus:
        raise ValueError(f"--device {device}: expected at most cuda:{gpus - 1}")


def check_workers(workers: int | None) -> None:
    """Raise a ValueError for several workers where torchrun has started processes that share each run."""
    if workers not in (None, 1) and is_started_together():
        raise ValueError(f"--workers {workers}: expected 1 under torchrun, whose processes share each run")


def check_data(config: TrainConfig, tokenize: Tokenizer | None = None) -> dict[tuple[int, int], str]:
    """Find out whether the data sets are there, or fetch them, and choose the few-shot split of every run.

    Args:
        config: the options of the runs.
        tokenize: the tokenizer of their model, which has to tell the classes apart; None: load it.

    Returns:
        The fingerprint of each split's images, by shots and seed.
    """
    tokenize = load_tokenizer(config.model, config.pretrained) if tokenize is None else tokenize
    class_names = [class_name for name in config.kept() for class_name in check_classes(config, name, tokenize)]
    learned = load(config, config.data)
    parts = datasets.base_and_new(learned) if config.protocol == "base-to-new" else (learned,)
    for part in parts:
        _check_prompts(config, part.asked_as or part.name, part.name, part.class_names, tokenize)
    if config.preserves:
        class_names += [class_name for part in parts for class_name in part.class_names]
        check_vocabulary(config, class_names, tokenize)
    learned = parts[0]
    without = len(learned.class_names) - len(learned.labels[learned.train].unique())
    if without:
        raise ValueError(
            f"data set {config.data!r}: {without} of its {len(learned.class_names)} classes have no image to train on, "
            "expected --protocol base-to-new, which learns the first half of the classes, or another data set"
        )
    is_file = config.draw.endswith((".json", ".pkl"))
    if is_file and len(config.seeds) > 1 and "{seed}" not in config.draw:
        raise ValueError(f"--draw {config.draw}: one split for the seeds {config.seeds}, expected {{seed}} in the path")
    splits = {
        (shots, seed): datasets.choose_split(learned, shots, seed, config.draw)
        for seed in config.seeds
        for shots in config.shots
    }
    if config.validation and not all(len(split.val) for split in splits.values()):
        raise ValueError(
            f"--validation: --draw {config.draw} chooses no validation images from {config.data}, expected a data set "
            "that has some"
        )
    return {cell: fingerprint(learned, split) for cell, split in splits.items()}


def check_classes(config: TrainConfig, name: str, tokenize: Tokenizer) -> Sequence[str]:
    """Find out whether a data set is there, or fetch it, and whether the model can tell its classes apart.

    Returns:
        The names of its classes.
    """
    if config.download:
        dataset = load(config, name)
        called, class_names = dataset.name, dataset.class_names
    else:
        called, class_names = datasets.check_dataset(name, config.data_root)
    _check_prompts(config, name, called, class_names, tokenize)
    return class_names


def _check_prompts(
    config: TrainConfig, source: str, name: str, class_names: Sequence[str], tokenize: Tokenizer
) -> None:
    templates, for_steps = templates_for(config.template, name), training_template(config.template, name)
    check_told_apart(source, class_names, templates, for_steps, tokenize)
    warn_of_truncation(source, class_names, templates, for_steps, tokenize)
