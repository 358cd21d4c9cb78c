"""`CompLoRAConfig`: what is adapted, how strongly, and which subspace of each weight is protected."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from complora_kernels.common.schema import check_type, is_int, is_number
from complora_kernels.subspace import SOURCES, Source, SubspaceSource, check_subspace_size

Sides = Literal["output", "input", "both", "none"]

ATTENTION_TARGETS = ("q", "k", "v", "o")
MLP_TARGETS = ("fc1", "fc2")
TARGETS = ATTENTION_TARGETS + MLP_TARGETS
TOWERS = ("image", "text")


@dataclass(frozen=True, kw_only=True)
class CompLoRAConfig:
    """How `apply_complora` adapts a model; fields are named as in PEFT's `LoraConfig` where it has them.

    An adapted layer computes `y = x W^T + b + scaling · (drop(x) Ã^T) B̃^T` with `Ã = A P_in` and `B̃ = P_out B`,
    where `P_out = I - U_k U_k^T` and `P_in = I - V_k V_k^T` remove the top-k singular directions of `W`
    (Comp-LoRA, arXiv 2501.15040). The paper's own `k`, rank and layers are not known to us: choose them for your task.

    Args:
        r: rank of the update, at least 1.
        lora_alpha: `scaling = lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
        lora_dropout: probability in [0, 1) with which an element of the adapter's input is dropped in training.
        use_rslora: rank-stabilised scaling (arXiv 2312.03732).
        sides: "output" projects B (the default formula of the package), "input" projects A, "both" projects the two
            as the paper's figure does, "none" is plain LoRA.
        subspace_k: number of protected directions, 0 <= k <= min(out, in).
        subspace_energy: share in (0, 1]; k is the smallest number of directions that holds this share of Σσ² (with
            `subspace_source="activations"`, of the trace of the matrix whose eigenvectors they are).
        subspace_ratio: share in [0, 1]; k = round(ratio · min(out, in)).
            Exactly one of the three sizes is given, none of them with `sides="none"`.
        subspace_source: "weight" protects the principal directions of the weight, "random" as many random ones:
            the control that tells whether the singular vectors matter. "activations" protects the principal directions
            of the weight's inputs X [M, in] and products Y = X W^T [M, out] on calibration batches: V_k are the top-k
            eigenvectors of X^T X, U_k those of Y^T Y. Not used with `sides="none"`.
        subspace_seed: chooses the random directions of `subspace_source="random"`.
        target_modules: any of q k v o fc1 fc2 in the residual blocks of the towers, or one regular expression that
            must match a whole module name; it then selects `nn.Linear` modules of any model.
        towers: "image", "text" or both. Not used with a regular expression.
        layers: indices of the residual blocks to adapt in each tower; None adapts all.
        modules_to_save: ends of the names of modules that are trained as a whole beside the factors, such as a new
            "head", and are saved, loaded and exported with them. They are trained in place: `disable_adapter`,
            `unmerge_adapter` and `unload` leave them as they are.

    Raises:
        ValueError: a field is out of its range; the message names the field, its value and what was expected.
    """

    r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    sides: Sides = "output"
    subspace_k: int | None = None
    subspace_energy: float | None = None
    subspace_ratio: float | None = None
    subspace_source: SubspaceSource = "weight"
    subspace_seed: int = 0
    target_modules: tuple[str, ...] | str = ("q", "k", "v")
    towers: tuple[str, ...] = ("image", "text")
    layers: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks = {
            "r": (is_int(self.r) and self.r >= 1, "an integer of at least 1"),
            "lora_alpha": (is_number(self.lora_alpha) and self.lora_alpha > 0, "a positive number"),
            "lora_dropout": (is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1, "a probability in [0, 1)"),
            "use_rslora": (isinstance(self.use_rslora, bool), "True or False"),
            "sides": (self.sides in get_args(Sides), f"one of {', '.join(get_args(Sides))}"),
            "subspace_source": (self.subspace_source in tuple(SOURCES), f"one of {', '.join(SOURCES)}"),
            "subspace_seed": (is_int(self.subspace_seed), "an integer"),
        }
        for name, (valid, expected) in checks.items():
            _require(valid, name, getattr(self, name), expected)
        self._check_subspace_size()
        self._check_selection()

    def _check_subspace_size(self) -> None:
        given = {name: value for name, value in self.subspace_size.items() if value is not None}
        if self.sides == "none":
            _require(not given, "sides", "none", f"no subspace size, because plain LoRA protects nothing; got {given}")
            return
        _require(
            len(given) == 1,
            "subspace_k, subspace_energy, subspace_ratio",
            given or None,
            f'exactly one of the three with sides="{self.sides}"',
        )
        check_subspace_size(**self.subspace_size, prefix="subspace_")

    def _check_selection(self) -> None:
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(
                    f"target_modules={self.target_modules!r} is not a regular expression: {error}"
                ) from None
            _require(self.layers is None, "layers", self.layers, "None when target_modules is a regular expression")
        else:
            object.__setattr__(self, "target_modules", _names("target_modules", self.target_modules, TARGETS))
        object.__setattr__(self, "towers", _names("towers", self.towers, TOWERS))
        names = _tuple(self.modules_to_save)
        valid = all(isinstance(name, str) and name for name in names)
        _require(valid, "modules_to_save", self.modules_to_save, "ends of module names")
        object.__setattr__(self, "modules_to_save", names)
        if self.layers is not None:
            layers = _tuple(self.layers)
            valid = bool(layers) and all(is_int(layer) and layer >= 0 for layer in layers)
            _require(valid, "layers", self.layers, "None or non-negative block indices")
            object.__setattr__(self, "layers", tuple(sorted(set(layers))))

    @property
    def subspace_size(self) -> dict[str, Any]:
        """The three sizes under the names that `principal_basis` takes: `k`, `energy`, `ratio`."""
        return {"k": self.subspace_k, "energy": self.subspace_energy, "ratio": self.subspace_ratio}

    @property
    def source(self) -> Source:
        """The source of the protected directions. Plain LoRA, which protects none, needs no data whatever is named."""
        return SOURCES["weight" if self.sides == "none" else self.subspace_source]

    @property
    def protects_activations(self) -> bool:
        """Whether calibration batches are needed: `subspace_source="activations"` with a projected side."""
        return self.source.needs_data

    @property
    def scaling(self) -> float:
        """`lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them (tuples become lists)."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CompLoRAConfig:
        """The inverse of `to_dict`; an unknown field, or one of another type, is an error that names it.

        A regular expression is not compiled: one that comes from a file may take hours.
        """
        hints = get_type_hints(cls)
        unknown = sorted(set(fields) - hints.keys())
        _require(not unknown, "CompLoRAConfig fields", unknown, "fields that this version knows")
        for name, value in fields.items():
            check_type(value, hints[name], name)
        values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in fields.items()}
        pattern = values.get("target_modules")
        if not isinstance(pattern, str):
            return cls(**values)
        values["target_modules"] = ""
        config = cls(**values)
        object.__setattr__(config, "target_modules", pattern)
        return config


def _names(field: str, values: Any, known: tuple[str, ...]) -> tuple[str, ...]:
    values = _tuple(values)
    unknown = [value for value in values if value not in known]
    _require(bool(values) and not unknown, field, unknown or values, f"a selection of {', '.join(known)}")
    return tuple(name for name in known if name in values)


def _tuple(values: Any) -> tuple[Any, ...]:
    """The values as a tuple; one that stands alone becomes a tuple of one."""
    return tuple(values) if isinstance(values, Iterable) and not isinstance(values, str) else (values,)


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r}, expected {expected}")
