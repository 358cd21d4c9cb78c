"""Tensors that share memory are found, and neighbours in one storage are not taken for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_clip import adapted, config, small_clip
from torch import nn

import complora_kernels as ck
from complora_kernels.common.memory import sharing_memory

FLAT = torch.zeros(64)
ARRAY = torch.zeros(8).numpy()


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([FLAT, FLAT], True),
        ([FLAT[:8], FLAT[7:]], True),
        ([FLAT[:8], FLAT[8:]], False),
        ([FLAT.view(8, 8)[:, :4], FLAT.view(8, 8)[:, 4:]], False),  # interleaved
        ([FLAT.view(8, 8)[:, :5], FLAT.view(8, 8)[:, 4:]], True),
        ([FLAT[::2], FLAT[1::2]], False),
        ([FLAT.view(8, 8), FLAT.view(8, 8).T], True),
        ([FLAT[4:5].expand(6), FLAT[:5]], True),
        ([FLAT[:0], FLAT], False),
        ([FLAT[:4].view(torch.uint8), FLAT[3:]], True),
        ([torch.from_numpy(ARRAY), torch.from_numpy(ARRAY)], True),  # two storages
        ([torch.zeros(4, device="meta"), torch.zeros(4, device="meta")], False),
        ([FLAT.clone(), FLAT], False),
        ([FLAT[:8].bfloat16(), FLAT], False),
    ],
)
def test_pairs_that_share_memory(tensors, expected):
    assert [set(pair) for pair in sharing_memory(tensors)] == [{0, 1}] * expected


def tied_by_object(model):
    model[2].weight = model[0].weight


def tied_by_data(model):
    model[2].weight.data = model[0].weight.data


def tied_by_a_view(model):
    model[2].weight = nn.Parameter(model[0].weight.detach().view(6, 6))


def tied_across_a_part(model):
    packed = torch.randn(12, 6)
    model[0].weight.data, model[2].weight.data = packed[:6], packed[3:9]


def tied_to_a_buffer(model):
    model.register_buffer("known", model[0].weight.data)


@pytest.mark.parametrize("tie", [tied_by_object, tied_by_data, tied_by_a_view, tied_across_a_part, tied_to_a_buffer])
def test_a_weight_whose_memory_another_module_uses_is_not_merged(tie):
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    tie(model)
    adapted(model, target_modules="0", subspace_k=2)
    weight = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"^0\.weight: tied to a parameter of another module"):
        ck.merge_adapter(model)
    assert torch.equal(model[0].weight, weight)
    assert not model[0].merged


def test_a_packed_weight_is_tied_where_a_part_of_it_is():
    model = adapted(small_clip())
    attention = model.transformer.resblocks[0].attn
    model.visual.extra = nn.Linear(32, 32, bias=False)
    model.visual.extra.weight.data = attention.in_proj_weight.data[32:64]
    with pytest.raises(ValueError, match=r"^transformer\.resblocks\.0\.attn\.in_proj_weight: tied"):
        ck.merge_adapter(model)


def test_weights_that_are_neighbours_in_a_flat_buffer_are_merged():
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    parameters = list(model.parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view_as(parameter)
    ck.apply_complora(model, config(target_modules=r"\d", subspace_k=2), progress=False)
    x, whole = torch.randn(3, 6), flat.clone()
    outputs = model(x)
    ck.merge_adapter(model)
    torch.testing.assert_close(model(x), outputs)
    ck.unmerge_adapter(model)
    assert torch.equal(flat, whole)
    assert model[0].weight.data_ptr() == flat.data_ptr()
