"""Data sets: labelled images with their lists for training, validation and testing, and their few-shot splits."""

from complora_kernels.fewshot.datasets.bundled import digits, letters
from complora_kernels.fewshot.datasets.choose_split import choose_split
from complora_kernels.fewshot.datasets.dataset import Dataset, base_and_new
from complora_kernels.fewshot.datasets.few_shot_split import FewShotSplit
from complora_kernels.fewshot.datasets.layouts import DOMAIN_SHIFTS, ELEVEN
from complora_kernels.fewshot.datasets.load import NAMES, check_dataset, load_dataset
from complora_kernels.fewshot.datasets.saved_splits import read_split, write_split

__all__ = [
    "DOMAIN_SHIFTS",
    "ELEVEN",
    "NAMES",
    "Dataset",
    "FewShotSplit",
    "base_and_new",
    "check_dataset",
    "choose_split",
    "digits",
    "letters",
    "load_dataset",
    "read_split",
    "write_split",
]
