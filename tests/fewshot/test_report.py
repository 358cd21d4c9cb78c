import csv
import io
import json
import math
import statistics
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import yaml
from fewshot_standin import result_line
from PIL import Image
from rich.console import Console
from scipy import stats

from complora_kernels.fewshot.config import PRESETS
from complora_kernels.fewshot.report.comparisons import compare, whole_block
from complora_kernels.fewshot.report.figures import accuracy_against_shots, figures, fronts, new_against_kept
from complora_kernels.fewshot.report.folder import markdown, report
from complora_kernels.fewshot.report.front import holm, kept_at, paired, retention_difference
from complora_kernels.fewshot.report.labels import parse, part_of
from complora_kernels.fewshot.report.results import read_results
from complora_kernels.fewshot.report.styles import display_name, looks
from complora_kernels.fewshot.report.summary import Summary, summaries
from complora_kernels.fewshot.report.tables import sections
from complora_kernels.fewshot.report.wording import sentences

GLYPHS_FULL = Path(__file__).parents[2] / "benchmarks/results/glyphs-full"

# Points (new, kept) at rising learning rates. From the zero-shot model at (0.1, 0.95), the baseline's front falls to
# 0.1 below ours at 0.3 and stays 0.1 below.
OURS = ((0.2, 0.9), (0.4, 0.8), (0.6, 0.5))
THEIRS = ((0.3, 0.75), (0.4, 0.7), (0.5, 0.55))


def line(method, shots, seed, rate, new, kept):
    return result_line(method, shots, seed, rate, new, kept, (0.1, 0.95 + 0.02 * seed), relative_update=rate)


def grid(seeds=3, shots=(1, 4), shift=0.04):
    """Seeds move both fronts together, and the baseline's away from ours by `shift` each."""
    return [
        line(method, n, seed, rate, new, kept + 0.02 * seed - (shift * seed if method == "lora" else 0))
        for n in shots
        for seed in range(seeds)
        for method, front in (("output", OURS), ("lora", THEIRS))
        for rate, (new, kept) in zip((1e-3, 3e-3, 1e-2), front, strict=True)
    ]


def test_front_is_interpolated_between_its_points():
    new, kept = np.array(OURS).T
    found = kept_at(new, kept, np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]))
    np.testing.assert_allclose(found, [np.nan, 0.9, 0.85, 0.8, 0.65, 0.5, np.nan], rtol=1e-12)


def test_front_that_turns_back_has_its_best_point_at_each_level():
    # Up to 0.8 and back to 0.4: at 0.6 the way up keeps 0.8, the way back 0.3.
    found = kept_at(np.array([0.4, 0.8, 0.4]), np.array([0.9, 0.7, -0.1]), np.array([0.4, 0.6, 0.8]))
    np.testing.assert_allclose(found, [0.9, 0.8, 0.7], rtol=1e-12)


def test_front_with_two_points_at_one_accuracy_has_the_better_one():
    found = kept_at(np.array([0.5, 0.5]), np.array([0.7, 0.6]), np.array([0.5, 0.6]))
    np.testing.assert_allclose(found, [0.7, np.nan])


def summary(lines) -> Summary:
    (found,) = summaries(lines)
    return found


def front_of(lines, method, seed, shots=4):
    return [r for r in read_results(lines) if (r.method, r.seed, r.shots) == (method, seed, shots)]


def test_fronts_are_compared_from_zero_shot_to_the_highest_that_both_reach():
    # The distance grows from 0 to 0.1 + shift · seed between 0.1 and 0.3, and stays until 0.5: its mean is 3/4 of that.
    for seed, expected in enumerate((0.075, 0.105, 0.135)):
        ours, theirs = (front_of(grid(), method, seed) for method in ("output", "lora"))
        assert retention_difference(ours, theirs) == pytest.approx(expected)
        assert retention_difference(theirs, ours) == pytest.approx(-expected)


def test_fronts_without_two_rates_or_any_gain_have_no_difference():
    ours, theirs = (front_of(grid(), method, 1) for method in ("output", "lora"))
    assert retention_difference(ours[:1], theirs) is None
    backwards = front_of([line("lora", 4, 1, rate, 0.1 - rate, 0.5) for rate in (1e-3, 1e-2)], "lora", 1)
    assert retention_difference(ours, backwards) is None
    forgotten = front_of([{**line("lora", 4, 1, rate, 0.5, None), "tasks": {}} for rate in (1e-3, 1e-2)], "lora", 1)
    assert retention_difference(ours, forgotten) is None


def test_seeds_without_a_front_are_left_out():
    results = [result for result in grid() if not (result["seed"] == 1 and result["method"] == "lora")]
    comparison = compare(read_results(results), "output", "lora", ["new"])
    assert comparison.by_shots[4].over_seeds.seeds == 2
    assert comparison.by_shots[4].over_seeds.mean == pytest.approx((0.075 + 0.135) / 2)
    alone = [result for result in grid() if result["learning_rate"] == 1e-3]
    comparison = compare(read_results(alone), "output", "lora", ["new"])
    assert (comparison.by_shots, comparison.overall) == ({}, None)


def test_shots_of_other_methods_do_not_change_a_comparison():
    pair = grid(shots=(1, 4))
    expected = compare(read_results(pair), "output", "lora", ["new"])
    assert expected.overall is not None
    more = [line("both", 16, seed, rate, 0.5, 0.5) for seed in range(3) for rate in (1e-3, 1e-2)]
    alone = [result for result in grid(shots=(8,)) if result["method"] == "lora"]
    found = compare(read_results([*pair, *more, *alone]), "output", "lora", ["new"])
    assert found == expected
    assert found.shots == [1, 4]
    with_lora, with_output = (
        f"keeps 10.5 points more than {baseline} (95% interval" for baseline in ("lora", "output")
    )
    assert any(with_lora in text for text in sentences(summary([*pair, *more, *alone])))
    assert "All shots are those that both methods have." in markdown([summary([*pair, *more, *alone])])
    assert "All shots are" not in markdown([summary(pair)])
    assert with_output not in markdown([summary(pair)])


def test_sentence_without_a_comparison_tells_the_reason():
    one_rate = [result for result in grid(shots=(1,)) if result["learning_rate"] == 1e-3 or result["method"] == "lora"]
    assert sentences(summary([*one_rate, *grid(shots=(4,))])) == [
        "output and lora: no seed counts at every number of shots that both have "
        "(it takes two learning rates or more, of which one gains new-task accuracy)."
    ]
    apart = [result for result in grid() if (result["shots"] == 1) == (result["method"] == "lora")]
    assert sentences(summary(apart)) == ["output and lora have no data set, number of shots and seed in common."]
    assert not summary(apart).comparisons[0].at_rate


def test_differences_at_one_learning_rate_are_means_over_shots():
    lines = [*grid(), line("lora", 8, 0, 3e-3, 0.5, 0.5)]  # a number of shots that output does not have
    lines[0] = {**lines[0], "new": 0.8}  # output, 1 shot, seed 0, at 1e-3: 0.5 more than lora
    at_rate = compare(read_results(lines), "output", "lora", ["new", "kept"]).at_rate
    new = at_rate[1e-3, None]["new"].over_seeds
    assert new == pytest.approx(paired([0.2, -0.1, -0.1]))
    assert at_rate[1e-3, 1]["new"].over_seeds == pytest.approx(paired([0.5, -0.1, -0.1]))
    assert at_rate[3e-3, None]["kept"].over_seeds == pytest.approx(paired([0.1, 0.14, 0.18]))


def test_comparison_uses_the_largest_block_without_a_gap():
    begun = {("a", 0): 1, ("b", 0): 2, ("c", 0): 3, ("a", 1): 4, ("b", 1): 5, ("c", 1): 6, ("a", 2): 7}
    assert set(whole_block(begun)) == {(cell, seed) for cell in "abc" for seed in (0, 1)}
    with_a_gap = {(cell, seed): 0 for cell in "abcd" for seed in range(3) if (cell, seed) != ("b", 1)}
    assert set(whole_block(with_a_gap)) == {(cell, seed) for cell in "acd" for seed in range(3)}
    assert whole_block({}) == {}
    apart = {(cell, seed): 0 for seed, cells in enumerate(("ab", "cd", "ab")) for cell in cells}
    assert set(whole_block(apart)) == {(cell, seed) for cell in "ab" for seed in (0, 2)}


def over_data_sets(baselines=((0.5, 0.6), (0.4, 0.4)), shift=(0.1, -0.02)):
    """New-task accuracies by data set and seed; output is better by `shift` on each data set, seed 1 by 0.01 more."""
    return [
        {**line(method, 16, seed, 2e-4, value + gain, None), "data": data, "protocol": "few-shot", "tasks": {}}
        for data, values, more in zip(("cars", "pets"), baselines, shift, strict=True)
        for seed, value in enumerate(values)
        for method, gain in (("lora", 0.0), ("output", more + 0.01 * seed))
    ]


def test_differences_are_paired_by_data_set_and_seed():
    gain = compare(read_results(over_data_sets()), "output", "lora", ["new"]).at_rate[2e-4, 16]["new"]
    assert gain.over_seeds == pytest.approx(paired([(0.1 - 0.02) / 2, (0.11 - 0.01) / 2]))
    assert (gain.better, gain.data_sets) == (1, 2)
    (text,) = sentences(summary(over_data_sets()))
    assert text == (
        "At learning rate 0.0002, output reaches 4.5 points more than lora on the new task (95% interval -1.9 to +10.9 "
        "over 2 seeds, 2 of them with a gain; a gain on 1 of 2 data sets; the interval includes zero: no difference "
        "shown)."
    )


def test_fronts_are_paired_by_data_set_and_seed():
    swapped = {"output": "lora", "lora": "output"}
    cars = [{**result, "data": "cars", "tasks": {}} for result in grid()]  # 0.075, 0.105 and 0.135
    pets = [{**result, "data": "pets", "tasks": {}, "method": swapped[result["method"]]} for result in grid(shift=0)]
    comparison = compare(read_results([*cars, *pets]), "output", "lora", ["new"])
    for gain in (comparison.by_shots[1], comparison.overall):
        assert gain is not None
        assert gain.over_seeds == pytest.approx(paired([0.0, 0.015, 0.03]))
        assert (gain.better, gain.data_sets) == (1, 2)


def test_method_without_rates_is_compared_at_each_rate_of_its_baseline():
    lines = [*grid(seeds=2), *(line("tip-adapter", n, seed, None, 0.5, 0.9) for n in (1, 4) for seed in range(2))]
    comparison = compare(read_results(lines), "tip-adapter", "lora", ["new"])
    assert comparison.overall is None
    assert comparison.at_rate[1e-3, None]["new"].over_seeds.mean == pytest.approx(0.5 - 0.3)
    assert comparison.at_rate[1e-2, None]["new"].over_seeds.mean == pytest.approx(0.0)
    found = summary(lines)
    assert found.rows[-1] == ("tip-adapter", None)
    assert not any("tip-adapter" in text for text in sentences(found))  # a method without rates has no front
    one_rate = [result for result in lines if result["learning_rate"] in (1e-3, None)]
    assert "With lora at learning rate 0.001, tip-adapter reaches 20.0 points more" in " ".join(
        sentences(summary(one_rate))
    )


def test_interval_is_that_of_students_t():
    mean, low, high, wins, seeds, p = paired([0.1, 0.3, -0.1, 0.2])
    sd = statistics.stdev([0.1, 0.3, -0.1, 0.2])
    half = 3.182446305284263 * sd / 2  # the 97.5% point of t with three degrees of freedom, from a table
    assert (mean, low, high) == pytest.approx((0.125, 0.125 - half, 0.125 + half))
    assert (wins, seeds) == (3, 4)
    _, expected = stats.ttest_1samp([0.1, 0.3, -0.1, 0.2], 0)
    assert p == pytest.approx(expected)
    assert paired([0.1]).low == -math.inf


def test_p_value_where_all_seeds_agree_and_where_there_is_one():
    assert paired([0.25, 0.25]).p == 0
    assert paired([0.0, 0.0]).p == 1
    assert math.isnan(paired([0.1]).p)


def test_holm_corrects_for_the_number_of_tests():
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])  # as p.adjust of R
    assert holm([0.6, math.nan, 0.005, 0.7]) == pytest.approx([1, math.nan, 0.015, 1], nan_ok=True)
    assert holm([]) == []


def test_comparisons_at_equal_accuracy_have_corrected_p_values():
    table = next(table for table in sections(summary(grid())) if "p" in table.head)
    (comparison,) = summary(grid()).comparisons
    assert comparison.overall is not None
    assert [row[-1] for row in table.body] == [f"{comparison.overall.over_seeds.p:.3f}"]
    assert "corrected for 1 test by Holm's method" in " ".join(table.text)


def test_summary_has_means_and_deviations_over_seeds():
    found = summary(grid())
    assert found.methods == ["lora", "output"]
    assert (found.shots, found.seeds, found.learning_rates) == ([1, 4], [0, 1, 2], [1e-3, 3e-3, 1e-2])
    cell = found.cells["output", 3e-3, 4]
    assert cell.kept == pytest.approx((0.82, 0.02))
    assert cell.new == pytest.approx((0.4, 0.0))
    assert found.zero_shot[1].means[1] == pytest.approx(0.97)
    (comparison,) = found.comparisons
    assert (comparison.method, comparison.baseline) == ("output", "lora")
    assert comparison.overall is not None
    assert comparison.overall.over_seeds.mean == pytest.approx(0.105)
    assert comparison.overall.over_seeds.wins == 3
    assert comparison.at_rate[3e-3, None]["kept"].over_seeds.mean == pytest.approx(0.14)


def test_sentence_tells_direction_and_significance():
    (better,) = sentences(summary(grid()))
    assert better == (
        "At equal new-task accuracy, output keeps 10.5 points more than lora "
        "(95% interval +3.0 to +18.0 over 3 seeds, 3 of them with a gain; the interval excludes zero)."
    )
    (unsure,) = sentences(summary(grid(shift=-0.12)))  # 0.075, -0.015 and -0.105
    assert "keeps 1.5 points less than lora (95% interval -23.9 to +20.9" in unsure
    assert "1 of them with a gain; the interval includes zero: no difference shown" in unsure
    (equal,) = sentences(summary(grid(shift=-0.1)))
    assert "keeps as much as lora (95% interval -18.6 to +18.6" in equal
    same = [{**result, "method": m} for result in grid() if result["method"] == "lora" for m in ("lora", "output")]
    assert sentences(summary(same)) == [
        "At equal new-task accuracy, output keeps exactly as much as lora in each of 3 seeds."
    ]
    slight = [line(m, 4, seed, 1e-3, 0.5, 0.5 + 1e-5 * seed + (3e-4 if m == "output" else 0) * (1 + 0.1 * seed))
              for m in ("lora", "output") for seed in range(3)]  # fmt: skip
    _, kept = sentences(summary(slight))
    assert "output keeps less than 0.1 points more than lora (95% interval +0.0 to +0.0" in kept
    (single,) = sentences(summary(grid(seeds=1)))
    assert single.endswith("keeps 7.5 points more than lora (one seed: no interval).")


def test_markdown_holds_the_numbers():
    text = markdown([summary(grid())])
    assert "| output | 0.003 | 40.0 ± 0.0 / 82.0 ± 2.0 | 40.0 ± 0.0 / 82.0 ± 2.0 | 0.003 |" in text
    assert "| zero-shot |  | 10.0 ± 0.0 / 97.0 ± 2.0 |" in text
    assert "| output - lora | +10.5 [+3.0, +18.0], 3/3 |" in text
    assert "| output - lora, retained | +19.0 [+9.1, +28.9], 3/3 | +14.0 [+4.1, +23.9], 3/3 |" in text


def test_published_table_matches_the_published_results():
    lines = [json.loads(text) for text in (GLYPHS_FULL / "results.jsonl").read_text().splitlines()]
    assert markdown(summaries(lines)) == (GLYPHS_FULL / "table.md").read_text()


@pytest.mark.parametrize("name", ["glyphs-ablation", "glyphs-full"])
def test_published_report_does_not_depend_on_the_order_of_the_lines(tmp_path, name, monkeypatch):
    monkeypatch.setattr("complora_kernels.fewshot.report.folder.write_figures", lambda *_: [])
    published = GLYPHS_FULL.parent / name
    lines = (published / "results.jsonl").read_text().splitlines(keepends=True)
    few = [text for text in lines if json.loads(text)["seed"] < 3]
    (tmp_path / "config.json").write_text((published / "config.json").read_text())
    tables = []
    for seed in range(3):
        (tmp_path / "results.jsonl").write_text("".join(few))
        report(tmp_path, Console(file=io.StringIO()))
        tables.append([(tmp_path / f"table.{suffix}").read_bytes() for suffix in ("md", "csv", "tex")])
        Random(seed).shuffle(few)
    assert tables[0] == tables[1] == tables[2]
    methods = dict.fromkeys(row["method"] for row in csv.DictReader(io.StringIO(tables[0][1].decode())))
    assert [method for method in methods if "of the update" not in method] == of_file(name)


def of_file(name):
    """The methods of a published folder, in the order in which somebody wrote them."""
    path = GLYPHS_FULL.parents[1] / "sweeps" / f"{name}.yaml"
    return list(yaml.safe_load(path.read_text())["methods"]) if path.exists() else list(PRESETS[name].methods)


def test_unfinished_grid_is_reported(tmp_path):
    for part in (grid()[:1], grid()[:7], [r for r in grid() if r["method"] == "lora"]):
        (tmp_path / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in part))
        report(tmp_path, Console(file=io.StringIO()))


def write(folder, lines, name="results.jsonl"):
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_report_writes_table_and_figures(tmp_path):
    write(tmp_path, [line for line in grid() if line["shots"] == 4])  # an earlier report, of one number of shots
    report(tmp_path, Console(file=io.StringIO()))
    assert (tmp_path / "figures" / "accuracy_against_rate.png").exists()
    write(tmp_path, grid())
    shown = io.StringIO()
    report(tmp_path, Console(file=shown, width=80))
    assert "82.0±2.0" in shown.getvalue()
    names = ("accuracy_against_shots", "new_against_kept", "fronts", "differences")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(f"{name}.png" for name in names)
    for name in names[:3]:
        with Image.open(tmp_path / "figures" / f"{name}.png") as picture:
            assert min(picture.size) > 300
            colours = picture.convert("RGB").getcolors(1 << 24)
            assert colours is not None
            assert {(0, 114, 178), (0, 0, 0)} <= {colour for _, colour in colours}  # both methods' lines
    assert sorted(path.name for path in tmp_path.glob("table.*")) == ["table.csv", "table.md", "table.tex"]
    assert not list(tmp_path.rglob(".*"))  # no temporary file


def test_failed_runs_without_a_result_are_listed(tmp_path):
    error = "the loss is NaN\nat step [7] | rate 0.01"
    failed = [{"run": "lora-4shot-lr0.01-seed7", "error": "an older one"}, {"run": grid()[0]["run"], "error": "gone"}]
    write(tmp_path, [*failed, {"run": "lora-4shot-lr0.01-seed7", "error": error}], "failures.jsonl")
    shown = io.StringIO()
    with pytest.raises(FileNotFoundError, match=r"has finished a run \(2 failed"):
        report(tmp_path, Console(file=shown))
    write(tmp_path, grid()[:2])
    report(tmp_path, Console(file=shown, width=200))
    assert "failed: lora-4shot-lr0.01-seed7: the loss is NaN at step [7] | rate 0.01" in shown.getvalue()
    table = (tmp_path / "table.md").read_text()
    assert "- lora-4shot-lr0.01-seed7: the loss is NaN at step [7] | rate 0.01\n" in table
    assert "gone" not in table + shown.getvalue()


def test_protocols_have_sections_of_their_own(tmp_path):
    write(tmp_path, [*grid()[:3], *({**result, "protocol": "transfer", "data": "imagenet"} for result in grid()[:3])])
    report(tmp_path, Console(file=io.StringIO()))
    table = (tmp_path / "table.md").read_text()
    assert table.index("# few-shot") < table.index("new task (digits)") < table.index("# transfer")
    assert {path.parent.name for path in tmp_path.rglob("*.png")} == {"few-shot", "transfer"}


def drawn(axes) -> dict[str, Any]:
    return {str(container.get_label()): container for container in axes.containers}


def test_figures_show_means_and_deviations_with_labels():
    found = summary(grid())
    figure = new_against_kept(found)
    assert [axes.get_title() for axes in figure.axes] == ["1 shot", "4 shots"]
    assert all("new-task accuracy" in axes.get_xlabel() for axes in figure.axes)
    assert "retained" in figure.axes[0].get_ylabel()
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert set(labels) == {"zero-shot", "LoRA", "Comp-LoRA, output"}
    points, _, bars = drawn(figure.axes[1])["Comp-LoRA, output"].lines
    np.testing.assert_allclose(points.get_xydata(), 100 * np.array([(new, kept + 0.02) for new, kept in OURS]))
    for segment, (_, kept) in zip(bars[1].get_segments(), OURS, strict=True):
        np.testing.assert_allclose(segment[:, 1], [100 * kept, 100 * kept + 4])  # mean ± sd

    figure = accuracy_against_shots(found)
    assert [axes.get_title() for axes in figure.axes] == [
        f"learning rate {rate}" for rate in ("0.001", "0.003", "0.01")
    ]
    assert all("shots" in axes.get_xlabel() for axes in figure.axes)


def test_fronts_run_from_zero_shot_to_the_most_that_is_learned():
    lines = [*grid(seeds=1), line("lora", 4, 0, 3e-2, 0.2, 0.1)]  # too high a rate
    curves = {str(curve.get_label()): curve for curve in fronts(summary(lines)).axes[1].lines}
    points = np.column_stack([curves["LoRA"].get_xdata(), curves["LoRA"].get_ydata()])
    np.testing.assert_allclose(points, 100 * np.array([(0.1, 0.95), *THEIRS]))


def test_figures_of_a_sweep_over_data_sets_without_anything_kept():
    lines = [{**result, "shots": shots} for result in over_data_sets() for shots in (1, 4)]
    pictures = figures(summary(lines))
    assert set(pictures) == {"accuracy_against_shots", "accuracy_by_data_set", "differences"}
    assert [axes.get_title() for axes in pictures["accuracy_by_data_set"].axes] == ["cars", "pets"]
    points = drawn(pictures["accuracy_against_shots"].axes[0])["LoRA"].lines[0].get_xydata()
    np.testing.assert_allclose(points[:, 1], 100 * (0.55 + 0.4) / 2)
    one = figures(summary(over_data_sets()))
    assert set(one) == {"accuracy_by_data_set", "differences"}
    rows = [label.get_text() for label in one["accuracy_by_data_set"].axes[0].get_yticklabels()]
    assert rows == ["cars", "pets", "average"]


PARTS = [part_of(method, share) for method in ("lora", "random", "activations") for share in (1, 0.5)]
PARTS = [method.removesuffix(", 1 of the update") for method in PARTS]


@pytest.mark.parametrize("methods", [["lora", "lora, wd 0.3", "output"], [*PARTS, "output", "lora, wd 0.3"]])
def test_method_has_one_colour_in_all_figures(methods):
    lines = [
        {**line(method, 16, seed, 1e-3, 0.5 + 0.01 * i, 0.9), "data": data, "protocol": "retention", "tasks": {}}
        for i, method in enumerate(methods) for seed in range(2) for data in ("cars", "pets")
    ]  # fmt: skip
    found = summary(lines)
    of = looks(found.labels, found.stand_ins).of
    assert len({look["color"] for look in of.values()}) == len(methods)
    pictures = figures(found)
    panels = pictures["new_against_kept"].axes
    in_panels = {name: bars.lines[0].get_color() for axes in panels for name, bars in drawn(axes).items()}
    assert in_panels == {display_name(method): of[method]["color"] for method in found.methods}
    rows: list[Any] = pictures["differences"].axes[0].containers
    expected = [of[comparison.method]["color"] for comparison in found.comparisons]
    assert [bars.lines[0].get_color() for bars in rows] == expected


def test_part_of_an_update_is_named_after_its_method():
    assert display_name("lora-wd, 0.5 of the update") == "LoRA, weight decay, 0.5 of the update"
    assert display_name("mine, k 3, 0.5 of the update") == "mine, k 3, 0.5 of the update"
    methods = ["lora", *(f"both{setting}" for setting in ("", *(f", energy 0.{n}" for n in range(4, 9))))]
    legend = looks({method: parse(method) for method in methods}, {}).legend
    assert "no setting named" in dict(legend)


@pytest.mark.parametrize("protocol", ["few-shot", "domain-shift", "base-to-new"])
def test_titles_of_the_differences_do_not_overlap(protocol):
    tasks = {"new classes" if protocol == "base-to-new" else "letters": [0.9, 0.8]}
    rows = [
        {**line(method, 16, seed, 1e-2, 0.5, 0.8), "protocol": protocol, "tasks": tasks}
        for method in ("lora", "both, energy 0.95, activations", "both, energy 0.95, random") for seed in range(2)
    ]  # fmt: skip
    figure = figures(summary(rows))["differences"]
    figure.draw_without_rendering()
    boxes = [axes.title.get_window_extent() for axes in figure.axes]
    assert len(boxes) == (3 if protocol == "base-to-new" else 2)
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert boxes[-1].x1 <= figure.bbox.x1


def test_accuracy_axes_end_at_100():
    lines = [line(method, n, 0, 1e-3, 1.0, 1.0) for method in ("lora", "output") for n in (1, 256)]
    pictures = figures(summary(lines))
    for low, high in (
        pictures["new_against_kept"].axes[0].get_xlim(),
        pictures["new_against_kept"].axes[0].get_ylim(),
        pictures["accuracy_against_shots"].axes[0].get_ylim(),
    ):
        assert 100 < high <= 100 + 0.03 * (100 - low)
    assert pictures["accuracy_against_shots"].axes[0].get_xlim()[1] > 256


ABLATION = [
    "lora",
    *(f"{side}, energy {energy}{source}" for side in ("output", "both") for energy in (0.5, 0.9, 0.95)
      for source in ("", ", activations", ", random")),
    *(f"lora, wd {decay}" for decay in (0.03, 0.3, 1)),
]  # fmt: skip


def test_many_methods_are_spread_over_panels_by_side_and_source():
    lines = [
        {**line(method, 4, seed, rate, 0.3 + 10 * rate + 0.01 * i, 0.9 - 10 * rate), "tasks": {}}
        for i, method in enumerate(ABLATION) for seed in range(2) for rate in (1e-3, 3e-3, 1e-2)
    ]  # fmt: skip
    lines[0]["interpolated"] = [{"share": 0.5, "new": 0.3, "kept": 0.9, "tasks": {}}]
    pictures = figures(summary(lines))
    assert set(pictures) == {"accuracy_against_rate", "new_against_kept", "fronts", "differences"}
    panels = {axes.get_title(): axes for axes in pictures["new_against_kept"].axes}
    assert list(panels) == [
        "LoRA and others",
        *("output side, weight's subspace", "both sides, weight's subspace"),
        *("output side, activations' subspace", "both sides, activations' subspace"),
        *("output side, random subspace", "both sides, random subspace"),
    ]
    assert set(drawn(panels["LoRA and others"])) == {"LoRA", *ABLATION[-3:], "LoRA, 0.5 of the update"}
    both = {"LoRA", *(f"both, energy {energy}, random" for energy in (0.5, 0.9, 0.95))}
    assert set(drawn(panels["both sides, random subspace"])) == both
    assert len(pictures["differences"].axes[0].get_yticks()) == len(ABLATION) + 6 - 1  # the shared point has no front


def test_plain_lora_under_another_name_is_in_every_panel(tmp_path):
    kinds = {"baseline": "lora", "baseline, decayed": "lora", "control": "random-both", "control, k 3": "random-both"}
    kinds |= {"ours": "both", "ours, k 3": "both", "mine": "output"}
    rates = (1e-3, 3e-3)
    lines = [
        {**line(kind, 4, seed, rate, 0.3 + 10 * rate, 0.9), "label": name, "options": {}, "tasks": {}}
        for name, kind in kinds.items() for seed in range(2) for rate in rates
    ]  # fmt: skip
    found = summary(lines)
    panels = {axes.get_title(): set(drawn(axes)) for axes in new_against_kept(found).axes}
    assert panels == {
        "LoRA and others": {"baseline", "baseline, decayed"},
        "output side, weight's subspace": {"baseline", "mine"},
        "both sides, weight's subspace": {"baseline", "ours", "ours, k 3"},
        "both sides, random subspace": {"baseline", "control", "control, k 3"},
    }
    few = summary([result for result in lines if result["label"] in ("baseline", "ours", "control")])
    of = looks(few.labels, few.stand_ins).of
    assert list(of) == ["baseline", "control", "ours"]
    assert of == {name: looks({kinds[name]: parse(kinds[name])}, {}).of[kinds[name]] for name in of}
    axes = figures(few)["differences"].axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "control − baseline", "ours − baseline", "ours − control"
    ]  # fmt: skip
    assert any(np.allclose(curve.get_ydata(), 1.5) for curve in axes.lines)  # between LoRA's rows and the control's


@pytest.mark.parametrize(
    "methods", [ABLATION, ["lora", "lora, wd 1", "mine, r 2", "mine, r 4", "mine, r 8", "both, a"]]
)
def test_no_two_methods_look_the_same(methods):
    labels = {method: parse(method) for method in methods}
    found = [sorted(look.items()) for look in looks(labels, {}).of.values()]
    assert len(set(map(str, found))) == len(methods)
