"""Whether operations are followed one by one: by torch.func, forward-mode differentiation, torch.jit.trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import FunctionType
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._C import (
    _dispatch_key_parse,
    _dispatch_tls_is_dispatch_key_included,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, maybe_current_level
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

Function = TypeVar("Function", bound=FunctionType)

PLAIN = (Tensor, nn.Parameter)
CHECKPOINT = "torch.utils.checkpoint"
_VMAP_MODE = _dispatch_key_parse("VmapMode")


def runs_while_compiled(function: Function) -> Function:
    """Lets torch.compile call `function` while it traces, and take the result for a constant.

    It does not compile it on its own either, where code that it left to Python calls it.
    """
    vars(function)["_dynamo_marked_constant"] = True
    frames: Any = torch._C._dynamo.eval_frame  # pyright: ignore[reportAttributeAccessIssue]
    skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
    frames.set_code_exec_strategy(function.__code__, skip)
    return function


def is_followed() -> bool:
    """Whether something that cannot enter a custom Function follows the computation, operation by operation.

    Such are torch.func, a batched backward pass, forward-mode differentiation and torch.jit.trace.
    """
    return (  # in one expression: every adapted layer asks, several times
        maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
        or _dispatch_tls_is_dispatch_key_included(_VMAP_MODE)  # `is_grads_batched=True`
    )


def is_traced() -> bool:
    """Whether torch.jit.trace records the operations."""
    return _get_tracing_state() is not None


def is_exported() -> bool:
    """Whether torch.export traces. Dynamo of torch 2.11 takes torch's own function for true under torch.compile too."""
    return torch.compiler.is_exporting()


def is_checkpointed_selectively() -> bool:
    """Whether selective checkpointing runs a forward pass: it keeps results, which must not be written to."""
    return _len_torch_dispatch_stack() > 0 and type(_get_current_dispatch_mode()).__module__ == CHECKPOINT


def is_dispatched(x: Tensor) -> bool:
    """Whether operations on x are seen one by one: by torch.compile, a dispatch mode, or a subclass of Tensor."""
    return torch.compiler.is_compiling() or _len_torch_dispatch_stack() > 0 or not is_plain(x)


def is_fake(tensor: Tensor) -> bool:
    """Whether `tensor` has a shape and no values: one on the meta device, or of torch's FakeTensorMode."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def is_plain(tensor: Tensor) -> bool:
    """Whether `tensor` is of torch's own class, and of no subclass that may see operations or have no memory."""
    return type(tensor) in PLAIN


def is_differentiated() -> bool:
    """Whether the running backward pass is differentiated again (`create_graph=True`), or followed."""
    return is_grad_enabled() or is_followed()


class Unscriptable(nn.Module):
    """A module that says what to do instead of torch.jit.script, which would fail on its annotations."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script cannot compile an adapted model ({type(self).__name__}), merged or not: use "
            "torch.jit.trace or torch.export, or script what merge_and_unload makes of it"
        )


def check_followed(x: Tensor) -> None:
    """Raises TypeError for what is no tensor: the stand-in that torch.fx.symbolic_trace passes through a model."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"x is a {type(x).__name__}, expected a tensor: torch.fx.symbolic_trace cannot follow an adapted layer, "
            "use torch.export, or a torch.fx.Tracer to which the layer is a leaf"
        )


@contextlib.contextmanager
def computed_at_once(device: torch.device) -> Iterator[None]:
    """Within it operations on tensors with values compute theirs, without gradients, whoever follows what is around."""
    jit: Any = torch._C
    state = jit._get_tracing_state()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_disable_current_modes())
            stack.enter_context(temporarily_clear_interpreter_stack())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast(device.type, enabled=False))
            jit._set_tracing_state(None)
            yield
    finally:
        jit._set_tracing_state(state)


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor that torch.func's transforms have wrapped, or `tensor` itself."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def has_values(tensor: Tensor) -> bool:
    """Whether the values of `tensor` can be read now; fakes, tracers and torch.func's wrapped tensors have none."""
    plain = type(tensor) in (Tensor, nn.Parameter) and not is_functorch_wrapped_tensor(tensor)
    return plain and not tensor.is_meta and _get_tracing_state() is None


# torch.compile takes their results for constants: it guards the transforms itself.
for _asked in (is_followed, is_exported, is_checkpointed_selectively):
    runs_while_compiled(_asked)
