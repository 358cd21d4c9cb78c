"""The rooms of the package: who may import whom, as `docs/architecture.md` draws them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import complora_kernels

PACKAGE = Path(complora_kernels.__file__).parent
# From the top to the bottom. A room imports rooms below it, and its own files.
ROOMS = (
    "fewshot",
    "__init__",  # the public names
    "tune",
    "replays",
    "graphs",
    "adapters",
    "integrations",
    "modules",
    "blocks",
    "functional",
    "autograd",
    "backends",
    "kernels",
    "dropout",
    "reference",
    "config",
    "subspace",
    "adapted_linear",
    "common",
)
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first, *_ = path.relative_to(PACKAGE).parts
    return first.removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """The full names that a file imports, inside functions too; those that annotations alone need are left out."""
    tree = ast.parse(path.read_text())
    annotations = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {id(node) for block in annotations for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_rooms_below_it(path):
    own = room_of(path)
    for name in imported(path):
        package, _, rest = name.partition(".")
        if package != "complora_kernels" or rest == "__version__":
            continue
        first = rest.partition(".")[0]
        other = first if first in ROOMS else "__init__"
        assert ROOMS.index(other) >= ROOMS.index(own), f"{own} imports {name}, a room above it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_kernels_import_triton(path):
    if room_of(path) != "kernels":
        assert not [name for name in imported(path) if name.partition(".")[0] == "triton"]


def test_every_room_is_known_and_there_are_few():
    rooms = {room_of(path) for path in FILES}
    assert rooms == set(ROOMS)
    assert len([path for path in PACKAGE.glob("*.py") if path.stem != "__init__"]) <= 12
