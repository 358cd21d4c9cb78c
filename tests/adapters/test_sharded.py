"""A model that `fully_shard` has sharded over two processes is trained, saved and merged as one that is whole."""

from __future__ import annotations

from typing import Any

import pytest
import sharded
import torch
from small_clip import small_clip
from torch.multiprocessing.spawn import spawn

import complora_kernels as ck
from complora_kernels.adapters.manage import named_adapter_parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("sharded")
    spawn(sharded.work, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("how", sharded.SHARDED)
def test_two_processes_are_one_with_their_batches_together(how, folder):
    images, texts = sharded.batch()
    alone = sharded.train(sharded.adapted(), images, texts)
    results = torch.load(folder / f"{how}.pt")
    factors = dict(named_adapter_parameters(alone))
    assert results["factors"].keys() == factors.keys()
    start = dict(named_adapter_parameters(sharded.adapted()))
    for name, factor in factors.items():
        moved = (factor - start[name]).norm()
        assert moved > 0
        assert (results["factors"][name] - factor).norm() <= 1e-4 * moved, name  # float32, summed in another order
    assert results["report"] == pytest.approx([row.relative_update for row in ck.subspace_report(alone)], rel=1e-4)
    with torch.no_grad():
        expected = alone(images, texts)[0]
    for state in ("trained", "merged", "unmerged"):
        torch.testing.assert_close(results[state], expected)
    plain, merged = results["trained weights"], results["merged weights"]
    changed = {name for name in plain if not torch.equal(plain[name], merged[name])}
    assert {name.rpartition(".resblocks.")[2][2:] for name in changed} == {
        "attn.in_proj_weight",
        "attn.out_proj.weight",
        "mlp.c_fc.weight",
    }
    assert all(torch.equal(results["unmerged weights"][name], plain[name]) for name in plain)


@pytest.mark.parametrize("how", sharded.SHARDED)
def test_what_sharded_processes_saved_loads_into_a_whole_model(how, folder):
    images, texts = sharded.batch()
    loaded = ck.load_adapter(small_clip(nonscalar_logit_scale=True), folder / f"{how}-adapter", progress=False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images, texts)[0], torch.load(folder / f"{how}.pt")["trained"])
