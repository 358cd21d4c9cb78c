"""One of two processes that train together; of few imports, since every process makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from cuda_graph_on_cpu import cuda_graphs_on_cpu
from process_group import process_group
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import complora_kernels as ck

BATCHES = [torch.arange(48.0, dtype=torch.float64).add(i).cos().view(6, 8) for i in range(5)]
WAYS = ((True, True), (False, True), (False, False))  # in DDP, in a graph


class Result(NamedTuple):
    losses: list[Tensor]
    factors: list[Tensor]
    frozen: float


def network() -> Any:
    """Two adapted layers, and a frozen parameter that differs between the processes."""
    torch.manual_seed(0)
    config = ck.CompLoRAConfig(r=2, subspace_k=3)
    layers = [ck.CompLoRALinear.from_linear(nn.Linear(8, 8).double().requires_grad_(False), config) for _ in range(2)]
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.2)
    network = nn.Sequential(layers[0], nn.GELU(), layers[1])
    network.register_parameter("frozen", nn.Parameter(torch.zeros(()), requires_grad=False))
    return network


def loss(model: Any, x: Tensor) -> Tensor:  # x [N, 8]
    return (model(x) - 1).square().mean()


def train(model: nn.Module, inputs: list[Tensor], optimizer: Callable[..., Any], **options: Any) -> Result:
    module: Any = model.module if isinstance(model, DistributedDataParallel) else model
    factors = [p for p in module.parameters() if p.requires_grad]
    step = ck.GraphedTrainStep(
        model, loss, optimizer(factors, 0.1), inputs[:1], schedule=lambda t: 0.3 / (1 + t), **options
    )
    losses = [step(x) for x in inputs]
    return Result(losses, [p.detach() for p in factors], float(module.frozen))


def train_half(rank: int, folder: str) -> None:
    """Trains with half of every batch in each of the ways; the results go to a file of this process."""
    inputs = [x.chunk(2)[rank] for x in BATCHES]
    with process_group(folder, rank, 2):
        results = [train_in_a_way(rank, inputs, *way) for way in WAYS]
    torch.save([tuple(result) for result in results], f"{folder}/{rank}.pt")


def train_in_a_way(rank: int, inputs: list[Tensor], wrapped: bool, graph: bool) -> Result:
    model = network()
    model.frozen.data.fill_(0 if wrapped else rank)  # DDP makes all equal at the start
    with cuda_graphs_on_cpu():
        if wrapped:
            return train(DistributedDataParallel(model), inputs, torch.optim.SGD, graph=graph)
        return train(model, inputs, torch.optim.SGD, graph=graph, process_group=distributed.group.WORLD)
