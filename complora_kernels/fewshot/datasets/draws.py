"""Which images a seed draws from a data set."""

from __future__ import annotations

import re
from pathlib import Path

from complora_kernels.fewshot.datasets.dataset import Dataset
from complora_kernels.fewshot.datasets.draw_files import read_draw
from complora_kernels.fewshot.datasets.draw_rules import RULES
from complora_kernels.fewshot.datasets.drawn import Draw, complete, restrict
from complora_kernels.fewshot.files import file_name

_PLACEHOLDER = r"\{[^{}/]*\}"


def draw(dataset: Dataset, shots: int, seed: int, kind: str = "own") -> Draw:
    """Draw `shots` images of every class to train on, and min(shots, 4) to validate on where the data set has such.

    - "own": the draw of a seed is part of every larger draw of the same seed, and does not depend on validation images.
      A class with fewer validation images gives what it has.
    - "coop": what CoOp draws. Its file `split_fewshot/shot_{shots}-seed_{seed}.pkl` beside the data set, if it is
      there. Otherwise Python's random numbers of the seed, for the classes in the order in which the split lists them,
      first to train on, then to validate on; of a class with fewer images, all. CoOp leaves seed 0 to chance, and on
      ImageNet the order of the files to the file system: there only its file tells what it drew, and it is needed.
    - "clip-lora": what CLIP-LoRA draws. The same random numbers, but first to validate on, and of a class with fewer
      images some twice. Where there are no validation images, as on ImageNet, those to train on come first, then those
      to validate on, both out of one sample of each class's training images.
    - the path of a file written by `write_draw` (.json), or of one of CoOp's (.pkl). `{shots}` and `{seed}` in it are
      replaced, and `{data}` by what `load_dataset` was asked for, in the spelling of runs' names; a half is called as
      the whole.

    One half of `base_and_new` gets what the whole data set's draw has of its classes.

    Args:
        dataset: what to draw from.
        shots: images of each class, at least 1.
        seed: chooses the draw, at least 0.
        kind: one of the above.

    Raises:
        ValueError: a class with too few images; it is named. A data set for testing only. ImageNet as CoOp draws it,
            without CoOp's file. An unknown kind, or a file of another data set, with other shots, or that names images
            the data set does not have.
        FileNotFoundError: no such file.
    """
    if shots < 1:
        raise ValueError(f"shots={shots}: expected at least 1")
    if seed < 0:
        raise ValueError(f"seed={seed}: expected at least 0")
    if kind not in RULES:
        if not kind.endswith((".json", ".pkl")):
            raise ValueError(f"draw={kind}: expected {', '.join(RULES)}, or a .json or .pkl file")
        path = _filled_in(kind, dataset, shots, seed)
        drawn = read_draw(path, dataset)
        most = int(dataset.labels[drawn.train].bincount().max())
        if (drawn.shots or most) != shots:
            raise ValueError(f"{path}: a draw of {drawn.shots or most} images a class, expected {shots} shots")
        return drawn
    if dataset.part_of is not None:
        whole, members = dataset.part_of
        return restrict(draw(whole, shots, seed, kind), members, len(whole.labels))
    if not len(dataset.train):
        raise ValueError(f"{dataset.name} is for testing only: there is nothing to draw {shots} shots from")
    cached = None if dataset.root is None else dataset.root / "split_fewshot" / f"shot_{shots}-seed_{seed}.pkl"
    if kind == "coop" and cached is not None:
        if cached.is_file():
            return read_draw(cached, dataset)
        if dataset.asked_as == "imagenet":
            raise ValueError(
                f"draw=coop: {cached} is missing, and nothing else tells which images of ImageNet CoOp drew; expected "
                "this file of CoOp's, or --draw own or clip-lora"
            )
    train, val = RULES[kind](dataset, shots, seed)
    return complete(dataset, train, val, shots, seed, kind)


def _filled_in(path: str, dataset: Dataset, shots: int, seed: int) -> Path:
    whole = dataset if dataset.part_of is None else dataset.part_of[0]
    data = file_name(whole.asked_as or whole.name)
    values = {"{data}": data, "{shots}": str(shots), "{seed}": str(seed)}
    filled = Path(re.sub(_PLACEHOLDER, lambda found: values.get(found[0], found[0]), path)).expanduser()
    unknown = [found for found in re.findall(_PLACEHOLDER, path) if found not in values]
    if unknown and not filled.is_file():
        raise FileNotFoundError(
            f"draw={path}: there is no file {filled}, and {unknown[0]} is no placeholder, expected {', '.join(values)}"
        )
    return filled
