"""Ranks that differ between weights, as `rank_pattern` of a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import nn

from complora_kernels.adapters.build import find_targets
from complora_kernels.common.wrappers import unwrap
from complora_kernels.config import CompLoRAConfig
from complora_kernels.integrations import find


def rising_ranks(model: nn.Module, config: CompLoRAConfig, first: int, last: int) -> CompLoRAConfig:
    """The configuration with ranks that rise from block to block, as PRILoRA's (arXiv 2401.11316, section 3.2).

    Block l of a tower's L blocks gets the rank `first + (last - first) · l / (L - 1)`, rounded; a single block gets
    `last`. Each weight keeps the scaling that `config` gives it. PRILoRA also prunes A, which is left out here.

    Args:
        model: plain; it stays as it is.
        config: selects what is adapted, in the residual blocks of the model's towers.
        first: the rank in the first block, at least 1.
        last: the rank in the last block, at least 1.

    Raises:
        ValueError: a rank is below 1, `config` has a `rank_pattern` or an `alpha_pattern`, or a target is in no
            residual block; or as `apply_complora`.
    """
    for name, rank in (("first", first), ("last", last)):
        if rank < 1:
            raise ValueError(f"{name}={rank}, expected at least 1")
    check_one_rank(config)
    plain = unwrap(model)
    blocks = [block for library in find(plain) for block in library.residual_blocks(plain)]
    depths = {
        tower: max(block.layer for block in blocks if block.tower == tower) for tower in {b.tower for b in blocks}
    }
    ranks = {}
    for target in find_targets(model, config):
        of = next((block for block in blocks if f"{target.path}.".startswith(f"{block.path}.")), None)
        if of is None:
            raise ValueError(f"{target.path} is in no residual block, expected targets in residual blocks alone")
        depth = depths[of.tower]
        ranks[target.path] = round(first + (last - first) * of.layer / depth) if depth else last
    return with_ranks(config, ranks)


def check_one_rank(config: CompLoRAConfig) -> None:
    """Raises ValueError where the configuration has ranks or strengths of single weights already."""
    for name in ("rank_pattern", "alpha_pattern"):
        if value := getattr(config, name):
            raise ValueError(f"{name}={value}, expected none: the ranks are computed, and every scaling stays as it is")


def with_ranks(config: CompLoRAConfig, ranks: Mapping[str, int]) -> CompLoRAConfig:
    """The configuration with other ranks for some weights or modules, whose scalings stay as they are.

    Args:
        config: with one rank.
        ranks: ranks by full names, of which none is the name of a module that holds another.
    """
    # The first ending that fits counts: "transformer.a" would fit "visual.transformer.a", and comes after it.
    names = sorted(ranks, key=len, reverse=True)
    power = 0.5 if config.use_rslora else 1.0
    alphas = {name: config.lora_alpha * (ranks[name] / config.r) ** power for name in names}
    return dataclasses.replace(config, rank_pattern={name: ranks[name] for name in names}, alpha_pattern=alphas)
