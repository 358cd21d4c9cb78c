"""The loss that keeps the frozen model's similarities: its formula, what it leaves alone, and that it keeps them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers_clip
from cuda_graph_on_cpu import CUDAGraphsOnCPU, cuda_graphs_on_cpu
from failures import Unchanged
from small_clip import adapted, assert_close, random_texts, small_clip
from tiny_models import expected_delta
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.fewshot import glyphs
from complora_kernels.fewshot.datasets import choose_split, load_dataset
from complora_kernels.modules import truncation

CONTEXT, V, B = 24, 7, 3
EXACT = 1e-11  # in float64: the same sums in another order, times τ = 14


def vocabulary() -> Tensor:  # [V, CONTEXT]
    return random_texts(3, 9, 4, 6, 5, 8, 7, context=CONTEXT)


def pixels(number: int = B, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 3, 16, 16, generator=generator, dtype=torch.float64)


def clip() -> Any:
    return small_clip(context_length=CONTEXT).double()


def own_formula(plain: Any, model: Any, texts: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients by the factors: weights W + ΔW in the plain model, and a sum term by term."""
    factors, weights = [], {}
    for path, layer in adapted_layers(model).items():
        packed: Any = plain.get_submodule(path).in_proj_weight
        deltas = []
        for name, weight in zip("qkv", packed.chunk(3), strict=True):
            A, B = (factor.detach().double().requires_grad_() for factor in layer.factors(name))
            factors += [A, B]
            deltas.append(expected_delta(weight, A, B, layer.config, 20))
        weights[f"{path}.in_proj_weight"] = packed + torch.cat(deltas)
    f, v, _ = functional_call(plain, weights, (pixels(), texts))  # normalised
    f0, v0, scale = plain(pixels(), texts)
    total = torch.zeros((), dtype=torch.float64)
    for x in range(len(f)):
        p, q = (torch.exp(scale * similarity) for similarity in (v0 @ f0[x], v @ f[x]))
        p, q = p / p.sum(), q / q.sum()
        total = total + (p.detach() * (p.detach().log() - q.log())).sum()
    loss = total / len(f)
    return loss.detach(), list(torch.autograd.grad(loss, factors))


def factors_of(model: Any) -> list[nn.Parameter]:
    return [f for layer in adapted_layers(model).values() for name in "qkv" for f in layer.factors(name)]


@pytest.mark.parametrize("reused", [False, True], ids=["features computed", "features given"])
@pytest.mark.parametrize("sides", ["none", "both"])
@pytest.mark.parametrize("names", [None, [4, 0, 5]], ids=["all names", "some names"])
def test_value_and_gradients_are_those_of_the_formula(sides, names, reused):
    plain = clip()
    model = adapted(copy.deepcopy(plain), sides=sides, lora_dropout=0.0).train()
    texts = vocabulary()
    expected, grads = own_formula(plain, model, texts if names is None else texts[names])
    assert expected > 0.1  # far from the start

    preservation = ck.PreservationLoss(model, texts)
    given: dict[str, Any] = {}
    if reused:
        given = {"image_features": model.encode_image(pixels())}
        given["frozen_image_features"] = plain.encode_image(pixels()).detach()
    chosen = None if names is None else torch.tensor(names)
    loss = preservation(None if reused else pixels(), names=chosen, **given)
    loss.backward()
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    assert_close(loss, expected, EXACT)
    for factor, grad in zip(factors_of(model), grads, strict=True):
        assert factor.grad is not None
        # The factors and their gradients are float32.
        assert_close(factor.grad.double(), grad, 1e-5)


def test_the_frozen_side_is_the_plain_model():
    plain = clip()
    model = adapted(copy.deepcopy(plain), lora_dropout=0.5).train()
    preservation = ck.PreservationLoss(model, vocabulary())
    assert_close(preservation.frozen_text_features, plain.encode_text(vocabulary()), EXACT)
    assert_close(preservation.frozen_image_features(pixels()), plain.encode_image(pixels()), EXACT)
    assert not preservation.frozen_text_features.requires_grad
    assert not preservation.frozen_image_features(pixels()).requires_grad


def test_nothing_is_lost_at_the_start():
    model = ck.apply_complora(clip(), ck.CompLoRAConfig(r=2, sides="none"), progress=False).train()
    for sample in (None, 3):
        loss = ck.PreservationLoss(model, vocabulary(), sample=sample)(pixels())
        loss.backward()
        assert 0 <= loss.item() + 1e-15 < 1e-12  # rounding
        assert all(factor.grad is not None and factor.grad.abs().max() < 1e-7 for factor in factors_of(model))


def test_a_model_of_transformers_with_texts():
    model = transformers_clip.transformers_clip().double()
    ck.apply_complora(model, ck.CompLoRAConfig(r=2, sides="none"), progress=False)
    with torch.no_grad():
        for parameter in ck.adapter_parameters(model):
            parameter.normal_(std=0.3)
    words = dict(zip("abcd", random_texts(3, 4, 5, 6, context=6), strict=True))
    tokenize = lambda texts: torch.stack([words[text] for text in texts])
    preservation = ck.PreservationLoss(model, ["a", "b", "c"], tokenize=tokenize, new_classes=["d"])

    def similarities() -> Tensor:
        f = model.get_image_features(pixels()).pooler_output
        v = model.get_text_features(tokenize("abc")).pooler_output
        return model.logit_scale.exp() * F.normalize(f, dim=-1) @ F.normalize(v, dim=-1).T

    with ck.disable_adapter(model), torch.no_grad():
        p = similarities().softmax(-1)
    expected = (p * (p.log() - similarities().log_softmax(-1))).sum(-1).mean()
    assert expected > 1e-3
    assert_close(preservation(pixels()), expected, EXACT)


def test_a_model_with_methods_of_its_own():
    model = adapted(clip())
    expected = ck.PreservationLoss(model, vocabulary())(pixels())
    inner: Any = nn.Module()
    inner.clip = model
    with pytest.raises(ValueError, match=r"encode_image is None, and the model has no such method that is known"):
        ck.PreservationLoss(inner, vocabulary(), encode_text=model.encode_text, logit_scale=3.0)
    with pytest.raises(ValueError, match=r"encode_text is None"):
        ck.PreservationLoss(inner, vocabulary(), encode_image=model.encode_image, logit_scale=3.0)
    methods = {"encode_image": model.encode_image, "encode_text": model.encode_text}
    with pytest.raises(ValueError, match=r"logit_scale is None, and the model has none: expected the factor"):
        ck.PreservationLoss(inner, vocabulary(), **methods)
    scale = model.logit_scale.exp()
    assert_close(ck.PreservationLoss(inner, vocabulary(), **methods, logit_scale=scale)(pixels()), expected, EXACT)


# ---- the names of a step


def test_drawn_names_are_those_of_the_generator_and_distinct():
    model = adapted(clip())
    before = torch.get_rng_state()
    make = lambda seed: ck.PreservationLoss(
        model, vocabulary(), sample=3, generator=torch.Generator().manual_seed(seed)
    )
    one, other, third = make(5), make(5), make(6)
    losses = [[each(pixels()).item() for _ in range(4)] for each in (one, other, third)]
    assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1]
    assert len({*losses[0], *losses[2]}) > 4
    draws: list[Any] = [one._drawn_names() for _ in range(700)]
    drawn = torch.stack(draws)  # [700, 3]
    assert all(len(row.unique()) == 3 for row in drawn)
    counts = drawn.flatten().bincount(minlength=V)
    # 300 expected of each name; the deviation is sqrt(700 · 3/7 · 4/7) = 13
    assert (counts - 300).abs().max() < 6 * 13


def test_a_text_tower_without_adapter_is_not_run_again(monkeypatch):
    plain = clip()
    model = adapted(copy.deepcopy(plain), towers=("image",))
    preservation = ck.PreservationLoss(model, vocabulary())
    f = F.normalize(model.encode_image(pixels()), dim=-1)
    f0, v0, scale = plain(pixels(), vocabulary())
    monkeypatch.setattr(model, "encode_text", None)
    loss = preservation(pixels())
    expected = F.kl_div((scale * f @ v0.T).log_softmax(-1), (scale * f0 @ v0.T).softmax(-1), reduction="batchmean")
    assert_close(loss, expected, EXACT)
    loss.backward()


def test_autocast_leaves_the_comparison_in_float32():
    model = adapted(small_clip(context_length=CONTEXT))
    preservation = ck.PreservationLoss(model, vocabulary())
    f, f0 = (torch.randn(B, 16, generator=torch.Generator().manual_seed(i)) for i in range(2))
    preservation._text_features = preservation.frozen_text_features  # so that nothing else is computed
    expected = preservation(None, f, frozen_image_features=f0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(preservation(None, f, frozen_image_features=f0), expected)


# ---- what it leaves alone


def test_model_modes_and_random_numbers_stay_as_they_were():
    model = adapted(clip(), lora_dropout=0.5).train()
    model.visual.ln_pre.eval()
    modes, before = [module.training for module in model.modules()], torch.get_rng_state()
    calls = iter(range(10))

    def stopped(tokens: Tensor) -> Tensor:
        if next(calls) == 1:  # in the frozen pass
            raise KeyboardInterrupt
        return model.encode_text(tokens)

    with Unchanged(model):
        ck.PreservationLoss(model, vocabulary()).frozen_image_features(pixels())
        with pytest.raises(KeyboardInterrupt):
            ck.PreservationLoss(model, vocabulary(), encode_text=stopped)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert all(layer.active for layer in adapted_layers(model).values())


def test_made_in_inference_mode_it_can_be_trained_with():
    model = adapted(clip())
    with torch.inference_mode():
        preservation = ck.PreservationLoss(model, vocabulary())
    preservation(pixels()).backward()
    assert all(factor.grad is not None for factor in factors_of(model))


# ---- one CUDA graph


def steps(graph: bool, *, drawn: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The losses and factors of five steps, with names that torch draws or that the batch holds."""
    model = adapted(small_clip(context_length=CONTEXT), lora_dropout=0.25).train()
    preservation = ck.PreservationLoss(model, vocabulary(), sample=4 if drawn else None)

    def loss(model: Any, images: Tensor, names: Tensor) -> Tensor:
        features = model.encode_image(images)
        return features.square().mean() + preservation(images, features, names=None if drawn else names)

    options: dict[str, Any] = {"lr": torch.tensor(1e-2), "capturable": True, "fused": True}
    optimizer = torch.optim.AdamW(ck.adapter_parameters(model), **options)
    batches = [(pixels(seed=i).float(), torch.randperm(V)[:4]) for i in range(5)]
    torch.manual_seed(3)
    step = ck.GraphedTrainStep(model, loss, optimizer, batches[0], graph=graph)
    return [step(*batch) for batch in batches], [p.detach().clone() for p in ck.adapter_parameters(model)]


@pytest.mark.parametrize("drawn", [False, True], ids=["names given", "names drawn"])
def test_steps_in_a_graph_are_those_without_bit_for_bit(drawn, monkeypatch):
    lengths: list[int] = []
    reads: list[int] = []
    find, read = truncation.find_reading, truncation._read_longest

    def observed_find(tower: Any, text: Tensor) -> Any:
        reading = find(tower, text)
        lengths.append(reading.length)
        return reading

    def observed_read(text: Tensor, eos_id: int | None) -> int:
        assert not CUDAGraphsOnCPU.capturing
        reads.append(len(text))
        return read(text, eos_id)

    monkeypatch.setattr(truncation, "find_reading", observed_find)
    monkeypatch.setattr(truncation, "_read_longest", observed_read)
    with cuda_graphs_on_cpu():
        runs = []
        for graph in (False, True):
            torch.manual_seed(1)
            runs.append(steps(graph, drawn=drawn))
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=0)
    assert reads == [1, V] * 2  # when the loss is made, the first text and the vocabulary; no step reads the device
    # That of the first text, and in steps that of the longest text: 9 tokens, rounded up, of 24.
    assert [length for length in lengths if length != 16] == [8] * 2


# ---- what is refused


WORDS = dict(zip("abcdefg", vocabulary(), strict=True))


def tokenize(texts: list[str]) -> Tensor:
    return torch.stack([WORDS[text.lower()] for text in texts])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocabulary": []}, r"vocabulary has 0 texts, expected at least 2 to compare"),
        ({"vocabulary": vocabulary()[:1]}, r"vocabulary has 1 text, expected at least 2"),
        ({"vocabulary": vocabulary()[[0, 3, 4, 3]]}, r"vocabulary: row 1 and row 3 are the same tokens"),
        ({"vocabulary": ["a", "b", "A"], "tokenize": tokenize}, r"vocabulary: 'a' and 'A' are the same tokens"),
        ({"vocabulary": ["a", "b"]}, r"tokenize=None with vocabulary and new_classes of str, expected texts with the"),
        ({"vocabulary": ["a", 3], "tokenize": tokenize}, r"new_classes of int and str, expected texts"),
        (
            {"vocabulary": ["a", "b"], "new_classes": ["c", "B"], "tokenize": tokenize},
            r"vocabulary: 'b' is the same tokens as 'B' of new_classes, expected names of things that are not to be",
        ),
        (
            {"vocabulary": vocabulary(), "new_classes": vocabulary()[[5]]},
            r"vocabulary: row 5 is the same tokens as row 0 of new_classes",
        ),
        ({"vocabulary": vocabulary(), "new_classes": ["a"]}, r"new_classes is list, expected tokens, int64 \[N, L\]"),
        (
            {"vocabulary": vocabulary(), "new_classes": vocabulary()[:1, :9]},
            r"new_classes has 9 tokens a text, expected 24 as in vocabulary",
        ),
        ({"vocabulary": vocabulary().double()}, r"vocabulary is torch.float64 \[7, 24\], expected tokens"),
        ({"vocabulary": vocabulary(), "sample": 8}, r"sample=8, expected 2 to 7, the names of vocabulary, or None"),
        ({"vocabulary": vocabulary(), "sample": 1}, r"sample=1, expected 2 to 7"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    model = adapted(clip()).train()
    with Unchanged(model), pytest.raises(ValueError, match=message):
        ck.PreservationLoss(model, **arguments)


def test_models_without_a_frozen_side_are_refused():
    with pytest.raises(ValueError, match=r"model has no Comp-LoRA adapter"):
        ck.PreservationLoss(clip(), vocabulary())
    model = adapted(clip())
    ck.merge_adapter(model)
    with pytest.raises(RuntimeError, match=r"merged: call unmerge_adapter first"):
        ck.PreservationLoss(model, vocabulary())


def test_modules_to_save_need_features_from_before_the_training():
    model = adapted(clip(), modules_to_save=("visual.ln_post",))
    preservation = ck.PreservationLoss(model, vocabulary())
    frozen = preservation.frozen_image_features(pixels())
    with pytest.raises(ValueError, match=r"frozen_image_features is None, and the model trains visual.ln_post.bias"):
        preservation(pixels())
    preservation(pixels(), frozen_image_features=frozen).backward()


def test_features_of_another_batch_are_refused():
    model = adapted(clip())
    preservation = ck.PreservationLoss(model, vocabulary())
    with pytest.raises(ValueError, match=r"image_features is \[2, 16\], expected \[3, 16\] as the frozen model's"):
        preservation(pixels(), model.encode_image(pixels(2)))


# ---- what it is for


def letters_named(seed: int, weight: float) -> float:
    """The share of thirteen letters that the bundled CLIP still names after it has learned digits by plain LoRA.

    The vocabulary are the thirteen other letters, on images of digits.
    """
    model, tokenizer, preprocess = glyphs.load_glyph_clip()
    prompts = lambda names: tokenizer([f"a drawing of the {name}." for name in names])
    digits = load_dataset("digits")
    shots = choose_split(digits, 4, seed).train
    images: Any = digits.images
    pixels, targets = preprocess(images[shots]), digits.labels[shots]  # [40, ...]
    torch.manual_seed(seed)
    ck.apply_complora(model, ck.CompLoRAConfig(r=8, lora_alpha=8.0, sides="none"), progress=False).train()
    classes, known = prompts(digits.class_names), prompts(f"letter {letter}" for letter in "abcdefghijklm")
    preservation = ck.PreservationLoss(model, known, new_classes=classes)
    frozen = preservation.frozen_image_features(pixels)
    optimizer = torch.optim.AdamW(ck.adapter_parameters(model), 3e-2)
    schedule, right = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40), []
    for _ in range(40):
        batch = torch.randperm(len(pixels))[:32]
        f, v = model.encode_image(pixels[batch], normalize=True), model.encode_text(classes, normalize=True)
        logits = 100 * f @ v.T
        loss = F.cross_entropy(logits, targets[batch])
        if weight:
            loss = loss + weight * preservation(None, f, frozen_image_features=frozen[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        right.append((logits.argmax(-1) == targets[batch]).float().mean())
    assert right[-1] > 0.9  # it has learned the digits
    letters, labels = glyphs.letter_test_set()
    return glyphs.zero_shot_accuracy(
        model.eval(), tokenizer, letters[labels >= 13], labels[labels >= 13], glyphs.LETTERS, "a drawing of {}."
    )


@pytest.mark.long
def test_it_keeps_what_plain_lora_forgets():
    plain, preserved = ([letters_named(seed, weight) for seed in range(2)] for weight in (0.0, 3.0))
    assert sum(preserved) / 2 > sum(plain) / 2 + 0.15, f"{preserved} with the loss, {plain} without"
