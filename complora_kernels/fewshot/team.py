"""The processes that train one model together, started by torchrun: what each does, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed


class SharedError(RuntimeError):
    """An error that all processes of a team know of, so that all can go on to something else."""


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
        """The device of this process where "auto", "cpu", "cuda" or "cuda:N" is asked for; of several its own GPU."""
        if self.size == 1 or asked == "cpu" or not torch.cuda.is_available():
            return asked
        return f"cuda:{torch.cuda.current_device()}"

    @property
    def group(self) -> Any:
        """The process group; None of a process alone."""
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
        """What each process does by itself, without a word to the others: an error of one is raised in all.

        Raises:
            SharedError: in every process of a team, with what the first of those that failed says. Alone, the error
                itself.
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
            # Without its traceback, whose frames would keep the model
            raise SharedError(first) from (failure and failure.with_traceback(None))

    def wait(self) -> None:
        """Until all have come here."""
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
        """This process's part of the rows [total, ...], one after the other; the last row again where they run out."""
        if self.size == 1:
            return tensor
        rows = _rows(len(tensor), self.size)
        indices = torch.arange(self.rank * rows, (self.rank + 1) * rows, device=tensor.device)
        return tensor[indices.clamp(max=len(tensor) - 1)]


class _Gather(torch.autograd.Function):
    """Rows of all processes one after the other; backward, the sum over all of each row's gradient."""

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
    # Its functions have the default group at the time of its import among their defaults, and torch's compiler imports
    # it: from now on it would hold the group, whose threads must end before Python does.
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
