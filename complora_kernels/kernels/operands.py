"""Loads of operands that a kernel multiplies behind its main loop."""

# pyright: reportArgumentType=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_early(pointers, mask, PIN: tl.constexpr):
    """Loads a tensor before a loop for a dot behind it, where `as_loaded` gives it its dtype back.

    The compiler puts an operand of a dot into shared memory as soon as it is loaded, and so waits for it before the
    first loads of the loop. With PIN it is loaded as integers, which stay in registers: of these it does not know.
    """
    if PIN:
        INTEGER: tl.constexpr = tl.int32 if pointers.dtype.element_ty.primitive_bitwidth == 32 else tl.int16
        pointers = pointers.to(tl.pointer_type(INTEGER), bitcast=True)
    return tl.load(pointers, mask=mask, other=0)


@triton.jit
def as_loaded(loaded, pointer, UPCAST: tl.constexpr):
    """What `load_early` loaded from `pointer`, in the dtype of the memory; with UPCAST in float32."""
    loaded = loaded.to(pointer.dtype.element_ty, bitcast=True)
    if UPCAST:
        loaded = loaded.to(tl.float32)
    return loaded
