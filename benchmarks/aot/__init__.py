"""Every Triton kernel that ships, compiled for the chips it ships for on a machine without a GPU: `make aot`.

The launching functions run as on a GPU, but a driver that knows its chip by name alone stands in for the real one, and
each launch ends when its kernel is compiled. `machine_code` reads what the compiler made, `checks` says what is wrong
with it whatever it was before, and `budgets` compares it with the figures in `benchmarks/budgets.toml`.
"""

from benchmarks.aot.chips import ChipDriver

__all__ = ["ChipDriver"]
