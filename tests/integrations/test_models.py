"""Every model of the zoo, adapted and compared with an oracle that knows nothing of this package.

The oracle is the plain model with `W + s · P_out B A P_in` in the place of each adapted weight, by `functional_call`.
Its projectors come from a float64 `torch.linalg.svd`. All is in float64 where nothing else is said.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch
from blocks import fusing
from model_zoo import ALL, MODELS, OF_TRANSFORMERS, adapted, exact, make
from numerics import assert_as_accurate_as_reference
from small_clip import assert_close
from tiny_models import config
from torch import Tensor

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.integrations import find
from complora_kernels.modules.block import CompLoRABlock

every_model = pytest.mark.parametrize("name", MODELS)


def tolerance(name: str) -> float:
    """Eager attention of transformers takes its softmax in float32, in blocks that keep their own forward pass."""
    return 1e-5 if name.endswith(", eager") else 1e-9


@every_model
@pytest.mark.parametrize("targets", [("q", "k", "v"), ("v", "o"), ALL], ids="".join)
def test_features_and_gradients(name, targets):
    row = make(name)
    model = adapted(row, *targets)
    with ck.disable_adapter(model):
        assert_close(row.features(model, row.inputs), row.features(row.model, row.inputs), tolerance(name))
    assert sum(isinstance(module, CompLoRABlock) for module in model.modules()) == row.fused
    blocks = sum(1 for library in find(row.model) for _ in library.residual_blocks(row.model))
    assert sum(len(layer.weights) for layer in adapted_layers(model).values()) >= len(targets) * blocks
    with pytest.MonkeyPatch.context() as patch:
        fusing(patch, True)  # blocks that can be fused are
        ours = oracle.results(model, row.inputs, row.features)
    plain = exact(copy.deepcopy(row.model))
    truth = oracle.expected(plain, model, config(sides="both"), row.inputs, row.features)
    assert ours.keys() == truth.keys()
    for key, value in truth.items():
        # Some gradients are sums that cancel, such as those of k, whose bias changes no attention weight.
        torch.testing.assert_close(
            ours[key], value, rtol=tolerance(name), atol=tolerance(name), msg=lambda text, key=key: f"{key}: {text}"
        )


@every_model
def test_five_steps_of_training(name):
    row = make(name)
    model = adapted(row, *ALL)
    compute = oracle.updated(exact(copy.deepcopy(row.model)), config(sides="both"), row.features)
    ours = oracle.factors_of(model)
    theirs = {key: factor.detach().clone() for key, factor in ours.items()}
    before = torch.cat([factor.flatten() for factor in theirs.values()])

    def train(features: Callable[[], Tensor], factors: dict[str, Tensor]) -> Tensor:
        """By how much five steps change the factors."""
        optimizer = torch.optim.SGD([factor.requires_grad_() for factor in factors.values()], lr=1e-3, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            oracle.weighted(features()).mean().backward()
            optimizer.step()
        return torch.cat([factor.detach().flatten() for factor in factors.values()]) - before

    change = train(lambda: row.features(model, row.inputs), ours)
    assert_close(change, train(lambda: compute(row.inputs, theirs), theirs), 10 * tolerance(name))


@every_model
def test_merged_and_back(name):
    row = make(name)
    model = adapted(row, *ALL)
    with torch.no_grad():
        features = row.features(model, row.inputs)
        ck.merge_adapter(model)
        assert_close(row.features(model, row.inputs), features, tolerance(name))
        ck.unmerge_adapter(model)
    assert all(torch.equal(model.get_parameter(key), value) for key, value in row.model.named_parameters())


@every_model
def test_unloaded_it_is_the_plain_model_again(name):
    row = make(name)
    model = adapted(row, *ALL)
    features = row.features(model, row.inputs).detach()
    merged = ck.merge_and_unload(copy.deepcopy(model))
    ck.unload(model)
    for plain_again in (model, merged):
        assert [type(module) for module in plain_again.modules()] == [type(module) for module in row.model.modules()]
        plain_again.load_state_dict(plain_again.state_dict())
        assert plain_again.state_dict().keys() == row.model.state_dict().keys()
    assert all(torch.equal(model.get_parameter(key), value) for key, value in row.model.named_parameters())
    assert_close(row.features(merged, row.inputs), features, tolerance(name))


# What PEFT can compute: of an nn.MultiheadAttention it adds the update of the output projection twice, and it has no
# adapter for q, k and v in a parameter of another attention.
EXPORTABLE = (ALL, ("q", "k", "v", "fc1", "fc2"), ("fc1", "fc2"))


@every_model
def test_what_was_exported_comes_back(name, tmp_path):
    row, exported = make(name), []
    for targets in EXPORTABLE:
        model = adapted(row, *targets)
        with contextlib.suppress(ValueError):
            ck.export_peft(model, tmp_path / str(len(targets)))
            exported.append((len(targets), row.features(model, row.inputs).detach()))
    assert exported or name.startswith("torch encoder")  # which reads its weights without calling PEFT's layers
    for count, features in exported:
        again = ck.import_peft(copy.deepcopy(row.model), tmp_path / str(count), progress=False)
        assert_close(row.features(again, row.inputs).detach(), features, 1e-5)  # the factors in the file are float32


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")  # PEFT asks old names
@pytest.mark.parametrize("name", [name for name in OF_TRANSFORMERS if not name.endswith(", eager")])
def test_stock_peft_computes_what_was_exported(name, tmp_path):
    row = make(name)
    model = adapted(row, *ALL)
    ck.export_peft(model, tmp_path)
    loaded: Any = peft.PeftModel.from_pretrained(copy.deepcopy(row.model), str(tmp_path)).eval()
    with torch.no_grad():
        theirs = row.features(loaded.base_model.model, row.inputs)
        assert_close(theirs, row.features(model, row.inputs), 1e-5)  # the factors in the file are float32


LOAD = """
import sys
import torch
import complora_kernels as ck
from model_zoo import MODELS, make
for number, name in enumerate(MODELS):
    row = make(name)
    ck.load_adapter(row.model, f"{sys.argv[1]}/{number}", progress=False)
    torch.save(row.features(row.model, row.inputs).detach(), f"{sys.argv[1]}/{number}.pt")
"""


@pytest.mark.long
def test_saved_and_loaded_in_a_new_process(tmp_path):
    expected = []
    for number, name in enumerate(MODELS):
        row = make(name)
        model = adapted(row, *ALL)
        ck.save_adapter(model, tmp_path / str(number))
        expected.append(row.features(model, row.inputs).detach())
    support = str(Path(__file__).parents[1] / "support")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([support, str(Path(ck.__file__).parents[1])])}
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], env=environment, check=True, timeout=600)
    for number, (name, features) in enumerate(zip(MODELS, expected, strict=True)):
        assert_close(torch.load(tmp_path / f"{number}.pt"), features, 1e-5 if name.endswith("eager") else 1e-6)


@every_model
def test_fused_blocks_are_as_accurate_as_their_own_pass(name):
    """In float32 and under autocast. Blocks that are not fused are the same twice."""
    row = make(name)
    model = adapted(row, *ALL)
    low = copy.deepcopy(model).float()
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in row.inputs.items()}
    wide = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        results: dict[tuple[torch.dtype, bool], Tensor] = {}
        for dtype, fused in itertools.product((torch.float32, torch.bfloat16), (True, False)):
            with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                fusing(patch, fused)
                results[dtype, fused] = row.features(low, inputs)
        truth = row.features(exact(low.double()), wide)
    for dtype in (torch.float32, torch.bfloat16):
        assert_as_accurate_as_reference(results[dtype, True], results[dtype, False], truth, name, dtype)
