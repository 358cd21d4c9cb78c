"""Compiled kernels to take along to a borrowed GPU: `make gpu-cache`, on a machine without one.

The first run's own program is run with its launches left out, so that what it compiles is what it will launch. A
borrowed GPU's minutes then go to kernels and not to compiling them.

Triton's key of a compiled kernel names no GPU and no path, but the very files of the installed Triton, so that each
build of one version, and each Python, has keys of its own. Kept are therefore the rest of each key, the machine code
and its description; `unpack` makes the keys of the Triton that it finds, of the same version, and Triton finds what it
would have compiled. Launchers, which Triton before 3.7 builds for each signature with a C compiler, are kept as their
source and built by many processes at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import zipfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

KEPT = (".json", ".cubin")
MANIFEST = "manifest.json"
LARGEST = 40 * 2**20  # bytes that travel with the tree
BACKEND = "COMPLORA_BACKEND"


class Compiled(NamedTuple):
    """What a process has compiled."""

    keys: dict[str, str]  # the folder of a kernel in the cache -> its key without that of Triton's own files
    launchers: list[str]  # sources in C
    misses: int  # kernels that were compiled; the others lay in the cache
    failed: list[str]


def record(share: int, shares: int, chip: int, cache: Path) -> Compiled:
    """Compiles for one process's share of the entries, in a process that has imported no kernel yet."""
    os.environ |= {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1", BACKEND: "triton"}
    os.environ.pop("TRITON_INTERPRET", None)
    import torch
    import triton

    from benchmarks import dispatch
    from benchmarks.gpu.entries import entries
    from benchmarks.gpu.environment import Compilations
    from benchmarks.gpu.problems import Bench

    torch.set_num_threads(1)
    compilations, misses = Compilations(), 0
    bench, keys, launchers, failed = Bench(torch.device("cpu"), dry=True), {}, {}, []
    original = triton.compiler.compiler.get_cache_key

    def noted(*args: Any, **options: Any) -> str:
        key = original(*args, **options)
        keys[folder_of(key)] = key.removeprefix(triton_key())
        return key

    def compiled(kernel: Any) -> None:
        launchers.update(dict.fromkeys(launcher_of(kernel)))

    with patch.object(triton.compiler.compiler, "get_cache_key", noted):
        for entry in entries(bench)[share::shares]:
            try:
                with dispatch.kernels_unlaunched(chip, compiled):
                    list(entry.run(bench))
            except Exception as error:
                failed.append(f"{entry.name}: {type(error).__name__}: {error}")
            misses += compilations.row()["compiled"]
    return Compiled(keys, list(launchers), misses, failed)


def launcher_of(kernel: Any) -> list[str]:
    """The source of a kernel's launcher, where Triton builds one for each signature."""
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        return []
    sources: list[str] = []

    class Recorded:
        launch = staticmethod(lambda *_: None)

    def note(src: str, **_: Any) -> Any:
        sources.append(src)
        return Recorded

    with patch.multiple(driver, compile_module_from_src=note, library_dirs=list):
        driver.CudaLauncher(kernel.src, kernel.metadata)
    return sources


def triton_key() -> str:
    """Triton's part of its keys: of the files that are installed."""
    import triton

    return triton.runtime.cache.triton_key()


def folder_of(key: str) -> str:
    """The folder of the cache that a kernel of this key lies in."""
    from triton.runtime.cache import _base32

    return _base32(hashlib.sha256(key.encode()).hexdigest())


def pack(cache: Path, recorded: Iterable[Compiled], target: Path, chip: int) -> int:
    """One file with all that was compiled; its bytes."""
    import triton

    keys: dict[str, str] = {}
    launchers: dict[str, None] = {}
    for each in recorded:
        keys |= each.keys
        launchers.update(dict.fromkeys(each.launchers))
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
        manifest = {"triton": triton.__version__, "chip": chip, "keys": keys, "launchers": list(launchers)}
        file.writestr(MANIFEST, json.dumps(manifest))
        for folder in sorted(keys):
            for path in sorted(Path(cache, folder).iterdir()):
                if path.suffix in KEPT and not path.name.startswith("__grp__"):
                    file.write(path, f"{folder}/{path.name}")
    return target.stat().st_size


def unpack(source: Path, *, launchers: bool = True) -> dict[str, Any]:
    """Puts packed kernels where the installed Triton looks for them, and builds their launchers; a row about it."""
    import triton
    from triton import knobs

    cache, own = Path(knobs.cache.dir), triton_key()
    with zipfile.ZipFile(source) as file:
        manifest = json.loads(file.read(MANIFEST))
        row: dict[str, Any] = {"what": "kernels that were brought", "kernels": len(manifest["keys"])}
        if manifest["triton"] != triton.__version__:
            wanted = f"packed for triton {manifest['triton']}, here is {triton.__version__}: all are compiled here"
            return row | {"kernels": 0, "error": wanted, "ok": False}
        names: dict[str, list[str]] = {}
        for name in file.namelist():
            folder, _, child = name.partition("/")
            if child:
                names.setdefault(folder, []).append(child)
        for folder, rest in manifest["keys"].items():
            key = own + rest
            target = cache / folder_of(key)
            target.mkdir(parents=True, exist_ok=True)
            for child in names[folder]:
                data = file.read(f"{folder}/{child}")
                if child.endswith(".json"):
                    described = json.loads(data) | {"hash": hashlib.sha256(key.encode()).hexdigest()}
                    data = json.dumps(described).encode()
                (target / child).write_bytes(data)
            paths = {child: str(target / child) for child in names[folder]}
            description = next(child for child in names[folder] if child.endswith(".json"))
            (target / f"__grp__{description}").write_text(json.dumps({"child_paths": paths}))
    return row | (build_launchers(manifest["launchers"]) if launchers else {})


def build_launchers(sources: list[str]) -> dict[str, Any]:
    """Builds them all at once: each is a run of the C compiler."""
    from triton.backends.nvidia import driver
    from triton.runtime import build

    if not hasattr(driver, "make_launcher") or not sources:
        return {}
    given = {"library_dirs": driver.library_dirs(), "include_dirs": driver.include_dirs, "libraries": driver.libraries}
    make = partial(build.compile_module_from_src, name="__triton_launcher", **given)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            list(pool.map(make, sources))
        except Exception as error:
            return {"launchers": 0, "error": f"launchers cannot be built: {type(error).__name__}: {error}", "ok": False}
    return {"launchers": len(sources)}


def main() -> None:
    """Compiles and packs; with --check also unpacks elsewhere and looks that a second run compiles nothing."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.cache", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--folder", type=Path, default=Path("build/gpu-cache"), help="where all is written")
    parser.add_argument("--chip", type=int, default=90, help="compute capability (90)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--check", action="store_true", help="run again with what was packed")
    options = parser.parse_args()
    import triton

    packed = options.folder / "kernels.zip"

    def run(cache: Path) -> list[Compiled]:
        share = partial(record, shares=options.jobs, chip=options.chip, cache=cache.resolve())
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            return list(pool.map(share, range(options.jobs)))

    found = run(options.folder / "triton")
    size = pack(options.folder / "triton", found, packed, options.chip)
    kernels = len({folder for each in found for folder in each.keys})
    print(f"{packed}: {kernels} kernels for sm_{options.chip}, triton {triton.__version__}, {size / 2**20:.1f} MiB")
    failed = [name for each in found for name in each.failed]
    failed += [f"{size} bytes, expected at most {LARGEST}"] if size > LARGEST else []
    if options.check:
        elsewhere = (options.folder / "check").resolve()
        os.environ["TRITON_CACHE_DIR"] = str(elsewhere)
        unpack(packed, launchers=False)
        misses = sum(each.misses for each in run(elsewhere))
        print(f"a second run, from what was packed: {misses} kernels compiled")
        failed += [f"{misses} kernels were compiled a second time"] if misses else []
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
