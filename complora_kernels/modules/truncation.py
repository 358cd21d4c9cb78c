"""Texts truncated to the longest of their batch: under a causal mask, what follows a text's end does not change it.

The transformer of the text tower, which costs nearly everything, gets the shorter sequences (see `forward_scope`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from complora_kernels.common.tensor_facts import TensorFacts
from complora_kernels.common.tracing import has_values
from complora_kernels.modules.forward_scope import LastBlock, Reading
from complora_kernels.modules.masks import has_been_read, recognise_causal_mask

MULTIPLE = 8  # lengths are rounded up to one of these: few shapes, and rows that suit vector loads


class TextTower(NamedTuple):
    """The parts of a text tower that makes a text's feature of the position where it ends, and of that one alone."""

    transformer: nn.Module  # called (x, attn_mask=mask) with x [N, L, d] and the leading [L, L] corner of the mask
    attn_mask: Tensor  # [context, context]
    eos_id: int | None  # a text ends at the first of these; None: at the first of its largest id
    last_block: LastBlock | None  # None: more than the last block of the transformer decides about the feature


_LONGEST: TensorFacts[tuple[int | None, int]] = TensorFacts()  # texts -> eos_id and the length of the longest


def reading_of_texts(tower: TextTower | None, text: Any) -> Reading | None:
    """Where the text tower reads the features of `text` [N, L]; None: the whole context is computed.

    The ends of texts on a device are read once for each tensor and version, which waits for the device. A CUDA graph
    keeps the length of the texts it was captured with: the whole context where they were not encoded before.
    """
    return find_reading(tower, text) if tower is not None and is_readable(text) else None


def find_reading(tower: TextTower, text: Tensor) -> Reading:
    """Where the features of `text` [N, L] are read, and the length that suffices, where it is known to be exact."""
    N, L = text.shape
    length = _exact_length(tower, text)
    alone = tower.last_block and tower.last_block.alone
    positions = _ends(text, tower.eos_id) if alone else None
    transformer = tower.transformer if length < L else None
    return Reading(alone, positions, (L, length), transformer, (N, L), length)


def _exact_length(tower: TextTower, text: Tensor) -> int:
    """The number of positions, rounded up, that decide about the features; L where it cannot be known now."""
    if not has_been_read(tower.attn_mask):  # it was moved to another device, or copied
        if _is_capturing(text):
            return text.shape[1]
        recognise_causal_mask(tower.attn_mask)
    return length_of_texts(text, tower.eos_id)


def length_of_texts(text: Tensor, eos_id: int | None) -> int:
    """The number of positions of `text` [N, L] up to the last end of a text, rounded up; L where it cannot be read now.

    A text ends at the first `eos_id`, or at the first of its largest id where that is None.
    """
    longest = _longest(text, eos_id) if is_readable(text) else None
    return text.shape[-1] if longest is None else min(text.shape[-1], -(-longest // MULTIPLE) * MULTIPLE)


def read_length(
    text: Tensor,  # [N, L]
    example: Tensor,  # [n, L]
) -> None:
    """Reads once where the texts on a device end, by the ids of `example`, texts that the model has encoded before."""
    known = _LONGEST.get(example)
    if known is not None:
        eos_id, _ = known
        _LONGEST.compute(text, lambda text: (eos_id, _read_longest(text, eos_id)))


def select_texts(
    text: Tensor,  # [N, L]
    rows: Tensor,  # int64 [n]
) -> Tensor:  # [n, L]
    """`text[rows]`, which is as long as the longest of `text` where that is known: the device is not read for it."""
    selected, known = text[rows], _LONGEST.get(text)
    if known is not None:
        _LONGEST.set(selected, known)
    return selected


def is_readable(text: Any) -> bool:
    """Whether `text` holds ids [N, L] whose values can be had now."""
    return has_values(text) and text.dtype in (torch.int64, torch.int32) and text.dim() == 2 and text.numel() > 0


def _longest(
    text: Tensor,  # [N, L]
    eos_id: int | None,
) -> int | None:
    """The number of positions up to the last end of a text; None where it cannot be read now."""
    if not is_on_device(text):
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


def is_on_device(text: Tensor) -> bool:
    """Whether the host would wait for the device to read a text."""
    return text.device.type != "cpu"


def _is_capturing(text: Tensor) -> bool:
    return text.is_cuda and torch.cuda.is_current_stream_capturing()
