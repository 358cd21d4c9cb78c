"""Fused residual blocks against open_clip's own blocks, with the reference's products, in float64."""

from __future__ import annotations

import copy
import itertools
import logging
import re
import warnings
from collections.abc import Callable
from typing import Any

import open_clip.transformer
import pytest
import stand_in
import torch
from blocks import ALL, HEADS, Blocks, D, L, N, fusing, plain_block, random_input, results, stacked
from numerics import assert_as_accurate_as_reference
from open_clip.transformer import LayerNorm, LayerNormFp32, QuickGELU
from small_clip import adapted, compute_every_position, config, small_clip, small_clip_4
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import complora_kernels as ck
from complora_kernels import set_recompute
from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.backends.torch import TorchBackend, activate
from complora_kernels.blocks import Norm, norm_lora_linear, norm_lora_mlp
from complora_kernels.modules.block import CompLoRABlock

LAYOUTS = ("batch first", "sequence first", "open_clip 4")


def assert_accurate(model: Any, x: Tensor, mask: Tensor | None, **options: Any) -> None:
    ours = results(model, x, mask, fused=True, **options)
    same_dtype = results(model, x, mask, fused=False, backend="reference", **options)
    exact_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    exact = results(in_float64(model), x.double(), exact_mask, fused=False, backend="reference")
    dtype = options.get("autocast") or x.dtype
    if (
        dtype.itemsize == 2
    ):  # softmax makes the error of one small gradient a matter of luck: all factors are one vector
        ours, same_dtype, exact = map(stacked, (ours, same_dtype, exact))
    for name, value in ours.items():
        assert_as_accurate_as_reference(value, same_dtype[name], exact[name], name, dtype)


def in_float64(model: Any) -> Any:
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if type(module) is LayerNormFp32:  # it computes in float32 only
            module.__class__ = LayerNorm  # pyright: ignore[reportAttributeAccessIssue]
    return model


def causal_mask(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((L, L), float("-inf"), dtype=dtype).triu(1)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("targets", [ALL, ("q", "v"), ("o",), ("fc1",), ("fc2", "k")], ids="-".join)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("activation", [nn.GELU, QuickGELU])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_is_as_accurate_as_its_own_forward_pass(layout, activation, causal, targets, dropout):
    model = adapted(
        Blocks(plain_block(layout, activation)), target_modules=targets, towers=("image",), lora_dropout=dropout
    )
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = model.to(dtype).train()
        mask = causal_mask(dtype) if causal else None
        for recompute in ("none", "mlp"):
            set_recompute(model, recompute)
            assert_accurate(model, random_input(layout, dtype), mask)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [nn.GELU, QuickGELU])
def test_a_block_under_autocast(activation, precision):
    model = adapted(Blocks(plain_block(activation=activation)), target_modules=ALL, towers=("image",)).train()
    for recompute in ("none", "mlp"):
        set_recompute(model, recompute)
        assert_accurate(model, random_input(), None, autocast=precision)


def test_the_stream_stays_wide_under_autocast():
    model = adapted(Blocks(plain_block()), target_modules=ALL, towers=("image",))
    with torch.autocast("cpu", torch.bfloat16), pytest.MonkeyPatch.context() as patch:
        fusing(patch, True)
        assert model(random_input()).dtype == torch.float32


@pytest.mark.parametrize("norm", [nn.LayerNorm, LayerNorm, LayerNormFp32])
def test_norms_that_are_known(norm):
    model = adapted(Blocks(plain_block(norm=norm)), target_modules=ALL, towers=("image",))
    assert_accurate(model, random_input(), None)
    if norm is not nn.LayerNorm:  # whose float32 weights do not take half-precision input
        for name in ("ln_1", "ln_2"):
            getattr(model.to(torch.bfloat16).visual[0], name).float()
        ours = results(model, random_input(dtype=torch.bfloat16), None, fused=True)
        exact = results(in_float64(model), random_input().bfloat16().double(), None, fused=False)
        assert all((ours[name].double() - exact[name]).norm() < 0.05 * exact[name].norm() for name in ("y", "dx"))


def test_masks_that_are_not_causal():
    """Blocks cast what they are given to the dtype of x and add it, also truth values."""
    generator = torch.Generator().manual_seed(7)
    for layout in LAYOUTS:
        model = adapted(Blocks(plain_block(layout)), target_modules=ALL, towers=("image",))
        added, per_head = (torch.randn(shape, L, L, generator=generator) for shape in (1, N * HEADS))
        for mask in (added[0], per_head, added[0] > 0, torch.ones(L, L, dtype=torch.bool).triu(1)):
            assert_accurate(model, random_input(layout), mask)


def test_a_block_without_biases():
    block = plain_block()
    block.ln_1 = nn.LayerNorm(D, bias=False)
    block.mlp.c_fc, block.mlp.c_proj = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)
    assert_accurate(adapted(Blocks(block), target_modules=ALL, towers=("image",)), random_input(), None)


def test_frozen_blocks_before_and_after_adapted_ones():
    blocks = [plain_block() for _ in range(3)]
    model = adapted(Blocks(*blocks), target_modules=ALL, towers=("image",), layers=(1,))
    assert_accurate(model, random_input(), None)
    assert_accurate(model, random_input(), None, input_grad=False)


@pytest.mark.usefixtures("torch_backend")
@pytest.mark.parametrize("change", ["disabled", "merged"])
def test_adapters_that_are_switched_off(change):
    model = adapted(Blocks(plain_block()), target_modules=ALL, towers=("image",))
    with torch.no_grad():
        expected = copy.deepcopy(model).double()
        if change == "merged":
            ck.merge_adapter(model)
            with pytest.MonkeyPatch.context() as patch:
                fusing(patch, False)
                truth = expected(random_input().double())
            ours = model(random_input())
        else:
            for layer in expected.modules():
                layer.disabled = True
            with pytest.MonkeyPatch.context() as patch:
                fusing(patch, False)
                truth = expected(random_input().double())
            with ck.disable_adapter(model):
                ours = model(random_input())
    assert (ours - truth).norm() < 1e-5 * truth.norm()


# ---- the same training, block by block or fused


@pytest.mark.parametrize("backend", ["torch", "extension"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_fifty_steps_fused_and_not(backend, dropout, monkeypatch):
    if dropout:
        compute_every_position(monkeypatch)  # the block's own forward pass does so: the masks are then the same

    def train(fused: bool) -> tuple[list[float], list[Tensor]]:
        torch.manual_seed(0)
        model = small_clip().double()
        model = adapted(model, target_modules=ALL, lora_dropout=dropout).train()
        images, texts = torch.randn(4, 3, 16, 16).double(), torch.randint(1, 20, (4, 6))
        optimizer, losses = torch.optim.AdamW(ck.adapter_parameters(model), lr=1e-3), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COMPLORA_BACKEND", backend)
            fusing(patch, fused)
            for _ in range(50):
                logits = 10 * model.encode_image(images, normalize=True) @ model.encode_text(texts, normalize=True).T
                loss = F.cross_entropy(logits, torch.arange(4))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return losses, [parameter.detach() for parameter in ck.adapter_parameters(model)]

    (losses, factors), (expected_losses, expected_factors) = train(True), train(False)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(losses, expected_losses, rtol=1e-9, atol=0)  # float64, grown by 50 steps of Adam
    torch.testing.assert_close(factors, expected_factors, rtol=0, atol=1e-7)


# ---- activations

OWN = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
}


@pytest.mark.parametrize("scale", [1, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", OWN)
def test_activations_of_the_torch_backend(activation, dtype, scale):
    z, da = scale * torch.randn(2, 50, 40).to(dtype)
    yardstick, truth = (t.clone().requires_grad_() for t in (z, z.double()))
    values = [OWN[activation](t) for t in (yardstick, truth)]
    grads = [torch.autograd.grad(y, t, da.to(t.dtype))[0] for y, t in zip(values, (yardstick, truth), strict=True)]
    a, dz = activate(z, activation), TorchBackend().activation_bwd(da.clone(), z, activation)[0]
    assert_as_accurate_as_reference(a, values[0].detach(), values[1].detach(), "a")
    assert_as_accurate_as_reference(dz, grads[0], grads[1], "dz")


@pytest.mark.parametrize("activation", OWN)
def test_activations_of_the_largest_numbers(activation):
    z = torch.tensor([-60000.0, -40000.0, 40000.0, 60000.0]).half()
    assert activate(z, activation).tolist() == [0, 0, *z[2:].tolist()]
    assert TorchBackend().activation_bwd(torch.ones_like(z), z, activation)[0].tolist() == [0, 0, 1, 1]


# ---- memory


# In units of a stream, M·d elements, beside h, statistics and the softmax's: what docs/fusion.md states.
SAVED = {"none": 10, "mlp": 6}
OWN_FORWARD = {nn.GELU: 16, QuickGELU: 20}


def saved(run: Callable[[], Tensor]) -> dict[int, Tensor]:
    """The activations that the backward pass keeps alive, by their storages: tensors over tokens or images."""
    tensors: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() > 0 and tensor.shape[0] in (N, N * L):
            tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    assert kept.requires_grad
    return tensors


def units(tensors: dict[int, Tensor], unit: int) -> float:
    """Their bytes over those of a stream, without the small ones: h [M, r], statistics [M] and the softmax's."""
    return sum(t.untyped_storage().nbytes() for t in tensors.values() if t.untyped_storage().nbytes() >= unit) / unit


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [nn.GELU, QuickGELU])
@pytest.mark.parametrize("layout", ["batch first", "open_clip 4"])
def test_what_a_block_saves(layout, activation, dtype, dropout, monkeypatch):
    block = plain_block(layout, activation)
    model = adapted(Blocks(block), target_modules=ALL, towers=("image",), lora_dropout=dropout).to(dtype).train()
    x = random_input(dtype=dtype).requires_grad_()
    stream, tokens = N * L * D * dtype.itemsize, N * L
    with monkeypatch.context() as patch:
        fusing(patch, True)
        for recompute, expected in SAVED.items():
            set_recompute(model, recompute)
            tensors = saved(lambda: model(x))
            assert units(tensors, stream) == expected
            h, statistics, softmax = 6 * 2 * tokens * dtype.itemsize, 2 * 2 * tokens * 4, HEADS * tokens * 4
            everything = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
            assert everything == expected * stream + h + statistics + softmax
    fusing(monkeypatch, False)
    assert units(saved(lambda: model(x)), stream) == OWN_FORWARD[activation]


def test_frozen_blocks_before_the_first_adapted_one_save_nothing():
    model = adapted(Blocks(*(plain_block() for _ in range(3))), target_modules=ALL, towers=("image",), layers=(2,))
    tensors = saved(lambda: model(random_input()))
    assert units(tensors, N * L * D * 4) == SAVED["none"]


class Products(TorchDispatchMode):
    """Counts products whose result is a gradient of the whole input [M, d] of the first weight [3d, d]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.count = weight.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.count += any(a.untyped_storage().data_ptr() == self.weight for a in args if isinstance(a, Tensor))
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("torch_backend")
def test_the_first_adapted_block_computes_no_input_gradient(monkeypatch):
    model = adapted(Blocks(plain_block()), target_modules=ALL, towers=("image",))
    monkeypatch.setenv("COMPLORA_PLAN", "addmm")
    fusing(monkeypatch, True)
    for needed in (True, False):
        y = model(random_input().requires_grad_(needed))
        with Products(model.visual[0].attn.in_proj_weight) as products:
            y.sum().backward()
        assert products.count == int(needed)


# ---- blocks that keep their own forward pass


def own_passes(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the blocks that ran their own forward pass from now on."""
    ran: list[str] = []
    cls = open_clip.transformer.ResidualAttentionBlock
    original = cls.forward
    names = {id(module): name for name, module in model.named_modules()}

    def forward(block: Any, *args: Any, **kwargs: Any) -> Tensor:
        ran.append(names[id(block)])
        return original(block, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", forward)
    return ran


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a hook on the activation": lambda block: hook(block.mlp.gelu),
    "a hook on the norm": lambda block: hook(block.ln_1),
    "a hook on the attention": lambda block: hook(block.attn),
    "a hook on the output projection": lambda block: hook(block.attn.out_proj),
    "a backward hook": lambda block: block.mlp.c_fc.register_full_backward_hook(lambda *_: None),
    "another activation": lambda block: setattr(block.mlp, "gelu", nn.SiLU()),
    "another norm": lambda block: setattr(block, "ln_2", nn.Identity()),
    "a layer scale": lambda block: setattr(block, "ls_1", open_clip.transformer.LayerScale(D)),
    "one more layer": lambda block: block.mlp.add_module("dropout", nn.Dropout(0.1)),
    "a norm that is trained": lambda block: block.ln_1.requires_grad_(True),
    "a forward method of its own": lambda block: setattr(block.mlp, "forward", block.mlp.forward),
    "an attention method of its own": lambda block: setattr(block, "attention", block.attention),
    "a hook on the layer scale that is none": lambda block: hook(block.ls_2),
    "adapters that are switched off": lambda block: [setattr(m, "disabled", True) for m in block.modules()],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_block_runs_its_own_forward_pass(change, monkeypatch):
    model = adapted(Blocks(plain_block(), plain_block()), target_modules=ALL, towers=("image",))
    CHANGES[change](model.visual[0])
    ran = own_passes(model, monkeypatch)
    y = model(random_input())
    assert ran == ["visual.0"]
    y.sum().backward()
    if change != "adapters that are switched off":
        ck.check_gradients(model)


def test_a_merged_model_is_traced_saved_and_transformed(tmp_path):
    model = adapted(Blocks(plain_block()), target_modules=ALL, towers=("image",))
    ck.merge_adapter(model)
    x = random_input()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still what some deploy with
        traced: Any = torch.jit.trace(model.eval().visual[0], x)
        traced.save(tmp_path / "block.pt")
        assert torch.equal(torch.jit.load(tmp_path / "block.pt")(x), model(x))
    gradient = torch.func.grad(lambda x: model(x).sum())(x)
    assert gradient.shape == x.shape


def test_one_sequence_without_a_batch():
    model = adapted(Blocks(plain_block()), target_modules=ALL, towers=("image",))
    x = random_input()[0]
    torch.testing.assert_close(model(x), model(x[None])[0])


def test_every_hook_of_all_modules_is_called(monkeypatch):
    model = adapted(Blocks(plain_block()), target_modules=ALL, towers=("image",))
    ran = own_passes(model, monkeypatch)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        model(random_input())
    finally:
        handle.remove()
    assert ran == ["visual.0"]


def test_cross_attention_runs_the_blocks_own_forward_pass(monkeypatch):
    model = adapted(Blocks(plain_block()), target_modules=ALL, towers=("image",))
    ran = own_passes(model, monkeypatch)
    x, other = random_input(), random_input().flip(0)
    model.visual[0](x, other, other)
    assert ran == ["visual.0"]


def test_a_compiled_block_is_not_fused_and_computes_the_same():
    model = adapted(Blocks(plain_block()), target_modules=ALL, towers=("image",)).double()
    x = random_input(dtype=torch.float64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, None), model(x), rtol=0, atol=1e-12)  # float64, sums in another order


class PostNormBlock(open_clip.transformer.ResidualAttentionBlock):
    """The same parts in another order."""


UNKNOWN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "class": (
        lambda block: setattr(block, "__class__", PostNormBlock),
        r"it is a test_block\.PostNormBlock, expected a ResidualAttentionBlock of open_clip",
    ),
    "layer scale": (
        lambda block: setattr(block, "ls_2", open_clip.transformer.LayerScale(D)),
        "ls_2 is a LayerScale, expected nn.Identity",
    ),
    "activation": (lambda block: setattr(block.mlp, "gelu", nn.SiLU()), r"mlp.gelu is SiLU\(\), expected GELU"),
    "norm": (lambda block: setattr(block, "ln_1", nn.RMSNorm(D)), "ln_1 is a RMSNorm, expected a LayerNorm"),
    "part": (lambda block: block.add_module("ln_3", nn.LayerNorm(D)), "it consists of .*ln_3, expected attn, ln_1"),
    "mlp": (lambda block: block.mlp.append(nn.Identity()), "mlp consists of c_fc, gelu, c_proj, 3, expected"),
}


@pytest.mark.parametrize("part", UNKNOWN)
def test_a_block_of_another_kind_is_named_once(part, caplog):
    change, reason = UNKNOWN[part]
    blocks = [plain_block() for _ in range(3)]
    change(blocks[1])
    change(blocks[2])
    caplog.set_level(logging.WARNING, "complora_kernels")
    model = adapted(Blocks(*blocks), target_modules=ALL, towers=("image",))
    (message,) = [record.getMessage() for record in caplog.records]
    kept = "visual.1 (and 1 more) keeps its own forward pass, with adapters in it: "
    assert message.startswith(f"1 of 3 residual blocks are fused; {kept}")
    assert [isinstance(block, CompLoRABlock) for block in model.visual] == [True, False, False]
    assert re.search(reason, message)
    model(random_input()).sum().backward()
    ck.check_gradients(model)


@pytest.mark.parametrize(
    "options", [{"scale_heads": True}, {"qk_norm": True}, {"inner_norm": True}, {"proj_drop": 0.1}], ids=str
)
def test_an_attention_of_another_kind_is_not_fused(options):
    block = plain_block("open_clip 4")
    block.attn = stand_in.Attention(D, HEADS, **options)
    model = adapted(Blocks(block), target_modules=ALL, towers=("image",))
    assert not isinstance(model.visual[0], CompLoRABlock)


def test_both_towers_are_fused_where_they_are_adapted():
    for make, towers in itertools.product((small_clip, small_clip_4), (("image",), ("text",), ("image", "text"))):
        model = ck.apply_complora(make(), config(towers=towers))
        fused = {name.split(".")[0] for name, module in model.named_modules() if isinstance(module, CompLoRABlock)}
        assert fused == {{"image": "visual", "text": "transformer"}[tower] for tower in towers}


# ---- calls that cannot be answered


def test_set_recompute_refuses():
    model = adapted(Blocks(plain_block()), target_modules=ALL, towers=("image",))
    with pytest.raises(ValueError, match="recompute='attention', expected one of none, mlp"):
        set_recompute(model, "attention")
    with pytest.raises(ValueError, match="recompute='mlp': model has no fused block"):
        set_recompute(nn.Linear(2, 2), "mlp")
    set_recompute(model, "mlp")
    assert copy.deepcopy(model).visual[0].recompute == "mlp"


@pytest.mark.parametrize("read", [0, 1])
def test_a_norm_one_of_whose_products_nobody_reads(read):
    x, linears = torch.randn(4, D, dtype=torch.float64, requires_grad=True), []
    for _ in range(2):
        A, B, W = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, D), (5, 2), (5, D)))
        linears.append(AdaptedLinear(W, None, [A.requires_grad_()], [B.requires_grad_()], [(0, 5)]))
    leaves = (x, linears[read].As[0], linears[read].Bs[0])
    norm = Norm(torch.rand(D, dtype=torch.float64), torch.rand(D, dtype=torch.float64), 1e-5)
    of_both = torch.autograd.grad(norm_lora_linear(x, None, norm, *linears)[1 + read].sin().sum(), leaves)
    alone = torch.autograd.grad(norm_lora_linear(x, None, norm, linears[read])[1].sin().sum(), leaves)
    torch.testing.assert_close(of_both, alone)


def norm_of(width: int = D) -> Norm:
    return Norm(torch.ones(width), torch.zeros(width), 1e-5)


def test_norm_lora_linear_refuses():
    x, linear = torch.randn(4, D), AdaptedLinear(torch.randn(5, D), None)
    with pytest.raises(ValueError, match=r"norm.weight \(31,\) on cpu, expected \(32,\)"):
        norm_lora_linear(x, None, norm_of(31), linear)
    with pytest.raises(ValueError, match=r"delta \(3, 32\) on cpu, expected as x, \(4, 32\)"):
        norm_lora_linear(x, x[:3], norm_of(), linear)
    with pytest.raises(ValueError, match=r"norm\.weight\.requires_grad=True, expected a frozen norm"):
        norm_lora_linear(x, None, norm_of()._replace(weight=torch.ones(D, requires_grad=True)), linear)
    with pytest.raises(ValueError, match="have lengths 0, 0, 1, expected equal"):
        norm_lora_linear(x, None, norm_of(), linear._replace(rows=[(0, 5)]))
    with pytest.raises(ValueError, match=r"weight\.requires_grad=True"):
        norm_lora_linear(x, None, norm_of(), linear._replace(weight=torch.randn(5, D, requires_grad=True)))


def test_norm_lora_mlp_refuses():
    x, fc1, fc2 = torch.randn(4, D), AdaptedLinear(torch.randn(5, D), None), AdaptedLinear(torch.randn(D, 5), None)
    with pytest.raises(ValueError, match="activation='relu', expected one of gelu, gelu_tanh, quick_gelu"):
        norm_lora_mlp(x, None, norm_of(), fc1, fc2, "relu")
    with pytest.raises(ValueError, match=r"fc1 \(5, 32\) and fc2 \(31, 5\), expected transposed shapes"):
        norm_lora_mlp(x, None, norm_of(), fc1, AdaptedLinear(torch.randn(31, 5), None), "gelu")
