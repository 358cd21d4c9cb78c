"""Subspaces of activations: against inputs that are computed by hand and torch's SVD of them, stacked, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import stand_in
import torch
from calibrated import ALL, BOTH_SIDES, SIDES, Inputs, adapt, adapted_weights, batches, run
from failures import Unchanged
from tiny_models import (
    LAYOUTS,
    batch,
    clip,
    clip_4,
    config,
    features,
    frozen_weight,
    randomise,
)
from torch import Tensor, nn

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.adapters.calibration import SecondMoments, second_moments
from complora_kernels.adapters.install import Replacement
from complora_kernels.adapters.manage import raw_adapter_state
from complora_kernels.integrations.open_clip import CompLoRAAttention
from complora_kernels.subspace import Basis, Side

every_layout = pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)


def projector(basis: Basis) -> Tensor:  # [d, d], onto the protected directions
    matrix = basis.matrix.double()
    inside = matrix @ matrix.T
    return inside if basis.kind == "principal" else torch.eye(len(inside), dtype=torch.float64) - inside


# ---- the truth


def block_inputs(block: Any, x: Tensor, mask: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of the six weights of a residual block for x [N, L, d], and the block's output."""
    attn, mlp = block.attn, block.mlp
    normed = block.ln_1(x)
    projected = normed @ attn.in_proj_weight.T + attn.in_proj_bias
    q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in projected.chunk(3, -1))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    mixed = ((logits if mask is None else logits + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = x + mixed @ attn.out_proj.weight.T + attn.out_proj.bias
    hidden = block.ln_2(x)
    activated = mlp.gelu(hidden @ mlp.c_fc.weight.T + mlp.c_fc.bias)
    given = {"attn.q": normed, "attn.k": normed, "attn.v": normed, "attn.o": mixed}
    given |= {"mlp.c_fc": hidden, "mlp.c_proj": activated}
    return given, x + activated @ mlp.c_proj.weight.T + mlp.c_proj.bias


@torch.no_grad()
def true_inputs(model: Any, inputs: list[Inputs]) -> dict[str, Tensor]:  # each [M, in]
    """The inputs of every weight of the residual blocks of a plain model, by the names of the report."""
    given: dict[str, list[Tensor]] = {}
    text = "text.transformer" if hasattr(model, "text") else "transformer"
    for path in ("visual.transformer", text):
        streams: list[Tensor] = []
        first = model.get_submodule(f"{path}.resblocks.0")
        handle = first.register_forward_pre_hook(lambda _, args, streams=streams: streams.append(args[0]))
        run(inputs)(model)
        handle.remove()
        for x in streams:
            mask = None if path.startswith("visual") else torch.full((x.shape[1],) * 2, float("-inf")).triu(1).to(x)
            for i, block in enumerate(model.get_submodule(path).resblocks):
                seen, x = block_inputs(block, x, mask)
                for name, part in seen.items():
                    given.setdefault(f"{path}.resblocks.{i}.{name}", []).append(part.flatten(0, 1))
    return {name: torch.cat(parts) for name, parts in given.items()}


def true_directions(x: Tensor, weight: Tensor, side: Side) -> tuple[Tensor, Tensor]:
    """The principal directions [d, d] of X or Y and the shares that they hold [d]."""
    _, sigma, Vh = torch.linalg.svd(x if side == "input" else x @ weight.T)
    return Vh.T, sigma.square() / sigma.square().sum()


# ---- which directions


@every_layout
@pytest.mark.parametrize(
    ("size", "k"),
    [({"subspace_k": 5}, lambda _: 5), ({"subspace_ratio": 0.75}, lambda weight: min(weight.shape) * 3 // 4)],
    ids=["principal", "complement"],
)
def test_the_bases_are_the_principal_directions_of_what_the_weights_see_and_write(make, size, k):
    plain = make().double()
    model = adapt(copy.deepcopy(plain), **size)
    given, kinds = true_inputs(plain, batches()), set()
    report = {row.path: row for row in ck.subspace_report(model)}
    assert given.keys() == report.keys()
    assert len(report) == 2 * 2 * 6
    for path, layer, name in adapted_weights(model):
        weight = frozen_weight(layer, name).detach()
        for side in SIDES:
            directions, shares = true_directions(given[path], weight, side)
            basis, expected = layer.basis(name, side), directions[:, : k(weight)]
            assert basis.k == k(weight)
            assert basis.matrix.dtype == torch.float64
            # Rounding of X^T X, 1e-16 of the strongest direction's, over gaps of more than 1e-6 of that.
            assert (projector(basis) - expected @ expected.T).norm() < 1e-8, (path, side)
            assert basis.energy == pytest.approx(float(shares[: k(weight)].sum()), abs=1e-10)
            kinds.add(basis.kind)
        assert report[path].energy == layer.basis(name, "output").energy
    assert kinds == ({"principal"} if size == {"subspace_k": 5} else {"principal", "complement"})


def test_an_energy_is_a_share_of_the_trace():
    plain = clip().double()
    model = adapt(copy.deepcopy(plain), subspace_energy=0.6)
    given, sizes = true_inputs(plain, batches()), set()
    for path, layer, name in adapted_weights(model):
        for side in SIDES:
            _, shares = true_directions(given[path], frozen_weight(layer, name), side)
            k = int((shares.cumsum(0) < 0.6).sum()) + 1
            basis = layer.basis(name, side)
            assert basis.k == k
            assert 0.6 <= basis.energy == pytest.approx(float(shares[:k].sum()), abs=1e-10)
            sizes.add((side, k))
    assert len(sizes) > 4


def test_an_energy_that_takes_more_directions_than_the_weight_has_rows_is_refused():
    model = clip().double()
    message = r"subspace_energy=0.9999, expected at most 0\.9\d+ for .*resblocks.0.mlp.c_proj of shape \(32, 128\)"
    with Unchanged(model), pytest.raises(ValueError, match=message):
        adapt(model, subspace_energy=0.9999, target_modules=("fc2",))
    with Unchanged(model), pytest.raises(ValueError, match=r"32 of 32 output directions .*leaves nothing to train"):
        adapt(model, subspace_energy=0.9999, target_modules=("fc2",), sides="output")  # Y has no more than 32


class Net(nn.Module):
    """Not a CLIP, and one of its layers is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(input=self.shared(self.first(x)).sin()))


def test_linear_layers_of_any_model_and_every_use_of_a_shared_one():
    plain, xs = Net().double(), torch.randn(3, 7, 2, 6, dtype=torch.float64)
    options = config(target_modules=".*", subspace_source="activations", sides="both", subspace_k=2)
    model = ck.apply_complora(copy.deepcopy(plain), options, calibrate=lambda net: [net(x) for x in xs])
    x = xs.flatten(0, 2)
    once = plain.first(x)
    twice = plain.shared(once).sin()
    given = {"first": x, "shared": torch.cat([once, twice]), "head": plain.shared(twice)}
    for path, layer in adapted_layers(model).items():
        for side in SIDES:
            basis = layer.basis("", side)
            directions, _ = true_directions(given[path].detach(), layer.base_weight("").detach(), side)
            assert basis is not None
            assert (projector(basis) - directions[:, :2] @ directions[:, :2].T).norm() < 1e-8


def test_what_was_calibrated_on_stays_as_it_was():
    """Inputs of rank k: with the input side projected, no update can change what the layer makes of them."""
    plain = nn.Sequential(nn.Linear(10, 10)).double()
    x = torch.randn(50, 4, dtype=torch.float64) @ torch.randn(4, 10, dtype=torch.float64)
    options = config(target_modules="0", subspace_source="activations", sides="input", subspace_energy=1.0)
    model = randomise(ck.apply_complora(copy.deepcopy(plain), options, calibrate=lambda model: model(x)))
    assert [row.k for row in ck.subspace_report(model)] == [4]
    torch.testing.assert_close(model(x), plain(x))
    others = torch.randn(50, 10, dtype=torch.float64)
    assert not torch.allclose(model(others), plain(others), rtol=0.1)


def test_any_part_of_a_model_can_be_run():
    """The first four positions of texts alone: what follows them does not count."""
    plain: Any = clip().double()
    texts = torch.cat([texts for _, texts in batches()])[:, :4]

    def calibrate(model: Any) -> None:
        x = model.token_embedding(texts) + model.positional_embedding[:4]
        model.transformer(x, attn_mask=model.attn_mask[:4, :4])

    options = config(**(BOTH_SIDES | {"towers": "text", "subspace_k": 5}))
    model = ck.apply_complora(copy.deepcopy(plain), options, calibrate=calibrate)
    x = (plain.token_embedding(texts) + plain.positional_embedding[:4]).detach()
    mask = torch.full((4, 4), float("-inf"), dtype=torch.float64).triu(1)
    given, _ = block_inputs(plain.transformer.resblocks[0], x, mask)
    layer = model.transformer.resblocks[0].attn
    directions, _ = true_directions(given["attn.o"].detach().flatten(0, 1), layer.out_proj.weight.detach(), "input")
    assert (projector(layer.basis("o", "input")) - directions[:, :5] @ directions[:, :5].T).norm() < 1e-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("make", [clip, clip_4])
def test_the_activations_of_a_half_precision_model_are_its_own(make, dtype):
    plain, inputs = make().to(dtype), batches(dtype=dtype)
    seen: dict[str, list[Tensor]] = {}
    paths = [f"{tower}transformer.resblocks.1.mlp.{name}" for tower in ("", "visual.") for name in ("c_fc", "c_proj")]
    for path in paths:
        module = plain.get_submodule(path)
        module.register_forward_hook(lambda _, args, __, path=path: seen.setdefault(path, []).append(args[0].double()))
    model = adapt(copy.deepcopy(plain), inputs, subspace_k=5)
    seen.clear()
    with torch.no_grad():  # torch's attention takes another path with gradients, and rounds at other places
        run(inputs)(plain)
    for path in paths:
        layer, x = adapted_layers(model)[path], torch.cat(seen[path]).flatten(0, 1)
        for side in SIDES:
            basis = layer.basis("", side)
            directions, shares = true_directions(x, layer.base_weight("").detach().double(), side)
            assert basis is not None
            assert basis.matrix.dtype == torch.float32
            # The basis is rounded once to float32, 6e-8 an entry.
            assert (projector(basis) - directions[:, :5] @ directions[:, :5].T).norm() < 1e-5
            assert basis.energy == pytest.approx(float(shares[:5].sum()), abs=1e-8)


# ---- what each attention weight is given


def watched(make: Callable[..., nn.Module], targets: tuple[str, ...], **options: Any) -> Replacement:
    module: Any = make(**options).double()
    options_ = config(target_modules=targets, subspace_source="activations")
    kind: Any = CompLoRAAttention if isinstance(module, stand_in.Attention) else ck.CompLoRAMultiheadAttention
    return Replacement("attn", module, kind.from_attention(module, options_))


ATTENTIONS: dict[str, Callable[..., nn.Module]] = {
    "torch": lambda **options: nn.MultiheadAttention(12, 3, **options),
    "open_clip 4": lambda **options: stand_in.Attention(12, 3, **options),
}


def call(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    if isinstance(module, nn.MultiheadAttention):
        return module(query, key, value=value, attn_mask=mask, need_weights=False)[0]
    return module(query, k_x=key, v_x=value, attn_mask=mask)


def moment(*xs: Tensor) -> Tensor:
    x = torch.cat([x.flatten(0, -2) for x in xs])
    return x.T @ x


@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("targets", [("q", "k", "v", "o"), ("k", "o"), ("v",)], ids="".join)
def test_self_and_cross_attention(kind, targets):
    target = watched(ATTENTIONS[kind], targets, **({"batch_first": True} if kind == "torch" else {}))
    x, query = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 4, 12, dtype=torch.float64)
    key, value = torch.randn(2, 2, 6, 12, dtype=torch.float64)
    mask = torch.randn(4, 6, dtype=torch.float64)
    calls: list[Any] = [(x, x, x, None), (query, key, value, mask), (query, key, key, None), (x, x, x, None)]
    moments = second_moments(target.module, [target], lambda module: [call(module, *each) for each in calls])["attn"]

    mixing: Any = copy.deepcopy(target.module)  # its output is the mixed heads
    with torch.no_grad():
        mixing.out_proj.weight.copy_(torch.eye(12))
        mixing.out_proj.bias.zero_()
        mixed = [call(mixing, *each) for each in calls]
    expected = {name: moment(*(each["qkv".index(name)] for each in calls)) for name in "qkv"} | {"o": moment(*mixed)}
    for name in targets:
        torch.testing.assert_close(moments.of(name), expected[name], rtol=1e-12, atol=1e-12)
    assert [moments.of(name) for name in "qkvo" if name not in targets] == [None] * (4 - len(targets))


def test_a_call_with_one_argument_is_self_attention():
    target, x = watched(ATTENTIONS["open_clip 4"], ("q", "k", "v")), torch.randn(2, 5, 12, dtype=torch.float64)
    moments = second_moments(target.module, [target], lambda module: module(x))["attn"]
    for name in "qkv":
        torch.testing.assert_close(moments.of(name), moment(x))
    assert moments.of("q") is moments.of("k") is moments.of("v")  # one sum for the three


@pytest.mark.parametrize("batch_first", [True, False])
def test_masks_and_orders_of_torchs_attention(batch_first):
    target = watched(ATTENTIONS["torch"], ("o",), batch_first=batch_first, bias=False)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1)
    options = {"key_padding_mask": torch.arange(5) > torch.tensor([[2], [4], [3]]), "need_weights": True}
    moments = second_moments(target.module, [target], lambda module: module(x, x, x, **options))["attn"]
    mixing: Any = copy.deepcopy(target.module)
    with torch.no_grad():
        mixing.out_proj.weight.copy_(torch.eye(12))
        torch.testing.assert_close(moments.of("o"), moment(mixing(x, x, x, **options)[0]))


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), torch.enable_grad]
)
def test_sums_are_of_float64_whatever_mode_the_inputs_come_from(mode, monkeypatch):
    monkeypatch.setattr("complora_kernels.adapters.calibration.CHUNK_ROWS", 4)
    moments, xs = SecondMoments(), [torch.randn(3, 5, 7) for _ in range(3)]
    moments.add(("",), xs[0])
    with mode():
        moments.add(("",), xs[1] + 0)
    moments.add(("",), xs[2].requires_grad_())
    with mode():
        moments.add(("",), torch.empty(2, 0, 7))
    found = moments.of("")
    assert found is not None
    assert not found.requires_grad
    torch.testing.assert_close(found, moment(*(x.detach().double() for x in xs)), rtol=1e-13, atol=1e-13)


# ---- how calibrate is called


def test_calibrate_is_called_once_in_evaluation_mode_without_gradients():
    model: Any = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.9), nn.Linear(5, 5), nn.BatchNorm1d(5)).train()
    model[1].eval()
    before, calls, x = copy.deepcopy(model.state_dict()), [], torch.randn(4, 5)

    def calibrate(given: nn.Module) -> None:
        calls.append((given, torch.is_grad_enabled(), any(module.training for module in given.modules())))
        given(x)

    options = config(target_modules="0", subspace_source="activations")
    ck.apply_complora(model, options, calibrate=calibrate)
    assert calls == [(model, False, False)]
    assert [module.training for module in model] == [True, False, True, True]
    assert model.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not any(module._forward_pre_hooks for module in model)


def test_dropout_of_the_attention_is_off_for_the_mixed_heads_too():
    plain = clip().double()
    for block in plain.get_submodule("visual.transformer.resblocks"):  # type: ignore[union-attr]
        block.attn.dropout = 0.9
    options = {"target_modules": ("o",), "towers": "image", "subspace_k": 5}
    bases = [
        {name: basis for name, basis in adapt(model, **options).named_buffers() if "basis" in name}
        for model in (copy.deepcopy(plain).train(), plain.eval())
    ]
    torch.testing.assert_close(*bases)


def test_random_generators_and_initial_factors_are_those_of_other_sources():
    def drawn(**options: Any) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(8)
        model = ck.apply_complora(clip(), config(target_modules=ALL), progress=False) if not options else None
        if model is None:
            model = ck.apply_complora(clip(), config(target_modules=ALL, subspace_source="activations"), **options)
        return list(ck.adapter_parameters(model)), torch.get_rng_state()

    def calibrate(model: Any) -> None:
        images, texts = batch()  # drawn from the default generator
        features(model, images, texts)

    (factors, state), (others, other_state) = drawn(), drawn(calibrate=calibrate)
    assert all(torch.equal(*pair) for pair in zip(factors, others, strict=True))
    assert torch.equal(state, other_state)


def test_two_runs_are_equal_bit_by_bit():
    plain = clip()
    first, second = (adapt(copy.deepcopy(plain)) for _ in range(2))
    again = dict(second.named_buffers())
    assert all(torch.equal(buffer, again[name]) for name, buffer in first.named_buffers())


# ---- the adapted model


@every_layout
def test_the_adapted_model_trains_in_the_complement_and_merges(make):
    plain = make().double()
    model, inputs = adapt(copy.deepcopy(plain)), batches()[0]
    torch.testing.assert_close(features(model, *inputs), features(plain, *inputs))
    optimizer = torch.optim.AdamW(ck.adapter_parameters(model), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        features(model, *inputs).square().sum().backward()
        optimizer.step()
    ck.check_gradients(model)
    for row in ck.subspace_report(model):
        assert row.share < 1e-20
        assert row.relative_update > 0
    trained = features(model, *inputs)
    # Training moved the features by far more than rounding: what is compared next is not the plain model's.
    assert not torch.allclose(trained, features(plain, *inputs), rtol=1e-2)
    with ck.disable_adapter(model):
        torch.testing.assert_close(features(model, *inputs), features(plain, *inputs))
    state = {name: value.clone() for name, value in plain.state_dict().items()}
    ck.merge_adapter(model)
    torch.testing.assert_close(features(model, *inputs), trained)
    ck.unmerge_adapter(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(features(model, *inputs), trained)


def test_a_layer_alone_computes_nothing_until_it_knows_its_activations():
    linear, x = nn.Linear(6, 4).requires_grad_(False), torch.randn(9, 6)
    layer = ck.CompLoRALinear.from_linear(
        linear, config(subspace_source="activations", subspace_k=2), path="some.layer"
    )
    for act in (layer, lambda _: raw_adapter_state(layer) and ck.subspace_report(layer)):
        with pytest.raises(RuntimeError, match=r"some\.layer has no output basis yet.*protect_activations"):
            act(x)
    layer.protect_activations("", x.T @ x)
    torch.testing.assert_close(layer(x), linear(x))
    other = ck.CompLoRALinear.from_linear(linear, config())
    with pytest.raises(ValueError, match=r"second_moment=X\^T X of weight with subspace_source='weight', expected"):
        other.protect_activations("", x.T @ x)
