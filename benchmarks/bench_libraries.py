"""How fast is a training step of other libraries' image models, against PEFT on the same model?

Both start from the same frozen weights and compute the same updates: where q, k and v lie in one weight, which PEFT
adapts as a whole, our three adapters start from one A. Losses and gradients are checked before anybody is timed; the
learning rate is 0, so that factors stay what they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import complora_kernels as ck
from benchmarks import baselines
from benchmarks.baselines import Adapter, Trainee
from benchmarks.bench_step import DEVICE, DTYPE, FEW_CLASSES, ON_GPU, OURS, PLAIN, TOLERANCE, Batch, make_step
from benchmarks.comparison import Work
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.integrations import find
from complora_kernels.replays import Step, free_memory

PEFT = "PEFT eager"
PACKED = "one adapter for q, k and v together"
CONFIG = ck.CompLoRAConfig(
    r=16,
    lora_alpha=16.0,
    subspace_ratio=0.5,
    target_modules=("q", "k", "v", "o", "fc1", "fc2"),
    towers=("image",),
)


class ImageModel(nn.Module):
    """A model under the names that a step of `bench_step` calls."""

    def __init__(self, model: nn.Module, read: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.read = model, read
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:  # [N, 3, 224, 224] to [N, D]
        features = self.read(self.model, images)
        return F.normalize(features, dim=-1) if normalize else features


def transformers_clip() -> ImageModel:
    import transformers

    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    vision: Any = {"patch_size": 16, **sizes}
    config = transformers.CLIPConfig(vision_config=vision, text_config={"num_hidden_layers": 1}, projection_dim=512)
    model = transformers.CLIPModel._from_config(config, attn_implementation="sdpa")
    return ImageModel(model, lambda model, images: model.get_image_features(pixel_values=images).pooler_output)


def dinov2() -> ImageModel:
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12}
    config = transformers.Dinov2Config(image_size=224, patch_size=14, **sizes)
    model = transformers.Dinov2Model._from_config(config, attn_implementation="sdpa")
    return ImageModel(model, lambda model, images: model(images).pooler_output)


def timm_vit() -> ImageModel:
    import timm

    return ImageModel(timm.create_model("vit_small_patch16_224", num_classes=0), lambda model, images: model(images))


class Case(NamedTuple):
    make: Callable[[], ImageModel]
    images: int
    target: str | None = None  # an id in targets.toml


# Two cores take two seconds for a step of the first, half a second for the others.
CASES = {
    "transformers' CLIP, ViT-B/16": Case(
        transformers_clip, 256 if ON_GPU else 4, None if ON_GPU else "step/PEFT, transformers' CLIP, CPU"
    ),
    "transformers' DINOv2, ViT-S/14": Case(dinov2, 256 if ON_GPU else 4),
    "timm's ViT-S/16": Case(timm_vit, 256 if ON_GPU else 4),
}


@pytest.mark.parametrize("name", CASES)
def test_step_of_a_library(comparison, name):
    case = CASES[name]
    shape = f"{name}, {case.images} images, six linears, r={CONFIG.r}, {str(DTYPE).removeprefix('torch.')}"
    if comparison.known(shape, [OURS, PEFT]):
        return
    plain = make_plain(case.make)
    ours = make_ours(plain)
    weights, batch = adapters(ours), make_batch(plain, case.images)
    truth, work = true_results(plain, weights, batch)
    steps: dict[str, Step] = {}
    for baseline, make in ((OURS, lambda: by_ours(ours)), (PEFT, lambda: by_peft(plain, weights))):
        prepared = comparison.attempt(shape, baseline, lambda make=make: prepare(make(), weights, batch, truth))
        if prepared is not None:
            steps[baseline] = prepared
    free_memory()
    remark = f"{PLAIN}; {PACKED}" if any("qkv" in path for path in weights) else PLAIN
    targets, warm_up = {PEFT: case.target}, None if ON_GPU else 0  # on a CPU the checked step was a warm-up
    comparison.time(shape, steps, ours=OURS, work=work, remarks={PEFT: remark}, targets=targets, warm_up=warm_up)


def make_plain(make: Callable[[], ImageModel]) -> Any:
    """A model at random weights, equal in all blocks: so few are decomposed that nobody waits."""
    torch.manual_seed(0)
    model = make()
    blocks = [block for library in find(model) for block in library.residual_blocks(model) if block.tower == "image"]
    for block in blocks[1:]:
        block.module.load_state_dict(blocks[0].module.state_dict())
    return model.to(DEVICE, DTYPE).requires_grad_(False)


def make_ours(plain: nn.Module) -> Any:
    """Ours, with updates of about a tenth of the weights: smaller ones would hide a mistake from the check."""
    model: Any = copy.deepcopy(plain)
    ck.apply_complora(model.model, CONFIG, progress=False)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            first, _ = layer.factors(next(iter(layer.weights)))
            for name in layer.weights:
                A, B = layer.factors(name)
                A.copy_(first)
                nn.init.normal_(B, std=0.12 * len(A) ** -0.5 / CONFIG.scaling)
    return model


def adapters(ours: nn.Module) -> dict[str, Adapter]:
    """The adapter of each linear layer, in float64; that of q, k and v together where they lie in one weight."""
    found = {}
    for path, layer in adapted_layers(ours).items():
        bases = [layer.basis(name, "output") for name in layer.weights]
        assert all(basis is not None and basis.kind == "principal" for basis in bases)
        A, *_ = (layer.factors(name)[0] for name in layer.weights)
        B = torch.cat([layer.factors(name)[1] for name in layer.weights])
        basis = torch.block_diag(*(basis.matrix for basis in bases if basis is not None))
        found[path] = Adapter(*(tensor.detach().double() for tensor in (A, B, basis)))
    return found


def make_batch(plain: Any, images: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(images, 3, 224, 224, generator=generator).to(DEVICE, DTYPE)
    labels = torch.randint(0, FEW_CLASSES, (images,), generator=generator).to(DEVICE)
    with torch.no_grad():
        size = plain.encode_image(pixels[:1]).shape[1]
    prompts = F.normalize(torch.randn(FEW_CLASSES, size, generator=generator), dim=-1)
    return Batch(pixels, labels, prompts.to(DEVICE, DTYPE))


def by_ours(model: nn.Module) -> Trainee:
    layers = adapted_layers(model).items()
    names = {f"{path}.{name}".rstrip("."): layer.factors(name) for path, layer in layers for name in layer.weights}
    return Trainee(model, names)


def by_peft(plain: Any, weights: dict[str, Adapter]) -> Trainee:
    """PEFT's LoRA layers: plain LoRA, which projects nothing."""
    model = copy.deepcopy(plain)
    return Trainee(model, baselines.adapt_by_peft(model, {path: path for path in weights}, weights, CONFIG), plain=True)


def folded(plain: Any, weights: dict[str, Adapter]) -> Trainee:
    """Plain torch with folded factors."""
    model, factors = copy.deepcopy(plain), {}
    for path, adapter in weights.items():
        layer = baselines.FoldedLinear(model.get_submodule(path), adapter, CONFIG)
        model.set_submodule(path, layer)
        factors[path] = (layer.A, layer.B)
    return Trainee(model, factors)


def true_results(plain: nn.Module, weights: dict[str, Adapter], batch: Batch) -> tuple[dict[str, Tensor], Work]:
    """The loss and the gradients of folded factors in plain torch, in a wider dtype; what operations they took."""
    wide = torch.float64 if torch.float32 == DTYPE else torch.float32
    trainee = folded(copy.deepcopy(plain).to(wide), weights)
    step = make_step(trainee, Batch(batch.images.to(wide), batch.labels, batch.prompts.to(wide)))
    with FlopCounterMode(display=False) as counter:
        truth = results(trainee, step(), weights)
    return truth, Work(counter.get_total_flops(), 0)


def results(trainee: Trainee, loss: Tensor, weights: dict[str, Adapter]) -> dict[str, Tensor]:
    """The loss and the gradients of a step by the paths of the layers; those of plain LoRA's B are projected."""
    found = {"loss": loss}
    for path, adapter in weights.items():
        pairs = [pair for key, pair in trainee.factors.items() if key.removeprefix(path) in ("", ".q", ".k", ".v")]
        As, Bs = zip(*([factor.grad for factor in pair] for pair in pairs), strict=True)
        B = torch.cat(Bs).double()
        found[f"{path}.A"] = torch.stack(As).double().sum(0)
        found[f"{path}.B"] = adapter.project(B) if trainee.plain else B
    return {name: result.double().clone() for name, result in found.items()}


def prepare(trainee: Trainee, weights: dict[str, Adapter], batch: Batch, truth: dict[str, Tensor]) -> Step:
    """The step of a baseline, whose results are right."""
    step = make_step(trainee, batch)
    mine = results(trainee, step(), weights)
    assert mine.keys() == truth.keys()
    for result, value in truth.items():
        apart = (mine[result] - value).norm() / value.norm()
        assert apart <= TOLERANCE, f"{result}: {apart:.1e} apart"
    return step
