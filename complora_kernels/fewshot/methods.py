"""The names of the methods, and the adapter that each stands for."""

from __future__ import annotations

from typing import Any, Literal

Method = Literal[
    "lora",
    "lora-wd",
    "preserve",
    "lora-plus",
    "eva",
    "prilora",
    "image-lora",
    "output",
    "input",
    "both",
    "random",
    "random-input",
    "random-both",
    "ends",
    "ends-input",
    "ends-both",
    "activations",
    "activations-input",
    "activations-both",
    "tip-adapter",
    "linear-probe",
    "lfa",
]

# The arguments of `CompLoRAConfig` by method, in the order of tables; None: a baseline without adapter, see `anchors`.
METHODS: dict[Method, dict[str, Any] | None] = {
    "lora": {"sides": "none"},
    "lora-wd": {"sides": "none"},
    "preserve": {"sides": "none"},
    "lora-plus": {"sides": "none"},
    "eva": {"sides": "none"},
    "prilora": {"sides": "none"},
    "image-lora": {"sides": "none", "target_modules": ("v",), "towers": ("image",)},
    "output": {"sides": "output"},
    "input": {"sides": "input"},
    "both": {"sides": "both"},
    "random": {"sides": "output", "subspace_source": "random"},
    "random-input": {"sides": "input", "subspace_source": "random"},
    "random-both": {"sides": "both", "subspace_source": "random"},
    "ends": {"sides": "output", "subspace_source": "ends"},
    "ends-input": {"sides": "input", "subspace_source": "ends"},
    "ends-both": {"sides": "both", "subspace_source": "ends"},
    "activations": {"sides": "output", "subspace_source": "activations"},
    "activations-input": {"sides": "input", "subspace_source": "activations"},
    "activations-both": {"sides": "both", "subspace_source": "activations"},
    "tip-adapter": None,
    "linear-probe": None,
    "lfa": None,
}
