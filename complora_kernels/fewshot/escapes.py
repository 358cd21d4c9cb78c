"""Text from outside (names of classes, files and methods, errors) as it may stand in what the program writes.

Every escape leaves ordinary text as it is.
"""

from __future__ import annotations

import re

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
    "[": "{[}",  # after the end of a row it would begin the row's options
    "*": "{*}",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
    "–": "--",
    **{character: rf"\{character}" for character in "&%$#_"},
}


def visible(text: str, keep: str = "") -> str:
    r"""The text with its control and invisible characters as Python writes them: \x1b, \u202e, \udcff.

    Args:
        text: any.
        keep: characters to leave alone, such as the ends of lines.
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
    """Print a line of text on a console as it is: without markup, rich's colours or control characters."""
    console.print(visible(text), highlight=False, markup=False, soft_wrap=soft_wrap)


def for_markdown(text: str) -> str:
    """One line of Markdown without markup of its own: no HTML, code, emphasis, picture or link."""
    text = re.sub(r"[\\`*<&~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", visible(text))  # no _ within a word
    return re.sub(r"\](?=[(:\[])", r"\]", text)


def for_latex(text: str) -> str:
    """The text as LaTeX prints it; a minus before a number becomes one."""
    escaped = "".join(_LATEX.get(character, character) for character in visible(text))
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", escaped)


def for_csv(text: str) -> str:
    """A cell that a spreadsheet takes for text: an apostrophe stands before one that begins like a formula."""
    text = visible(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def for_figure(text: str) -> str:
    """The text for matplotlib, which would read a formula between two dollars."""
    return visible(text).replace("$", r"\$")
