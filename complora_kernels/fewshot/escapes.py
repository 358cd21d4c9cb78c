"""Escapes text from outside (names of classes, files and methods, errors) for each format that the program writes.

Every escape leaves ordinary text as it is.
"""

from __future__ import annotations

import html
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # a bracket after the end of a row would begin the row's options
    "*": "{*}",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
    "–": "--",
    **{character: rf"\{character}" for character in "&%$#_"},
}


def visible(text: str, keep: str = "") -> str:
    r"""The text with its control and invisible characters as Python writes them: \x1b, \u202e, \udcff.

    Args:
        text: any text.
        keep: characters that stay unchanged, such as line ends.
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character in keep
        else character.encode("unicode_escape", "backslashreplace").decode()
        for character in text
    )


def say(console: Console, text: str, *, soft_wrap: bool = False) -> None:
    """Print a line of plain text on a console: without markup, rich's colours or control characters."""
    console.print(visible(text), highlight=False, markup=False, soft_wrap=soft_wrap)


def complain(text: str) -> None:
    """Print a line of plain text on stderr, without control characters."""
    print(visible(text, keep="\n"), file=sys.stderr)


def for_markdown(text: str) -> str:
    """One line of Markdown without markup of its own: no HTML, code, emphasis, picture or link."""
    text = re.sub(r"[\\`*<&~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", visible(text))  # no _ within a word
    return re.sub(r"\](?=[(:\[])", r"\]", text)


def for_latex(text: str) -> str:
    """The text with LaTeX's special characters escaped; a hyphen before a number becomes a minus sign."""
    escaped = "".join(_LATEX.get(character, character) for character in visible(text))
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", escaped)


def for_csv(text: str) -> str:
    """The text as a cell that no spreadsheet takes for a formula: an apostrophe is put before a formula's beginning."""
    text = visible(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def for_html(text: str) -> str:
    """The text without markup, between tags or in an attribute."""
    return html.escape(visible(text))


def for_figure(text: str) -> str:
    """The text for matplotlib, which would typeset a formula between two dollars."""
    return visible(text).replace("$", r"\$")
