"""Whole models: what is adapted, what is left alone, what a checkpoint of either kind does, and what is refused."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import open_clip.model
import pytest
import stand_in
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import CustomResidualAttentionBlock
from small_clip import compute_every_position
from tiny_models import (
    EMBED_DIM,
    LAYOUTS,
    TEXT,
    VISION,
    batch,
    clip,
    clip_4,
    config,
    expected_delta,
    features,
    frozen_weight,
    half_of,
    randomise,
    with_updates,
)
from torch import Tensor, nn
from torch.nn import functional as F

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers, build_layers
from complora_kernels.adapters.install import install
from complora_kernels.common.changes import Changes
from complora_kernels.integrations.open_clip import CompLoRAAttention

TARGETS = [("q", "k", "v"), ("o",), ("fc1", "fc2"), ("q", "fc2"), ("q", "k", "v", "o", "fc1", "fc2")]
ALL = TARGETS[-1]

every_layout = pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)


class Snapshot:
    """All there is to a model: classes, identities, values, flags and attributes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = {name: (id(module), type(module)) for name, module in model.named_modules()}
        self.tensors = {
            name: (id(tensor), tensor.requires_grad, tensor._version, tensor.clone())
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        self.attributes = {name: self._attributes(module) for name, module in model.named_modules()}

    @staticmethod
    def _attributes(module: nn.Module) -> dict[str, Any]:
        copied = (dict, set, list)
        return {name: value.copy() if isinstance(value, copied) else value for name, value in vars(module).items()}

    def assert_unchanged(self) -> None:
        now = Snapshot(self.model)
        assert now.modules == self.modules
        assert now.attributes == self.attributes
        assert now.tensors.keys() == self.tensors.keys()
        for name, (*facts, value) in now.tensors.items():
            assert tuple(facts) == self.tensors[name][:3], name
            assert torch.equal(value.nan_to_num(7), self.tensors[name][3].nan_to_num(7)), name


# ---- what is adapted


@every_layout
@pytest.mark.parametrize("targets", TARGETS, ids="".join)
def test_outputs_are_unchanged_before_training_and_only_factors_are_trainable(make, targets):
    model = make()
    inputs = batch()
    before, names = features(model, *inputs), {name: id(value) for name, value in model.named_parameters()}
    assert ck.apply_complora(model, config(target_modules=targets)) is model
    torch.testing.assert_close(features(model, *inputs), before)
    blocks = 2 * 2  # two towers of two
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * blocks * len(targets)
    assert all("lora_" in name for name in trainable)
    assert {name: id(value) for name, value in model.named_parameters() if "lora_" not in name} == names


@every_layout
@pytest.mark.parametrize("sides", ["output", "input", "both", "none"])
@pytest.mark.parametrize("targets", TARGETS[-2:], ids="".join)
def test_the_model_is_a_plain_one_with_the_updates_added(make, sides, targets):
    plain = make().double()
    model = randomise(ck.apply_complora(copy.deepcopy(plain), config(target_modules=targets, sides=sides)))
    updated = with_updates(plain, model, config(target_modules=targets, sides=sides), half_of)
    inputs = batch(torch.float64)
    torch.testing.assert_close(features(model, *inputs), features(updated, *inputs))
    # Apart by more than 1%, so that the agreement above, to 1e-7, is not that of updates too small to see.
    assert not torch.allclose(features(model, *inputs), features(plain, *inputs), rtol=1e-2)


@every_layout
def test_classes_paths_and_text_tower(make):
    model = ck.apply_complora(make(), config(target_modules=("q", "fc1")))
    layers = adapted_layers(model)
    text = "text.transformer" if hasattr(model, "text") else "transformer"
    blocks = [f"{tower}.resblocks.{i}" for tower in ("visual.transformer", text) for i in (0, 1)]
    assert set(layers) == {f"{block}.{name}" for block in blocks for name in ("attn", "mlp.c_fc")}
    attention = CompLoRAAttention if isinstance(model, stand_in.CLIP) else ck.CompLoRAMultiheadAttention
    for path, layer in layers.items():
        assert type(layer) is (attention if path.endswith("attn") else ck.CompLoRALinear)


@pytest.mark.parametrize("make", [clip, clip_4])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"towers": ("image",)}, {("visual", 0), ("visual", 1)}),
        ({"towers": "text"}, {("text", 0), ("text", 1)}),
        ({"layers": (1,)}, {("visual", 1), ("text", 1)}),
        ({"layers": (1, 0), "towers": ("text",)}, {("text", 0), ("text", 1)}),
    ],
)
def test_towers_and_layers(make, options, expected):
    layers = adapted_layers(ck.apply_complora(make(), config(**options)))
    found = {("visual" if path.startswith("visual") else "text", int(path.split(".")[-2])) for path in layers}
    assert found == expected


def test_every_k_of_a_weight_has_the_size_that_was_asked_for():
    for size, k in (
        ({"subspace_k": 3}, lambda _: 3),
        ({"subspace_ratio": 0.25}, lambda weight: min(weight.shape) // 4),
        ({"subspace_energy": 0.6}, lambda weight: energy_k(weight, 0.6)),
    ):
        plain = clip().double()
        options = config(target_modules=ALL, sides="both", **size)
        model = randomise(ck.apply_complora(copy.deepcopy(plain), options))
        inputs = batch(torch.float64)
        expected = features(with_updates(plain, model, options, k), *inputs)
        torch.testing.assert_close(features(model, *inputs), expected)


def energy_k(weight: Tensor, share: float) -> int:
    energy = torch.linalg.svdvals(weight).square()
    return int((energy.cumsum(0) / energy.sum() < share).sum()) + 1


def test_random_directions_differ_from_weight_to_weight_and_are_found_again():
    options = config(subspace_source="random", subspace_k=4)
    plain = clip()
    weight = plain.get_parameter("transformer.resblocks.0.attn.in_proj_weight")
    with torch.no_grad():
        weight.copy_(weight[: TEXT["width"]].repeat(3, 1))  # q, k and v are equal
    first, second = (ck.apply_complora(copy.deepcopy(plain), options) for _ in range(2))
    bases, again = (dict(model.named_buffers()) for model in (first, second))
    assert all(torch.equal(basis, again[name]) for name, basis in bases.items())
    q, k, v = (bases[f"transformer.resblocks.0.attn.output_basis_{name}"] for name in "qkv")
    assert not any(torch.allclose(*pair) for pair in itertools.combinations((q, k, v), 2))


class Net(nn.Module):
    """Not a CLIP: linear layers by various names, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.shared = nn.Linear(6, 6)
        self.again = self.shared
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder:
            x = layer(x).sin()
        return self.head(self.again(self.shared(x).cos()))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"encoder\.\d", {"encoder.0", "encoder.1", "encoder.2"}),
        (r"encoder\.[02]|head", {"encoder.0", "encoder.2", "head"}),
        (r"shared", {"shared"}),  # a module with two names is known by its first one
        (r".*", {"encoder.0", "encoder.1", "encoder.2", "shared", "head"}),
    ],
)
def test_a_regular_expression_selects_linear_layers_of_any_model(pattern, expected):
    plain, x = Net().double(), torch.randn(5, 6, dtype=torch.float64)
    model = randomise(ck.apply_complora(copy.deepcopy(plain), config(target_modules=pattern)))
    assert set(adapted_layers(model)) == expected
    updated = with_updates(plain, model, config(target_modules=pattern), half_of)
    torch.testing.assert_close(model(x), updated(x))
    assert not torch.allclose(model(x), plain(x))


def test_shared_modules_stay_shared():
    model = ck.apply_complora(Net(), config(target_modules="shared"))
    assert model.shared is model.again
    assert isinstance(model.shared, ck.CompLoRALinear)
    tied = clip()
    blocks: Any = tied.get_submodule("visual.transformer.resblocks")
    blocks[1] = blocks[0]
    ck.apply_complora(tied, config())
    assert blocks[1].attn is blocks[0].attn
    assert isinstance(blocks[0].attn, ck.CompLoRAMultiheadAttention)


def test_a_regular_expression_adapts_the_linear_layers_of_a_clip_too():
    plain = clip_4().double()
    pattern = r"visual\..*\.(out_proj|c_proj)"  # out_proj is called in this layout
    model = randomise(ck.apply_complora(copy.deepcopy(plain), config(target_modules=pattern)))
    assert len(adapted_layers(model)) == 4
    inputs = batch(torch.float64)
    updated = with_updates(plain, model, config(target_modules=pattern), half_of)
    torch.testing.assert_close(features(model, *inputs), features(updated, *inputs))


def test_hooks_on_adapted_modules_survive():
    model, seen = clip(), []
    for path in ("visual.transformer.resblocks.0.attn", "transformer.resblocks.1.mlp.c_fc"):
        model.get_submodule(path).register_forward_hook(lambda module, *_: seen.append(type(module)))
    ck.apply_complora(model, config(target_modules=ALL))
    features(model, *batch())
    assert seen == [ck.CompLoRAMultiheadAttention, ck.CompLoRALinear]


@every_layout
def test_causal_masks_are_recognised_when_the_model_is_adapted(make, monkeypatch):
    model, (_, texts) = ck.apply_complora(make(), config()), batch()
    flags, reads = [], []
    original, equal = F.scaled_dot_product_attention, torch.equal

    def observed(*args: Any, attn_mask: Tensor | None = None, is_causal: bool = False, **options: Any) -> Tensor:
        flags.append((attn_mask is None, is_causal))
        return original(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", observed)
    monkeypatch.setattr(torch, "equal", lambda *pair: reads.append(pair) or equal(*pair))
    encode: Any = model
    before = encode.encode_text(texts)
    assert flags == [(True, True), (False, False)]  # the last block takes a row of the mask for each text
    assert not reads

    mask = next(buffer for name, buffer in model.named_buffers() if name.endswith("attn_mask"))
    mask[0, 2] = 0.0
    assert not torch.allclose(encode.encode_text(texts), before)
    assert flags[2:] == [(False, False)] * 2


def test_integer_masks_of_other_models_are_left_alone():
    model = Net()
    model.register_buffer("pair_mask", torch.ones(4, 4, dtype=torch.long))
    ck.apply_complora(model, config(target_modules="head"))


def test_a_frozen_model_stays_frozen_and_nothing_else_trains():
    model = ck.apply_complora(clip().train(), config())
    assert model.training
    images, texts = batch()
    features(model, images, texts).square().sum().backward()
    assert {name for name, value in model.named_parameters() if value.grad is not None} == {
        name for name, value in model.named_parameters() if "lora_" in name
    }


@every_layout
def test_gradient_checkpointing_gives_the_same_gradients(make, monkeypatch):
    model: Any = randomise(ck.apply_complora(make(), config(target_modules=ALL, lora_dropout=0.3)))
    model.train()
    inputs, gradients = batch(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(5)
        with monkeypatch.context() as patch:
            if not enable:
                compute_every_position(patch)  # checkpointing does so: the dropout masks are then the same
            features(model, *inputs).square().sum().backward()
        gradients.append([factor.grad for factor in ck.adapter_parameters(model)])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("make", [clip, clip_4])
def test_a_compiled_block_computes_the_same(make):
    model = randomise(ck.apply_complora(make(), config(target_modules=ALL)))
    block: Any = model.get_submodule("visual.transformer.resblocks.0")
    x = torch.randn(2, 5, VISION["width"])
    compiled: Any = torch.compile(block, backend="aot_eager")
    results = []
    for module in (compiled, block):
        model.zero_grad()
        output = module(x)
        output.square().sum().backward()
        results.append((output, [factor.grad for factor in ck.adapter_parameters(block)]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_layout
def test_half_precision_models(make, dtype):
    model = randomise(ck.apply_complora(make(), config(target_modules=ALL)))
    inputs = batch()
    exact = features(copy.deepcopy(model).double(), inputs[0].double(), inputs[1])
    half = features(model.to(dtype), inputs[0].to(dtype), inputs[1])
    assert half.dtype == dtype
    # Some twenty roundings, of weights and activations, one after another.
    assert (half.double() - exact).norm() < 20 * torch.finfo(dtype).eps * exact.norm()


@every_layout
def test_layers_are_built_apart_from_the_model_and_installed_in_one_step_that_is_undone_when_it_fails(make):
    model = make()
    before = Snapshot(model)
    replacements = build_layers(model, config(target_modules=ALL))
    refused, changes = Changes(), Changes()
    for each in (refused, changes):
        install(model, replacements, each)
    refused.set_attribute(model.get_parameter("logit_scale"), "data", "no tensor")
    with pytest.raises(TypeError):
        refused.make()
    before.assert_unchanged()
    changes.make()
    assert adapted_layers(model) == {path: layer for path, _, layer in replacements}
    features(model, *batch()).sum().backward()
    ck.check_gradients(model)


# ---- checkpoints


@every_layout
def test_state_dicts_of_plain_and_adapted_models_fit_each_other(make):
    plain, other = make().double(), make().double()
    names = set(plain.state_dict())
    model = randomise(ck.apply_complora(copy.deepcopy(plain), config(target_modules=ALL, sides="both")))
    state = copy.deepcopy(model.state_dict())
    assert {name for name in state if "lora_" not in name} == names
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())

    factors = [factor.clone() for factor in ck.adapter_parameters(model)]
    model.load_state_dict(other.state_dict(), strict=True)  # plain into adapted
    assert all(torch.equal(*pair) for pair in zip(ck.adapter_parameters(model), factors, strict=True))
    for path, layer in adapted_layers(model).items():
        for name in layer.weights:
            weight = frozen_weight(other.get_submodule(path), name)
            expected = expected_delta(weight, *layer.factors(name), layer.config, half_of(weight))
            torch.testing.assert_close(layer.get_delta_weight(name), expected)

    adapted = {name: value for name, value in state.items() if "lora_" not in name}
    other.load_state_dict(adapted, strict=True)  # adapted into plain
    inputs = batch(torch.float64)
    assert torch.equal(features(other, *inputs), features(plain, *inputs))

    twin = ck.apply_complora(make().double(), config(target_modules=ALL, sides="both"))
    twin.load_state_dict(state, strict=True)  # adapted into adapted
    model.load_state_dict(state, strict=True)
    torch.testing.assert_close(features(twin, *inputs), features(model, *inputs))


def test_bases_are_computed_anew_only_for_weights_that_changed(monkeypatch):
    plain = clip()
    model = ck.apply_complora(copy.deepcopy(plain), config())
    state = plain.state_dict()
    path = "visual.transformer.resblocks.1.attn"
    width = VISION["width"]
    with torch.no_grad():
        state[f"{path}.in_proj_weight"][width : 2 * width].mul_(torch.linspace(1, 3, width))
    bases = {name: buffer for name, buffer in model.named_buffers() if "basis" in name}
    model.load_state_dict(state)
    now = dict(model.named_buffers())
    changed = {name for name, basis in bases.items() if now[name] is not basis}
    assert changed == {f"{path}.output_basis_k"}


def test_a_merged_model_loads_nothing():
    plain, model = clip(), ck.apply_complora(clip(), config())
    ck.merge_adapter(model)
    with pytest.raises(RuntimeError, match=r"visual\.transformer\.resblocks\.0\.attn is merged.*unmerge_adapter"):
        model.load_state_dict(plain.state_dict())
    ck.unmerge_adapter(model)
    model.load_state_dict(plain.state_dict())


# ---- what is refused, with the model left as it was


def resnet() -> nn.Module:
    model = clip()
    model.visual = ModifiedResNet([1, 1, 1, 1], EMBED_DIM, heads=2, image_size=32, width=8)
    return model


def with_custom_blocks() -> nn.Module:
    model = clip()
    model.get_submodule("visual.transformer.resblocks")[1] = CustomResidualAttentionBlock(32, 2)  # type: ignore[index]
    return model


def with_other(path: str, module: nn.Module, make: Callable[[], nn.Module] = clip) -> Callable[[], nn.Module]:
    """A model whose last block has another module in one place."""

    def changed() -> nn.Module:
        model = make()
        parent, _, name = f"transformer.resblocks.1.{path}".rpartition(".")
        setattr(model.get_submodule(parent), name, module)
        return model

    return changed


class Scaled(nn.Linear):
    pass


class Packed(nn.Module):
    """Holds a weight as its package packs it, and is no nn.Linear."""


def with_nan() -> nn.Module:
    model = clip()
    with torch.no_grad():
        model.get_parameter("transformer.resblocks.1.mlp.c_proj.weight")[3, 4] = float("nan")
    return model


def with_int8() -> nn.Module:
    model = clip()
    linear: Any = model.get_submodule("transformer.resblocks.1.mlp.c_proj")
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    return model


def adapted() -> nn.Module:
    return ck.apply_complora(clip(), config())


LAST = r"transformer\.resblocks\.1"
WIDTH = TEXT["width"]
REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "RN50": (resnet, {}, r"ModifiedResNet.*visual\.attnpool \(AttentionPool2d\)"),
    "RN50, regex": (resnet, {"target_modules": r"visual\.attnpool\.q_proj"}, r"visual\.attnpool\.q_proj"),
    "custom block": (with_custom_blocks, {}, r"visual\.transformer\.resblocks\.1\.attn is a .*Attention"),
    "kdim": (
        with_other("attn", nn.MultiheadAttention(WIDTH, 2, kdim=8, vdim=8)),
        {},
        rf"{LAST}\.attn has kdim=8, vdim=8, expected embed_dim={WIDTH}",
    ),
    "kdim, open_clip 4": (
        with_other("attn", stand_in.Attention(WIDTH, 2, kdim=8), clip_4),
        {},
        rf"{LAST}\.attn projects inputs of other sizes",
    ),
    "bias_k": (with_other("attn", nn.MultiheadAttention(WIDTH, 2, add_bias_kv=True)), {}, rf"{LAST}\.attn uses bias_k"),
    "cosine": (
        with_other("attn", stand_in.Attention(WIDTH, 2, scaled_cosine=True), clip_4),
        {},
        rf"{LAST}\.attn uses scaled cosine attention",
    ),
    "int8": (with_int8, {}, rf"{LAST}\.mlp\.c_proj holds torch\.int8 weights"),
    "subclass": (
        with_other("mlp.c_proj", Scaled(4 * WIDTH, WIDTH)),
        {},
        rf"{LAST}\.mlp\.c_proj is a \S+Scaled",
    ),
    "no linear": (with_other("mlp.c_proj", Packed()), {}, rf"{LAST}\.mlp\.c_proj is a \S+Packed"),
    "NaN": (with_nan, {}, rf"{LAST}\.mlp\.c_proj .*NaN"),
    "unknown layer": (clip, {"layers": (0, 7)}, r"layers=\(0, 7\).*0 to 1.*\[7\]"),
    "k too large for the last": (
        with_other("mlp.c_proj", nn.Linear(4 * WIDTH, 5)),
        {"subspace_k": 8},
        rf"k=8, expected at most min\(out, in\)=5 for {LAST}\.mlp\.c_proj",
    ),
    "twice": (adapted, {}, "adapter already"),
    "no match": (
        clip,
        {"target_modules": r"visual\.nothing"},
        r"visual\\\\.nothing.*visual\.transformer\.resblocks\.0",
    ),
    "part of a name": (clip, {"target_modules": "c_fc"}, "matched no nn.Linear by its whole name"),
    "out_proj": (clip, {"target_modules": r".*\.out_proj"}, r"attn\.out_proj.*MultiheadAttention.*\(\"o\",\)"),
    "no image tower": (
        Net,
        {},
        "no image tower that is known, it is a Net without residual blocks .* of open_clip, timm, .*",
    ),
    "no text tower": (Net, {"towers": "text"}, "the model has no text tower"),
    "no linear layers": (lambda: nn.Sequential(nn.ReLU()), {"target_modules": ".*"}, "none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused_by_name_and_the_model_is_left_as_it_was(case):
    make, options, message = REFUSED[case]
    model = make()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=message):
        ck.apply_complora(model, config(**{"target_modules": ALL, **options}), progress=False)
    before.assert_unchanged()


def seen(model: Any, towers: str = "image text") -> None:
    images, texts = batch()
    for tower in towers.split():
        model.encode_image(images) if tower == "image" else model.encode_text(texts)


def failing_after(error: BaseException) -> Callable[[Any], None]:
    def calibrate(model: Any) -> None:
        seen(model)
        raise error

    return calibrate


def with_nan_image(model: Any) -> None:
    images, texts = batch()
    images[1, 0, 3, 4] = float("nan")
    model.encode_text(texts)
    model.encode_image(images)


ACTIVATIONS: dict[str, Any] = {"subspace_source": "activations", "sides": "both"}
FIRST = r"visual\.transformer\.resblocks\.0"
UNCALIBRATED: dict[str, tuple[Any, dict[str, Any], type[BaseException], str]] = {
    "missing": (
        None,
        {},
        ValueError,
        "calibrate=None with subspace_source='activations' and sides='both', expected a function of the model",
    ),
    "of no use": (
        seen,
        {"subspace_source": "weight"},
        ValueError,
        "calibrate=.*subspace_source='weight'.*None otherwise",
    ),
    "random": (seen, {"subspace_source": "random"}, ValueError, "calibrate=.*subspace_source='random'"),
    "plain LoRA": (seen, {"sides": "none"}, ValueError, "calibrate=.*subspace_source='activations' and sides='none'"),
    "one tower": (
        lambda model: seen(model, "image"),
        {},
        ValueError,
        r"no activations to transformer\.resblocks\.0\.attn\.q, .*\.k, .*\.v, .*\.o and 8 more, expected it to run",
    ),
    "nothing": (lambda _: None, {"towers": "image"}, ValueError, rf"gave no activations to {FIRST}\.attn\.q, "),
    "empty batch": (
        lambda model: model.visual.transformer(torch.empty(0, 5, VISION["width"])),
        {"towers": "image"},
        ValueError,
        rf"gave no activations to {FIRST}\.attn\.q, ",
    ),
    "NaN": (
        with_nan_image,
        {},
        ValueError,
        rf"gave NaN or infinite activations to {FIRST}\.attn\.q, .* and 8 more, expected finite ones",
    ),
    "error": (failing_after(ZeroDivisionError("mine")), {}, ZeroDivisionError, "mine"),
    "interrupt": (failing_after(KeyboardInterrupt("stop")), {}, KeyboardInterrupt, "stop"),
}


@pytest.mark.parametrize("case", UNCALIBRATED)
@pytest.mark.parametrize("make", [clip, clip_4])
def test_a_calibration_that_fails_leaves_the_model_as_it_was(case, make):
    calibrate, options, error, message = UNCALIBRATED[case]
    model = make().train()
    model.get_submodule("visual.transformer").eval()
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        ck.apply_complora(model, config(**{"target_modules": ALL, **ACTIVATIONS, **options}), calibrate=calibrate)
    before.assert_unchanged()


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused_before_anything_is_run(case):
    make, options, message = REFUSED[case]
    model, calls = make(), []
    before = Snapshot(model)
    with pytest.raises(ValueError, match=message):
        ck.apply_complora(model, config(**{"target_modules": ALL, **ACTIVATIONS, **options}), calibrate=calls.append)
    before.assert_unchanged()
    assert not calls


def test_the_other_tower_of_a_resnet_clip_can_be_adapted():
    model = ck.apply_complora(resnet().eval(), config(towers="text"))
    assert set(adapted_layers(model)) == {"transformer.resblocks.0.attn", "transformer.resblocks.1.attn"}


def test_custom_blocks_can_be_adapted_outside_their_attention():
    plain = open_clip.model.CLIP(
        EMBED_DIM,
        {**VISION, "head_width": 16, "scale_fc": True},  # type: ignore[arg-type]
        {**TEXT, "scale_attn": True},  # type: ignore[arg-type]
    )
    plain = plain.eval().double()
    options = config(target_modules=("fc1", "fc2"))
    model = randomise(ck.apply_complora(copy.deepcopy(plain), options))
    inputs = batch(torch.float64)
    expected = features(with_updates(plain, model, options, half_of), *inputs)
    torch.testing.assert_close(features(model, *inputs), expected)


def test_quick_work_shows_no_progress_bar(capsys):
    ck.apply_complora(clip(), config())
    ck.apply_complora(clip(), config(), progress=False)
    assert capsys.readouterr().err == ""
