"""One of two processes that train together; of few imports, since every process makes them."""

import json
from pathlib import Path

import fewshot_standin as standin
import torch
from process_group import process_group
from torch import distributed

from complora_kernels.fewshot.config import Run
from complora_kernels.fewshot.recipe import train
from complora_kernels.fewshot.team import Team

RUN = Run("both", 2, 1e-2, 0)
FEW = {"steps": 8, "log_every": 1, "checkpoint_every": 3}
CASES = {
    "one size": {**FEW, "batch_size": 4},
    "uneven shares": {**FEW, "batch_size": 5},
    "image tower": {**FEW, "batch_size": 6, "towers": ("image",)},
    "crops": {**FEW, "batch_size": 4, "augmentation": "crop-flip", "interpolations": (0.5,), "validation": True},
    "preserved": {**FEW, "batch_size": 5, "preserve": 2.0, "vocabulary_sample": 4, "template": "a {}"},
}


class Killed(Exception):
    pass


def work(rank: int, folder: str) -> None:
    team, root = Team(rank, 2), Path(folder)
    with process_group(folder, rank, 2):
        for name, options in CASES.items():
            result = train(standin.config(root, **options), RUN, standin.setting(), root / name, team=team)
            (root / f"{name}-{rank}.json").write_text(json.dumps(result))
            team.wait()
        resume(team, root)
        gather(team, root)


def resume(team: Team, root: Path) -> None:
    """One run with dropout to its end, one that is killed in between."""

    def kill(done: int, loss: float) -> None:
        if done == 5:
            raise Killed

    config = standin.config(root, **CASES["one size"], lora_dropout=0.3)
    train(config, RUN, standin.setting(), root / "whole", team=team)
    try:
        train(config, RUN, standin.setting(), root / "resumed", kill, team)
    except Killed:
        team.wait()
    train(config, RUN, standin.setting(), root / "resumed", team=team)


def gather(team: Team, root: Path) -> None:
    """Five rows of two, of which each process makes three: the last one twice."""
    mine = team.rows_of(torch.arange(10.0).view(5, 2)).requires_grad_()
    rows = team.gather(mine, 5)
    ((1 + team.rank) * rows).sum().backward()
    assert mine.grad is not None
    grads = [torch.empty_like(mine) for _ in range(2)]
    distributed.all_gather(grads, mine.grad)
    if team.leads:
        torch.save(rows.detach(), root / "features.pt")
        torch.save(torch.cat(grads)[:5], root / "grads.pt")
