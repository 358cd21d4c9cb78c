"""Chooses the few-shot split of a data set: by a rule and a seed, or out of a file."""

from __future__ import annotations

import re
from pathlib import Path

from complora_kernels.fewshot.datasets.dataset import Dataset
from complora_kernels.fewshot.datasets.few_shot_split import FewShotSplit, restrict, with_test_set
from complora_kernels.fewshot.datasets.saved_splits import read_split
from complora_kernels.fewshot.datasets.split_rules import RULES
from complora_kernels.fewshot.files import file_name

_PLACEHOLDER = r"\{[^{}/]*\}"


def choose_split(dataset: Dataset, shots: int, seed: int, kind: str = "own") -> FewShotSplit:
    """Choose `shots` training images of every class and, where the data set has validation images, min(shots, 4).

    The kinds, which are the values of --draw:

    - "own": the split of a seed is part of every larger split of the same seed, and its training images do not depend
      on validation images. A class with fewer validation images gives all of them.
    - "coop": the split that CoOp makes. It is read from CoOp's file `split_fewshot/shot_{shots}-seed_{seed}.pkl` in the
      data set's folder, where there is one. Otherwise Python's random numbers of the seed choose it, for the classes in
      the order in which the data set lists them, first training, then validation images; a class with fewer images
      gives all of them. CoOp leaves seed 0 to chance, and the order of ImageNet's files to the file system: there the
      file is needed, because nothing else tells which images CoOp chose.
    - "clip-lora": the split that CLIP-LoRA makes. It uses the same random numbers, but chooses validation images first,
      and some images of a class with fewer images twice. Where there are no validation images, as on ImageNet, one
      sample of each class's training images gives first those to train on, then those to validate on.
    - the path of a file written by `write_split` (.json), or of one of CoOp's (.pkl). `{shots}` and `{seed}` in it are
      replaced, and `{data}` by the name that `load_dataset` was given, in the spelling of runs' names; a half has the
      name of the whole.

    A half made by `base_and_new` gets the part of the whole data set's split that is in its classes.

    Args:
        dataset: the data set to split.
        shots: training images per class, at least 1.
        seed: seed of the random numbers, at least 0.
        kind: one of the kinds above.

    Raises:
        ValueError: a class with too few images, which is named; a data set for testing only; CoOp's split of ImageNet
            without CoOp's file; an unknown kind; a file of another data set, with other shots, or with an image that
            the data set does not have.
        FileNotFoundError: there is no such file.
    """
    if shots < 1:
        raise ValueError(f"shots={shots}: expected at least 1")
    if seed < 0:
        raise ValueError(f"seed={seed}: expected at least 0")
    if kind not in RULES:
        if not kind.endswith((".json", ".pkl")):
            raise ValueError(f"--draw {kind}: expected {', '.join(RULES)}, or a .json or .pkl file")
        path = _fill_in(kind, dataset, shots, seed)
        split = read_split(path, dataset)
        most = int(dataset.labels[split.train].bincount().max())
        if (split.shots or most) != shots:
            raise ValueError(f"{path}: a split with {split.shots or most} images per class, expected {shots}")
        return split
    if dataset.part_of is not None:
        whole, members = dataset.part_of
        return restrict(choose_split(whole, shots, seed, kind), members, len(whole.labels))
    if not len(dataset.train):
        raise ValueError(f"{dataset.name} is for testing only: it has no training images for {shots} shots")
    cached = None if dataset.root is None else dataset.root / "split_fewshot" / f"shot_{shots}-seed_{seed}.pkl"
    if kind == "coop" and cached is not None:
        if cached.is_file():
            return read_split(cached, dataset)
        if dataset.asked_as == "imagenet":
            raise ValueError(
                f"--draw coop: {cached} is missing, and nothing else tells which images of ImageNet CoOp chose; "
                "expected this file of CoOp's, or --draw own or clip-lora"
            )
    train, val = RULES[kind](dataset, shots, seed)
    return with_test_set(dataset, train, val, shots, seed, kind)


def _fill_in(path: str, dataset: Dataset, shots: int, seed: int) -> Path:
    """The path with its placeholders replaced."""
    whole = dataset if dataset.part_of is None else dataset.part_of[0]
    values = {"{data}": file_name(whole.asked_as or whole.name), "{shots}": str(shots), "{seed}": str(seed)}
    filled = Path(re.sub(_PLACEHOLDER, lambda found: values.get(found[0], found[0]), path)).expanduser()
    unknown = [found for found in re.findall(_PLACEHOLDER, path) if found not in values]
    if unknown and not filled.is_file():
        raise FileNotFoundError(
            f"--draw {path}: there is no file {filled}, and {unknown[0]} is no placeholder, expected "
            f"{', '.join(values)}"
        )
    return filled
