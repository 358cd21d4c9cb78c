"""`get_peft_model` trains Comp-LoRA: PEFT's calls on it give the numbers of this package's own modules."""

from __future__ import annotations

import copy
import sys
from typing import Any

import peft
import pytest
import torch
from numerics import assert_as_accurate_as_reference
from tiny_models import expected_delta
from torch import Tensor, nn
from torch.nn import functional as F

import complora_kernels as ck

X = torch.linspace(-1, 1, 60).reshape(5, 12)
SETTINGS: dict[str, Any] = {"r": 3, "lora_alpha": 6.0, "subspace_k": 4, "sides": "both"}


def plain(dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 7)).to(dtype)


def in_peft(model: nn.Module | None = None, targets: Any = ("0", "2"), options: Any = None, **settings: Any) -> Any:
    config = ck.peft_config(ck.CompLoRAConfig(**(SETTINGS | settings)), targets, **(options or {}))
    model = peft.get_peft_model(plain() if model is None else model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def own(theirs: Any, **settings: Any) -> Any:
    """A model of this package with the raw factors of a model of PEFT."""
    config = ck.CompLoRAConfig(**(SETTINGS | settings), target_modules=r"\d")
    model = ck.apply_complora(plain(), config, progress=False)
    with torch.no_grad():
        for index in ("0", "2"):
            layer = theirs.base_model.model.get_submodule(index)
            model.get_submodule(index).lora_A.copy_(layer.lora_A["default"].weight)
            model.get_submodule(index).lora_B.copy_(layer.lora_B["default"].weight)
    return model


def oracle(theirs: Any, config: ck.CompLoRAConfig, x: Tensor = X) -> Tensor:
    """`y = x (W + s · P_out B A P_in)^T + b` in float64, with the projectors of torch's own decomposition."""
    h = x.double()
    for index in ("0", "2"):
        layer = theirs.base_model.model.get_submodule(index)
        weight, bias = layer.base_layer.weight.double(), layer.base_layer.bias.double()
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        h = F.linear(h, weight + expected_delta(weight, A, B, config, 4), bias)
        h = F.gelu(h) if index == "0" else h
    return h.detach()


@pytest.mark.parametrize("sides", ["output", "input", "both", "none"])
def test_the_function_is_comp_lora(sides):
    settings: Any = {"sides": sides, "subspace_k": None if sides == "none" else 4}
    theirs = in_peft(**settings)
    expected = oracle(theirs, ck.CompLoRAConfig(**(SETTINGS | settings)))
    with torch.no_grad():
        assert_as_accurate_as_reference(theirs(X), own(theirs, **settings)(X), expected, sides)
        assert (theirs(X) - plain()(X)).norm() > 0.05 * expected.norm()


def test_training_gives_the_numbers_of_our_modules():
    theirs = in_peft(use_rslora=True)
    ours = own(theirs, use_rslora=True)
    models = {"theirs": theirs, "ours": ours, "float64": own(theirs, use_rslora=True).double()}
    losses: dict[str, list[float]] = {name: [] for name in models}
    for name, model in models.items():
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(5):
            loss = model(X.to(next(model.parameters()).dtype)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["theirs"] == pytest.approx(losses["float64"], rel=1e-5)
    assert losses["theirs"][-1] < 0.9 * losses["theirs"][0]
    base = theirs.base_model.model
    assert all(
        torch.equal(base.get_submodule(i).base_layer.weight, plain().get_submodule(i).weight) for i in ("0", "2")
    )


def test_gradients_are_those_of_our_modules():
    theirs = in_peft()
    ours, wide = own(theirs), own(theirs).double()
    x = [X.clone().to(dtype).requires_grad_() for dtype in (torch.float32, torch.float32, torch.float64)]
    for model, own_x in zip((theirs, ours, wide), x, strict=True):
        model(own_x).square().sum().backward()
    grads: list[list[Any]] = [[each.grad] for each in x]
    for index in ("0", "2"):
        layer = theirs.base_model.model.get_submodule(index)
        grads[0] += [layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
        for row, model in zip(grads[1:], (ours, wide), strict=True):
            row += [model.get_submodule(index).lora_A.grad, model.get_submodule(index).lora_B.grad]
    for number, (actual, reference, expected) in enumerate(zip(*grads, strict=True)):
        assert_as_accurate_as_reference(actual, reference, expected, f"gradient {number}")


def test_dropout_is_that_of_the_input_of_the_update():
    layer = in_peft(lora_dropout=0.5).train().base_model.model[0]
    torch.manual_seed(0)
    actual = layer(X)
    torch.manual_seed(0)
    folded_A, scaled_B = layer.fold("default", layer.scaling["default"])
    expected = layer.base_layer(X) + F.dropout(X, 0.5) @ folded_A.T @ scaled_B.T
    torch.testing.assert_close(actual, expected)


def test_the_calls_of_peft():
    theirs = in_peft().eval()
    with torch.no_grad():
        expected, before = theirs(X), plain()(X)
        with theirs.disable_adapter():
            assert torch.equal(theirs(X), before)
        weight = plain()[0].weight
        for safe in (False, True):
            theirs.merge_adapter(safe_merge=safe)
            torch.testing.assert_close(theirs(X), expected)
            assert not torch.equal(theirs.base_model.model[0].base_layer.weight, weight)
            theirs.unmerge_adapter()
            torch.testing.assert_close(theirs.base_model.model[0].base_layer.weight, weight)
            torch.testing.assert_close(theirs(X), expected)
        copied = copy.deepcopy(theirs)
        merged = copied.merge_and_unload(safe_merge=True)
        assert type(merged[0]) is nn.Linear
        torch.testing.assert_close(merged(X), expected)
        assert torch.equal(copy.deepcopy(in_peft()).unload()(X), before)


def test_several_adapters():
    theirs = in_peft().eval()
    theirs.add_adapter("plain", peft.LoraConfig(r=2, target_modules=["0"]))
    theirs.add_adapter("input", ck.peft_config(ck.CompLoRAConfig(r=4, subspace_k=5, sides="input"), ["0", "2"]))
    first = theirs.base_model.model[0]
    with torch.no_grad():
        for parameter in theirs.parameters():
            if not parameter.any():
                parameter.normal_()
        alone = {}
        for name in ("default", "plain", "input"):
            theirs.set_adapter(name)
            alone[name] = first(X)
            delta = first.get_delta_weight(name)
            torch.testing.assert_close(alone[name], first.base_layer(X) + X @ delta.T)
        U, _, Vh = torch.linalg.svd(first.base_layer.weight)
        assert (first.get_delta_weight("input") @ Vh[:5].T).norm() < 1e-5
        assert (U[:, :4].T @ first.get_delta_weight("default")).norm() < 1e-5
        assert (U[:, :4].T @ first.get_delta_weight("plain")).norm() > 1e-2
        mixed = theirs(X, adapter_names=["default", "__base__", "plain", "input", "default"])
        theirs.set_adapter("input")
        torch.testing.assert_close(mixed[3], theirs(X)[3])
    theirs.set_adapter("default")
    theirs.delete_adapter("input")
    assert "input" not in first.complora_bases
    torch.testing.assert_close(first(X), alone["default"])


def test_what_is_saved_is_an_ordinary_lora(tmp_path):
    theirs = in_peft().eval()
    expected = theirs(X)
    theirs.save_pretrained(str(tmp_path))
    stock: Any = peft.PeftModel.from_pretrained(plain(), str(tmp_path)).eval()  # a warning would be an error
    torch.testing.assert_close(stock(X), expected)
    assert type(stock.base_model.model[0]) is peft.tuners.lora.Linear
    imported = ck.import_peft(plain(), tmp_path, progress=False)
    torch.testing.assert_close(imported(X), expected)
    config = ck.peft_config(ck.CompLoRAConfig(**SETTINGS), ["0", "2"])
    again: Any = peft.PeftModel.from_pretrained(plain(), str(tmp_path), config=config, is_trainable=True)
    assert type(again.base_model.model[0]).__name__ == "ComplementLinear"
    torch.testing.assert_close(again(X), expected)
    lean = peft.PeftModel.from_pretrained(plain(), str(tmp_path), config=config, low_cpu_mem_usage=True)
    torch.testing.assert_close(lean(X), expected)


def test_training_goes_on_from_folded_factors_as_from_raw_ones():
    raw = in_peft()
    folded = in_peft()
    folded.load_state_dict(raw.state_dict())
    one, other = (model.base_model.model[0].lora_B["default"].weight for model in (raw, folded))
    assert not torch.equal(one, other)
    for model in (raw, folded):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(4):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(folded(X), raw(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    theirs = in_peft(plain(dtype)).eval()
    config = ck.CompLoRAConfig(**SETTINGS)
    rounding = {torch.bfloat16: 2e-2, torch.float64: 1e-6}[dtype]  # PEFT computes the update in float32
    expected = oracle(theirs, config, X.to(dtype))
    assert (theirs(X.to(dtype)).double() - expected).norm() < rounding * expected.norm()
    theirs.to(dtype)  # the bases keep float32
    delta = theirs.base_model.model[0].get_delta_weight("default").double()
    U = torch.linalg.svd(theirs.base_model.model[0].base_layer.weight.double())[0]
    assert (U[:, :4].T @ delta).norm() < rounding * delta.norm()


def test_modules_to_save_and_patterns(tmp_path):
    options = {"modules_to_save": ["2"], "rank_pattern": {"0": 5}, "alpha_pattern": {"0": 20}}
    theirs = in_peft(targets=["0"], options=options)
    layer = theirs.base_model.model[0]
    assert layer.lora_A["default"].weight.shape == (5, 12)
    assert layer.scaling["default"] == 4
    theirs.save_pretrained(str(tmp_path))
    stock = peft.PeftModel.from_pretrained(plain(), str(tmp_path))
    torch.testing.assert_close(stock(X), theirs(X))


def test_what_cannot_be_configured():
    config = ck.CompLoRAConfig(**SETTINGS)
    with pytest.raises(ValueError, match="options lora_alpha, r are fields of config, expected them there alone"):
        ck.peft_config(config, ["0"], r=4, lora_alpha=3)
    with pytest.raises(ValueError, match="init_lora_weights='pissa', expected one that leaves the base weights"):
        ck.peft_config(config, ["0"], init_lora_weights="pissa")
    with pytest.raises(ValueError, match="subspace_source='activations', expected a source that needs no calibration"):
        ck.peft_config(ck.CompLoRAConfig(subspace_k=3, subspace_source="activations"), ["0"])
    with pytest.raises(ValueError, match=r"unsupported variant combination: \('complora',\)"):
        peft.get_peft_model(nn.ModuleDict({"embed": nn.Embedding(4, 4)}), ck.peft_config(config, ["embed"]))
    with pytest.raises(ValueError, match=r"unsupported variant combination: \('complora', 'use_dora'\)"):
        peft.get_peft_model(plain(), ck.peft_config(config, ["0"], use_dora=True))
    with pytest.raises(ValueError, match="subspace_k=4, expected at most min"):
        peft.get_peft_model(nn.Sequential(nn.Linear(3, 3)), ck.peft_config(config, ["0"]))
    model = plain()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"0 .*NaN"):
        peft.get_peft_model(model, ck.peft_config(config, ["0"]))


def test_an_old_or_missing_peft_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "complora_kernels.adapters.peft_variant", raising=False)
    monkeypatch.setattr(peft.tuners.lora.Linear, "lora_variants", None)
    with pytest.raises(ImportError, match=r"the installed peft has no lora_variants, expected peft>=0\.21"):
        ck.peft_config(ck.CompLoRAConfig(**SETTINGS), ["0"])
