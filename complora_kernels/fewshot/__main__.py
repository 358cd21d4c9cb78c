"""The command line: `complora train | sweep | report | eval | export | pretrain-…`, also `python -m …fewshot`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from complora_kernels.common.files import words_of
from complora_kernels.fewshot.config import PRESETS, TrainConfig, preset_for
from complora_kernels.fewshot.escapes import visible
from complora_kernels.fewshot.files import check_writable
from complora_kernels.fewshot.grid import held, prepare, run_grid
from complora_kernels.fewshot.jobs import is_full
from complora_kernels.fewshot.outcomes import FAILURES, results_of
from complora_kernels.fewshot.pictures.pretrain import PicturesConfig, check_pictures, pretrain_pictures
from complora_kernels.fewshot.pretrain import PretrainConfig, pretrain
from complora_kernels.fewshot.report import report
from complora_kernels.fewshot.saved import EvalConfig, ExportConfig, evaluate, export
from complora_kernels.fewshot.sweep import Sweep, SweepConfig, prepare_sweep, run_sweep
from complora_kernels.fewshot.team import assemble, leads


@dataclass(frozen=True)
class ReportConfig:
    """Print the tables of a results folder and write its files and figures again, also of an unfinished grid."""

    folder: tyro.conf.Positional[Path]
    """The --output of `complora train` or `complora sweep`."""


Command = TrainConfig | SweepConfig | ReportConfig | EvalConfig | ExportConfig | PretrainConfig | PicturesConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 1 when a run fails, 2 for bad input, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    console = Console()
    command: Command | None = None
    ready: Any = None
    has_begun = False  # True: a long computation has begun, so that an error is no bad input
    try:
        command = parse(arguments)
        ready = _prepare(command)
        has_begun = isinstance(command, (TrainConfig, SweepConfig, PretrainConfig, PicturesConfig))
        return _run(command, ready, console)
    except KeyboardInterrupt as stop:
        _say("stopped")
        _tell_how_to_go_on(command, ready, arguments, stop)
        return 130
    except (ValueError, OSError, ArithmeticError, RuntimeError, MemoryError) as error:
        _say(f"error: {words_of(error)}")
        if not has_begun:
            return 2 if isinstance(error, (ValueError, OSError)) else 1
        _tell_how_to_go_on(command, ready, arguments, error)
        return 1


def _say(text: str) -> None:
    print(visible(text, keep="\n"), file=sys.stderr)


def _prepare(command: Command) -> Any:
    """Find every error that would stop a long command, before anything is computed."""
    if isinstance(command, (TrainConfig, SweepConfig)) and not leads():
        return None  # the first process of a team checks the options and fetches missing data for all
    if isinstance(command, TrainConfig):
        return prepare(command)
    if isinstance(command, SweepConfig):
        return prepare_sweep(command)
    if isinstance(command, PicturesConfig):
        return check_pictures(command)
    return check_writable(command.output) if isinstance(command, PretrainConfig) else None


def _run(command: Command, ready: Any, console: Console) -> int:
    if isinstance(command, PretrainConfig):
        pretrain(command)
    elif isinstance(command, PicturesConfig):
        pretrain_pictures(command)
    elif isinstance(command, ReportConfig):
        report(command.folder, console)
    elif isinstance(command, EvalConfig):
        evaluate(command, console)
    elif isinstance(command, ExportConfig):
        export(command, console)
    if not isinstance(command, (TrainConfig, SweepConfig)):
        return 0
    failed = 0
    with assemble() as team:
        if isinstance(command, TrainConfig):
            output = command.output
            with held(output) if team.leads else nullcontext():
                run_grid(command, console, team)
        else:
            sweep: Sweep = team.agree(ready)
            output = sweep.output
            with held(output) if team.leads else nullcontext():
                failed = run_sweep(command, sweep, console, team)
        if team.leads:
            report(output, console)
    if failed:
        _say(f"error: {failed} runs failed, see {output / FAILURES}; the same command tries them again")
    return 1 if failed else 0


def _tell_how_to_go_on(command: Command | None, ready: Any, arguments: Sequence[str], ended: BaseException) -> None:
    if isinstance(command, TrainConfig):
        output, names = command.output, [run.name for run in command.runs()]
    elif isinstance(ready, Sweep):
        output, names = ready.output, [job.run.name for job in ready.jobs]
    else:
        return
    if not leads():
        return
    try:
        done = {result["run"] for result in results_of(output)}
    except (ValueError, OSError):  # this error ended the command, or the next call reports it
        return
    again = f"goes on from the last checkpoints: complora {shlex.join(arguments)}"
    if isinstance(ended, ArithmeticError) or isinstance(ended.__cause__, ArithmeticError):
        advice = "The same command would diverge again: expected a lower rate in --learning-rates, for one"
    elif isinstance(ended, KeyboardInterrupt) or (isinstance(ended, OSError) and is_full(ended)):
        advice = f"The same command {again}"
    else:
        advice = f"Once the cause is gone, the same command {again}"
    _say(f"{len(done & set(names))} of {len(names)} runs are finished. {advice}")


def parse(arguments: Sequence[str]) -> Command:
    """Read the command line. Its preset, or else the preset of its model, gives the defaults.

    Raises:
        SystemExit: help was asked for (0), or an option is unknown or cannot be read (2).
        ValueError: the preset is unknown.
    """
    choice = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    choice.add_argument("--preset", nargs="?")
    choice.add_argument("--model", nargs="?")
    chosen, _ = choice.parse_known_args(arguments)
    defaults = PRESETS[preset_for(chosen.preset, chosen.model)]
    return tyro.cli(
        Annotated[TrainConfig, tyro.conf.subcommand("train", default=defaults)]
        | Annotated[SweepConfig, tyro.conf.subcommand("sweep")]
        | Annotated[ReportConfig, tyro.conf.subcommand("report")]
        | Annotated[EvalConfig, tyro.conf.subcommand("eval")]
        | Annotated[ExportConfig, tyro.conf.subcommand("export")]
        | Annotated[PretrainConfig, tyro.conf.subcommand("pretrain-glyphs")]
        | Annotated[PicturesConfig, tyro.conf.subcommand("pretrain-pictures")],
        prog="complora",
        description="Comp-LoRA on CLIP with few examples: train, report, and make the bundled model again.",
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )


if __name__ == "__main__":
    sys.exit(main())
