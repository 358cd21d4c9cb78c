"""`make aot` without its compiler: the machine code it reads, the rules it asks, the budgets it holds."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import triton
from triton.runtime.jit import JITFunction

from benchmarks.aot import __main__ as program
from benchmarks.aot import budgets, checks, compiled, machine_code
from benchmarks.aot.budgets import Budgets
from benchmarks.aot.checks import Except
from benchmarks.aot.chips import BY_NAME
from benchmarks.aot.compiled import Kernel
from benchmarks.aot.launches import Launch
from benchmarks.aot.machine_code import MainLoop, parse_amdgcn, parse_sass
from complora_kernels.kernels import activation, da

# A product that waits for a dot before its first load, has a loop of 16-byte loads, and loads its bias behind it.
PRODUCT = """
	code for sm_90a
        /*0000*/                   LDC R1, c[0x0][0x28] ;                        /* 0x00000a00ff017b82 */
                                                                                 /* 0x000e700000000800 */
        /*0010*/                   LDG.E.128 R4, desc[UR18][R2.64] ;             /* 0x0000000000000000 */
        /*0020*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;  /* 0x0000000000000000 */
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;               /* 0x0000000000000000 */
        /*0040*/                   LDGSTS.E.BYPASS.LTC128B.128 [R126], desc[UR18][R10.64], P2 ;  /* 0x00000000 */
        /*0050*/               @P5 BRA 0xd0 ;                                    /* 0x0000000000000000 */
        /*0060*/                   IADD3 R3, R3, 0x1, RZ ;                       /* 0x0000000000000000 */
        /*0070*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;  /* 0x0000000000000000 */
        /*0080*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;  /* 0x0000000000000000 */
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R0], R1 ;  /* 0x0000000000000000 */
        /*00a0*/              @!P0 BRA 0x90 ;                                    /* 0x0000000000000000 */
        /*00b0*/                   LDGSTS.E.BYPASS.128 [R11], desc[UR18][R4.64], P5 ;  /* 0x0000000000000000 */
        /*00c0*/               @P1 BRA.U UP0, 0x60 ;                             /* 0x0000000000000000 */
        /*00d0*/              @!P0 LDG.E R8, desc[UR18][R14.64] ;                /* 0x0000000000000000 */
        /*00e0*/                   LDG.E.STRONG.GPU R8, desc[UR18][R14.64] ;     /* 0x0000000000000000 */
        /*00f0*/                   STG.E.128 desc[UR18][R14.64], R8 ;            /* 0x0000000000000000 */
        /*0100*/                   EXIT ;                                        /* 0x0000000000000000 */
        /*0110*/                   BRA 0x110;                                    /* 0x0000000000000000 */
"""
# Two loops, the second stores: an elementwise kernel.
ACTIVATION = """
        /*0000*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E.U16 R5, desc[UR4][R2.64+0x2] ;
        /*0020*/                   FADD R4, R4, R5 ;
        /*0030*/                   FADD R4, R4, R5 ;
        /*0040*/                   FADD R4, R4, R5 ;
        /*0050*/                   FADD R4, R4, R5 ;
        /*0060*/               @P0 BRA 0x0 ;
        /*0070*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0080*/                   MUFU.EX2 R4, R4 ;
        /*0090*/                   MUFU.RCP R4, R4 ;
        /*00a0*/                   STG.E.128 desc[UR4][R6.64], R4 ;
        /*00b0*/               @P0 BRA 0x70 ;
        /*00c0*/                   EXIT ;
"""
ASSEMBLY = """
matmul:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	buffer_load_dwordx4 v[2:5], v1, s[4:7], 0 offen
	s_cbranch_scc1 .LBB0_3
; %bb.1:
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	v_mfma_f32_32x32x8_bf16 v[0:15], v[2:3], v[4:5], v[0:15]
	global_load_b128 v[2:5], v[6:7], off ; a comment
	global_load_ushort v2, v[6:7], off
	v_exp_f32_e32 v8, v8
	s_cbranch_scc1 .LBB0_2
.LBB0_3:                                ; %._crit_edge
	global_store_dwordx4 v[6:7], v[2:5], off
	s_endpgm
.Lfunc_end0:
	.size	matmul, .Lfunc_end0-matmul
"""


def kernel(**changes: Any) -> Kernel:
    loop = MainLoop(instructions=150, products=4, wide=12, narrow=0, early=(), late=0)
    label = "torch.bfloat16 P=1 r=16 p=0.0, h given"
    usual = Kernel("sm_90", "packed_lora_linear_fwd_kernel", label, registers=200, shared=50_000, blocks=1)
    loop_changes = {name: changes.pop(name) for name in list(changes) if name in MainLoop._fields}
    return usual._replace(tensor_cores="HGMMA", loop=loop._replace(**loop_changes))._replace(**changes)


def test_main_loop_of_a_product():
    code = parse_sass(PRODUCT)
    assert len(code) == 18
    assert machine_code.describe(code) == MainLoop(
        instructions=7,
        products=2,
        wide=1,
        narrow=0,
        early=("HGMMA.64x256x16.F32.BF16", "WARPGROUP.DEPBAR.LE"),
        late=1,  # the bias, and not the partial sum
    )


@pytest.mark.parametrize(
    ("opcode", "loaded"),
    [
        ("LDG.E", 4),
        ("LDG.E.U16", 2),
        ("LDG.E.64.CONSTANT", 8),
        ("LDGSTS.E", 4),
        ("LDGSTS.E.BYPASS.LTC128B.128", 16),
        ("UTMALDG.2D", machine_code.BULK),
        ("buffer_load_dwordx4", 16),
        ("global_load_b64", 8),
        ("buffer_load_ushort", 2),
        ("LDS.128", 0),
        ("LDGDEPBAR", 0),
        ("s_load_dwordx4", 0),
        ("STG.E.128", 0),
    ],
)
def test_bytes_that_a_load_takes(opcode, loaded):
    assert machine_code.Instruction(opcode, "").loads == loaded


def test_asynchronous_loads_of_4_bytes_are_narrow_beside_wide_ones_too():
    loop = machine_code.describe(parse_sass(PRODUCT.replace("BYPASS.128 [R11]", "LTC128B [R11]")))
    assert loop is not None
    assert (loop.wide, loop.narrow) == (0, 1)
    wide = "        /*00b4*/                   LDGSTS.E.128 [R11], desc[UR18][R4.64] ;\n        /*00c0*/"
    both = PRODUCT.replace("BYPASS.128 [R11]", "LTC128B [R11]").replace("        /*00c0*/", wide)
    loop = machine_code.describe(parse_sass(both))
    assert loop is not None
    assert (loop.wide, loop.narrow) == (1, 1)


def test_others_of_4_bytes_are_narrow_where_none_is_wider():
    statistics = ACTIVATION.replace("MUFU.EX2 R4, R4", "LDG.E R4, desc[UR4][R2.64]")  # a row's mean beside its tile
    loop = machine_code.describe(parse_sass(statistics.replace("@P0 BRA 0x0 ;", "NOP ;")))
    assert loop is not None
    assert (loop.wide, loop.narrow) == (1, 0)
    loop = machine_code.describe(parse_sass(ACTIVATION))  # the longest loop
    assert loop is not None
    assert (loop.wide, loop.narrow) == (0, 2)


def test_elementwise_kernels_by_the_loop_that_stores():
    code = parse_sass(ACTIVATION)
    blocks = {"BLOCK_M": 32, "BLOCK_K": 64}
    assert compiled.per_element("activation_fwd_kernel", code, blocks, 1024) == (2.5, 1.0)
    assert compiled.per_element("norm_fwd_kernel", code, {**blocks, "ROWS": 16}, 1024) == (5.0, 2.0)
    assert compiled.per_element("packed_lora_linear_fwd_kernel", code, blocks, 1024) is None


def test_a_kernel_without_a_loop_is_counted_whole():
    straight = parse_sass(ACTIVATION.replace("@P0 BRA 0x0 ;", "NOP ;").replace("@P0 BRA 0x70 ;", "NOP ;"))
    assert machine_code.describe(straight) is None
    each = compiled.per_element("activation_bwd_kernel", straight, {"BLOCK_K": 1024}, 1024)
    assert each is not None
    assert each == (11.0, 2.0)


def test_the_main_loop_is_one_that_loads_in_advance():
    """And not the longer one before it, which sums over the adapters."""
    masks = "        /*0032*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;\n" * 3
    masks = "".join(line.replace("0032", f"{0x32 + 2 * i:04x}") + "\n" for i, line in enumerate(masks.splitlines()))
    branch = "        /*003a*/               @P1 BRA 0x30 ;\n"
    code = parse_sass(PRODUCT.replace("        /*0040*/", masks + branch + "        /*0040*/"))
    loop = machine_code.describe(code)
    assert loop is not None
    assert (loop.products, loop.wide, loop.late) == (2, 1, 1)


def test_assembly_of_amd():
    code = parse_amdgcn(ASSEMBLY)
    loop = machine_code.describe(code)
    assert loop == MainLoop(instructions=5, products=1, wide=1, narrow=0, early=(), late=0)
    assert [i.opcode for i in code if i.is_special] == ["v_exp_f32_e32"]
    assert sum(i.stores for i in code) == 1


@pytest.mark.parametrize(
    ("chip", "registers", "shared", "warps", "blocks"),
    [
        ("90", 213, 156 * 1024, 8, 1),
        ("90", 126, 102 * 1024, 4, 2),  # by shared memory
        ("90", 229, 22 * 1024, 4, 2),  # by registers
        ("90", 16, 0, 4, 16),  # by warps
        ("89", 16, 0, 2, 24),  # by blocks
        ("gfx942", 132, 16384, 4, 3),
        ("gfx942", 132, 40000, 4, 1),  # by shared memory
        ("gfx1100", 250, 16384, 8, 3),
    ],
)
def test_blocks_that_a_multiprocessor_holds(chip, registers, shared, warps, blocks):
    assert BY_NAME[chip].blocks_of(registers, shared, warps) == blocks


def broken_rules(row: Kernel) -> list[str]:
    return [violation.rule for violation in checks.violations(row)]


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        ({}, []),
        ({"error": "CompilationError: no"}, ["compiles"]),
        ({"spilled": 8}, ["spills"]),
        ({"shared": 228 * 1024}, ["shared memory"]),
        ({"shared": 228 * 1024, "chip": "gfx942", "spilled": 4}, ["spills", "shared memory"]),
        ({"tensor_cores": ""}, ["tensor cores"]),
        ({"narrow": 6}, ["narrow loads"]),
        ({"early": ("HGMMA",)}, ["early product"]),
        ({"early": ("HGMMA",), "chip": "gfx942", "shared": 0}, []),
        ({"late": 1}, ["late loads"]),
        ({"late": 8, "label": "torch.bfloat16, residual torch.float32, 128x256x64"}, []),
        ({"late": 8, "label": "torch.bfloat16, residual torch.bfloat16, 128x256x64"}, ["late loads"]),
        ({"name": "packed_lora_linear_da_kernel", "blocks": 1}, ["blocks"]),
        ({"name": "packed_lora_linear_da_kernel", "blocks": 1, "chip": "sm_80"}, []),
        ({"name": "packed_lora_linear_da_kernel", "blocks": 2}, []),
        ({"name": "packed_lora_linear_da_kernel", "blocks": 1, "warps": 8}, []),
    ],
)
def test_rules(changes, rules):
    assert broken_rules(kernel(**changes)) == rules


def test_a_product_is_late_where_it_has_a_loop_alone():
    assert broken_rules(kernel(name="norm_fwd_kernel", products=0, late=4, blocks=4)) == []


def test_blocks_that_are_assumed_are_those_of_the_launchers():
    assert checks.BLOCKS_ASSUMED["packed_lora_linear_da_kernel"] == da.PROGRAMS // 132
    assert checks.BLOCKS_ASSUMED["norm_bwd_da_kernel"] == da.PROGRAMS // 132
    assert checks.BLOCKS_ASSUMED["activation_bwd_kernel"] == activation.SPLIT_PROGRAMS // 132
    assert da.WIDE_PROGRAMS // 132 == 1  # of eight warps


@pytest.mark.parametrize(
    ("figure", "budget", "now", "worse"),
    [
        ("registers", 200, 200, False),
        ("registers", 193, 200, False),  # the same eight
        ("registers", 200, 201, True),
        ("registers", 200, 100, False),
        ("loop", 100, 105, False),
        ("loop", 100, 106, True),
        ("instructions", 10.0, 10.4, False),
        ("instructions", 10.0, 10.6, True),
        ("special", 1.0, 1.03, True),
        ("shared", 1024, 1025, True),
        ("blocks", 2, 1, True),
        ("blocks", 1, 2, False),
        ("products", 4, 2, True),
        ("wide", 12, 11, True),
        ("narrow", 0, 1, True),
    ],
)
def test_what_is_worse(figure, budget, now, worse):
    assert budgets.is_worse(figure, budget, now) is worse


EXCEPTION = Except("late loads", "fwd *h given*", "the bias is read once, behind the loop", ("sm_90",))


def test_budgets_are_written_and_read(tmp_path):
    path = tmp_path / "budgets.toml"
    rows = [kernel(), kernel(chip="gfx942"), kernel(late=1, label="torch.bfloat16 P=3 r=16 p=0.25, h given")]
    budget = Budgets("3.8.0", budgets.held(rows), [EXCEPTION])
    budgets.save(budget, path)
    assert budgets.load(path) == budget
    assert sum("bfloat16" in line for line in path.read_text().splitlines()) == 3  # a line each
    assert budgets.compare(budgets.load(path).figures, budgets.held(rows)) == []


def test_figures_that_moved():
    before = budgets.held([kernel(), kernel(chip="sm_80")])
    (worse, better) = budgets.compare(before, budgets.held([kernel(registers=240, wide=13)]))
    assert (worse.figure, worse.is_worse, better.figure, better.is_worse) == ("registers", True, "wide", False)
    assert str(worse).endswith("registers         200 -> 240      worse")


def test_a_kernel_without_a_budget_and_a_budget_without_a_kernel():
    before, now = (budgets.held([kernel(label=f"torch.bfloat16 P=1 r=16 p=0.0, {h}")]) for h in ("a", "b"))
    lost, found = budgets.compare(before, now)
    assert lost.is_worse
    assert "was not compiled" in str(lost)
    assert found.is_worse
    assert "has no budget" in str(found)


HELD, SAME, OTHER = (f"torch.bfloat16 to torch.bfloat16, K={K}, P=3 r=16 p=0.0, h" for K in (768, 512, 137))


@pytest.fixture
def compiler(monkeypatch) -> Callable[..., list[Kernel]]:
    """`compile_for` of these labels, each a launch of two kernels, with Triton's compiler left out."""
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))  # which it takes away
    monkeypatch.setattr(triton.runtime.driver, "_active", None)
    monkeypatch.setattr(JITFunction, "run", lambda self, label, **options: self.kernels[label == OTHER])
    found = lambda chip, label, kernel, options: Kernel(chip.name, kernel["name"], label)
    monkeypatch.setattr(compiled, "inspect", found)
    names = ("norm_fwd_kernel", "norm_bwd_kernel")
    functions = [SimpleNamespace(__name__=name, kernels=[{"name": name}, {"name": name}]) for name in names]

    def compile_labels(*labels: str, **options: Any) -> list[Kernel]:
        def launch(label: str) -> Launch:
            return Launch(label, lambda: [JITFunction.run(f, label, grid=(1,), warmup=False) for f in functions])  # type: ignore[arg-type]

        monkeypatch.setattr(compiled, "launches", lambda chip: map(launch, labels))
        return compiled.compile_for("90", **options)

    return compile_labels


def test_a_kernel_of_several_launches_has_the_label_that_the_budgets_hold(compiler):
    for labels in ((HELD, SAME, OTHER), (SAME, HELD, OTHER), (SAME, OTHER, HELD)):
        rows = compiler(*labels)
        assert sorted(row.label for row in rows) == sorted(2 * [HELD, OTHER])
        assert budgets.held(rows) == budgets.held(compiler(*labels, held_alone=True))
    assert {row.label for row in compiler(SAME, OTHER)} == {SAME, OTHER}


def test_only_some_kernels(compiler, monkeypatch, capsys):
    (row,) = compiler(HELD, OTHER, only="norm_fwd *K=768*")
    assert row.key == "norm_fwd bfloat16 to bfloat16, K=768, P=3 r=16 p=0.0, h"
    all_held = budgets.held(compiler(HELD, OTHER))
    all_held["sm_90"] |= {f"{row.key} (2)": all_held["sm_90"][row.key]}
    matching = program.matching(Budgets("3.8.0", all_held, [EXCEPTION]), "norm_fwd *, h")
    assert list(matching.figures["sm_90"]) == [row.key, f"{row.key} (2)"]
    assert matching.exceptions == [EXCEPTION]
    monkeypatch.setattr(sys, "argv", ["aot", "--only", "norm*", "--update"])
    with pytest.raises(SystemExit):
        program.main()
    assert "--update with --only norm*, expected one of them" in capsys.readouterr().err


def judged(rows: list[Kernel], budget: Budgets, triton: str = "3.8.0", complete: bool = True) -> list[str]:
    return program.judge(rows, budget, triton, complete=complete)


def test_what_fails(capsys):
    late = kernel(late=1)
    budget = Budgets("3.8.0", budgets.held([late]), [EXCEPTION])
    assert judged([late], budget) == []
    assert not capsys.readouterr().out
    (failure,) = judged([late._replace(registers=210)], budget)
    assert "registers" in failure
    assert "200 -> 210" in capsys.readouterr().out
    assert judged([late._replace(registers=190)], budget) == []  # printed, and no failure
    assert "better" in capsys.readouterr().out
    (failure,) = judged([kernel()], budget)
    assert failure == "exception without need: late loads, fwd *h given*"
    assert judged([kernel()], budget, complete=False) == []
    (failure,) = judged([late], budget._replace(exceptions=[]))
    assert "late loads: 1 global loads" in failure


def test_another_triton_is_asked_for_the_rules_alone(capsys):
    budget = Budgets("3.8.0", budgets.held([kernel()]), [])
    assert judged([kernel(registers=250)], budget, "3.6.0") == []
    assert "The budgets are for Triton 3.8.0, this is 3.6.0" in capsys.readouterr().out
    (failure,) = judged([kernel(spilled=4)], budget, "3.6.0")
    assert "spills: 4 bytes" in failure


def test_update_keeps_other_chips_and_needed_exceptions(tmp_path, monkeypatch):
    path = tmp_path / "budgets.toml"
    monkeypatch.setattr(budgets, "save", lambda budget, save=budgets.save: save(budget, path))
    spare = EXCEPTION._replace(rule="narrow loads")
    budget = Budgets("3.7.0", budgets.held([kernel(chip="sm_80"), kernel()]), [EXCEPTION, spare])
    rows = [kernel(late=1, registers=180)]
    assert program.update(rows, budget, "3.8.0", complete=False) == []
    written = budgets.load(path)
    assert written.triton == "3.8.0"
    assert sorted(written.figures) == ["sm_80", "sm_90"]
    assert written.exceptions == [EXCEPTION, spare] or written.exceptions == [spare, EXCEPTION]
    assert judged(rows, written, complete=False) == []
    program.update(rows, budget, "3.8.0", complete=True)
    assert budgets.load(path).exceptions == [EXCEPTION]


def test_the_committed_budgets_can_be_read():
    budget = budgets.load()
    names = {*budgets.LOWER_IS_BETTER, *budgets.HIGHER_IS_BETTER}
    assert set(budget.figures) <= {chip.name for chip in BY_NAME.values()}
    assert all(set(line) <= names for lines in budget.figures.values() for line in lines.values())
    assert all(exception.reason for exception in budget.exceptions)
