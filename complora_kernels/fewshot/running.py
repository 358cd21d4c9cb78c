"""Runs a command of `complora`, from its options to its exit code."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from rich.console import Console

from complora_kernels.common.files import words_of
from complora_kernels.fewshot.commands import DoctorConfig, EvalConfig, ExportConfig, PredictConfig, ReportConfig
from complora_kernels.fewshot.config import TrainConfig
from complora_kernels.fewshot.doctor import doctor
from complora_kernels.fewshot.escapes import complain
from complora_kernels.fewshot.export import export
from complora_kernels.fewshot.files import check_writable
from complora_kernels.fewshot.grid import held, prepare, run_grid
from complora_kernels.fewshot.jobs import is_full
from complora_kernels.fewshot.outcomes import FAILURES, results_of
from complora_kernels.fewshot.pictures.pretrain import PicturesConfig, check_pictures, pretrain_pictures
from complora_kernels.fewshot.predict import predict
from complora_kernels.fewshot.pretrain import PretrainConfig, pretrain
from complora_kernels.fewshot.report import report
from complora_kernels.fewshot.saved import evaluate
from complora_kernels.fewshot.sweep import Sweep, SweepConfig, prepare_sweep, run_sweep
from complora_kernels.fewshot.team import assemble, leads

Short = ReportConfig | PredictConfig | EvalConfig | ExportConfig | DoctorConfig
Command = TrainConfig | SweepConfig | Short | PretrainConfig | PicturesConfig


def run(command: Command, arguments: Sequence[str]) -> int:
    """Run a command, and say on stderr what ended it.

    Args:
        command: its options.
        arguments: the command line that they came from, for advice on how to go on.

    Returns:
        The exit code, as `main` gives it.
    """
    ready: Any = None
    has_begun = False  # True: a long computation has begun, so that an error is no bad input
    try:
        ready = _prepare(command)
        has_begun = isinstance(command, (TrainConfig, SweepConfig, PretrainConfig, PicturesConfig))
        return _run(command, ready, Console())
    except KeyboardInterrupt as stop:
        complain("stopped")
        _tell_how_to_go_on(command, ready, arguments, stop)
        return 130
    except (ValueError, OSError, ArithmeticError, RuntimeError, MemoryError) as error:
        complain(f"error: {words_of(error)}")
        if not has_begun:
            return 2 if isinstance(error, (ValueError, OSError)) else 1
        _tell_how_to_go_on(command, ready, arguments, error)
        return 1


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
    elif isinstance(command, DoctorConfig):
        return doctor()
    elif isinstance(command, PredictConfig):
        return predict(command, console)
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
        complain(f"error: {failed} runs failed, see {output / FAILURES}; the same command tries them again")
    return 1 if failed else 0


def _tell_how_to_go_on(command: Command, ready: Any, arguments: Sequence[str], ended: BaseException) -> None:
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
    complain(f"{len(done & set(names))} of {len(names)} runs are finished. {advice}")
