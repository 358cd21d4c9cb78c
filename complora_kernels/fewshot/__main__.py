"""The command line: `complora train | report | pretrain-glyphs`, also `python -m complora_kernels.fewshot`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from complora_kernels.fewshot.config import PRESETS, TrainConfig, preset_for
from complora_kernels.fewshot.files import check_writable, read_json_lines
from complora_kernels.fewshot.grid import prepare, run_grid
from complora_kernels.fewshot.pretrain import PretrainConfig, pretrain
from complora_kernels.fewshot.report import report


@dataclass(frozen=True)
class ReportConfig:
    """Print the table of a results folder and write its table.md and figures again, also of an unfinished grid."""

    folder: tyro.conf.Positional[Path]
    """The --output of `complora train`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 1 when a run fails, 2 for bad input, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    console = Console()
    try:
        command = parse(arguments)
        if isinstance(command, TrainConfig):
            prepare(command)
        elif isinstance(command, PretrainConfig):
            check_writable(command.output)
        else:
            report(command.folder, console)
            return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        if isinstance(command, PretrainConfig):
            pretrain(command)
        else:
            run_grid(command, console)
            report(command.output, console)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        if isinstance(command, TrainConfig):
            finished = len(read_json_lines(command.output / "results.jsonl"))
            print(
                f"{finished} of {len(command.runs())} runs are finished. The same command goes on from the last "
                f"checkpoints: complora {shlex.join(arguments)}",
                file=sys.stderr,
            )
        return 130
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str]) -> TrainConfig | ReportConfig | PretrainConfig:
    """Read the command line; the preset that it asks for, or that suits its model, gives the defaults.

    Raises:
        SystemExit: for help (0) and for options that are unknown or cannot be read (2).
        ValueError: an unknown preset.
    """
    choice = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    choice.add_argument("--preset", nargs="?")
    choice.add_argument("--model", nargs="?")
    chosen, _ = choice.parse_known_args(arguments)
    defaults = PRESETS[preset_for(chosen.preset, chosen.model)]
    return tyro.cli(
        Annotated[TrainConfig, tyro.conf.subcommand("train", default=defaults)]
        | Annotated[ReportConfig, tyro.conf.subcommand("report")]
        | Annotated[PretrainConfig, tyro.conf.subcommand("pretrain-glyphs")],
        prog="complora",
        description="Comp-LoRA on CLIP with few examples: train, report, and make the bundled model again.",
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )


if __name__ == "__main__":
    sys.exit(main())
