"""A plugin of pytest: PEFT's own tests, from a checkout of PEFT, on models that `accelerate_peft` has changed.

    PYTHONPATH=.:tests/support pytest -p accelerated_peft PATH/tests/test_custom_models.py -k Lora

It needs what PEFT's tests need. Every model that `get_peft_model` or `PeftModel.from_pretrained` makes is accelerated,
and so are the layers that adapters add later; at the end the number of products on this package's kernels is printed.
"""

from __future__ import annotations

import functools
from typing import Any

import peft
import pytest
from peft.tuners.lora import LoraModel

import complora_kernels as ck
from complora_kernels import functional

products: list[int] = []
plain_product, plain_injection = functional.lora_linear, LoraModel.inject_adapter


def counted_product(*arguments: Any, **options: Any) -> Any:
    products.append(1)
    return plain_product(*arguments, **options)


@functools.wraps(plain_injection)
def accelerated_injection(self: Any, *arguments: Any, **options: Any) -> Any:
    result = plain_injection(self, *arguments, **options)
    if any(isinstance(module, peft.tuners.lora.LoraLayer) for module in self.modules()):
        ck.accelerate_peft(self)
    return result


def pytest_configure() -> None:
    functional.lora_linear = counted_product
    LoraModel.inject_adapter = accelerated_injection


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"{len(products)} products on the kernels of complora_kernels")
