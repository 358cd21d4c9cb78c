"""Build script of complora-kernels.

Everything is declared in ``pyproject.toml``; this installs pure Python and needs no compiler.
"""

from setuptools import setup

setup()
