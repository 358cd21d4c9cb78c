"""`complora doctor`: what is installed and what can run here, for people and for reports of errors."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

VERSIONS = ("torch", "open_clip_torch", "torchvision", "transformers", "timm", "peft", "triton", "numpy", "safetensors")


def versions(names: tuple[str, ...] = VERSIONS) -> list[tuple[str, str]]:
    """The versions of this package, of Python and of other packages, from their metadata: nothing is imported."""
    rows = [("complora", _version("complora-kernels")), ("python", platform.python_version())]
    return rows + [(name, _version(name)) for name in names]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def doctor() -> int:
    """Print versions, devices, memory, backends with what one product gives on each, and where files are kept.

    Returns:
        The exit code: 1 where a backend that can run here computes a wrong product.
    """
    _print("versions", versions())
    _print("machine", _machine())
    rows, right = _products()
    _print("backends", rows)
    _print("files", _files())
    return 0 if right else 1


def _print(title: str, rows: list[tuple[str, str]]) -> None:
    print(title)
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in rows), end="\n\n")


def _machine() -> list[tuple[str, str]]:
    import torch

    rows = [
        ("system", platform.platform()),
        (
            "cpu",
            f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        ),
        ("memory", _memory()),
    ]
    if not torch.cuda.is_available():
        reason = "torch finds none" if torch.version.cuda else "this build of torch has no CUDA"
        return [*rows, ("gpu", f"none: {reason}")]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        words = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        rows.append((f"cuda:{i}", f"{words}, {_gib(free)} of {_gib(total)} free"))
    return rows


def _memory() -> str:
    try:
        page, pages, free = (os.sysconf(name) for name in ("SC_PAGE_SIZE", "SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # not on this system
        return "unknown"
    return f"{_gib(page * pages)}, {_gib(page * free)} of it unused"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _products() -> tuple[list[tuple[str, str]], bool]:
    """A row for each backend, with the error of one small product on it; and whether all products are right."""
    import torch

    from complora_kernels.backends import REGISTRY

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, right = [], True
    for name, backend in REGISTRY.items():
        reason = backend.unavailable()
        if reason is None:
            try:
                error = _error_of_product(name, device)
                is_right = error < 1e-3  # float32, or TF32 on a GPU
                words = f"available; y and its gradients are {error:.1e} from float64 on {device}"
                reason = words if is_right else f"WRONG: {words}"
            except Exception as error:  # whatever stops it is what somebody wants to know
                is_right, reason = False, f"FAILS: {' '.join(str(error).split())[:300]}"
            right = right and is_right
        else:
            reason = f"unavailable: {reason}"
        rows.append((name, reason))
    return rows, right


def _error_of_product(backend: str, device: str) -> float:
    """The largest relative error of `y` and the gradients of one Comp-LoRA product, against the formula in float64."""
    import torch

    from complora_kernels import functional, reference

    generator = torch.Generator().manual_seed(0)
    shapes = ((33, 64), (48, 64), (48,), (4, 64), (48, 4))
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]  # x, W, b, A, B
    basis = torch.linalg.qr(torch.randn(48, 16, generator=generator)).Q  # [48, 16]

    def computed(product: object, dtype: torch.dtype, on: str, **options: str) -> list[torch.Tensor]:
        x, W, b, A, B = (tensor.to(on, dtype) for tensor in drawn)
        leaves = [tensor.requires_grad_() for tensor in (x, A, B)]
        y = product(x, W, b, A, B, output_basis=basis.to(on, dtype), scaling=0.5, **options)  # pyright: ignore[reportCallIssue]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    found = computed(functional.complora_linear, torch.float32, device, backend=backend)
    expected = computed(reference.complora_linear, torch.float64, "cpu")
    pairs = zip(found, expected, strict=True)
    return max(float((own.cpu().double() - true).norm() / true.norm()) for own, true in pairs)


def _files() -> list[tuple[str, str]]:
    import complora_kernels
    from complora_kernels.backends import build, plans
    from complora_kernels.common.disk_cache import cache_folder

    folder, plan_file = cache_folder(), plans.plan_file()
    bases = "none is kept (COMPLORA_CACHE=0)" if folder is None else f"{folder}{_size(folder)}"
    return [
        ("package", str(Path(complora_kernels.__file__ or "").parent)),
        ("bases", bases),
        ("plans", f"{plan_file}{'' if plan_file.exists() else ' (not there: the shipped plans run)'}"),
        *(("extension", " ".join(line.split())) for line in build.describe()),
        *((name, os.environ[name]) for name in sorted(os.environ) if name.startswith("COMPLORA_")),
    ]


def _size(folder: Path) -> str:
    if not folder.is_dir():
        return " (not there yet)"
    sizes = [path.stat().st_size for path in folder.iterdir() if path.is_file()]
    return f" ({len(sizes)} {'file' if len(sizes) == 1 else 'files'}, {sum(sizes) / 2**20:.0f} MiB)"
