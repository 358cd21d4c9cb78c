"""Adapters for and of other programs: `export_peft` for PEFT, `import_clip_lora` for CLIP-LoRA's files."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from complora_kernels.adapters.build import adapted_model, find_targets, is_adapted
from complora_kernels.adapters.configuration import module_pattern, peft_fields
from complora_kernels.adapters.factors import (
    PROJECTIONS,
    FactorPairs,
    adapted_weights,
    check_factors,
    check_names,
    common_config,
    factor_tensors,
    file_factors,
    file_tensors,
    fill_adapter,
    warn_of_trained,
    weights_to_fill,
)
from complora_kernels.adapters.files import require_file, write_files
from complora_kernels.adapters.replacement import replaced_adapter
from complora_kernels.adapters.several import in_folders
from complora_kernels.common.files import reading
from complora_kernels.common.schema import check_type
from complora_kernels.common.sharded import has_shards
from complora_kernels.common.wrappers import unwrap
from complora_kernels.config import CompLoRAConfig
from complora_kernels.integrations import find, peft_modules
from complora_kernels.integrations.names import Exported, linear_names
from complora_kernels.modules import CompLoRALayer, CompLoRAMultiheadAttention
from complora_kernels.modules.layer import FLOATING

Model = TypeVar("Model", bound=nn.Module)


class CLIPLoRAMetadata(TypedDict):
    """The metadata of CLIP-LoRA's file."""

    r: int
    alpha: float
    encoder: str
    params: list[str]
    position: str


class CLIPLoRAFile(TypedDict):
    """The content of CLIP-LoRA's file."""

    weights: dict[str, dict[str, dict[str, Any]]]  # tensors, as in weights["layer_0"]["q_proj"]["w_lora_A"]
    metadata: CLIPLoRAMetadata


def export_peft(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    library: Exported | None = None,
    adapter_names: Iterable[str] | None = None,
) -> None:
    """Writes the adapter as `peft.PeftModel.from_pretrained(plain_model, directory)` reads it, with the same outputs.

    PEFT has one adapter for the whole of an `nn.MultiheadAttention` or of a packed linear layer. With n of q, k, v
    adapted it gets rank n·r, A stacked and B block-diagonal, and an alpha that keeps the scaling. In an
    `nn.MultiheadAttention`, PEFT's adapter of the output projection, which always comes with it, is zero, PEFT ignores
    dropout, and in half precision its forward passes change the frozen weights.

    The files replace those in `directory` as `save_adapter` replaces them; PEFT does not notice a pair that a killed
    process left mismatched. Writing them does not need PEFT. Wrappers, containers and other trained parameters are
    treated as by `save_adapter`.

    Args:
        model: adapted.
        directory: a folder, which is made if needed.
        library: None for a plain model like `model`; or the name of another library with the same CLIP (see
            `integrations.names`), for its names and an `nn.Linear` for each weight. `import_peft` reads both into
            either model.
        adapter_names: the adapters to export, each to its place as with `save_adapter`; None exports what is active,
            which may be a weighted sum.

    Raises:
        OSError: `directory` cannot be written to.
        ValueError: PEFT cannot compute this adapter: `o` of an `nn.MultiheadAttention`, whose update it adds twice, or
            q, k, v of an attention that keeps them in one parameter of its own, or a layer of a class that is not one
            of this package's; or `library` has no such weight, or is given with `modules_to_save`. Also as
            `save_adapter`.
    """
    part = adapted_model(model)
    if has_shards(part):
        raise ValueError(
            "model is sharded, expected a whole one: save_adapter gathers it, and load_adapter gives a whole model, "
            "which can be exported"
        )
    exported = in_folders(part, directory, adapter_names)
    contents = {folder: _content(part, layers, library) for folder, layers in exported.items()}
    with contextlib.ExitStack() as folders:
        staged = [(folders.enter_context(replaced_adapter(folder)), content) for folder, content in contents.items()]
        warn_of_trained(model)
        for staging, content in staged:
            write_files(staging, *content)


def _content(
    part: nn.Module, layers: dict[str, CompLoRALayer], library: Exported | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors that are exported of an adapter in these layers."""
    config, weights, names = common_config(layers), adapted_weights(layers), {}
    packed: dict[str, CompLoRALayer] = {}
    if library is not None:
        names = linear_names(library, weights)
        if config.modules_to_save:
            raise ValueError(
                f"library={library!r} with modules_to_save={config.modules_to_save!r}, expected none: names of whole "
                "modules are not translated"
            )
        config = _renamed(config, names)
    else:
        for path, layer in layers.items():
            modules = peft_modules(part, path, layer)
            if isinstance(modules, str):
                raise ValueError(f"{path} cannot be exported: {modules}. merge_adapter gives plain weights")
            if path in modules.values() and "" not in modules:
                packed[path] = layer
    for path, layer in packed.items():
        own = [layer.weight_name(name) for name in layer.weights]
        if any((config.rank_of(name), config.alpha_of(name)) != (config.r, config.lora_alpha) for name in own):
            raise ValueError(f"{path} cannot be exported: rank_pattern or alpha_pattern names it, expected r and alpha")
    factors = {names.get(weight, weight): pair for weight, pair in file_factors(weights).items()}
    for path, layer in packed.items():
        parts = {name: factors.pop(f"{path}.{PROJECTIONS[name]}") for name in layer.weights}
        factors[path] = _stacked(layer, parts)
    fields = _fields_of_packed(config, packed, list(factors))
    for path, layer in packed.items():
        if isinstance(layer, CompLoRAMultiheadAttention):
            A, B = factors[path]  # [n·r, d], [3d, n·r]
            factors[f"{path}.base_layer.out_proj"] = (torch.zeros_like(A), torch.zeros_like(B[: B.shape[0] // 3]))
    return fields, factor_tensors(factors) | file_tensors(part, config)


def _renamed(config: CompLoRAConfig, names: dict[str, str]) -> CompLoRAConfig:
    """The configuration with the ranks and alphas of weights that have other names."""
    return dataclasses.replace(
        config,
        rank_pattern={name: config.rank_of(weight) for weight, name in names.items()},
        alpha_pattern={name: config.alpha_of(weight) for weight, name in names.items()},
    )


def _stacked(layer: CompLoRALayer, parts: FactorPairs) -> tuple[Tensor, Tensor]:
    """One pair A [n·r, in], B [3d, n·r]: `B A` has the updates of q, k, v above each other, 0 for one not adapted."""
    A = torch.cat([A for A, _ in parts.values()])  # [n·r, in]
    diagonal = torch.block_diag(*(B for _, B in parts.values()))  # [n·d, n·r]
    rows = torch.cat([torch.arange(layer.weights[name].start, layer.weights[name].stop) for name in parts])  # [n·d]
    B = diagonal.new_zeros(3 * diagonal.shape[0] // len(parts), A.shape[0])  # [3d, n·r]
    B[rows] = diagonal
    return A, B


def _fields_of_packed(config: CompLoRAConfig, packed: dict[str, CompLoRALayer], modules: list[str]) -> dict[str, Any]:
    """PEFT's configuration, with rank n·r and alpha · n (alpha · √n with rsLoRA) for packed weights."""
    if not packed:
        return peft_fields(config, modules)
    n = len(next(iter(packed.values())).weights)
    r, alpha = n * config.r, config.lora_alpha * (math.sqrt(n) if config.use_rslora else n)
    if len(packed) == len(modules):
        return peft_fields(config, modules, r=r, lora_alpha=alpha)
    pattern, fields = module_pattern(packed), peft_fields(config, modules)
    patterns = {"rank_pattern": {pattern: r}, "alpha_pattern": {pattern: alpha}}
    return fields | {name: fields[name] | values for name, values in patterns.items()}


# CLIP-LoRA's encoders, with the towers in the order in which its files number their layers.
CLIP_LORA_TOWERS = {"text": ("text",), "vision": ("image",), "both": ("text", "image")}
CLIP_LORA_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "proj"}
CLIP_LORA_POSITIONS = {  # the adapted blocks of a tower with n blocks; CLIP-LoRA has tables for n = 12 and 24
    "all": lambda n: range(n),
    "bottom": lambda n: range(n // 3),
    "mid": lambda n: range(n // 3, 2 * n // 3),
    "up": lambda n: range(2 * n // 3, n),
    "top3": lambda n: range(max(n - 3, 0), n),
    "half-bottom": lambda n: range(n // 2),
    "half-up": lambda n: range(n // 2, n),
}


def import_clip_lora(model: Model, path: str | os.PathLike[str], *, progress: bool = True) -> Model:
    """Adapts a plain model with the `lora_weights.pt` of CLIP-LoRA (Zanella and Ben Ayed, arXiv 2405.18541).

    The adapter is plain LoRA with `scaling = alpha / sqrt(r)`: `sides="none"`, `use_rslora=True`. The file holds
    neither the dropout, which becomes 0, nor anything about the model beyond its shapes: make sure that `model` is the
    CLIP that the adapter was trained on, for OpenAI's weights the variant with QuickGELU.

    Args:
        model: a CLIP model of a library that `complora_kernels.integrations` knows, without an adapter; in wrappers
            or not, as for `apply_complora`.
        path: the file; torch's weights-only reader reads it, which runs no code.
        progress: as `apply_complora`.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or not of this kind, or its factors do not fit the model, or the model has an
            adapter; it is then as it was.
    """
    if is_adapted(model):
        raise ValueError("model has an adapter already, expected a plain model")
    path = Path(path)
    with reading(path, "an adapter of CLIP-LoRA for this model", errors=ValueError):
        weights, metadata = _read_clip_lora(path)
        config, towers = _clip_lora_config(model, metadata)
        alone = [dataclasses.replace(config, towers=tower, layers=config.layers_of(tower)) for tower in towers]
        by_tower = [find_targets(model, own) for own in alone]
        layers = [target.path for targets in by_tower for target in targets]
        sources = {
            f"{layer}.{PROJECTIONS[name]}": f"layer_{i}.{CLIP_LORA_PROJECTIONS[name]}"
            for i, layer in enumerate(layers)
            for name in config.target_modules
        }
        check_names(str(path), weights, [f"{source}.w_lora_{factor}" for source in sources.values() for factor in "AB"])
        factors = {
            target: (weights[f"{source}.w_lora_A"], weights[f"{source}.w_lora_B"]) for target, source in sources.items()
        }
        check_factors(factors, weights_to_fill(model, config), config)
        factors = {target: (A.float(), B.float()) for target, (A, B) in factors.items()}
        fill_adapter(unwrap(model), config, factors)
    return model


def _read_clip_lora(path: Path) -> tuple[dict[str, Tensor], CLIPLoRAMetadata]:
    """The factors under names like `layer_0.q_proj.w_lora_A`, and the metadata."""
    require_file(path, "CLIP-LoRA's lora_weights.pt")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file, or one with more than tensors in it, fails in many ways
        # torch's own message is left out: it advises to load the file unsafely.
        raise ValueError(
            f"{path} cannot be read as tensors and plain values, expected CLIP-LoRA's lora_weights.pt "
            f"({type(error).__name__})"
        ) from None
    with reading(
        path,
        "weights of layer_0, ... and metadata with r, alpha, encoder, params, position, as in CLIP-LoRA's "
        "lora_weights.pt",
    ):
        check_type(saved, CLIPLoRAFile, "it")
    weights = {
        f"{layer}.{projection}.{name}": factor
        for layer, projections in saved["weights"].items()
        for projection, factors in projections.items()
        for name, factor in factors.items()
    }
    wrong = [name for name, factor in weights.items() if not _is_plain(factor)]
    if wrong:
        raise ValueError(f"{path} holds {', '.join(wrong)} that are no floating-point tensors, expected the factors")
    return weights, saved["metadata"]


def _is_plain(factor: Any) -> bool:
    """Whether `factor` is a floating-point tensor with values, neither sparse nor quantised nor on the meta device."""
    return isinstance(factor, Tensor) and factor.dtype in FLOATING and factor.layout is torch.strided and factor.is_cpu


def _clip_lora_config(model: nn.Module, metadata: CLIPLoRAMetadata) -> tuple[CompLoRAConfig, tuple[str, ...]]:
    """The configuration, and the towers in the order in which the file numbers their layers."""
    for name, known in (("encoder", CLIP_LORA_TOWERS), ("position", CLIP_LORA_POSITIONS)):
        if metadata[name] not in known:
            raise ValueError(f"{name}={metadata[name]!r}, expected one of {', '.join(known)}")
    if unknown := [name for name in metadata["params"] if name not in CLIP_LORA_PROJECTIONS]:
        raise ValueError(f"params has {', '.join(unknown)}, expected some of {', '.join(CLIP_LORA_PROJECTIONS)}")
    towers = CLIP_LORA_TOWERS[metadata["encoder"]]
    blocks = [block.tower for library in find(model) for block in library.residual_blocks(model)]
    position = CLIP_LORA_POSITIONS[metadata["position"]]
    chosen = {tower: tuple(position(blocks.count(tower))) for tower in towers if tower in blocks}
    try:
        config = CompLoRAConfig(
            r=metadata["r"],
            lora_alpha=metadata["alpha"],
            use_rslora=True,
            sides="none",
            target_modules=tuple(metadata["params"]),
            towers=towers,
            layers=None if metadata["position"] == "all" or not chosen else chosen,
        )
    except ValueError as error:
        raise ValueError(f"its metadata make no configuration: {error}") from None
    return config, towers
