"""Whether each kernel is right at the shapes of ViT-B/16, batch 32, on the GPU at hand.

The rule is that of the tests: in Frobenius norms an error is at most twice that of plain torch in the same dtype, plus
a thousandth of the result; the truth is computed in float64 from the same rounded tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

import complora_kernels as ck
from benchmarks.gpu.problems import DROPOUT, Bench, Product, Row, Rows, triton_backend
from complora_kernels import blocks, reference
from complora_kernels.adapted_linear import AdaptedLinear, Deferred, Needs
from complora_kernels.backends import plans
from complora_kernels.backends.plans import Plan
from complora_kernels.backends.torch import ProductInput

CLASSES = 16
EPS = 1e-3  # of the size of a result in half precision
ALL = Needs(True, True, True)
CUDNN = 91500  # the versions after it serve lengths that 128 does not divide; torch then takes cuDNN first on sm_90
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "gelu": F.gelu,
}


def compared(what: str, ours: Tensor, plain: Tensor, exact: Tensor) -> Row:
    """Errors over the size of the exact result; one that is not finite is none that is allowed."""
    size = torch.linalg.vector_norm(exact)
    error, of_plain = (float(torch.linalg.vector_norm(each.double() - exact) / size) for each in (ours, plain))
    allowed = 2 * of_plain + EPS
    return {"what": what, "error": error, "allowed": allowed, "ok": error <= allowed}


# ---- products


def products(bench: Bench, layer: str, dropout_p: float = 0.0, plan: Plan | None = None) -> Rows:
    """y and all gradients of one product; `plan`: not the one that its problem has."""
    problem = bench.product(layer, bench.sizes.batches[1], dropout_p)
    x, linear, dY = problem
    backend = triton_backend()
    with contextlib.nullcontext() if plan is None else plans.override(plan):
        y, h = backend.packed_lora_linear_fwd(ProductInput(x), linear)
        dX, dAs, dBs = backend.packed_lora_linear_bwd(dY, x, h, linear, ALL)
    if bench.dry:
        return
    masks = masks_of(linear, x)
    exact, plain = (by_reference(problem, masks, dtype) for dtype in (torch.float64, x.dtype))
    ours = [y, dX, torch.stack([*dAs]), torch.stack([*dBs])]
    for what, mine, other, truth in zip(("y", "dX", "dA", "dB"), ours, plain, exact, strict=True):
        yield compared(what, mine, other, truth)


def masks_of(linear: AdaptedLinear, x: Tensor) -> list[Tensor] | None:
    """`m = mask / (1 - p)` of each adapter, [M, K]."""
    p, seed = linear.dropout_p, linear.seed
    if seed is None:
        return None
    keep = (reference.keep_mask(seed, adapter, x.shape, p) for adapter in range(len(linear.rows)))
    return [mask.double() / (1 - reference.drawn_p(p)) for mask in keep]


def by_reference(problem: Product, masks: Sequence[Tensor] | None, dtype: torch.dtype) -> list[Tensor]:
    """y, dX, dA and dB of plain torch in a dtype."""
    x, linear, dY = problem
    count = len(linear.rows)
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, *linear.As, *linear.Bs)]
    weight, bias = (tensor.to(dtype) for tensor in (linear.weight, linear.bias) if tensor is not None)
    record = linear._replace(weight=weight, bias=bias, As=leaves[1 : count + 1], Bs=leaves[count + 1 :])
    given = None if masks is None else [mask.to(dtype) for mask in masks]
    y = reference.packed_lora_linear(leaves[0], record, dropout_masks=given)
    dX, *factors = torch.autograd.grad(y, leaves, dY.to(dtype))
    return [y.detach(), dX, torch.stack(factors[:count]), torch.stack(factors[count:])]


# ---- halves of a block, forward and backward


def drawn_masks(linears: Sequence[AdaptedLinear], inputs: Sequence[int], M: int, device: torch.device) -> list[Any]:
    """The masks that an operation draws for its products one after the other, right after the seed was set."""
    if not linears[0].dropout_p:
        return [None] * len(linears)
    seeds = [torch.ops.complora.philox_seed(torch.empty(0, device=device)) for _ in linears]
    pairs = zip(linears, seeds, inputs, strict=True)
    return [masks_of(linear._replace(seeds=[seed]), seed.expand(M, width)) for linear, seed, width in pairs]


def attention_half(bench: Bench, dropout_p: float = 0.0) -> Rows:
    """`s = x + delta` and the heads of q, k and v from LN(s), with the gradients of all."""
    batch, own, heads = bench.sizes.batches[1], bench.norm(), bench.sizes.heads
    x, linear, dY = bench.product("qkv", batch, dropout_p)
    delta, d_stream = (bench.random(*x.shape) for _ in range(2))

    def run(dtype: torch.dtype, masks: Any, *, ours: bool = False) -> list[Tensor]:
        leaves, record = leaves_of(dtype, (x,), (linear,))
        s, moved = norm_in(own, dtype), delta.to(dtype)
        if ours:
            parts = blocks.norm_lora_linear(leaves[0], moved, own, *record, heads=[(3, heads)], backend="triton")
            stream, y = parts[0], torch.cat([part.flatten(-2) for part in parts[1:]], -1)
        else:
            stream, y = reference.norm_lora_linear(leaves[0], moved, s, record[0], dropout_masks=masks)
        return [y.detach(), *torch.autograd.grad([stream, y], leaves, [d_stream.to(dtype), dY.to(dtype)])]

    yield from half(bench, run, (linear,), (x.shape[1],), len(x))


def mlp_half(bench: Bench, kind: str, dropout_p: float = 0.0) -> Rows:
    """`s + fc2(act(fc1(LN(s))))` with the gradients of all."""
    batch, own = bench.sizes.batches[1], bench.norm()
    (x, fc1, _), (_, fc2, dY) = (bench.product(layer, batch, dropout_p) for layer in ("fc1", "fc2"))

    def run(dtype: torch.dtype, masks: Any, *, ours: bool = False) -> list[Tensor]:
        leaves, (first, second) = leaves_of(dtype, (x,), (fc1, fc2))
        if ours:
            y = blocks.norm_lora_mlp(leaves[0], None, own, first, second, kind, backend="triton")
        else:
            stream, z = reference.norm_lora_linear(
                leaves[0], None, norm_in(own, dtype), first, dropout_masks=masks and masks[0]
            )
            y = stream + reference.activation_lora_linear(z, kind, second, dropout_masks=masks and masks[1])
        return [y.detach(), *torch.autograd.grad(y, leaves, dY.to(dtype))]

    yield from half(bench, run, (fc1, fc2), (x.shape[1], 4 * x.shape[1]), len(x))


def half(
    bench: Bench, run: Callable[..., list[Tensor]], linears: Sequence[AdaptedLinear], inputs: Sequence[int], M: int
) -> Rows:
    """The results of a half in the order of its leaves: y, dx, each dA and dB."""
    torch.manual_seed(0)
    ours = run(bench.dtype, None, ours=True)
    if bench.dry:
        return
    torch.manual_seed(0)
    masks = drawn_masks(linears, inputs, M, bench.device)
    rounded = [mask and [m.to(bench.dtype) for m in mask] for mask in masks]
    single = len(linears) == 1
    plain = run(bench.dtype, rounded[0] if single else rounded)
    exact = run(torch.float64, masks[0] if single else masks)
    for number, (mine, other, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        what = ("y", "dx")[number] if number < 2 else f"factor gradient {number - 2}"
        yield compared(what, mine, other, truth)


def leaves_of(
    dtype: torch.dtype, inputs: Sequence[Tensor], linears: Sequence[AdaptedLinear]
) -> tuple[list[Tensor], list[AdaptedLinear]]:
    """Inputs and factors as leaves of a dtype, and the products of these factors, which draw their own masks."""
    leaves, records = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs], []
    for linear in linears:
        factors = [factor.detach().to(dtype).requires_grad_() for factor in (*linear.As, *linear.Bs)]
        leaves += factors
        weight, bias = (tensor.to(dtype) for tensor in (linear.weight, linear.bias) if tensor is not None)
        As, Bs = factors[: len(linear.As)], factors[len(linear.As) :]
        records.append(linear._replace(weight=weight, bias=bias, As=As, Bs=Bs, seeds=[]))
    return leaves, records


def norm_in(own: reference.Norm, dtype: torch.dtype) -> reference.Norm:
    bias = None if own.bias is None else own.bias.to(dtype)
    return reference.Norm(own.weight.to(dtype), bias, own.eps)


# ---- norms, activations, factors


def norm(bench: Bench, dropout_p: float = 0.0) -> Rows:
    """The stream, the norm and h of q, k and v in one pass, and the gradient of the stream.

    It is alone, with its rank-r term where no A is trained, and with dA in the same launch.
    """
    backend, problem, own = triton_backend(), bench.product("qkv", bench.sizes.batches[1], dropout_p), bench.norm()
    x, reader, _ = problem
    delta, dn, d_stream = (bench.random(*x.shape) for _ in range(3))
    g = bench.random(len(x), reader.rank)
    stream, normed, (n, h, *_) = backend.norm_fwd(x, delta, own, x.dtype, reader)
    ds, _ = backend.norm_bwd(dn, d_stream, normed)
    whole_ds, _ = backend.norm_bwd(Deferred(dn, g, reader, needs_A=False), d_stream, normed)
    merged_ds, dAs = backend.norm_bwd(Deferred(dn, g, reader, needs_A=True), d_stream, normed)
    if bench.dry:
        return
    masks = masks_of(reader, x)

    def truth(dtype: torch.dtype) -> list[Tensor]:
        s = (x.to(dtype) + delta.to(dtype)).requires_grad_()
        own_weight, own_bias = (None if t is None else t.to(dtype) for t in own[:2])
        n = F.layer_norm(s, s.shape[-1:], own_weight, own_bias, own.eps)
        leaves = [A.detach().to(dtype).requires_grad_() for A in reader.As]
        h = h_of(n, reader._replace(As=leaves), masks)
        (ds,) = torch.autograd.grad(n, s, dn.to(dtype), retain_graph=True)
        whole_ds, *dAs = torch.autograd.grad([n, h], [s, *leaves], [dn.to(dtype), g.to(dtype)])
        d_streams = [each + d_stream.to(dtype) for each in (ds, whole_ds)]
        return [s.detach(), n.detach(), h.detach(), *d_streams, d_streams[1], torch.stack(dAs)]

    names, ours = (
        ("s", "n", "h", "ds", "ds with its rank-r term", "ds beside dA", "dA"),
        (stream, n, h, ds, whole_ds, merged_ds, torch.stack([*dAs])),
    )
    for what, mine, plain, exact in zip(names, ours, truth(x.dtype), truth(torch.float64), strict=True):
        yield compared(what, mine, plain, exact)


def h_of(x: Tensor, reader: AdaptedLinear, masks: Sequence[Tensor] | None) -> Tensor:  # [M, P r]
    """`h = drop(x) Ã^T` of all adapters side by side, in the dtype of x."""
    dropped = [x] * len(reader.As) if masks is None else [x * mask.to(x.dtype) for mask in masks]
    return torch.cat([each @ A.to(x.dtype).mT for each, A in zip(dropped, reader.As, strict=True)], 1)


def norm_repeated(bench: Bench) -> Rows:
    """h of `norm_fwd` very often: a program reads what other threads of it have stored a moment before.

    Inputs take turns, so that what an earlier run has left in memory is wrong.
    """
    backend, own = triton_backend(), bench.norm()
    first = bench.product("qkv", bench.sizes.batches[0])
    inputs = [first.x, *(bench.random(*first.x.shape) for _ in range(2))]

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        _, _, (n, h, *_) = backend.norm_fwd(x, None, own, x.dtype, first.linear)
        assert h is not None
        return n, h

    kept = [run(x) for x in inputs]
    if bench.dry:
        return
    for n, h in kept:
        exact = h_of(n.double(), first.linear, None)
        yield compared("h of the n that was stored", h, h_of(n, first.linear, None), exact)
    different = torch.zeros((), dtype=torch.int64, device=bench.device)
    for number in range(bench.sizes.repeats):
        n, h = run(inputs[number % len(inputs)])
        expected_n, expected_h = kept[number % len(inputs)]
        different += (n != expected_n).sum() + (h != expected_h).sum()
    count = int(different)
    yield {"what": f"{bench.sizes.repeats} runs", "different": count, "ok": count == 0}


def activation(bench: Bench, kind: str, dropout_p: float = 0.0) -> Rows:
    """a and h of fc2 in one pass, and the gradient of what the activation reads."""
    backend, (z, reader, _) = triton_backend(), bench.product("fc2", bench.sizes.batches[1], dropout_p)
    da = bench.random(*z.shape)
    a, h, *_ = backend.activation_fwd(z, kind, reader)
    dz, _ = backend.activation_bwd(da, z, kind)
    if bench.dry:
        return
    masks = masks_of(reader, z)

    def truth(dtype: torch.dtype) -> list[Tensor]:
        leaf = z.to(dtype).requires_grad_()
        a = ACTIVATIONS[kind](leaf)
        (dz,) = torch.autograd.grad(a, leaf, da.to(dtype))
        return [a.detach(), h_of(a.detach(), reader, masks), dz]

    for what, mine, plain, exact in zip(
        ("a", "h", "dz"), (a, h, dz), truth(z.dtype), truth(torch.float64), strict=True
    ):
        yield compared(what, mine, plain, exact)


def fold(bench: Bench) -> Rows:
    """The factors of two blocks projected, scaled and cast, and their gradients projected."""
    backend, given = triton_backend(), bench.factors(2)
    arguments = (given.bases, given.kinds, given.output_side, 0.5)
    count, half = len(given.factors), [bench.dtype] * len(given.factors)
    folded = backend.fold_factors(given.factors, *arguments, half)
    grads = [factor.to(bench.dtype) for factor in given.factors]
    projected = backend.fold_factors_bwd(grads, *arguments, [torch.float32] * count)
    if bench.dry:
        return

    def truth(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        scaled = []
        for factor, basis, output in zip(tensors, given.bases, given.output_side, strict=True):
            rows = factor.mT if output else factor
            rows = rows.to(dtype) if basis is None else reference.project_complement(rows.to(dtype), basis.to(dtype))
            scaled.append((0.5 * rows.mT if output else rows).flatten())
        return torch.cat(scaled)

    for what, mine, start in (("folded", folded, given.factors), ("gradients", projected, grads)):
        flat = torch.cat([each.flatten() for each in mine])
        yield compared(what, flat, truth(start, torch.float32).to(flat.dtype), truth(start, torch.float64))


# ---- attention


def attention(bench: Bench, tokens: int, *, causal: bool) -> Rows:
    """torch's attention on q, k and v as a block lays them out: the kernel that torch takes, and its results."""
    N, H, d = bench.sizes.batches[1], bench.sizes.heads, bench.sizes.width // bench.sizes.heads
    packed = bench.random(N, tokens, 3, H, d)
    grad = bench.random(N, H, tokens, d)
    if bench.dry:
        return

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaf = packed.to(dtype).requires_grad_()
        q, k, v = (part.permute(0, 2, 1, 3) for part in leaf.unbind(2))
        if dtype == bench.dtype:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        else:
            logits = q.double() @ k.double().mT * d**-0.5
            if causal:
                logits = logits.masked_fill(~logits.new_ones(tokens, tokens, dtype=torch.bool).tril(), -torch.inf)
            mixed = logits.softmax(-1) @ v.double()
        (d_packed,) = torch.autograd.grad(mixed, leaf, grad.to(mixed.dtype))
        return [mixed.detach(), d_packed]

    ours, exact = run(bench.dtype), run(torch.float64)
    rounded = [tensor.to(bench.dtype) for tensor in exact]
    for what, mine, plain, truth in zip(("output", "gradients"), ours, rounded, exact, strict=True):
        row = compared(what, mine, plain, truth)
        allowed = 1e-2  # of a kernel that rounds the weights of attention to half precision
        yield row | {"allowed": allowed, "ok": row["error"] <= allowed}
    if bench.device.type == "cuda":
        q, k, v = (part.permute(0, 2, 1, 3) for part in packed.unbind(2))
        taken = SDPBackend(torch.ops.aten._fused_sdp_choice(q, k, v, None, 0.0, causal)).name
        version, chip = torch.backends.cudnn.version() or 0, torch.cuda.get_device_capability(bench.device)
        expected = chip == (9, 0) and version > CUDNN
        ok = taken == SDPBackend.CUDNN_ATTENTION.name or not expected
        yield {"what": "kernel that torch takes", "kernel": taken, "cudnn": version, "ok": ok}


# ---- a training step


def graphed_step(bench: Bench, dropout_p: float = DROPOUT) -> Rows:
    """A step of a tower of two blocks as one CUDA graph: without dropout the eager step's loss, with it other masks."""
    sizes = bench.sizes
    with bench.values():
        model = adapted_tower(bench, dropout_p)
    parameters = list(ck.adapter_parameters(model))
    images = bench.random(sizes.batches[1], 3, sizes.image, sizes.image)
    labels = torch.arange(sizes.batches[1], device=bench.device) % CLASSES

    def loss(model: Any, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images).float(), labels)

    eager = loss(model, images, labels)
    grads = torch.autograd.grad(eager, parameters)
    if bench.dry:
        return
    rate = torch.zeros((), device=bench.device)
    on_gpu = bench.device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, capturable=on_gpu, fused=on_gpu)
    step = ck.GraphedTrainStep(model, loss, optimizer, (images, labels), graph=True if on_gpu else "auto")
    losses = [float(step(images, labels)) for _ in range(3)]
    finite = all(abs(value) < torch.inf for value in losses)
    if dropout_p:
        yield {"what": "three replays, three masks", "losses": losses, "ok": finite and len(set(losses)) == 3}
        return
    expected = float(eager.detach())
    apart = max(abs(value - expected) for value in losses) / abs(expected)
    yield {"what": "loss of the eager step", "losses": losses, "error": apart, "ok": finite and apart <= 1e-3}
    captured = [parameter.grad for parameter in parameters if parameter.grad is not None]
    ours, truth = (torch.cat([each.flatten().double() for each in tensors]) for tensors in (captured, grads))
    error = float(torch.linalg.vector_norm(ours - truth) / torch.linalg.vector_norm(truth))
    yield {"what": "gradients of the eager step", "error": error, "ok": error <= 1e-2}


def adapted_tower(bench: Bench, dropout_p: float) -> Any:
    """torchvision's ViT of two blocks, its six linears adapted, with updates that every dropout mask shows in."""
    from torchvision.models import VisionTransformer

    sizes = bench.sizes
    torch.manual_seed(0)
    plain = VisionTransformer(
        image_size=sizes.image,
        patch_size=sizes.patch,
        num_layers=2,
        num_heads=sizes.heads,
        hidden_dim=sizes.width,
        mlp_dim=4 * sizes.width,
        num_classes=CLASSES,
    )
    plain = plain.to(bench.device, bench.dtype).requires_grad_(False)
    nn.init.normal_(plain.get_parameter("heads.head.weight"), std=0.05)  # torchvision's are zero
    modules = ("q", "k", "v", "o", "fc1", "fc2")
    config = ck.CompLoRAConfig(
        r=sizes.rank, lora_dropout=dropout_p, target_modules=modules, towers=("image",), subspace_source="random"
    )
    model = ck.apply_complora(plain, config, progress=False).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model
