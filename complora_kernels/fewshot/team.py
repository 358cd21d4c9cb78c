"""The team of processes that torchrun starts to train one model: their shares of the work, and their communication."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed


class SharedError(RuntimeError):
    """An error that is raised in all processes of a team, so that all can continue with the next run."""


@dataclass(frozen=True)
class Team:
    """One process among `size`. The group is torch's default one."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return self.rank == 0

    def device(self, asked: str) -> str:
        """The device of this process for "auto", "cpu", "cuda" or "cuda:N"; in a team, each process has its own GPU."""
        if self.size == 1 or asked == "cpu" or not torch.cuda.is_available():
            return asked
        return f"cuda:{torch.cuda.current_device()}"

    @property
    def group(self) -> Any:
        """The process group; None for a single process."""
        return distributed.group.WORLD if self.size > 1 else None

    def share(self, items: Tensor) -> Tensor:
        """Every `size`-th of the items [N] from the `rank`-th on."""
        return items[self.rank :: self.size] if self.size > 1 else items

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of tensors of one shape."""
        if self.size > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes of tensors of one shape."""
        return self.sum(values) / self.size if self.size > 1 else values

    def agree(self, value: Any) -> Any:
        """The leader's value, in all processes."""
        values = [value]
        if self.size > 1:
            distributed.broadcast_object_list(values)
        return values[0]

    def collect(self, value: Any) -> list[Any]:
        """Every process's value, in all of them."""
        values = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wrap work that each process does without communication, so that an error of one is raised in all.

        Raises:
            SharedError: in every process of a team, with the message of the first that failed. A single process raises
                the error itself.
        """
        if self.size == 1:
            yield
            return
        failure, words = None, None
        try:
            yield
        except Exception as error:
            failure, words = error, str(error) or type(error).__name__
        first = next((found for found in self.collect(words) if found is not None), None)
        if first is not None:
            # The frames of a traceback would keep the model in memory
            raise SharedError(first) from (failure and failure.with_traceback(None))

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            distributed.barrier()

    def gather(self, rows: Tensor, total: int) -> Tensor:
        """All rows [total, D] out of every process's share of them, differentiable.

        Args:
            rows: [n, D], the share of `rows_of`.
            total: the number of all rows.
        """
        return _Gather.apply(rows, self, total) if self.size > 1 else rows

    def rows_of(self, tensor: Tensor) -> Tensor:
        """This process's contiguous part of the rows [total, ...]; the last row is repeated where they run out."""
        if self.size == 1:
            return tensor
        rows = _rows(len(tensor), self.size)
        indices = torch.arange(self.rank * rows, (self.rank + 1) * rows, device=tensor.device)
        return tensor[indices.clamp(max=len(tensor) - 1)]


class _Gather(torch.autograd.Function):
    """Concatenates the rows of all processes; the backward pass sums each row's gradient over all processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, team: Team, total: int) -> Tensor:  # [n, D] to [total, D]
        ctx.team, ctx.total = team, total
        parts = [torch.empty_like(rows) for _ in range(team.size)]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)[:total]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads  # [total, D]
        rows = _rows(ctx.total, ctx.team.size)
        padded = grad.new_zeros(ctx.team.size * rows, grad.shape[1])
        padded[: ctx.total] = grad
        distributed.all_reduce(padded)
        return padded[ctx.team.rank * rows :][:rows], None, None


def _rows(total: int, size: int) -> int:
    return -(-total // size)


ALONE = Team()


def is_started_together() -> bool:
    """Whether torchrun has started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def leads() -> bool:
    """Whether this process will lead, before the team is assembled."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def assemble() -> Iterator[Team]:
    """The team that torchrun has started; a process alone without torchrun.

    Where there are GPUs each process takes the one of its local rank, and speaks through NCCL and, on CPUs, gloo.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    # This module keeps the default group at the time of its import in its functions' defaults, and torch's compiler
    # imports it. Imported later, it would keep the group alive, whose threads must end before Python does.
    import torch.distributed.nn.functional

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("cpu:gloo,cuda:nccl")
    else:
        distributed.init_process_group("gloo")
    try:
        yield Team(distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()
