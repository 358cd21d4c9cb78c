"""One of two processes that train together; of few imports, since every process makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import stand_in
import torch
from cuda_graph_on_cpu import cuda_graphs_on_cpu
from process_group import process_group
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import complora_kernels as ck
from complora_kernels.integrations import open_clip

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
    open_clip.PACKAGES = (*open_clip.PACKAGES, "stand_in")  # as in the tests' own process
    with process_group(folder, rank, 2):
        results = [train_in_a_way(rank, inputs, *way) for way in WAYS]
        accumulated = accumulate(DistributedDataParallel(towers()), clip_batch(rank))
    torch.save([tuple(result) for result in results], f"{folder}/{rank}.pt")
    torch.save(accumulated, f"{folder}/{rank}-accumulated.pt")


def train_in_a_way(rank: int, inputs: list[Tensor], wrapped: bool, graph: bool) -> Result:
    model = network()
    model.frozen.data.fill_(0 if wrapped else rank)  # DDP makes all equal at the start
    with cuda_graphs_on_cpu():
        if wrapped:
            return train(DistributedDataParallel(model), inputs, torch.optim.SGD, graph=graph)
        return train(model, inputs, torch.optim.SGD, graph=graph, process_group=distributed.group.WORLD)


def towers() -> Any:
    """A CLIP whose towers are adapted, the same in every process."""
    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "heads": 2}
    model = stand_in.CLIP(16, vision, {"context_length": 6, "vocab_size": 20, "width": 32, "layers": 2, "heads": 2})
    config = ck.CompLoRAConfig(r=2, target_modules=("q", "k", "v", "o", "fc1", "fc2"))
    ck.apply_complora(model.double(), config, progress=False)
    for factor in ck.adapter_parameters(model):
        nn.init.normal_(factor, std=0.2)
    return model


def clip_batch(rank: int) -> list[tuple[Tensor, Tensor]]:
    """Images [2, 3, 16, 16] and texts [2, 6], two batches for each of two steps; the texts end at different places."""
    generator = torch.Generator().manual_seed(rank)
    texts = torch.randint(1, 19, (4, 2, 6), generator=generator)
    texts[:, 0, 2 + rank] = texts[:, 1, 3] = 19
    return list(zip(torch.randn(4, 2, 3, 16, 16, generator=generator).double(), texts, strict=True))


def similarity(model: Any, images: Tensor, texts: Tensor) -> Tensor:  # []
    image, text, scale = model(images, texts)
    return (scale * image * text).sum(1).mean()


def accumulate(
    model: DistributedDataParallel, batches: list[tuple[Tensor, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The factors after a step for every two batches, and a gradient of the first of each two."""
    factors, alone = list(ck.adapter_parameters(model)), []
    optimizer = torch.optim.SGD(factors, lr=0.1, momentum=0.9)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        optimizer.zero_grad()
        with model.no_sync():
            (similarity(model, *first) / 2).backward()
        alone += [factor.grad.clone() for factor in factors[:1] if factor.grad is not None]
        (similarity(model, *second) / 2).backward()
        optimizer.step()
    return [factor.detach() for factor in factors], alone
