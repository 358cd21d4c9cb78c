"""Data sets: labelled images, how they are split, and which of them are drawn as shots."""

from complora_kernels.fewshot.datasets.bundled import digits, letters
from complora_kernels.fewshot.datasets.dataset import Dataset, base_and_new
from complora_kernels.fewshot.datasets.draw_files import read_draw, write_draw
from complora_kernels.fewshot.datasets.drawn import Draw
from complora_kernels.fewshot.datasets.draws import draw
from complora_kernels.fewshot.datasets.layouts import DOMAIN_SHIFTS, ELEVEN
from complora_kernels.fewshot.datasets.load import NAMES, check_dataset, load_dataset

__all__ = [
    "DOMAIN_SHIFTS",
    "ELEVEN",
    "NAMES",
    "Dataset",
    "Draw",
    "base_and_new",
    "check_dataset",
    "digits",
    "draw",
    "letters",
    "load_dataset",
    "read_draw",
    "write_draw",
]
