"""The kernels that are launched, read from their files: nothing is imported for Triton's interpreter or a GPU."""

from __future__ import annotations

import ast
from pathlib import Path

from complora_kernels import kernels


def launched_kernels() -> dict[str, str]:
    """The functions that the files of the kernels hand to `launch.run`, with their docstrings."""
    trees = [ast.parse(file.read_text()) for file in Path(kernels.__path__[0]).glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "launch.run"]
    launched = {ast.unparse(call.args[0]) for call in calls}
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.get_docstring(node) or "" for node in functions if node.name in launched}
