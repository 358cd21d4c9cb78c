"""`explain`: how an adapted model runs, product by product."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from complora_kernels import functional
from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.adapters.build import adapted_layers, adapted_model
from complora_kernels.backends import REFERENCE, plans
from complora_kernels.integrations import find
from complora_kernels.modules.block import CompLoRABlock
from complora_kernels.modules.layer import CompLoRALayer
from complora_kernels.modules.protected import PROJECTED_SIDES


class ExplainedWeight(NamedTuple):
    """How the product with one adapted weight is computed.

    Attributes:
        name: the weight's name in files.
        r: the rank of its update.
        k: the number of protected directions on the widest projected side; 0 for plain LoRA.
        energy: the share of the weight's energy in them, see `SubspaceReport`.
        backend: the backend of the product.
        plan: the plan of the product, see `backends.plans`; "" on a backend that has none.
        block: "fused", or why the residual block around it is not; "" where there is none.
    """

    name: str
    r: int
    k: int
    energy: float
    backend: str
    plan: str
    block: str


class Explanation(list[ExplainedWeight]):
    """One row for each adapted weight; printed as a table."""

    def __str__(self) -> str:
        header = ("weight", "r", "k", "energy", "backend", "plan", "block")
        rows = [header, *((*map(str, row[:3]), f"{row.energy:.3f}", *row[4:]) for row in self)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def explain(model: nn.Module, *, tokens: int = 4096, dtype: torch.dtype | None = None) -> Explanation:
    """How each adapted weight of `model` is computed in training: backend, plan, fused block or why not, k and energy.

        print(ck.explain(model, tokens=batch * positions))

    Args:
        model: a model from `apply_complora`.
        tokens: M, the number of vectors that one call multiplies with a weight: batch size times positions.
        dtype: the dtype of the vectors; None: that of each weight. Autocast counts where it is on.

    Raises:
        ValueError: `model` has no adapter, is a part of an adapted model or holds several; `tokens` is below 1.
        RuntimeError: `COMPLORA_BACKEND` names a backend that cannot run here or does not support a product.
    """
    if tokens < 1:
        raise ValueError(f"tokens={tokens}, expected at least 1")
    part = adapted_model(model)
    blocks = _blocks(part)
    explanation = Explanation()
    for path, layer in adapted_layers(part).items():
        block = next((how for prefix, how in blocks.items() if path.startswith(f"{prefix}.")), "")
        for parameter in dict.fromkeys(rows.parameter for rows in layer.weights.values()):
            names = [name for name, rows in layer.weights.items() if rows.parameter == parameter]
            backend, plan = _backend_and_plan(layer, names, tokens, dtype)
            explanation += [_row(layer, name, backend, plan, block) for name in names]
    return explanation


def _row(layer: CompLoRALayer, name: str, backend: str, plan: str, block: str) -> ExplainedWeight:
    bases = [layer.basis(name, side) for side in PROJECTED_SIDES[layer.config.sides]]
    known = [basis for basis in bases if basis is not None]
    k, energy = max((basis.k for basis in known), default=0), known[0].energy if known else 0.0
    return ExplainedWeight(layer.weight_name(name), len(layer.factors(name)[0]), k, energy, backend, plan, block)


def _blocks(model: nn.Module) -> dict[str, str]:
    """For each residual block by its path: "fused", or why it is not."""
    blocks = {}
    for library in find(model):
        for block in library.residual_blocks(model):
            parts = library.parts_of_block(block.module)
            fused = isinstance(block.module, CompLoRABlock)
            blocks[block.path] = parts if isinstance(parts, str) else "fused" if fused else "its tower has no adapter"
    return blocks


def _backend_and_plan(
    layer: CompLoRALayer, names: list[str], tokens: int, dtype: torch.dtype | None
) -> tuple[str, str]:
    """The backend and the plan of the product with one frozen weight that the named adapters share."""
    weight = layer.frozen_parameter(names[0]).detach()  # [N, K]
    computed = functional.compute_dtype(weight.new_empty(0, dtype=dtype))
    x = weight.new_empty(1, dtype=computed).expand(tokens, weight.shape[1])  # [M, K], holds no values
    As, Bs = zip(*(layer.factors(name) for name in names), strict=True)
    As, Bs = ([factor.detach().to(computed) for factor in factors] for factors in (As, Bs))
    rows = [(layer.weights[name].start, layer.weights[name].stop) for name in names]
    linear = AdaptedLinear(weight, None, As, Bs, rows, layer.config.lora_dropout)
    dropping = linear.dropout_p > 0
    backend = functional.resolve(
        None, "packed_lora_linear", x, lambda backend: backend.unsupported_linear(x, linear), dropping=dropping
    )
    if backend == REFERENCE:
        return backend, ""
    return backend, str(plans.choose_for(x, linear, "triton" if backend == "triton" else "torch"))
