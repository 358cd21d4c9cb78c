"""The names of one weight in the libraries that have the same CLIP: open_clip and transformers.

A name is that of files: a module's path, in attention that of the projection (`attn.q_proj`), also where a library
keeps q, k and v in one parameter.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator
from typing import Literal

Library = Literal["open_clip", "transformers"]
LIBRARIES: tuple[Library, ...] = ("open_clip", "transformers")
Exported = Literal["transformers"]  # where every weight of a block is that of an nn.Linear

# Where the blocks of a tower lie, in every layout of a library, and the parts of a block.
TOWERS: tuple[dict[Library, tuple[str, ...]], ...] = (
    {"open_clip": ("visual.transformer.resblocks.",), "transformers": ("vision_model.encoder.layers.",)},
    {
        "open_clip": ("transformer.resblocks.", "text.transformer.resblocks."),
        "transformers": ("text_model.encoder.layers.",),
    },
)
PARTS: tuple[dict[Library, str], ...] = (
    *({"open_clip": f"attn.{name}", "transformers": f"self_attn.{name}"} for name in ("q_proj", "k_proj", "v_proj")),
    {"open_clip": "attn.out_proj", "transformers": "self_attn.out_proj"},
    {"open_clip": "mlp.c_fc", "transformers": "mlp.fc1"},
    {"open_clip": "mlp.c_proj", "transformers": "mlp.fc2"},
)

# How the names of a library's residual blocks begin.
BLOCKS = {
    "open_clip": r"(visual\.|text\.)?transformer\.resblocks|text_decoder\.(resblocks|cross_attn)",
    "timm": r"(visual\.trunk\.)?(layers\.\d+\.)?blocks",
    "torchvision": r"encoder\.layers\.encoder_layer_\d+|features",
    "transformers": r"((\w+_model|\w+)\.)?encoder\.layers?|(\w+\.)*layer",
    "torch": r"(\w+\.)*layers",
}


def library_of(name: str) -> str | None:
    """The library that names a weight so: the first that could."""
    return next((library for library, start in BLOCKS.items() if re.match(rf"({start})\.", name)), None)


def exchanged(name: str, modules: Collection[str]) -> bool:
    """Whether a model with `modules` has a weight under its name in another library with the same CLIP."""
    aliases = (alias for library in LIBRARIES for alias in names_in(library, name))
    return any({alias, alias.rpartition(".")[0]} & set(modules) for alias in aliases)


def names_in(library: Library, name: str) -> Iterator[str]:
    """The names that a weight may have in a library, first that of its usual layout."""
    for tower, other in itertools.product(TOWERS, LIBRARIES):
        for blocks in tower[other]:
            layer, _, part = name.removeprefix(blocks).partition(".")
            if name.startswith(blocks) and layer.isdigit():
                parts = [parts[library] for parts in PARTS if parts[other] == part]
                yield from (f"{own}{layer}.{part}" for own in tower[library] for part in parts)


def linear_names(library: Exported, names: Collection[str]) -> dict[str, str]:
    """The names of weights in a library, by those in any.

    Raises:
        ValueError: another library, or one that has no such weight.
    """
    if library != "transformers":
        raise ValueError(f"library={library!r}, expected None or 'transformers'")
    renamed = {name: alias for name in names for alias in names_in(library, name)}  # it has one layout
    unknown = [name for name in names if name not in renamed]
    if unknown:
        raise ValueError(f"{library}'s CLIPModel has no {', '.join(unknown):.200}, expected weights of CLIP's blocks")
    return renamed


def own_name(name: str, known: Collection[str]) -> str:
    """The name under which a model with the weights `known` has a weight; the name itself where it has none."""
    aliases = (alias for library in LIBRARIES for alias in names_in(library, name))
    return next((alias for alias in (name, *aliases) if alias in known), name)
