"""What installing and importing the package do, and what they must not do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import Specifier
from packaging.version import Version

import complora_kernels

ROOT = Path(__file__).parents[1]
OPTIONAL = {"matplotlib", "peft", "rich", "sklearn", "torchvision", "triton", "tyro"}


def run_python(source: str, *arguments: str, cwd: Path = ROOT, **variables: str) -> str:
    """Run `source` in a fresh interpreter and return what it prints."""
    command = [sys.executable, "-B", "-c", source, *arguments]  # -B: no bytecode files
    result = subprocess.run(command, cwd=cwd, env=os.environ | variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# Every public name, but for the one that needs the bundled program: they are imported when they are first used.
EVERY_NAME = """
import complora_kernels

for name in complora_kernels.__all__:
    if name != "load_classifier":
        getattr(complora_kernels, name)
"""


def test_import_works_without_the_optional_dependencies() -> None:
    run_python(
        """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""
        + EVERY_NAME
        + """
try:
    complora_kernels.load_classifier
except ModuleNotFoundError as error:
    assert "pip install 'complora-kernels[train]'" in str(error)
else:
    raise AssertionError("the bundled program was imported without what it needs")
""",
        *OPTIONAL,
    )


def test_import_loads_no_optional_dependency() -> None:
    loaded = run_python(
        """
import sys
import torch

by_torch = set(sys.modules)
"""
        + EVERY_NAME
        + """
print(*(set(sys.modules) - by_torch))
"""
    ).split()
    assert "complora_kernels" in loaded
    assert {name.partition(".")[0] for name in loaded} & OPTIONAL == set()


def test_import_asks_no_hardware_and_writes_nothing() -> None:
    run_python(
        """
import os
import sys
import torch

def refuse(*args, **kwargs):
    raise AssertionError("a device was asked for at import")

for name in ("_lazy_init", "current_device", "device_count", "get_device_capability", "get_device_properties",
             "is_available"):
    setattr(torch.cuda, name, refuse)

def refuse_side_effects(event, args):
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    forbidden = ("os.mkdir", "os.remove", "os.rename", "os.system", "socket.connect", "subprocess.Popen")
    if writes or event in forbidden:
        raise AssertionError(f"{event} {args} at import")

sys.addaudithook(refuse_side_effects)
"""
        + EVERY_NAME
    )


def test_every_public_name_exists() -> None:
    names = complora_kernels.__all__
    assert names
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(complora_kernels, name)] == []
    assert names == sorted(complora_kernels._HOMES)
    assert set(names) <= set(dir(complora_kernels))
    assert complora_kernels.functional.__name__ == "complora_kernels.functional"
    assert not hasattr(complora_kernels, "nothing")


def test_the_package_itself_imports_nothing_heavy() -> None:
    loaded = run_python("import sys, complora_kernels; print(*sys.modules)").split()
    assert not {"torch", "numpy", "open_clip"} & set(loaded)


def test_version_is_the_one_installed_and_cited() -> None:
    assert complora_kernels.__version__ == metadata.version("complora-kernels"), (
        "install again after a change of version"
    )
    assert f"\nversion: {complora_kernels.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_console_script_loads() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="complora")
    assert callable(script.load())


def test_oldest_pins_are_the_lower_bounds() -> None:
    """`make test-oldest` says something about pyproject.toml only while both name the same versions."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements" / "oldest.txt").read_text().splitlines()]
    pins = applicable(Requirement(line) for line in lines if line)
    for name in ("torchvision", "transformers", "pyparsing"):  # not ours to bound
        pins.pop(name, None)
    bounds = applicable(map(Requirement, metadata.requires("complora-kernels") or []))
    assert {name: (pin.operator, Version(pin.version)) for name, pin in pins.items()} == {
        name: ("==", Version(bound.version)) for name, bound in bounds.items()
    }
    assert {bound.operator for bound in bounds.values()} == {">="}


def applicable(requirements: Iterable[Requirement]) -> dict[str, Specifier]:
    """The one specifier of each requirement that holds here, without extras or with those that run in a test."""
    specifiers = {}
    for requirement in requirements:
        marker = requirement.marker
        if marker is None or any(
            marker.evaluate({"extra": extra}) for extra in ("", "train", "pretrain", "slurm", "tensorboard", "peft")
        ):
            (specifiers[requirement.name],) = requirement.specifier
    return specifiers


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "complora_kernels", source / "complora_kernels", ignore=ignore)
    shutil.copytree(ROOT / "csrc", source / "csrc")
    # The build back end itself, without pip's isolated environment: needs no network.
    run_python("import setup; setup.build_wheel('.')", cwd=source, COMPLORA_BUILD="0")
    (wheel,) = source.glob("*.whl")
    return wheel


def test_pure_wheel_holds_every_file_of_the_package_and_nothing_else(pure_wheel: Path) -> None:
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "complora_kernels").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    files = set(zipfile.ZipFile(pure_wheel).namelist())
    assert {name for name in files if ".dist-info/" not in name} == package | {"complora_kernels/_build.json"}
    assert "complora_kernels/py.typed" in package


def test_pure_wheel_serves_every_platform_and_says_why_it_is_pure(pure_wheel: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    record = json.loads(zipfile.ZipFile(pure_wheel).read("complora_kernels/_build.json"))
    expected = {"version": complora_kernels.__version__, "halves": [], "reason": "COMPLORA_BUILD=0", "sizes": {}}
    assert record == expected
