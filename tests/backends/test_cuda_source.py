"""`csrc/complement_cuda.cu` without a GPU: the same source, compiled by the C++ compiler for one CPU thread.

`cuda_on_cpu/` says how threads, barriers and shared memory are played there. Where there is a GPU, the same tests run a
second time on it, with what was built for it.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import mmap
import os
import shlex
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from mutations import check_refused_or_right
from numerics import assert_as_accurate_as_reference, random_basis
from torch import Tensor
from torch.utils._pytree import tree_map_only

from complora_kernels import reference
from complora_kernels.backends import build

ROOT = Path(__file__).parents[2]
EMULATION = ROOT / "tests" / "cuda_on_cpu"
FLAGS = shlex.split(
    "-std=c++17 -O1 -fPIC -shared -fvisibility=hidden -Wall -Wextra -Werror -Wno-unknown-pragmas -U_FORTIFY_SOURCE "
    "-fsanitize=alignment,bounds -fsanitize-undefined-trap-on-error "  # a vector that is not aligned ends the run
    "-Wl,-Bsymbolic -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000 -DPy_LIMITED_API=0x030A0000"
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SEED = -6148914691236517206  # both halves of the key


def wide(*dtypes: torch.dtype) -> torch.dtype:  # the dtype of the sums
    return torch.float64 if torch.float64 in dtypes else torch.float32


def compile_for_the_cpu() -> Path:
    """The library, in build/; compiled anew when a source, the flags or torch is another."""
    flags = [*FLAGS, *shlex.split(os.environ.get("CUDA_ON_CPU_FLAGS", ""))]
    sources = sorted(path for folder in (ROOT / "csrc", EMULATION) for path in folder.iterdir())
    key = hashlib.sha256("\0".join([torch.__version__, *flags]).encode())
    for source in sources:
        key.update(source.read_bytes())
    library = ROOT / "build" / "cuda_on_cpu" / f"{key.hexdigest()[:16]}.so"
    if not library.exists():
        torch_folder = Path(torch.__file__).parent
        include = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include"]
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CXX", "c++"), *flags, f"-I{EMULATION}", f"-I{ROOT / 'csrc'}"]
        for folder in (*include, sysconfig.get_path("include")):
            command += ["-isystem", str(folder)]
        command += [str(EMULATION / "emulated.cpp"), "-o", str(unfinished), f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        unfinished.replace(library)
    return library


class OnDevice:
    """Operations for tensors on the CPU that run on a device, in the tensors' own memory layout."""

    def __init__(self, operations: Any, device: str) -> None:
        self.operations, self.device = operations, device

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            memory: dict[Any, Tensor] = {}  # on the device: each storage that a tensor is a part of

            def there(value: Any) -> Any:
                if isinstance(value, (list, tuple)):
                    return [there(item) for item in value]
                if not isinstance(value, Tensor):
                    return value
                storage = value.untyped_storage()
                if (key := (storage.data_ptr(), value.dtype)) not in memory:
                    memory[key] = torch.empty(0, dtype=value.dtype).set_(storage).to(self.device, copy=True)
                return memory[key].as_strided(value.shape, value.stride(), value.storage_offset())

            return tree_map_only(Tensor, Tensor.cpu, getattr(self.operations, name)(*map(there, arguments)))

        return call


@pytest.fixture(scope="session")
def emulated() -> SimpleNamespace:
    """The operations of the CUDA half, and what its emulation can be told and asked."""
    library = compile_for_the_cpu()
    torch.ops.load_library(library)
    emulation = ctypes.CDLL(str(library))
    emulation.set_seed.argtypes = [ctypes.c_uint64]
    emulation.launches.restype = ctypes.c_int64
    return SimpleNamespace(ops=torch.ops.complora_emulated, emulation=emulation)


@pytest.fixture(scope="session", params=["emulated", "device"] if torch.cuda.is_available() else ["emulated"])
def cuda(request: pytest.FixtureRequest, emulated: SimpleNamespace) -> SimpleNamespace:
    """Either; a device takes its threads in an order of its own."""
    if request.param == "emulated":
        return emulated
    assert build.failure("cuda") is None, build.failure("cuda")
    return SimpleNamespace(ops=OnDevice(torch.ops.complora, "cuda"), emulation=emulated.emulation)


@pytest.fixture(autouse=True, scope="session")
def cpu_half() -> None:
    assert build.failure("cpu") is None, build.failure("cpu")


@pytest.fixture(autouse=True)
def same_order(emulated: SimpleNamespace) -> Iterator[None]:
    yield
    emulated.emulation.set_seed(0)


CPU = torch.ops.complora


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same matrix in another memory layout; `broadcast` repeats its first row."""
    if layout == "strided":
        return torch.stack([tensor, tensor + 1], -1)[..., 0]
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "shifted":  # no vector of it is aligned
        return torch.cat([tensor.new_empty(1), tensor.flatten()])[1:].view(tensor.shape)
    if layout == "padded":  # vectors are aligned, and the last one of a row reaches into the NaN behind it
        pitch = -(-tensor.shape[1] // 16) * 16 + 16
        return tensor.new_full((tensor.shape[0], pitch), torch.nan)[:, : tensor.shape[1]].copy_(tensor)
    if layout == "padded transposed":
        return laid_out(tensor.mT, "padded").mT
    if layout == "broadcast":
        return tensor[:1].expand(tensor.shape)
    return tensor


LAYOUTS = ("contiguous", "strided", "transposed", "shifted", "padded", "padded transposed", "broadcast")


def pool(tensors: Sequence[Tensor]) -> Tensor:
    """Results of several shapes as one: a single element may round well or badly by chance."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def assert_same_whatever_the_order(cuda: SimpleNamespace, run: Callable[[], Sequence[Tensor]]) -> None:
    """The order is that of the threads between two barriers, and of the blocks of a launch."""
    expected = run()
    for seed in (1, 2, 3):
        cuda.emulation.set_seed(seed)
        for ours, first in zip(run(), expected, strict=True):
            assert torch.equal(ours, first), f"other bits under order {seed}"


def project(rows: Tensor, basis: Tensor | None, complement: bool) -> Tensor:
    if basis is None:
        return rows
    kind = "complement" if complement else "principal"
    return reference.project_complement(rows, basis.to(rows.dtype), basis_kind=kind)


PROJECTIONS = [  # rows, d, k
    *itertools.product((1, 5, 17), (1, 63, 137), (0.0, 0.5, 1.0)),
    *itertools.product((64, 128), (8, 128), (0.5,)),
]


@pytest.mark.parametrize("kind", ["principal", "complement"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_project_complement(cuda, dtype, layout, kind):
    ours, cpu, same_dtype, exact = [], [], [], []
    for i, (rows, d, share) in enumerate(PROJECTIONS):
        factor = laid_out(torch.randn(rows, d).to(dtype), layout)
        basis = laid_out(random_basis(d, int(share * d), wide(dtype)), LAYOUTS[i % 6])
        arguments = (factor, basis, kind == "complement")
        ours.append(cuda.ops.project_complement(*arguments))
        cpu.append(CPU.project_complement(*arguments))
        same_dtype.append(reference.project_complement(factor, basis, basis_kind=kind))
        exact.append(reference.project_complement(factor.double(), basis.double(), basis_kind=kind))
    assert_as_accurate_as_reference(pool(ours), pool(same_dtype), pool(exact), "the projection")
    assert_as_accurate_as_reference(pool(ours), pool(cpu), pool(exact), "the projection, beside the CPU's,")


def test_factors_of_any_number_of_dimensions(cuda):
    basis = random_basis(24, 7)
    crossed = torch.randn(24, 3, 2).permute(2, 1, 0)[:, ::2]  # no view of it has rows
    for factor in (*map(torch.randn, ((24,), (0, 24), (2, 3, 24), (3, 0, 24))), crossed):
        ours = cuda.ops.project_complement(factor, basis, False)
        expected = reference.project_complement(factor, basis)
        exact = reference.project_complement(factor.double(), basis.double())
        assert_as_accurate_as_reference(ours, expected, exact, "the projection")


DTYPE_PAIRS = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float32, torch.float64),
    (torch.float64, torch.float64),
    (torch.float64, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float64),
)


@pytest.mark.parametrize(("factor_dtype", "dtype"), DTYPE_PAIRS, ids=str)
def test_fold_factors(cuda, factor_dtype, dtype):
    """Factors of all ranks, sides, kinds and layouts, with and without a basis, in one call of two launches."""
    shapes = [(1, 5, 2), (2, 40, 20), (3, 63, 63), (16, 64, 16), (17, 70, 0), (128, 33, 16), (2, 137, 90)]  # r, d, k
    factors, bases, complement, output_side = [], [], [], []
    for i, (r, d, k) in enumerate(shapes * 2):
        output_side.append(i % 3 != 0)
        shape = (d, r) if output_side[-1] else (r, d)
        factors.append(laid_out(torch.randn(shape).to(factor_dtype), LAYOUTS[i % 7]))
        basis = laid_out(random_basis(d, k, wide(factor_dtype, dtype)), LAYOUTS[i % 6])
        bases.append(None if i in (3, 8) else basis)
        complement.append(i % 2 == 1)
    arguments = (factors, bases, complement, output_side, 0.3, dtype)
    before = cuda.emulation.launches()
    ours = cuda.ops.fold_factors(*arguments)
    assert cuda.emulation.launches() - before == 2

    def by_reference(cast: Callable[[Tensor], Tensor], to: torch.dtype) -> Tensor:
        parts = []
        for factor, basis, of_complement, output in zip(factors, bases, complement, output_side, strict=True):
            rows = cast(factor).mT if output else cast(factor)
            folded = project(rows, basis, of_complement)
            parts.append(((0.3 * folded).mT if output else folded).to(to))
        return pool(parts)

    same_dtype = by_reference(lambda factor: factor.to(wide(factor_dtype, dtype)), dtype)
    exact = by_reference(Tensor.double, torch.float64)
    assert_as_accurate_as_reference(ours, same_dtype, exact, "the folded factors")
    assert_as_accurate_as_reference(ours, CPU.fold_factors(*arguments), exact, "the folded factors, beside the CPU's,")


def test_more_factors_than_one_launch_takes(emulated):
    """500 of them, in three pairs of launches; 144, as of 72 layers, in one."""
    factors = [torch.randn(1 + i % 3, 6) for i in range(500)]
    bases = [random_basis(6, i % 7) for i in range(500)]
    for n, launches in ((144, 2), (500, 6)):
        before = emulated.emulation.launches()
        kinds, sides = [i % 2 == 0 for i in range(n)], [False] * n
        ours = emulated.ops.fold_factors(factors[:n], bases[:n], kinds, sides, 1.0, torch.float32)
        assert emulated.emulation.launches() - before == launches
        cpu = CPU.fold_factors(factors[:n], bases[:n], kinds, sides, 1.0, torch.float32)
        torch.testing.assert_close(ours, cpu, rtol=0, atol=1e-5)  # sums of six products, of the size of 1


def test_factors_without_elements_beside_others(cuda):
    A, B, basis = torch.randn(4, 64), torch.randn(64, 4), random_basis(64, 16)
    factors, bases = [torch.empty(4, 0), A, torch.empty(0, 4), B], [None, basis, None, basis]
    arguments = (factors, bases, [False] * 4, [False, False, True, True], 0.5, torch.float32)
    folded = cuda.ops.fold_factors(*arguments)
    torch.testing.assert_close(folded, CPU.fold_factors(*arguments), rtol=0, atol=1e-5)  # sums of 64 products


class Problem(NamedTuple):
    """The arguments of `packed_lora_linear_factor_grads`, and the exact result."""

    dY: Tensor  # [M, N]
    x: Tensor  # [M, K]
    h: Tensor  # [M, P r]
    g: Tensor  # [M, P r]
    starts: list[int]  # P
    height: int  # D
    dropout_p: float

    def arguments(self, needs: Sequence[bool] = (True, True)) -> tuple[Any, ...]:
        return (*self, torch.tensor([SEED]) if self.dropout_p > 0 else None, list(needs))

    def by_formula(self, sums: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """dA_p = g_p^T (m_p ∘ x) and dB_p = dY_p^T h_p, summed in `sums`."""
        r = self.g.shape[1] // len(self.starts)
        dA, dB = [], []
        for p, start in enumerate(self.starts):
            x, columns = self.x.to(sums), slice(p * r, (p + 1) * r)
            if self.dropout_p > 0:
                x = x * mask(p, x.shape, self.dropout_p).to(sums)
            dA.append(self.g[:, columns].to(sums).mT @ x)  # [r, K]
            dB.append(self.dY[:, start : start + self.height].to(sums).mT @ self.h[:, columns].to(sums))  # [D, r]
        return torch.stack(dA).to(dtype), torch.stack(dB).to(dtype)


def mask(adapter: int, shape: Sequence[int], p: float) -> Tensor:
    """`m = mask / (1 - p)`, for the p that the lanes can draw."""
    lanes = 256 if (256 * p).is_integer() else 65536
    keep = reference.keep_mask(SEED, adapter, (shape[0], shape[1]), p)
    return keep.double() / (1 - round(p * lanes) / lanes)


def make_problem(
    M: int,
    N: int,
    K: int,
    r: int,
    P: int = 1,
    dropout_p: float = 0.0,
    dtype: torch.dtype = torch.float32,
    layouts: Sequence[str] = ("contiguous",) * 4,
) -> Problem:
    dY, x, h, g = (
        laid_out(torch.randn(M, columns).to(dtype), layout)
        for columns, layout in zip((N, K, P * r, P * r), layouts, strict=True)
    )
    height = N // P
    return Problem(dY, x, h, g, [height * (P - 1 - p) for p in range(P)], height, dropout_p)


def check_factor_grads(cuda: SimpleNamespace, problems: Sequence[Problem]) -> None:
    ours = [cuda.ops.packed_lora_linear_factor_grads(*problem.arguments()) for problem in problems]
    cpu = [CPU.packed_lora_linear_factor_grads(*problem.arguments()) for problem in problems]
    same_dtype = [problem.by_formula(wide(problem.x.dtype), problem.x.dtype) for problem in problems]
    exact = [problem.by_formula(torch.float64, torch.float64) for problem in problems]
    for i, name in enumerate(("dA", "dB")):
        results = [pool([result[i] for result in part]) for part in (ours, cpu, same_dtype, exact)]
        assert_as_accurate_as_reference(results[0], results[2], results[3], name)
        assert_as_accurate_as_reference(results[0], results[1], results[3], f"{name}, beside the CPU's,")


@pytest.mark.parametrize("dropout_p", [0.0, 0.25, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factor_grads(cuda, dtype, dropout_p):
    """For rows that one block adds up and rows that several do, for one adapter and for three."""
    sizes = [(1, 1, 1, 1, 1), (63, 33, 40, 3, 1), (137, 63, 137, 2, 3), (600, 66, 24, 6, 3), (700, 40, 137, 17, 1)]
    check_factor_grads(cuda, [make_problem(*size, dropout_p, dtype) for size in sizes])


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factor_grads_of_any_strides(cuda, dtype, layout):
    layouts = [[layout if i == j else "contiguous" for j in range(4)] for i in range(4)]
    options = [(lay, p) for lay in (*layouts, [layout] * 4) for p in (0.0, 0.25)]
    check_factor_grads(cuda, [make_problem(137, 48, 64, 8, 3, p, dtype, layouts=lay) for lay, p in options])


@pytest.mark.parametrize("rank", [1, 15, 16, 17, 33, 64, 65, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factor_grads_of_any_rank(cuda, dtype, rank):
    problems = [make_problem(137, 30, 63, rank, 1, p, dtype) for p in (0.0, 0.1)]
    check_factor_grads(cuda, [*problems, make_problem(65, 21, 17, rank, 3, 0.25, dtype)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_factor_grads_are_rounded_once(cuda, dtype):
    for M, p in itertools.product((137, 700), (0.0, 0.25)):  # rows that one block adds up, and several
        problem = make_problem(M, 45, 63, 5, 3, p, dtype)
        exact = problem.by_formula(torch.float64, torch.float64)
        for ours, true in zip(cuda.ops.packed_lora_linear_factor_grads(*problem.arguments()), exact, strict=True):
            # Half an ulp, and the roundings of float32, which may move a sum past the middle between two halves.
            assert ((ours.double() - true).abs() <= torch.finfo(dtype).eps / 2 * true.abs() + 1e-4).all()


def test_factor_grads_of_many_adapters(cuda):
    """More than the products of one launch."""
    check_factor_grads(cuda, [make_problem(300, 40, 21, 2, 20, p, torch.bfloat16) for p in (0.0, 0.25)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("M", [0, 1, 300])
def test_factor_grads_that_are_needed(cuda, M, dtype):
    problem = make_problem(M, 33, 40, 3, 3, 0.25, dtype)
    whole = cuda.ops.packed_lora_linear_factor_grads(*problem.arguments())
    unread = torch.empty(0, 0, dtype=dtype)
    dA, dB = cuda.ops.packed_lora_linear_factor_grads(*problem._replace(h=unread).arguments((True, False)))
    assert (dA.shape, dB.shape) == ((3, 3, 40), (0, 11, 3))
    torch.testing.assert_close(dA, whole[0])  # another number of splits, and so another order of summation
    dA, dB = cuda.ops.packed_lora_linear_factor_grads(*problem._replace(g=unread).arguments((False, True)))
    assert (dA.shape, dB.shape) == ((0, 3, 40), (3, 11, 3))
    torch.testing.assert_close(dB, whole[1])
    dA, dB = cuda.ops.packed_lora_linear_factor_grads(*problem.arguments((False, False)))
    assert dA.numel() == dB.numel() == 0
    if M == 0:
        assert not whole[0].any()
        assert not whole[1].any()


@pytest.mark.parametrize("p", [0.0, 0.25, 0.1, 0.99999])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_drop(cuda, dtype, p):
    seed = torch.tensor([SEED])
    for (rows, columns), layout in itertools.product(((1, 1), (5, 63), (63, 137), (3, 144)), LAYOUTS):
        x = laid_out(torch.randn(rows, columns).to(dtype), layout)
        ours = cuda.ops.drop(x, seed, 2, p)
        keep = reference.keep_mask(SEED, 2, (rows, columns), p)
        lanes = 256 if (256 * p).is_integer() else 65536
        scaled = x.to(wide(dtype)) / (1 - min(round(p * lanes), lanes - 1) / lanes)
        torch.testing.assert_close(ours, torch.where(keep, scaled, 0).to(dtype))
        assert torch.equal(ours != 0, keep & (x != 0))
        assert torch.equal(ours, CPU.drop(x, seed, 2, p))
    assert cuda.ops.drop(torch.empty(0, 8), seed, 0, p).shape == (0, 8)


def test_the_same_bits_in_any_order(cuda):
    factors, bases = [torch.randn(17, 137), torch.randn(3, 40)], [random_basis(137, 80), random_basis(40, 11)]
    problems = [
        make_problem(600, 48, 137, 6, 3, p, dtype) for dtype in (torch.float32, torch.bfloat16) for p in (0.0, 0.25)
    ]

    def run() -> list[Tensor]:
        folded = cuda.ops.fold_factors(factors, bases, [False, True], [False, False], 1.0, torch.bfloat16)
        projected = cuda.ops.project_complement(factors[0], bases[0], False)
        dropped = cuda.ops.drop(factors[0], torch.tensor([SEED]), 0, 0.25)
        gradients = [cuda.ops.packed_lora_linear_factor_grads(*problem.arguments()) for problem in problems]
        return [folded, projected, dropped, *itertools.chain(*gradients)]

    assert_same_whatever_the_order(cuda, run)


def far(matrix: Tensor, along: int = 0) -> Tensor:
    """A copy whose last row, or last column, starts past 2^31 elements, in memory of which little is ever touched."""
    stride = -(-(2**31) // (matrix.shape[along] - 1)) // 16 * 16 + 16
    size = stride * (matrix.shape[along] - 1) + matrix.shape[1 - along]
    no_reserve = 0x4000  # MAP_NORESERVE, which Python's mmap does not name
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = torch.frombuffer(mmap.mmap(-1, size * matrix.element_size(), flags), dtype=matrix.dtype)
    return memory.as_strided(matrix.shape, (stride, 1) if along == 0 else (1, stride)).copy_(matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_addresses_past_two_to_the_31(cuda, dtype):
    factor, basis = torch.randn(17, 40).to(dtype), random_basis(40, 11)
    expected = cuda.ops.project_complement(factor, basis, False)
    for along in (0, 1):
        assert torch.equal(cuda.ops.project_complement(far(factor, along), basis, False), expected)
    assert torch.equal(cuda.ops.project_complement(factor, far(basis, 0), False), expected)
    assert torch.equal(cuda.ops.project_complement(factor, far(basis, 1), False), expected)
    seed = torch.tensor([SEED])
    assert torch.equal(cuda.ops.drop(far(factor), seed, 1, 0.25), cuda.ops.drop(factor, seed, 1, 0.25))
    problem = make_problem(70, 24, 40, 2, 3, 0.25, dtype)
    expected = cuda.ops.packed_lora_linear_factor_grads(*problem.arguments())
    for along in (0, 1):
        moved = problem._replace(**{name: far(getattr(problem, name), along) for name in ("dY", "x", "h", "g")})
        for ours, near in zip(cuda.ops.packed_lora_linear_factor_grads(*moved.arguments()), expected, strict=True):
            assert torch.equal(ours, near)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("name", ["project_complement", "fold_factors", "packed_lora_linear_factor_grads", "drop"])
def test_what_does_not_fit_is_refused(emulated, name):
    check_refused_or_right(getattr(emulated.ops, name), name, torch.device("cpu"), 300)


def test_an_error_is_reported_at_the_operation_that_caused_it(emulated):
    factor, basis = torch.randn(3, 8), random_basis(8, 2)
    emulated.emulation.set_next_error(700)
    with pytest.raises(RuntimeError, match="CUDA error 700"):
        emulated.ops.project_complement(factor, basis, False)
    emulated.ops.project_complement(factor, basis, False)
