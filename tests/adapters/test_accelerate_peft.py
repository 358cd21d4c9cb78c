"""A model of PEFT on this package's kernels: the same numbers and the same calls, and undone exactly."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from numerics import assert_as_accurate_as_reference
from peft_adapters import peft_model
from torch import nn

import complora_kernels as ck
from complora_kernels import functional
from complora_kernels.modules.peft_linear import AcceleratedLinear

X = torch.linspace(-1, 1, 60).reshape(5, 12)


def plain(dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 7, bias=False)).to(dtype)


def in_peft(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return peft_model(plain(dtype), **({"r": 3, "lora_alpha": 6, "target_modules": ["0", "2"]} | options))


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """One entry for each product that this package's operation computes."""
    counted: list[int] = []
    lora_linear = functional.lora_linear

    def counting(*arguments: Any, **options: Any) -> Any:
        counted.append(1)
        return lora_linear(*arguments, **options)

    monkeypatch.setattr(functional, "lora_linear", counting)
    return counted


def results(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of x and of every factor."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.float().square().sum().backward()
    factors = [parameter.grad for name, parameter in model.named_parameters() if "lora_" in name]
    assert all(grad is not None for grad in factors)
    return [y.detach(), x.grad, *factors]  # type: ignore[list-item]


def trainable(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers_are_those_of_peft(calls, dtype, training):
    theirs = trainable(in_peft(dtype, use_rslora=True)).train(training)
    wide = copy.deepcopy(theirs).double()
    ours = ck.accelerate_peft(copy.deepcopy(theirs))
    rows = (results(model, X.to(kind)) for model, kind in ((ours, dtype), (theirs, dtype), (wide, torch.float64)))
    for number, (actual, reference, exact) in enumerate(zip(*rows, strict=True)):
        narrow = min(dtype, actual.dtype, key=lambda dtype: torch.finfo(dtype).bits)  # of the product or of the factors
        assert_as_accurate_as_reference(actual, reference, exact, f"result {number}", narrow)
    assert len(calls) == 2


def test_five_steps_of_training():
    models = [trainable(in_peft()), ck.accelerate_peft(trainable(in_peft()))]
    losses: list[list[float]] = [[], []]
    for model, own in zip(models, losses, strict=True):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(5):
            loss = model(X).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            own.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < 0.9 * losses[0][0]


def test_dropout_is_drawn_in_training_alone(calls):
    model = ck.accelerate_peft(trainable(in_peft(lora_dropout=0.5)))
    model.eval()
    torch.testing.assert_close(model(X), in_peft()(X))
    model.train()
    torch.manual_seed(0)
    outputs = torch.stack([model.base_model.model[0](X) for _ in range(2000)])
    torch.testing.assert_close(outputs.mean(0), in_peft().base_model.model[0](X), rtol=0, atol=0.1)  # five errors
    assert outputs.std(0).min() > 0.01
    assert len(calls) == 2002


def test_everything_but_the_forward_pass_stays(tmp_path):
    theirs, ours = in_peft(), in_peft()
    before = {name: (id(parameter), parameter.requires_grad) for name, parameter in ours.named_parameters()}
    assert ck.accelerate_peft(ours) is ours
    assert {name: (id(parameter), parameter.requires_grad) for name, parameter in ours.named_parameters()} == before
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert repr(ours) == repr(theirs)
    assert isinstance(ours.base_model.model[0], peft.tuners.lora.Linear)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours.save_pretrained(str(tmp_path / "ours"))
    for path in (tmp_path / "theirs").iterdir():
        assert path.read_bytes() == (tmp_path / "ours" / path.name).read_bytes()
    copied = pickle.loads(pickle.dumps(ours.base_model.model[0]))
    assert isinstance(copied, AcceleratedLinear)
    assert isinstance(copied, peft.tuners.lora.Linear)


def test_deceleration_gives_back_what_was_there():
    model = in_peft()
    before = [(module, type(module), vars(module).copy()) for module in model.modules()]
    ck.accelerate_peft(ck.accelerate_peft(model))
    assert ck.decelerate_peft(model) is model
    for module, (same, cls, attributes) in zip(model.modules(), before, strict=True):
        assert module is same
        assert type(module) is cls
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[name] is value for name, value in attributes.items())
    ck.decelerate_peft(model)
    assert torch.equal(model(X), in_peft()(X))


def test_the_calls_of_peft(calls):
    theirs, ours = in_peft(), ck.accelerate_peft(in_peft())

    def check(count: int) -> None:
        """Both compute the same, and this many of the two layers by our operation."""
        calls.clear()
        with torch.no_grad():
            torch.testing.assert_close(ours(X), theirs(X))
        assert len(calls) == count

    for model in (theirs, ours):
        model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=8, target_modules=["0"], init_lora_weights=False))
    ours.load_state_dict(theirs.state_dict())
    check(2)
    for model in (theirs, ours):
        model.set_adapter("other")
    check(1)
    for model in (theirs, ours):
        model.base_model.set_adapter(["default", "other"])
    check(1)  # the second layer has one of the two
    for model in (theirs, ours):
        model.set_adapter("default")
        model.base_model.model[0].scale_layer(0.5)
    check(2)
    with theirs.disable_adapter(), ours.disable_adapter():
        check(0)
    for model in (theirs, ours):
        model.merge_adapter()
    check(0)
    for model in (theirs, ours):
        model.unmerge_adapter()
    check(2)
    names = ["default", "__base__", "other", "default", "other"]
    torch.testing.assert_close(ours(X, adapter_names=names), theirs(X, adapter_names=names))
    for model in (theirs, ours):
        model.delete_adapter("other")
    check(2)
    expected = theirs(X)
    merged = ours.merge_and_unload()
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(X), expected)


def counted_hook(*_: Any) -> None:
    pass


OTHERS: dict[str, Any] = {
    "DoRA": lambda: in_peft(use_dora=True),
    "biases of LoRA": lambda: in_peft(lora_bias=True, target_modules=["0"]),
    "a trained weight": lambda: trained_base(in_peft()),
    "a hook": lambda: hooked(in_peft()),
    "a linear layer of another class": lambda: peft_model(nn.Sequential(own_linear()), r=3, target_modules=["0"]),
}


class Own(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def own_linear() -> Own:
    torch.manual_seed(0)
    return Own(12, 16)


def trained_base(model: Any) -> Any:
    for index in (0, 2):
        model.base_model.model[index].base_layer.weight.requires_grad_(True)
    return model


def hooked(model: Any) -> Any:
    for index in (0, 2):
        model.base_model.model[index].lora_A["default"].register_forward_hook(counted_hook)
    return model


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_layers_compute_as_in_peft(calls, make):
    expected = make()(X)
    model = ck.accelerate_peft(make())
    torch.testing.assert_close(model(X), expected, rtol=0, atol=0)
    assert calls == []


def test_layers_of_other_kinds_are_counted(caplog):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Embedding(4, 4), "c": nn.MultiheadAttention(4, 2)})
    wrapped = peft_model(model, r=2, target_modules=["a", "b", "c"])
    ck.accelerate_peft(wrapped)
    assert "accelerated 2 of 4 LoRA layers; as before: 1 Embedding, 1 MultiheadAttention" in caplog.text
    with pytest.raises(ValueError, match="model has no LoRA layer of PEFT, expected one"):
        ck.accelerate_peft(plain())


def test_under_autocast_and_for_inputs_of_another_dtype(calls):
    theirs, ours = in_peft(), ck.accelerate_peft(in_peft())
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = theirs(X), ours(X)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert (actual - expected).norm() < 0.02 * expected.norm()
    assert len(calls) == 2
    with pytest.raises(RuntimeError, match="dtype"):
        ours(X.double())


def test_comp_lora_inside_peft_is_accelerated_too(calls):
    config = ck.peft_config(ck.CompLoRAConfig(r=3, subspace_k=4, sides="both", use_rslora=True), ["0", "2"])
    torch.manual_seed(1)
    theirs = peft.get_peft_model(plain(), config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    wide, ours = copy.deepcopy(theirs).double(), ck.accelerate_peft(copy.deepcopy(theirs))
    for number, row in enumerate(zip(results(ours, X), results(theirs, X), results(wide, X.double()), strict=True)):
        assert_as_accurate_as_reference(*row, f"result {number}")
    assert len(calls) == 2


def test_torch_compile(calls):
    model = ck.accelerate_peft(in_peft())
    expected = model(X)
    compiled = torch.compile(model.base_model.model[0], backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model.base_model.model[0](X))
    assert expected.shape == (5, 7)
