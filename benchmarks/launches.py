"""How many kernels a training step of an image tower launches: `python -m benchmarks.launches`.

Forward and backward pass of ViT-B/16's image tower in bfloat16, six linears a block, counted by the real dispatch
without a GPU (`benchmarks.dispatch`): of a block, as the difference between towers of three blocks and of two, and of
the tower of twelve. Loss and optimizer are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor

import complora_kernels as ck
from benchmarks import baselines, dispatch

LAYERS, BATCH = 12, 32
Counts = dict[str, dict[str, int]]  # phase -> kernel -> launches


def tower(layers: int) -> Any:
    """A plain CLIP with ViT-B/16's image tower of so many blocks, all of equal weights."""
    torch.manual_seed(0)
    image = CLIPVisionCfg(layers=layers, width=768, patch_size=16, image_size=224)
    text = CLIPTextCfg(context_length=16, vocab_size=100, width=64, heads=1, layers=1)
    model: Any = CLIP(512, image, text, quick_gelu=True)
    first, *others = model.visual.transformer.resblocks
    for block in others:
        block.load_state_dict(first.state_dict())
    return model.to(torch.bfloat16).requires_grad_(False)


def configuration() -> ck.CompLoRAConfig:
    """Six linears a block."""
    modules = ("q", "k", "v", "o", "fc1", "fc2")
    few = 8  # directions, which launch what many do
    return ck.CompLoRAConfig(r=16, lora_dropout=0.25, subspace_k=few, target_modules=modules, towers=("image",))


def count(model: Any, inputs: Iterable[Tensor] = ()) -> Counts:
    """The launches of a forward and a backward pass, the second: the first makes what is kept between steps."""
    images = torch.empty(BATCH, 3, 224, 224, dtype=torch.bfloat16)
    with dispatch.following() as follower:
        for _ in range(2):
            for leaf in (*model.parameters(), *inputs):
                leaf.grad = None
            follower.launches.clear()
            follower.phase = "forward"
            features = model.encode_image(images)
            gradient = torch.empty_like(features)
            follower.phase = "backward"
            features.backward(gradient)
    counts: Counts = {"forward": Counter(), "backward": Counter()}
    for launch in follower.launches:
        counts[launch.phase][name_of(launch)] += 1
    return counts


def name_of(launch: dispatch.Launch) -> str:
    return f"triton {launch.kernel.removesuffix('_kernel')}" if launch.triton else f"aten {launch.kernel.strip('_')}"


def all_counts() -> dict[str, dict[str, Counts]]:
    """Ours without dropout, ours with it, and the frozen model: of each a block and the tower."""
    ours = [ck.apply_complora(tower(layers), configuration(), progress=False) for layers in (2, 3)]
    frozen = [baselines.without_adapters(tower(layers), {}, configuration()) for layers in (2, 3)]
    return {
        "ours": of_block_and_tower(*[count(model.eval()) for model in ours]),  # in evaluation nothing is dropped
        "ours, dropout": of_block_and_tower(*[count(model.train()) for model in ours]),
        "frozen model": of_block_and_tower(*[count(each.model, each.inputs) for each in frozen]),
    }


def of_block_and_tower(two: Counts, three: Counts) -> dict[str, Counts]:
    """The launches of a block inside a tower, and of a whole tower, from those of towers of two and three blocks."""
    block = {phase: minus(three[phase], two[phase], 1) for phase in two}
    return {"block": block, "tower": {phase: minus(two[phase], block[phase], 2 - LAYERS) for phase in two}}


def minus(left: dict[str, int], right: dict[str, int], times: int) -> dict[str, int]:
    """`left - times · right`, without zeros."""
    names = dict.fromkeys([*left, *right])
    difference = {name: left.get(name, 0) - times * right.get(name, 0) for name in names}
    return {name: number for name, number in sorted(difference.items()) if number}


def table(counts: dict[str, Counts]) -> str:
    """Kernel by kernel, forward and backward."""
    lines = []
    for part, phases in counts.items():
        for phase, kernels in phases.items():
            lines.append(f"{part}, {phase}: {sum(kernels.values())}")
            lines += [f"    {number:4} {kernel}" for kernel, number in sorted(kernels.items(), reverse=True)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args().json
    os.environ["COMPLORA_BACKEND"], os.environ["COMPLORA_CACHE"] = "triton", "0"
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)
    counts = all_counts()
    if as_json:
        print(json.dumps(counts))
        return
    for name, found in counts.items():
        print(f"{name}\n{table(found)}\n")


if __name__ == "__main__":
    main()
