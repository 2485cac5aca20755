"""May a guest run on a host? The proving ground's moves, and each reason by itself."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyhv.cpu import profiles
from pyhv.cpu.compare import (
    ClflushSizeDiffers,
    MissingFeature,
    NotForGuests,
    NotKnown,
    NumberDiffers,
    OnVcpu,
    OtherVendor,
    TooManyAddressBits,
    VcpusDiffer,
    XsaveDiffers,
    problems,
)
from pyhv.cpu.feature_types import Word
from pyhv.cpu.features import BY_NAME, FEATURES, NUMBERS
from pyhv.cpu.host import HostDescription, as_kvm_host
from pyhv.cpu.policy import Topology, guest_table
from pyhv.cpu.table import KVM_SIGNATURE, CpuidTable, Registers, XsaveArea, xsave_leaf
from pyhv.state.needs import Needs

from . import cpus

COMPAT = profiles.load("hyperv-r2")
EVERYTHING = profiles.load("host")


def guest(host: HostDescription, profile: profiles.Profile = COMPAT) -> CpuidTable:
    return guest_table(host, profile, Topology(2)).table


# ------------------------------------------------------------------------------------------ the proving ground


@cpus.needs_processors
def test_compatibility_mode_moves_between_all_processors_of_a_vendor() -> None:
    moves = 0
    for start, first in cpus.hosts().items():
        table = guest(first)
        for target, second in cpus.hosts().items():
            found = problems(table, second)
            if first.vendor == second.vendor:
                assert not found, (start, target, [str(reason) for reason in found])
                moves += 1
            else:
                assert found[0] == OtherVendor(first.vendor, second.vendor)
    assert moves == 16 * 16 + 11 * 11


@cpus.needs_processors
def test_bobcat_is_the_exception_that_the_profile_names() -> None:
    """It has 36 physical address bits, by its manual and by dumps of it."""
    k8 = cpus.hosts()["amd-k8-opteron-2210-he"]
    leaf8 = k8.table.get(0x80000008)
    bobcat = HostDescription(k8.table.replace({(0x80000008, 0): leaf8._replace(eax=0x3024)}))
    assert problems(guest(k8), bobcat) == [TooManyAddressBits(40, 36)]
    assert "AMD's Bobcat (family 0x14" in COMPAT.description
    started_there = guest(bobcat)
    assert all(problems(started_there, h) == [] for h in cpus.hosts().values() if h.vendor == "amd")


def missing(start: str, target: str) -> list[str]:
    table = guest(cpus.hosts()[start], EVERYTHING)
    return [reason.name for reason in problems(table, cpus.hosts()[target]) if isinstance(reason, MissingFeature)]


@cpus.needs_processors
def test_without_compatibility_mode_a_move_to_an_older_processor_is_refused_by_name() -> None:
    # (Ivy Bridge has XSAVEOPT; its dump leaves out that subleaf.)
    assert missing("intel-haswell-core-i7-4770", "intel-ivybridge-core-i7-3770k") == [
        *("fma", "movbe", "bmi1", "avx2", "bmi2", "invpcid", "xsaveopt", "abm", "pdpe1gb")
    ]
    down = missing("intel-westmere-core-i7-980x", "intel-nehalem-core-i7-920")
    assert down == ["pclmulqdq", "pcid", "aes", "pdpe1gb"]
    down = missing("amd-zen5-ryzen-9950x", "amd-zen3-ryzen-5950x")
    assert {"avx512f", "avx_vnni", "movdiri"} <= set(down)
    down = missing("amd-zen-ryzen-1800x", "amd-k8-opteron-2210-he")
    assert {"ssse3", "sse4_1", "sse4_2", "sse4a", "abm", "popcnt", "xsave", "avx", "avx2", "misalignsse"} <= set(down)
    # K10 is not affected by speculative store bypass, Bulldozer is.
    down = missing("amd-k10-opteron-2431", "amd-bulldozer-opteron-6238")
    assert {"3dnow", "3dnowext", "amd_ssb_no"} == set(down)


@cpus.needs_processors
def test_without_compatibility_mode_a_move_back_home_is_fine() -> None:
    for name, host in cpus.hosts().items():
        assert problems(guest(host, EVERYTHING), host) == [], name


@cpus.needs_processors
def test_address_bits_and_state_layout() -> None:
    hosts = cpus.hosts()
    skylake_x = guest(hosts["intel-skylakex-core-i7-7800x"], EVERYTHING)
    reasons = problems(skylake_x, hosts["intel-rocketlake-core-i7-11700k"])
    assert TooManyAddressBits(46, 39) in reasons
    # Intel's AVX-512 state stands elsewhere than AMD's, which both call components 5 to 7.
    reasons = problems(guest(hosts["amd-zen4-ryzen-7900x"], EVERYTHING), hosts["intel-alderlake-core-i5-12400"])
    assert XsaveDiffers(5, XsaveArea(0x40, 0x340, 0), XsaveArea(0x40, 0x440, 0)) in reasons
    assert [r.component for r in reasons if isinstance(r, XsaveDiffers)] == [5, 6, 7, 9]


# ------------------------------------------------------------------------------------------------ each reason


def table(
    *features: str, vendor: tuple[int, int, int] = cpus.INTEL, clflush: int = 8, physical: int = 40
) -> CpuidTable:
    made = {
        (0, 0): Registers(0x20, *vendor),
        (1, 0): Registers(0, clflush << 8, 0, 0),
        (0x80000000, 0): Registers(0x80000021, 0, 0, 0),
        (0x80000008, 0): Registers(48 << 8 | physical, 0, 0, 0),
    }
    for name in features:
        word = BY_NAME[name].word
        registers = made.get((word.leaf, word.subleaf), Registers(0, 0, 0, 0))
        value = getattr(registers, word.register) | BY_NAME[name].mask
        made[word.leaf, word.subleaf] = registers._replace(**{word.register: value})
    return CpuidTable(made)


def test_nothing_is_wrong() -> None:
    assert problems(table("avx", "pni"), HostDescription(table("avx", "pni", "avx2"))) == []


def test_other_vendor() -> None:
    (reason,) = problems(table(), HostDescription(table(vendor=cpus.HYGON)))
    assert reason == OtherVendor("intel", "HygonGenuine")
    assert str(reason) == "the guest's processor is of vendor intel, the host's of vendor HygonGenuine"


def test_missing_features_are_all_named() -> None:
    reasons = problems(table("avx", "avx2", "pni"), HostDescription(table("pni")))
    assert [str(reason) for reason in reasons] == [
        "the host does not offer avx (AVX)",
        "the host does not offer avx2 (AVX2)",
    ]
    # KVM's own features are features.
    kvm = {(0x40000000, 0): KVM_SIGNATURE}
    (reason,) = problems(table("kvm_steal_time").replace(kvm), HostDescription(table()))
    assert reason == MissingFeature("kvm_steal_time", "Steal time")


def test_a_repeated_bit_is_not_named_twice() -> None:
    reasons = problems(table("mmx", "mmx_mirror", vendor=cpus.AMD), HostDescription(table(vendor=cpus.AMD)))
    assert [reason.name for reason in reasons if isinstance(reason, MissingFeature)] == ["mmx"]
    # It follows what it repeats: a host that has that can show it too.
    assert problems(table("mmx", "mmx_mirror", vendor=cpus.AMD), HostDescription(table("mmx", vendor=cpus.AMD))) == []
    (reason,) = problems(table("mmx_mirror", vendor=cpus.AMD), HostDescription(table(vendor=cpus.AMD)))
    assert isinstance(reason, MissingFeature) and reason.name == "mmx_mirror"


@pytest.mark.parametrize("name", [f.name for f in FEATURES if f.sense != "plain" or f.topology or f.dynamic])
def test_what_no_host_has_to_offer(name: str) -> None:
    vendor = cpus.AMD if BY_NAME[name].vendor == "amd" else cpus.INTEL
    assert problems(table(name, vendor=vendor), HostDescription(table(vendor=vendor))) == []


def test_xsave() -> None:
    here = {2: XsaveArea(256, 576, 0), 9: XsaveArea(8, 2688, 2)}
    xsavec = BY_NAME["xsavec"].mask
    made = table("xsave", "avx", "pku").replace(xsave_leaf(here, xsavec, True))

    def reasons_on(areas: dict[int, XsaveArea], *features: str) -> list[str]:
        there = table(*features).replace(xsave_leaf(areas, xsavec, True))
        return [str(reason) for reason in problems(made, HostDescription(there))]

    full = ("xsave", "avx", "pku")
    assert reasons_on(here, *full) == []
    assert reasons_on({**here, 5: XsaveArea(64, 1088, 0)}, *full) == []
    assert reasons_on({**here, 2: XsaveArea(256, 576, 4)}, *full) == []  # XFD is not a matter of layout
    assert reasons_on({2: XsaveArea(256, 576, 0), 9: XsaveArea(8, 832, 2)}, *full) == [
        "XSAVE component 9 (pkru) has 8 bytes at 2688, aligned to 64 when compacted in the guest and 8 bytes at 832, "
        "aligned to 64 when compacted on the host"
    ]
    assert reasons_on({2: XsaveArea(512, 576, 0), 9: XsaveArea(8, 2688, 0)}, *full) == [
        "XSAVE component 2 (avx) has 256 bytes at 576 in the guest and 512 bytes at 576 on the host",
        "XSAVE component 9 (pkru) has 8 bytes at 2688, aligned to 64 when compacted in the guest and 8 bytes at 2688 "
        "on the host",
    ]
    assert reasons_on({2: here[2]}, *full) == ["the host does not have XSAVE component 9 (pkru)"]
    # How components are packed matters to nobody who has only the standard format.
    plain, packed = table(*full).replace(xsave_leaf(here, 0, False)), {**here, 9: XsaveArea(8, 2688, 0)}
    assert problems(plain, HostDescription(table(*full).replace(xsave_leaf(packed, 0, False)))) == []
    # A component that is announced and not described is one.
    spoilt = plain.replace({(0xD, 0): plain.get(0xD)._replace(eax=plain.get(0xD).eax | 1 << 17)})
    assert problems(spoilt, HostDescription(plain)) == [XsaveDiffers(17, XsaveArea(0, 0, 0), None)]
    # Where the feature is missing, its component goes without saying.
    assert reasons_on({2: here[2]}, "xsave", "avx") == ["the host does not offer pku (Protection keys for user pages)"]


def test_physical_address_bits() -> None:
    assert problems(table(physical=36), HostDescription(table(physical=40))) == []
    (reason,) = problems(table(physical=40), HostDescription(table(physical=39)))
    assert reason == TooManyAddressBits(40, 39)
    assert str(reason) == "the guest has 40 physical address bits, the host 39"


def test_clflush_size() -> None:
    (reason,) = problems(table("clflush"), HostDescription(table("clflush", clflush=4)))
    assert reason == ClflushSizeDiffers(64, 32)
    assert str(reason) == "CLFLUSH flushes 64 bytes for the guest and 32 bytes on the host"
    assert problems(table(), HostDescription(table(clflush=4))) == []


def test_what_is_not_compared() -> None:
    there = table("pni").replace(
        {
            (0, 0): Registers(7, *cpus.INTEL),
            (1, 0): Registers(0xFFFFF, 0xFFFF08FF, BY_NAME["pni"].mask, 0),
            (2, 0): Registers(1, 2, 3, 4),
            (4, 0): Registers(1, 2, 3, 4),
            (0xB, 1): Registers(1, 2, 3, 4),
            (0x80000000, 0): Registers(0x80000008, 0, 0, 0),
            (0x80000002, 0): Registers(1, 2, 3, 4),
        }
    )
    assert problems(table("pni"), HostDescription(there)) == []


# ------------------------------------------------------------------------------------- numbers that have a feature

AMX = {(0x1D, 0): (1, 0, 0, 0), (0x1D, 1): (0x04002000, 0x00080040, 16, 0), (0x1E, 0): (0, 0x4010, 0, 0)}


def numbered(**changes: int) -> CpuidTable:
    """A table with AMX as Sapphire Rapids has it, AVX10.2 and ERAPS, and these numbers changed."""
    made = table("amx_tile", "avx10", "avx10_512", vendor=cpus.INTEL)
    made = made.replace({(0, 0): made.get(0)._replace(eax=0x24)})
    made = made.replace({key: Registers(*registers) for key, registers in AMX.items()})
    made = made.replace({(0x24, 0): Registers(0, BY_NAME["avx10_512"].mask | 2, 0, 0)})
    for number in NUMBERS:
        if number.name in changes:
            key = number.word.leaf, number.word.subleaf
            value = made.word(number.word) & ~number.mask | changes[number.name] << number.low
            made = made.replace({key: made.get(*key)._replace(**{number.word.register: value})})
    return made


NUMBER_CASES = [
    ("avx10_version", 2, 1, False),
    ("avx10_version", 1, 2, True),
    ("amx_tiles", 8, 4, False),
    ("amx_tiles", 4, 8, True),
    ("amx_bytes", 8192, 4096, False),
    ("amx_tile_bytes", 1024, 512, False),
    ("amx_tile_bytes", 512, 1024, False),
    ("amx_row_bytes", 64, 128, False),
    ("amx_rows", 16, 8, False),
    ("amx_maxk", 16, 8, False),
    ("amx_maxn", 64, 32, False),
    ("amx_palettes", 1, 0, False),
]


@pytest.mark.parametrize(("name", "guest_has", "host_has", "moves"), NUMBER_CASES)
def test_numbers_have_rules(name: str, guest_has: int, host_has: int, moves: bool) -> None:
    found = problems(numbered(**{name: guest_has}), HostDescription(numbered(**{name: host_has})))
    if moves:
        assert found == []
        return
    (reason,) = found
    assert isinstance(reason, NumberDiffers) and (reason.name, reason.guest, reason.host) == (name, guest_has, host_has)
    assert str(reason).startswith(f"{name} (") and f"is {guest_has} for the guest and {host_has} on the host" in str(
        reason
    )


def test_every_number_has_been_tried() -> None:
    assert {n.name for n in NUMBERS} == {name for name, *_ in NUMBER_CASES} | {"rap_size"}


def test_vectors_of_512_bits_are_a_feature() -> None:
    narrow = numbered().replace({(0x24, 0): Registers(0, BY_NAME["avx10_256"].mask | 2, 0, 0)})
    (reason,) = problems(numbered(), HostDescription(narrow))
    assert reason == MissingFeature("avx10_512", "AVX10 on 512-bit vectors")


def test_a_larger_return_predictor_is_a_reason() -> None:
    def amd(size: int) -> CpuidTable:
        made = table("eraps", vendor=cpus.AMD)
        return made.replace({(0x80000021, 0): made.get(0x80000021)._replace(ebx=size << 16)})

    assert problems(amd(8), HostDescription(amd(8))) == [] == problems(amd(16), HostDescription(amd(8)))
    (reason,) = problems(amd(8), HostDescription(amd(16)))
    assert str(reason) == "rap_size (size of the return address predictor) is 8 for the guest and 16 on the host"


def test_linear_address_bits() -> None:
    wide = table().replace({(0x80000008, 0): Registers(57 << 8 | 40, 0, 0, 0)})
    (reason,) = problems(wide, HostDescription(table()))
    assert str(reason) == "the guest has 57 linear address bits, the host 48"


# ------------------------------------------------------------------------------------------ what no guest is shown


def test_what_is_for_no_guest_is_a_reason_on_every_host() -> None:
    for name, vendor in (("svm", cpus.AMD), ("vmx", cpus.INTEL), ("pdcm", cpus.INTEL), ("perfctr_core", cpus.AMD)):
        shown = table(name, vendor=vendor)
        (reason,) = problems(shown, HostDescription(shown))
        assert reason == NotForGuests(name, BY_NAME[name].title)
        assert str(reason) == f"the guest sees {name} ({BY_NAME[name].title}), which is for no guest"


@pytest.mark.parametrize("leaf", [0x3, 0x5, 0x9, 0xA, 0xF, 0x10, 0x12, 0x17, 0x18, 0x1C, 0x23, 0x80000022, 0x20000000])
def test_a_leaf_that_no_guest_has_is_a_reason_on_every_host(leaf: int) -> None:
    shown = table().replace({(leaf, 0): Registers(0x07300402, 0, 0, 0x603)})
    reasons = problems(shown, HostDescription(shown))
    assert reasons == [NotKnown(leaf, 0, "eax", 0x07300402), NotKnown(leaf, 0, "edx", 0x603)]
    assert str(reasons[1]).startswith(f"the guest sees bits 0x00000603 of CPUID 0x{leaf:x}.edx")


def test_unknown_bits_of_known_registers_are_a_reason() -> None:
    words = [(Word(7, 0, "ecx"), 17), (Word(1, 0, "edx"), 10), (Word(0x24, 0, "ebx"), 30)]
    words.append((Word(0x80000001, 0, "ecx"), 2))  # AMD's SVM, and this is Intel's
    for word, bit in words:
        shown = table().replace({word[:2]: table().get(*word[:2])._replace(**{word.register: 1 << bit})})
        assert problems(shown, HostDescription(shown)) == [NotKnown(*word, 1 << bit)]
    (reason,) = problems(shown := table().replace({(0xD, 1): Registers(1 << 9, 0, 0, 0)}), HostDescription(shown))
    assert reason == NotKnown(0xD, 1, "eax", 1 << 9)


# --------------------------------------------------------------------------------------------------- several vCPUs


def test_every_vcpus_table_is_judged() -> None:
    host = HostDescription(table("pni"))
    ours, theirs = table("pni"), table("pni", "avx", "vmx")
    needs = Needs("x", True, (ours, theirs, ours), frozenset(), 0)
    assert [str(reason) for reason in needs.reasons_against(host)] == [
        "vCPU 1 sees another processor than vCPU 0",
        "vCPU 1: the guest sees vmx (VT-x), which is for no guest",
        "vCPU 1: the host does not offer avx (AVX)",
    ]
    # What holds for all is said once.
    both = Needs("x", True, (theirs, theirs), frozenset(), 0).reasons_against(host)
    assert len(both) == 2 and not any(isinstance(reason, OnVcpu) for reason in both)


def test_a_host_that_could_show_a_higher_number_has_something_to_hide() -> None:
    """A restored guest goes on with what it saw; where the host could show more, hiding it must be proved."""
    base = ("fpu", "fxsr", "sse", "sse2", "xsave", "avx", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512dq")
    made = table(*base, "avx512cd", "avx10", "avx10_512").replace({(0, 0): Registers(0x24, *cpus.INTEL)})
    areas = {n: XsaveArea(256, 576 + 256 * n, 0) for n in (2, 5, 6, 7)}
    made = made.replace(xsave_leaf(areas, 0, False))

    def version(number: int) -> CpuidTable:
        return made.replace({(0x24, 0): Registers(0, BY_NAME["avx10_512"].mask | number, 0, 0)})

    def hides(guest_has: int, host_has: int) -> bool:
        host = HostDescription(version(host_has))
        saw = guest_table(HostDescription(version(guest_has)), EVERYTHING, Topology(1)).table
        return Needs("host", False, (saw,), frozenset(), 0).guest_cpu(host).hides

    assert "avx10" in guest_table(HostDescription(version(2)), EVERYTHING, Topology(1)).visible
    assert not hides(2, 2) and not hides(1, 1) and hides(1, 2)


@cpus.needs_processors
def test_vcpus_that_differ_in_apic_ids_are_alike() -> None:
    for name, host in cpus.hosts().items():
        for profile in (COMPAT, EVERYTHING):
            made = guest_table(host, profile, Topology(3))
            tables = tuple(made.table_for(vcpu) for vcpu in range(3))
            needs = Needs(profile.name, True, tables, frozenset(), 0)
            assert needs.reasons_against(host) == [], (name, profile.name)
            # One bit elsewhere makes a difference.
            last = tables[2]
            spoilt = last.replace({(1, 0): last.get(1)._replace(ebx=last.get(1).ebx ^ 1)})
            assert VcpusDiffer(2) in needs._replace(tables=(*tables[:2], spoilt)).reasons_against(host)


# --------------------------------------------------------------------------------------------- on random input


@given(cpus.tables(), cpus.tables())
@settings(max_examples=60)
def test_any_two_tables_give_one_line_a_reason(first: CpuidTable, second: CpuidTable) -> None:
    for reason in problems(first, HostDescription(second)):
        assert str(reason) and "\n" not in str(reason)


BEYOND = {(0, 0): Registers(0, *cpus.INTEL), (0x80000008, 0): Registers(1, 0, 0, 0)}
NARROW = {  # fewer linear address bits than any mode has: 24
    (0, 0): Registers(0, *cpus.INTEL),
    (0x80000000, 0): Registers(0x80000008, 0, 0, 0),
    (0x80000008, 0): Registers(0x1820, 0, 0, 0),
}


@given(cpus.tables(), st.sampled_from([HostDescription, as_kvm_host]), st.integers(1, 8))
@example(CpuidTable(BEYOND), HostDescription, 1)  # a leaf above the highest one
@example(CpuidTable(NARROW), HostDescription, 1)
@settings(max_examples=60)
def test_a_guest_may_stay_where_it_is(raw: CpuidTable, make: type[HostDescription], vcpus: int) -> None:
    host = make(raw)
    made = guest_table(host, EVERYTHING, Topology(vcpus))
    assert problems(made.table_for(vcpus - 1), host) == []
