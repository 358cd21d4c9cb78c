"""The last block at the one position that is read: the features and gradients of a block at all positions."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from numerics import EPS
from open_clip import model as open_clip_model
from small_clip import (
    adapted,
    assert_close,
    compute_every_position,
    random_texts,
    sequence_first,
    small_clip,
    small_clip_4,
    with_text_module,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import complora_kernels as ck
from complora_kernels.integrations import open_clip
from complora_kernels.modules import block, forward_scope

ALL = ("q", "k", "v", "o", "fc1", "fc2")
N, PATCHES, CONTEXT, D, EOT = 3, 4, 20, 32, 19  # EOT: the largest id of the small models
EXACT = 1e-12  # in float64: the same sums, in another order


clip = partial(small_clip, context_length=CONTEXT)
texts = partial(random_texts, context=CONTEXT)

LAYOUTS: dict[str, Callable[[], Any]] = {
    "open_clip 3": clip,
    "open_clip 3, sequence first": partial(sequence_first, context_length=CONTEXT),
    "open_clip 3, CustomTextCLIP": partial(
        with_text_module, context_length=CONTEXT, vision={"final_ln_after_pool": True}, pool_type="eos", eos_id=EOT
    ),
    "open_clip 4": partial(small_clip_4, context_length=CONTEXT),
}
every_layout = pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(N, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)


def encode(model: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.cat([model.encode_image(images(dtype)), model.encode_text(texts(1, 6, 11))])


def results(model: Any, run: Callable[[Any], Tensor] = encode) -> list[Tensor]:
    """What `run` gives, and the gradients of all factors as one vector."""
    model.zero_grad()
    output = run(model)
    (output.float() * torch.arange(output.numel()).view_as(output).cos()).sum().backward()
    grads = [factor.grad for factor in ck.adapter_parameters(model) if factor.grad is not None]
    return [output.detach(), torch.cat([grad.flatten() for grad in grads])]


@pytest.fixture
def positions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each call of a block's second half, at how many positions of a sequence it was computed."""
    seen: list[int] = []
    original = block.norm_lora_mlp

    def observed(stream: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(stream.numel() // (N * D))
        return original(stream, *args, **options)

    monkeypatch.setattr(block, "norm_lora_mlp", observed)
    return seen


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert forward_scope.current_reading() is None


# ---- the same features and gradients, from one position


def assert_as_at_all_positions(model: Any, positions: list[int], patch: pytest.MonkeyPatch) -> None:
    ours = results(model)
    assert positions == [PATCHES + 1, 1, 16, 1]
    compute_every_position(patch)
    for a, b in zip(ours, results(model), strict=True):
        assert_close(a, b, EXACT)
    assert positions[4:] == [PATCHES + 1, PATCHES + 1, 16, 16]


@pytest.mark.parametrize("backend", ["torch", "extension"])
@every_layout
def test_features_and_gradients_of_all_positions(make, backend, positions, monkeypatch):
    monkeypatch.setenv("COMPLORA_BACKEND", backend)
    assert_as_at_all_positions(adapted(make().double(), target_modules=ALL), positions, monkeypatch)


@pytest.mark.parametrize(
    ("make", "dtype"), [(clip, torch.float32), (LAYOUTS["open_clip 3, sequence first"], torch.bfloat16)]
)
def test_by_the_kernels(make, dtype, positions, monkeypatch):
    """As accurate as at all positions: one more rounding of the stream is all that differs."""
    model = adapted(make(), target_modules=ALL)
    exact, model = copy.deepcopy(model).double(), model.to(dtype)
    exact.load_state_dict(model.state_dict())
    monkeypatch.setenv("COMPLORA_BACKEND", "triton")
    ours = results(model, lambda model: encode(model, dtype))
    assert positions == [PATCHES + 1, 1, 16, 1]
    compute_every_position(monkeypatch)
    theirs = results(model, lambda model: encode(model, dtype))
    monkeypatch.setenv("COMPLORA_BACKEND", "reference")
    truth = results(exact, lambda model: encode(model, torch.float64))
    for a, b, true in zip(ours, theirs, truth, strict=True):
        error, other = ((result.double() - true).norm() for result in (a, b))
        assert error <= 2 * other + EPS[dtype] * true.norm()


@pytest.mark.parametrize("targets", [("q",), ("k", "v"), ("v", "o"), ("fc2",)], ids="-".join)
def test_some_targets(targets, positions, monkeypatch):
    assert_as_at_all_positions(adapted(clip().double(), target_modules=targets), positions, monkeypatch)


@every_layout
def test_features_of_a_plain_model_that_holds_the_update(make, positions):
    plain = make().double()
    model = adapted(copy.deepcopy(plain), target_modules=ALL)
    ours = encode(model)
    assert positions == [PATCHES + 1, 1, 16, 1]
    ck.merge_adapter(model)
    assert_close(ours, encode(model), EXACT)
    assert len(positions) == 4  # a merged model is a plain one


def test_a_mask_of_another_kind(positions):
    """Each text's row of it, whatever is in it."""
    model = adapted(clip().double(), target_modules=ALL)
    model.attn_mask[5] = torch.linspace(-3, 3, CONTEXT)
    ours = model.encode_text(texts(6, 6, 2))
    assert positions == [CONTEXT, 1]
    model.ln_final.register_forward_hook(lambda *_: None)
    assert_close(ours, model.encode_text(texts(6, 6, 2)), EXACT)
    assert positions[2:] == [CONTEXT, CONTEXT]


def test_dropout_is_drawn_and_scaled():
    """In the mean over many masks the features are those without dropout, to first order in small updates."""
    model = adapted(clip().double(), target_modules=ALL, layers=(1,), lora_dropout=0.5)
    with torch.no_grad():
        for parameter in ck.adapter_parameters(model):
            parameter.mul_(0.1)
        expected = model.eval().encode_image(images())
        draws = torch.stack([model.train().encode_image(images()) for _ in range(400)])
    spread = draws.std(0).norm() / 20  # standard deviation of the mean
    assert spread > 0
    assert (draws.mean(0) - expected).norm() < 4 * spread


def test_what_the_last_block_saves():
    """x, k and v of all positions: 3 units of a stream instead of 10."""
    many = 64  # images: activations are larger than weights
    model = adapted(small_clip(), target_modules=ALL, towers=("image",))
    unit, sizes = many * (PATCHES + 1) * D * 4, []
    for _ in range(2):
        tensors: dict[int, Tensor] = {}

        def pack(tensor: Tensor, tensors: dict[int, Tensor] = tensors) -> Tensor:
            tensors[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = model.encode_image(torch.randn(many, 3, 16, 16))
        large = [t.untyped_storage().nbytes() for t in tensors.values() if t.untyped_storage().nbytes() >= unit]
        sizes.append(sum(large) / unit)
        assert features.requires_grad
        model.visual.ln_post.register_forward_hook(lambda *_: None)
    assert sizes == [10 + 3, 10 + 10 + 1]  # the norm behind the transformer keeps its input


# ---- where somebody sees the other positions


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ["transformer.resblocks.1", "transformer", "ln_post", "ln_pre"])
def test_hooks_of_an_image_tower(name, backward, positions):
    model, x = adapted(clip().double(), target_modules=ALL), images().requires_grad_()
    expected = model.encode_image(x)
    module, seen = model.visual.get_submodule(name), []
    if backward:
        handle = module.register_full_backward_hook(lambda _module, _in, grads: seen.append(grads[0].shape))
    else:
        handle = module.register_forward_hook(lambda _module, _args, y: seen.append(y.shape))
    features = model.encode_image(x)
    features.sum().backward()
    assert_close(features, expected, EXACT)
    assert positions[3] == (1 if name == "ln_pre" else PATCHES + 1)
    assert seen == [(N, PATCHES + 1, D)]
    handle.remove()
    assert torch.equal(model.encode_image(x), expected)
    assert positions[5] == 1


@pytest.mark.parametrize("name", ["transformer.resblocks.1", "transformer", "ln_final"])
def test_hooks_of_a_text_tower(name, positions):
    model = adapted(clip().double(), target_modules=ALL)
    seen: list[Any] = []
    expected = model.encode_text(texts(1, 6, 11))
    model.get_submodule(name).register_forward_hook(lambda _module, _args, y: seen.append(y))
    assert_close(model.encode_text(texts(1, 6, 11)), expected, EXACT)
    assert positions == [16, 1, 16, 16]
    assert seen[0].shape == (N, 16, D)
    assert not torch.equal(seen[0][:, 0], seen[0][:, 1])


def test_a_forward_method_on_top(positions):
    model = adapted(clip().double(), target_modules=ALL)
    norm = model.visual.ln_post
    norm.forward = lambda x: F.layer_norm(x.sum(1, keepdim=True).expand_as(x), (D,))
    model.encode_image(images())
    assert positions[-1] == PATCHES + 1


@every_layout
def test_intermediate_features(make, positions):
    model = adapted(make().double(), target_modules=ALL)
    if not hasattr(model.visual, "forward_intermediates"):
        model.visual.transformer(torch.randn(N, PATCHES + 1, D).double())
    else:
        found = model.visual.forward_intermediates(images(), output_fmt="NLC")
        assert found["image_intermediates"][-1].shape == (N, PATCHES, D)
    assert positions == [PATCHES + 1, PATCHES + 1]


@pytest.mark.parametrize("options", [{"pool_type": "avg"}, {"pool_type": "none"}, {"output_tokens": True}])
def test_towers_that_read_other_positions(options, positions):
    model = adapted(clip().double(), target_modules=ALL)
    expected = model.visual(images())
    for name, value in options.items():
        setattr(model.visual, name, value)
    found = model.visual(images())
    assert positions[2:] == [PATCHES + 1, PATCHES + 1]
    if "output_tokens" in options:
        assert_close(found[0], expected, EXACT)
        assert found[1].shape == (N, PATCHES, D)
    plain = clip().double()
    for name, value in options.items():
        setattr(plain.visual, name, value)
    positions.clear()
    adapted(plain, target_modules=ALL).visual(images())
    assert positions == [PATCHES + 1, PATCHES + 1]


def own_pool(model: Any) -> None:
    model.visual._global_pool = lambda x: (x[:, 1:].mean(1), x)


def own_tower(model: Any) -> None:
    class MeanTower(type(model.visual)):
        def _pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.ln_post(x[:, 0] + x.mean(1)), x

    model.visual.__class__ = MeanTower


def own_norm(model: Any) -> None:
    class Mixer(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input - input.mean(1, keepdim=True))

    model.visual.ln_post.__class__ = Mixer


def shared_blocks(model: Any) -> None:
    model.visual.transformer.resblocks[0] = model.visual.transformer.resblocks[1]


@pytest.mark.parametrize("change", [own_pool, own_tower, own_norm, shared_blocks])
def test_image_towers_of_another_kind(change, positions):
    plain = clip().double()
    change(plain)
    model = adapted(copy.deepcopy(plain), target_modules=ALL)
    ours = model.encode_image(images())
    assert positions == [PATCHES + 1] * 2
    ck.merge_adapter(model)
    assert_close(ours, model.encode_image(images()), EXACT)


def test_a_text_tower_of_another_kind(positions):
    class MeanCLIP(open_clip_model.CLIP):
        def encode_text(self: Any, text: Tensor, normalize: bool = False) -> Tensor:
            x = self.token_embedding(text) + self.positional_embedding
            return self.ln_final(self.transformer(x, attn_mask=self.attn_mask)).mean(1)

    plain = clip()
    plain.__class__ = MeanCLIP
    adapted(plain, target_modules=ALL).encode_text(texts(1, 6, 11))
    assert positions == [CONTEXT, CONTEXT]


def test_an_attention_pool(positions):
    plain = with_text_module(context_length=CONTEXT, vision={"attentional_pool": True, "attn_pooler_heads": 2})
    adapted(plain, target_modules=ALL).encode_image(images(torch.float32))
    assert positions == [PATCHES + 1] * 2


@pytest.mark.parametrize("hook", [{}.setdefault, partial(lambda *_: None, 1)], ids=["builtin", "partial"])
def test_hooks_of_any_kind(hook, positions):
    model = adapted(clip().double(), target_modules=ALL)
    model.visual.ln_post.register_forward_pre_hook(hook)
    model.encode_image(images())
    assert positions == [PATCHES + 1] * 2


def test_a_checkpointed_transformer(positions):
    """By torch's own wrapper, which runs it again where the tower has ended."""
    model = adapted(clip().double(), target_modules=ALL)
    expected = results(model)
    for holder in (model, model.visual):
        holder.transformer = checkpoint_wrapper(holder.transformer)
    for a, b in zip(results(model), expected, strict=True):
        assert_close(a, b, EXACT)
    assert positions[4:8] == [PATCHES + 1, PATCHES + 1, CONTEXT, CONTEXT]


@every_layout
def test_checkpointing(make, positions):
    model = adapted(make().double(), target_modules=ALL)
    expected = results(model)
    model.set_grad_checkpointing(True)
    for a, b in zip(results(model), expected, strict=True):
        assert_close(a, b, EXACT)
    assert positions[4:8] == [PATCHES + 1, PATCHES + 1, 16, 16]


def test_checkpointing_of_a_whole_tower():
    """It runs the tower again, and with it what is asked of the last block."""
    model = adapted(clip().double(), target_modules=ALL)
    expected = results(model, lambda model: model.visual(images()))
    run: Any = checkpoint
    again = results(model, lambda model: run(model.visual, images(), use_reentrant=False))
    for a, b in zip(again, expected, strict=True):
        assert torch.equal(a, b)


def test_compiled_and_traced(positions):
    model = adapted(clip(), target_modules=ALL)
    expected = model.visual(images(torch.float32))
    compiled: Any = torch.compile(model.visual, backend="eager", fullgraph=True)
    assert_close(compiled(images(torch.float32)), expected, 1e-5)
    with torch.no_grad():
        exported = torch.export.export(model.visual, (images(torch.float32),)).module()
    assert_close(exported(images(torch.float32)), expected, 1e-5)
    assert positions == [PATCHES + 1, 1]


def test_a_transformer_that_is_called_with_something_else(positions):
    """Learned prompts before the tokens: sequences of another length than the texts."""
    model = adapted(clip().double(), target_modules=ALL)
    transformer = model.transformer.forward
    model.transformer.forward = lambda x, attn_mask: transformer(torch.cat([x, x[:, :1]], 1), attn_mask=None)[:, :-1]
    model.encode_text(texts(20, 20, 20))
    assert positions == [CONTEXT + 1, CONTEXT + 1]


def test_another_block_put_last(positions):
    model = adapted(clip().double(), target_modules=ALL)
    del model.visual.transformer.resblocks[1]
    model.encode_image(images())
    assert positions == [1]


def test_another_number_of_texts(positions):
    model = adapted(clip().double(), target_modules=ALL)
    transformer = model.transformer.forward
    model.transformer.forward = lambda x, attn_mask: transformer(torch.cat([x, x]), attn_mask=attn_mask)[:N]
    model.encode_text(texts(20, 20, 20))
    assert positions == [2 * CONTEXT, 2 * CONTEXT]


# ---- state


def test_other_threads_see_nothing(positions):
    model = adapted(clip().double(), target_modules=ALL)

    def run_on_another_thread() -> None:
        thread = threading.Thread(target=model.visual.transformer, args=(torch.randn(N, PATCHES + 1, D).double(),))
        thread.start()
        thread.join()

    forward_scope.run_in_scope({}, model.visual._reading_of_scope(), run_on_another_thread)
    assert positions == [PATCHES + 1] * 2


def test_a_failed_pass_leaves_nothing(monkeypatch):
    model = adapted(clip().double(), target_modules=ALL)

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(block, "norm_lora_mlp", fail)
        for run in (lambda: model.encode_image(images()), lambda: model.encode_text(texts(3, 3, 3))):
            with pytest.raises(KeyboardInterrupt):
                run()
            assert forward_scope.current_reading() is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(duplicate, positions):
    model = adapted(clip().double(), target_modules=ALL)
    copied = duplicate(model)
    assert isinstance(copied.visual, type(clip().visual))
    assert torch.equal(encode(copied), encode(model))
    assert positions == [PATCHES + 1, 1, 16, 1] * 2


def test_one_tower_alone(positions):
    """What is not adapted keeps its own blocks, which compute all positions."""
    model = adapted(clip().double(), towers=("text",))
    assert_close(model.encode_image(images()), clip().double().encode_image(images()), EXACT)
    assert positions == []
    model.encode_text(texts(1, 6, 11))
    assert positions == [16, 1]


def test_modules_that_are_no_transformer():
    class Other(nn.Module):
        pass

    for attributes in ({}, {"pool_type": "tok"}, {"pool_type": "tok", "transformer": nn.Linear(1, 1)}):
        other = Other()
        for name, value in attributes.items():
            setattr(other, name, value)
        assert open_clip.last_image_block(other) is None
