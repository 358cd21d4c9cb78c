"""Two processes that train one sharded CLIP; of few imports, since every process makes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from small_clip import small_clip
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import complora_kernels as ck
from complora_kernels.adapters.manage import named_adapter_parameters

SHARDED = ("root", "blocks")
STEPS = 3


def train(model: Any, images: Tensor, texts: Tensor) -> Any:
    optimizer = torch.optim.SGD(ck.adapter_parameters(model), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        image_features, text_features, _ = model(images, texts)
        (image_features * text_features).sum(1).mean().backward()
        optimizer.step()
    return model


def adapted() -> Any:
    """The same model in every process."""
    model = small_clip(nonscalar_logit_scale=True)  # fully_shard takes no parameter without dimensions
    torch.manual_seed(0)
    config = ck.CompLoRAConfig(r=2, target_modules=("q", "v", "o", "fc1"))
    return ck.apply_complora(model, config, progress=False)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(1, 18, (4, 6), generator=generator)
    texts[:, 4] = 19
    return torch.randn(4, 3, 16, 16, generator=generator), texts


def work(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for how in SHARDED:
        results = run(how, mesh, rank, Path(folder))
        if rank == 0:
            torch.save(results, f"{folder}/{how}.pt")
    distributed.destroy_process_group()
    os._exit(0)  # the meshes of torch keep the group, and its threads would abort an end in which Python frees memory


def run(how: str, mesh: Any, rank: int, folder: Path) -> dict[str, Any]:
    """What one process sees of a model that is sharded as a whole, or block by block and the rest as a whole."""
    model = adapted()
    if how == "blocks":
        for block in [*model.visual.transformer.resblocks, *model.transformer.resblocks]:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    images, texts = batch()
    half = slice(2 * rank, 2 * rank + 2)
    train(model, images[half], texts[half])
    parameters = dict(named_adapter_parameters(model))
    results: dict[str, Any] = {"factors": {name: full(parameter) for name, parameter in parameters.items()}}
    ck.save_adapter(model, folder / f"{how}-adapter")
    results["report"] = [row.relative_update for row in ck.subspace_report(model)]
    with torch.no_grad():
        for what, change in (("trained", None), ("merged", ck.merge_adapter), ("unmerged", ck.unmerge_adapter)):
            if change is not None:
                change(model)
            results[what] = model(images, texts)[0]
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
            results[f"{what} weights"] = {n: full(p) for n, p in model.named_parameters() if "weight" in n}
    return results


def full(parameter: Any) -> Tensor:
    return parameter.detach().full_tensor().clone()
