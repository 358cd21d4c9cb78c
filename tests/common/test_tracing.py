"""Adapted layers under torch.func, differentiated twice, traced, faked and checkpointed.

The truth is a plain module in float64 whose weight is `W + s P_out B A P_in`, written out with dense projectors.
"""

from __future__ import annotations

import copy
import functools
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_device
from numerics import random_basis
from tiny_models import batch, clip, config, features, half_of, randomise, with_updates
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import complora_kernels as ck
from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.blocks import ACTIVATIONS, Norm, norm_lora_linear, norm_lora_mlp
from complora_kernels.functional import complora_linear, fold_factors, lora_linear, project_complement

BACKENDS = ("torch", "extension")
ALL = ("q", "k", "v", "o", "fc1", "fc2")
D = torch.float64


# ---- twice differentiated


def factors(out: int, in_: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, in_, dtype=D, requires_grad=True), torch.randn(out, 2, dtype=D, requires_grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_second_derivatives_of_a_layer(backend, dropout_p):
    x, W, bias = torch.randn(3, 5, dtype=D, requires_grad=True), torch.randn(6, 5, dtype=D), torch.randn(6, dtype=D)
    U, V = random_basis(6, 2, D), random_basis(5, 3, D)
    common: dict[str, Any] = {"scaling": 0.7, "backend": backend}

    def whole(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(1)
        options = {"output_basis": U, "input_basis": V, "input_basis_kind": "complement", "dropout_p": dropout_p}
        return complora_linear(x, W, bias, A, B, **options, **common)

    def in_steps(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(1)
        (A,), (B,) = fold_factors([A], [B], [U], [None], **common)
        x = project_complement(x, V, backend=backend).tanh()
        return lora_linear(x, W, None, A, B, dropout_p=dropout_p, backend=backend).sin()

    for function in (whole, in_steps):
        assert torch.autograd.gradgradcheck(function, (x, *factors(6, 5)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dropout_p", "with_delta"), [(0.0, False), (0.1, True)])
def test_second_derivatives_of_a_block(backend, activation, dropout_p, with_delta):
    x, delta = torch.randn(2, 2, 3, dtype=D).requires_grad_().unbind()
    norm = Norm(torch.randn(3, dtype=D), torch.randn(3, dtype=D), 1e-5)
    W1, W2, bias = torch.randn(4, 3, dtype=D), torch.randn(3, 4, dtype=D), torch.randn(4, dtype=D)

    def function(x: Tensor, delta: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        fc1 = AdaptedLinear(W1, bias, [A1], [B1], [(0, 4)], dropout_p)
        fc2 = AdaptedLinear(W2, None, [A2], [B2], [(0, 3)], dropout_p)
        added = delta if with_delta else None
        s, y, z = norm_lora_linear(x + delta, added, norm, fc1, fc1._replace(bias=None), backend=backend)
        return s.sin(), y, z.sin(), norm_lora_mlp(x + delta, added, norm, fc1, fc2, activation, backend=backend)

    assert torch.autograd.gradgradcheck(function, (x, delta, *factors(4, 3), *factors(3, 4)))


@pytest.mark.parametrize("backend", ["torch", "extension", "triton"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_create_graph_changes_no_gradient(backend, dropout_p):
    """The same masks: with others, half of what is dropped would differ."""
    device = triton_device.DEVICE if backend == "triton" else "cpu"
    norm = Norm(torch.rand(8, device=device), torch.rand(8, device=device), 1e-5)
    W, V, U = torch.randn(16, 8, device=device), torch.randn(8, 16, device=device), random_basis(16, 5).to(device)

    def gradients(dtype: torch.dtype, create_graph: bool) -> list[Tensor]:
        torch.manual_seed(1)
        made = lambda *shape: torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)
        x, delta, A1, B1, A2, B2 = made(7, 8), made(7, 8), made(2, 8), made(16, 2), made(2, 16), made(8, 2)
        fc1 = AdaptedLinear(W.to(dtype), None, [A1], [B1], [(0, 16)], dropout_p)
        fc2 = AdaptedLinear(V.to(dtype), None, [A2], [B2], [(0, 8)], dropout_p)
        y = norm_lora_mlp(x, delta, norm, fc1, fc2, "quick_gelu", backend=backend)
        y = complora_linear(y, W.to(dtype), None, A1, B1, output_basis=U, dropout_p=dropout_p, backend=backend)
        leaves = [x, delta, A1, B1, A2, B2]
        return list(torch.autograd.grad(y.square().mean(), leaves, create_graph=create_graph))

    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):  # roundings on the way of a few products
        for ours, expected in zip(gradients(dtype, True), gradients(dtype, False), strict=True):
            assert ours.requires_grad
            assert (ours - expected).norm() <= tolerance * expected.norm()


# ---- torch.func


class SelfAttention(nn.Module):
    """With explicit weights: torch's fused kernels on the CPU have no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: Any = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def plain_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh()).double()


def adapted_linear(**options: Any) -> tuple[Any, Any]:
    plain = plain_linear()
    model = ck.apply_complora(copy.deepcopy(plain), config(target_modules="0", **options), progress=False)
    return plain, randomise(model)


def adapted_attention() -> tuple[Any, Any]:
    plain = SelfAttention().double()
    model = copy.deepcopy(plain).requires_grad_(False)
    layer = ck.CompLoRAMultiheadAttention.from_attention(model.attention, config(target_modules=ALL[:4]))
    model.attention = layer
    return plain, randomise(model)


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def exact(plain: nn.Module, model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """The plain module, called with the weights that the factors stand for."""
    projectors, scaling = {}, config().scaling
    for path, layer in adapted_layers(model).items():
        for name in layer.weights:
            U = torch.linalg.svd(layer.base_weight(name)).U[:, : half_of(layer.base_weight(name))]
            projectors[path, name] = torch.eye(len(U), dtype=U.dtype) - U @ U.T

    def call(params: dict[str, Tensor], x: Tensor) -> Tensor:
        weights: dict[str, Tensor] = dict(plain.named_parameters())
        for path, layer in adapted_layers(model).items():
            for name, (parameter, start, stop) in layer.weights.items():
                suffix, weight = f".{name}" if name else "", weights[f"{path}.{parameter}"]
                A, B = params[f"{path}.lora_A{suffix}"], params[f"{path}.lora_B{suffix}"]
                delta = scaling * projectors[path, name] @ B @ A
                weights[f"{path}.{parameter}"] = weight + nn.functional.pad(delta, (0, 0, start, len(weight) - stop))
        return functional_call(plain, weights, (x,))

    return call


Loss = Callable[[dict[str, Tensor], Tensor], Tensor]
TRANSFORMS: dict[str, Callable[[Loss, dict[str, Tensor], Tensor], Any]] = {
    "grad": lambda loss, params, x: grad(loss)(params, x),
    "per-sample gradients": lambda loss, params, x: vmap(grad(loss), (None, 0))(params, x.unsqueeze(1)),
    "jvp": lambda loss, params, x: jvp(lambda params, x: loss(params, x), (params, x), (params, x.cos())),
    "jacrev": lambda loss, params, x: jacrev(loss)(params, x),
    "hessian": lambda loss, params, x: hessian(loss, argnums=1)(params, x),
    "an ensemble": lambda loss, params, x: vmap(lambda t: loss({n: t * p for n, p in params.items()}, x))(x[0, 0]),
    "batched backward": lambda loss, params, x: torch.autograd.functional.jacobian(
        lambda x: loss(params, x.sin()) * x[:, 0, 0], x, vectorize=True
    ),
    "gradient penalty": lambda loss, params, x: penalty(loss, params, x),
}


def penalty(loss: Loss, params: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
    params, x = {name: p.clone().requires_grad_() for name, p in params.items()}, x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(params, x), x, create_graph=True)
    return torch.autograd.grad((gradient.norm() - 1).square(), list(params.values()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # by which torch makes its forward mode
@pytest.mark.parametrize("make", [adapted_linear, adapted_attention])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_follow_adapted_layers(make, transform):
    plain, model = make()
    call, x = exact(plain, model), torch.randn(3, 2, 6, dtype=D)

    def of(function: Callable[..., Tensor]) -> Any:
        return TRANSFORMS[transform](lambda params, x: function(params, x).square().sum(), adapters(model), x)

    torch.testing.assert_close(of(lambda params, x: functional_call(model, params, (x,))), of(call))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's fused attention, batched
def test_transforms_of_a_clip():
    """A residual block is not fused where somebody follows it, nor are prompts cut whose values nobody can read."""
    plain = clip().double()
    model: Any = randomise(ck.apply_complora(copy.deepcopy(plain), config(target_modules=ALL), progress=False))
    images, texts = batch(D)
    call = lambda f, inputs, w: grad(lambda x: (f(x) * w).sum())(inputs)
    w, updated = torch.randn(3, 16, dtype=D), with_updates(plain, model, config(), half_of)
    for one in (lambda m: call(m.encode_image, images, w), lambda m: vmap(m.encode_text)(texts.unsqueeze(1))):
        torch.testing.assert_close(one(model), one(updated))
    gradients = vmap(grad(lambda p, x: functional_call(model.visual, p, (x[None],)).sum()), (None, 0))
    per_sample = gradients(adapters(model.visual), images)
    summed = torch.autograd.grad(model.visual(images).sum(), trainable(model.visual))
    for name, total in zip(per_sample, summed, strict=True):
        torch.testing.assert_close(per_sample[name].sum(0), total)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def test_randomness_of_vmap():
    _, model = adapted_linear(lora_dropout=0.5)
    x = torch.randn(2, 6, dtype=D).expand(8, 2, 6)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(model)(x)
    same, different = (vmap(model, randomness=randomness)(x) for randomness in ("same", "different"))
    assert all(torch.equal(y, same[0]) for y in same)
    assert not all(torch.equal(y, different[0]) for y in different)


def test_half_precision_is_rounded_once():
    """Rounded before it is added, an update below half a unit in the last place would be lost."""
    x, W = torch.ones(1, 8).bfloat16(), torch.ones(8, 8).bfloat16()
    A, B = torch.full((1, 8), 0.25).bfloat16(), torch.full((8, 1), 2**-8).bfloat16()
    W[:, 0] += 2**-7  # x W^T is 8 + 2^-7, which bfloat16 rounds to 8; with the update 8 + 2^-6
    y = vmap(lambda x: lora_linear(x, W, None, 256 * A, B * 4))(x)
    assert torch.equal(y, (x.double() @ (W.double() + 4 * B.double() @ (256 * A.double())).T).bfloat16())


@pytest.mark.parametrize("backend", ["triton", "extension"])
def test_a_backend_that_was_asked_for_by_name_says_which_one_is_followed(backend):
    x, W, A, B = torch.randn(2, 6), torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2)
    with pytest.raises(RuntimeError, match=re.escape("COMPLORA_BACKEND=reference")):
        grad(lambda x: lora_linear(x, W, None, A, B, backend=backend).sum())(x)


# ---- traced, faked, checkpointed


def test_jit_trace_serves_other_batches():
    model: Any = randomise(ck.apply_complora(clip(), config(target_modules=ALL), progress=False)).eval()
    images, texts = batch()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still what some deploy with
        traced: Any = torch.jit.trace(model, (images[:2], texts[:2]))
        for ours, expected in zip(traced(images, texts), model(images, texts), strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_jit_script_and_symbolic_trace_say_what_to_do(monkeypatch):
    _, model = adapted_linear()
    for merged in (False, True):
        with pytest.raises(RuntimeError, match=r"Sequential.*use torch.jit.trace or torch.export"):
            torch.jit.script(model)
        assert isinstance(model[0], ck.CompLoRALinear)
        if not merged:
            with pytest.raises(TypeError, match=r"x is a Proxy.*use torch.export"):
                torch.fx.symbolic_trace(model)
            ck.merge_adapter(model)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace"):
        torch.jit.script(ck.apply_complora(clip(), config(), progress=False))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_fake_and_meta_tensors(monkeypatch, backend):
    """Shapes alone, and no value of a basis, a mask or a text is asked for."""
    monkeypatch.setenv("COMPLORA_BACKEND", backend)
    model: Any = ck.apply_complora(clip(), config(target_modules=ALL, lora_dropout=0.5), progress=False).train()
    with FakeTensorMode() as mode:
        state: dict[str, Any] = {
            name: mode.from_tensor(t) for name, t in [*model.named_parameters(), *model.named_buffers()]
        }
        images, texts = map(mode.from_tensor, batch())
        image_features, text_features, _ = functional_call(model, state, (images, texts))
        assert image_features.shape == text_features.shape == (3, 16)
        (image_features @ text_features.T).sum().backward()
    _, linear = adapted_linear()
    with FakeTensorMode(allow_non_fake_inputs=True):  # a basis that nobody has looked at
        assert linear(torch.ones(3, 6, dtype=D)).shape == (3, 5)
    model = ck.apply_complora(clip(), config(target_modules=ALL, lora_dropout=0.5), progress=False).train().to("meta")
    images, texts = (tensor.to("meta") for tensor in batch())
    features(model, images, texts).sum().backward()
    assert all(p.grad is not None for p in ck.adapter_parameters(model))


def test_selective_checkpointing_of_products():
    """The product that it keeps is not written to."""
    model: Any = randomise(ck.apply_complora(clip().double(), config(target_modules=ALL), progress=False))
    kept = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}

    def policy(_ctx: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    images, _ = batch(D)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    whole = checkpoint(model.visual, images, use_reentrant=False, context_fn=contexts)
    ours, expected = (
        torch.autograd.grad(y.square().sum(), trainable(model.visual)) for y in (whole, model.visual(images))
    )
    torch.testing.assert_close(ours, expected)


# ---- compiled and exported, by a process that has computed nothing before


@pytest.mark.long
def test_compile_and_export_before_any_eager_pass():
    script = Path(__file__).parents[1] / "support" / "compile_first.py"
    command = [sys.executable, "-W", "error::UserWarning:complora_kernels", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
