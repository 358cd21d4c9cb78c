"""The table of backends: the default, a choice by argument or environment, and refusals with a reason."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from complora_kernels import backends
from complora_kernels.backends import Backend, build, hardware, plans
from complora_kernels.backends.__main__ import main
from complora_kernels.backends.extension import ExtensionBackend
from complora_kernels.backends.torch import TorchBackend
from complora_kernels.backends.triton import TritonBackend


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU and without the extension, where nothing was asked for and nothing said."""
    monkeypatch.delenv("COMPLORA_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(hardware, "gpu_unavailable", lambda: "there is no GPU")
    monkeypatch.setattr(build, "failure", lambda half: f"the {half} half was not built")
    monkeypatch.setattr(backends, "messages_said", {})


@pytest.fixture
def gpu(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU."""
    monkeypatch.setattr(hardware, "gpu_unavailable", lambda: None)


@pytest.fixture
def built(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extension were built."""
    monkeypatch.setattr(build, "failure", lambda half: None)


def supports(*, all_but: tuple[str, ...] = ()) -> Callable[[Backend], str | None]:
    return lambda backend: f"{backend.name} has no thumbs" if backend.name in all_but else None


class Abacus(TorchBackend):
    name = "abacus"
    purpose = "beads on wires"

    def unavailable(self) -> str | None:
        return "there are no beads"


@pytest.fixture
def broken_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend "abacus" that comes first and cannot run."""
    monkeypatch.setitem(backends.REGISTRY, "abacus", Abacus())
    monkeypatch.setattr(backends, "AUTO_ORDER", ("abacus", *backends.AUTO_ORDER))


def test_default_is_the_first_that_can_run():
    assert backends.resolve() == backends.resolve("auto") == "torch"


@pytest.mark.usefixtures("broken_backend")
def test_default_skips_what_cannot_run():
    assert backends.resolve() == "torch"


def test_environment_chooses_and_the_argument_wins(monkeypatch):
    monkeypatch.setenv("COMPLORA_BACKEND", "reference")
    assert backends.resolve() == "reference"
    assert backends.resolve("torch") == "torch"
    assert backends.resolve("auto") == "torch"
    monkeypatch.setenv("COMPLORA_BACKEND", "auto")
    assert backends.resolve() == "torch"


def test_unknown_name_is_refused(monkeypatch):
    names = "auto, triton, extension, torch, reference"
    with pytest.raises(ValueError, match=f"^backend='cuda', expected one of {names}$"):
        backends.resolve("cuda")
    monkeypatch.setenv("COMPLORA_BACKEND", "tritn")
    with pytest.raises(ValueError, match=f"^COMPLORA_BACKEND='tritn', expected one of {names}$"):
        backends.resolve()


@pytest.mark.usefixtures("broken_backend")
def test_forced_where_it_cannot_run_is_an_error_with_the_reason(monkeypatch):
    with pytest.raises(RuntimeError, match=r"^backend='abacus' cannot run here: there are no beads$"):
        backends.resolve("abacus")
    monkeypatch.setenv("COMPLORA_BACKEND", "abacus")
    with pytest.raises(RuntimeError, match=r"^COMPLORA_BACKEND='abacus' cannot run here: there are no beads$"):
        backends.resolve()


@pytest.mark.usefixtures("gpu")
def test_kernels_come_first_where_there_is_a_gpu():
    assert backends.resolve() == backends.resolve("triton") == "triton"


@pytest.mark.usefixtures("built")
def test_the_extension_comes_after_the_kernels_and_before_torch(monkeypatch, caplog):
    assert backends.resolve() == backends.resolve("extension") == "extension"
    assert backends.resolve(None, "juggle", supports(all_but=("extension",))) == "torch"
    assert caplog.messages == ["juggle does not run on the extension backend: extension has no thumbs"]
    monkeypatch.setattr(hardware, "gpu_unavailable", lambda: None)
    assert backends.resolve() == "triton"
    assert backends.resolve(None, "fold", supports(all_but=("triton",))) == "extension"


@pytest.mark.usefixtures("built")
def test_what_is_slower_is_skipped_without_a_word_and_taken_by_name(monkeypatch, caplog):
    def resolve(backend: str | None = None) -> str:
        return backends.resolve(backend, "juggle", skip=("extension",))

    assert resolve() == resolve("auto") == "torch"
    assert resolve("extension") == "extension"
    monkeypatch.setenv("COMPLORA_BACKEND", "extension")
    assert resolve() == "extension"
    assert not caplog.messages


def test_the_extension_that_was_not_built_is_refused_with_the_reason(caplog):
    with pytest.raises(RuntimeError, match=r"^backend='extension' cannot run here: the cpu half was not built$"):
        backends.resolve("extension")
    assert backends.resolve() == "torch"
    assert not caplog.messages  # an optional half is not worth a line in every run


def test_each_half_answers_for_its_own_device(monkeypatch):
    assert ExtensionBackend().gpu_refusal(0) == "the cuda half was not built"
    monkeypatch.setattr(hardware, "too_old", lambda index: f"GPU {index} is too old")
    assert TritonBackend().gpu_refusal(1) == "GPU 1 is too old"
    monkeypatch.setattr(build, "failure", lambda half: None)
    monkeypatch.setattr(build, "chip_refusal", lambda capability: f"nothing was built for {capability}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, index))
    assert ExtensionBackend().gpu_refusal(5) == "nothing was built for (7, 5)"


def test_kernels_without_a_gpu_are_refused_with_the_reason():
    with pytest.raises(RuntimeError, match=r"^backend='triton' cannot run here: there is no GPU$"):
        backends.resolve("triton")


def test_interpreted_kernels_run_when_they_are_asked_for_by_name_alone(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.resolve() == backends.resolve("auto") == "torch"
    assert backends.resolve("triton") == "triton"
    monkeypatch.setenv("COMPLORA_BACKEND", "triton")
    assert backends.resolve() == "triton"


@pytest.mark.usefixtures("gpu")
def test_kernels_without_triton_are_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(hardware, "is_missing", lambda package: package == "triton")
    assert backends.resolve() == "torch"
    for variable in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", variable)
        with pytest.raises(RuntimeError, match=r"^backend='triton' cannot run here: triton is not installed$"):
            backends.resolve("triton")


@pytest.mark.parametrize(
    ("available", "amd", "capability", "reason"),
    [
        (False, None, (9, 0), "there is no CUDA GPU (TRITON_INTERPRET=1 interprets the kernels on the CPU)"),
        (True, "gfx942:sramecc+:xnack-", (9, 4), None),
        (True, "gfx1100", (11, 0), None),
        (True, "gfx906", (9, 0), "the GPU is a gfx906, expected one of gfx942, gfx1100"),
        (True, None, (7, 5), "the GPU has compute capability 7.5, expected at least 8.0"),
        (True, None, (8, 0), None),
        (True, None, (10, 0), None),
    ],
)
def test_gpus_that_the_kernels_run_on(available, amd, capability, reason, monkeypatch):
    monkeypatch.undo()  # the fixtures' GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.version, "hip", None if amd is None else "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(gcnArchName=amd))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    hardware.too_old.cache_clear()
    assert hardware.gpu_unavailable.__wrapped__() == reason


@pytest.mark.usefixtures("gpu")
def test_kernels_that_no_amd_gpu_has_run_are_had_by_name_alone(monkeypatch):
    assert backends.resolve() == "triton"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert backends.resolve() == "torch"
    assert backends.resolve("triton") == "triton"


@pytest.mark.usefixtures("gpu")
def test_default_skips_what_does_not_support_the_arguments_and_says_so_once(caplog):
    for _ in range(2):
        assert backends.resolve("auto", "juggle", supports(all_but=("triton",))) == "torch"
        assert backends.resolve(None, "juggle", supports()) == "triton"
    message = "juggle does not run on the triton backend: triton has no thumbs"
    assert caplog.record_tuples == [("complora_kernels", logging.WARNING, message)]
    caplog.clear()
    assert backends.resolve(None, "fold", supports(all_but=("triton",))) == "torch"  # another operation is news
    assert caplog.messages == ["fold does not run on the triton backend: triton has no thumbs"]


@pytest.mark.usefixtures("gpu")
def test_forced_where_it_does_not_support_the_arguments_is_an_error_with_the_reason(monkeypatch, caplog):
    with pytest.raises(RuntimeError, match=r"^backend='triton' does not support juggle: triton has no thumbs$"):
        backends.resolve("triton", "juggle", supports(all_but=("triton",)))
    monkeypatch.setenv("COMPLORA_BACKEND", "triton")
    with pytest.raises(
        RuntimeError, match=r"^COMPLORA_BACKEND='triton' does not support juggle: triton has no thumbs$"
    ):
        backends.resolve(None, "juggle", supports(all_but=("triton",)))
    assert backends.resolve("torch", "juggle", supports(all_but=("triton",))) == "torch"
    assert not caplog.messages


def table(output: str) -> dict[str, str]:
    """What follows each name, up to the column of purposes; after blank lines come the extension and the plans."""
    rows, extension, chosen, tiles = output.split("\n\n")
    assert extension.splitlines() == ["extension", *build.describe()]
    assert chosen.splitlines() == ["plans", *plans.describe()]
    assert tiles.startswith("tiles of the fused kernels, modelled")
    return {row.split()[0]: row[11:].split("  ")[0] for row in rows.splitlines() if not row.startswith("on ")}


@pytest.mark.usefixtures("broken_backend")
def test_table(capsys, monkeypatch):
    monkeypatch.setenv("COMPLORA_BACKEND", "reference")
    main()
    assert table(capsys.readouterr().out) == {
        "triton": "unavailable",
        "extension": "unavailable",
        "torch": "available",
        "reference": "in use",
        "abacus": "unavailable",
    }
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(build, "failure", lambda half: None)
    main()
    states = table(capsys.readouterr().out)
    assert (states["triton"], states["extension"]) == ("available by name", "available")


@pytest.mark.usefixtures("built")
def test_table_where_operations_have_backends_of_their_own(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main()
    output = capsys.readouterr().out
    assert [line.split(maxsplit=3) for line in output.splitlines() if line.startswith("on ")] == [
        [
            "on",
            "cpu",
            "extension",
            "project_complement, fold_factors, packed_lora_linear with dropout, complora_linear with dropout, "
            "norm_lora_linear with dropout, norm_lora_mlp with dropout",
        ],
        ["on", "cpu", "torch", "packed_lora_linear, complora_linear, norm_lora_linear, norm_lora_mlp"],
    ]
    states = table(output)
    assert (states["extension"], states["torch"], states["reference"]) == ("in use", "in use", "available")


def test_what_is_skipped():
    for operation in backends.OPERATIONS:
        assert backends.skipped(operation, "cuda") == backends.skipped(operation, "cpu", True) == ()
    slower = [name for name in backends.OPERATIONS if backends.skipped(name, "cpu")]
    assert slower == ["packed_lora_linear", "complora_linear", "norm_lora_linear", "norm_lora_mlp"]
    assert {backends.skipped(name, "cpu") for name in slower} == {("extension",)}


@pytest.mark.usefixtures("broken_backend")
def test_table_of_a_backend_that_cannot_be_had(capsys, monkeypatch):
    monkeypatch.setenv("COMPLORA_BACKEND", "abacus")
    with pytest.raises(SystemExit, match="COMPLORA_BACKEND='abacus' cannot run here: there are no beads"):
        main()
    output = capsys.readouterr().out
    assert "in use" not in table(output).values()
    assert "beads on wires: there are no beads" in output


def test_table_from_the_command_line():
    command = [sys.executable, "-m", "complora_kernels.backends"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert list(table(result.stdout)) == [*backends.REGISTRY, backends.REFERENCE]
