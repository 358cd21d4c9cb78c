"""Which images a run saw, in a few letters: other images under the same names of options are another run."""

from __future__ import annotations

import hashlib
import json

from complora_kernels.fewshot.datasets.dataset import Dataset
from complora_kernels.fewshot.datasets.drawn import Draw


def fingerprint(dataset: Dataset, draw: Draw) -> str:
    """12 hexadecimal digits of the names and labels of the images that a draw gives to train and to measure on."""
    parts = [
        [dataset.image_names(indices), dataset.labels[indices].tolist()]
        for indices in (draw.train, draw.val, draw.test)
    ]
    return hashlib.sha256(json.dumps([dataset.class_names, parts]).encode()).hexdigest()[:12]
