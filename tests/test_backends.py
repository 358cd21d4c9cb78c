"""The table of backends: the default, a choice by argument or environment, and refusals with a reason."""

from __future__ import annotations

import subprocess
import sys

import pytest

from complora_kernels import backends


@pytest.fixture(autouse=True)
def unset_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPLORA_BACKEND", raising=False)


@pytest.fixture
def broken_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend "abacus" that comes first and cannot run."""
    abacus = backends.Backend("beads on wires", lambda: "there are no beads")
    monkeypatch.setitem(backends.BACKENDS, "abacus", abacus)
    monkeypatch.setattr(backends, "AUTO_ORDER", ("abacus", *backends.AUTO_ORDER))


def test_default_is_the_first_that_can_run():
    assert backends.resolve() == backends.resolve("auto") == "torch"


@pytest.mark.usefixtures("broken_backend")
def test_default_passes_over_what_cannot_run():
    assert backends.resolve() == "torch"


def test_environment_chooses_and_the_argument_wins(monkeypatch):
    monkeypatch.setenv("COMPLORA_BACKEND", "reference")
    assert backends.resolve() == "reference"
    assert backends.resolve("torch") == "torch"
    assert backends.resolve("auto") == "torch"
    monkeypatch.setenv("COMPLORA_BACKEND", "auto")
    assert backends.resolve() == "torch"


def test_unknown_name_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"^backend='cuda', expected one of auto, torch, reference$"):
        backends.resolve("cuda")
    monkeypatch.setenv("COMPLORA_BACKEND", "tritn")
    with pytest.raises(ValueError, match=r"^COMPLORA_BACKEND='tritn', expected one of auto, torch, reference$"):
        backends.resolve()


@pytest.mark.usefixtures("broken_backend")
def test_forced_where_it_cannot_run_is_an_error_with_the_reason(monkeypatch):
    with pytest.raises(RuntimeError, match=r"^backend='abacus' cannot run here: there are no beads$"):
        backends.resolve("abacus")
    monkeypatch.setenv("COMPLORA_BACKEND", "abacus")
    with pytest.raises(RuntimeError, match=r"^COMPLORA_BACKEND='abacus' cannot run here: there are no beads$"):
        backends.resolve()


@pytest.mark.usefixtures("broken_backend")
def test_table(capsys, monkeypatch):
    monkeypatch.setenv("COMPLORA_BACKEND", "reference")
    backends.main()
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert {name: rest.split("  ")[0] for name, rest in lines} == {
        "torch": "available",
        "reference": "in use",
        "abacus": "unavailable: there are no beads beads on wires",
    }


def test_table_from_the_command_line():
    command = [sys.executable, "-m", "complora_kernels.backends"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(backends.BACKENDS)
