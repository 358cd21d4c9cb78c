"""The only files that know a model library: each finds the parts of its models that can be adapted."""

from __future__ import annotations

from typing import Any

from torch import nn

from complora_kernels.integrations import open_clip


def find(model: nn.Module) -> Any:
    """The integration that knows the parts of `model`."""
    return open_clip
