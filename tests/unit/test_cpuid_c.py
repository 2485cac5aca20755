"""csrc/cpuid.c against an independent model of CPUID in Python, and against what real processors answered.

tests/c/test_cpuid.c has the table of single cases and runs under the sanitizers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyhv._native import ffi, lib, new_error
from pyhv.cpu.features import BY_NAME
from pyhv.cpu.table import CpuidTable, Registers

from . import cpus

Row = tuple[int, int, int, int, int, int, int]


class Dynamic(NamedTuple):
    """struct pyhv_cpuid_dynamic."""

    cr4: int = 0
    xcr0: int = 1
    xss: int = 0
    apic_base: int = 0


class Engine:
    """The two functions of the C file, called as Python calls functions."""

    def table(self, rows: list[Row]) -> Any:
        """A struct pyhv_cpuid_table. Raises ValueError with the engine's words."""
        table, error = ffi.new("struct pyhv_cpuid_table *"), new_error()
        if lib.pyhv_cpuid_table_init(table, rows, len(rows), error):
            raise ValueError(ffi.string(error.detail).decode())
        return table

    def answer(self, table: Any, dynamic: Dynamic, leaf: int, subleaf: int) -> Registers:
        out, state = ffi.new("uint32_t[4]"), ffi.new("struct pyhv_cpuid_dynamic *", dynamic._asdict())
        lib.pyhv_cpuid_answer(table, state, leaf, subleaf, out)
        return Registers(*out)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine()


# ------------------------------------------------------------------------------------------------------ the model


def model(rows: list[Row], dynamic: Dynamic, leaf: int, subleaf: int) -> Registers:
    """What CPUID answers, written from the manuals and KVM's documented ranges, with dictionaries and no search."""
    answers: dict[tuple[int, int | None], Registers] = {}
    for row_leaf, row_subleaf, indexed, *values in rows:
        answers[row_leaf, row_subleaf if indexed else None] = Registers(*values)

    def stored(leaf: int, subleaf: int) -> Registers | None:
        return answers.get((leaf, None)) or answers.get((leaf, subleaf))

    def highest(first: int) -> int:
        found = stored(first, 0)
        return -1 if found is None else found.eax

    basic = stored(0, 0)
    vendor = b"" if basic is None else b"".join(n.to_bytes(4, "little") for n in (basic.ebx, basic.edx, basic.ecx))
    found = stored(leaf, subleaf)
    if found is None and vendor not in (b"AuthenticAMD", b"HygonGenuine"):
        if leaf < 0x40000000 or 0x50000000 <= leaf < 0x80000000:
            beyond = leaf > highest(0)
        elif leaf < 0x50000000:
            beyond = leaf > highest(leaf // 0x100 * 0x100)
        elif leaf < 0xC0000000:
            beyond = leaf > highest(0x80000000)
        else:
            beyond = leaf > highest(0xC0000000)
        if beyond:
            leaf = highest(0)
            found = stored(leaf, subleaf)

    if found is None:
        level = stored(leaf, 1)
        if leaf in (0xB, 0x1F) and level is not None:
            return Registers(0, 0, subleaf % 256, level.edx)
        return Registers(0, 0, 0, 0)

    eax, ebx, ecx, edx = found
    if leaf == 1:
        for name, on in (("osxsave", dynamic.cr4 >> 18 & 1 and ecx & BY_NAME["xsave"].mask),):
            ecx = ecx | BY_NAME[name].mask if on else ecx & ~BY_NAME[name].mask
        apic = BY_NAME["apic"].mask
        edx = edx | apic if dynamic.apic_base & 0x800 else edx & ~apic
    if leaf == 7 and (subleaf == 0 or (7, None) in answers):
        ospke = BY_NAME["ospke"].mask
        ecx = ecx | ospke if dynamic.cr4 >> 22 & 1 and ecx & BY_NAME["pku"].mask else ecx & ~ospke
    if leaf == 0xD and (0xD, None) not in answers:
        components = [n for n in range(2, 64) if (0xD, n) in answers]
        if subleaf == 0:
            ends = [answers[0xD, n].eax + answers[0xD, n].ebx for n in components if dynamic.xcr0 >> n & 1]
            ebx = max([576, *(end % 2**32 for end in ends)])
        elif subleaf == 1 and eax & (BY_NAME["xsavec"].mask | BY_NAME["xsaves"].mask):
            ebx = 576
            for n in components:
                if (dynamic.xcr0 | dynamic.xss) >> n & 1:
                    start = -(-ebx // 64) * 64 if answers[0xD, n].ecx & 2 else ebx
                    ebx = max(ebx, (start + answers[0xD, n].eax) % 2**32)
    elif leaf == 0xD:
        ebx = 576
    return Registers(eax, ebx, ecx, edx)


DYNAMICS = st.builds(
    Dynamic,
    cr4=st.sampled_from([0, 1 << 18, 1 << 22, 1 << 18 | 1 << 22, 0xFFFFFFFF]),
    xcr0=st.one_of(st.sampled_from([1, 3, 7, 0xE7, 0x2FF]), st.integers(0, 2**64 - 1)),
    xss=st.one_of(st.sampled_from([0, 0x1800, 0x18900]), st.integers(0, 2**64 - 1)),
    apic_base=st.sampled_from([0, 0x800, 0xFEE00000, 0xFEE00900]),
)

#: Sizes and offsets as small as real ones: sums that do not fit 32 bits are no processor's.
SIZES = st.integers(0, 0x4000)


@st.composite
def xsave_tables(draw: st.DrawFn) -> CpuidTable:
    """A random table with the leaves that follow the vCPU's state, of which leaf 0xD could be a processor's."""
    table = draw(cpus.tables())
    rows = draw(st.dictionaries(st.integers(2, 66), st.tuples(SIZES, SIZES, st.integers(0, 7)), max_size=12))
    changes = {key: None for key in table.entries if key[0] == 0xD}
    leaf = {(0xD, n): Registers(*row, 0) for n, row in rows.items()}
    leaf[0xD, 0] = leaf[0xD, 1] = draw(cpus.registers)
    others = {key: draw(cpus.registers) for key in ((1, 0), (7, 0), (7, 1))}
    return table.replace({**changes, **leaf, **others})


@given(
    st.one_of(cpus.tables(), xsave_tables()),
    st.lists(st.tuples(cpus.leaves, cpus.subleaves), max_size=12),
    st.lists(DYNAMICS, min_size=2, max_size=2),
)
@settings(deadline=None)
def test_engine_answers_as_the_model(
    engine: Engine, table: CpuidTable, questions: list[tuple[int, int]], dynamics: list[Dynamic]
) -> None:
    rows = table.as_entries()
    made = engine.table(rows)
    # Ask for what is there and around it, too, and first for what follows the vCPU's state.
    near = [(leaf + d, subleaf) for leaf, subleaf in table.entries for d in (-1, 0, 1)]
    moving = [(1, 0), (7, 0), (7, 1), (0xD, 0), (0xD, 1)]
    for (leaf, subleaf), dynamic in itertools.product([*moving, *questions, *near], dynamics):
        leaf &= 0xFFFFFFFF
        expected = model(rows, dynamic, leaf, subleaf)
        assert engine.answer(made, dynamic, leaf, subleaf) == expected, (hex(leaf), hex(subleaf), dynamic)


@given(cpus.tables(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_order_of_entries_does_not_matter(engine: Engine, table: CpuidTable, random: st.DataObject) -> None:
    rows = table.as_entries()
    made = engine.table(rows)
    random.shuffle(rows)  # type: ignore[attr-defined]
    assert bytes(ffi.buffer(engine.table(rows))) == bytes(ffi.buffer(made))


@given(st.lists(st.tuples(cpus.leaves, st.integers(0, 3), st.integers(0, 2), *[cpus.words] * 4), max_size=20))
@example([])
@settings(deadline=None)
def test_engine_takes_the_tables_that_python_takes(engine: Engine, rows: list[Row]) -> None:
    """The same entries make a table for both, or for neither."""

    def accepted(make: Callable[[list[Row]], object]) -> bool:
        try:
            make(rows)
        except ValueError:
            return False
        except Exception as error:
            assert type(error).__name__ == "BadInput", error
            return False
        return True

    assert accepted(engine.table) == accepted(CpuidTable.from_entries)


def test_the_comparison_can_fail(engine: Engine) -> None:
    """A model of AMD's habits is not one of Intel's: leaf 2 is above the maximum."""
    intel: list[Row] = [(0, 0, 0, 1, *cpus.INTEL), (1, 0, 0, 1, 2, 3, 4)]
    amd: list[Row] = [(0, 0, 0, 1, *cpus.AMD), (1, 0, 0, 1, 2, 3, 4)]
    assert engine.answer(engine.table(intel), Dynamic(), 2, 0) != model(amd, Dynamic(), 2, 0)


@cpus.needs_processors
def test_real_processors_answered_the_same_beyond_their_highest_leaves(engine: Engine) -> None:
    compared = 0
    for name, dump in cpus.processors().items():
        table = engine.table(dump.table.as_entries())
        for (leaf, subleaf), registers in dump.out_of_range.items():
            assert engine.answer(table, Dynamic(), leaf, subleaf) == registers, (name, hex(leaf))
            compared += 1
    assert compared > 80  # Nehalem and Westmere alone have 43 each
    # What is in range comes back as it was put in, but for the dynamic bits.
    for name, dump in cpus.processors().items():
        table = engine.table(dump.table.as_entries())
        for (leaf, subleaf), registers in dump.table.entries.items():
            if leaf not in (1, 7, 0xD):
                assert engine.answer(table, Dynamic(), leaf, subleaf) == registers, (name, hex(leaf))


@cpus.needs_processors
def test_xsave_sizes_of_real_processors(engine: Engine) -> None:
    """Leaf 0xD gives in ECX what EBX becomes with every component enabled."""
    compared = 0
    for name, dump in cpus.processors().items():
        areas = dump.table.xsave_areas()
        described = {0, 1, *(n for n, area in areas.items() if not area.supervisor)}
        if {n for n in range(64) if dump.table.xcr0_mask >> n & 1} != described:
            continue  # the dump leaves components out
        table = engine.table(dump.table.as_entries())
        answer = engine.answer(table, Dynamic(xcr0=dump.table.xcr0_mask), 0xD, 0)
        assert answer.ebx == answer.ecx, name
        assert engine.answer(table, Dynamic(xcr0=1), 0xD, 0).ebx == 576, name
        compared += 1
    assert compared >= 14
