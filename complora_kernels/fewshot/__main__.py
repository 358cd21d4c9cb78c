"""The command line: `complora COMMAND`, also `python -m complora_kernels.fewshot COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import make_dataclass, replace
from typing import Annotated, Any, Union, get_args

import tyro

from complora_kernels.common.files import words_of
from complora_kernels.fewshot.commands import COMMANDS
from complora_kernels.fewshot.doctor import versions
from complora_kernels.fewshot.escapes import complain

_COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 1 when a run fails, 2 for bad input, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) == ["--version"]:
        print("\n".join(f"{name} {number}" for name, number in versions(("torch", "open_clip_torch", "triton"))))
        return 0
    try:
        command = parse(arguments)
        # What computes is imported now: help and the answer to a typing error do not wait for torch
        from complora_kernels.fewshot.running import run
    except KeyboardInterrupt:
        complain("stopped")
        return 130
    except (ValueError, OSError) as error:
        complain(f"error: {words_of(error)}")
        return 2
    return run(command, arguments)


def parse(arguments: Sequence[str]) -> Any:
    """Read the command line: the options of the command that it names.

    The preset, or else the preset of the model, gives the defaults of `complora train`.

    Raises:
        SystemExit: help was asked for (0), or an option is unknown or cannot be read (2).
        ValueError: the preset is unknown.
    """
    arguments = list(arguments)
    asked = set(COMMANDS) if any(option in arguments for option in _COMPLETION) else set(arguments[:1])
    parts = tuple(_part(name, arguments if name in asked else None) for name in COMMANDS)
    options: Any = Union[parts]  # noqa: UP007 (`|` takes no tuple)
    with _Plain():
        return tyro.cli(
            options,
            prog="complora",
            description="Comp-LoRA on CLIP with few examples. complora --version prints the versions.",
            args=arguments,
            config=(tyro.conf.OmitSubcommandPrefixes,),
        )


class _Plain(tyro.constructors.ConstructorRegistry):
    """Help shows `INT` for `int | None`, without tyro's `{None}|`; None is read as before."""

    def __init__(self) -> None:
        super().__init__()
        self._inside: list[Any] = []
        self.primitive_rule(self._without_none)

    def _without_none(self, info: tyro.constructors.PrimitiveTypeInfo) -> Any:
        if type(None) not in get_args(info.type) or info.type in self._inside:
            return None
        self._inside.append(info.type)
        try:
            spec = self.get_primitive_spec(info)
        finally:
            self._inside.pop()
        if not isinstance(spec, tyro.constructors.PrimitiveConstructorSpec):
            return spec
        return replace(spec, metavar=spec.metavar.replace("{None}|", "").replace("{None,", "{"))


def _part(name: str, arguments: Sequence[str] | None) -> Any:
    """The options of a command; where it is not asked for, none, so that nothing is imported for them."""
    if arguments is None:
        empty = make_dataclass(COMMANDS[name].name, (), namespace={"__doc__": COMMANDS[name].summary})
        return Annotated[empty, tyro.conf.subcommand(name)]
    options = COMMANDS[name].options()
    if name != "train":
        return Annotated[options, tyro.conf.subcommand(name)]
    from complora_kernels.fewshot.config import PRESETS, preset_for

    choice = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    choice.add_argument("--preset", nargs="?")
    choice.add_argument("--model", nargs="?")
    chosen, _ = choice.parse_known_args(arguments)
    return Annotated[options, tyro.conf.subcommand(name, default=PRESETS[preset_for(chosen.preset, chosen.model)])]


if __name__ == "__main__":
    sys.exit(main())
