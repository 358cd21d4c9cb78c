"""A short run of the few-shot program on the bundled model, whose adapter is saved."""

from pathlib import Path
from typing import Any

from complora_kernels.fewshot.__main__ import main
from complora_kernels.fewshot.files import read_json_lines


def train(output: Path, *options: str) -> tuple[Path, dict[str, Any]]:
    """The adapter and the result of the one run of a grid."""
    few = (
        "--preset",
        "glyphs",
        "--shots",
        "2",
        "--seeds",
        "1",
        "--learning-rates",
        "0.02",
        "--steps",
        "8",
        "--workers",
        "1",
    )
    assert main(["train", *few, "--methods", "output", "--output", str(output), *options]) == 0
    (result,) = read_json_lines(output / "results.jsonl")
    return output / "runs" / result["run"] / "adapter", result
