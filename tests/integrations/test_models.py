"""Every model of the zoo, adapted and compared with an oracle that knows nothing of this package.

The oracle is the plain model with `W + s · P_out B A P_in` in the place of each adapted weight, by `functional_call`.
Its projectors come from a float64 `torch.linalg.svd`. All is in float64 where nothing else is said.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from model_zoo import MODELS, Example, exact, make
from numerics import assert_as_accurate_as_reference
from small_clip import assert_close
from tiny_models import config, randomise
from torch import Tensor, nn
from torch.func import functional_call

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.modules.block import CompLoRABlock

ALL = ("q", "k", "v", "o", "fc1", "fc2")
TARGETS = [("q", "k", "v"), ALL]
# Eager attention of transformers takes its softmax in float32, in blocks that keep their own forward pass.
TOLERANCE = {"eager": 1e-5, "sdpa": 1e-10}

Factors = dict[tuple[str, str], tuple[Tensor, Tensor]]  # by path and name: A [r, in], B [out, r]

every_model = pytest.mark.parametrize("name", MODELS)


def tolerance(name: str) -> float:
    return TOLERANCE.get(name.rpartition(", ")[2], 1e-10)


def adapted(example: Example, **options: Any) -> Any:
    """A copy with random factors, which reach into the protected subspaces, as those of AdamW do."""
    return randomise(ck.apply_complora(copy.deepcopy(example.model), config(sides="both", **options), progress=False))


def factors_of(model: nn.Module) -> Factors:
    return {
        (path, name): layer.factors(name) for path, layer in adapted_layers(model).items() for name in layer.weights
    }


class Oracle:
    """The plain model as a function of the factors."""

    def __init__(self, example: Example, model: nn.Module) -> None:
        self.example, self.plain = example, exact(copy.deepcopy(example.model))
        self.rows: dict[tuple[str, str], tuple[Any, ...]] = {}
        for path, layer in adapted_layers(model).items():
            for name, (parameter, start, stop) in layer.weights.items():
                weight = f"{path}.{parameter}"
                U, _, Vh = torch.linalg.svd(self.plain.get_parameter(weight)[start:stop])
                k = min(len(U), len(Vh)) // 2
                projectors = (torch.eye(len(Q), dtype=Q.dtype) - Q[:, :k] @ Q[:, :k].T for Q in (U, Vh.T))
                self.rows[path, name] = (weight, start, stop, *projectors, layer.config.lora_alpha / layer.config.r)

    def __call__(self, factors: Factors, inputs: dict[str, Tensor]) -> Tensor:
        weights: dict[str, Tensor] = {}
        for key, (weight, start, stop, P_out, P_in, scaling) in self.rows.items():
            A, B = factors[key]
            W: Tensor = weights[weight] if weight in weights else self.plain.get_parameter(weight)
            updated = W[start:stop] + scaling * P_out @ B @ A @ P_in
            weights[weight] = torch.cat([W[:start], updated, W[stop:]])
        return self.example.features(lambda **given: functional_call(self.plain, weights, (), given), inputs)


def with_gradients(
    function: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor], factors: Factors
) -> list[Tensor]:
    """The features, and the gradients of pixels, A and B."""
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items() if value.is_floating_point()}
    features = function({**inputs, **leaves})
    wanted = [*leaves.values(), *(factor for pair in factors.values() for factor in pair)]
    return [features.detach(), *torch.autograd.grad(loss(features), wanted)]


def loss(features: Tensor) -> Tensor:
    """A number that every feature changes, each in its own way."""
    weights = torch.linspace(-1, 1, features[0].numel(), dtype=features.dtype)
    return (weights * features + features.square()).sum()


@every_model
@pytest.mark.parametrize("targets", TARGETS, ids="".join)
def test_outputs_and_gradients(name, targets, monkeypatch):
    example = make(name)
    model, fused = adapted(example, target_modules=targets), []
    run = CompLoRABlock.run_fused

    def observed(block: CompLoRABlock, *arguments: Any, **options: Any) -> Tensor | None:
        y = run(block, *arguments, **options)
        fused.append(y is not None)
        return y

    monkeypatch.setattr(CompLoRABlock, "run_fused", observed)
    factors = factors_of(model)
    ours = with_gradients(lambda inputs: example.features(model, inputs), example.inputs, factors)
    assert sum(fused) == example.fused
    oracle = Oracle(example, model)
    for mine, truth in zip(ours, with_gradients(lambda x: oracle(factors, x), example.inputs, factors), strict=True):
        assert_close(mine, truth, tolerance(name))
    assert (ours[0] - example.features(example.model, example.inputs)).norm() > 0.01 * ours[0].norm()


@every_model
def test_five_steps_of_training(name):
    example = make(name)
    model = adapted(example, target_modules=ALL)
    oracle = Oracle(example, model)
    copied: Factors = {key: (A.detach().clone(), B.detach().clone()) for key, (A, B) in factors_of(model).items()}

    def train(function: Callable[[Factors], Tensor], factors: Factors) -> Tensor:
        parameters = [factor.requires_grad_() for pair in factors.values() for factor in pair]
        optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            loss(function(factors)).log1p().backward()
            optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in parameters])

    before = torch.cat([factor.flatten() for pair in copied.values() for factor in pair])
    ours = train(lambda _: example.features(model, example.inputs), factors_of(model))
    truth = train(lambda factors: oracle(factors, example.inputs), copied)
    assert_close(ours - before, truth - before, 10 * tolerance(name))


@every_model
@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")  # PEFT asks old names
def test_merged_and_exported_to_peft(name, tmp_path):
    example = make(name)
    model = adapted(example, target_modules=ALL)
    with torch.no_grad():
        features = example.features(model, example.inputs)
        ck.export_peft(model, tmp_path)
        loaded: Any = peft.PeftModel.from_pretrained(copy.deepcopy(example.model), str(tmp_path)).eval()
        assert_close(
            example.features(loaded.base_model.model, example.inputs), features, 1e-5
        )  # PEFT's float32 factors
        ck.merge_adapter(model)
        assert_close(example.features(model, example.inputs), features, tolerance(name))
        ck.unmerge_adapter(model)
        assert torch.equal(example.features(model, example.inputs), features)


LOAD = """
import sys
import torch
import complora_kernels as ck
from model_zoo import MODELS, make
for number, name in enumerate(MODELS):
    model, inputs, features, _ = make(name)
    ck.load_adapter(model, f"{sys.argv[1]}/{number}", progress=False)
    torch.save(features(model, inputs).detach(), f"{sys.argv[1]}/{number}.pt")
"""


def test_saved_and_loaded_in_a_new_process(tmp_path):
    expected = []
    for number, name in enumerate(MODELS):
        example = make(name)
        model = adapted(example, target_modules=ALL)
        ck.save_adapter(model, tmp_path / str(number))
        expected.append(example.features(model, example.inputs).detach())
    support = str(Path(__file__).parents[1] / "support")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([support, str(Path(ck.__file__).parents[1])])}
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], env=environment, check=True, timeout=600)
    for number, (name, features) in enumerate(zip(MODELS, expected, strict=True)):
        assert_close(torch.load(tmp_path / f"{number}.pt"), features, tolerance(name))


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_as_accurate_as_the_own_forward_pass(name, dtype, monkeypatch):
    example = make(name)
    model = adapted(example, target_modules=ALL)
    model = model.to(dtype)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in example.inputs.items()}
    wide = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        truth = example.features(exact(copy.deepcopy(model)).double(), wide)
        fused = example.features(model, inputs)
        monkeypatch.setattr(CompLoRABlock, "run_fused", lambda *_, **__: None)
        own = example.features(model, inputs)
    assert_as_accurate_as_reference(fused, own, truth, "features", dtype)
