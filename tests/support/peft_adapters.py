"""Adapters as PEFT makes and saves them, with random factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn


def peft_model(model: nn.Module, seed: int = 1, **options: Any) -> Any:
    """A model of PEFT whose `lora_` parameters have random values; those of `modules_to_save` are moved too."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return wrapped.eval()


def saved_by_peft(directory: Path, model: nn.Module, **options: Any) -> Any:
    """Such a model, which is also in `directory`."""
    wrapped = peft_model(model, **options)
    wrapped.save_pretrained(str(directory))
    return wrapped
