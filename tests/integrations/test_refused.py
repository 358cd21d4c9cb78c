"""What cannot be adapted, or loaded, is refused by name, and the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from failures import Unchanged
from model_zoo import ALL, adapted, make
from rows import Row
from tiny_models import clip, config
from torch import Tensor, nn

import complora_kernels as ck


def with_part(name: str, replace: Callable[[Any], nn.Module]) -> Callable[[], nn.Module]:
    """A CLIP of open_clip with one module of its last image block exchanged."""

    def make_model() -> nn.Module:
        model, path = clip(), f"visual.transformer.resblocks.1.{name}"
        model.set_submodule(path, replace(model.get_submodule(path)))
        return model

    return make_model


def quantised_dynamically(linear: nn.Linear) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear})[0]


class Linear4bit(nn.Linear):
    """A linear layer as bitsandbytes has it: its weight holds two numbers in a byte, in another shape."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


class Quantised(Tensor):
    """A weight as torchao has it: a subclass of Tensor that says that it is in float32."""


def with_a_quantised_weight(linear: nn.Linear) -> nn.Module:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised))
    return linear


LAST = r"visual\.transformer\.resblocks\.1\.mlp\.c_proj"
REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "quantised dynamically": (
        with_part("mlp.c_proj", quantised_dynamically),
        {},
        rf"{LAST} is a torch\.ao\.nn\.quantized\.dynamic\.modules\.linear\.Linear, expected a plain nn\.Linear",
    ),
    "quantised, by its name": (
        lambda: nn.Sequential(quantised_dynamically(nn.Linear(4, 4))),
        {"target_modules": "0"},
        r"by its whole name; 0 is a torch\.ao\.nn\.quantized\.dynamic",
    ),
    "subclass": (with_part("mlp.c_proj", Linear4bit), {}, rf"{LAST} is a test_refused\.Linear4bit, expected a plain"),
    "subclass among all": (
        with_part("mlp.c_proj", Linear4bit),
        {"target_modules": "all-linear"},
        rf"{LAST} is a test_refused\.Linear4bit, expected a plain",
    ),
    "quantised weight": (
        with_part("mlp.c_proj", with_a_quantised_weight),
        {},
        rf"{LAST} has a weight of type Quantised, expected one of torch's own: a quantised",
    ),
    "meta": (lambda: clip().to("meta"), {}, "visual.transformer.resblocks.0.attn.* meta"),
    "convolution": (clip, {"target_modules": ["conv1"]}, r"'conv1'; visual\.conv1 is a torch\.nn.*Conv2d, expected a"),
    "embedding": (clip, {"target_modules": ["c_fc", "token_embedding"]}, r"token_embedding is a torch\.nn.*Embedding"),
}


@pytest.mark.filterwarnings("ignore:.*quantiz")  # torch.ao is deprecated, and still what some quantise with
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted(case):
    make_model, options, message = REFUSED[case]
    model = make_model()
    with pytest.raises(ValueError, match=message):
        ck.apply_complora(model, config(**{"target_modules": ALL, **options}), progress=False)
    assert not any("lora" in name for name, _ in model.named_parameters())


def small(name: str) -> Row:
    row = make(name)
    return row._replace(model=row.model.float())


CROSSED = {
    ("open_clip CLIP", "CLIPModel, sdpa"): (
        r"it adapts (visual\.)?transformer\.resblocks\.0\.attn\.q_proj and 23 more, as open_clip names them, and the "
        r"model has none of these: it is a CLIPModel of transformers with residual blocks such as .*layers\.0.* "
        "export_peft and import_peft take it"
    ),
    ("CLIPModel, sdpa", "open_clip CLIP"): (
        r"it adapts .*self_attn\.\w+ and 23 more, as transformers names them, .* it is a CLIP of open_clip with "
        r"residual blocks such as visual\.transformer\.resblocks\.0\. .* export_peft and import_peft take it"
    ),
    (
        "timm ViT",
        "torchvision ViT",
    ): r"it adapts blocks\.0.*, as timm names them, .*VisionTransformer of torchvision",
    ("torchvision ViT", "timm ViT"): r"as torchvision names them, .*VisionTransformer of timm .*blocks\.0\. Expected",
    ("Dinov2Model, sdpa", "timm ViT"): r"as transformers names them, .*VisionTransformer of timm",
}


@pytest.mark.parametrize("case", CROSSED, ids=" to ".join)
def test_an_adapter_of_another_library_s_model_is_refused_by_what_differs(case, tmp_path):
    source, target = map(small, case)
    ck.save_adapter(adapted(source, *ALL), tmp_path)
    with Unchanged(target.model), pytest.raises(ValueError, match=CROSSED[case]) as refusal:
        ck.load_adapter(target.model, tmp_path, progress=False)
    assert len(str(refusal.value)) < 500
