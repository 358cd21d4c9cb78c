"""report.html: the runs of a folder in one file that needs no network, to sort, to filter and to look at.

The curves are Plotly's, the tables DataTables' by way of itables; each library's own bundle is a part of the file.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from complora_kernels.common.files import words_of, write_atomically
from complora_kernels.fewshot.escapes import for_html, visible
from complora_kernels.fewshot.predictions import Prediction
from complora_kernels.fewshot.report.gallery import DataSets, Shown, best_runs, rows, title_of
from complora_kernels.fewshot.report.results import Result
from complora_kernels.fewshot.report.styles import Look, display_name, looks
from complora_kernels.fewshot.report.summary import Spread, Summary
from complora_kernels.fewshot.report.wording import axis_names, sentences, shots_name

PAGE = "report.html"
MOST_CLASSES = 60
"""The most classes of which the confusion matrix is drawn."""
_NEEDED = ("plotly", "itables", "pandas")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 0 auto; padding: 0 1rem 4rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
summary { cursor: pointer; font-weight: 600; margin: 0.6rem 0 }
.images { display: flex; flex-wrap: wrap; gap: 0.8rem } .images figure { margin: 0; width: 8rem; font-size: 0.8rem }
.images img { width: 96px; height: 96px; image-rendering: pixelated; border: 1px solid #ddd }
"""


def missing_packages() -> list[str]:
    """The packages that the page needs and that are not installed."""
    return [name for name in _NEEDED if find_spec(name) is None]


def write_page(
    folder: Path, protocols: Sequence[Summary], results: Sequence[Mapping[str, Any]], failed: Mapping[str, str]
) -> Path:
    """Write the page of a results folder.

    Args:
        folder: the results folder, where runs have left predictions.csv.
        protocols: the summaries of `results`.
        results: the lines of results.jsonl.
        failed: the error of each run without a result.
    """
    import itables
    from itables.javascript import generate_init_offline_itables_html
    from plotly.offline import get_plotlyjs

    bundle = Path(itables.__file__).parent / "html" / "dt_bundle.js"
    parts = [f"<h1>{for_html(folder.resolve().name)}</h1>"]
    for summary in protocols:
        parts += [f"<h2>Trade-off, {for_html(summary.protocol)}</h2>", *trade_offs(summary)]
        if (compared := comparisons(summary)) is not None:
            parts += ["<h2>Comparisons</h2>", compared]
        parts.append("".join(f"<p>{for_html(text)}</p>" for text in sentences(summary)[:12]))
    parts += ["<h2>Runs</h2>", runs_table(results)]
    if failed:
        parts += ["<h2>Failed runs</h2>", _table(["run", "error"], list(failed.items()))]
    parts += gallery(folder, results)
    head = f'<meta charset="utf-8"><title>{for_html(folder.resolve().name)}</title><style>{_STYLE}</style>'
    scripts = f"<script>{get_plotlyjs()}</script>{generate_init_offline_itables_html(bundle)}"
    body = "\n".join(parts)
    page = f'<!doctype html>\n<html lang="en"><head>{head}{scripts}</head>\n<body>\n{body}\n</body></html>\n'
    write_atomically(folder / PAGE, page)
    return folder / PAGE


def trade_offs(summary: Summary) -> Iterator[str]:
    """A figure for each number of shots: each method's curve over the learning rates, and its single runs."""
    import plotly.graph_objects as go

    of, _ = looks(summary.labels, summary.stand_ins)
    x, y = axis_names(summary)
    for shots in summary.shots:
        figure = go.Figure()
        for method in summary.methods:
            colour, name = _colour(of[method]), for_html(display_name(method))
            rates = [rate for name_, rate in summary.rows if name_ == method]
            cells = [(rate, cell) for rate in rates if (cell := summary.cells.get((method, rate, shots))) and cell.kept]
            own = [r for r in summary.results if (r.method, r.shots) == (method, shots) and r.kept is not None]
            if not cells:
                continue
            half = [[_half(spread, summary) for spread in (cell.new, cell.kept)] for _, cell in cells]
            figure.add_scatter(
                x=[100 * cell.new.mean for _, cell in cells],
                y=[100 * cell.kept.mean for _, cell in cells if cell.kept],
                error_x={"array": [h[0] for h in half], "thickness": 1, "width": 2},
                error_y={"array": [h[1] for h in half], "thickness": 1, "width": 2},
                mode="lines+markers",
                name=name,
                legendgroup=name,
                line={"color": colour},
                text=[f"{name}, learning rate {rate:g}" if rate else name for rate, _ in cells],
                hovertemplate="%{text}<br>%{x:.1f} / %{y:.1f}<extra></extra>",
            )
            figure.add_scatter(
                x=[100 * r.new for r in own],
                y=[100 * (r.kept or 0.0) for r in own],
                mode="markers",
                marker={"color": colour, "size": 5, "opacity": 0.35},
                legendgroup=name,
                showlegend=False,
                text=[_told(r) for r in own],
                hovertemplate="%{text}<br>%{x:.1f} / %{y:.1f}<extra></extra>",
            )
        before = summary.zero_shot.get(shots)
        if not figure.data or before is None or before.kept is None:
            continue
        figure.add_scatter(
            x=[100 * before.new.mean],
            y=[100 * before.kept.mean],
            mode="markers",
            name="zero-shot",
            marker={"color": "grey", "symbol": "star", "size": 12},
        )
        figure.update_layout(
            title=f"{shots_name(shots)}: means with 95% intervals over seeds, and single runs",
            xaxis_title=for_html(x),
            yaxis_title=for_html(y),
            template="plotly_white",
            height=560,
        )
        yield figure.to_html(full_html=False, include_plotlyjs=False)


def comparisons(summary: Summary) -> str | None:
    """The differences at equal new-task accuracy with their 95% intervals; None where there are none."""
    import plotly.graph_objects as go

    found = [(of, of.overall.over_seeds) for of in summary.comparisons if of.overall]
    if not found:
        return None
    figure = go.Figure()
    figure.add_scatter(
        x=[100 * gain.mean for _, gain in found],
        y=[for_html(f"{of.method} − {of.baseline}") for of, _ in found],
        error_x={"array": [100 * (gain.high - gain.mean) if math.isfinite(gain.high) else 0 for _, gain in found]},
        mode="markers",
        text=[f"{gain.wins} of {gain.seeds} seeds, p {gain.p:.3g} (not corrected)" for _, gain in found],
        hovertemplate="%{y}: %{x:.2f}<br>%{text}<extra></extra>",
    )
    figure.add_vline(x=0, line_width=1)
    figure.update_layout(
        title="Points more kept at equal new-task accuracy, mean and 95% interval over seeds",
        template="plotly_white",
        height=160 + 24 * len(found),
        yaxis={"autorange": "reversed", "automargin": True},
    )
    return figure.to_html(full_html=False, include_plotlyjs=False)


def runs_table(results: Sequence[Mapping[str, Any]]) -> str:
    """All runs, to be sorted and searched; accuracies in percent."""
    head = ["run", "data set", "method", "shots", "learning rate", "seed", "new task", "change", "kept", "change kept"]
    body = []
    for line in {line["run"]: line for line in results}.values():
        kept, before = line["kept"], line["zero_shot_kept"]
        body.append(
            (
                line["run"],
                line.get("data", "digits"),
                line.get("label", line["method"]),
                line["shots"],
                line["learning_rate"],
                line["seed"],
                round(100 * line["new"], 1),
                round(100 * (line["new"] - line["zero_shot_new"]), 1),
                None if kept is None else round(100 * kept, 1),
                None if kept is None else round(100 * (kept - before), 1),
            )
        )
    return _table(head, body)


def gallery(folder: Path, results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Of each method's best run the images that it gained and lost, its classes and its confusions."""
    try:
        best = list(best_runs(folder, results))
    except (OSError, ValueError) as error:  # a file of a run is damaged: the rest of the page stands
        yield f"<p>No images: {for_html(words_of(error))}</p>"
        return
    for number, shown in enumerate(best):
        if not number:
            yield "<h2>What changed</h2>"
        yield f"<details{'' if number else ' open'}><summary>{for_html(title_of(shown.result))}</summary>"
        try:
            yield from _images(shown)
        except (OSError, ValueError) as error:  # data sets may have been moved since
            yield f"<p>No images: {for_html(words_of(error))}</p>"
        own = [each for each in shown.predictions if each.task == shown.predictions[0].task]
        yield "<h3>Classes of the new task</h3>" + classes_table(own)
        yield "<h3>Confusions of the new task</h3>" + confusions(own)
        yield "</details>"


def classes_table(predictions: Sequence[Prediction]) -> str:
    """The accuracy of each class before and after training, in percent."""
    counts = Counter(each.label for each in predictions)
    before = Counter(each.label for each in predictions if each.before == each.label)
    after = Counter(each.label for each in predictions if each.after == each.label)
    body = [(name, n, round(100 * before[name] / n, 1), round(100 * after[name] / n, 1)) for name, n in counts.items()]
    return _table(["class", "images", "before", "after"], body)


def confusions(predictions: Sequence[Prediction]) -> str:
    """The confusion matrix after training; of many classes the most frequent confusions instead."""
    import plotly.graph_objects as go

    names = sorted({each.label for each in predictions} | {each.after for each in predictions})
    counts = Counter((each.label, each.after) for each in predictions)
    if len(names) > MOST_CLASSES:
        wrong = [(*pair, n) for pair, n in counts.most_common() if pair[0] != pair[1]]
        return _table(["class", "was called", "images"], wrong[:100])
    labels = [for_html(name) for name in names]
    figure = go.Figure(
        go.Heatmap(
            z=[[counts[label, after] for after in names] for label in names],
            x=labels,
            y=labels,
            colorscale="Blues",
            hovertemplate="%{y} was called %{x}: %{z}<extra></extra>",
        )
    )
    side = 220 + 18 * len(names)
    figure.update_layout(width=side + 120, height=side, yaxis={"autorange": "reversed"}, template="plotly_white")
    return figure.to_html(full_html=False, include_plotlyjs=False)


def _images(shown: Shown) -> Iterator[str]:
    data = DataSets(shown.options, shown.predictions[0].task)
    for row in rows(shown.predictions):
        figures = "".join(
            f'<figure><img src="{_as_url(data.image(each))}" alt="{for_html(each.label)}"><figcaption>'
            f"{for_html(each.before)} → {for_html(each.after)}</figcaption></figure>"
            for each in row.found
        )
        yield f'<p>{for_html(row.title)} ({row.total} of {row.of})</p><div class="images">{figures}</div>'


def _as_url(image: Tensor) -> str:  # uint8 [3, H, W]
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.to(torch.uint8).permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _table(head: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    import itables
    import pandas as pd

    shown = [[visible(x) if isinstance(x, str) else x for x in row] for row in body]
    frame = pd.DataFrame(shown, columns=[visible(name) for name in head])
    options: dict[str, Any] = {"connected": False, "showIndex": False, "maxBytes": 0, "lengthMenu": [10, 50, 200, 1000]}
    return itables.to_html_datatable(frame, **options)


def _colour(look: Look) -> str:
    return str(look["color"])


def _half(spread: Spread | None, summary: Summary) -> float:
    """Half of the 95% interval of a mean over seeds, in points; 0 for one seed."""
    n = summary.seed_counts[1]
    if spread is None or n < 2 or math.isnan(spread.sd):
        return 0.0
    return 100 * float(stats.t.ppf(0.975, n - 1)) * spread.sd / math.sqrt(n)


def _told(result: Result) -> str:
    """What the point of a run says of it."""
    options = {"learning rate": result.learning_rate, "seed": result.seed, "data": result.data}
    options |= dict(result.variant.options or {})
    lines = [f"{name}: {value}" for name, value in options.items() if value is not None]
    return "<br>".join(for_html(line) for line in [display_name(result.method), *lines])
