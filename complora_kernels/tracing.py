"""Who follows operations one by one: torch.func, forward-mode differentiation, torch.jit.trace."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor, maybe_current_level
from torch.autograd import forward_ad


_VMAP_MODE = torch._C._parse_dispatch_key("VmapMode")


def is_followed() -> bool:
    """Whether somebody follows what is computed now, operation by operation, who cannot enter a custom Function.

    These are torch.func, a batched backward pass, forward-mode differentiation and torch.jit.trace.
    """
    return maybe_current_level() is not None or forward_ad._current_level >= 0 or _is_traced() or _is_batched()


def is_differentiated() -> bool:
    """Within a backward pass: whether it is differentiated again (`create_graph=True`), or followed."""
    return torch.is_grad_enabled() or is_followed()


def has_values(tensor: Tensor) -> bool:
    """Whether the values of `tensor` can be read now; fakes, tracers and torch.func's wrapped tensors have none."""
    plain = type(tensor) in (Tensor, nn.Parameter) and not is_functorch_wrapped_tensor(tensor)
    return plain and not tensor.is_meta and not _is_traced()


def _is_batched() -> bool:
    """As by `is_grads_batched=True`, whose tensors are not torch.func's."""
    return torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)


def _is_traced() -> bool:
    return torch._C._get_tracing_state() is not None


# torch.compile calls it while it traces and takes the result for a constant: it guards the transforms itself.
is_followed._dynamo_marked_constant = True  # type: ignore[attr-defined]
