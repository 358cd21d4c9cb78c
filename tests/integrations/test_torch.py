"""What the integration of torch, and that of torchvision, say of their modules, and what they guard against."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from oracle import expected, results
from rows import Row, called, in_float64, with_random_weights
from tiny_models import config, randomise
from torch import Tensor, nn
from torch_models import OF_TORCH, D, L, N, vit

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.integrations import find
from complora_kernels.integrations import torch as any_torch
from complora_kernels.integrations import torchvision as integration
from complora_kernels.integrations.selection import select
from complora_kernels.modules.block import BlockParts, CompLoRABlock

ALL = ("q", "k", "v", "o", "fc1", "fc2")
ENCODERS = [name for name in OF_TORCH if "encoder" in name]


def made(name: str) -> Row:
    return in_float64(OF_TORCH[name])


def test_models_are_recognised():
    assert find(vit().model) == [integration, any_torch]
    blocks = [(block.path, block.tower, block.layer) for block in integration.residual_blocks(vit().model)]
    assert blocks == [(f"encoder.layers.encoder_layer_{i}", "image", i) for i in range(2)]
    model = made("torch decoder").model
    assert find(model) == [any_torch]
    found = select(model, config(target_modules=("q", "fc1"), layers=[1]))
    assert [target.path for target in found] == [
        f"layers.1.{part}" for part in ("self_attn", "multihead_attn", "linear1")
    ]


def test_activations():
    assert integration.activations(vit().model) == {"image": "GELU"}
    assert any_torch.activations(made("torch encoder").model) == {"text": "gelu"}
    assert any_torch.activations(nn.Linear(2, 2)) == {}


class Pool(nn.Module):
    """Attention that is in no block."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(D, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:  # [N, L, D]
        return self.attend(x[:, :1], x, x)[0].flatten(1)


@pytest.mark.parametrize("target_modules", ["all-linear", "att.*", ["attend"]], ids=str)
def test_attention_anywhere_is_adapted_by_its_name(target_modules, tmp_path):
    plain, inputs = with_random_weights(Pool()).double(), {"x": torch.randn(N, L, D, dtype=torch.float64)}
    options = config(target_modules=target_modules, sides="both")
    model = randomise(ck.apply_complora(copy.deepcopy(plain), options, progress=False))
    assert list(adapted_layers(model)["attend"].weights) == ["q", "k", "v", "o"]
    torch.testing.assert_close(results(model, inputs, called), expected(plain, model, options, inputs, called))
    ck.save_adapter(model, tmp_path)
    loaded = ck.load_adapter(plain, tmp_path, progress=False)
    torch.testing.assert_close(called(loaded, inputs), called(model, inputs))


@pytest.mark.parametrize("options", [{"kdim": 8, "vdim": 8}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_attention_that_cannot_be_adapted_is_not_among_the_names(options):
    with pytest.raises(ValueError, match=r"expected a match among: attend\.out_proj"):
        ck.apply_complora(Pool(**options), config(target_modules="attend"), progress=False)


# ---- the fast path


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("targets", [("q",), ("fc1",), ("fc2",), ALL], ids="".join)
def test_evaluation_without_gradients_computes_the_updates(name, targets):
    """There an encoder that is not adapted reads the weights of its layers' parts."""
    plain, inputs, features, _ = made(name)
    options = config(target_modules=targets)
    model = randomise(ck.apply_complora(copy.deepcopy(plain), options, progress=False))
    oracle = expected(plain, model, options, inputs, features)["y"]
    with torch.no_grad():
        torch.testing.assert_close(features(model, inputs), oracle)
        assert not torch.allclose(features(plain, inputs), oracle)


def test_padded_batches_do_not_become_nested_tensors():
    plain, inputs, *_ = made("torch encoder, norms after")
    padding = torch.arange(L) >= torch.tensor([L, 3, 5])[:, None]  # [N, L]

    def features(model: Any, inputs: Any) -> Any:
        return model(**inputs, src_key_padding_mask=padding).masked_fill(padding[..., None], 0)

    options = config(target_modules=("v",), layers=[1])
    model = randomise(ck.apply_complora(copy.deepcopy(plain), options, progress=False))
    oracle = expected(plain, model, options, inputs, features)["y"]
    with torch.no_grad():
        torch.testing.assert_close(features(model, inputs), oracle)
        assert model(**inputs, src_key_padding_mask=padding).shape == (N, L, D)


def test_an_encoder_that_is_not_adapted_keeps_its_fast_path():
    encoder = made("torch encoder, norms after").model
    model = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(D, 2)})
    ck.apply_complora(model, config(target_modules="head"), progress=False)
    assert encoder.use_nested_tensor
    assert all(layer.activation_relu_or_gelu for layer in encoder.layers)


def test_copies_and_state_dicts_of_an_adapted_encoder():
    plain, inputs, features, _ = made("torch encoder, norms after")
    keys = list(plain.state_dict())
    model = randomise(ck.apply_complora(plain, config(), progress=False))
    torch.testing.assert_close(features(copy.deepcopy(model), inputs), features(model, inputs))
    assert [key for key in model.state_dict() if "lora" not in key] == keys


# ---- masks


MASKS: dict[str, dict[str, Any]] = {
    "added": {"mask": torch.randn(L, L, dtype=torch.float64)},
    "truth values": {"mask": torch.ones(L, L, dtype=torch.bool).triu(1)},
    "causal": {"mask": nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64), "is_causal": True},
    "padding": {"src_key_padding_mask": torch.arange(L) >= torch.tensor([L, 3, 5])[:, None]},
}


@pytest.mark.parametrize("name", ["torch encoder", "torch encoder, sequence first"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(name, mask):
    plain, inputs, *_ = made(name)

    def features(model: Any, inputs: Any) -> Any:
        return model(**inputs, **MASKS[mask])

    model = randomise(ck.apply_complora(copy.deepcopy(plain), config(sides="both"), progress=False))
    ours, oracle = results(model, inputs, features), expected(plain, model, config(sides="both"), inputs, features)
    torch.testing.assert_close(ours, oracle)


# ---- blocks that are not fused


def changed(name: str, value: Any) -> Any:
    def change(block: nn.Module) -> None:
        parent, _, last = name.rpartition(".")
        setattr(block.get_submodule(parent), last, value)

    return change


OTHER_LAYERS: dict[str, tuple[Any, str]] = {
    "norms after": (changed("norm_first", False), "norm_first=False"),
    "dropout": (changed("dropout1", nn.Dropout(0.1)), "dropout1 is Dropout"),
    "ReLU": (changed("activation", torch.relu), "activation is <built-in method relu"),
    "other norm": (changed("norm2", nn.RMSNorm(D)), "norm2 is a RMSNorm"),
    "other linear": (changed("linear1", nn.Bilinear(2, 2, 2)), "linear1 is a Bilinear"),
    "other attention": (changed("self_attn", nn.Identity()), "self_attn is a Identity"),
    "added keys": (changed("self_attn.add_zero_attn", True), "self_attn projects keys or values of other sizes, or"),
    "its own method": (changed("_ff_block", lambda x: x), "it has methods of its own"),
}
OTHER_BLOCKS: dict[str, tuple[Any, str]] = {
    "dropout": (changed("dropout", nn.Dropout(0.1)), "dropout is Dropout"),
    "dropout in the MLP": (changed("mlp.2", nn.Dropout(0.1)), "mlp.2 is Dropout"),
    "ReLU": (changed("mlp.1", nn.ReLU()), "mlp.1 is ReLU"),
    "other norm": (changed("ln_1", nn.RMSNorm(D)), "ln_1 is a RMSNorm"),
    "other MLP": (changed("mlp", nn.Sequential(nn.Linear(D, D))), "mlp is a Sequential of 0"),
}


@pytest.mark.parametrize(
    ("library", "make", "change", "reason"),
    [(any_torch, "torch encoder", *case) for case in OTHER_LAYERS.values()]
    + [(integration, "torchvision ViT", *case) for case in OTHER_BLOCKS.values()],
    ids=[*OTHER_LAYERS, *(f"torchvision, {name}" for name in OTHER_BLOCKS)],
)
def test_a_block_with_other_parts_is_not_fused(library, make, change, reason):
    block = next(iter(library.residual_blocks(made(make).model))).module
    assert isinstance(library.parts_of_block(block), BlockParts)
    change(block)
    parts = library.parts_of_block(block)
    assert isinstance(parts, str)
    assert parts.startswith(reason)


def test_the_last_block_of_a_vit_computes_the_class_token_alone(monkeypatch):
    model, inputs, features, _ = vit()
    ck.apply_complora(model, config(), progress=False)
    lengths = []
    fused = CompLoRABlock.run_fused

    def observed(block: CompLoRABlock, x: Any, mask: Any, **options: Any) -> Any:
        y = fused(block, x, mask, **options)
        assert y is not None
        lengths.append(y.shape[1])
        return y

    monkeypatch.setattr(CompLoRABlock, "run_fused", observed)
    features(model, inputs)
    model.encoder.register_forward_hook(lambda *_: None)  # it sees all positions
    features(model, inputs)
    assert lengths == [5, 1, 5, 5]


# ---- traps


def test_swins_attention_which_calls_none_of_its_linears_is_refused():
    model = torchvision.models.SwinTransformer([4, 4], 12, [2], [2], [4, 4], num_classes=2)
    for name in ("qkv", "proj"):
        with pytest.raises(ValueError, match=rf"matched features\.1\.0\.attn\.{name}, which its parent"):
            ck.apply_complora(model, config(target_modules=rf".*attn\.{name}"), progress=False)
    ck.apply_complora(model, config(target_modules=r".*mlp\.0"), progress=False)


def test_an_adapter_that_peft_would_lose_in_evaluation_is_not_exported(tmp_path):
    model = ck.apply_complora(made("torch encoder").model, config(), progress=False)
    with pytest.raises(ValueError, match="a plain TransformerEncoderLayer uses its weights without calling it"):
        ck.export_peft(model, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_peft_computes_what_was_exported_of_a_vit(tmp_path):
    import peft

    plain, inputs, features, _ = made("torchvision ViT")
    model = randomise(ck.apply_complora(copy.deepcopy(plain), config(target_modules=("q", "v", "fc1")), progress=False))
    ck.export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    torch.testing.assert_close(features(theirs, inputs), features(model, inputs))
    assert len(adapted_layers(model)) == 4
    assert called(model, inputs).shape == (N, 5)
