"""Towers of every library, adapted and merged, exported with a dynamic batch, in the format of ONNX, and compiled.

The last of two blocks is adapted: the time that this takes grows with the number of adapted weights.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import onnxruntime
import oracle
import pytest
import torch
from model_zoo import ALL, adapted, make
from rows import Row, in_float32, in_float64
from small_clip import assert_close
from timm_models import vit
from tiny_models import config
from torch import Tensor
from torch._inductor import config as inductor

import complora_kernels as ck

pytestmark = pytest.mark.long

TOWERS = (
    "CLIPVisionModel, sdpa",
    "CLIPTextModel, sdpa",
    "Siglip2VisionModel, sdpa",
    "Dinov2Model, sdpa",
    "timm ViT",
    "timm EVA",
    "open_clip image tower",
    "open_clip text tower",
    "OpenAI's CLIP",
    "torchvision ViT",
)
COMPILED = ("CLIPVisionModel, sdpa", "Dinov2Model, sdpa", "timm ViT", "timm EVA", "OpenAI's CLIP", "torchvision ViT")
WITHOUT_ONNX = ("Siglip2VisionModel, sdpa",)  # torch 2.14 cannot translate a check in the plain model
STATES = {"adapted": lambda model: None, "merged": ck.merge_adapter}
# Of features in float32 against those in float64.
ROUNDING = 1e-5


def made(name: str) -> tuple[Row, Any]:
    row = make(name)
    return row, adapted(row, *ALL, layers=(1,))


def larger(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch of 5 with the samples in another order, images changed."""
    inputs = {name: values.flip(0).repeat(3, *[1] * (values.dim() - 1))[:5] for name, values in inputs.items()}
    return {name: values.sin() if values.is_floating_point() else values for name, values in inputs.items()}


@pytest.mark.filterwarnings("ignore:The tensor attribute .*attn_mask was assigned")  # by OpenAI's own code
@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
@pytest.mark.parametrize("name", TOWERS)
def test_exported_with_a_dynamic_batch(name, change):
    """As a program of torch's own operations and as one of ONNX, run at another batch size than that of the export."""
    row, model = made(name)
    change(model)
    batch = larger(row.inputs)
    with torch.no_grad():
        expected = row.features(model, batch)
    called = oracle.Called(model.float(), row.features)
    shapes = {key: {0: torch.export.Dim.DYNAMIC} for key in batch}
    program = torch.export.export(called, (in_float32(row.inputs),), dynamic_shapes=(shapes,))
    assert "complora" not in str(program.graph_module)
    assert_close(program.module()(in_float32(batch)).double(), expected, ROUNDING)
    if name not in WITHOUT_ONNX:
        assert_close(by_onnx(program, in_float32(batch)).double(), expected, ROUNDING)


def by_onnx(program: torch.export.ExportedProgram, batch: dict[str, Tensor]) -> Tensor:
    onnx = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False)
    assert onnx is not None
    session = onnxruntime.InferenceSession(onnx.model_proto.SerializeToString())
    names = [given.name for given in session.get_inputs()]
    assert [name.rpartition("inputs_")[2] for name in names] == list(batch)
    (features,) = session.run(None, {name: values.numpy() for name, values in zip(names, batch.values(), strict=True)})
    return torch.from_numpy(features)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_in_one_graph(name):
    """By all of torch.compile but the generation of code."""
    row, model = made(name)
    compiled, features = compiled_as_eager(row, model, "aot_eager")
    ck.merge_adapter(model)
    with torch.no_grad():
        assert_close(compiled(row.inputs), features, 1e-9)


def test_compiled_by_inductor(tmp_path, monkeypatch):
    """A model of one block, because each of its kernels takes a C++ compiler a second."""
    row = in_float64(functools.partial(vit, depth=1))
    row.model.requires_grad_(False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with inductor.patch(compile_threads=1):
        compiled_as_eager(row, adapted(row, "q", "fc2"), "inductor")
    assert list(tmp_path.rglob("*.so"))


def compiled_as_eager(row: Row, model: Any, backend: str) -> tuple[Any, Tensor]:
    """Compares features and gradients; returns the compiled model and the features."""
    truth = oracle.expected(copy.deepcopy(row.model), model, config(sides="both"), row.inputs, row.features)
    torch.compiler.reset()
    compiled: Any = torch.compile(oracle.Called(model, row.features), backend=backend, fullgraph=True)
    ours = oracle.results(model, row.inputs, lambda _, inputs: compiled(inputs))
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
    return compiled, truth["y"]
