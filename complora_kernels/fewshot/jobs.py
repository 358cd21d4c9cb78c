"""One run of a grid as a job, and its outcome: a result or an error."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from complora_kernels.common.files import words_of
from complora_kernels.fewshot.config import BUNDLED, Run, TrainConfig
from complora_kernels.fewshot.recipe import train
from complora_kernels.fewshot.setting import Settings
from complora_kernels.fewshot.team import ALONE, SharedError, Team
from complora_kernels.fewshot.training import CHECKPOINT

RUNS = "runs"
"""The folder, below the folder of a grid, that holds a folder for each run."""


class Job(NamedTuple):
    """One run and the options of its grid."""

    config: TrainConfig
    run: Run

    @property
    def steps(self) -> int:
        """The number of optimizer steps."""
        return 0 if self.run.learning_rate is None else self.config.steps_for(self.run.shots)

    @property
    def folder(self) -> Path:
        """The folder of the run's files."""
        return self.config.output / RUNS / self.run.name

    @property
    def threads(self) -> int | None:
        """The number of CPU threads; None: torch's default."""
        return self.config.threads or (1 if self.config.model in BUNDLED else None)

    def end(self) -> None:
        """Remove the checkpoint, once the result is safe."""
        (self.folder / CHECKPOINT).unlink(missing_ok=True)


Outcome = tuple[Job, Any]  # a job and its result, or the exception that it ended with


def result_of(
    job: Job,
    settings: Settings,
    on_step: Callable[[int, float], None],
    team: Team = ALONE,
    device: str | None = None,
) -> Any:
    """Run a job, and return its result or the exception that it ended with.

    Args:
        job: the job.
        settings: the settings of this process.
        on_step: as in `train`.
        team: as in `train`.
        device: the device; None: that of the job's options.
    """
    config = job.config
    before = torch.get_num_threads()
    torch.set_num_threads(job.threads or before)
    try:
        with team.together():
            setting = settings.load(config, device or team.device(config.device))
        return train(config, job.run, setting, job.folder, on_step, team)
    except (ArithmeticError, SharedError) as error:  # all processes of a team get these errors
        return error.with_traceback(None)  # the frames of a traceback would keep the model in memory
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if team.size > 1:
            raise  # the other processes of the team wait for this one, so that all have to end
        return error.with_traceback(None)
    except Exception as error:  # an unforeseen error of this run need not concern other runs
        if team.size > 1:
            raise
        return RuntimeError(f"{type(error).__name__}: {error}")
    finally:
        torch.set_num_threads(before)


def run_alone(job: Job) -> dict[str, Any] | Exception:
    """Run one job in a process of its own, and return its result or the error that it ended with."""
    return sendable(result_of(job, Settings(), lambda done, loss: None))


def sendable(result: Any) -> Any:
    """The result in a form that can be sent to another process, which not every exception can."""
    if not isinstance(result, Exception):
        return result
    if isinstance(result, OSError) and is_full(result):
        return OSError(result.errno, result.strerror, result.filename)
    kind = FloatingPointError if isinstance(result, ArithmeticError) else RuntimeError
    return kind(words_of(result))


def is_full(error: Exception) -> bool:
    """Whether an error says that the disk is full or read-only, so that no run can save its result."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
