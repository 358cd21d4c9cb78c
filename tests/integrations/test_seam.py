"""The seam: one file knows a library, and everything else serves it. Here a library that is made up."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from numerics import assert_as_accurate_as_reference
from tiny_models import config, half_of, randomise, with_updates
from torch import Tensor, nn
from torch.nn import functional as F

import complora_kernels as ck
from complora_kernels import functional, integrations
from complora_kernels.adapters import install
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.integrations import Block, Target, selection
from complora_kernels.integrations.torch import linear_target
from complora_kernels.modules.block import AttentionParts, BlockParts, CompLoRABlock, Projection
from complora_kernels.modules.forward_scope import LastBlock, Reading, Scoped

PACKAGE = Path(ck.__file__).parent
N, PIXELS, D, HEADS, LAYERS = 3, 5, 12, 2, 2
NAMES = {"q": "query", "k": "key", "v": "value", "o": "dense", "fc1": "up", "fc2": "down"}


def test_only_integrations_and_the_program_name_a_model_library():
    libraries = re.compile(r"open_?clip|\btransformers\b|\btimm\b", re.IGNORECASE)
    files = [
        path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in ("integrations", "fewshot")
    ]
    naming = [
        f"{path.name}:{number}: {line}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if libraries.search(line)
    ]
    assert naming == []
    assert len(files) > 30


# ---- a library whose q, k and v are three modules


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(D), nn.LayerNorm(D)
        self.query, self.key, self.value, self.dense = (nn.Linear(D, D) for _ in range(4))
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, hidden: Tensor) -> Tensor:  # [N, L, D]
        x = self.before(hidden)
        q, k, v = (
            module(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for module in (self.query, self.key, self.value)
        )
        hidden = hidden + self.dense(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return hidden + self.down(F.gelu(self.up(self.after(hidden))))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.norm = Encoder(), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:  # [N, L, D] to [N, D]
        return self.norm(self.encoder(x)[:, 0])


class FusedLayer(CompLoRABlock):
    def parts(self) -> BlockParts | str:
        return Library.parts_of_block(self)

    def forward(self, hidden: Tensor) -> Tensor:
        y = self.run_fused(hidden, None)
        return super().forward(hidden) if y is None else y


class Tower(Scoped):
    def _reading_of_scope(self) -> Reading | None:
        vision: Any = self
        last = LastBlock(vision.encoder.layers[-1], vision.encoder, vision.norm)
        return None if torch.compiler.is_compiling() else Reading(last.alone)


class Library(SimpleNamespace):
    FusedBlock = FusedLayer

    @staticmethod
    def recognises(model: nn.Module) -> bool:
        return isinstance(model, Vision)

    @staticmethod
    def residual_blocks(model: Any) -> Iterator[Block]:
        for i, layer in enumerate(model.encoder.layers):
            yield Block(f"encoder.layers.{i}", layer, "image", i)

    @staticmethod
    def targets_in(block: Block, names: Collection[str]) -> list[Target]:
        return [linear_target(f"{block.path}.{NAMES[name]}", getattr(block.module, NAMES[name])) for name in names]

    @staticmethod
    def missing(_model: nn.Module, _tower: str) -> str | None:
        return None

    @staticmethod
    def parts_of_block(layer: Any) -> BlockParts | str:
        projections = tuple(
            Projection(name, module, module.weight, module.bias)
            for name, module in (("q", layer.query), ("k", layer.key), ("v", layer.value))
        )
        attention = AttentionParts(projections, layer.dense, layer.dense, HEADS, False, None, 0.0)
        return BlockParts(layer.before, attention, layer.after, layer.up, "gelu", layer.down)

    @staticmethod
    def towers(model: nn.Module) -> list[tuple[nn.Module, type[Scoped]]]:
        return [(model, Tower)]

    @staticmethod
    def callers(_model: nn.Module, _layers: Any) -> list[Any]:
        return []

    @staticmethod
    def truncation(_model: nn.Module) -> list[Any]:
        return []


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    found = integrations.find

    def find(model: nn.Module) -> Any:
        return [Library] if Library.recognises(model) else found(model)

    for module in (integrations, selection, install):
        monkeypatch.setattr(module, "find", find)


@pytest.mark.parametrize("targets", [("q", "k", "v"), ("v",), ("o",), ("q", "fc1", "fc2"), tuple(NAMES)], ids="".join)
def test_a_library_with_three_projections_is_fused_folded_once_and_read_at_one_position(targets, monkeypatch):
    plain: Any = Vision().double()
    model: Any = ck.apply_complora(copy.deepcopy(plain), config(target_modules=targets, towers="image"), progress=False)
    randomise(model)
    assert len(adapted_layers(model)) == LAYERS * len(targets)
    folds, lengths = [], []
    fold, fused = functional.fold_factors, CompLoRABlock.run_fused

    def observed_fold(As: Any, *arguments: Any, **options: Any) -> Any:
        folds.append(len(As))
        return fold(As, *arguments, **options)

    def observed_block(block: CompLoRABlock, x: Tensor, mask: Tensor | None) -> Tensor | None:
        y = fused(block, x, mask)
        lengths.append(None if y is None else y.shape[1])
        return y

    monkeypatch.setattr(functional, "fold_factors", observed_fold)
    monkeypatch.setattr(CompLoRABlock, "run_fused", observed_block)
    x = torch.randn(N, PIXELS, D, dtype=torch.float64)
    updated = with_updates(plain, model, config(), half_of)
    results = []
    for each in (model, updated):
        leaf = x.clone().requires_grad_()
        y = each(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(*results)
    assert folds == [LAYERS * len(targets)]
    assert lengths == [PIXELS, 1]
    ck.check_gradients(model)


def test_three_projections_in_half_precision():
    """As accurate as the layer's own forward pass."""
    model: Any = ck.apply_complora(Vision(), config(target_modules=tuple(NAMES), towers="image"), progress=False)
    exact = copy.deepcopy(randomise(model)).double()
    x = torch.randn(N, PIXELS, D)
    with torch.autocast("cpu", torch.bfloat16):
        ours = model(x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CompLoRABlock, "run_fused", lambda *_: None)
            own = model(x)
    assert_as_accurate_as_reference(ours, own, exact(x.double()), "features", torch.bfloat16)
