"""CPUID tables: what they hold, what they say, what they refuse, and that text forms lose nothing."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhv.cpu.feature_types import Word
from pyhv.cpu.features import BY_NAME, WORDS
from pyhv.cpu.table import CpuidTable, Registers, XsaveArea, xsave_leaf, xsave_size
from pyhv.errors import BadInput

from . import cpus

HEAD = {(0, 0): Registers(0xD, *cpus.INTEL)}


def table(**registers: Registers) -> CpuidTable:
    """A table of leaf 0 and entries named like l1 or l7_1 (hexadecimal)."""
    entries = dict(HEAD)
    for name, values in registers.items():
        leaf, _, subleaf = name[1:].partition("_")
        entries[int(leaf, 16), int(subleaf or "0", 16)] = values
    return CpuidTable(entries)


def test_get_has_no_hardware_semantics() -> None:
    made = table(l1=Registers(1, 2, 3, 4), l4_1=Registers(5, 6, 7, 8))
    assert made.get(1) == (1, 2, 3, 4)
    assert made.get(4, 1) == (5, 6, 7, 8)
    assert made.get(4) == made.get(1, 1) == made.get(0x1234) == (0, 0, 0, 0)
    assert made.word(Word(1, 0, "ecx")) == 3
    assert made.indexed == {4}
    assert list(made.entries) == sorted(made.entries)


def test_is_immutable() -> None:
    made = table()
    with pytest.raises(TypeError):
        made.entries[1, 0] = Registers(0, 0, 0, 0)  # type: ignore[index]
    with pytest.raises(AttributeError):
        made.colour = "blue"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("entries", "indexed", "problem"),
    [
        ({(1, 0): Registers(0, 0, 0, 0)}, None, "leaf 0 is missing"),
        ({**HEAD, (1, 0): Registers(0, 0, 1 << 32, 0)}, None, "leaf 0x1 subleaf 0x0: a number does not fit 32 bits"),
        ({**HEAD, (1, 0): Registers(0, -1, 0, 0)}, None, "does not fit 32 bits"),
        ({**HEAD, (1 << 32, 0): Registers(0, 0, 0, 0)}, None, "does not fit 32 bits"),
        ({**HEAD, (4, 1): Registers(0, 0, 0, 0)}, [], "leaf 0x4 subleaf 0x1: a subleaf of a leaf that ignores ECX"),
        ({(n, 0): Registers(0, 0, 0, 0) for n in range(257)}, None, "257 entries, at most 256 are possible"),
    ],
)
def test_refuses(entries: dict[tuple[int, int], Registers], indexed: list[int] | None, problem: str) -> None:
    with pytest.raises(BadInput, match=problem):
        CpuidTable(entries, indexed)


@pytest.mark.parametrize(
    ("registers", "text", "vendor", "lineage"),
    [
        (cpus.INTEL, "GenuineIntel", "intel", "intel"),
        (cpus.AMD, "AuthenticAMD", "amd", "amd"),
        (cpus.HYGON, "HygonGenuine", "HygonGenuine", "amd"),
        (cpus.ZHAOXIN, "  Shanghai  ", "  Shanghai  ", "intel"),
        ((0x0A0D0741, 0xFFFFFFFF, 0x00000000), "A???\0\0\0\0????", "A???\0\0\0\0????", ""),
    ],
)
def test_vendors(registers: tuple[int, int, int], text: str, vendor: str, lineage: str) -> None:
    made = CpuidTable({(0, 0): Registers(0, *registers)})
    assert (made.vendor_string, made.vendor, made.lineage) == (text, vendor, lineage)


def test_what_a_table_says() -> None:
    name = b"  Two  words\0junk".ljust(48, b"\xff")
    numbers = [int.from_bytes(name[i : i + 4], "little") for i in range(0, 48, 4)]
    made = table(
        l1=Registers(0x000B0671, 0x00800800, 0, 0),
        l80000000=Registers(0x80000008, 0, 0, 0),
        l80000002=Registers(*numbers[:4]),
        l80000003=Registers(*numbers[4:8]),
        l80000004=Registers(*numbers[8:]),
        l80000008=Registers(0x3027, 0, 0, 0),
    )
    assert made.signature == (6, 0xB7, 1)
    assert made.clflush_bytes == 64
    assert (made.physical_bits, made.linear_bits) == (39, 48)
    assert made.brand == "Two words"
    assert (made.max_basic, made.max_extended) == (0xD, 0x80000008)
    assert table(l1=Registers(0x00A60F12, 0, 0, 0)).signature == (0x19, 0x61, 2)
    assert table(l1=Registers(0x0000_0F64, 0, 0, 0)).signature == (15, 6, 4)
    # Not above the highest leaf.
    beyond = table(l80000000=Registers(0x80000007, 0, 0, 0), l80000008=Registers(0x3027, 0, 0, 0))
    assert (beyond.physical_bits, beyond.linear_bits) == (36, 48)
    assert (table().physical_bits, table().linear_bits, table().max_extended, table().brand) == (36, 48, 0, "")


def test_features_are_the_vendors_own() -> None:
    svm, vmx, pni = BY_NAME["svm"], BY_NAME["vmx"], BY_NAME["pni"]
    entries = {
        (1, 0): Registers(0, 0, pni.mask | vmx.mask, 0),
        (0x80000001, 0): Registers(0, 0, svm.mask, 0),
    }
    intel = CpuidTable({(0, 0): Registers(1, *cpus.INTEL), **entries})
    amd = CpuidTable({(0, 0): Registers(1, *cpus.AMD), **entries})
    nobody = CpuidTable({(0, 0): Registers(1, *cpus.NOBODY), **entries})
    assert intel.features() == {"pni", "vmx"}
    assert amd.features() == {"pni", "svm"}
    assert nobody.features() == {"pni"}
    assert intel.has(vmx) and not amd.has(vmx) and not intel.has(svm)


@given(cpus.tables())
def test_features_agrees_with_has(made: CpuidTable) -> None:
    assert made.features() == {f.name for members in WORDS.values() for f in members if made.has(f)}


# Alder Lake's leaf 0xD, its AVX-512 switched on: a processor with user and supervisor components, one of them aligned.
ALDER_LAKE = {
    2: XsaveArea(0x100, 0x240, 0),
    5: XsaveArea(0x40, 0x440, 0),
    6: XsaveArea(0x200, 0x480, 0),
    7: XsaveArea(0x400, 0x680, 0),
    9: XsaveArea(8, 0xA80, 0),
    11: XsaveArea(0x10, 0, 1),
    15: XsaveArea(0x328, 0, 3),
}


def test_xsave_sizes() -> None:
    assert xsave_size({}) == xsave_size({}, True) == 576
    user = {n: area for n, area in ALDER_LAKE.items() if not area.supervisor}
    assert xsave_size(user) == 0xA88
    assert xsave_size({9: ALDER_LAKE[9]}) == 0xA88
    assert xsave_size({2: ALDER_LAKE[2], 9: ALDER_LAKE[9]}, True) == 576 + 256 + 8
    # 0x240 + 0x100 + 0x40 + 0x200 + 0x400 + 8 + 0x10 = 0x998, aligned 0x9C0, + 0x328
    assert xsave_size(ALDER_LAKE, True) == 0x9C0 + 0x328


def test_xsave_leaf_is_read_as_it_is_made() -> None:
    made = CpuidTable({**HEAD, **xsave_leaf(ALDER_LAKE, 0xF, True)})
    assert made.get(0xD) == (0x2E7, 0xA88, 0xA88, 0)
    assert made.get(0xD, 1) == (0xF, 0x9C0 + 0x328, 0x8800, 0)
    assert made.xsave_areas() == ALDER_LAKE
    assert (made.xcr0_mask, made.xss_mask) == (0x2E7, 0x8800)
    high = {62: XsaveArea(0x80, 0x340, 0)}  # AMD's LWP: in EDX
    made = CpuidTable({**HEAD, **xsave_leaf(high, 0, False)})
    assert made.get(0xD) == (3, 0x3C0, 0x3C0, 1 << 30)
    assert made.get(0xD, 1) == (0, 0, 0, 0)
    assert made.xsave_areas() == high


def test_a_component_without_a_size_does_not_exist() -> None:
    made = table(ld=Registers(0xE7, 0, 0, 0), ld_2=Registers(256, 576, 0, 0), ld_7=Registers(0, 0, 0, 0))
    assert set(made.xsave_areas()) == {2}


def test_replace() -> None:
    made = table(l1=Registers(1, 0, 0, 0), l4_0=Registers(2, 0, 0, 0))
    changed = made.replace({(1, 0): None, (4, 1): Registers(3, 0, 0, 0), (0xB, 0): Registers(4, 0, 0, 0)})
    assert set(changed.entries) == {(0, 0), (4, 0), (4, 1), (0xB, 0)}
    assert changed.indexed == {4, 0xB}
    assert made.get(1).eax == 1
    with pytest.raises(BadInput, match="leaf 0 is missing"):
        made.replace({(0, 0): None})
    # A leaf that ignores ECX here stays so, whatever the manuals say of it.
    plain = CpuidTable.from_entries([(0, 0, 0, 0, 0, 0, 0), (0xB, 0, 0, 1, 0, 0, 0)])
    assert plain.replace({(0xB, 0): Registers(2, 0, 0, 0)}).indexed == frozenset()


@given(cpus.tables())
def test_every_form_loses_nothing(made: CpuidTable) -> None:
    assert CpuidTable.from_entries(made.as_entries()) == made
    assert CpuidTable.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert hash(CpuidTable.from_entries(reversed(made.as_entries()))) == hash(made)


def test_indexed_is_part_of_a_table() -> None:
    plain = CpuidTable.from_entries([(0, 0, 0, 0, 0, 0, 0), (0xB, 0, 0, 1, 0, 0, 0)])
    indexed = CpuidTable.from_entries([(0, 0, 0, 0, 0, 0, 0), (0xB, 0, 1, 1, 0, 0, 0)])
    assert plain != indexed
    assert plain.to_json() != indexed.to_json()


def test_from_entries_refuses() -> None:
    with pytest.raises(BadInput, match="leaf 0x4 subleaf 0x1 is there twice"):
        CpuidTable.from_entries([(0, 0, 0, 0, 0, 0, 0), (4, 1, 1, 0, 0, 0, 0), (4, 1, 1, 0, 0, 0, 0)])
    with pytest.raises(BadInput, match="leaf 0x4 both ignores and obeys ECX"):
        CpuidTable.from_entries([(0, 0, 0, 0, 0, 0, 0), (4, 0, 0, 0, 0, 0, 0), (4, 1, 1, 0, 0, 0, 0)])


def test_cpuid_r_is_exactly_what_the_tool_prints() -> None:
    made = table(l4_a=Registers(0x1C004121, 0x01C0003F, 0x3F, 0))
    assert made.to_cpuid_r() == (
        "CPU 0:\n"
        "   0x00000000 0x00: eax=0x0000000d ebx=0x756e6547 ecx=0x6c65746e edx=0x49656e69\n"
        "   0x00000004 0x0a: eax=0x1c004121 ebx=0x01c0003f ecx=0x0000003f edx=0x00000000\n"
    )


GOOD = table(l1=Registers(1, 2, 3, 4)).to_json()


def spoilt(**changes: object) -> dict[str, object]:
    rows = [dict(row) for row in GOOD["entries"]]
    for field, value in changes.items():
        if value is None:
            del rows[1][field]
        else:
            rows[1][field] = value
    return {**GOOD, "entries": rows}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "no CPUID table"),
        ([], "no CPUID table"),
        ({}, "no CPUID table"),
        ({**GOOD, "format": "pyhv-cpuid/2"}, 'no CPUID table: "format" must be "pyhv-cpuid/1"'),
        ({**GOOD, "colour": 1}, 'unknown field "colour"'),
        ({"format": "pyhv-cpuid/1"}, '"entries" must be a list'),
        ({**GOOD, "entries": [1]}, r"entries\[0\] must be an object"),
        ({**GOOD, "entries": [{}] * 257}, '"entries" has 257 entries, at most 256'),
        ({**GOOD, "entries": []}, "leaf 0 is missing"),
        (spoilt(eax=1), r"entries\[1\].eax must be a hexadecimal number"),
        (spoilt(eax="0x"), r"entries\[1\].eax"),
        (spoilt(eax="0x123456789"), r"entries\[1\].eax .* at most 8 digits"),
        (spoilt(eax="0x-1"), r"entries\[1\].eax"),
        (spoilt(eax="0x1_0"), r"entries\[1\].eax"),
        (spoilt(eax="0x\N{FULLWIDTH DIGIT ONE}"), r"entries\[1\].eax"),
        (spoilt(edx=None), r"entries\[1\].edx"),
        (spoilt(leaf=None), r"entries\[1\].leaf"),
        (spoilt(leaf="0x0"), "leaf 0x0 subleaf 0x0 is there twice"),
        (spoilt(subleaf=True), r"entries\[1\].subleaf must be a number of 32 bits"),
        (spoilt(subleaf=-1), r"entries\[1\].subleaf"),
        (spoilt(subleaf=1 << 32), r"entries\[1\].subleaf"),
        (spoilt(subleaf="0"), r"entries\[1\].subleaf"),
        (spoilt(rax="0x1"), r'entries\[1\]: unknown field "rax"'),
    ],
)
def test_json_is_not_trusted(value: object, problem: str) -> None:
    with pytest.raises(BadInput, match=problem) as caught:
        CpuidTable.from_json(value, "a.json")
    assert caught.value.subject == "a.json"


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=4), st.sampled_from(["0x0", "0xffffffff"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["leaf", "subleaf", "eax", "ebx", "ecx", "edx", "x"]), inner, max_size=6),
    ),
    max_leaves=12,
)


@given(st.lists(json_values, max_size=4))
def test_json_of_any_shape_is_a_table_or_bad_input(rows: list[object]) -> None:
    with contextlib.suppress(BadInput):
        CpuidTable.from_json({"format": "pyhv-cpuid/1", "entries": rows})
