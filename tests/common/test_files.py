"""Errors of reading and writing files, and files that replace others."""

from __future__ import annotations

import os

import pytest

from complora_kernels.common.files import reading, write_atomically, write_new, writing


@pytest.mark.parametrize("error", [ValueError("a is 3"), KeyError("a"), RecursionError("deep"), EOFError()])
def test_an_error_of_a_parser_names_the_file_and_what_was_expected(error):
    with pytest.raises(ValueError, match=r"^/a/b: expected a list \(.+\)$"), reading("/a/b", "a list"):
        raise error


def test_an_error_that_names_the_file_already_stays_as_it_is():
    with pytest.raises(ValueError, match=r"^/a/b, line 3$"), reading("/a", "a list"), reading("/a/b", "a list"):
        raise ValueError("/a/b, line 3")


@pytest.mark.parametrize("kind", [KeyError, RuntimeError, OSError, MemoryError, KeyboardInterrupt])
def test_errors_that_content_cannot_cause_pass_unchanged(kind):
    error = kind("a")
    with pytest.raises(kind) as raised, reading("/a/b", "a list", errors=ValueError):
        raise error
    assert raised.value is error


def test_an_error_of_the_system_names_the_file():
    for context in (reading("/a/b", "a list"), writing("/a/b")):  # type: ignore[arg-type]
        with pytest.raises(OSError, match=r"Input/output error: '/a/b'"), context:
            raise OSError(5, "Input/output error")


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "three")
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"file": "two"}


def test_a_new_file_replaces_nothing(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "file").write_text("mine")
    for name in ("link", "file"):
        with pytest.raises(FileExistsError):
            write_new(tmp_path / name, b"other")
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "target").exists()
