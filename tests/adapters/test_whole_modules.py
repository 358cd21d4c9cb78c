"""`modules_to_save`: whole modules that are trained, saved, loaded and exported beside the factors, as PEFT does it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from failures import Unchanged
from safetensors.torch import load_file, save_file
from tiny_models import clip, config, randomise
from torch import Tensor, nn

import complora_kernels as ck
from complora_kernels.adapters.manage import load_raw_adapter_state, named_adapter_parameters, raw_adapter_state


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.other = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).tanh())
        return torch.cat([self.head(x), self.other(x)], 1)


def settings(**options: Any) -> ck.CompLoRAConfig:
    return config(**({"target_modules": "first|second", "modules_to_save": ("head",)} | options))


def plain(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Classifier()


def trained(**options: Any) -> Any:
    """A model whose factors, heads and counters are no longer what they were."""
    model = randomise(ck.apply_complora(plain(), settings(**options), progress=False)).train()
    optimizer = torch.optim.SGD(ck.adapter_parameters(model), lr=0.1)
    for _ in range(3):
        model(torch.randn(16, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


X = torch.linspace(-1, 1, 30).view(5, 6)


# ---- what is trained


@pytest.mark.parametrize("ends", [("head",), ("other",), ("head.1", "other"), ("d.0",), ("er",)])
def test_the_modules_that_peft_selects_are_trained(ends):
    model = ck.apply_complora(plain(), settings(modules_to_save=ends), progress=False)
    lora = peft.LoraConfig(target_modules="first|second", modules_to_save=list(ends))
    theirs = peft.get_peft_model(plain(), lora)
    expected = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }
    assert {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name} == expected
    assert {name for name, _ in named_adapter_parameters(model) if "lora_" not in name} == expected
    model(X).sum().backward()
    ck.check_gradients(model)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (("head", "tail"), "modules_to_save='tail', expected the end of the name of a module"),
        (("second",), "selects second, which is or holds an adapted module"),
        (("tied",), "selects tied, which shares a parameter with another module"),
    ],
)
def test_modules_that_cannot_be_trained_alone_are_refused(ends, message):
    model = plain()
    model.tied = nn.Linear(8, 2)
    model.tied.weight = model.other.weight
    with Unchanged(model), pytest.raises(ValueError, match=message):
        ck.apply_complora(model, settings(modules_to_save=ends), progress=False)


def test_a_module_that_holds_an_adapted_one_is_refused():
    with pytest.raises(ValueError, match="selects visual, which is or holds an adapted module"):
        ck.apply_complora(clip(), config(modules_to_save="visual"), progress=False)


def test_a_model_that_is_plain_again_keeps_what_its_head_has_learned():
    model = trained()
    head, output = model.head[1].weight.detach().clone(), model(X)
    with ck.disable_adapter(model):
        assert torch.equal(model(X)[:, :3], model.head(model.second(model.first(X).tanh())))
    torch.testing.assert_close(ck.merge_and_unload(copy.deepcopy(model))(X), output)
    assert torch.equal(ck.unload(model).head[1].weight, head)
    assert model.head[1].weight.requires_grad


# ---- files


def in_peft(folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(plain(1).eval().requires_grad_(False), folder).eval()


@pytest.mark.parametrize("adapted", [False, True])
def test_a_loaded_model_has_the_saved_head(tmp_path, adapted):
    model = trained()
    ck.save_adapter(model, tmp_path)  # a warning would be an error here
    other = plain().eval()
    if adapted:
        ck.apply_complora(other, settings(), progress=False)
    ck.load_adapter(other, tmp_path, progress=False)
    for name, tensor in model.head.state_dict().items():
        assert torch.equal(other.head.state_dict()[name], tensor), name
    torch.testing.assert_close(other(X), model(X))
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_the_files_hold_the_keys_that_peft_writes_and_stock_peft_loads_them(tmp_path):
    model = trained(modules_to_save=("head", "other"), sides="output")
    ck.save_adapter(model, tmp_path / "saved")
    ck.export_peft(model, tmp_path / "exported")
    lora = peft.LoraConfig(target_modules=["first", "second"], r=2, modules_to_save=["head", "other"])
    peft.get_peft_model(plain(), lora).save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    base = plain().eval()
    for name in ("saved", "exported"):
        ours = load_file(tmp_path / name / "adapter_model.safetensors")
        assert {key: tensor.shape for key, tensor in ours.items()} == {key: t.shape for key, t in theirs.items()}
        fields = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert fields["modules_to_save"] == ["head", "other"]
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "exported").eval()
    torch.testing.assert_close(loaded(X), model(X))


def test_other_trained_parameters_are_named_and_those_that_are_saved_are_not(tmp_path):
    model = trained()
    model.other.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"^other\.bias, other\.weight require a gradient"):
        ck.save_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4)), r"head\.1\.weight has shape \(3, 8\)"),
        (lambda: nn.Linear(8, 3), r"missing .*head\.weight, unexpected .*head\.0"),
    ],
)
def test_another_head_is_refused(tmp_path, head, message):
    ck.save_adapter(trained(), tmp_path)
    other = plain()
    other.head = head()
    with Unchanged(other), pytest.raises(ValueError, match=message):
        ck.load_adapter(other, tmp_path, progress=False)


def test_a_head_that_is_not_finite_is_not_saved(tmp_path):
    model = trained()
    with torch.no_grad():
        model.head[1].bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"head\.1\.bias holds NaN"):
        ck.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_changed_head_does_not_match_the_digest(tmp_path):
    ck.save_adapter(trained(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.head.1.bias"] += 1
    metadata = {"adapter_config": json.dumps(json.loads((tmp_path / "adapter_config.json").read_text()))}
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match="does not match its digest"):
        ck.load_adapter(plain(), tmp_path, progress=False)


def test_the_raw_state_holds_the_head():
    model = trained()
    state = {name: tensor.clone() for name, tensor in raw_adapter_state(model).items()}
    assert {name for name in state if name.startswith("head")} == {f"head.{name}" for name in model.head.state_dict()}
    other = ck.apply_complora(plain(), settings(), progress=False).eval()
    load_raw_adapter_state(other, state)
    assert torch.equal(other(X), model(X))


def test_in_a_container_the_head_of_the_adapted_model_is_meant():
    model = ck.apply_complora(plain(), settings(), progress=False)
    container = nn.ModuleDict({"model": model, "head": nn.Linear(2, 2)})
    names = {name for name, _ in named_adapter_parameters(container) if "lora_" not in name}
    assert names == {f"model.head.{name}" for name, _ in plain().head.named_parameters()}
