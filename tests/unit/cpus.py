"""What the tests of pyhv.cpu share: real processors' dumps, where they are at hand, and random tables."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import strategies as st

from pyhv.cpu import dumps
from pyhv.cpu.host import HostDescription, as_kvm_host
from pyhv.cpu.table import CpuidTable, Registers

#: Raw dumps of real processors. They are no part of the project: a checkout alone does not have them.
PROCESSORS = Path(__file__).resolve().parents[2].parent / "shared" / "processors"

needs_processors = pytest.mark.skipif(
    not PROCESSORS.is_dir(), reason="the dumps of real processors (../shared/processors) are not here"
)

INTEL = (0x756E6547, 0x6C65746E, 0x49656E69)
AMD = (0x68747541, 0x444D4163, 0x69746E65)
HYGON = (0x6F677948, 0x656E6975, 0x6E65476E)
ZHAOXIN = (0x68532020, 0x20206961, 0x68676E61)
NOBODY = (0x76687970, 0x73746E65, 0x766E6920)
VENDORS = (INTEL, AMD, HYGON, ZHAOXIN, NOBODY)


@cache
def processors() -> dict[str, dumps.Dump]:
    """Name -> dump of every real processor."""
    paths = sorted(PROCESSORS.glob("*.cpuid"))
    return {path.stem: dumps.read(path.read_text(encoding="ascii"), path.name) for path in paths}


@cache
def hosts() -> dict[str, HostDescription]:
    """Name -> the KVM host that each of them makes."""
    return {name: as_kvm_host(dump.table, name=name) for name, dump in processors().items()}


words = st.integers(0, 0xFFFFFFFF)
registers = st.builds(Registers, words, words, words, words)

#: Leaves of every range, present and beyond, with those that matter more often than the rest.
leaves = st.one_of(
    st.sampled_from([0, 1, 2, 4, 7, 0xB, 0xD, 0x14, 0x1D, 0x1E, 0x1F, 0x24, 0x40000000, 0x40000001, 0x40000100]),
    st.sampled_from([0x80000000, 0x80000001, 0x80000008, 0x8000001D, 0x8000001E, 0x80000021, 0xC0000000, 0xC0000001]),
    st.integers(0, 0x40),
    st.integers(0x80000000, 0x80000030),
    words,
)
subleaves = st.one_of(st.integers(0, 20), st.sampled_from([62, 63, 64, 255, 256, 0xFFFFFFFF]), words)


@st.composite
def tables(draw: st.DrawFn) -> CpuidTable:
    """Any table that CpuidTable takes, most of them nonsense; the highest leaves make sense more often than not."""
    indexed = draw(st.sets(leaves, max_size=8)) | {4, 7, 0xB, 0xD, 0x1F}
    keys = draw(st.lists(st.tuples(leaves, subleaves), max_size=30))
    entries = {(leaf, subleaf if leaf in indexed else 0): draw(registers) for leaf, subleaf in keys}
    ebx, ecx, edx = draw(st.sampled_from(VENDORS))
    entries[0, 0] = Registers(draw(st.one_of(st.integers(0, 0x24), words)), ebx, ecx, edx)
    for first, most in ((0x80000000, 0x80000024), (0x40000000, 0x40000002), (0xC0000000, 0xC0000004)):
        if (first, 0) in entries and draw(st.booleans()):
            entries[first, 0] = entries[first, 0]._replace(eax=draw(st.integers(first, most)))
    return CpuidTable(entries, indexed)
