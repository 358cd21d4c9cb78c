"""A fingerprint of the images that a run saw, which tells whether a result is of the same images as a new run."""

from __future__ import annotations

import hashlib
import json

from complora_kernels.fewshot.datasets.dataset import Dataset
from complora_kernels.fewshot.datasets.few_shot_split import FewShotSplit


def fingerprint(dataset: Dataset, split: FewShotSplit) -> str:
    """12 hexadecimal digits of a hash over the names and labels of all images of a split."""
    parts = [
        [dataset.image_names(indices), dataset.labels[indices].tolist()]
        for indices in (split.train, split.val, split.test)
    ]
    return hashlib.sha256(json.dumps([dataset.class_names, parts]).encode()).hexdigest()[:12]
