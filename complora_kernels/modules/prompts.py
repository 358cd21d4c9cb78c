"""Texts cut to the longest of their batch: under a causal mask, what follows the end of a text does not change it.

The cut is at the transformer of the text tower, which costs nearly everything. It lasts as long as an `encode_text`, on
the thread that runs it and outside the modules: nothing is left to be copied or saved with them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from complora_kernels.common.changes import Changes, joined
from complora_kernels.common.tensor_facts import TensorFacts
from complora_kernels.common.tracing import has_values
from complora_kernels.modules.attention import has_been_read, known_causal, recognise_causal_mask
from complora_kernels.modules.extend import Extension, extend, own_hook
from complora_kernels.modules.pooled import Pool, pooling

MULTIPLE = 8  # lengths are rounded up to one of these: few shapes, and rows that suit vector loads


class TextTower(NamedTuple):
    """The parts of a text tower that makes a text's feature of the position where it ends, and of that one alone."""

    transformer: nn.Module  # called (x, attn_mask=mask) with x [N, L, d] and the leading [L, L] corner of the mask
    attn_mask: Tensor  # [context, context]
    eos_id: int | None  # a text ends at the first of these; None: at the first of its largest id
    pool: Pool | None  # None: more than the last block of the transformer decides about the feature


class Cut(NamedTuple):
    """What a running `encode_text` asks of the transformer: the first `length` positions of x [N, L, d]."""

    transformer: nn.Module
    shape: torch.Size  # N, L
    length: int


class _Running(threading.local):
    def __init__(self) -> None:
        self.cut: Cut | None = None  # of the innermost encode_text


_RUNNING = _Running()
_LONGEST: TensorFacts[tuple[int | None, int]] = TensorFacts()  # texts -> eos_id and the length of the longest


class CutPrompts(Extension):
    """`encode_text` without the positions after the longest text of the batch, in steps of 8.

    The last block computes the position alone that the feature of a text is read at (see `pooled`).

    Features and gradients are those of the whole context, up to rounding; with dropout the masks are drawn for other
    shapes, so that they are equal in distribution only. Hooks inside the tower see the shorter tensors. The whole
    context is computed under torch.compile and wherever the cut is not known to be exact.

    The ends of texts on a device are read once for each tensor and version, which waits for the device. A CUDA graph
    keeps the length of the texts it was captured with: the whole context where they were not encoded before.
    """

    find_text_tower: Callable[[nn.Module], TextTower | None]

    def encode_text(self, text: Tensor, *args: Any, **kwargs: Any) -> Any:  # [N, L] to [N, D]
        encode: Any = super()
        if torch.compiler.is_compiling():
            return encode.encode_text(text, *args, **kwargs)
        with _shortened(self, text):
            return encode.encode_text(text, *args, **kwargs)


class CutInnerPrompts(CutPrompts):
    """For the models of open_clip 4, whose `forward` calls `_encode_text`."""

    def _encode_text(self, text: Tensor, *args: Any, **kwargs: Any) -> Any:  # [N, L] to [N, D]
        encode: Any = super()
        if torch.compiler.is_compiling():
            return encode._encode_text(text, *args, **kwargs)
        with _shortened(self, text):
            return encode._encode_text(text, *args, **kwargs)


def cut_prompts(
    model: nn.Module, find_text_tower: Callable[[nn.Module], TextTower | None], changes: Changes | None = None
) -> None:
    """Extends `model`, where it has an `encode_text` and such a text tower, by `CutPrompts`.

    Args:
        model: left alone where there is no such tower.
        find_text_tower: a function of a module (copies of the model refer to it by name), asked again at each call.
        changes: to which the extension is added; None: it is made at once.
    """
    tower = find_text_tower(model)
    if tower is None or not hasattr(model, "encode_text") or isinstance(model, CutPrompts):
        return
    with joined(changes) as pending:
        pending.add_hook(
            tower.transformer, lambda module: module.register_forward_pre_hook(_cut_inputs, with_kwargs=True)
        )
        extend(model, CutInnerPrompts if hasattr(model, "_encode_text") else CutPrompts, pending)
        pending.draft(vars(model))["find_text_tower"] = find_text_tower


@contextlib.contextmanager
def _shortened(model: CutPrompts, text: Any) -> Iterator[None]:
    """Within it, the text tower computes what the features of `text` are read from."""
    tower = model.find_text_tower(model) if _is_readable(text) else None
    if tower is None:
        yield
        return
    cut = find_cut(tower, text)
    lengths = (text.shape[1],) if cut is None else (text.shape[1], cut.length)
    with _running(cut), pooling(tower.pool, lambda: _ends(text, tower.eos_id), lengths):
        yield


def find_cut(tower: TextTower, text: Tensor) -> Cut | None:
    """The cut for `text` [N, L], or None where nothing is saved or the features could be others."""
    if not has_been_read(tower.attn_mask):  # it was moved to another device, or copied
        if _is_capturing(text):
            return None
        recognise_causal_mask(tower.attn_mask)
    longest = _longest(text, tower.eos_id)
    if longest is None:
        return None
    length = -(-longest // MULTIPLE) * MULTIPLE
    return Cut(tower.transformer, text.shape, length) if length < text.shape[1] else None


def _is_readable(text: Any) -> bool:
    """Whether `text` holds ids [N, L] whose values can be had now."""
    return has_values(text) and text.dtype in (torch.int64, torch.int32) and text.dim() == 2 and text.numel() > 0


def _longest(
    text: Tensor,  # [N, L]
    eos_id: int | None,
) -> int | None:
    """The number of positions up to the last end of a text; None where it cannot be read now."""
    if not _is_on_device(text):
        return _read_longest(text, eos_id)
    known = None if text.is_inference() else _LONGEST.get(text)  # a write to an inference tensor would go unseen
    if known is not None and known[0] == eos_id:
        return known[1]
    if _is_capturing(text):
        return None
    return _LONGEST.compute(text, lambda text: (eos_id, _read_longest(text, eos_id)))[1]


def _read_longest(text: Tensor, eos_id: int | None) -> int:
    return int(_ends(text, eos_id).max()) + 1


def _ends(text: Tensor, eos_id: int | None) -> Tensor:  # [N]
    return text.argmax(-1) if eos_id is None else (text == eos_id).int().argmax(-1)  # 0 where there is no eos_id


def _is_on_device(text: Tensor) -> bool:
    return text.device.type != "cpu"


def _is_capturing(text: Tensor) -> bool:
    return text.is_cuda and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def _running(cut: Cut | None) -> Iterator[None]:
    outer, _RUNNING.cut = _RUNNING.cut, cut
    try:
        yield
    finally:
        _RUNNING.cut = outer


@own_hook
def _cut_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    cut = None if torch.compiler.is_compiling() else _RUNNING.cut
    if cut is None or cut.transformer is not module or len(args) != 1 or kwargs.keys() != {"attn_mask"}:
        return None
    x, mask = args[0], kwargs["attn_mask"]
    if x.dim() != 3 or x.shape[:2] != cut.shape or mask is None or not mask.is_floating_point():
        return None
    if not known_causal(mask, x.shape[1], x.shape[1]):
        return None
    x = x[:, : cut.length].contiguous()  # a view would keep the whole x alive until the backward pass
    return (x,), {"attn_mask": mask[: cut.length, : cut.length]}
