"""Texts truncated to the longest of their batch: the features and gradients of the whole context, from less."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import open_clip
import pytest
import torch
from numerics import assert_as_accurate_as_reference
from small_clip import adapted, assert_close, random_texts, sequence_first, small_clip, small_clip_4, with_text_module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import complora_kernels as ck
from complora_kernels.modules import forward_scope, truncation
from complora_kernels.modules.extend import own_class

CONTEXT, EOT = 77, 19  # the largest id of the small models
EXACT = 1e-12  # in float64: the same sums, in another order


clip = partial(small_clip, context_length=CONTEXT)
clip_4 = partial(small_clip_4, context_length=CONTEXT)
clip_with_text_module = partial(with_text_module, context_length=CONTEXT)
texts = partial(random_texts, context=CONTEXT)

LAYOUTS: dict[str, Callable[[], Any]] = {
    "open_clip 3": clip,
    "open_clip 3, sequence first": partial(sequence_first, context_length=CONTEXT),
    "open_clip 3, CustomTextCLIP": clip_with_text_module,
    "open_clip 4": clip_4,
}
every_layout = pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())


def text_transformer(model: Any) -> nn.Module:
    return model.text.transformer if hasattr(model, "text") else model.transformer


def whole(model: Any) -> Any:
    """A copy that computes the whole context: its text transformer has no scope."""
    model = copy.deepcopy(model)
    transformer: Any = text_transformer(model)
    transformer.__class__ = own_class(transformer)
    return model


def seen(model: Any, run: Callable[[], Any]) -> list[int]:
    """The numbers of positions that the text tower's transformer computed meanwhile."""
    lengths: list[int] = []
    handle = text_transformer(model).register_forward_hook(lambda _module, _args, y: lengths.append(y.shape[1]))
    run()
    handle.remove()
    return lengths


def results(model: Any, text: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The features of `text`, and the gradients of all factors of the text tower as one vector."""
    features = model.encode_text(text, **options)
    model.zero_grad()
    (features * torch.arange(features.numel()).view_as(features).cos()).sum().backward()
    factors = list(ck.adapter_parameters(model))
    grads = [factor.grad for factor in factors if factor.grad is not None]
    assert len(grads) == len(factors) // 2  # the other half belongs to the image tower
    return features.detach(), torch.cat([grad.flatten() for grad in grads])


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, EXACT)


def assert_truncated(model: Any, text: Tensor, length: int) -> None:
    """To this length, with the features of the whole context."""
    assert seen(model, lambda: model.encode_text(text)) == [length]
    assert_close(model.encode_text(text), whole(model).encode_text(text), EXACT)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert forward_scope.current_reading() is None


# ---- equal features, equal gradients, fewer positions


@pytest.mark.parametrize(("longest", "length"), [(1, 8), (7, 8), (8, 8), (9, 16), (72, 72), (73, 77), (77, 77)])
@every_layout
def test_features_and_gradients_of_the_whole_context(make, longest, length):
    model = adapted(make().double(), target_modules=("q", "k", "v", "o", "fc1", "fc2"))
    text = texts(1, longest, min(longest, 5))
    for normalize in (False, True):
        assert_same(results(model, text, normalize=normalize), results(whole(model), text, normalize=normalize))
    assert seen(model, lambda: model.encode_text(text)) == [length]


@every_layout
def test_features_of_a_plain_model_that_holds_the_update(make):
    plain = make().double()
    model = adapted(copy.deepcopy(plain))
    text = texts(5, 12)
    ours = model.encode_text(text)
    assert not torch.allclose(ours, plain.encode_text(text))
    ck.merge_adapter(model)
    assert_truncated(model, text, 16)
    assert not plain.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert_close(ours, plain.encode_text(text), EXACT)


@every_layout
def test_the_forward_pass_of_the_whole_model(make):
    model = adapted(make().double())
    images, text = torch.randn(2, 3, 16, 16, dtype=torch.float64), texts(3, 10)
    assert seen(model, lambda: model(images, text)) == [16]
    for ours, theirs in zip(model(images, text), whole(model)(images, text), strict=True):
        assert_close(ours, theirs, EXACT)


@every_layout
def test_a_frozen_text_tower(make):
    assert_truncated(adapted(make().double(), towers=("image",)), texts(3, 10), 16)


def test_layers_outside_the_towers():
    plain = clip()
    plain.ln_final = nn.Linear(32, 32)
    assert_truncated(adapted(plain.double(), target_modules=r".*c_fc|ln_final"), texts(3, 10), 16)


def test_a_disabled_adapter():
    plain = clip().double()
    model, text = adapted(copy.deepcopy(plain)), texts(3, 10)
    with ck.disable_adapter(model):
        assert seen(model, lambda: model.encode_text(text)) == [16]
        assert_close(model.encode_text(text), plain.encode_text(text), EXACT)


def test_int32_ids_and_texts_given_by_name():
    model, text = adapted(clip().double()), texts(3, 10)
    assert_truncated(model, text.int(), 16)
    assert seen(model, lambda: model.encode_text(text=text, normalize=True)) == [16]


def test_texts_shorter_than_the_context():
    model = adapted(clip_4().double())
    assert_truncated(model, texts(3, 10, context=20), 16)
    assert_truncated(model, texts(3, 18, context=20), 20)
    assert_truncated(model, texts(3, context=5), 5)


def test_no_texts():
    model = adapted(clip())
    assert model.encode_text(torch.empty(0, CONTEXT, dtype=torch.int64)).shape == (0, 16)


def test_what_open_clip_makes_of_a_sentence():
    """Padded with 0, and the end is the largest id of all."""
    model = adapted(small_clip(context_length=CONTEXT).double())
    model.token_embedding = nn.Embedding(49408, 32, dtype=torch.float64)
    text = open_clip.tokenize(["a photo of a cat.", "a photo of a dog, a type of pet."])
    assert text.argmax(-1).tolist() == [7, 12]
    assert_truncated(model, text, 16)


# ---- where a text ends


def test_the_first_of_several_largest_ids():
    text = texts(5)
    text[0, 40] = EOT
    assert_truncated(adapted(clip().double()), text, 8)


@pytest.mark.parametrize("make", [clip, clip_with_text_module])
def test_ends_by_their_own_id(make):
    model = make().double()
    if make is clip:
        model.text_pool_type, model.text_eos_id = "eos", 3
    else:
        model.text.pool_type, model.text.eos_id = "eos", 3
    model = adapted(model)
    text = torch.full((3, CONTEXT), EOT)
    text[:, 1::2] = 7
    assert_truncated(model, text, 8)  # no end at all: open_clip reads the first position
    text[0, 11] = text[0, 60] = 3
    assert_truncated(model, text, 16)
    text[1, 30] = 3
    assert_truncated(model, text, 32)


def test_a_write_to_the_texts_is_seen():
    model, text = adapted(clip().double()), texts(3, 10)
    assert_truncated(model, text, 16)
    text[1, 9] = 0
    text[1, 20] = EOT
    assert_truncated(model, text, 24)


# ---- models and calls that are left alone


NOT_TRUNCATED: dict[str, dict[str, Any]] = {
    "first": {"pool_type": "first"},
    "last": {"pool_type": "last"},
    "class token": {"embed_cls": True},
    "tokens": {"output_tokens": True},
    "no mask": {"no_causal_mask": True},
}


def first(features: Any) -> Tensor:
    return features[0] if isinstance(features, tuple) else features


@pytest.mark.parametrize("options", NOT_TRUNCATED.values(), ids=NOT_TRUNCATED.keys())
def test_towers_that_read_other_positions(options):
    plain = clip_with_text_module(**options).double()
    kind, text = type(plain), texts(3, 10)
    expected = first(plain.text(text))
    model = adapted(plain, towers=("image",))
    assert type(model) is kind
    assert seen(model, lambda: model.text(text)) == [CONTEXT + ("embed_cls" in options)]
    assert_close(first(model.text(text)), expected, EXACT)


@pytest.mark.parametrize("pool_type", ["first", "last", "none"])
def test_a_pooling_that_was_changed_later(pool_type):
    model, text = adapted(clip()), texts(3, 10)
    model.text_pool_type = pool_type
    assert seen(model, lambda: model.encode_text(text)) == [CONTEXT]
    assert torch.equal(model.encode_text(text), whole(model).encode_text(text))


def test_tokens_that_were_asked_for_later():
    model, text = adapted(clip_with_text_module()), texts(3, 10)
    model.text.output_tokens = True
    assert seen(model, lambda: model.text(text)) == [CONTEXT]
    with pytest.raises(AttributeError):  # open_clip's encode_text does not know what to do with them
        model.encode_text(text, normalize=True)


@every_layout
def test_a_mask_with_one_changed_element(make):
    model, text = adapted(make().double()), texts(3, 10)
    holder = model.text if hasattr(model, "text") else model
    before = model.encode_text(text)
    holder.attn_mask[3, 50] = 0
    assert seen(model, lambda: model.encode_text(text)) == [CONTEXT]
    assert torch.equal(model.encode_text(text), whole(model).encode_text(text))
    assert not torch.allclose(model.encode_text(text), before)
    holder.attn_mask[3, 50] = float("-inf")
    assert_truncated(model, text, 16)


class OtherMask(nn.Module):
    """A text tower that passes another mask than it keeps."""

    def __init__(self, transformer: nn.Module, mask: Tensor | None) -> None:
        super().__init__()
        self.transformer, self.mask = transformer, mask

    def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
        return self.transformer(x, attn_mask=self.mask)


@pytest.mark.parametrize("mask", [None, torch.zeros(CONTEXT, CONTEXT).double()])
def test_the_mask_that_is_passed_is_the_one_that_counts(mask):
    model, text = adapted(clip().double()), texts(3, 10)
    transformer = model.transformer
    model.transformer = OtherMask(transformer, mask)
    model.transformer.get_cast_dtype = transformer.get_cast_dtype
    lengths: list[int] = []
    transformer.register_forward_hook(lambda _module, _args, y: lengths.append(y.shape[1]))
    model.encode_text(text)
    assert lengths == [CONTEXT]


def test_calls_of_the_transformer_itself():
    """As with learned contexts, whose prompts have no ids."""
    model, text = adapted(clip()), texts(3, 10)
    x = torch.randn(2, CONTEXT, 32)
    run = lambda: model.transformer(x, attn_mask=model.attn_mask)
    assert seen(model, run) == [CONTEXT]
    assert torch.equal(run(), whole(model).transformer(x, attn_mask=model.attn_mask))
    (intermediate, *_) = model.forward_intermediates(text=text)["text_intermediates"]
    assert intermediate.shape[1] == CONTEXT


@pytest.mark.parametrize(("of_another_model", "texts_given"), [(False, 5), (True, 2)])
def test_other_calls_of_a_transformer_meanwhile(of_another_model, texts_given):
    model, text = adapted(clip()), texts(3, 10)
    other = adapted(clip()) if of_another_model else model
    lengths: list[int] = []

    def meanwhile(*_: Any) -> None:
        x = torch.randn(texts_given, CONTEXT, 32)
        lengths.extend(seen(other, lambda: other.transformer(x, attn_mask=other.attn_mask)))

    model.token_embedding.register_forward_hook(meanwhile)
    model.encode_text(text)
    assert lengths == [CONTEXT]


def test_a_model_without_a_text_tower():
    model = adapted(nn.Sequential(nn.Linear(4, 4)), target_modules=".*", subspace_k=2)
    assert not hasattr(model, "encode_text")


# ---- training


def test_autocast():
    """As near to float64 as the whole context is."""
    model, text = adapted(clip()), texts(3, 10)
    exact = whole(model).double().encode_text(text)
    with torch.autocast("cpu", torch.bfloat16):
        assert seen(model, lambda: model.encode_text(text)) == [16]
        ours, reference = model.encode_text(text), whole(model).encode_text(text)
    assert_as_accurate_as_reference(ours, reference, exact, "features")


@every_layout
def test_checkpointing(make):
    model, text = adapted(make().double()).train(), texts(3, 10)
    expected = results(whole(model), text)
    model.set_grad_checkpointing(True)
    assert seen(model, lambda: assert_same(results(model, text), expected)) == [16]


def test_the_whole_context_is_not_kept_for_the_backward_pass():
    model, text = adapted(clip(), towers=("image",)), texts(3, 10)
    model.positional_embedding.requires_grad_()  # so that the first norm keeps its input
    sizes: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        sizes.add(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.encode_text(text)
    assert 2 * 16 * 32 * 4 in sizes  # float32 [N, L, d]
    assert 2 * CONTEXT * 32 * 4 not in sizes


def test_dropout_has_the_same_distribution():
    model = adapted(clip().double(), lora_dropout=0.3).train()
    text = texts(6).expand(1000, -1)
    assert seen(model, lambda: model.encode_text(text)) == [8]
    with torch.no_grad():
        ours, theirs = model.encode_text(text), whole(model).encode_text(text)  # [1000, D], each row with its own masks
    assert not torch.equal(ours, theirs)
    deviation = ((ours.var(0) + theirs.var(0)) / len(ours)).sqrt()  # standard deviation of the difference of the means
    assert (ours.mean(0) - theirs.mean(0)).abs().le(4.5 * deviation).all()  # 16 numbers: fails once in 10000 seeds
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.2, atol=0)  # 0.2: six deviations, √(1 / 1000)


# ---- torch.compile and other tracers: the whole context


@pytest.mark.parametrize("make", [clip, clip_4])
def test_compiled_in_one_graph_for_all_lengths(make):
    model = adapted(make())
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled: Any = torch.compile(model.encode_text, backend="aot_eager", fullgraph=True)
        for text in (texts(3, 5), texts(3, 10), texts(3, 77)):
            torch.testing.assert_close(compiled(text), whole(model).encode_text(text))


def test_a_compiled_transformer():
    model, text = adapted(clip().double()), texts(3, 10)
    expected = model.encode_text(text)
    model.transformer.compile(backend="aot_eager", fullgraph=True)
    assert_close(model.encode_text(text), expected, EXACT)


def frozen_text_tower() -> Any:
    """Whose text tower is torch's own, so that every tracer knows all of it."""
    return adapted(clip(), towers=("image",))


def test_texts_without_values():
    model, text = frozen_text_tower(), texts(3, 10)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        assert model.encode_text(fake.from_tensor(text)).shape == (2, 16)
    assert model.to("meta").encode_text(text.to("meta")).shape == (2, 16)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_each_text_by_vmap():
    model, text = frozen_text_tower(), texts(3, 10)
    with torch.no_grad():
        ours = torch.func.vmap(lambda row: model.encode_text(row[None])[0])(text)
        torch.testing.assert_close(ours, model.encode_text(text))


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")  # torch's own attention warns too
def test_traced_for_any_text():
    model = frozen_text_tower()
    with torch.no_grad():
        traced: Any = torch.jit.trace_module(model, {"encode_text": (texts(3, 5),)})
        text = texts(3, 50)
        torch.testing.assert_close(traced.encode_text(text), model.encode_text(text))


# ---- ids on a device, which are read once


@pytest.fixture
def reads(monkeypatch) -> list[Tensor]:
    """The texts whose ends were read, where all texts count as being on a device."""
    read, original = [], truncation._read_longest

    def observed(text: Tensor, eos_id: int | None) -> int:
        read.append(text)
        return original(text, eos_id)

    monkeypatch.setattr(truncation, "is_on_device", lambda _text: True)
    monkeypatch.setattr(truncation, "_read_longest", observed)
    return read


def test_read_once_for_each_tensor_and_version(reads):
    model, text = adapted(clip().double()), texts(3, 10)
    for _ in range(3):
        assert_truncated(model, text, 16)
    assert len(reads) == 1
    text[1, 9] = 0
    text[1, 20] = EOT
    for _ in range(3):
        assert_truncated(model, text, 24)
    assert len(reads) == 2
    assert_truncated(model, text.clone(), 24)
    assert len(reads) == 3


def test_two_models_that_end_the_same_texts_differently(reads):
    model, other, text = adapted(clip().double()), clip().double(), texts(3, 10)
    other.text_pool_type, other.text_eos_id = "eos", 3
    other = adapted(other)
    text[text == 3] = 4
    text[0, 30] = 3
    for _ in range(2):
        assert_truncated(model, text, 16)
        assert_truncated(other, text, 32)


def test_a_write_in_inference_mode_is_seen(reads):
    model = adapted(clip())
    with torch.inference_mode():
        text = texts(3, 10)
        assert seen(model, lambda: model.encode_text(text)) == [16]
        text[1, 9] = 0
        text[1, 20] = EOT
        assert seen(model, lambda: model.encode_text(text)) == [24]


def test_a_cuda_graph_keeps_what_is_known(reads, monkeypatch):
    model, text = adapted(clip().double()), texts(3, 10)
    monkeypatch.setattr(truncation, "_is_capturing", lambda _text: True)
    assert_truncated(model, text, CONTEXT)
    moved = copy.deepcopy(model)  # whose mask was not seen yet
    assert not reads
    monkeypatch.undo()
    monkeypatch.setattr(truncation, "is_on_device", lambda _text: True)
    assert_truncated(model, text, 16)
    monkeypatch.setattr(truncation, "_is_capturing", lambda _text: True)
    assert_truncated(model, text, 16)
    assert_truncated(model, text.clone(), CONTEXT)
    assert seen(moved, lambda: moved.encode_text(text)) == [CONTEXT]


# ---- copies, nesting, failures, threads


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save])
@every_layout
def test_copies_truncate_their_own_texts(make, copied):
    model, text = adapted(make().double()), texts(3, 10)
    twin = copied(model)
    assert type(twin) is type(model)
    with torch.no_grad():
        for factor in ck.adapter_parameters(twin):
            factor.mul_(2)
    assert_truncated(twin, text, 16)
    assert_truncated(model, text, 16)
    assert not torch.allclose(twin.encode_text(text), model.encode_text(text))


def test_a_copy_made_in_the_middle_is_not_in_the_middle():
    model, text, copies = adapted(clip().double()), texts(3, 10), []

    def duplicate(*_: Any) -> None:
        handle.remove()
        copies.append(copy.deepcopy(model))

    handle = model.transformer.register_forward_pre_hook(duplicate)
    model.encode_text(text)
    (twin,) = copies
    x = torch.randn(2, CONTEXT, 32).double()
    assert seen(twin, lambda: twin.transformer(x, attn_mask=twin.attn_mask)) == [CONTEXT]
    assert_truncated(twin, texts(3, 20), 24)


def replica(module: nn.Module) -> Any:
    """As `nn.DataParallel` makes them, for each device and call: parameters are plain attributes, hooks are shared."""
    twin = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else replica(child)
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        setattr(twin, name, None if tensor is None else tensor.detach().clone())
    return twin


@every_layout
def test_replicas(make):
    model, text = adapted(make().double()), texts(3, 10)
    twin = replica(model)
    assert seen(model, lambda: twin.encode_text(text)) == [16]
    assert_close(twin.encode_text(text), whole(model).encode_text(text), EXACT)


def test_nested_and_interleaved_calls_each_have_their_length():
    model, other = adapted(clip().double()), adapted(clip().double(), seed=2)
    short, middle, long = texts(3, 5), texts(3, 30), texts(3, 77)
    expected = [whole(each).encode_text(text) for each in (model, other) for text in (short, middle, long)]
    inner: list[Tensor] = []

    def more(*_: Any) -> None:
        handle.remove()
        inner.extend(each.encode_text(text) for each in (model, other) for text in (middle, long))

    handle = model.token_embedding.register_forward_hook(more)
    lengths = seen(model, lambda: inner.append(model.encode_text(short)))
    assert lengths == [32, CONTEXT, 8]
    for ours, theirs in zip(inner, (expected[i] for i in (1, 2, 4, 5, 0)), strict=True):
        assert_close(ours, theirs, EXACT)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(error):
    model = adapted(clip().double())

    def fail(*_: Any) -> None:
        raise error("in the middle")

    handle = model.transformer.resblocks[1].register_forward_pre_hook(fail)
    with pytest.raises(error, match="in the middle"):
        model.encode_text(texts(3, 10))
    handle.remove()
    assert_truncated(model, texts(3, 20), 24)


def test_threads_have_lengths_of_their_own():
    model, batches = adapted(clip().double()), [texts(3, 5), texts(3, 30)]
    expected = [model.encode_text(text) for text in batches]
    barrier, outputs = threading.Barrier(2), {}

    def meet(*_: Any) -> None:
        barrier.wait(60)

    model.token_embedding.register_forward_hook(meet)
    threads = [threading.Thread(target=lambda i=i: outputs.update({i: model.encode_text(batches[i])})) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(outputs[i], expected[i]) for i in (0, 1))
