"""One run of a grid as a job: what it is done with, and what comes out of it, an error included."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from complora_kernels.common.files import words_of
from complora_kernels.fewshot.config import GLYPHS, Run, TrainConfig
from complora_kernels.fewshot.recipe import CHECKPOINT, train
from complora_kernels.fewshot.setting import Settings
from complora_kernels.fewshot.team import ALONE, SharedError, Team

RUNS = "runs"
"""Below the folder of a grid: where each run has a folder of its own."""


class Job(NamedTuple):
    """One run and the options it is done with."""

    config: TrainConfig
    run: Run

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return 0 if self.run.learning_rate is None else self.config.steps_for(self.run.shots)

    @property
    def folder(self) -> Path:
        """Where its files go."""
        return self.config.output / RUNS / self.run.name

    @property
    def threads(self) -> int | None:
        """CPU threads that it is computed with; None: torch's own number."""
        return self.config.threads or (1 if self.config.model == GLYPHS else None)

    def end(self) -> None:
        """Remove what an unfinished run needs, once its result is safe."""
        (self.folder / CHECKPOINT).unlink(missing_ok=True)


Outcome = tuple[Job, Any]  # with its result, or the exception that it ended with


def result_of(
    job: Job,
    settings: Settings,
    on_step: Callable[[int, float], None],
    team: Team = ALONE,
    device: str | None = None,
) -> Any:
    """The result of a job, or the exception that it ended with; what no run can be blamed for is raised.

    Args:
        job: what is done.
        settings: of this process.
        on_step: as in `train`.
        team: as in `train`.
        device: what it is computed on; None: what the job's options say.
    """
    config = job.config
    before = torch.get_num_threads()
    torch.set_num_threads(job.threads or before)
    try:
        with team.together():
            setting = settings.load(config, device or team.device(config.device))
        return train(config, job.run, setting, job.folder, on_step, team)
    except (ArithmeticError, SharedError) as error:  # which all processes of a team meet
        return error.with_traceback(None)  # whose frames would keep the model
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if team.size > 1:
            raise  # the others wait for this one: all have to end
        return error.with_traceback(None)
    except Exception as error:  # of a kind that nobody foresaw; other runs may do better
        if team.size > 1:
            raise
        return RuntimeError(f"{type(error).__name__}: {error}")
    finally:
        torch.set_num_threads(before)


def run_alone(job: Job) -> dict[str, Any] | Exception:
    """The result of one job in a process of its own, or the error that it ended with."""
    return sendable(result_of(job, Settings(), lambda done, loss: None))


def sendable(result: Any) -> Any:
    """An exception as one that can be sent to another process, which not every one can."""
    if not isinstance(result, Exception):
        return result
    if isinstance(result, OSError) and is_full(result):
        return OSError(result.errno, result.strerror, result.filename)
    kind = FloatingPointError if isinstance(result, ArithmeticError) else RuntimeError
    return kind(words_of(result))


def is_full(error: Exception) -> bool:
    """Whether there is no room for the results of other runs either."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
