"""The MSRs that travel, those that do not, and what a state may hold."""

from __future__ import annotations

import itertools

import pytest

from pyhv.cpu import arch_capabilities, compare, msrs
from pyhv.cpu.host import HostDescription
from pyhv.cpu.table import CpuidTable

# What KVM lists on some processor or other: msrs_to_save and emulated_msrs of Linux 6.18, arch/x86/kvm/x86.c.
LINUX = {
    *(0x174, 0x175, 0x176, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000102, 0xC0000103, 0x10, 0x277),
    *(0xC0010117, 0x3A, 0xD90, 0x48, 0x122, 0x560, 0x561, 0x570, 0x571, 0x572, *range(0x580, 0x588), 0xE1, 0x1C4),
    *(0x1C5, 0xDA0, 0x6A0, 0x6A2, *range(0x6A4, 0x6A9)),
    *(0x309, 0x30A, 0x30B, 0x38D, 0x38E, 0x38F, 0x3F1, 0x3F2, 0x600, *range(0xC1, 0xC9), *range(0x186, 0x18E)),
    *(*range(0xC0010000, 0xC0010008), *range(0xC0010200, 0xC001020C), *range(0xC0000300, 0xC0000304)),
    *(0x11, 0x12, *range(0x4B564D00, 0x4B564D08), 0x40000000, 0x40000105, 0x400000FF, 0x40000118, 0x3B, 0x6E0, 0x10A),
    *(0x345, 0x1A0, 0x17A, 0x17B, 0x4D0, 0x9E, 0x34, 0xCE, 0x140, 0xC001011F, 0xC0000104, 0x1FC, 0x8B, 0xC0010015),
    *(0x480, 0x485, 0x486, 0x488, 0x48A, 0x48B, 0x48C, 0x48D, 0x48E, 0x48F, 0x490, 0x491, 0xC0011029),
}


def table(*entries: tuple[int, ...]) -> CpuidTable:
    return CpuidTable.from_entries(entries)


AMD = table((0, 0, 0, 1, 0x68747541, 0x444D4163, 0x69746E65), (1, 0, 0, 0, 0, 0, 0))
INTEL = table((0, 0, 0, 1, 0x756E6547, 0x6C65746E, 0x49656E69), (1, 0, 0, 0, 0, 0, 0))


def test_all_that_linux_lists_is_in_one_of_the_lists() -> None:
    assert [hex(n) for n in sorted(LINUX) if n not in msrs.BY_NUMBER and not msrs.why_not(n)] == []


def test_no_msr_is_in_both_or_twice() -> None:
    assert len(msrs.BY_NUMBER) == len(msrs.MSRS)
    assert [msr for msr in msrs.MSRS if msrs.why_not(msr.number)] == []
    places = [(e.first, e.last) for e in msrs.EXCEPTIONS]
    assert all(first <= last for first, last in places)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(places))


def test_what_a_table_gives() -> None:
    for_amd, for_intel = set(msrs.granted(AMD)), set(msrs.granted(INTEL))
    # Debug control (0x1D9) is not in KVM's list, and a guest can write it.
    assert {0x140, 0x1D9, 0x1FC, 0x400, 0x47F, 0xC0010015} <= for_amd & for_intel
    assert for_amd - for_intel == {0xC0010114, 0xC0010117, 0xC0011029}
    assert for_intel - for_amd == {0x3A}
    assert 0x4B564D03 not in for_amd, "steal time, which the table does not show"


def test_arch_capabilities_by_the_sense_of_each_bit() -> None:
    rdcl_no, rsba, mds_no, tsx_ctrl, unknown = 1 << 0, 1 << 2, 1 << 5, 1 << 7, 1 << 50
    host = HostDescription(INTEL, msrs=(0x10A,), feature_msrs={0x10A: mds_no | rsba | unknown})

    def reasons(capabilities: int | None) -> list[str]:
        return [str(reason) for reason in compare.problems(INTEL, host, capabilities=capabilities)]

    assert reasons(None) == []
    assert reasons(mds_no | rsba) == []
    assert reasons(rsba) == [], "less than the host has"
    assert reasons(rdcl_no | tsx_ctrl | mds_no | rsba) == [
        "the host does not have RDCL_NO, of which the guest was told in IA32_ARCH_CAPABILITIES",
        "the host does not have TSX_CTRL, of which the guest was told in IA32_ARCH_CAPABILITIES",
    ]
    assert reasons(mds_no) == ["the host needs care of which the guest was not told: RSBA in IA32_ARCH_CAPABILITIES"]
    assert reasons(rsba | 1 << 51) == [
        "the host does not have bit 51, of which the guest was told in IA32_ARCH_CAPABILITIES"
    ]


def test_what_a_new_guest_is_told_in_arch_capabilities() -> None:
    offered = 1 << 0 | 1 << 2 | 1 << 50
    assert arch_capabilities.shown(offered, moving=False) == 1 << 0 | 1 << 2, "not what nobody knows"
    assert arch_capabilities.shown(1 << 0, moving=True) == 1 << 0 | 1 << 2 | 1 << 19, "RSBA and RRSBA of other hosts"


def test_what_another_host_must_have() -> None:
    """Not what travels only where it holds something unusual: else a guest could not go where it would never notice."""
    with_sep = table((0, 0, 0, 1, 0x68747541, 0x444D4163, 0x69746E65), (1, 0, 0, 0, 0, 0, 1 << 11))
    assert msrs.required(with_sep, [0x140, 0x174, 0x176, 0xC0010015]) == [0x174, 0x176]


def test_what_the_table_does_not_give_is_refused_by_name() -> None:
    host = HostDescription(AMD, msrs=(0x8B, 0x140, 0x174))
    found = compare.problems(AMD, host, msrs=[0x8B, 0x140, 0x174])
    assert [str(reason) for reason in found] == [
        "the state sets MSR of an unknown name (0x8b), which the guest's CPUID table does not give it",
        "the state sets MSR IA32_SYSENTER_CS (0x174), which the guest's CPUID table does not give it",
    ]
    named = r"vCPU 3 .*an MSR that pyhv does not know \(0x8b\), IA32_SYSENTER_CS \(0x174\)"
    with pytest.raises(ValueError, match=named):
        msrs.check_granted([0x174, 0x140, 0x8B], frozenset(msrs.granted(AMD)), 3)
