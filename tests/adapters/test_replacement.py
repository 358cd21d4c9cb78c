"""The adapter in a folder is replaced as a whole, or stays, when a save fails or its process is killed."""

from __future__ import annotations

import json
import os

import calibrated
import pytest
import torch
from failures import contents, failing
from small_clip import adapted, assert_close, features, saved, small_clip

import complora_kernels as ck
from complora_kernels.adapters import files as adapter_files
from complora_kernels.adapters.files import BASES_FILES, CONFIG_FILE, WEIGHTS_FILE
from complora_kernels.common import base_weights

# Folding a folded factor again, and the scaling, round float32 (6e-8) in a few short products.
ROUNDING = 2e-6


def test_an_unwritable_folder_is_an_error_before_anything(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    model = adapted(small_clip())
    monkeypatch.setattr(base_weights, "describe", None)  # nothing is computed
    for directory in (tmp_path / "file", tmp_path / "file" / "adapter"):
        with pytest.raises(OSError, match=r"directory='.*file.*', expected a folder that can be written to"):
            ck.save_adapter(model, directory)
    assert (tmp_path / "file").read_text() == "mine"


def test_saving_keeps_the_other_files_of_a_folder(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    saved(tmp_path)
    assert contents(tmp_path).keys() == {"README.md", CONFIG_FILE, WEIGHTS_FILE}
    assert contents(tmp_path)["README.md"] == b"mine"


# ---- a save that fails, or a process that is killed


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize(
    ("owner", "name", "failures"),
    [(adapter_files, "save", {0}), (os, "fsync", {0}), (os, "fsync", {1}), (os, "replace", {0}), (os, "replace", {1})],
    ids=["serialise", "sync configuration", "sync weights", "move configuration", "move weights"],
)
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt("stop")], ids=["error", "interrupt"])
def test_a_failed_save_leaves_the_files_as_they_were(tmp_path, monkeypatch, owner, name, failures, existing, error):
    directory = tmp_path / "adapter"
    old = saved(directory) if existing else None
    before = contents(tmp_path)
    new = adapted(small_clip(), seed=2)
    with monkeypatch.context() as patch:
        failing(patch, owner, name, failures, error)
        with pytest.raises(type(error), match=str(error)):
            ck.save_adapter(new, directory)
    assert contents(tmp_path) == before
    if old is not None:
        assert_close(features(ck.load_adapter(small_clip(), directory, progress=False)), features(old), ROUNDING)


@pytest.mark.parametrize("existing", [True, False])
def test_a_folder_that_cannot_be_synced_holds_the_new_adapter_and_the_error_says_so(tmp_path, monkeypatch, existing):
    if existing:
        saved(tmp_path)
    new = adapted(small_clip(), seed=2)
    with monkeypatch.context() as patch:
        failing(patch, os, "fsync", {2}, OSError("input/output error"))
        with pytest.raises(OSError, match=r"the new adapter is in place in '.*', but .* \(input/output error\)"):
            ck.save_adapter(new, tmp_path)
    assert contents(tmp_path).keys() == {CONFIG_FILE, WEIGHTS_FILE}
    assert_close(features(ck.load_adapter(small_clip(), tmp_path, progress=False)), features(new), ROUNDING)


def test_a_failed_save_leaves_no_folders_that_it_made(tmp_path, monkeypatch):
    failing(monkeypatch, os, "fsync", {0}, OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        ck.save_adapter(adapted(small_clip()), tmp_path / "a" / "b" / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_process_killed_between_the_moves_leaves_the_old_adapter(tmp_path, monkeypatch):
    old = saved(tmp_path)
    with monkeypatch.context() as patch:
        failing(
            patch, os, "replace", set(range(1, 100)), OSError("disk full")
        )  # nor can the old configuration be put back
        with pytest.raises(OSError, match="disk full"):
            ck.save_adapter(adapted(small_clip(), seed=2, r=3), tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["r"] == 3
    with pytest.warns(UserWarning, match="belongs to other weights than the adapter_model.safetensors beside it"):
        loaded = ck.load_adapter(small_clip(), tmp_path, progress=False)
    assert_close(features(loaded), features(old), ROUNDING)
    new = saved(tmp_path, seed=2, r=3)  # the next save repairs it
    assert_close(features(ck.load_adapter(small_clip(), tmp_path, progress=False)), features(new), ROUNDING)


def test_a_new_adapter_replaces_the_old_one(tmp_path):
    saved(tmp_path)
    new = saved(tmp_path, seed=2, r=5, target_modules=("fc1",))
    loaded = ck.load_adapter(small_clip(), tmp_path, progress=False)
    assert_close(features(loaded), features(new), ROUNDING)


# ---- bases, which are a third file


def test_a_save_replaces_the_bases_of_the_one_before(tmp_path):
    calibrated.saved(tmp_path, calibrated.small())
    (first,) = tmp_path.glob(BASES_FILES)
    model = calibrated.saved(tmp_path, calibrated.small(), calibrated.batches(seed=9, dtype=torch.float32))
    (second,) = tmp_path.glob(BASES_FILES)
    assert second != first
    ck.save_adapter(model, tmp_path)  # the same bases again
    assert list(tmp_path.glob(BASES_FILES)) == [second]
    calibrated.assert_same_adapter(ck.load_adapter(calibrated.small(), tmp_path, progress=False), model)
    ck.save_adapter(ck.apply_complora(calibrated.small(), calibrated.config()), tmp_path)
    assert contents(tmp_path).keys() == {CONFIG_FILE, WEIGHTS_FILE}


@pytest.mark.parametrize(
    ("name", "failures"),
    [("fsync", {0}), ("fsync", {2}), ("replace", {0}), ("replace", {1}), ("replace", {2})],
    ids=["sync bases", "sync weights", "move bases", "move configuration", "move weights"],
)
@pytest.mark.parametrize("existing", ["none", "other bases", "the same bases"])
def test_a_failed_save_leaves_the_bases_as_they_were(tmp_path, monkeypatch, name, failures, existing):
    directory = tmp_path / "adapter"
    old = calibrated.saved(directory, calibrated.small()) if existing != "none" else None
    before = contents(tmp_path)
    inputs = calibrated.batches(seed=3 if existing == "the same bases" else 9, dtype=torch.float32)
    new = calibrated.randomise(calibrated.adapt(calibrated.small(), inputs))
    with monkeypatch.context() as patch:
        failing(patch, os, name, failures, OSError("disk full"))
        with pytest.raises(OSError, match="disk full"):
            ck.save_adapter(new, directory)
    assert contents(tmp_path) == before
    if old is not None:
        ck.load_adapter(calibrated.small(), directory, progress=False)


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_process_killed_between_the_moves_leaves_the_old_adapter_and_its_bases(tmp_path, monkeypatch, done):
    old = calibrated.saved(tmp_path, calibrated.small())
    new = calibrated.randomise(calibrated.adapt(calibrated.small(), calibrated.batches(seed=9, dtype=torch.float32)))
    with monkeypatch.context() as patch:
        failing(patch, os, "replace", range(done, 100), OSError("killed"))
        patch.setattr("complora_kernels.adapters.replacement._remove", lambda *_: None)  # nothing is tidied up
        with pytest.raises(OSError, match="killed"):
            ck.save_adapter(new, tmp_path)
    if done == 2:
        with pytest.warns(UserWarning, match="belongs to other weights"):
            calibrated.assert_same_adapter(ck.load_adapter(calibrated.small(), tmp_path, progress=False), old)
    else:
        calibrated.assert_same_adapter(ck.load_adapter(calibrated.small(), tmp_path, progress=False), old)
    ck.save_adapter(new, tmp_path)  # the next save repairs it
    assert len(list(tmp_path.iterdir())) == 3
    calibrated.assert_same_adapter(ck.load_adapter(calibrated.small(), tmp_path, progress=False), new)
