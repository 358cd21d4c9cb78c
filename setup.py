"""Build script and PEP 517 back end: pure Python, and the C++/CUDA extension where it can be built.

`COMPLORA_BUILD=0` builds none of it, `cpu` the half for the CPU, `cuda` both; unset, what there are compilers for.
pyproject.toml declares everything else.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.build_meta import (  # noqa: F401  the hooks of setuptools; get_requires_for_build_wheel is ours
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

MODULES = {"cpu": "complora_kernels._C", "cuda": "complora_kernels._C_cuda"}
SOURCES = {"cpu": ["csrc/registration.cpp", "csrc/complement_cpu.cpp"], "cuda": ["csrc/complement_cuda.cu"]}
LIBRARIES = {"cpu": ["c10", "torch", "torch_cpu"], "cuda": ["c10", "torch", "torch_cpu", "torch_cuda", "cudart"]}
RECORD = "_build.json"
TORCH = "torch>=2.11"
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # what any torch from there on builds runs under all of them
WINDOWS = os.name == "nt"
COMPILER = os.environ.get("CXX") or ("cl" if WINDOWS else "c++")  # as torch calls it


def decide(torch_version: str | None = None, torch_cuda: str | None = None) -> tuple[list[str], str]:
    """Which halves are built, and why; `torch_cuda` is the CUDA of the torch that builds, once there is one."""
    wanted = os.environ.get("COMPLORA_BUILD", "")
    if wanted not in ("", "0", "cpu", "cuda"):
        sys.exit(f"COMPLORA_BUILD={wanted!r}, expected 0, cpu or cuda")
    if wanted == "0":
        return [], "COMPLORA_BUILD=0"
    no_cpu = no_cuda = None
    if not shutil.which(shlex.split(COMPILER)[0]):
        no_cpu = f"no C++ compiler was found ({COMPILER})"
    elif sysconfig.get_config_var("Py_GIL_DISABLED"):
        no_cpu = "a free-threaded Python has no limited API"
    home, nvcc = cuda_toolkit()
    if not nvcc[0]:
        no_cuda = f"no nvcc was found ({home / 'bin'})"
    elif torch_version and nvcc[0] != int((torch_cuda or "0").split(".")[0]):
        no_cuda = f"nvcc is of CUDA {nvcc[0]}.{nvcc[1]}, torch {torch_version} of {torch_cuda or 'none'}"
    obstacles = {"": None, "cpu": no_cpu, "cuda": no_cpu or no_cuda}
    if obstacles[wanted]:
        sys.exit(f"COMPLORA_BUILD={wanted} cannot be built: {obstacles[wanted]}")
    if wanted == "cpu":
        return ["cpu"], "COMPLORA_BUILD=cpu"
    return [half for half in MODULES if not obstacles[half]], obstacles["cuda"] or "a C++ compiler and nvcc were found"


def cuda_toolkit() -> tuple[Path, tuple[int, int]]:
    """Its folder and version; (0, 0) without nvcc. Where /usr/local/bin/nvcc is a script, torch guesses /usr/local."""
    by_hand, on_path = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"), shutil.which("nvcc")
    homes = [Path(by_hand)] if by_hand else [*([Path(on_path).parents[1]] if on_path else []), Path("/usr/local/cuda")]
    home = next((home for home in homes if (home / "include" / "cuda_runtime.h").exists()), homes[0])
    nvcc = shutil.which("nvcc", path=home / "bin")
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    release = re.search(r"release (\d+)\.(\d+)", printed)
    return home, (int(release[1]), int(release[2])) if release else (0, 0)


def chips() -> str:
    """The compute capabilities to compile for; the user may set them."""
    default = "8.0 8.6 8.9 9.0" + (" 10.0" if cuda_toolkit()[1] >= (12, 8) else "") + "+PTX"
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST") or default
    if not re.fullmatch(r"(\d+\.\d[af]?(\+PTX)?([ ;]+|$))+", asked):
        sys.exit(f"TORCH_CUDA_ARCH_LIST={asked!r}, expected numbers as in {default!r}")
    return asked


def flags(half: str, headers: list[str]) -> dict[str, list[str]]:
    """Of each compiler; torch adds the C++ standard that its headers need."""
    strict = os.environ.get("COMPLORA_WERROR") == "1"
    # As system headers, so that only our own warnings count.
    common = [TARGET] if WINDOWS else [TARGET, "-O3", *(word for path in headers for word in ("-isystem", path))]
    host = ["/O2"] if WINDOWS else ["-fvisibility=hidden", *(["-Wall", "-Wextra", "-Werror"] if strict else [])]
    if half == "cpu":
        return {"cxx": common + host}
    # torch would set these itself, unless any flag has "arch" in it: a path, say.
    for chip in re.findall("[^ ;]+", chips()):
        number, _, ptx = chip.replace(".", "").partition("+")
        codes = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
        common.append(f"-gencode=arch=compute_{number},code={codes}")
    # A kernel that spills registers is an error too.
    strictly = ["-Werror=all-warnings", "-Xptxas=--warn-on-spills,--warning-as-error"]
    common += ["-DUSE_CUDA", *(strictly if strict else [])]
    return {"cxx": [], "nvcc": common + [f"-Xcompiler={flag}" for flag in host]}


class BuildExtension(build_ext):
    """Compiles with torch, which is imported here and not before."""

    def run(self) -> None:
        """Fills in what torch knows and hands over to torch's own command."""
        if not self.extensions:
            sys.exit(f"there is nothing to build: {decide()[1]}")
        os.environ["CUDA_HOME"] = str(cuda_toolkit()[0])
        try:
            import torch
            from torch.utils import cpp_extension
        except ImportError as error:
            sys.exit(f"the extension is built with {TORCH}: {error}; COMPLORA_BUILD=0 installs without it")
        halves, reason = decide(torch.__version__, torch.version.cuda)
        self.extensions = [extension for extension in self.extensions if extension.name in map(MODULES.get, halves)]
        for half, extension in zip(halves, self.extensions, strict=True):
            headers = cpp_extension.include_paths(half)
            extension.include_dirs += headers if WINDOWS else []
            extension.library_dirs += cpp_extension.library_paths(half)
            extension.libraries += LIBRARIES[half]
            extension.extra_compile_args = flags(half, headers)
        folder = Path(self.get_ext_fullpath(MODULES["cpu"])).parent
        for stale in (folder / RECORD, *folder.glob("_C*")):
            stale.unlink(missing_ok=True)
        command = cpp_extension.BuildExtension(self.distribution)
        vars(command).update(vars(self), force=True)  # ninja knows what is out of date
        try:
            command.run()
        except Exception as error:
            fewer = "COMPLORA_BUILD=cpu builds without CUDA, " if "cuda" in halves else ""
            sys.exit(f"the extension was not built: {error}; {fewer}COMPLORA_BUILD=0 installs without it")
        compiler = subprocess.getoutput(f"{COMPILER} --version").partition("\n")[0]
        facts = {"torch": torch.__version__, "compiler": compiler}
        if "cuda" in halves:
            facts |= {"cuda": "{}.{}".format(*cuda_toolkit()[1]), "chips": chips()}
        record(self, folder, halves, reason, facts)


class BuildPython(build_py):
    """Copies the package, and records why there is no extension where there is none."""

    def run(self) -> None:
        """The copy, then the record."""
        super().run()
        folder = Path("complora_kernels" if self.editable_mode else f"{self.build_lib}/complora_kernels")
        # An editable install that builds nothing leaves what was built in place before, and its record.
        if not self.distribution.ext_modules and not any(folder.glob("_C*")):
            record(self, folder, *decide(), {})

    def get_source_files(self) -> list[str]:
        """What goes into an sdist: csrc/ too, whatever can be built where it is packed."""
        return [*super().get_source_files(), *(path.as_posix() for path in Path("csrc").glob("*.[ch]*"))]


def record(command: build_py | build_ext, folder: Path, halves: list[str], reason: str, facts: dict[str, str]) -> None:
    """Says what was built and why, on stderr and in a file beside the modules."""
    print(f"complora-kernels: built {' and '.join(halves) or 'pure Python'}: {reason}", file=sys.stderr)
    modules = {half: folder / Path(command.get_ext_filename(MODULES[half])).name for half in halves}
    sizes = {half: module.stat().st_size for half, module in modules.items()}
    content = {
        "version": command.distribution.get_version(),
        "halves": halves,
        "reason": reason,
        "sizes": sizes,
        **facts,
    }
    unfinished = folder / f"{RECORD}.partial"
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(folder / RECORD)


def get_requires_for_build_wheel(config_settings: object = None) -> list[str]:
    """What pip puts into its isolated environment: torch only where something will be compiled."""
    return [TORCH, "ninja>=1.11"] if decide()[0] else []


get_requires_for_build_editable = get_requires_for_build_wheel

if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(MODULES[half], SOURCES[half], language="c++", py_limited_api=True) for half in decide()[0]
        ],
        cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if decide()[0] else {},
    )
