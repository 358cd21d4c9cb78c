"""Draws docs/overview.png, the figure of the README, of the results files: part of `make report`.

Left: where the projections of Comp-LoRA sit in a layer. Right: memory and time of a training step beside PEFT's, of
what was measured on CPUs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from benchmarks import machine, results
from benchmarks.report import OURS
from benchmarks.results import Results, Row

FIGURE = Path(__file__).parents[1] / "docs" / "overview.png"
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#777777"
MEMORY = "ViT-B-32-quickgelu, 8 images, image tower, six linears, r=16, float32"
MEMORY_OF = {"PEFT eager": "PEFT", "complora_kernels": "ours", 'ours, recompute="mlp"': "ours, MLP\nrecomputed"}
# (benchmark, beginning of the shape, baseline) -> label
TIMES = {
    ("step", "ViT-B-32-quickgelu, 8 images, 100", "PEFT eager"): "open_clip ViT-B/32 and\n100 prompts of 77 positions",
    (
        "step",
        "ViT-B-32-quickgelu, 8 images, 100",
        "PEFT eager, prompts cut",
    ): "the same, PEFT with\nits prompts cut too",
    ("libraries", "transformers' CLIP", "PEFT eager"): "transformers' CLIP ViT-B/16",
    ("step", "ViT-B-32-quickgelu, 8 images, image", "PEFT eager"): "open_clip ViT-B/32, images",
    ("libraries", "timm's ViT-S/16", "PEFT eager"): "timm ViT-S/16",
    ("libraries", "transformers' DINOv2", "PEFT eager"): "transformers' DINOv2 ViT-S/14",
}


def memory(files: Iterable[Results]) -> dict[str, float]:
    """MiB of a step by label."""
    rows = [row for row in measured_on_cpus(files) if row.benchmark == "memory" and row.shape == MEMORY]
    found = {row.baseline: row.peak_bytes / 2**20 for row in rows if row.peak_bytes is not None}
    return {label: found[name] for name, label in MEMORY_OF.items() if name in found}


def times(files: Iterable[Results]) -> dict[str, Row]:
    """By label the row whose ratio is PEFT's time of a step over ours."""
    rows = [row for row in measured_on_cpus(files) if row.ratio is not None and row.baseline not in OURS]
    return {
        label: row
        for (benchmark, shape, baseline), label in TIMES.items()
        for row in rows
        if row.benchmark == benchmark and row.shape.startswith(shape) and row.baseline == baseline
    }


def measured_on_cpus(files: Iterable[Results]) -> list[Row]:
    return [row for file in files if "gpu" not in file.machine for row in file.rows]


def draw(files: list[Results], path: Path) -> None:
    figure = plt.figure(figsize=(12, 4.1), layout="constrained")
    layer, memory_axis, time_axis = figure.subplots(1, 3, width_ratios=[1.25, 0.8, 1.15])
    draw_layer(layer)
    draw_memory(memory_axis, memory(files))
    draw_times(time_axis, times(files))
    where = dict.fromkeys(machine.name(file.machine) for file in files if "gpu" not in file.machine)
    figure.supxlabel(
        f"float32, r = 16, q k v o fc1 fc2; two cores of {', '.join(where)}. Not measured on a GPU yet.",
        fontsize=8,
        color=GREY,
        ha="right",
        x=0.99,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_layer(axis: Any) -> None:
    axis.set(xlim=(0, 10), ylim=(0, 7.4))
    axis.axis("off")
    axis.set_title("The projections fold into the factors", fontsize=10)
    box(axis, 3.2, 4.7, 3.6, 1.3, "frozen  W", "#E8E8E8", GREY)
    box(axis, 1.9, 1.9, 2.4, 1.3, "Ã = A P$_{in}$", "#FFF3D6", ORANGE)
    box(axis, 5.0, 1.9, 2.8, 1.3, "B̃ = P$_{out}$ B", "#FFF3D6", ORANGE)
    axis.text(0.2, 3.95, "x", fontsize=13, va="center")
    axis.text(9.55, 3.95, "y", fontsize=13, va="center")
    axis.text(8.5, 3.95, "+", fontsize=15, va="center", ha="center")
    for start, end in (
        ((0.6, 4.05), (3.2, 5.35)),
        ((6.8, 5.35), (8.3, 4.15)),
        ((0.6, 3.85), (1.9, 2.55)),
        ((4.3, 2.55), (5.0, 2.55)),
        ((7.8, 2.55), (8.35, 3.75)),
        ((8.75, 3.95), (9.45, 3.95)),
    ):
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#333333", "linewidth": 1.1})
    axis.text(4.65, 3.42, "rank r", fontsize=8, ha="center", color=GREY)
    axis.text(8.3, 2.75, "· s", fontsize=10)
    axis.text(
        5.0,
        1.35,
        "P$_{out}$ = I − U$_k$U$_k^T$    P$_{in}$ = I − V$_k$V$_k^T$\n"
        "U$_k$, V$_k$: the top-k singular vectors of W, protected\n"
        "y = x W$^T$ + b + s · (x Ã$^T$) B̃$^T$",
        fontsize=9,
        ha="center",
        va="top",
        linespacing=1.6,
    )


def box(axis: Any, x: float, y: float, width: float, height: float, text: str, color: str, edge: str) -> None:
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.1", fc=color, ec=edge))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=11)


def draw_memory(axis: Any, found: dict[str, float]) -> None:
    labels, values = list(found)[::-1], list(found.values())[::-1]
    axis.barh(labels, values, color=[GREY if label == "PEFT" else BLUE for label in labels], height=0.55)
    for place, value in enumerate(values):
        axis.text(value, place, f" {value:.0f} MiB", va="center", fontsize=9)
    axis.set_title("Memory of a step\nViT-B/32, 8 images", fontsize=10)
    axis.set_xlim(0, 1.35 * max(values, default=1))
    plain(axis)


def draw_times(axis: Any, found: dict[str, Row]) -> None:
    labels, rows = list(found)[::-1], list(found.values())[::-1]
    ratios = [row.ratio or 0.0 for row in rows]
    low = [ratio - (row.ratio_low or ratio) for row, ratio in zip(rows, ratios, strict=True)]
    high = [(row.ratio_high or ratio) - ratio for row, ratio in zip(rows, ratios, strict=True)]
    axis.barh(labels, ratios, xerr=[low, high], color=GREY, ecolor="#333333", capsize=2, height=0.55)
    for place, (ratio, above) in enumerate(zip(ratios, high, strict=True)):
        axis.text(ratio + above + 0.08, place, f"{ratio:.2f}×", va="center", fontsize=9)
    axis.axvline(1, color=BLUE, linewidth=1.5)
    axis.set_title("PEFT's time of a step, ours = 1\nright of the line ours is faster", fontsize=10)
    axis.set_xlim(0, 1.25 * max(ratios, default=1))
    plain(axis)


def plain(axis: Any) -> None:
    axis.tick_params(labelsize=8, length=0)
    axis.set_xticks([])
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)


def main() -> None:
    files = results.read_all(Path(__file__).with_name("results"))
    if not times(files) or not memory(files):
        sys.exit("benchmarks/results has no step of a CPU to draw, expected those of `make bench`")
    draw(files, FIGURE)
    print(FIGURE)


if __name__ == "__main__":
    main()
