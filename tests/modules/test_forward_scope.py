"""One fold in the forward pass of a tower, bit for bit what its layers compute where each folds for itself."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import itertools
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import open_clip.transformer
import pytest
import stand_in
import torch
from small_clip import adapted, compute_every_position, config, small_clip, small_clip_4, with_text_module
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import complora_kernels as ck
from complora_kernels import functional
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.modules import forward_scope

ALL = ("q", "k", "v", "o", "fc1", "fc2")
IMAGES = torch.linspace(-2, 2, 3 * 3 * 16 * 16).sin().view(3, 3, 16, 16)
TEXTS = torch.arange(18).view(3, 6) + 1

every_layout = pytest.mark.parametrize("make", [small_clip, small_clip_4])


def layer_by_layer(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`run`, where every layer folds for itself."""

    def alone(model: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forward_scope, "fold_below", lambda _module: {})
            return run(model)

    return alone


def loss(output: Tensor) -> Tensor:
    return (output * torch.arange(output.numel()).view_as(output).cos()).sum()


def results(model: nn.Module, run: Callable[[Any], Tensor]) -> list[Tensor | None]:
    """The output of `run` and the gradients of all factors; dropout draws the same at every call."""
    torch.manual_seed(3)
    output = run(model)
    model.zero_grad()
    if output.requires_grad:
        loss(output).backward()
    return [output.detach(), *(factor.grad for factor in ck.adapter_parameters(model))]


def same(ours: list[Tensor | None], theirs: list[Tensor | None]) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def images(model: Any) -> Tensor:
    return model.visual(IMAGES.to(next(model.visual.parameters()).dtype))


def both(model: Any) -> Tensor:
    return torch.cat([model.encode_image(IMAGES.to(next(model.parameters()).dtype)), model.encode_text(TEXTS)])


def fold_nodes(output: Tensor) -> int:
    """How many `fold_factors` nodes the graph of `output` has."""
    nodes, found = [output.grad_fn], set()
    for node in nodes:
        if node is not None and node not in found:
            found.add(node)
            nodes += [after for after, _ in node.next_functions]
    return sum(type(node).__name__ == "FoldFactorsFunctionBackward" for node in found)


@pytest.fixture
def folds(monkeypatch) -> list[list[Tensor]]:
    """The As of every call of `fold_factors`."""
    calls, original = [], functional.fold_factors

    def observed(lora_As: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(list(lora_As))
        return original(lora_As, *arguments, **options)

    monkeypatch.setattr(functional, "fold_factors", observed)
    return calls


@pytest.fixture
def no_recompilation() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert forward_scope.current_reading() is None
    assert not forward_scope.RUNNING.scopes


# ---- one fold


@every_layout
def test_each_tower_folds_once_and_computes_what_its_layers_would(make, folds):
    model = adapted(make(), target_modules=ALL, lora_dropout=0.3).train()
    output = both(model)
    layers = adapted_layers(model)
    expected = [
        [layer.factors(name)[0] for path, layer in layers.items() if path.startswith(root) for name in layer.weights]
        for root in ("visual.", "transformer.")
    ]
    assert [{id(A) for A in As} for As in folds] == [{id(A) for A in As} for As in expected]
    assert fold_nodes(output) == 2
    assert fold_nodes(layer_by_layer(both)(model)) == 2 * (
        2 * 4 + 1
    )  # towers, blocks; q k v together, o, fc1, fc2; q alone in the last
    assert same(results(model, both), results(model, layer_by_layer(both)))


def test_q_k_and_v_are_neighbours(folds):
    model = adapted(small_clip(), target_modules=ALL)
    images(model)
    (As,) = folds
    for block in model.visual.transformer.resblocks:
        q, k, v, o = (getattr(block.attn.lora_A, name) for name in "qkvo")
        first = next(i for i, A in enumerate(As) if A is q)
        assert all(a is b for a, b in zip(As[first : first + 4], (q, k, v, o), strict=True))


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "grad": contextlib.nullcontext,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_modes_and_dtypes(mode, dtype, folds):
    model = adapted(small_clip(), target_modules=ALL).to(dtype)

    def run(model: Any) -> Tensor:
        with MODES[mode]():
            return images(model)

    ours = results(model, run)
    assert len(folds) == 1
    assert same(ours, results(model, layer_by_layer(run)))


def test_weights_of_two_dtypes_are_folded_in_two_calls(folds):
    dtypes = (torch.float32, torch.float64, torch.float32, torch.float64)
    model = nn.Sequential(*(module for dtype in dtypes for module in (To(dtype), nn.Linear(4, 4, dtype=dtype))))
    adapted(model, target_modules=".*", subspace_k=2)
    x = torch.linspace(-1, 1, 8).view(2, 4)
    ours = results(model, lambda model: model(x))
    assert [len(As) for As in folds] == [2, 2]
    assert same(ours, results(model, layer_by_layer(lambda model: model(x))))


class To(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


# ---- which modules are towers


class Branches(nn.Module):
    """Two branches and a head; `only` leaves one branch out."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 4)
        self.right = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, only: str | None = None) -> tuple[Tensor, ...]:
        return tuple(self.get_submodule(name)(x) for name in ([only] if only else ["left", "right"]))


def branches() -> Branches:
    return adapted(Branches(), target_modules=".*", subspace_k=2)


def run(model: Any) -> None:
    model(torch.ones(2, 4)) if isinstance(model, Branches) else both(model)


@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (small_clip, {}, [6, 6]),
        (small_clip_4, {}, [6, 6]),
        (lambda: with_text_module(context_length=6), {}, [6, 6]),
        (lambda: with_text_module(context_length=6, pool_type="last"), {}, [6, 6]),
        (small_clip, {"towers": "image"}, [6]),
        (small_clip, {"target_modules": r"visual\..*c_fc"}, [2]),
        (Branches, {"target_modules": "left", "subspace_k": 2}, [1]),
    ],
)
def test_each_tower_folds_its_own_layers(make, options, expected, folds):
    run(ck.apply_complora(make(), config(**options)))
    assert [len(As) for As in folds] == expected


def test_layers_outside_the_towers_are_folded_with_the_model_and_those_inside_with_their_tower(folds):
    model = small_clip()
    model.ln_final = nn.Linear(32, 32)
    adapted(model, target_modules=r".*c_fc|ln_final")
    model(IMAGES, TEXTS)
    assert [len(As) for As in folds] == [1, 2, 2]
    assert same(results(model, both), results(model, layer_by_layer(both)))


def test_a_transformer_that_is_called_by_itself_folds_once(folds):
    """As learned prompts do, which have no ids."""
    model = adapted(small_clip())
    x = torch.linspace(-1, 1, 3 * 6 * 32).view(3, 6, 32)
    call = lambda model: model.transformer(x, attn_mask=model.attn_mask)
    ours = results(model, call)
    assert [len(As) for As in folds] == [6]
    assert same(ours, results(model, layer_by_layer(call)))


def test_a_failed_or_second_adaptation_adds_no_scope(tmp_path, folds):
    model = small_clip()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="expected at most"):
        ck.apply_complora(model, config(subspace_k=33))
    assert [type(module) for module in model.modules()] == classes
    ck.save_adapter(adapted(small_clip()), tmp_path)
    ck.load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="adapter already"):
        ck.apply_complora(model, config())
    folds.clear()
    both(model)
    assert [len(As) for As in folds] == [6, 6]


def parts_with_signatures(model: Any) -> dict[str, Any]:
    methods = ["forward", "encode_text", "_encode_text"]
    return {
        f"{path}.{name}": inspect.signature(getattr(module, name))
        for path, module in model.named_modules()
        for name in methods
        if hasattr(module, name) and not isinstance(module, (nn.MultiheadAttention, stand_in.Attention, nn.Linear))
    }


@pytest.mark.parametrize(
    ("make", "options"),
    [(small_clip, {}), (small_clip_4, {}), (Branches, {"target_modules": ".*", "subspace_k": 2})],
)
def test_classes_and_signatures_are_those_of_the_plain_model(make, options):
    plain = make()
    model = ck.apply_complora(copy.deepcopy(plain), config(**options))
    for twin in (model, copy.deepcopy(model), by_pickle(model)):
        assert isinstance(twin, type(plain))
        signatures = parts_with_signatures(twin)
        for name, signature in parts_with_signatures(plain).items():
            assert signatures.get(name, signature) == signature
    assert list(inspect.signature(branches().forward).parameters) == ["x", "only"]


class Stateful(nn.Module):
    """Has a state of its own for pickling, and names that a scope might use."""

    def __init__(self) -> None:
        super().__init__()
        self.reading = nn.Linear(4, 4)
        self.lock: Any = threading.Lock()  # which no pickle takes

    def truncate(self, x: Tensor) -> Tensor:
        return x[:1]

    def forward(self, x: Tensor) -> Tensor:
        return self.reading(self.truncate(x))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "lock": None}


def test_a_scope_leaves_a_models_own_names_and_state_alone(folds):
    model = adapted(Stateful(), target_modules="reading", subspace_k=2)
    x = torch.linspace(-1, 1, 8).view(2, 4)
    expected = model(x)
    for twin in (copy.deepcopy(model), by_pickle(model), pickle.loads(pickle.dumps(model, protocol=0))):
        assert twin.lock is None
        folds.clear()
        assert torch.equal(twin(x), expected)
        assert len(folds) == 1


# ---- which fold a layer uses


@every_layout
def test_a_block_outside_its_tower_folds_for_itself(make, folds):
    model = adapted(make(), target_modules=ALL)
    x = torch.linspace(-1, 1, 5 * 32).view(1, 5, 32)

    def run(model: Any) -> Tensor:
        return model.visual.transformer.resblocks[1](x)

    assert same(results(model, run), results(model, layer_by_layer(run)))
    assert {len(As) for As in folds} == {1, 3}


def test_merged_and_disabled_layers_are_left_out(folds):
    model = adapted(small_clip(), target_modules=ALL)
    with ck.disable_adapter(model):
        # The last block computes the position that is read alone: products of other shapes round otherwise
        torch.testing.assert_close(images(model), images(small_clip()))
    assert not folds
    ck.merge_adapter(model)
    folds.clear()
    images(model)
    assert not folds
    ck.unmerge_adapter(model)
    model.visual.transformer.resblocks[0].attn.disabled = True
    images(model)
    assert [len(As) for As in folds] == [2 * len(ALL) - 4]
    assert same(results(model, images), results(model, layer_by_layer(images)))


def test_frozen_factors_get_no_gradient():
    model = adapted(small_clip(), target_modules=ALL)
    for i, factor in enumerate(ck.adapter_parameters(model)):
        factor.requires_grad_(i % 3 > 0)
    ours = results(model, images)
    assert same(ours, results(model, layer_by_layer(images)))
    assert sum(grad is None for grad in ours[1:]) > 8  # and those of the text tower


def test_layers_that_were_not_called_get_no_gradient():
    model = branches()
    (output,) = model(torch.ones(2, 4), only="right")
    loss(output).backward()
    assert {name for name, value in model.named_parameters() if value.grad is not None} == {
        "right.lora_A",
        "right.lora_B",
    }


def test_branches_go_backward_one_after_the_other():
    """Each backward pass runs the one node again, which must have kept what it needs."""
    model = branches()
    x = torch.ones(2, 4)
    for output in model(x):
        loss(output).backward()
    ours = [factor.grad for factor in ck.adapter_parameters(model)]
    model.zero_grad()
    outputs = layer_by_layer(lambda model: model(x))(model)
    torch.stack([loss(output) for output in outputs]).sum().backward()
    assert same(ours, [factor.grad for factor in ck.adapter_parameters(model)])


CALLS: dict[str, Callable[[Any], Tensor]] = {
    "twice in a graph": lambda model: images(model) + model.visual(IMAGES.flip(0)),
    "one after another": lambda model: model.visual(images(model).mean() * IMAGES),
}


@pytest.mark.parametrize("call", CALLS)
def test_each_pass_folds_anew(call, folds):
    model = adapted(small_clip(), target_modules=ALL)
    ours = results(model, CALLS[call])
    assert len(folds) == 2
    assert same(ours, results(model, layer_by_layer(CALLS[call])))


def test_a_step_between_two_passes_is_seen():
    after = []
    for run in (images, layer_by_layer(images)):
        model = adapted(small_clip())
        optimizer = torch.optim.SGD(ck.adapter_parameters(model), lr=0.1)
        for _ in range(3):
            loss(run(model)).backward()  # gradients accumulate
            optimizer.step()
        after.append(results(model, run))
    assert same(*after)


def test_a_pass_without_gradients_does_not_lend_its_fold_to_a_layer_with_them():
    model = adapted(small_clip())
    block = model.visual.transformer.resblocks[0]
    outputs = []
    block.register_forward_hook(lambda *_: outputs.append(with_gradients(block.attn)))
    with torch.no_grad():
        images(model)
    outputs[0].sum().backward()
    assert block.attn.lora_A.q.grad is not None


@torch.enable_grad()
def with_gradients(attention: nn.Module) -> Tensor:
    x = torch.ones(1, 5, 32)
    return attention(x, x, x, need_weights=False)[0]


def test_a_layer_that_leaves_autocast_gets_factors_that_were_not_rounded():
    model = adapted(small_clip())
    attention = model.visual.transformer.resblocks[1].attn
    forward = attention.forward

    @torch.autocast("cpu", enabled=False)
    def in_float32(query: Tensor, *_: Any, **options: Any) -> Any:
        x = query.float()
        return forward(x, x, x, **options)

    attention.forward = in_float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(images(model), layer_by_layer(images)(model))


def test_functional_call_gives_other_factors():
    model, other = adapted(small_clip(), target_modules=ALL), adapted(small_clip(), seed=2, target_modules=ALL)
    values = {name: value.detach().clone() for name, value in other.visual.named_parameters()}
    assert torch.equal(torch.func.functional_call(model.visual, values, (IMAGES,)), images(other))
    factors = {name: value for name, value in values.items() if "lora_" in name}
    leaves = {name: value.requires_grad_() for name, value in factors.items()}
    output = torch.func.functional_call(model.visual, leaves, (IMAGES,))
    assert fold_nodes(output) == 1
    loss(output).backward()
    grads = [leaf.grad for leaf in leaves.values()]
    loss(images(other)).backward()
    assert same(grads, [value.grad for name, value in other.visual.named_parameters() if "lora_" in name])


def test_functional_call_of_a_layer_inside_its_tower():
    model = adapted(small_clip(), target_modules=("fc1",))
    mlp = model.visual.transformer.resblocks[1].mlp
    zeros = torch.zeros_like(mlp.c_fc.lora_B)
    while zeros._version < mlp.c_fc.lora_B._version:
        zeros.zero_()  # its version is then that of the factor that it replaces
    original = mlp.forward
    mlp.forward = lambda x: mlp.c_proj(mlp.gelu(torch.func.functional_call(mlp.c_fc, {"lora_B": zeros}, (x,))))
    ours = images(model)
    mlp.forward = original
    with torch.no_grad():
        mlp.c_fc.lora_B.zero_()
    assert torch.equal(ours, images(model))


class Recursive(nn.Module):
    """Calls itself between its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        x = self.first(x).sin()
        return self.second(self(x, depth - 1) if depth else x)


def test_a_tower_that_calls_itself():
    model = adapted(Recursive(), target_modules=".*", subspace_k=2)
    x = torch.linspace(-1, 1, 8).view(2, 4)
    torch.testing.assert_close(  # three gradients are added in another order
        results(model, lambda model: model(x)), results(model, layer_by_layer(lambda model: model(x)))
    )


# ---- activation checkpointing


def selective(function: Any, *arguments: Any, use_reentrant: bool) -> Any:
    """Keeps the results of `mm` and hands them out again in the recomputation, to the first call, the second, …"""
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    return checkpoint.checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)


CHECKPOINTS: dict[str, Callable[..., Any]] = {
    "not reentrant": checkpoint.checkpoint,
    "reentrant": lambda *arguments, use_reentrant: checkpoint.checkpoint(*arguments, use_reentrant=True),
    "selective": selective,
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
@every_layout
def test_checkpointing_changes_no_gradient(make, kind, folds, monkeypatch):
    model = adapted(make(), target_modules=ALL, lora_dropout=0.3).train()
    x = IMAGES.clone().requires_grad_()  # without, reentrant checkpointing gives the first block no gradient
    with monkeypatch.context() as patch:
        compute_every_position(patch)  # checkpointing does so: the dropout masks are then the same
        expected = results(model, layer_by_layer(lambda model: model.visual(x)))
    for library in (open_clip.transformer, stand_in):
        monkeypatch.setattr(library, "checkpoint", CHECKPOINTS[kind])
    model.set_grad_checkpointing(True)
    folds.clear()
    torch.manual_seed(3)
    output = model.visual(x)
    in_forward = 1 + (8 if kind == "selective" else 0)  # layers whose products are counted fold theirs both times
    assert len(folds) == in_forward
    loss(output).backward()
    assert len(folds) == in_forward + 8
    assert same([output, *(factor.grad for factor in ck.adapter_parameters(model))], expected)


# ---- torch.compile


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_in_one_graph(checkpointing, no_recompilation):
    model = adapted(small_clip())
    model.set_grad_checkpointing(checkpointing)
    expected = results(model, lambda model: torch.cat(model(IMAGES, TEXTS)[:2]))
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(results(model, lambda _: torch.cat(compiled(IMAGES, TEXTS)[:2])), expected)


class Graphs:
    """A backend of torch.compile that counts the graphs that it is given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, _inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.mark.parametrize("options", [{}, {"fullgraph": True}])
def test_as_many_graphs_as_of_the_plain_tower(options):
    """Of one number of images, and of any; none of them is made anew at later calls."""
    counts = []
    for model in (small_clip(), adapted(small_clip())):
        torch._dynamo.reset()
        compiled: Any = torch.compile(model.visual, backend=(graphs := Graphs()), **options)
        for n in (4, 3, 6, 4, 5, 3):
            compiled(IMAGES[:1].expand(n, -1, -1, -1)).sum()
        counts.append(graphs.count)
    assert counts == [2, 2]


def test_a_model_adapted_by_a_regular_expression_compiles_as_the_plain_one():
    model = adapted(Branches(), target_modules="left|right", subspace_k=2)
    x = torch.linspace(-1, 1, 8).view(2, 4)
    expected = results(model, lambda model: torch.cat(model(x)))
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=(graphs := Graphs()), fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(results(model, lambda _: torch.cat(compiled(x))), expected)
    assert graphs.count == 1
    compiled(x, only="right")
    assert graphs.count == 2


# Torch's compiler looks at `.grad` of whatever goes into a graph, and hides the warning of it, but not from pytest.
INNER_GRAPH = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@INNER_GRAPH
def test_compiled_in_parts():
    """Where the compiler cannot go on, what was folded must pass from one graph to the next."""
    model = adapted(small_clip())
    expected = results(model, images)
    model.visual.transformer.resblocks[1].mlp.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    torch._dynamo.reset()
    compiled: Any = torch.compile(model.visual, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(results(model, lambda _: compiled(IMAGES)), expected)


@INNER_GRAPH
def test_a_compiled_block_in_a_tower_that_is_not_compiled(no_recompilation):
    model = adapted(small_clip())
    expected = results(model, images)
    model.visual.transformer.resblocks[1].compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(results(model, images), expected)


# ---- copies, failures, threads


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save])
def test_a_copy_folds_its_own_factors_also_when_it_is_made_in_a_forward_pass(copied, folds):
    model = adapted(small_clip())
    copies = [copied(model)]
    handle = model.visual.transformer.register_forward_hook(lambda *_: copies.append(copied(plain_hooks(model))))
    images(model)
    handle.remove()
    for twin in copies:
        with torch.no_grad():
            for factor in ck.adapter_parameters(twin):
                factor.mul_(2)
        folds.clear()
        ours = results(twin, images)
        assert len(folds) == 1
        assert all(any(A is factor for factor in ck.adapter_parameters(twin)) for A in folds[0])
        assert same(ours, results(twin, layer_by_layer(images)))


def plain_hooks(model: Any) -> Any:
    """Without the hook that copies, which no pickle takes."""
    model.visual.transformer._forward_hooks.clear()
    return model


def raising(error: BaseException) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        raise error

    return hook


def test_a_forward_pass_that_fails_leaves_nothing():
    model = adapted(small_clip())
    expected = results(model, images)
    handle = model.visual.transformer.resblocks[1].register_forward_pre_hook(raising(RuntimeError("in the middle")))
    with pytest.raises(RuntimeError, match="in the middle"):
        images(model)
    handle.remove()
    assert same(results(model, images), expected)


@pytest.mark.parametrize("change", ["factors", "base weights"])
def test_an_interrupt_leaves_nothing_that_could_be_taken_for_a_fold_of_later_factors(change):
    model = adapted(small_clip(), target_modules=("fc1",))
    layer = model.visual.transformer.resblocks[0].mlp.c_fc
    handle = model.visual.transformer.resblocks[1].register_forward_pre_hook(raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        images(model)
    handle.remove()
    if change == "factors":
        with torch.no_grad():
            layer.lora_B.mul_(2)
    else:
        model.load_state_dict(small_clip(seed=7).state_dict())
    x = torch.ones(2, 32)
    assert torch.equal(layer(x), layer_by_layer(lambda layer: layer(x))(layer))
    copy.deepcopy(model)
    assert same(results(model, images), results(model, layer_by_layer(images)))


def test_an_interrupt_at_any_line_leaves_no_scope():
    model = adapted(small_clip(layers=1), target_modules=("fc1",))
    layer, x = model.visual.transformer.resblocks[0].mlp.c_fc, torch.ones(2, 32)

    def interrupted_at(line: int) -> bool:
        """Interrupts a pass at a line of the scope's own code, by its number of all that are reached."""
        lines = itertools.count()

        def reached(frame: Any, event: str, _: Any) -> Any:
            if event == "line" and next(lines) == line:
                raise KeyboardInterrupt
            return reached

        outer = sys.gettrace()
        sys.settrace(lambda frame, *_: reached if frame.f_code.co_filename == forward_scope.__file__ else None)
        try:
            images(model)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(outer)
        return False

    line = 0
    while interrupted_at(line):
        line += 1
        with torch.no_grad():
            layer.lora_B.add_(1)
        assert torch.equal(layer(x), layer_by_layer(lambda layer: layer(x))(layer)), line
        assert not forward_scope.RUNNING.scopes
    assert line > 50


def replica(module: nn.Module) -> Any:
    """As `nn.DataParallel` makes them, for each device and call: parameters are plain attributes, hooks are shared."""
    twin = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else replica(child)
    for name, parameter in module._parameters.items():
        setattr(twin, name, None if parameter is None else parameter.clone())
    return twin


def test_replicas_fold_their_own_factors(folds):
    model = adapted(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), target_modules=".*", subspace_k=2)
    x = torch.ones(2, 4)
    ours = results(model, lambda model: replica(model)(x))
    assert len(folds) == 1
    assert all(A is not factor for A in folds[0] for factor in ck.adapter_parameters(model))
    assert same(ours, results(model, layer_by_layer(lambda model: model(x))))


def test_threads_have_folds_of_their_own():
    model = adapted(small_clip(), target_modules=ALL)
    expected = images(model).detach()
    barrier, outputs = threading.Barrier(2), []

    def meet(*_: Any) -> None:
        barrier.wait(60)

    model.visual.transformer.resblocks[0].register_forward_hook(meet)
    threads = [threading.Thread(target=lambda: outputs.append(images(model))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [fold_nodes(output) for output in outputs] == [1, 1]
    assert all(torch.equal(output, expected) for output in outputs)
