"""EVA (arXiv 2410.07170): first factors along the principal directions of the inputs, and ranks that follow them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from complora_kernels.adapters.build import build_layers, check_plain, check_room, compute_bases
from complora_kernels.adapters.calibration import Calibrate, weight_moments
from complora_kernels.adapters.install import install
from complora_kernels.adapters.ranks import check_one_rank, with_ranks
from complora_kernels.common.wrappers import unwrap
from complora_kernels.config import CompLoRAConfig
from complora_kernels.modules.several import DEFAULT

Model = TypeVar("Model", bound=nn.Module)


def apply_eva(
    model: Model,
    config: CompLoRAConfig,
    calibrate: Calibrate,
    *,
    rho: float = 2.0,
    adapter_name: str = DEFAULT,
    progress: bool = True,
) -> Model:
    """Adapts `model` in place as `apply_complora` does, with EVA's first factors and ranks (arXiv 2410.07170).

    On the calibration batches each weight has inputs X [M, in], with `X^T X = Σ_i λ_i v_i v_i^T`, λ descending. The
    rows of A start as v_1 ... v_r, those of B at zero, so that the outputs are unchanged.

    The ranks follow the inputs too (the paper's section 3.3): of the first `rho · r` directions of all n weights, those
    are kept that explain the largest shares `λ_i / Σ_j λ_j` of their own weight's inputs, r · n in all, and at least
    one of each weight. (EVA leaves weights without any unadapted.) Each weight keeps its scaling. X is not centred.
    Weights that share an input, as q, k and v do, have the same directions.

    Args:
        model: as for `apply_complora`.
        config: as for `apply_complora`, without `rank_pattern` and `alpha_pattern`, and with another source than
            "activations". The ranks that were found stand in `rank_pattern` of the adapter's configuration.
        calibrate: as for `apply_complora`: runs what is adapted on some batches without labels.
        rho: the highest rank of a weight, as a multiple of r, at least 1; with 1 all ranks are r.
        adapter_name: as for `apply_complora`.
        progress: as for `apply_complora`.

    Returns:
        The same model.

    Raises:
        ValueError: `rho` is below 1, `config` has ranks or needs activations; or as `apply_complora`. The model is then
            as it was.
    """
    if not rho >= 1:
        raise ValueError(f"rho={rho}, expected at least 1")
    check_one_rank(config)
    if config.protects_activations:
        raise ValueError(f"subspace_source={config.subspace_source!r}, expected another source with apply_eva")
    check_plain(model)
    drafts = build_layers(model, config, adapter_name=adapter_name)
    moments = weight_moments(unwrap(model), drafts, calibrate)
    names = {layer.weight_name(name): (path, name) for path, _, layer in drafts for name in layer.weights}
    spectra = {weight: _spectrum(moments[key]) for weight, key in names.items()}
    ranks = eva_ranks({weight: values for weight, (values, _) in spectra.items()}, config.r, rho)
    replacements = build_layers(model, with_ranks(config, ranks), adapter_name=adapter_name)
    for _, _, layer in replacements:
        for name in layer.weights:
            A, _ = layer.factors(name)
            with torch.no_grad():
                A.copy_(spectra[layer.weight_name(name)][1][: len(A)])
    compute_bases(replacements, progress=progress)
    check_room(replacements)
    install(model, replacements)
    return model


def eva_ranks(values: Mapping[str, Tensor], r: int, rho: float) -> dict[str, int]:
    """The rank of each weight: r on average, at least 1 and at most `rho · r` each.

    Args:
        values: the eigenvalues [in] of each weight's `X^T X`, descending.
        r: the mean rank.
        rho: the highest rank as a multiple of r.
    """
    most = {weight: min(int(rho * r), len(of)) for weight, of in values.items()}
    ranks = dict.fromkeys(values, 1)
    shares = {weight: (of.clamp(min=0) / of.clamp(min=0).sum()).tolist() for weight, of in values.items()}
    candidates = [(-shares[weight][i], i, weight) for weight in values for i in range(1, most[weight])]
    for _, _, weight in sorted(candidates)[: (r - 1) * len(values)]:
        ranks[weight] += 1
    return ranks


def _spectrum(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues [in] of a second moment, descending, and its eigenvectors as rows [in, in]."""
    values, vectors = torch.linalg.eigh(moment)
    return values.flip(0), vectors.mT.flip(0)
