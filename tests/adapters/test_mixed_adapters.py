"""A batch whose samples have different adapters computes, sample by sample, what each adapter computes alone."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from blocks import fusing
from model_zoo import MODELS, make
from small_clip import assert_close, config, sequence_first, small_clip, small_clip_4
from tiny_models import randomise
from torch import Tensor, nn
from two_adapters import both, clip, expected, features

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers

EXACT = 1e-11  # sums of float64 in another order
REORDERED = 5e-6  # sums of float32 in another order
NAMES = ["b", "__base__", "default", "b"]
EVERY = ("q", "k", "v", "o", "fc1", "fc2")


def rows_of(name: str, names: list[str] = NAMES) -> list[int]:
    return [row for row, other in enumerate(names) if other == name]


@pytest.mark.parametrize("active", ["default", "b", {"default": 0.5, "b": 2.0}], ids=str)
def test_each_sample_is_computed_by_its_own_adapter(active):
    model = both()
    ck.set_adapter(model, active)
    before = features(model)
    with ck.mixed_adapters(model, NAMES):
        mixed = features(model)
    for name in set(NAMES):
        truth = clip() if name == "__base__" else expected(name)
        assert_close(mixed[rows_of(name)], features(truth)[rows_of(name)], EXACT)
    assert torch.equal(features(model), before)
    assert ck.active_adapters(model) == (active if isinstance(active, dict) else {active: 1.0})


@pytest.mark.parametrize("name", [name for name in MODELS if "Swin" not in name])
def test_models_of_every_library(name):
    """One batch of two or three samples: the results are rows of as many batches with one adapter each."""
    row = make(name)
    place = 1 if name.endswith("sequence first") else 0
    names = ["b", "default", "__base__"][: next(iter(row.inputs.values())).shape[place]]
    model = randomise(ck.apply_complora(row.model, config(sides="both", target_modules=EVERY), progress=False))
    settings = config(r=3, sides="output", target_modules=("q", "v", "o", "fc2"))
    ck.add_adapter(model, "b", settings, progress=False)
    ck.set_adapter(model, "b")
    randomise(model)
    with torch.no_grad():
        with ck.mixed_adapters(model, names):
            mixed = row.features(model, row.inputs)
        for sample, adapter_name in enumerate(names):
            with one(model, adapter_name):
                alone = row.features(model, row.inputs)
            assert_close(mixed.select(place, sample), alone.select(place, sample), tolerance(name))
            assert (alone.select(place, sample) - mixed.select(place, sample - 1)).norm() > 1e-3 * mixed.norm()


def one(model: Any, adapter_name: str) -> contextlib.AbstractContextManager[None]:
    if adapter_name == "__base__":
        return ck.disable_adapter(model)
    ck.set_adapter(model, adapter_name)
    return contextlib.nullcontext()


def tolerance(name: str) -> float:
    """Eager attention of transformers takes its softmax in float32."""
    return 1e-5 if name.endswith(", eager") else 1e-9


@pytest.mark.parametrize("make_clip", [small_clip, sequence_first, small_clip_4])
@pytest.mark.parametrize("fuse", [True, False])
def test_as_many_samples_as_positions(monkeypatch, make_clip, fuse):
    """The order of samples and positions is not told by the shape: an image has five positions, a text six."""
    if not fuse:
        fusing(monkeypatch, False)
    model = both(make_clip(context_length=6).double())
    for count, encode in ((5, encode_images), (6, encode_texts)):
        names = ["b", "default", "b", "__base__", "default", "b"][:count]
        inputs = encode(model, count)
        with torch.no_grad():
            with ck.mixed_adapters(model, names):
                mixed = inputs()
            for name in set(names):
                with one(model, name):
                    assert_close(mixed[rows_of(name, names)], inputs()[rows_of(name, names)], EXACT)


def encode_images(model: Any, count: int) -> Callable[[], Tensor]:
    images = torch.randn(count, 3, 16, 16, dtype=torch.float64)
    return lambda: model.encode_image(images)


def encode_texts(model: Any, count: int) -> Callable[[], Tensor]:
    texts = torch.randint(1, 19, (count, 6))
    texts[:, -1] = 19
    return lambda: model.encode_text(texts)


def test_peft_computes_the_same(tmp_path):
    torch.manual_seed(3)
    linears = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    model = ck.apply_complora(copy.deepcopy(linears), config(sides="none", target_modules=("0", "2")), progress=False)
    ck.add_adapter(model, "b", config(r=4, sides="none", target_modules=("2",)), progress=False)
    for name in ("default", "b"):
        ck.set_adapter(model, name)
        for factor in ck.adapter_parameters(model):
            nn.init.normal_(factor)
        ck.export_peft(model, tmp_path / name)
    theirs: Any = peft.PeftModel.from_pretrained(linears, str(tmp_path / "default"))
    theirs.load_adapter(str(tmp_path / "b"), "b")
    theirs.eval()
    model.eval()
    x = torch.randn(4, 6)
    with torch.no_grad(), ck.mixed_adapters(model, NAMES):
        assert_close(model(x), theirs(x, adapter_names=NAMES), REORDERED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = both(small_clip(layers=1)).to(dtype)
    with ck.mixed_adapters(model, NAMES):
        mixed = features(model)
    for name in ("default", "b"):
        ck.set_adapter(model, name)
        assert_close(mixed[rows_of(name)].float(), features(model)[rows_of(name)].float(), 8 * torch.finfo(dtype).eps)


# ---- contexts


def test_another_thread_computes_the_active_adapter():
    model = both(active="b")
    results: list[Tensor] = []
    with ck.mixed_adapters(model, NAMES):
        thread = threading.Thread(target=lambda: results.append(features(model)))
        thread.start()
        thread.join()
    assert_close(results[0], features(expected("b")), EXACT)


def test_contexts_are_nested():
    model = both()
    with ck.mixed_adapters(model, NAMES):
        first = features(model)
        with ck.mixed_adapters(model, ["default"] * 4):
            assert_close(features(model), features(expected("default")), EXACT)
        with ck.disable_adapter(model):
            assert_close(features(model), features(clip()), EXACT)
        assert torch.equal(features(model), first)
    with ck.mixed_adapters(model, ["__base__"] * 4):
        assert_close(features(model), features(clip()), EXACT)


def test_a_compiled_model_computes_the_same():
    model = both(small_clip(layers=1))
    image = torch.randn(4, 3, 16, 16)
    encode: Any = torch.compile(model.encode_image, backend="aot_eager")
    with torch.no_grad():
        with ck.mixed_adapters(model, NAMES):
            expected, mixed = model.encode_image(image), encode(image)
        assert_close(mixed, expected, 10 * REORDERED)
        assert_close(encode(image), model.encode_image(image), 10 * REORDERED)


# ---- refusals


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["b", "c"], r"adapter_names=\['b', 'c'\], expected for each sample one of __base__, default, b"),
        ([], r"adapter_names=\[\], expected for each sample"),
        ("b", "adapter_names='b', expected for each sample"),
    ],
)
def test_names_are_checked(names, message):
    model = both()
    with pytest.raises(ValueError, match=message), ck.mixed_adapters(model, names):
        pass


def test_what_is_not_inference_on_that_batch_is_refused():
    model = both()
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    with ck.mixed_adapters(model, NAMES):
        with pytest.raises(ValueError, match=r"resblocks\.0\.\w+.*gradients are computed"):
            model.encode_image(images)
        with torch.no_grad(), pytest.raises(ValueError, match=r"x \(3, 5, 32\), expected \[N, ..., in\] with N=4"):
            model.encode_image(images[:3])
        model.train()
        with torch.no_grad(), pytest.raises(ValueError, match=r"training mode, expected eval\(\)"):
            model.encode_image(images)
    model.eval()
    ck.merge_adapter(model)
    with pytest.raises(RuntimeError, match="merged"), ck.mixed_adapters(model, NAMES):
        pass


def test_data_parallel_is_refused():
    """It calls the layers on other threads, with parts of the batch."""
    model = both()
    layer = adapted_layers(model)["visual.transformer.resblocks.0.attn"]
    layer._replicate_for_data_parallel()
    with ck.mixed_adapters(model, NAMES), pytest.raises(RuntimeError, match="DataParallel would part a batch"):
        layer._replicate_for_data_parallel()


def test_an_input_whose_samples_cannot_be_told_is_refused():
    """A layer beside a sequence-first attention, on as many positions as samples."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2)
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.attention(x, x, x, need_weights=False)[0])

    model = ck.apply_complora(Model().eval(), config(target_modules=("linear",), subspace_k=2), progress=False)
    with torch.no_grad(), ck.mixed_adapters(model, ["default"] * 4):
        with pytest.raises(ValueError, match=r"linear: x .*it is not known whether its samples come first"):
            model(torch.randn(4, 4, 6))
        with pytest.raises(ValueError, match=r"linear: x \(3, 4, 6\)"):
            model(torch.randn(3, 4, 6))


@pytest.mark.parametrize("name", [name for name in MODELS if "Swin" in name])
def test_windows_are_refused(name):
    row = make(name)
    ck.apply_complora(row.model, config(target_modules=("q", "k", "v"), subspace_ratio=0.5), progress=False)
    with torch.no_grad(), ck.mixed_adapters(row.model, ["default"] * 3), pytest.raises(ValueError, match="qkv: x"):
        row.features(row.model, row.inputs)
