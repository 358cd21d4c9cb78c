"""Weighted sums of adapters as one LoRA of their concatenated factors, without a product with a frozen weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from complora_kernels.adapters.configuration import most_frequent
from complora_kernels.config import PROJECTIONS, CompLoRAConfig
from complora_kernels.modules.layer import CompLoRALayer, fold_each
from complora_kernels.modules.several import InactiveAdapter

Pair = tuple[Tensor, Tensor]  # Ã [r, in] and s · B̃ [out, r]


class Parts(NamedTuple):
    """The adapters of one layer that are summed: layers in which they lie, and how many columns each one has."""

    layers: dict[str, CompLoRALayer]  # by the name of the adapter
    ranks: dict[str, int]  # the highest rank that it has in this layer

    @property
    def weights(self) -> list[str]:
        """The weights of the layer that one of the adapters adapts: "", or some of q, k, v, o."""
        own = {name for layer in self.layers.values() for name in layer.weights}
        return [name for name in ("", *PROJECTIONS) if name in own]


class Sum(NamedTuple):
    """The weighted sum of adapters in one layer; the same configuration in all layers."""

    adapter: InactiveAdapter  # on no weights, where none of them has the layer
    ranks: dict[str, int]  # the columns of each adapter, one adapter after the other


def parts_of(layer: CompLoRALayer, adapter_names: Mapping[str, float]) -> Parts:
    """Those of the named adapters that the layer has."""
    seen = {name: layer.seen_with(name) for name in adapter_names}
    layers = {name: each for name, each in seen.items() if each is not None}
    return Parts(
        layers, {name: max(len(each.factors(weight)[0]) for weight in each.weights) for name, each in layers.items()}
    )


@torch.no_grad()
@torch.inference_mode(False)  # a parameter must not become an inference tensor
def sums_of(layers: Mapping[str, CompLoRALayer], weights: Mapping[str, float]) -> dict[str, Sum]:
    """`ΔW = Σ w_i ΔW_i` of the named adapters in each layer, by its path.

    `A = [Ã_1; Ã_2; …]` [R, in], `B = [w_1 s_1 B̃_1, w_2 s_2 B̃_2, …]` [out, R]. In a layer with several weights all have
    the same R, because kernels support equal ranks: zeros stand where an adapter has less, or does not adapt a weight.
    """
    parts = {path: parts_of(layer, weights) for path, layer in layers.items()}
    folded = _folded(parts)
    factors = {
        path: {
            name: _concatenated({adapter: folded.get((path, adapter, name)) for adapter in part.ranks}, part, weights)
            for name in part.weights
        }
        for path, part in parts.items()
    }
    ranks = {layers[path].weight_name(name): len(A) for path, own in factors.items() for name, (A, _) in own.items()}
    config = next((each.config for part in parts.values() for each in part.layers.values()), None)
    config = next(iter(layers.values())).config if config is None else _config(config, ranks)
    sums = {}
    for path, own in factors.items():
        places = {name: place for each in parts[path].layers.values() for name, place in each.weights.items()}
        adapter = InactiveAdapter.without_bases(config, {name: places[name] for name in own})
        adapter.train(layers[path].training)
        if own:
            pairs = {name: (nn.Parameter(A, False), nn.Parameter(B, False)) for name, (A, B) in own.items()}
            layers[path].hold_factors(adapter, pairs)
        sums[path] = Sum(adapter, parts[path].ranks)
    return sums


def _folded(parts: Mapping[str, Parts]) -> dict[tuple[str, str, str], Pair]:
    """Ã and s · B̃ of each weight, by the path of its layer, the adapter and its name."""
    layers = {
        (path, adapter, name): layer
        for path, part in parts.items()
        for adapter, layer in part.layers.items()
        for name in layer.weights
    }
    folded = fold_each([(layer, name, None) for (*_, name), layer in layers.items()])
    return {key: (A, B) for key, (_, A, B) in zip(layers, folded, strict=True)}


def _concatenated(folded: Mapping[str, Pair | None], parts: Parts, weights: Mapping[str, float]) -> Pair:
    """A [R, in] and B [out, R] of one weight, from the folded factors of the adapters that have it."""
    like_A, like_B = next(pair for pair in folded.values() if pair is not None)
    R = sum(parts.ranks.values())
    A, B = like_A.new_zeros(R, like_A.shape[1]), like_B.new_zeros(len(like_B), R)
    first = 0
    for adapter, rank in parts.ranks.items():
        pair = folded[adapter]
        if pair is not None:
            own_A, own_B = pair  # [r, in], [out, r]
            last = first + len(own_A)
            A[first:last], B[:, first:last] = own_A, weights[adapter] * own_B
        first += rank
    return A, B


def _config(config: CompLoRAConfig, ranks: dict[str, int]) -> CompLoRAConfig:
    """Plain LoRA with these ranks, by the names of weights, and a scaling of 1."""
    r, rank_pattern = most_frequent(ranks)
    nothing: dict[str, Any] = {f"subspace_{name}": None for name in config.subspace_size}
    return dataclasses.replace(
        config,
        r=r,
        lora_alpha=float(r),
        rank_pattern=rank_pattern,
        alpha_pattern={name: float(rank) for name, rank in rank_pattern.items()},
        use_rslora=False,
        lora_dropout=0.0,
        sides="none",
        subspace_source="weight",
        update_bound=None,  # the updates that are summed are bounded
        **nothing,
    )
