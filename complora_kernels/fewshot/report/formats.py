"""Writes tables as Markdown and as LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from complora_kernels.fewshot.escapes import for_latex, for_markdown

# A table wider or higher than a page is shrunk to it.
LATEX_HEAD = r"""% \usepackage{booktabs, graphicx}
\providecommand{\fitted}[1]{%
  \resizebox*{!}{\ifdim\totalheight>0.8\textheight 0.8\textheight\else\totalheight\fi}{%
  \resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{#1}}}"""


@dataclass
class Table:
    """A table of text with its caption.

    Attributes:
        text: lines above the table.
        head: the names of the columns.
        body: rows of as many cells.
        labels: number of columns that name a row; the others hold numbers.
        heading: heading of the section that the table begins, if any.
        after: lines below the table.
    """

    text: Sequence[str]
    head: Sequence[str]
    body: Sequence[Sequence[str]]
    labels: int = 1
    heading: str | None = None
    after: Sequence[str] = field(default_factory=tuple)


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """The rows of a Markdown table."""
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(for_markdown(cell).replace("|", r"\|") for cell in row) + " |" for row in rows)


def to_markdown(table: Table) -> str:
    """Heading, text, table and the lines below it, separated by empty lines."""
    heading = [f"## {for_markdown(table.heading)}"] if table.heading else []
    text, after = ("\n".join(map(for_markdown, lines)) for lines in (table.text, table.after))
    parts = [*heading, text, markdown_table(table.head, table.body), after]
    return "\n\n".join(part for part in parts if part)


def to_latex(table: Table) -> str:
    """A `table` environment, which needs the packages and the command of `LATEX_HEAD`."""
    caption = " ".join([*([f"{table.heading}."] if table.heading else []), *table.text])
    columns = "l" * table.labels + "r" * (len(table.head) - table.labels)
    rows = [" & ".join(map(for_latex, row)) + r" \\" for row in (table.head, *table.body)]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering\small\setlength{\tabcolsep}{3pt}\setlength{\belowcaptionskip}{4pt}",
            rf"\caption{{{for_latex(caption)}}}",
            r"\fitted{%",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            rows[0],
            r"\midrule",
            *rows[1:],
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
        ]
    )
