import csv
import io
import re
from itertools import product
from random import Random

import pytest
from fewshot_standin import result_line
from rich.console import Console

from complora_kernels.fewshot.datasets import ELEVEN
from complora_kernels.fewshot.escapes import for_latex
from complora_kernels.fewshot.methods import METHODS
from complora_kernels.fewshot.report.comparisons import comparison_pairs, harmonic
from complora_kernels.fewshot.report.folder import failures, latex, markdown, terminal_table
from complora_kernels.fewshot.report.formats import LATEX_HEAD, Table, markdown_table, to_latex
from complora_kernels.fewshot.report.labels import Label, Variant, parse, plain_lora, stand_ins
from complora_kernels.fewshot.report.results import read_results
from complora_kernels.fewshot.report.spreadsheet import to_csv
from complora_kernels.fewshot.report.summary import Summary, summaries
from complora_kernels.fewshot.report.tables import accuracy_table, data_set_table, kept_table, sections
from complora_kernels.fewshot.report.wording import gaps, kept_name


def line(
    data, method, seed, new, kept=None, shots=4, rate: float | None = 2e-4, protocol="few-shot", tasks=None, **more
):
    zero_shot = (0.25, None if kept is None else 0.5)
    more = {"protocol": protocol, "tasks": tasks or {}, "interpolated": [], **more}
    return result_line(method, shots, seed, rate, new, kept, zero_shot, data, **more)


def summary(lines) -> Summary:
    (found,) = summaries(lines)
    return found


def column(table: Table, name: str) -> dict[tuple[str, ...], str]:
    index = list(table.head).index(name)
    return {tuple(row[: table.labels]): row[index] for row in table.body}


def test_line_without_a_protocol_is_of_the_digits():
    old = {"method": "lora", "shots": 1, "learning_rate": 0.1, "seed": 0, "new": 0.7, "kept": 0.8, "share": 0.5}
    (result,) = read_results([{**old, "zero_shot_new": 0.6, "zero_shot_kept": 0.9, "relative_update": 0.1}])
    assert (result.protocol, result.data, result.tasks) == ("few-shot", "digits", {"letters": (0.9, 0.8)})
    assert (result.method, result.new, result.relative_update) == ("lora", 0.7, 0.1)


def test_a_share_of_the_update_is_listed_as_a_method():
    parts = [
        {"share": share, "new": share, "kept": 1 - share, "tasks": {"a": [0.5, 1 - share]}} for share in (0, 0.5, 1)
    ]
    lines = [line("dtd", "lora", 0, 0.9, 0.4, relative_update=0.2, interpolated=parts, tasks={"a": [0.5, 0.4]})]
    whole, half = read_results(lines)
    assert (whole.method, whole.new, whole.relative_update) == ("lora", 0.9, 0.2)
    assert (half.method, half.new, half.kept, half.relative_update) == ("lora, 0.5 of the update", 0.5, 0.5, 0.1)
    assert (half.zero_shot_new, half.tasks, half.seed) == (0.25, {"a": (0.5, 0.5)}, 0)
    found = summary(lines)
    assert found.methods == ["lora", "lora, 0.5 of the update"]
    assert [(c.method, c.baseline) for c in found.comparisons] == [("lora, 0.5 of the update", "lora")]
    assert "| lora, 0.5 of the update | 0.0002 | 50.0 / 50.0 | 0.100 |" in markdown([found])


def test_last_line_of_a_run_counts():
    assert [r.new for r in read_results([line("dtd", "lora", 0, 0.1), line("dtd", "lora", 0, 0.2)])] == [0.2]
    half = [{"share": 0.5, "new": 0.3, "kept": None, "tasks": {}}]
    again = [line("dtd", "lora", 0, 0.1, interpolated=half), line("dtd", "both", 0, 0.3), line("dtd", "lora", 0, 0.2)]
    assert [(r.method, r.new) for r in read_results(again)] == [("lora", 0.2), ("both", 0.3)]


def test_names_of_methods_are_parsed():
    assert parse("both, energy 0.8, random") == Label("both", "random", "energy 0.8")
    assert parse("random-both") == Label("both", "random", "")
    assert parse("activations") == Label("output", "activations", "")
    assert parse("input, r 4") == Label("input", "weight", "r 4")
    assert parse("lora, wd 0.3") == Label("lora", "", "wd 0.3")
    assert parse("linear-probe") == Label("linear-probe", "", "")


def test_methods_are_ordered_as_in_METHODS_then_by_name():
    names = ["mine", "both", "output, r 4", "lora"]
    assert summary([line("dtd", name, 0, 0.5) for name in names]).methods == ["lora", "both", "mine", "output, r 4"]
    assert summary([line("dtd", name, 0, 0.5) for name in reversed(METHODS)]).methods == list(METHODS)


def named(*names):
    """Methods of lines that tell no more than a name."""
    return {name: Variant(name) for name in names}


def test_comparison_pairs_by_names():
    assert comparison_pairs(named("lora", "output", "input", "both", "random", "random-both")) == [
        ("output", "lora"),
        ("input", "lora"),
        ("both", "lora"),
        ("random", "lora"),
        ("random-both", "lora"),
        ("output", "random"),
        ("both", "random-both"),
    ]
    labels = ["lora", "lora, wd 1", "both, wd 1", "both, wd 1, random", "both, wd 1, activations", "output, wd 1"]
    assert comparison_pairs(named(*labels))[len(labels) - 1 :] == [
        ("both, wd 1", "lora, wd 1"),
        ("both, wd 1, random", "lora, wd 1"),
        ("both, wd 1, activations", "lora, wd 1"),
        ("output, wd 1", "lora, wd 1"),
        ("both, wd 1", "both, wd 1, random"),
        ("both, wd 1, activations", "both, wd 1, random"),
    ]
    assert comparison_pairs(named("output", "mine")) == []


def test_plain_lora_is_recognised_under_another_name():
    named = [("LoRA (r=2)", "lora"), ("LoRA (r=2, decayed)", "lora"), ("ours", "both")]
    lines = [{**line("dtd", kind, seed, 0.5), "label": label} for label, kind in named for seed in (0, 1)]
    found = summary(lines)
    assert found.methods == ["LoRA (r=2)", "LoRA (r=2, decayed)", "ours"]
    pairs = [(c.method, c.baseline) for c in found.comparisons]
    assert pairs == [("LoRA (r=2, decayed)", "LoRA (r=2)"), ("ours", "LoRA (r=2)")]


def test_plain_lora_is_named_lora_or_the_first_of_its_kind():
    assert plain_lora({"tuned": Variant("lora", {"r": 4}), "lora": Variant("lora", {})}) == "lora"
    assert plain_lora({"lora": Variant("both", {}), "baseline": Variant("lora", {})}) == "baseline"
    half = "baseline, 0.5 of the update"
    assert plain_lora({half: Variant("lora", {}, 0.5), "baseline": Variant("lora", {})}) == "baseline"
    assert plain_lora({half: Variant("lora", {}, 0.5), "ours": Variant("both", {})}) is None


def test_comparison_pairs_by_options():
    free = {
        "baseline": Variant("lora", {"data": "dtd", "interpolations": [0.5]}),
        "baseline, 0.5 of the update": Variant("lora", {"data": "dtd", "interpolations": [0.5]}, 0.5),
        "baseline (r=4)": Variant("lora", {"r": 4}),
        "ours": Variant("both", {"subspace_k": 9}),
        "ours, 0.5 of the update": Variant("both", {"subspace_k": 9}, 0.5),
        "ours (r=4)": Variant("both", {"subspace_k": 9, "r": 4}),
        "control": Variant("random-both", {"subspace_k": 9}),
        "control (output)": Variant("random", {"subspace_k": 9}),
    }
    assert comparison_pairs(free)[len(free) - 1 :] == [
        ("ours, 0.5 of the update", "baseline, 0.5 of the update"),
        ("ours (r=4)", "baseline (r=4)"),
        ("ours", "control"),
    ]
    twice = {**free, "another control": Variant("random-both", {"subspace_k": 9})}
    assert ("ours", "control") not in comparison_pairs(twice)
    mixed = {"both, k 9": Variant("both", {"subspace_k": 9}), "control": free["control"]}
    assert comparison_pairs(mixed) == [("both, k 9", "control")]
    assert comparison_pairs({**mixed, "both, k 9, random": free["control"]}) == [("both, k 9", "both, k 9, random")]
    assert comparison_pairs({name: Variant(kind) for name, (kind, *_) in mixed.items()}) == []  # options are not known


def test_options_of_results_decide_the_comparisons():
    kinds = {"baseline": "lora", "ours": "both", "control": "random-both"}
    lines = [{**line("dtd", kind, 1, 0.5), "label": name, "options": {"r": 4}} for name, kind in kinds.items()]
    pairs = [("control", "baseline"), ("ours", "baseline"), ("ours", "control")]
    assert [(c.method, c.baseline) for c in summary(lines).comparisons] == pairs
    older = {**lines[1], "method": "ours", "seed": 0}
    del older["label"], older["options"]
    assert [(c.method, c.baseline) for c in summary([*lines, older]).comparisons] == pairs


def test_stand_ins_of_methods_under_other_names():
    methods = {
        "LoRA": Variant("lora", {}),
        "LoRA, 0.5 of the update": Variant("lora", {}, 0.5),
        "LoRA (r=4)": Variant("lora", {"r": 4}),
        "ours": Variant("both", {}),
        "k 3": Variant("output", {"subspace_k": 3}),
        "k 4": Variant("output", {"subspace_k": 4}),
    }
    assert stand_ins(methods) == {"LoRA": "lora", "ours": "both"}
    assert stand_ins({**methods, "both": Variant("random-both", {})}) == {"LoRA": "lora"} | {"both": "random-both"}


def test_seeds_that_one_data_set_lacks_are_reported():
    lora = [line("dtd", "lora", seed, 0.5, rate=rate) for seed in range(10) for rate in (0.1, 0.2)]
    both = [line("dtd", "both", 0, 0.5, rate=rate) for rate in (0.1, 0.2)]
    found = summary([*lora, *both])
    assert found.seed_counts == (1, 10)
    text = markdown([found])
    assert text.startswith("Accuracy in percent, mean ± standard deviation over 1 to 10 seeds: new task (dtd).\n")
    assert "\nFewer than 10 seeds: both (1).\n" in text
    assert gaps(found) == ["Fewer than 10 seeds: both (1)."]
    assert gaps(summary(lora)) == []
    assert "over 10 seeds" in markdown([summary(lora)])
    of_cars = [{**result, "data": "cars"} for result in (*lora, *both)]
    assert markdown([summary([*of_cars, *lora, *both])]).count("\nFewer than 10 seeds: both (1).\n") == 2
    assert "over 10 seeds" in markdown([summary([{**result, "data": "cars"} for result in lora] + lora)])


def test_rates_and_shots_that_lack_seeds_are_named():
    lines = [
        line("dtd", method, seed, 0.5, rate=rate, shots=shots)
        for method in ("lora", "both") for rate in (0.1, 0.2) for shots in (1, 4, 16) for seed in range(5)
    ]  # fmt: skip
    assert gaps(summary([r for r in lines if r["learning_rate"] == 0.1 or r["seed"] < 3])) == [
        "Fewer than 5 seeds: lora at 0.2 (3), both at 0.2 (3)."
    ]
    assert gaps(summary([r for r in lines if r["shots"] == 1 or r["seed"] < 3])) == [
        "Fewer than 5 seeds: lora (4, 16 shots: 3), both (4, 16 shots: 3)."
    ]
    assert gaps(summary([r for r in lines if r["method"] == "lora" or r["seed"] < r["shots"] < 16])) == [
        "Fewer than 5 seeds: both (1 to 4)."
    ]
    one_shot = [r for r in lines if r["method"] == "lora" or r["shots"] > 1 or r["seed"] < 3]
    assert gaps(summary(one_shot)) == ["Fewer than 5 seeds: both (1 shot: 3)."]
    anchors = [line("dtd", "tip-adapter", 0, 0.5, rate=None, shots=shots) for shots in (1, 4, 16)]
    assert gaps(summary([*lines, *anchors])) == ["Fewer than 5 seeds: tip-adapter (1)."]


def test_only_some_of_many_unfinished_methods_are_named():
    lines = [line("dtd", f"mine, {i:02}", seed, 0.5) for i in range(40) for seed in range(7 - (i > 2) - 3 * (i == 30))]
    assert gaps(summary(lines)) == [
        "Fewer than 7 seeds: mine, 30 (3), mine, 03 (6), mine, 04 (6), mine, 05 (6) and 33 more."
    ]


def test_different_seeds_of_methods_are_counted_per_cell():
    apart = [line("dtd", "lora", 0, 0.5, shots=1), line("dtd", "lora", 1, 0.5, shots=4)]
    assert markdown([summary(apart)]).startswith("Accuracy in percent, one seed each: ")
    of_data = [line(data, "lora", seed, 0.5) for data, seeds in (("cars", 2), ("pets", 3)) for seed in range(seeds)]
    assert "standard deviation over 2 to 3 seeds: new task;" in markdown([summary(of_data)])


def test_relative_update_is_a_mean_over_complete_data_sets():
    cars = [line("cars", "lora", seed, 0.5, relative_update=0.1) for seed in range(3)]
    pets = [line("pets", "lora", 0, 0.5, relative_update=0.3)]
    assert summary([*cars, *pets]).relative_updates == pytest.approx({("lora", 2e-4): 0.2})
    assert "mean over layers, data sets, shots and seeds" in markdown([summary([*cars, *pets])])
    both = [line("cars", "both", 0, 0.5, relative_update=0.4)]  # pets have no result of it
    assert summary([*cars, *pets, *both]).relative_updates == pytest.approx({("lora", 2e-4): 0.1, ("both", 2e-4): 0.4})


VARIANTS = ["dtd-ours_r_4", "dtd-lora", "dtd-control", "cars-ours_r_4", "cars-lora", "cars-control"]


def test_tables_follow_the_order_of_the_sweep():
    cells = [(data, name) for data in ("cars", "dtd") for name in ("control", "lora", "new", "ours, r 4")]
    lines = [line(data, name, 0, 0.5) for data, name in cells if (data, name) != ("dtd", "lora")]
    (found,) = summaries(lines, VARIANTS)
    assert found.data_sets == ["dtd", "cars"]
    assert found.methods == ["ours, r 4", "lora", "control", "new"]  # the sweep does not know the last one
    odd = [line("cars", "x/y", 0, 0.5), line("folder:/a b", "x/y", 0, 0.5)]
    (found,) = summaries(odd, ["folder_a_b-x_y"])  # a run's name in a folder has underscores
    assert found.data_sets == ["folder:/a b", "cars"]


def test_any_order_of_the_lines_gives_the_same_report():
    random = Random(0)
    cells = product(("few-shot", "retention"), ("dtd", "cars"), ("lora", "ours, r 4", "control"), (1, 4), (0.1, 0.2))
    lines = []
    for (protocol, data, name, shots, rate), seed in product(cells, range(3)):
        new, kept, update, val = (random.random() for _ in range(4))
        tasks = {"letters": [0.5, kept], "pets": [0.7, val]} if data == "dtd" else {"flowers": [0.3, update]}
        more = {"protocol": protocol, "tasks": tasks, "relative_update": update, "val": val}
        lines.append(line(data, name, seed, new, kept, shots, rate, **more))

    def reported(lines):
        found = summaries(lines, VARIANTS)
        return read_results(lines, VARIANTS), markdown(found), to_csv(found), latex(found)

    expected = reported(lines)
    for _ in range(3):
        random.shuffle(lines)
        assert reported(lines) == expected


def test_failed_runs_are_listed_by_name():
    failed = [{"run": "b", "error": "an older one"}, {"run": "b", "error": "y"}, {"run": "a", "error": "x"}]
    assert list(failures([], failed).items()) == [("a", "x"), ("b", "y")]


UNEVEN = [
    *(line("cars", "lora", seed, new) for seed, new in enumerate((0.50, 0.54))),
    *(line("cars", "both", seed, new) for seed, new in enumerate((0.60, 0.62))),
    *(line("pets", "lora", seed, new) for seed, new in enumerate((0.90, 0.80, 0.70))),
    *(line("pets", "both", seed, new) for seed, new in enumerate((0.84, 0.86))),
    line("food", "lora", 0, 0.99),
]


def test_averages_are_over_data_sets_that_every_method_has():
    found = summary(UNEVEN)
    assert found.complete == {4: ["cars", "pets"]}
    lora = found.cells["lora", 2e-4, 4].new
    assert lora.mean == pytest.approx((0.52 + 0.80) / 2)
    assert lora.sd == pytest.approx((0.70 - 0.67) / 2**0.5)  # seeds 0 and 1 have averages 0.70 and 0.67
    assert found.cells["both", 2e-4, 4].new.mean == pytest.approx((0.61 + 0.85) / 2)
    assert found.zero_shot[4].new.mean == 0.25
    table = data_set_table(found, 4)
    assert list(table.head) == ["method", "learning rate", "cars", "food", "pets", "average"]
    assert list(table.body[0]) == ["zero-shot", "", "25.0", "25.0", "25.0", "25.0"]
    assert list(table.body[1]) == ["lora", "0.0002", "52.0", "99.0", "80.0", "66.0"]
    assert list(table.body[2]) == ["both", "0.0002", "61.0", "", "85.0", "73.0"]
    text = markdown([found])
    assert "average over 2 of 3 data sets" in text
    assert "Left out of averages, because a method has no result (data set, shots): food (4).\n" in text
    assert "Unequal seeds (data set, shots): pets (4).\n" in text


def test_nothing_is_averaged_without_a_common_data_set():
    found = summary([line("cars", "lora", 0, 0.5), line("pets", "both", 0, 0.6), line("pets", "both", 0, 0.6, shots=8)])
    assert found.complete == {4: [], 8: ["pets"]}
    assert list(found.cells) == [("both", 2e-4, 8)]
    assert column(data_set_table(found, 4), "average") == dict.fromkeys(
        [("zero-shot", ""), ("lora", "0.0002"), ("both", "0.0002")], ""
    )
    assert "cars (4, 8); pets (4)" in markdown([found])
    for table in (terminal_table(found), *sections(found)):
        assert table


BASE_TO_NEW = [
    line(data, "lora", seed, base, new, 16, protocol="base-to-new", tasks={"new classes": [0.5, new]})
    for data, bases, new in (("cars", (0.7, 0.9), 0.4), ("pets", (0.6, 0.6), 0.6))
    for seed, base in enumerate(bases)
]


def test_harmonic_mean_is_computed_from_averages():
    assert round(harmonic(69.34, 74.22), 2) == 71.70  # CLIP in CoCoOp's table: H of the averages
    assert harmonic(0.0, 0.0) == 0.0
    found = summary(BASE_TO_NEW)
    table = data_set_table(found, 16)
    # H of the means over seeds, 0.8 and 0.4, is 0.64 / 1.2; H of the averages, 0.7 and 0.5, is 0.7 / 1.2.
    assert list(table.body[1][2:]) == ["80.0 / 40.0 / 53.3", "60.0 / 60.0 / 60.0", "70.0 / 50.0 / 58.3"]
    assert list(table.body[0][2:]) == ["25.0 / 50.0 / 33.3"] * 3
    assert "base classes / new classes / H" in table.text[0]
    assert not any((table.heading or "").startswith("Each task kept") for table in sections(found))


def test_difference_in_harmonic_mean_is_computed_from_averages():
    ours = [{**result, "method": "output", "kept": 0.8, "tasks": {}} for result in BASE_TO_NEW]
    (comparison,) = summary([*BASE_TO_NEW, *ours]).comparisons
    gain = comparison.at_rate[2e-4, None]["H"]
    seeds = [harmonic(0.65, 0.8) - harmonic(0.65, 0.5), harmonic(0.75, 0.8) - harmonic(0.75, 0.5)]
    assert gain.over_seeds.mean == pytest.approx(sum(seeds) / 2)
    assert (gain.over_seeds.wins, gain.better, gain.data_sets) == (2, 2, 2)


def test_changes_of_retained_tasks_are_averaged_over_data_sets():
    tasks = {
        ("cars", 0): {"imagenet": [0.6, 0.5], "pets": [0.9, 0.88]},
        ("cars", 1): {"imagenet": [0.6, 0.52], "pets": [0.9, 0.9]},
        ("pets", 0): {"imagenet": [0.6, 0.56], "cars": [0.7, 0.74]},
    }
    lines = [line(data, "lora", seed, 0.5, 0.5, protocol="retention", tasks=of) for (data, seed), of in tasks.items()]
    table = kept_table(summary(lines), 4)
    assert list(table.head) == ["method", "learning rate", "imagenet", "pets", "cars", "mean"]
    assert list(table.body[0]) == ["zero-shot", "", "60.0", "90.0", "70.0", "73.3"]
    # imagenet: -9 points on the cars, -4 on the pets; the mean over tasks: (-6.5 - 1 + 4) / 3
    assert list(table.body[1]) == ["lora", "0.0002", "-6.5", "-1.0", "+4.0", "-1.2"]
    assert "Each task kept, 4 shots" in markdown([summary(lines)])


def keeping(data_sets, leave_out=(), keep=ELEVEN):
    """Runs that keep all data sets but the one that they are trained on."""
    kept = {data: [task for task in keep if task != data and (data, task) not in leave_out] for data in data_sets}
    return [
        line(data, "lora", 0, 0.5, 0.5, protocol="retention", tasks={task: [0.9, 0.8] for task in of})
        for data, of in kept.items()
    ]


def test_retained_tasks_of_a_run_exclude_its_own_data_set():
    assert kept_name(summary(keeping(ELEVEN))) == "retained (mean of the 10 others)"
    assert kept_name(summary(keeping(["dtd"]))) == "retained (mean of 10)"
    assert kept_name(summary(keeping(ELEVEN, leave_out=[("dtd", "ucf101")]))) == "retained (mean of 9 to 10)"
    assert kept_name(summary(keeping(["digits", "letters"]))) == "retained (mean of 11)"
    assert kept_name(summary(keeping(["dtd", "eurosat"], keep=["dtd", "eurosat"]))) == "retained (the other data set)"
    assert kept_name(summary(keeping(["digits", "letters"], keep=["dtd"]))) == "retained (dtd)"


def test_retained_tasks_have_the_order_of_the_data_sets():
    lines = keeping(["dtd", "ucf101"], keep=["zoo", "imagenet_r", *reversed(ELEVEN), "letters"])
    head = list(kept_table(summary(lines), 4).head)
    assert head[2:-1] == [*ELEVEN, "imagenet_r", "zoo", "letters"]


def test_method_without_a_learning_rate_has_one_row():
    lines = [line("dtd", "lora", 0, 0.5, rate=rate, relative_update=0.1) for rate in (1e-4, 1e-3)]
    table = accuracy_table(summary([*lines, line("dtd", "tip-adapter", 0, 0.6, rate=None)]))
    names = [tuple(row[:2]) for row in table.body]
    assert names == [("zero-shot", ""), ("lora", "0.0001"), ("lora", "0.001"), ("tip-adapter", "")]
    assert column(table, "ΔW / W")["tip-adapter", ""] == ""
    assert column(table, "4 shots")["tip-adapter", ""] == "60.0"


def test_a_method_without_retained_accuracy_has_a_dash():
    lines = [line("imagenet", "lora", 0, 0.5), line("dtd", "lora", 0, 0.6, 0.4, tasks={"imagenet": [0.5, 0.4]})]
    assert list(data_set_table(summary(lines), 4).body[1][2:]) == ["60.0 / 40.0", "50.0 / –", "55.0 / 40.0"]


def test_terminal_prints_labels_without_markup():
    shown = io.StringIO()
    found = summary([line("dtd", "both [bold], r 4", 0, 0.5)])
    Console(file=shown, width=100).print(terminal_table(found))
    assert "both [bold], r 4" in shown.getvalue()
    assert "50.0" in shown.getvalue()


def test_title_is_not_wrapped_to_a_small_table():
    shown = io.StringIO()
    found = summary([line("dtd", "lora", 0, 0.5, 0.4, tasks={"letters": [0.5, 0.4]})])
    Console(file=shown, width=80).print(terminal_table(found))
    assert shown.getvalue().splitlines()[:2] == [
        "Accuracy in percent, one seed",
        "above: new task (dtd); below: retained (letters)",
    ]


def test_csv_has_a_row_per_cell_and_a_column_per_number():
    lines = [*UNEVEN, line("cars", 'both, "r" 4', 0, 0.4, 0.3, rate=None, tasks={"letters": [0.9, 0.3]}, shots=1)]
    found = list(csv.DictReader(io.StringIO(to_csv([summary(lines)]))))
    assert len(found) == 6
    row = found[0]
    assert (row["protocol"], row["data"], row["method"]) == ("few-shot", "cars", "lora")
    assert (row["learning_rate"], row["shots"], row["seeds"]) == ("0.0002", "4", "2")
    assert float(row["new_mean"]) == pytest.approx(0.52)
    assert float(row["new_sd"]) == pytest.approx(0.028284)
    assert (row["zero_shot_new_mean"], row["kept_mean"], row["letters_after_mean"]) == ("0.25", "", "")
    label = found[2]
    assert (label["method"], label["learning_rate"], label["new_sd"]) == ('both, "r" 4', "", "")
    assert (label["letters_before_mean"], label["letters_after_mean"]) == ("0.9", "0.3")


def latex_tables(text: str) -> list[tuple[str, list[list[str]]]]:
    """Columns and rows of each table, braces and environments checked."""
    plain = re.sub(r"\\[\\&%$#_{}]", "", text)
    assert plain.count("{") == plain.count("}")
    depth = 0
    for character in plain:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert plain.count("$") % 2 == 0
    begun = re.findall(r"\\(begin|end)\{(\w+)\}", text)
    assert begun == [("begin", "table"), ("begin", "tabular"), ("end", "tabular"), ("end", "table")] * (len(begun) // 4)
    found = []
    for columns, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL):
        rows = [row for row in body.splitlines() if not re.fullmatch(r"\\(top|mid|bottom)rule", row)]
        assert all(row.endswith(r" \\") for row in rows)
        found.append((columns, [re.split(r"(?<!\\)&", row) for row in rows]))
    return found


def test_latex_is_well_formed():
    lines = [*UNEVEN, *(line("cars", method, 0, 0.4) for method in ("a_b & 50% {x}", "[c]", "*d", r"e\f^2~<1>#$"))]
    for found in (summary(lines), summary(BASE_TO_NEW)):
        text = latex([found])
        tables = latex_tables(text)
        assert len(tables) == len(sections(found))
        for columns, rows in tables:
            assert {len(row) for row in rows} == {len(columns)}
        assert LATEX_HEAD in text
        assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule"))


def test_latex_escapes_special_characters():
    assert for_latex("fgvc_aircraft & 50%") == r"fgvc\_aircraft \& 50\%"
    assert for_latex("-1.5 [-2.0, +0.1], wd-3, 63.1 ± 0.4") == r"$-$1.5 {[}$-$2.0, +0.1], wd-3, 63.1 $\pm$ 0.4"
    assert for_latex(r"\{~^") == r"\textbackslash{}\{\textasciitilde{}\textasciicircum{}"
    table = Table(["50%"], ["method", "a_b"], [["[x]", "1"]])
    assert r"{[}x] & 1 \\" in to_latex(table)
    assert r"\caption{50\%}" in to_latex(table)


def test_bar_in_a_label_does_not_split_a_cell():
    assert markdown_table(["a|b"], [["c"]]) == "| a\\|b |\n| --- |\n| c |"


def test_validation_chooses_among_the_variants_and_rates_of_a_family():
    lines = [
        line("dtd", "lora", 0, 0.5, 0.6, rate=0.1, val=0.4),
        line("dtd", "lora", 1, 0.7, 0.6, rate=0.1, val=0.6),  # mean 0.5
        line("dtd", "lora", 0, 0.9, 0.2, rate=0.2, val=0.8),
        line("dtd", "lora", 1, 0.9, 0.2, rate=0.2, val=0.1),  # mean 0.45, though the best on the test images
        line("dtd", "both, k 3", 0, 0.3, 0.9, rate=0.1, val=0.5),
        line("dtd", "both, k 4", 0, 0.2, 0.8, rate=0.1, val=0.5),  # equal: the first one
        line("dtd", "input", 0, 0.2, 0.8, rate=0.1),
    ]
    (table,) = [table for table in sections(summary(lines)) if table.heading == "Chosen by validation"]
    assert table.body == [["lora", "60.0 / 60.0: 0.1"], ["both", "30.0 / 90.0: k 3, 0.1"]]
    lines += [
        line("cars", "lora", seed, 0.8, 0.4, rate=rate, val=val)
        for seed in (0, 1)
        for rate, val in ((0.1, 0.2), (0.2, 0.3))
    ]
    (table,) = [table for table in sections(summary(lines)) if table.heading == "Chosen by validation"]
    assert table.body == [["lora", "70.0 / 50.0: 0.2 (1); 0.1 (1)"]]  # cars has no other method
    assert "val_mean" in to_csv([summary(lines)]).splitlines()[0]


def chosen(lines):
    (table,) = [table for table in sections(summary(lines)) if table.heading == "Chosen by validation"]
    return table.body


def test_validation_compares_over_common_seeds():
    easy = [line("dtd", "lora", 0, 0.9, rate=0.1, val=0.9)]  # a seed that the other rate has not got
    hard = [line("dtd", "lora", 1, new, rate=rate, val=new) for rate, new in ((0.1, 0.4), (0.2, 0.5))]
    assert chosen([*easy, *hard]) == [["lora", "50.0: 0.2"]]
    apart = [*easy, line("dtd", "lora", 1, 0.4, rate=0.2, val=0.4), line("dtd", "lora", 2, 0.5, rate=0.2, val=0.5)]
    assert chosen(apart) == [["lora", "45.0: 0.2"]]  # the most seeds, where none is common


def test_validated_accuracies_are_means_over_data_sets():
    cars = [line("cars", "lora", seed, 0.2, 0.9, val=0.5) for seed in range(3)]
    pets = [line("pets", "lora", 0, 0.6, 0.1, val=0.5)]
    assert chosen([*cars, *pets]) == [["lora", "40.0 / 50.0: 0.0002 (2)"]]


def test_families_of_validation_are_kinds_of_methods():
    of = {
        "LoRA (r=2)": "lora",
        "LoRA (r=4, decayed)": "lora",
        "both, k 3": "both",
        "both, k 3, random": "random-both",  # the control is no variant of what it controls
        "both, k 4, random": "random-both",
        "mine": "output",
    }
    lines = [{**line("dtd", kind, 0, 0.5, val=0.1 * i), "label": name} for i, (name, kind) in enumerate(of.items())]
    assert sorted(map(list, chosen(lines))) == [
        ["both, k 3", "50.0: 0.0002"],
        ["lora", "50.0: LoRA (r=4, decayed), 0.0002"],
        ["mine", "50.0: 0.0002"],
        ["random-both", "50.0: both, k 4, random, 0.0002"],
    ]


def test_no_validation_table_without_validation_images():
    assert all(table.heading != "Chosen by validation" for table in sections(summary([line("dtd", "lora", 0, 0.5)])))


def test_activations_chosen_by_energy_have_no_control():
    names = ["both, energy 0.8, activations", "both, energy 0.8, random", "both, k 9, activations", "both, k 9, random"]
    assert comparison_pairs(named(*names)) == [("both, k 9, activations", "both, k 9, random")]
    by_options = {
        "seen": Variant("activations", {"subspace_energy": 0.8}),
        "seen, few": Variant("activations", {"subspace_k": 9}),
        "control": Variant("random", {"subspace_energy": 0.8}),
        "control, few": Variant("random", {"subspace_k": 9}),
    }
    assert comparison_pairs(by_options) == [("seen, few", "control, few")]
