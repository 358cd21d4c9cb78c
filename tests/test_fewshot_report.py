import io
import json
import math
import statistics
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from complora_kernels.fewshot.figures import accuracy_against_shots, new_against_kept
from complora_kernels.fewshot.front import differences_at_rate, kept_at, paired, retention_differences
from complora_kernels.fewshot.report import markdown, report, sentence
from complora_kernels.fewshot.summary import Summary

# Points (new, kept) at rising learning rates. From the zero-shot model at (0.1, 0.95), the rival's front falls to 0.1
# below ours at 0.3 and stays 0.1 below.
OURS = ((0.2, 0.9), (0.4, 0.8), (0.6, 0.5))
THEIRS = ((0.3, 0.75), (0.4, 0.7), (0.5, 0.55))


def line(method, shots, seed, rate, new, kept):
    return {
        "run": f"{method}-{shots}shot-lr{rate}-seed{seed}",
        "method": method,
        "shots": shots,
        "seed": seed,
        "learning_rate": rate,
        "new": new,
        "kept": kept,
        "zero_shot_new": 0.1,
        "zero_shot_kept": 0.95 + 0.02 * seed,
        "relative_update": rate,
    }


def grid(seeds=3, shots=(1, 4), shift=0.04):
    """Seeds move both fronts together, and the rival's away from ours by `shift` each."""
    return [
        line(method, n, seed, rate, new, kept + 0.02 * seed - (shift * seed if method == "lora" else 0))
        for n in shots
        for seed in range(seeds)
        for method, front in (("output", OURS), ("lora", THEIRS))
        for rate, (new, kept) in zip((1e-3, 3e-3, 1e-2), front, strict=True)
    ]


def test_front_is_read_between_its_points():
    new, kept = np.array(OURS).T
    found = kept_at(new, kept, np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]))
    np.testing.assert_allclose(found, [np.nan, 0.9, 0.85, 0.8, 0.65, 0.5, np.nan], rtol=1e-12)


def test_front_that_turns_back_counts_with_its_best_part():
    # Up to 0.8 and back to 0.4: at 0.6 the way up keeps 0.8, the way back 0.3.
    found = kept_at(np.array([0.4, 0.8, 0.4]), np.array([0.9, 0.7, -0.1]), np.array([0.4, 0.6, 0.8]))
    np.testing.assert_allclose(found, [0.9, 0.8, 0.7], rtol=1e-12)


def test_front_with_two_points_at_the_same_accuracy():
    found = kept_at(np.array([0.5, 0.5]), np.array([0.7, 0.6]), np.array([0.5, 0.6]))
    np.testing.assert_allclose(found, [0.7, np.nan])


def test_difference_at_equal_new_accuracy_is_averaged_from_zero_shot_to_what_both_reach():
    # From 0.1 to 0.3 the distance grows from 0 to 0.1 + shift · seed, then it stays until 0.5: on average 3/4 of it.
    differences = retention_differences(grid(), "output", "lora", 4)
    assert differences == pytest.approx({0: 0.075, 1: 0.105, 2: 0.135})
    assert retention_differences(grid(), "lora", "output", 4) == pytest.approx({0: -0.075, 1: -0.105, 2: -0.135})


def test_seeds_on_which_nothing_is_learned_are_left_out():
    results = [result for result in grid() if not (result["seed"] == 1 and result["method"] == "lora")]
    results += [line("lora", 4, 1, rate, 0.1 - rate, 0.5) for rate in (1e-3, 1e-2)]
    assert sorted(retention_differences(results, "output", "lora", 4)) == [0, 2]
    alone = [result for result in grid() if result["learning_rate"] == 1e-3]
    assert retention_differences(alone, "output", "lora", 4) == {}


def test_differences_at_one_learning_rate_are_means_over_shots():
    results = [*grid(), line("lora", 8, 0, 3e-3, 0.5, 0.5)]  # which output has not got
    results[0] = {**results[0], "new": 0.8}  # output, 1 shot, seed 0, at 1e-3
    assert sorted(differences_at_rate(results, "output", "lora", 1e-3, "new")) == pytest.approx([-0.1, -0.1, 0.2])
    assert sorted(differences_at_rate(results, "output", "lora", 3e-3, "kept")) == pytest.approx([0.1, 0.14, 0.18])


def test_interval_is_students():
    mean, low, high, wins, seeds = paired([0.1, 0.3, -0.1, 0.2])
    sd = statistics.stdev([0.1, 0.3, -0.1, 0.2])
    half = 3.182446305284263 * sd / 2  # the 97.5% point of t with three degrees of freedom, from a table
    assert (mean, low, high) == pytest.approx((0.125, 0.125 - half, 0.125 + half))
    assert (wins, seeds) == (3, 4)
    assert paired([0.1]).low == -math.inf


def test_summary_of_the_seeds():
    summary = Summary(grid())
    assert summary.methods == ["lora", "output"]
    assert (summary.shots, summary.seeds, summary.learning_rates) == ([1, 4], [0, 1, 2], [1e-3, 3e-3, 1e-2])
    cell = summary.cells["output", 3e-3, 4]
    assert cell.kept == pytest.approx((0.82, 0.02))
    assert cell.new == pytest.approx((0.4, 0.0))
    assert summary.zero_shot[1].kept.mean == pytest.approx(0.97)
    (comparison,) = summary.comparisons
    assert (comparison.method, comparison.rival) == ("output", "lora")
    assert comparison.overall is not None
    assert comparison.overall.mean == pytest.approx(0.105)
    assert comparison.overall.wins == 3
    assert comparison.by_rate[3e-3][1].mean == pytest.approx(0.14)


def test_sentence_says_which_way_and_whether_it_is_shown():
    (better,) = Summary(grid()).comparisons
    assert sentence(better) == (
        "At equal new-task accuracy, output keeps 10.5 points more than lora "
        "(95% interval +3.0 to +18.0 over 3 seeds, 3 of them with a gain; the interval excludes zero)."
    )
    (unsure,) = Summary(grid(shift=-0.12)).comparisons  # 0.075, -0.015 and -0.105
    assert "keeps 1.5 points less than lora (95% interval -23.9 to +20.9" in sentence(unsure)
    assert "1 of them with a gain; the interval includes zero: no difference shown" in sentence(unsure)
    (equal,) = Summary(grid(shift=-0.1)).comparisons
    assert "keeps as much as lora" in sentence(equal)
    (single,) = Summary(grid(seeds=1)).comparisons
    assert sentence(single).endswith("keeps 7.5 points more than lora (one seed: no interval).")


def test_markdown_holds_the_numbers():
    text = markdown(Summary(grid()))
    assert "| output | 0.003 | 40.0 ± 0.0 / 82.0 ± 2.0 | 40.0 ± 0.0 / 82.0 ± 2.0 | 0.003 |" in text
    assert "| zero-shot |  | 10.0 ± 0.0 / 97.0 ± 2.0 |" in text
    assert "| output - lora | +10.5 [+3.0, +18.0], 3/3 |" in text
    assert "| output - lora, retained | +19.0 [+9.1, +28.9], 3/3 | +14.0 [+4.1, +23.9], 3/3 |" in text


def test_unfinished_grid_is_reported(tmp_path):
    for part in (grid()[:1], grid()[:7], [r for r in grid() if r["method"] == "lora"]):
        (tmp_path / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in part))
        report(tmp_path, Console(file=io.StringIO()))


def test_report_writes_table_and_figures(tmp_path):
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in grid()))
    shown = io.StringIO()
    report(tmp_path, Console(file=shown, width=80))
    assert "82.0±2.0" in shown.getvalue()
    for name in ("accuracy_against_shots", "new_against_kept"):
        with Image.open(tmp_path / "figures" / f"{name}.png") as picture:
            assert min(picture.size) > 300
            colours = picture.convert("RGB").getcolors(1 << 24)
            assert colours is not None
            assert {(0, 114, 178), (0, 0, 0)} <= {colour for _, colour in colours}  # both methods' lines
    assert not list(tmp_path.rglob(".*"))  # no temporary file


def test_figures_show_means_and_deviations_with_labels():
    summary = Summary(grid())
    figure = new_against_kept(summary)
    assert [axes.get_title() for axes in figure.axes] == ["1 shot", "4 shots"]
    assert all("new-task accuracy" in axes.get_xlabel() for axes in figure.axes)
    assert "retained" in figure.axes[0].get_ylabel()
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert set(labels) == {"zero-shot", "LoRA", "Comp-LoRA, output"}
    drawn: dict[str, Any] = {str(container.get_label()): container for container in figure.axes[1].containers}
    points, _, bars = drawn["Comp-LoRA, output"].lines
    np.testing.assert_allclose(points.get_xydata(), 100 * np.array([(new, kept + 0.02) for new, kept in OURS]))
    for segment, (_, kept) in zip(bars[1].get_segments(), OURS, strict=True):
        np.testing.assert_allclose(segment[:, 1], [100 * kept, 100 * kept + 4])  # mean ± sd

    figure = accuracy_against_shots(summary)
    assert [axes.get_title() for axes in figure.axes] == [
        f"learning rate {rate}" for rate in ("0.001", "0.003", "0.01")
    ]
    assert all("shots" in axes.get_xlabel() for axes in figure.axes)
