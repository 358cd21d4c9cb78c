"""Twenty steps of training: the same as through the reference and through plain PyTorch, and no frozen bit changes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_models import batch, clip, clip_4, config, features, frozen_weight, half_of
from torch import Tensor, nn
from torch.nn import functional as F

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.adapters.manage import named_adapter_parameters

pytestmark = pytest.mark.usefixtures("torch_backend")  # the others have files of their own

STEPS = 20
ALL = ("q", "k", "v", "o", "fc1", "fc2")

both_layouts = pytest.mark.parametrize("make", [clip, clip_4])


def contrastive_loss(outputs: Tensor) -> Tensor:
    """Each image belongs to the text of the same row."""
    images, texts = F.normalize(outputs.float() if outputs.dtype != torch.float64 else outputs, dim=-1).chunk(2, dim=1)
    return F.cross_entropy(10 * images @ texts.T, torch.arange(len(images)))


def train(
    factors: list[nn.Parameter],
    outputs: Callable[[], Tensor],
    learning_rate: float = 1e-2,
    context: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> list[Tensor]:
    """The loss of every step."""
    optimizer = torch.optim.AdamW(factors, learning_rate, weight_decay=1e-2)
    losses = []
    torch.manual_seed(7)  # dropout's
    for _ in range(STEPS):
        optimizer.zero_grad()
        with context():
            loss = contrastive_loss(outputs())
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def train_adapted(model: nn.Module, inputs: tuple[Tensor, Tensor], **options: Any) -> list[Tensor]:
    return train(list(ck.adapter_parameters(model)), lambda: features(model, *inputs), **options)


def named_factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: factor.detach() for name, factor in named_adapter_parameters(model)}


# ---- the same as other ways to compute it


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@both_layouts
def test_every_loss_and_parameter_agrees_with_the_reference(make, dropout, monkeypatch):
    """In float64, so that AdamW, which divides small gradients by their own size, does not blow up rounding."""
    options = config(target_modules=ALL, sides="both", lora_dropout=dropout)
    ours = ck.apply_complora(make().double(), options).train()
    reference, inputs = copy.deepcopy(ours), batch(torch.float64)
    initial = named_factors(copy.deepcopy(ours))
    losses = train_adapted(ours, inputs)
    monkeypatch.setenv("COMPLORA_BACKEND", "reference")
    torch.testing.assert_close(losses, train_adapted(reference, inputs))
    trained = named_factors(ours)
    torch.testing.assert_close(trained, named_factors(reference))
    assert losses[-1] < 0.8 * losses[0]
    # Every factor moved by more than rounding does: the runs agree on training, not on standing still.
    assert all(not torch.allclose(trained[name], value, atol=1e-3) for name, value in initial.items())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@both_layouts
def test_in_float32_it_goes_where_the_reference_goes(make, dropout, monkeypatch):
    options = config(target_modules=ALL, lora_dropout=dropout)
    ours = ck.apply_complora(make(), options).train()
    reference, inputs = copy.deepcopy(ours), batch()
    initial = named_factors(copy.deepcopy(ours))
    losses = train_adapted(ours, inputs)
    monkeypatch.setenv("COMPLORA_BACKEND", "reference")
    expected = train_adapted(reference, inputs)
    # Rounding of 6e-8 grows with every step; AdamW moves a factor whose gradient is rounding alone by the whole rate.
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)
    theirs = named_factors(reference)
    for name, factor in named_factors(ours).items():
        assert (factor - theirs[name]).norm() < 0.02 * (theirs[name] - initial[name]).norm(), name


@pytest.mark.parametrize("sides", ["output", "input", "both", "none"])
@both_layouts
def test_every_loss_and_parameter_agrees_with_dense_updates_of_a_plain_model(make, sides):
    """Plain PyTorch: the formula with dense projectors, added to the weights, differentiated by autograd."""
    plain, options = make().double(), config(target_modules=ALL, sides=sides, use_rslora=True)
    model = ck.apply_complora(copy.deepcopy(plain), options)
    inputs, factors = batch(torch.float64), {}
    for name, factor in named_factors(copy.deepcopy(model)).items():
        factors[name] = nn.Parameter(factor)
    weights = dense_weights(plain, model, factors, options)
    losses = train_adapted(model, inputs)
    expected = train(list(factors.values()), lambda: updated_features(plain, weights(), inputs))
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(named_factors(model), {name: factor.detach() for name, factor in factors.items()})
    assert losses[-1] < 0.8 * losses[0]


def dense_weights(
    plain: nn.Module, model: nn.Module, factors: dict[str, nn.Parameter], options: ck.CompLoRAConfig
) -> Callable[[], dict[str, Tensor]]:
    """A function that gives every adapted parameter of `plain` with its update, `W + s · P_out B A P_in`."""
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]] = {}
    for path, layer in adapted_layers(model).items():
        if "q" in layer.weights:
            names = {f"{path}.in_proj_weight": ("q", "k", "v"), f"{path}.out_proj.weight": ("o",)}
        else:
            names = {f"{path}.weight": ("",)}
        for parameter, adapters in names.items():
            for name in adapters:
                weight = frozen_weight(plain.get_submodule(path), name).detach()
                A, B = (factors[".".join(filter(None, (path, f"lora_{side}", name)))] for side in "AB")
                U, _, Vh = torch.linalg.svd(weight)
                k, (out, in_) = half_of(weight), weight.shape
                P_out = torch.eye(out, dtype=U.dtype) - U[:, :k] @ U[:, :k].T if options.sides in OUTPUT else None
                P_in = torch.eye(in_, dtype=U.dtype) - Vh[:k].T @ Vh[:k] if options.sides in INPUT else None
                parts.setdefault(parameter, []).append((weight, A, B, P_out, P_in))

    def updated(weight: Tensor, A: Tensor, B: Tensor, P_out: Tensor | None, P_in: Tensor | None) -> Tensor:
        B = B if P_out is None else P_out @ B
        A = A if P_in is None else A @ P_in
        return weight + options.lora_alpha / options.r**0.5 * B @ A

    return lambda: {name: torch.cat([updated(*part) for part in stacked]) for name, stacked in parts.items()}


OUTPUT, INPUT = ("output", "both"), ("input", "both")


class Features(nn.Module):
    """`features` as a module, so that `functional_call` can give it other weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return features(self.model, images, texts)


def updated_features(plain: nn.Module, weights: dict[str, Tensor], inputs: tuple[Tensor, Tensor]) -> Tensor:
    named = {f"model.{name}": weight for name, weight in weights.items()}
    return torch.func.functional_call(Features(plain), named, inputs)


# ---- what training leaves alone


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that is not a factor, and every buffer, as bytes."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: value.detach().clone().flatten().view(torch.uint8) for name, value in tensors if "lora_" not in name}


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "autocast"])
@both_layouts
def test_frozen_weights_and_bases_are_bit_identical_after_training(make, precision):
    dtype = {"autocast": torch.float32}.get(precision) or getattr(torch, precision)
    model = ck.apply_complora(make(), config(target_modules=ALL, sides="both", lora_dropout=0.25)).to(dtype).train()
    before, factors = bits(model), copy.deepcopy(named_factors(model))
    images, texts = batch()
    context = autocast if precision == "autocast" else contextlib.nullcontext
    losses = train_adapted(model, (images.to(dtype), texts), context=context)
    after = bits(model)
    assert after.keys() == before.keys()
    assert [name for name, value in before.items() if not torch.equal(after[name], value)] == []
    assert torch.stack(losses).isfinite().all()
    assert losses[-1] < 0.9 * losses[0]
    for name, factor in named_factors(model).items():
        assert factor.dtype == torch.float32
        assert factor.isfinite().all()
        assert not torch.equal(factor, factors[name])


@pytest.mark.parametrize("sides", ["output", "both"])
def test_after_training_the_protected_directions_are_as_they_were(sides):
    plain = clip().double()
    model = ck.apply_complora(copy.deepcopy(plain), config(target_modules=ALL, sides=sides))
    train_adapted(model, batch(torch.float64))
    left = []
    ck.merge_adapter(model)
    for path, layer in adapted_layers(model).items():
        for name in layer.weights:
            weight, updated = (frozen_weight(owner.get_submodule(path), name) for owner in (plain, model))
            U, _, Vh = torch.linalg.svd(weight)
            k = half_of(weight)
            torch.testing.assert_close(U[:, :k].T @ updated, U[:, :k].T @ weight)
            if sides == "both":
                torch.testing.assert_close(updated @ Vh[:k].T, weight @ Vh[:k].T)
            left.append((U[:, :k].T @ layer.factors(name)[1]).norm() / layer.factors(name)[1].norm())
    assert min(left) > 1e-3  # AdamW alone took every B out of the complement: the projection is what protects


# ---- what is kept for the backward pass


def saved_activations(model: nn.Module, *inputs: Tensor, **options: Any) -> list[int]:
    """Sizes of the distinct pieces of memory that autograd holds on to, without parameters, bases and factors."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs, **options)
    del output
    return sorted(saved.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_the_activations_x_and_h_are_saved(dtype, dropout):
    """No dropout mask, no dropped copy of x, no x beside h, no product of the size of a weight."""
    N, L, d, r = 3, 50, 24, 2
    x = torch.randn(N, L, d, dtype=dtype)
    attention = nn.MultiheadAttention(d, 2, batch_first=True).requires_grad_(False).to(dtype)
    options = config(target_modules=("q", "k", "v"), sides="both", lora_dropout=dropout, r=r)
    adapted = ck.CompLoRAMultiheadAttention.from_attention(attention, options)
    leaf = x.clone().requires_grad_()
    plain = saved_activations(attention, leaf, leaf, leaf, need_weights=False)
    ours = saved_activations(adapted, x, x, x, need_weights=False)
    seeds = [1] * 3 if dropout else []
    folded = [r * d] * 6
    assert plain
    assert ours == sorted([*plain, N * L * d, N * L * 3 * r, *folded, *seeds])
