"""The adapted layers against torch's own: outputs, gradients, invariants, and all that one does to a module.

Results are compared in float64 or float32 at the tolerances that `torch.testing` has for sums in that dtype.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import stand_in
import torch
from tiny_models import config, expected_delta, frozen_weight, half_of, randomise, with_updates
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import complora_kernels as ck
from complora_kernels.integrations.open_clip import CompLoRAAttention
from complora_kernels.modules import CompLoRALayer

D, HEADS, L, S, N = 12, 3, 5, 7, 2
SIDES = ("output", "input", "both", "none")
SUBSETS = [names for size in range(1, 5) for names in itertools.combinations("qkvo", size)]


def linear(out_features: int = 20, in_features: int = D, bias: bool = True) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias).requires_grad_(False)


def attention(**options: Any) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(D, HEADS, **{"batch_first": True, **options}).requires_grad_(False)
    for bias in (module.in_proj_bias, module.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    return module


def attention_4(**options: Any) -> stand_in.Attention:
    return stand_in.Attention(D, HEADS, **options).requires_grad_(False)


def adapt(module: nn.Module, **options: Any) -> CompLoRALayer:
    """The adapted twin of a plain module; all of q, k, v, o where nothing else is said."""
    options = {"target_modules": tuple("qkvo"), **options}
    if isinstance(module, nn.Linear):
        return ck.CompLoRALinear.from_linear(module, config(**options))
    if isinstance(module, nn.MultiheadAttention):
        return ck.CompLoRAMultiheadAttention.from_attention(module, config(**options))
    return CompLoRAAttention.from_attention(module, config(**options))


PLAIN: dict[str, Callable[[], nn.Module]] = {"linear": linear, "attention": attention, "attention 4": attention_4}


def example(module: nn.Module, x: Tensor) -> Tensor:
    """A forward pass of any of the modules on x [N, L, d]."""
    return module(x, x, x, need_weights=False)[0] if isinstance(module, nn.MultiheadAttention) else module(x)


def gradients(module: CompLoRALayer, x: Tensor) -> list[Tensor]:
    """Of x and of every factor, after a loss that is not linear in the output."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(1)  # dropout's
    example(module, x).square().sum().backward()
    return [grad for tensor in (x, *ck.adapter_parameters(module)) if (grad := tensor.grad) is not None]


# ---- what is computed


def test_linear_before_training_is_the_plain_one():
    plain, x = linear(), torch.randn(N, L, D)
    assert torch.equal(adapt(plain)(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_linear_before_training_is_the_plain_one_up_to_its_own_rounding(dtype):
    plain, x = linear().to(dtype), torch.randn(N, L, D).to(dtype)
    exact = F.linear(x.double(), plain.weight.double(), plain.bias.double())
    rounding = torch.finfo(dtype).eps / 2 + 1e-6  # relative to the exact value: one rounding, and float32 sums
    assert ((adapt(plain)(x).double() - exact).abs() <= rounding * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(20, D), (D, 20), (D, D)])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("k", [0, 5, 9, D])
def test_linear_is_a_plain_one_with_the_update_added(sides, k, shape, bias):
    plain = linear(*shape, bias=bias).double()
    size = {} if sides == "none" else {"subspace_k": k}
    layer = randomise(adapt(plain, sides=sides, use_rslora=True, **size))
    merged = with_updates(plain, layer, layer.config, lambda _: k)
    x = torch.randn(N, L, shape[1], dtype=torch.float64)
    torch.testing.assert_close(layer(x), merged(x))
    assert torch.equal(plain(x), copy.deepcopy(plain)(x))


GENERATOR = torch.Generator().manual_seed(0)
MASKS = {
    "float": torch.randn(L, L, generator=GENERATOR),
    "bool": torch.randn(L, L, generator=GENERATOR) > 0.2,
    "float per head": torch.randn(N * HEADS, L, L, generator=GENERATOR),
    "bool per head": torch.randn(N * HEADS, L, L, generator=GENERATOR) > 0.2,
}
for name in ("bool", "bool per head"):
    MASKS[name][..., 0] = False  # a row without any key is another test
CAUSAL = torch.full((L, L), float("-inf")).triu(1)
PADDING = torch.arange(L) >= torch.tensor([[L], [3]])

CALLS: dict[str, dict[str, Any]] = {
    "no mask": {},
    "averaged weights": {"need_weights": True},
    "weights per head": {"need_weights": True, "average_attn_weights": False},
    **{name: {"attn_mask": mask} for name, mask in MASKS.items()},
    "float and weights": {"attn_mask": MASKS["float"], "need_weights": True},
    "causal": {"attn_mask": CAUSAL},
    "causal, hint": {"attn_mask": CAUSAL, "is_causal": True},
    "causal, bool": {"attn_mask": CAUSAL < 0},
    "causal and weights": {"attn_mask": CAUSAL, "need_weights": True},
    "padding": {"key_padding_mask": PADDING},
    "padding, float": {"key_padding_mask": torch.randn(N, L, generator=GENERATOR)},
    "padding and causal": {"key_padding_mask": PADDING, "attn_mask": CAUSAL < 0},
    "padding, causal and weights": {"key_padding_mask": PADDING, "attn_mask": CAUSAL < 0, "need_weights": True},
}


def in_double(call: dict[str, Any]) -> dict[str, Any]:
    is_float = {name: isinstance(value, Tensor) and value.is_floating_point() for name, value in call.items()}
    return {name: value.double() if is_float[name] else value for name, value in call.items()}


def assert_same_attention(layer: nn.Module, plain: nn.Module, *inputs: Tensor, **call: Any) -> None:
    """Outputs, attention weights and the gradients of the inputs."""
    call = {"need_weights": False, **in_double(call)}
    results = []
    for module in (layer, plain):
        leaves = {id(x): x.detach().clone().requires_grad_() for x in inputs}  # one tensor stays one tensor
        output, weights = module(*(leaves[id(x)] for x in inputs), **call)
        output.nan_to_num().square().sum().backward()
        results.append((output, weights, [leaf.grad for leaf in leaves.values()]))
    torch.testing.assert_close(*results, equal_nan=True)
    assert (results[0][1] is not None) == call["need_weights"]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_attention_is_a_plain_one_with_the_updates_added(call, batch_first):
    plain = attention(batch_first=batch_first).double()
    layer = randomise(adapt(plain))
    x = torch.randn((N, L, D) if batch_first else (L, N, D), dtype=torch.float64)
    assert_same_attention(layer, with_updates(plain, layer, layer.config, half_of), x, x, x, **call)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("names", SUBSETS, ids="".join)
def test_attention_adapts_every_subset_of_its_projections(names, sides):
    plain = attention().double()
    layer = randomise(adapt(plain, target_modules=names, sides=sides))
    assert set(layer.weights) == set(names)
    x = torch.randn(N, L, D, dtype=torch.float64)
    assert_same_attention(layer, with_updates(plain, layer, layer.config, half_of), x, x, x)


@pytest.mark.parametrize("names", [tuple("qkvo"), ("k",), ("q", "v")], ids="".join)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("same", ["", "key is value", "query is key", "query is value"])
def test_cross_attention(same, bias, names):
    plain = attention(bias=bias).double()
    layer = randomise(adapt(plain, target_modules=names))
    q, k, v = (torch.randn(N, length, D, dtype=torch.float64) for length in (L, S, S))
    k, v = {"key is value": (k, k), "query is key": (q, q.flip(1)), "query is value": (q.flip(1), q)}.get(same, (k, v))
    mask = torch.randn(L, k.shape[1])
    assert_same_attention(layer, with_updates(plain, layer, layer.config, half_of), q, k, v, attn_mask=mask)


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"need_weights": True},
        {"need_weights": True, "average_attn_weights": False},
        {"attn_mask": MASKS["float per head"][:HEADS], "key_padding_mask": PADDING[1].float().neg()},
    ],
    ids=["no mask", "averaged weights", "weights per head", "masks"],
)
def test_attention_without_a_batch(call):
    plain = attention().double()
    layer = randomise(adapt(plain))
    x = torch.randn(L, D, dtype=torch.float64)
    assert_same_attention(layer, with_updates(plain, layer, layer.config, half_of), x, x, x, **call)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_row_that_attends_to_nothing_is_as_in_torch(need_weights):
    plain = attention().double()
    layer = randomise(adapt(plain))
    merged = with_updates(plain, layer, layer.config, half_of)
    x, padding = torch.randn(N, L, D, dtype=torch.float64), torch.tensor([[True], [False]]).expand(N, L)
    ours, torchs = (module(x, x, x, padding, need_weights=need_weights) for module in (layer, merged))
    torch.testing.assert_close(ours, torchs, equal_nan=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_dropout_draws_what_torch_draws(need_weights):
    plain = attention(dropout=0.4).double()
    layer = randomise(adapt(plain))
    x, results = torch.randn(N, L, D, dtype=torch.float64), []
    for module in (layer, with_updates(plain, layer, layer.config, half_of)):
        torch.manual_seed(3)
        results.append(module(x, x, x, need_weights=need_weights))
    torch.testing.assert_close(*results)
    assert not torch.equal(example(layer.eval(), x), results[0][0])


@pytest.mark.parametrize(
    "options",
    [{}, {"qkv_bias": False}, {"qk_norm": True}, {"scale_heads": True}, {"inner_norm": True}],
    ids=["default", "no bias", "qk_norm", "scale_heads", "inner_norm"],
)
@pytest.mark.parametrize("mask", [None, "float", "bool", "float per head", "bool per head", "causal"])
@pytest.mark.parametrize("cross", [False, True])
def test_attention_4_is_a_plain_one_with_the_updates_added(cross, mask, options):
    plain = attention_4(**options).double()
    layer = randomise(adapt(plain))
    x = torch.randn(N, L, D, dtype=torch.float64)
    other = {"k_x": torch.randn_like(x), "v_x": torch.randn_like(x)} if cross else {}
    attn_mask = None if mask is None else {**MASKS, "causal": CAUSAL}[mask]
    attn_mask = attn_mask.double() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = ~attn_mask  # here True keeps a pair
    updated = with_updates(plain, layer, layer.config, half_of)
    torch.testing.assert_close(layer(x, **other, attn_mask=attn_mask), updated(x, **other, attn_mask=attn_mask))


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("names", [("q",), ("k", "v"), tuple("qkvo")], ids="".join)
def test_attention_4_adapts_what_it_is_told(names, sides):
    plain = attention_4().double()
    layer = randomise(adapt(plain, target_modules=names, sides=sides))
    x = torch.randn(N, L, D, dtype=torch.float64)
    updated = with_updates(plain, layer, layer.config, half_of)
    torch.testing.assert_close(layer(x), updated(x))
    torch.testing.assert_close(layer(x, k_x=x.flip(0)), updated(x, k_x=x.flip(0)))


def test_attention_4_drops_where_the_plain_one_does():
    plain = attention_4(proj_drop=0.5).double()
    layer, x = randomise(adapt(plain, target_modules=("q",))), torch.randn(N, L, D, dtype=torch.float64)
    results = []
    for module in (layer, with_updates(plain, layer, layer.config, half_of)):
        torch.manual_seed(3)
        results.append(module(x))
    torch.testing.assert_close(*results)
    assert (results[0] == 0).any()
    plain = attention_4(attn_drop=0.9).double()
    dropping = adapt(plain)
    assert not torch.allclose(dropping(x), plain.eval()(x))
    torch.testing.assert_close(dropping.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("k", [5, 9])
@pytest.mark.parametrize("sides", ["output", "both"])
@pytest.mark.parametrize("name", PLAIN)
def test_protected_directions_of_each_weight_are_left_alone(name, sides, k):
    """`U_k^T W' = U_k^T W`, and `W' V_k = W V_k` with both sides; U and V are those of each of q, k and v alone."""
    plain = PLAIN[name]().double()
    layer = randomise(adapt(plain, sides=sides, subspace_k=k))
    weights = {adapter: frozen_weight(plain, adapter).clone() for adapter in layer.weights}
    layer.merge()
    for adapter, weight in weights.items():
        updated = frozen_weight(layer, adapter)
        U, _, Vh = torch.linalg.svd(weight)
        torch.testing.assert_close(U[:, :k].T @ updated, U[:, :k].T @ weight)
        assert torch.allclose(updated @ Vh[:k].T, weight @ Vh[:k].T, atol=1e-10) == (sides == "both")
        assert torch.linalg.matrix_rank(updated - weight) == layer.config.r
        assert (updated - weight).norm() > 0.1 * weight.norm()


@pytest.mark.parametrize("name", PLAIN)
def test_delta_weight_is_that_of_the_formula_under_autocast_too(name):
    plain = PLAIN[name]()
    layer = randomise(adapt(plain, sides="both"))
    for adapter in layer.weights:
        weight = frozen_weight(plain, adapter)
        expected = expected_delta(weight, *layer.factors(adapter), layer.config, half_of(weight)).float()
        torch.testing.assert_close(layer.get_delta_weight(adapter), expected)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer.get_delta_weight(adapter), expected)


# ---- what a module must survive


@pytest.mark.parametrize("name", PLAIN)
def test_the_plain_module_stays_as_it_was(name):
    plain = PLAIN[name]()
    state = {key: (id(value), value.clone()) for key, value in plain.named_parameters()}
    attributes = {key: value.copy() if isinstance(value, dict | set) else value for key, value in vars(plain).items()}
    layer = randomise(adapt(plain))
    assert vars(plain) == attributes
    for key, (identity, value) in state.items():
        assert id(layer.get_parameter(key)) == identity
        assert torch.equal(plain.get_parameter(key), value)


@pytest.mark.parametrize("name", PLAIN)
def test_names_of_parameters_and_state(name):
    plain = PLAIN[name]()
    layer = adapt(plain)
    factors = {"lora_A", "lora_B"} if name == "linear" else {f"lora_{side}.{key}" for side in "AB" for key in "qkvo"}
    assert set(layer.state_dict()) == set(plain.state_dict()) | factors
    assert {key for key, parameter in layer.named_parameters() if parameter.requires_grad} == factors
    assert {parameter.dtype for parameter in ck.adapter_parameters(layer)} == {torch.float32}
    assert "r=2" in repr(layer)


@pytest.mark.parametrize("name", PLAIN)
def test_a_is_kaiming_uniform_and_b_is_zero(name):
    layer = adapt(PLAIN[name](), r=12)
    for adapter in layer.weights:
        A, B = layer.factors(adapter)
        bound = A.shape[1] ** -0.5  # gain sqrt(1 / 3) times sqrt(3 / fan_in), as nn.Linear
        assert A.abs().max() <= bound
        assert A.abs().max() > 0.9 * bound
        assert not B.any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_training_mode_is_kept_and_switching_it_changes_no_weight(name, training):
    layer = randomise(adapt(PLAIN[name]().train(training), lora_dropout=0.5))
    assert {module.training for module in layer.modules()} == {training}
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(N, L, D)
    outputs = [example(layer.train(mode), x) for mode in (False, True, False)]
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to": lambda module: module.to("cpu", torch.bfloat16),
    "half, then float": lambda module: module.half().float(),
    "double": lambda module: module.double(),
    "double, then half": lambda module: module.double().half(),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("name", PLAIN)
def test_factors_and_bases_stay_float32_or_wider(name, conversion):
    layer = randomise(adapt(PLAIN[name](), sides="both"))
    gradients(layer, torch.randn(N, L, D))
    bases = {key: value.clone() for key, value in layer.named_buffers()}
    factors = [(factor.clone(), factor.grad) for factor in ck.adapter_parameters(layer)]
    CONVERSIONS[conversion](layer)
    wide = torch.float64 if conversion.startswith("double") else torch.float32
    assert len(bases) == 2 * len(layer.weights)
    assert len(factors) == 2 * len(layer.weights)
    for key, basis in layer.named_buffers():
        assert basis.dtype == wide
        assert torch.equal(basis, bases[key].to(wide))
    for factor, (value, grad) in zip(ck.adapter_parameters(layer), factors, strict=True):
        assert grad is not None
        assert factor.grad is not None
        assert factor.dtype == factor.grad.dtype == wide
        assert torch.equal(factor, value.to(wide))
        assert torch.equal(factor.grad, grad.to(wide))
    dtype = next(parameter.dtype for key, parameter in layer.named_parameters() if "lora" not in key)
    example(layer, torch.randn(N, L, D, dtype=dtype)).float().sum().backward()


def test_a_module_on_the_meta_device_keeps_the_dtypes():
    layer = adapt(linear())
    layer.compute_bases()
    layer.half().to("meta")
    assert layer.get_parameter("lora_A").dtype == layer.get_buffer("output_basis").dtype == torch.float32
    assert layer.get_parameter("weight").dtype == torch.float16


def by_deepcopy(layer: CompLoRALayer) -> CompLoRALayer:
    return copy.deepcopy(layer)


def by_pickle(layer: CompLoRALayer) -> CompLoRALayer:
    return pickle.loads(pickle.dumps(layer))


def by_torch_save(layer: CompLoRALayer) -> CompLoRALayer:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [by_deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("name", PLAIN)
def test_a_copy_computes_the_same_and_is_independent(name, copied):
    layer = randomise(adapt(PLAIN[name](), sides="both"))
    x = torch.randn(N, L, D)
    expected = example(layer, x)
    twin = copied(layer)
    assert torch.equal(example(twin, x), expected)
    torch.testing.assert_close(gradients(twin, x), gradients(layer, x), rtol=0, atol=0)
    storages = [{tensor.data_ptr() for tensor in (*m.parameters(), *m.buffers())} for m in (layer, twin)]
    assert storages[0].isdisjoint(storages[1])
    other = PLAIN[name]()
    twin.load_state_dict(other.state_dict())  # its bases follow, by a hook of its own
    torch.testing.assert_close(example(twin, x), example(with_updates(other, twin, twin.config, half_of), x))
    assert torch.equal(example(layer, x), expected)


@pytest.mark.parametrize("name", PLAIN)
def test_gradient_checkpointing_draws_the_same_dropout_again(name):
    layer = randomise(adapt(PLAIN[name](), lora_dropout=0.5)).train()
    x = torch.randn(N, L, D)
    plain = gradients(layer, x)

    again = x.clone().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(1)
    checkpoint(example, layer, again, use_reentrant=False).square().sum().backward()
    factors = [factor.grad for factor in ck.adapter_parameters(layer)]
    torch.testing.assert_close([again.grad, *factors], plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", PLAIN)
def test_autocast_computes_in_half_precision_with_float32_gradients(name):
    layer = randomise(adapt(PLAIN[name](), sides="both"))
    x = torch.randn(N, L, D)
    exact = example(copy.deepcopy(layer).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        output = example(layer, x)
    assert output.dtype == torch.bfloat16
    assert (output.double() - exact).norm() < 0.02 * exact.norm()  # some roundings of 2^-9 each
    output.float().sum().backward()
    assert {factor.grad.dtype for factor in ck.adapter_parameters(layer) if factor.grad is not None} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer.get_delta_weight(next(iter(layer.weights))) != 0).any()


@pytest.mark.parametrize("name", PLAIN)
def test_hooks_survive_and_can_still_be_removed(name):
    plain, seen = PLAIN[name](), []
    handle = plain.register_forward_hook(lambda *_: seen.append("forward"))
    plain.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer, x = adapt(plain), torch.randn(N, L, D, requires_grad=True)
    del plain
    example(layer, x).sum().backward()
    assert seen == ["forward", "backward"]
    handle.remove()
    example(layer, x)
    assert seen == ["forward", "backward"]


def test_hooks_of_the_output_projection_that_open_clip_4_calls_survive():
    plain, seen = attention_4(), []
    plain.out_proj.register_forward_hook(lambda *_: seen.append("called"))
    adapt(plain, target_modules=("q",))(torch.randn(N, L, D))
    assert seen == ["called"]


@pytest.mark.parametrize("name", PLAIN)
def test_functional_call_gives_it_other_factors(name):
    layer, x = adapt(PLAIN[name]()), torch.randn(N, L, D)
    other = randomise(copy.deepcopy(layer))
    factors = {key: value.detach().clone() for key, value in other.named_parameters() if "lora_" in key}
    arguments = (x, x, x) if name == "attention" else (x,)
    called = torch.func.functional_call(layer, factors, arguments)
    torch.testing.assert_close(called[0] if name == "attention" else called, example(other, x))


def test_an_encoder_layer_does_not_read_the_weights_past_the_adapter():
    """In evaluation `nn.TransformerEncoderLayer` hands its attention's weights to one fused operation."""
    encoder: Any = nn.TransformerEncoderLayer(D, 2, 4 * D, batch_first=True).requires_grad_(False).eval()
    encoder.self_attn = randomise(adapt(encoder.self_attn))
    x = torch.randn(N, L, D)
    with torch.no_grad():
        fused = encoder(x)
    torch.testing.assert_close(fused, encoder(x.requires_grad_()))  # with gradients torch calls the modules


def test_a_module_compiled_before_it_was_adapted():
    plain = linear()
    plain.compile(backend="eager")
    layer, x = randomise(adapt(plain)), torch.randn(L, D)
    torch.testing.assert_close(layer(x), F.linear(x, plain.weight + layer.get_delta_weight(), plain.bias))
    assert not torch.allclose(layer(x), plain(x))


# ---- state dicts of one layer


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_loading_other_base_weights_computes_the_bases_anew(name, assign):
    layer, other = randomise(adapt(PLAIN[name](), sides="both")), PLAIN[name]()
    factors = [factor.clone() for factor in ck.adapter_parameters(layer)]
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert all(torch.equal(*pair) for pair in zip(ck.adapter_parameters(layer), factors, strict=True))
    for adapter in layer.weights:
        weight = frozen_weight(other, adapter)
        expected = expected_delta(weight, *layer.factors(adapter), layer.config, half_of(weight)).float()
        torch.testing.assert_close(layer.get_delta_weight(adapter), expected)
    trainable = {key for key, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trainable == {key for key in layer.state_dict() if "lora" in key}


@pytest.mark.parametrize("name", PLAIN)
def test_state_dict_round_trip(name):
    layer = randomise(adapt(PLAIN[name](), sides="both"))
    other = adapt(PLAIN[name](), sides="both")
    other.load_state_dict(layer.state_dict())
    x = torch.randn(N, L, D)
    torch.testing.assert_close(example(other, x), example(layer, x))


@pytest.mark.parametrize("name", PLAIN)
def test_a_state_dict_with_some_factors_must_have_all(name):
    layer = adapt(PLAIN[name]())
    state = layer.state_dict()
    key = next(key for key in state if "lora_B" in key)
    with pytest.raises(RuntimeError, match=key):
        layer.load_state_dict({**state, key: torch.zeros(1, 1)})
    del state[key]
    with pytest.raises(RuntimeError, match=key):
        layer.load_state_dict(state)


def test_loading_nan_names_the_weight():
    layer = ck.CompLoRALinear.from_linear(linear(), config(), path="block.fc")
    with pytest.raises(ValueError, match=r"block\.fc .*NaN"):
        layer.load_state_dict({"weight": torch.full((20, D), float("nan")), "bias": torch.zeros(20)})


@pytest.mark.parametrize("name", PLAIN)
def test_loading_into_a_merged_layer_is_an_error(name):
    layer = randomise(adapt(PLAIN[name]()))
    layer.merge()
    with pytest.raises(RuntimeError, match="unmerge_adapter"):
        layer.load_state_dict(PLAIN[name]().state_dict())


# ---- causal masks


class Equals(TorchDispatchMode):
    """Counts comparisons of whole tensors, which wait for a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.equal.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fused(monkeypatch) -> list[tuple[Tensor | None, bool]]:
    """The mask and the flag of every call of torch's fused attention."""
    calls = []
    original = F.scaled_dot_product_attention

    def observed(*args: Any, attn_mask: Tensor | None = None, is_causal: bool = False, **options: Any) -> Tensor:
        calls.append((attn_mask, is_causal))
        return original(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", observed)
    return calls


def causal_mask(length: int = L) -> Tensor:
    return torch.full((length, length), float("-inf")).triu(1)


def masked(layer: nn.Module, mask: Tensor, length: int = L, **options: Any) -> Tensor:
    x = torch.linspace(-1, 1, length * D).sin().view(1, length, D)
    if isinstance(layer, nn.MultiheadAttention):
        return layer(x, x, x, attn_mask=mask, **{"need_weights": False, **options})[0]
    return layer(x, attn_mask=mask)


@pytest.fixture(params=["attention", "attention 4"])
def layer(request) -> CompLoRALayer:
    return randomise(adapt(PLAIN[request.param]()))


def test_a_causal_mask_becomes_a_flag_and_is_read_once(layer, fused):
    mask = causal_mask()
    with Equals() as equals:
        for _ in range(3):
            masked(layer, mask)
    assert fused == [(None, True)] * 3
    assert equals.count == 1


def test_the_leading_corner_of_a_causal_mask_is_causal(layer, fused):
    mask = causal_mask(L + 3)
    with Equals() as equals:
        for length in (L, L + 3, 2, 1):
            masked(layer, mask[:length, :length], length)
    assert fused == [(None, True)] * 4
    assert equals.count == 1


@pytest.mark.parametrize("place", [(0, 1), (0, L - 1), (L - 1, 0), (2, 2)])
def test_one_changed_element_is_honoured(layer, fused, place):
    mask = causal_mask()
    before = masked(layer, mask)
    mask[place] = 0.0 if mask[place] < 0 else -1.0
    after = masked(layer, mask)
    (_, first), (given, second) = fused
    assert (first, second) == (True, False)
    assert torch.equal(given, mask)
    assert not torch.allclose(before, after)


def test_a_change_outside_the_corner_or_in_another_tensor_is_honoured_where_it_counts(layer, fused):
    mask = causal_mask(L + 1)
    expected = masked(layer, mask[:L, :L])
    mask[0, L] = 0.0
    torch.testing.assert_close(masked(layer, mask[:L, :L]), expected)
    other = causal_mask()
    other[0, 1] = 0.0
    assert not torch.allclose(masked(layer, other), expected)


def test_a_change_under_inference_mode_is_honoured(layer, fused):
    with torch.inference_mode():
        mask = causal_mask()
        before = masked(layer, mask)
        mask[0, 1] = 0.0
        assert not torch.allclose(masked(layer, mask), before)


@pytest.mark.parametrize(
    "copied",
    [torch.clone, lambda mask: mask.to(torch.bfloat16).float(), copy.deepcopy],
    ids=["clone", "to", "deepcopy"],
)
def test_a_mask_that_was_moved_or_copied_is_recognised_again(layer, fused, copied):
    masked(layer, causal_mask())
    masked(layer, copied(causal_mask()))
    assert fused == [(None, True)] * 2


NOT_CAUSAL = {
    "no mask at all": torch.zeros(L, L),
    "strictly causal": torch.full((L, L), float("-inf")).triu(0).fill_diagonal_(0).tril_(-1) - 1,
    "anti-causal": causal_mask().T,
    "large instead of infinite": causal_mask().clamp(min=-1e4),
    "not a number": torch.full((L, L), float("nan")).triu(1),
    "a corner that is not the leading one": causal_mask(L + 2)[:L, 2:],
    "every second": causal_mask(2 * L)[::2, ::2] * 1.0 + torch.eye(L),
}


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_other_masks_are_passed_on(layer, fused, name):
    mask = NOT_CAUSAL[name]
    masked(layer, mask)
    ((given, is_causal),) = fused
    assert not is_causal
    assert torch.equal(given.nan_to_num(7), mask.nan_to_num(7))


def test_the_causal_mask_is_not_assumed_where_queries_and_keys_differ_in_number(fused):
    x, keys = torch.randn(1, 3, D), torch.randn(1, L, D)
    mask = causal_mask()[:3]
    adapt(attention())(x, keys, keys, attn_mask=mask, need_weights=False)
    assert [is_causal for _, is_causal in fused] == [False]


def test_a_learned_mask_gets_its_gradient(layer):
    mask = causal_mask().requires_grad_()
    masked(layer, mask).square().sum().backward()
    assert mask.grad is not None
    assert mask.grad.tril().any()


@pytest.mark.parametrize("name", PLAIN)
def test_compiled_in_one_graph_it_computes_the_same(name):
    """With a mask where there may be one: it cannot be read in a graph, and is passed on."""
    layer, x = randomise(adapt(PLAIN[name](), sides="both")), torch.randn(1, L, D)
    options = {} if name == "linear" else {"attn_mask": causal_mask()}
    if name == "attention":
        options |= {"key": x, "value": x, "need_weights": False}
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for module in (compiled, layer):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        inputs = {key: leaf if value is x else value for key, value in options.items()}
        output = module(leaf, **inputs)
        output = output[0] if isinstance(output, tuple) else output
        output.square().sum().backward()
        results.append((output, [leaf.grad, *(factor.grad for factor in ck.adapter_parameters(layer))]))
    torch.testing.assert_close(*results)


# ---- what is refused


def test_bad_masks():
    layer, x = adapt(attention()), torch.randn(N, L, D)
    for mask, message in (
        (torch.zeros(L, L + 1), r"attn_mask has shape \(5, 6\)"),
        (torch.zeros(N, L, L), r"attn_mask has shape \(2, 5, 5\)"),
        (torch.zeros(L, L, dtype=torch.long), "torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, x, x, attn_mask=mask)
    with pytest.raises(ValueError, match=r"key_padding_mask has shape \(5, 2\)"):
        layer(x, x, x, key_padding_mask=torch.zeros(L, N, dtype=torch.bool))
    with pytest.raises(ValueError, match="attn_mask=None with is_causal=True"):
        layer(x, x, x, is_causal=True)


class TwiceLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OtherAttention(nn.MultiheadAttention):
    pass


def int8() -> nn.Linear:
    module = linear()
    module.weight = nn.Parameter(torch.ones(20, D, dtype=torch.int8), requires_grad=False)
    return module


def pruned() -> nn.Linear:
    return prune.identity(linear(), "weight")


def patched() -> nn.Linear:
    module = linear()
    module.forward = nn.Identity().forward
    return module


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = {
    "subclass": (lambda: TwiceLinear(D, D), {}, TypeError, "TwiceLinear"),
    "subclass of attention": (lambda: OtherAttention(D, HEADS), {}, TypeError, "OtherAttention"),
    "not attention": (lambda: nn.LayerNorm(D), {}, TypeError, "LayerNorm"),
    "quantised": (int8, {}, ValueError, "torch.int8"),
    "float8": (lambda: linear().to(torch.float8_e4m3fn), {}, ValueError, "float8_e4m3fn"),
    "pruned": (pruned, {}, ValueError, "pruned"),
    "patched": (patched, {}, ValueError, "a forward method of its own"),
    "meta": (lambda: linear().to("meta"), {}, ValueError, "meta"),
    "k above": (linear, {"subspace_k": D + 1}, ValueError, rf"k={D + 1}, expected at most min\(out, in\)={D}"),
    "kdim": (lambda: attention(kdim=8, vdim=10), {}, ValueError, "kdim=8, vdim=10"),
    "kdim 4": (lambda: attention_4(kdim=8), {}, ValueError, "kdim"),
    "bias_k": (lambda: attention(add_bias_kv=True), {}, ValueError, "bias_k"),
    "add_zero_attn": (lambda: attention(add_zero_attn=True), {}, ValueError, "add_zero_attn"),
    "cosine": (lambda: attention_4(scaled_cosine=True), {}, ValueError, "cosine"),
    "nothing chosen": (attention, {"target_modules": ("fc1",)}, ValueError, r"target_modules=\('fc1',\)"),
    "regex": (attention, {"target_modules": ".*"}, ValueError, r"target_modules='\.\*'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused(case):
    make, options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        adapt(make(), **options)


@pytest.mark.parametrize("name", PLAIN)
def test_nan_in_a_weight_is_refused(name):
    plain = PLAIN[name]()
    with torch.no_grad():
        frozen_weight(plain, "" if name == "linear" else "v")[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        adapt(plain, sides="none")


def test_a_base_that_asks_for_gradients_is_an_error_in_forward():
    with pytest.raises(ValueError, match=r"weight\.requires_grad=True"):
        adapt(nn.Linear(D, D))(torch.randn(L, D))
