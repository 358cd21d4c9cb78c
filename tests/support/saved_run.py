"""A short run of the few-shot program on the bundled model, whose adapter is saved."""

from pathlib import Path
from typing import Any

from complora_kernels.fewshot.__main__ import main
from complora_kernels.fewshot.files import read_json_lines

FEW = (
    *("--preset", "glyphs", "--shots", "2", "--seeds", "1", "--learning-rates", "0.02"),
    *("--steps", "8", "--workers", "1", "--methods", "output"),
)
"""Options of one short run."""


def train(output: Path, *options: str) -> tuple[Path, dict[str, Any]]:
    """The adapter and the result of the one run of a grid."""
    assert main(["train", *FEW, "--output", str(output), *options]) == 0
    (result,) = read_json_lines(output / "results.jsonl")
    return output / "runs" / result["run"] / "adapter", result
