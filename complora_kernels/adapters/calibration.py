"""Calibration: `X^T X` of the inputs of each adapted weight while a model runs, and the bases that follow from it.

Every position that the plain model computes counts, as often as it is computed. In a text tower, positions after the
end of a text count too, although no feature is read there. To leave them out, calibrate with texts that fill the
context, or run the tower's transformer on the positions that matter (`calibrate` may call any part of the model).
Where activations span less than k dimensions, the rest of the k directions are arbitrary and cost the update room: use
enough batches, or `subspace_energy`.

The products are summed in float64, a few thousand rows at a time, where inputs of up to float32 are exact. A direction
that float32 activations can hold has at least 1e-7 of the strongest one's size, which is 1e-14 in `X^T X` and still
above float64's rounding. The sums stay in host memory: in² · 8 bytes for each distinct input, 4.7 MB for a width of 768
(q, k and v of self-attention share one), 75 MB for an fc2 behind 3072.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from complora_kernels.adapters.install import Replacement
from complora_kernels.common.changes import Changes
from complora_kernels.common.wrappers import is_compiled
from complora_kernels.integrations import find
from complora_kernels.modules import CompLoRALayer, CompLoRAMultiheadAttention
from complora_kernels.modules.attention import CompLoRAAttentionLayer
from complora_kernels.modules.extend import extend

Calibrate = Callable[[Any], object]
Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]

CHUNK_ROWS = 4096  # rows converted to float64 per step


class SecondMoments:
    """`X^T X` [in, in] of the inputs of one layer's weights, summed over calls, in float64 and host memory."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}  # keyed by the names of the weights that shared an input

    @torch.no_grad()
    def add(
        self,
        names: Iterable[str],
        x: Tensor,  # [..., in]
    ) -> None:
        """Adds an input that the named weights share."""
        rows = x.detach().reshape(-1, x.shape[-1])  # [M, in]
        if len(rows) == 0:
            return
        if rows.device.type not in ("cpu", "cuda"):
            rows = rows.cpu()  # not every device has float64
        moment = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
        for chunk in rows.split(CHUNK_ROWS):
            chunk = chunk.double()  # [<= CHUNK_ROWS, in]
            moment += chunk.mT @ chunk
        names, moment = tuple(names), moment.cpu()
        self._sums[names] = self._sums[names] + moment if names in self._sums else moment

    def of(self, name: str) -> Tensor | None:
        """The second moment [in, in] of one weight's inputs; None where it was given none."""
        sums = [moment for names, moment in self._sums.items() if name in names]
        return torch.stack(sums).sum(0) if len(sums) > 1 else sums[0] if sums else None


def protect_activations(
    replacements: Sequence[Replacement], moments: Mapping[tuple[str, str], Tensor], *, progress: bool = True
) -> None:
    """Computes the bases of every new layer.

    Args:
        replacements: modules of a model, and the layers that are to replace them but are not part of it yet.
        moments: of `weight_moments`.
        progress: show a progress bar while the second moments are decomposed.

    Raises:
        ValueError: as `CompLoRALayer.protect_activations`.
    """
    weights = [(path, layer, name) for path, _, layer in replacements for name in layer.weights]
    with tqdm(weights, "decomposing activations", unit="weight", delay=2, leave=False, disable=not progress) as bar:
        for path, layer, name in bar:
            layer.protect_activations(name, moments[path, name])


def weight_moments(
    model: nn.Module, replacements: Sequence[Replacement], calibrate: Calibrate
) -> dict[tuple[str, str], Tensor]:
    """The second moment [in, in] of each weight's inputs while `calibrate(model)` runs once, by path and name.

    Args:
        model: plain; it stays as it is.
        replacements: modules of the model, and the layers that are to replace them but are not part of it yet.
        calibrate: runs the model on some batches, see `apply_complora`.

    Raises:
        ValueError: no input reached a weight, or one held NaN or infinite values.
    """
    sums = second_moments(model, replacements, calibrate)
    weights = [(path, name) for path, _, layer in replacements for name in layer.weights]
    found = {(path, name): sums[path].of(name) for path, name in weights}
    moments = {weight: moment for weight, moment in found.items() if moment is not None}
    unseen = [".".join(filter(None, weight)) for weight in weights if weight not in moments]
    if unseen:
        raise ValueError(
            f"calibrate={calibrate!r} gave no activations to {_listed(unseen)}, expected it to run every adapted "
            "weight: model.encode_image(images) for the image tower, model.encode_text(texts) for the text tower"
        )
    broken = [".".join(filter(None, weight)) for weight, moment in moments.items() if not moment.isfinite().all()]
    if broken:
        raise ValueError(
            f"calibrate={calibrate!r} gave NaN or infinite activations to {_listed(broken)}, expected finite ones"
        )
    return moments


def second_moments(
    model: nn.Module, replacements: Sequence[Replacement], calibrate: Calibrate
) -> dict[str, SecondMoments]:
    """The second moments of the inputs of each layer's weights while `calibrate(model)` runs, by the layer's path."""
    moments = {path: SecondMoments() for path, *_ in replacements}
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    stack = contextlib.ExitStack()
    try:
        try:
            stack.enter_context(_recording(model, replacements, moments))
            if any(map(is_compiled, model.modules())):  # code that was compiled before would not call the hooks
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng(sorted(devices, key=str)))
            calibrate(model)
        finally:
            stack.close()
    finally:
        stack.close()  # again: an interrupt may have come before the first call
    return moments


@contextlib.contextmanager
def _recording(
    model: nn.Module, replacements: Sequence[Replacement], moments: dict[str, SecondMoments]
) -> Iterator[None]:
    """Puts the model in evaluation mode and adds hooks that sum the inputs of the weights, within the context.

    The layers, which have no bases yet, are disabled. Modules that would use a weight without calling what holds it are
    extended, as they will be in the adapted model. Only the flags `training` are set, because a model's own `train()`
    may do more.
    """
    layers = [layer for _, _, layer in replacements]
    adapted = {module for _, module, _ in replacements}
    callers = [pair for library in find(model) for pair in library.callers(model, adapted)]
    classes = [(module, type(module)) for module, _ in callers]
    training = [(module, module.training) for module in (*model.modules(), *layers)]
    hooks = [hook for path, module, layer in replacements for hook in _hooks(module, layer, moments[path])]

    def leave() -> None:
        changes = Changes()
        for module, mode in training:
            changes.draft(vars(module))["training"] = mode
        for module, cls in classes:
            changes.set_attribute(module, "__class__", cls)
        for layer in layers:
            changes.draft(vars(layer))["disabled"] = False
        for module, hook in hooks:
            for key in [key for key, other in module._forward_pre_hooks.items() if other is hook]:
                del changes.draft(module._forward_pre_hooks)[key]
                del changes.draft(module._forward_pre_hooks_with_kwargs)[key]
        changes.make()

    changes = Changes()
    for module, _ in training:
        changes.draft(vars(module))["training"] = False
    for module, extension in callers:
        extend(module, [extension], changes)
    for layer in layers:
        changes.draft(vars(layer))["disabled"] = True
    for module, hook in hooks:
        changes.add_hook(module, functools.partial(_register, hook))
    try:
        try:
            changes.make()
            yield
        finally:
            leave()
    finally:
        leave()  # again: an interrupt may have broken the first call off


def _hooks(module: nn.Module, layer: CompLoRALayer, moments: SecondMoments) -> Iterator[tuple[nn.Module, Hook]]:
    """The modules that are given the inputs of the layer's weights, each with a hook that adds them to `moments`."""
    if not isinstance(layer, CompLoRAAttentionLayer):

        def add_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            moments.add(layer.weights, _arguments(layer, args, kwargs)[0])

        yield module, add_input
        return

    inputs, adapts_o = [name for name in ("q", "k", "v") if name in layer.weights], "o" in layer.weights
    # Torch's attention reads the weight of out_proj without calling it; others call it.
    mix = layer.mix if adapts_o and isinstance(layer, CompLoRAMultiheadAttention) else None

    def add_qkv(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        query, key, value = _arguments(layer, args, kwargs)[:3]
        given = {"q": query, "k": query if key is None else key, "v": query if value is None else value}
        shared: dict[int, list[str]] = {}
        for name in inputs:
            shared.setdefault(id(given[name]), []).append(name)
        for names in shared.values():
            moments.add(names, given[names[0]])
        if mix is not None:
            moments.add(("o",), mix(*args, **kwargs)[0])

    yield module, add_qkv
    if adapts_o and mix is None:

        def add_mixed(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            moments.add(("o",), args[0])

        yield layer.out_proj, add_mixed


def _register(hook: Hook, module: nn.Module) -> RemovableHandle:
    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _arguments(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of a call in the order of the adapted layer's parameters; None for those that were not given."""
    signature = inspect.signature(layer.forward)
    given = signature.bind(*args, **kwargs).arguments
    return [given.get(name) for name in signature.parameters]


def _listed(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
