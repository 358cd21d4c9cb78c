"""What setup.py decides to build, what it records, and how a build that does not fit is reported and skipped."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import complora_kernels
from complora_kernels.backends import build

ROOT = Path(__file__).parents[2]
TORCH_REQUIREMENTS = ["torch>=2.11", "ninja>=1.11"]
MODULE = """
#include <Python.h>
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
"""


def load_anew(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Machine:
    """A machine whose programs and environment are those of the test; CUDA, once there, is in CUDA_HOME."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.cuda = folder / "cuda"
        self.set_variable = monkeypatch.setenv
        for name in ("COMPLORA_BUILD", "COMPLORA_WERROR", "CXX", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.setenv("CUDA_HOME", str(self.cuda))

    def install(self, compiler: bool, nvcc: str | None) -> None:
        if compiler:
            self._install(self.folder / "c++", "")
        if nvcc is not None:
            self._install_cuda(nvcc)

    def _install_cuda(self, release: str) -> None:
        self._install(self.cuda / "bin" / "nvcc", f"echo Cuda compilation tools, release {release}, V{release}.1")
        header = self.cuda / "include" / "cuda_runtime.h"
        header.parent.mkdir(parents=True)
        header.touch()

    def _install(self, program: Path, script: str) -> None:
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    def setup(self) -> ModuleType:
        """setup.py, loaded on this machine."""
        return load_anew("complora_setup", ROOT / "setup.py")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("compiler", "nvcc", "wanted", "halves", "reason"),
    [
        (False, None, "", [], "no C++ compiler was found (c++)"),
        (False, "13.0", "", [], "no C++ compiler was found (c++)"),
        (True, None, "", ["cpu"], "no nvcc was found"),
        (True, "13.0", "", ["cpu", "cuda"], "a C++ compiler and nvcc were found"),
        (False, None, "0", [], "COMPLORA_BUILD=0"),
        (True, "13.0", "0", [], "COMPLORA_BUILD=0"),
        (True, None, "cpu", ["cpu"], "COMPLORA_BUILD=cpu"),
        (True, "13.0", "cpu", ["cpu"], "COMPLORA_BUILD=cpu"),
        (True, "13.0", "cuda", ["cpu", "cuda"], "a C++ compiler and nvcc were found"),
    ],
)
def test_what_is_built_and_what_it_needs(machine, compiler, nvcc, wanted, halves, reason):
    machine.install(compiler, nvcc)
    machine.set_variable("COMPLORA_BUILD", wanted)
    setup = machine.setup()
    assert setup.decide()[0] == halves
    assert setup.decide()[1].startswith(reason)
    needs = TORCH_REQUIREMENTS if halves else []
    assert setup.get_requires_for_build_wheel() == setup.get_requires_for_build_editable() == needs
    assert not hasattr(setup, "get_requires_for_build_sdist")  # packing compiles nothing


@pytest.mark.parametrize(
    ("compiler", "nvcc", "wanted", "sentence"),
    [
        (True, "13.0", "gpu", "COMPLORA_BUILD='gpu', expected 0, cpu or cuda"),
        (True, "13.0", "1", "COMPLORA_BUILD='1', expected 0, cpu or cuda"),
        (False, None, "cpu", "COMPLORA_BUILD=cpu cannot be built: no C++ compiler was found (c++)"),
        (False, "13.0", "cuda", "COMPLORA_BUILD=cuda cannot be built: no C++ compiler was found (c++)"),
        (True, None, "cuda", "COMPLORA_BUILD=cuda cannot be built: no nvcc was found"),
    ],
)
def test_what_was_asked_for_and_cannot_be_built_is_an_error(machine, compiler, nvcc, wanted, sentence):
    machine.install(compiler, nvcc)
    machine.set_variable("COMPLORA_BUILD", wanted)
    with pytest.raises(SystemExit) as refusal:
        machine.setup().get_requires_for_build_wheel()
    assert str(refusal.value).startswith(sentence)


@pytest.mark.parametrize(
    ("torch_cuda", "obstacle"),
    [
        ("13.2", None),
        ("12.8", "nvcc is of CUDA 13.0, torch 2.14.1 of 12.8"),
        (None, "nvcc is of CUDA 13.0, torch 2.14.1 of none"),
    ],
)
def test_nvcc_has_the_major_version_of_torch(machine, torch_cuda, obstacle):
    machine.install(True, "13.0")
    if obstacle is None:
        assert machine.setup().decide("2.14.1", torch_cuda)[0] == ["cpu", "cuda"]
        return
    assert machine.setup().decide("2.14.1", torch_cuda) == (["cpu"], obstacle)
    machine.set_variable("COMPLORA_BUILD", "cuda")
    with pytest.raises(SystemExit, match=f"^COMPLORA_BUILD=cuda cannot be built: {obstacle}$"):
        machine.setup().decide("2.14.1", torch_cuda)


def test_the_compiler_of_the_environment_counts(machine):
    machine.install(True, None)
    machine.set_variable("CXX", "ccache clang++")
    assert machine.setup().decide() == ([], "no C++ compiler was found (ccache clang++)")
    (machine.folder / "c++").rename(machine.folder / "ccache")
    assert machine.setup().decide()[0] == ["cpu"]


def test_nvcc_is_found_by_its_path(machine):
    machine.install(False, "13.0")
    machine.set_variable("CUDA_HOME", "")
    machine.set_variable("PATH", str(machine.cuda / "bin"))
    assert machine.setup().cuda_toolkit() == (machine.cuda, (13, 0))


@pytest.mark.parametrize(
    ("nvcc", "asked", "architectures"),
    [
        ("13.0", "", ["80,sm_80", "86,sm_86", "89,sm_89", "90,sm_90", "100,[sm_100,compute_100]"]),
        ("12.6", "", ["80,sm_80", "86,sm_86", "89,sm_89", "90,[sm_90,compute_90]"]),  # 12.8 learned of sm_100
        ("13.0", "7.5;9.0a", ["75,sm_75", "90a,sm_90a"]),
        ("13.0", "8.0+PTX 12.0; ", ["80,[sm_80,compute_80]", "120,sm_120"]),
    ],
)
def test_chips(machine, nvcc, asked, architectures):
    machine.install(False, nvcc)
    machine.set_variable("TORCH_CUDA_ARCH_LIST", asked)
    # The path has "arch" in it, at which torch's own translation gives up.
    flags = machine.setup().flags("cuda", ["/research/include"])["nvcc"]
    expected = ["-gencode=arch=compute_{},code={}".format(*pair.split(",", 1)) for pair in architectures]
    assert [flag for flag in flags if "gencode" in flag] == expected


def test_unknown_chips_are_an_error(machine):
    machine.install(False, "13.0")
    machine.set_variable("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match=r"^TORCH_CUDA_ARCH_LIST='Hopper', expected numbers as in '8\.0 8\.6 "):
        machine.setup().chips()


def run_setup(source: Path, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py's hook, without pip's isolated environment: needs no network."""
    scripts = Path(sys.executable).parent  # ninja is there
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"} | variables
    return subprocess.run(
        [sys.executable, "-B", "-c", f"import setup; setup.{command}"],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
    )


def copy_sources(source: Path, registration: str = MODULE) -> Path:
    """The tree that is packed, with a C++ half that takes a second to compile."""
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    shutil.copytree(ROOT / "complora_kernels", source / "complora_kernels", ignore=ignore)
    shutil.copytree(ROOT / "csrc", source / "csrc")
    (source / "csrc" / "registration.cpp").write_text(registration)
    (source / "csrc" / "complement_cpu.cpp").write_text("")
    return source


@pytest.fixture(scope="module")
def built_in_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = copy_sources(tmp_path_factory.mktemp("in-place") / "source")
    result = run_setup(source, "build_editable('.')", COMPLORA_BUILD="cpu", COMPLORA_WERROR="1", MAX_JOBS="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "complora-kernels: built cpu: COMPLORA_BUILD=cpu\n" in result.stderr
    return source


def test_record_of_a_build(built_in_place):
    package = built_in_place / "complora_kernels"
    content = json.loads((package / "_build.json").read_text())
    assert (package / "_C.abi3.so").exists()
    assert list(content) == ["version", "halves", "reason", "sizes", "torch", "compiler"]
    assert content["version"] == complora_kernels.__version__
    assert content["halves"] == ["cpu"]
    assert content["torch"] == importlib.import_module("torch").__version__
    assert content["compiler"]


def test_an_editable_install_that_builds_nothing_keeps_what_was_built(built_in_place, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(built_in_place, source)
    package = source / "complora_kernels"
    before = (package / "_build.json").read_text()
    assert run_setup(source, "build_editable('.')", COMPLORA_BUILD="0").returncode == 0
    assert (package / "_build.json").read_text() == before
    (package / "_C.abi3.so").unlink()
    assert run_setup(source, "build_editable('.')", COMPLORA_BUILD="0").returncode == 0
    assert json.loads((package / "_build.json").read_text())["reason"] == "COMPLORA_BUILD=0"


def test_one_wheel_is_for_every_python_and_torch(tmp_path):
    source = copy_sources(tmp_path / "source")
    for _ in range(2):
        result = run_setup(source, f"build_wheel({str(tmp_path)!r})", COMPLORA_BUILD="cpu", MAX_JOBS="1")
        assert result.returncode == 0, result.stdout + result.stderr
        (wheel,) = tmp_path.glob("*.whl")
        assert "-cp310-abi3-" in wheel.name
        built = {name for name in zipfile.ZipFile(wheel).namelist() if "/_" in name and "/__" not in name}
        assert built == {"complora_kernels/_C.abi3.so", "complora_kernels/_build.json"}
        (left_over,) = source.glob("build/lib*/complora_kernels")
        (left_over / "_C_cuda.abi3.so").touch()  # this build seems to have had nvcc: the next wheel is without it


def test_sdist_holds_the_sources_wherever_it_is_packed(tmp_path):
    source = copy_sources(tmp_path / "source")
    result = run_setup(source, f"build_sdist({str(tmp_path)!r})", COMPLORA_BUILD="0")
    assert result.returncode == 0, result.stdout + result.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= names
    assert {"setup.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.endswith(("_build.json", ".so"))]


def test_a_compile_that_fails_says_how_to_install_without(tmp_path):
    source = copy_sources(tmp_path / "source", registration="#error no such machine")
    result = run_setup(source, "build_wheel('.')", COMPLORA_BUILD="cpu", MAX_JOBS="1")
    assert result.returncode != 0
    assert "no such machine" in result.stdout
    assert result.stderr.strip().endswith("COMPLORA_BUILD=0 installs without it")


def test_a_build_without_torch_says_how_to_install_without(tmp_path):
    source = copy_sources(tmp_path / "source")
    (source / "torch.py").write_text("raise ImportError('there is no torch')")
    result = run_setup(source, "build_wheel('.')", COMPLORA_BUILD="cpu")
    assert result.returncode != 0
    sentence = "the extension is built with torch>=2.11: there is no torch; COMPLORA_BUILD=0 installs without it"
    assert result.stderr.strip().endswith(sentence)


@pytest.fixture
def installed(built_in_place, tmp_path, monkeypatch) -> Path:
    """The folder of a package with what was built; `build_of` looks into it."""
    package = tmp_path / "installed_package"
    package.mkdir()
    for name in ("_C.abi3.so", "_build.json"):
        shutil.copy2(built_in_place / "complora_kernels" / name, package)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("installed_package", "installed_package._C"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    # This module has no operations for which there could be fakes.
    monkeypatch.setitem(sys.modules, "complora_kernels.backends.fakes", ModuleType("fakes"))
    return package


def build_of(package: Path) -> Any:
    """`complora_kernels.backends.build` of a package, which has not looked at it yet."""
    fresh = load_anew("fresh_build", Path(build.__file__))
    modules = {"cpu": "installed_package._C", "cuda": "installed_package._C_cuda"}
    vars(fresh).update(RECORD=package / "_build.json", SOURCES=package.parent / "csrc", MODULES=modules)
    return fresh


def write_record(package: Path, **changes: object) -> None:
    content = json.loads((package / "_build.json").read_text())
    (package / "_build.json").write_text(json.dumps(content | changes))


def test_a_build_loads(installed):
    fresh = build_of(installed)
    assert fresh.failure("cpu") is None
    assert "installed_package._C" in sys.modules
    lines = fresh.describe()
    assert lines[0] == "built      cpu: COMPLORA_BUILD=cpu"
    assert lines[-1] == "cpu half   loads"
    assert any(line.startswith("compiler ") for line in lines)


def no_record(package: Path) -> None:
    (package / "_build.json").unlink()


def damaged_record(package: Path) -> None:
    (package / "_build.json").write_text("{\n")


def record_without_a_reason(package: Path) -> None:
    (package / "_build.json").write_text('{"version": "1", "halves": []}')


def nothing_built(package: Path) -> None:
    (package / "_build.json").write_text('{"version": "1", "halves": [], "reason": "COMPLORA_BUILD=0", "sizes": {}}')


def another_version(package: Path) -> None:
    write_record(package, version="0.0.9")


def no_module(package: Path) -> None:
    (package / "_C.abi3.so").unlink()


def damaged_module(package: Path) -> None:
    module = package / "_C.abi3.so"
    module.write_bytes(b"no library\nat all\n".ljust(module.stat().st_size))


def module_cut_off(package: Path) -> None:
    """By a full disk, say: to load it would end the process with a bus error."""
    os.truncate(package / "_C.abi3.so", 100_000)


def newer_sources(package: Path) -> None:
    sources = package.parent / "csrc"
    sources.mkdir()
    (sources / "registration.cpp").touch()
    os.utime(sources / "registration.cpp", (0, 0))
    (sources / "complement.h").touch()
    later = (package / "_C.abi3.so").stat().st_mtime + 1
    os.utime(sources / "complement.h", (later, later))


FAILURES = {
    no_record: "there is no _build.json, the record of a build",
    damaged_record: "_build.json is damaged: JSONDecodeError",
    record_without_a_reason: "_build.json is damaged: KeyError 'reason'",
    nothing_built: "COMPLORA_BUILD=0",
    another_version: f"it was built for version 0.0.9, this is {complora_kernels.__version__}",
    no_module: "installed_package._C is missing",
    damaged_module: "it does not load: ImportError",
    module_cut_off: "has 100000 bytes, expected ",
    newer_sources: "csrc/complement.h is newer than what was built",
}


@pytest.mark.parametrize("damage", FAILURES)
def test_what_does_not_load_is_reported_in_one_line(installed, damage):
    damage(installed)
    fresh = build_of(installed)
    reason = fresh.failure("cpu")
    assert reason is not None
    assert FAILURES[damage] in reason
    assert "\n" not in reason
    assert FAILURES[damage] in "\n".join(fresh.describe())


def test_the_cuda_half_needs_a_gpu_and_the_cpu_half(installed, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert build_of(installed).failure("cuda") == "there is no CUDA GPU"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert build_of(installed).failure("cuda") == "it was not built: COMPLORA_BUILD=cpu"
    another_version(installed)
    fresh = build_of(installed)
    assert fresh.failure("cuda") == fresh.failure("cpu") != "it was not built: COMPLORA_BUILD=cpu"


def test_the_cuda_half_that_does_not_load_is_reported_without_a_gpu(installed):
    sizes = json.loads((installed / "_build.json").read_text())["sizes"]
    write_record(installed, halves=["cpu", "cuda"], sizes={**sizes, "cuda": len("no library")})
    (installed / "_C_cuda.abi3.so").write_text("no library")
    lines = build_of(installed).describe()
    assert "cpu half   loads" in lines
    assert lines[-1].startswith("cuda half  it does not load: ImportError")


DAMAGED = {
    "version": complora_kernels.__version__,
    "halves": ["cpu"],
    "reason": "COMPLORA_BUILD=cpu",
    "sizes": {"cpu": len("no library")},
}


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ("no record", "_build.json is damaged: JSONDecodeError"),
        (json.dumps(DAMAGED), "it does not load: ImportError"),
    ],
)
def test_a_damaged_build_is_reported_and_skipped(tmp_path, record, sentence):
    shutil.copytree(ROOT / "complora_kernels", tmp_path / "complora_kernels", ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "complora_kernels" / "_C.abi3.so").write_text("no library")
    (tmp_path / "complora_kernels" / "_build.json").write_text(record)
    command = [sys.executable, "-B", "-m", "complora_kernels.backends"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("extension ")]
    assert "unavailable" in line
    assert sentence in line


@pytest.mark.parametrize(
    ("chips", "supported", "refused"),
    [
        ("8.0 8.6 9.0 10.0+PTX", [(8, 0), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)], [(7, 0), (7, 5)]),
        ("8.6;9.0a", [(8, 6), (8, 9), (9, 0)], [(8, 0), (9, 1), (10, 0), (12, 0)]),
        ("8.0+PTX", [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        ("", [], [(8, 0), (9, 0)]),
    ],
)
def test_gpus_that_a_build_runs_on(installed, chips, supported, refused):
    write_record(installed, chips=chips)
    fresh = build_of(installed)
    assert [fresh.chip_refusal(capability) for capability in supported] == [None] * len(supported)
    for major, minor in refused:
        reason = f"the GPU has compute capability {major}.{minor}, the extension was built for {chips or 'none'}"
        assert fresh.chip_refusal((major, minor)) == reason
