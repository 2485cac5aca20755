"""The guest's table: the proving ground of real processors, the treatment of leaves, and the rules on random input."""

from __future__ import annotations

import functools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pyhv.cpu import profiles
from pyhv.cpu.feature_types import Word
from pyhv.cpu.features import BY_NAME, FEATURES, NUMBERS, WORDS
from pyhv.cpu.features import XSAVE_COMPONENTS as COMPONENTS
from pyhv.cpu.host import HostDescription, as_kvm_host
from pyhv.cpu.policy import GuestCpu, Hidden, Levelled, Topology, guest_table
from pyhv.cpu.profiles import Limits, Profile
from pyhv.cpu.table import KVM_SIGNATURE, CpuidTable, Registers, XsaveArea, xsave_leaf
from pyhv.errors import BadInput

from . import cpus

COMPAT = profiles.load("hyperv-r2")
EVERYTHING = profiles.load("host")

# What a guest in compatibility mode sees, by vendor: written down from the manuals and from what every processor with
# VT-x or AMD-V has had in common, not computed. Every feature word that is not here is 0. 0x1.EDX is the common
# 0xBFEBFBFF less DS (21), ACPI (22), self-snoop (27), HT (28), TM (29) and PBE (31).
INTEL_WORDS = {
    Word(0x1, 0, "ecx"): 0x80202001,
    Word(0x1, 0, "edx"): 0x078BFBFF,
    Word(0x40000001, 0, "eax"): 0x01000009,
    Word(0x80000001, 0, "ecx"): 0x00000001,
    Word(0x80000001, 0, "edx"): 0x20100800,
}
AMD_WORDS = {
    Word(0x1, 0, "ecx"): 0x80202001,
    Word(0x1, 0, "edx"): 0x078BFBFF,
    Word(0x40000001, 0, "eax"): 0x01000009,
    Word(0x80000001, 0, "ecx"): 0x00000011,
    Word(0x80000001, 0, "edx"): 0x21D3FBFF,
}
EXPECTED = {"intel": INTEL_WORDS, "amd": AMD_WORDS}

# The published list, the newest names in brackets: no bit of it may show. Literal, as the manuals number them.
PUBLISHED = {
    "ssse3": (Word(1, 0, "ecx"), 9),
    "sse4.1": (Word(1, 0, "ecx"), 19),
    "sse4.2": (Word(1, 0, "ecx"), 20),
    "popcnt": (Word(1, 0, "ecx"), 23),
    "xsave": (Word(1, 0, "ecx"), 26),
    "avx": (Word(1, 0, "ecx"), 28),
    "f16c (cvt16)": (Word(1, 0, "ecx"), 29),
    "lzcnt": (Word(0x80000001, 0, "ecx"), 5),
    "sse4a": (Word(0x80000001, 0, "ecx"), 6),
    "misaligned sse": (Word(0x80000001, 0, "ecx"), 7),
    "sse5 (xop)": (Word(0x80000001, 0, "ecx"), 11),
    "fma4": (Word(0x80000001, 0, "ecx"), 16),
    "extended 3dnow!": (Word(0x80000001, 0, "edx"), 30),
    "3dnow!": (Word(0x80000001, 0, "edx"), 31),
}

# The leaves that a guest in compatibility mode can have; all others read as zeros.
COMPAT_LEAVES = {
    "intel": {0, 1, 2, 4, 0xB, 0x40000000, 0x40000001} | set(range(0x80000000, 0x80000009)) - {0x80000005, 0x80000007},
    "amd": {0, 1, 0xB, 0x40000000, 0x40000001} | set(range(0x80000000, 0x80000009)) - {0x80000007},
}


def has_expected_words(table: CpuidTable) -> bool:
    expected = EXPECTED[table.lineage]
    return all(table.word(word) == expected.get(word, 0) for word in WORDS)


def guest(host: HostDescription, profile: Profile = COMPAT, vcpus: int = 1) -> GuestCpu:
    return guest_table(host, profile, Topology(vcpus))


# ------------------------------------------------------------------------------------------ the proving ground


@cpus.needs_processors
@pytest.mark.parametrize("vendor", ["intel", "amd"])
def test_every_processor_of_a_vendor_gives_one_feature_set(vendor: str) -> None:
    tables = [guest(host).table for host in cpus.hosts().values() if host.vendor == vendor]
    assert len(tables) == {"intel": 16, "amd": 11}[vendor]
    assert {tuple(table.word(word) for word in WORDS) for table in tables} == {
        tuple(EXPECTED[vendor].get(word, 0) for word in WORDS)
    }
    for table in tables:
        assert not [name for name, (word, bit) in PUBLISHED.items() if table.word(word) >> bit & 1]
        assert table.physical_bits == {"intel": 36, "amd": 40}[vendor]
        assert table.get(0x80000008).eax >> 8 == 48  # linear bits, and no guest-physical ones above
        assert table.clflush_bytes == 64
        assert table.get(0xD) == (0, 0, 0, 0)
        assert {leaf for leaf, _ in table.entries} <= COMPAT_LEAVES[vendor]


@cpus.needs_processors
def test_the_expectation_can_fail() -> None:
    nothing = {(0, 0): Registers(0xB, *cpus.INTEL)}
    assert not has_expected_words(CpuidTable(nothing))
    host = cpus.hosts()["intel-skylake-core-i7-6700k"]
    assert has_expected_words(guest(host).table)
    assert not has_expected_words(host.table)
    assert not has_expected_words(guest(host, EVERYTHING).table)
    # One bit too many or too few, in any word.
    table = guest(host).table
    for word in WORDS:
        registers = table.get(word.leaf, word.subleaf)
        spoilt = registers._replace(**{word.register: table.word(word) ^ 1})
        assert not has_expected_words(table.replace({(word.leaf, word.subleaf): spoilt})), word


@cpus.needs_processors
def test_kept_and_hidden_names() -> None:
    for name, host in cpus.hosts().items():
        made = guest(host)
        assert made.hides
        assert not made.lacking, name
        assert {"pni", "cx16", "lahf_lm", "syscall", "nx", "lm", "x2apic", "hypervisor"} <= made.visible
        hidden = {row.name: row.reason for row in made.hidden}
        assert not hidden.keys() & made.visible
        assert hidden["tsc_deadline_timer"] == "not in profile hyperv-r2"
        ours = {f.name for f in FEATURES if not (f.mirrors or f.topology)}
        assert hidden.keys() == ours & host.table.features() - made.visible
    zen5 = {row.name: row.reason for row in guest(cpus.hosts()["amd-zen5-ryzen-9950x"]).hidden}
    assert zen5["svm"] == "virtualization inside the guest is never shown"
    assert zen5["perfctr_core"] == "performance monitoring is never shown"
    assert len(zen5) > 100


@cpus.needs_processors
def test_levelled_numbers() -> None:
    levelled = guest(cpus.hosts()["amd-zen5-ryzen-9950x"]).levelled
    assert levelled == (
        Levelled("highest basic leaf", 0x10, 0xB),
        Levelled("highest extended leaf", 0x80000022, 0x80000008),
        Levelled("physical address bits", 48, 40),
        Levelled("XSAVE area in bytes", 0x988, 0),
    )
    assert str(levelled[2]) == "physical address bits: 40 instead of 48"
    assert guest(cpus.hosts()["intel-merom-core2-x6800"]).levelled == ()


@cpus.needs_processors
def test_name_family_and_caches_are_the_starting_hosts() -> None:
    for name, host in cpus.hosts().items():
        raw, table = cpus.processors()[name].table, guest(host).table
        assert table.brand == raw.brand
        assert table.signature == raw.signature
        assert table.get(2) == (raw.get(2) if raw.vendor == "intel" else (0, 0, 0, 0))
        assert table.get(0x80000005) == raw.get(0x80000005)
        if raw.vendor == "intel":
            caches = [key for key in raw.entries if key[0] == 4]
            assert [table.get(*key)[1:] for key in caches] == [raw.get(*key)[1:] for key in caches]


# ---------------------------------------------------------------------------------------------- profile `host`


@cpus.needs_processors
def test_profile_host_shows_what_can_move() -> None:
    for name, host in cpus.hosts().items():
        made = guest(host, EVERYTHING)
        assert not made.hides
        shown = made.table.features()
        assert shown == made.visible
        lost = host.table.features() - shown
        movable = [BY_NAME[n] for n in lost if BY_NAME[n].migratable and not BY_NAME[n].barred]
        # What is lost all the same rests on something that this dump does not have.
        reasons = {row.name: row.reason for row in made.hidden}
        if host.table.lineage == "amd" and "arch_capabilities" in host.table.features():
            assert reasons.pop("arch_capabilities").startswith("KVM's own addition")
            movable.remove(BY_NAME["arch_capabilities"])
        assert all(reasons[f.name].startswith("needs ") for f in movable if not f.topology), (name, movable)
        # (KVM shows Intel's bits of SPEC_CTRL on AMD's processors too, mostly without the first of them.)
        alone = set() if "spec_ctrl" in shown else {"intel_stibp", "spec_ctrl_ssbd"}
        if not ("zen3" in name or "rocketlake" in name):
            assert {f.name for f in movable if not f.topology} <= alone, name
        assert not {"vmx", "svm", "perfctr_core", "pdcm", "dts", "invtsc", "sgx", "intel_pt"} & shown
        table = made.table
        assert table.physical_bits == host.physical_bits
        assert table.clflush_bytes == host.table.clflush_bytes
        assert table.xsave_areas() == {n: a for n, a in host.xsave.items() if n in table.xsave_areas()}
        for leaf in (5, 9, 0xA, 0x12, 0x14, 0x19, 0x1C, 0x23, 0x8000000A, 0x8000001B, 0x8000001F, 0x80000022):
            assert not [key for key in table.entries if key[0] == leaf], (name, hex(leaf))


@cpus.needs_processors
def test_leaf_0xd_holds_the_components_of_visible_features() -> None:
    host = cpus.hosts()["intel-skylakex-core-i7-7800x"]
    full = guest(host, EVERYTHING)
    assert full.table.get(0xD) == (0xFF, 0xA80, 0xA80, 0)
    assert full.table.get(0xD, 1) == (0xF, 0xA00, 0, 0)

    hidden = guest(host, EVERYTHING._replace(hide=("avx512f", "mpx")))
    assert hidden.hides
    assert hidden.table.get(0xD) == (7, 0x340, 0x340, 0)
    assert hidden.table.get(0xD, 1) == (0xF, 0x340, 0, 0)
    assert {subleaf for leaf, subleaf in hidden.table.entries if leaf == 0xD} == {0, 1, 2}
    reasons = {row.name: row.reason for row in hidden.hidden}
    assert reasons["avx512f"] == "not in profile host"
    assert reasons["avx512bw"] == "needs avx512f"

    bare = guest(host, EVERYTHING._replace(hide=("avx", "mpx")))
    assert "avx2" not in bare.visible and "fma" not in bare.visible and "xsave" in bare.visible
    assert bare.table.get(0xD) == (3, 0x240, 0x240, 0)

    without = guest(host, EVERYTHING._replace(hide=("xsave",)))
    assert not [key for key in without.table.entries if key[0] == 0xD]
    assert "xsaveopt" not in without.visible and "avx" not in without.visible and "sse4_2" in without.visible


@cpus.needs_processors
def test_a_feature_whose_component_the_host_lacks_is_hidden() -> None:
    # This dump announces AVX-512 and has no size for its last component: no program could save that state.
    made = guest(cpus.hosts()["intel-rocketlake-core-i7-11700k"], EVERYTHING)
    reasons = {row.name: str(row) for row in made.hidden}
    assert reasons["avx512f"] == "avx512f: needs XSAVE component 7"
    assert reasons["avx512vl"] == "avx512vl: needs avx512f"


# ---------------------------------------------------------------------------------------------------- topology


@cpus.needs_processors
@pytest.mark.parametrize(("vcpus", "bits"), [(1, 0), (2, 1), (3, 2), (6, 3), (64, 6), (65, 7), (255, 8)])
def test_topology(vcpus: int, bits: int) -> None:
    for name in ("intel-alderlake-core-i5-12400", "amd-zen4-ryzen-7900x"):
        made = guest(cpus.hosts()[name], EVERYTHING, vcpus)
        for index in (0, vcpus // 2, vcpus - 1):
            table = made.table_for(index)
            assert table.get(1).ebx >> 24 == index
            assert table.get(1).ebx >> 16 & 0xFF == vcpus
            assert ("ht" in table.features()) == (vcpus > 1)
            leaves = [0xB, 0x1F] if "intel" in name else [0xB]
            for leaf in leaves:
                assert table.get(leaf, 0) == (0, 1, 0x100, index)
                assert table.get(leaf, 1) == (bits, vcpus, 0x201, index)
                assert (leaf, 2) not in table.entries
            # The same features, names and sizes on every vCPU.
            assert table.features() == made.visible
        if "intel" in name:
            first, last = table.get(4, 0), table.get(4, 3)
            assert first.eax >> 26 == last.eax >> 26 == min((1 << bits) - 1, 63)
            assert first.eax >> 14 & 0xFFF == 0  # the first two levels are a core's own
            assert table.get(4, 2).eax >> 14 & 0xFFF == 0
            assert last.eax >> 14 & 0xFFF == (1 << bits) - 1  # the third is everyone's
        else:
            assert table.get(0x80000008).ecx == bits << 12 | vcpus - 1
            assert ("cmp_legacy" in table.features()) == (vcpus > 1)
            assert table.get(0x8000001D, 0).eax >> 14 == 0
            assert table.get(0x8000001D, 3).eax >> 14 == (1 << bits) - 1
            assert table.get(0x8000001E) == (vcpus - 1, vcpus - 1, 0, 0)
        with pytest.raises(ValueError, match=f"vCPU {vcpus} of {vcpus}"):
            made.table_for(vcpus)


@cpus.needs_processors
@pytest.mark.parametrize("vcpus", [1, 2, 63, 64, 65, 128, 254])
def test_linux_counts_one_thread_a_core(vcpus: int) -> None:
    """By the leaves that it reads: 0xB where it is there, else (Intel) the logical processors of leaf 1 and the cores
    of leaf 4, or (AMD) the cores of 0x80000008 (arch/x86/kernel/cpu/topology_common.c and topology_amd.c)."""
    for name, host in cpus.hosts().items():
        for profile in (COMPAT, EVERYTHING):
            table = guest(host, profile, vcpus).table
            if table.max_basic >= 0xB:
                threads = table.get(0xB, 0).ebx
            elif host.vendor == "intel":
                threads = -(-(table.get(1).ebx >> 16 & 0xFF) // ((table.get(4).eax >> 26) + 1))
            else:
                threads = -(-vcpus // ((table.get(0x80000008).ecx & 0xFF) + 1))
            assert threads == 1, (name, profile.name, threads)


def test_so_many_vcpus_need_the_topology_leaf() -> None:
    host = host_with("fpu", max_basic=0xA)
    assert guest(host, COMPAT, 64).table.max_basic == 0xA
    assert guest(host, COMPAT, 65).table.max_basic == 0xB
    low = allow("fpu", limits=Limits(0xA, None, None, None))
    assert guest(host, low, 64).table.max_basic == 0xA
    with pytest.raises(BadInput, match=r"65 vCPUs: profile test has no leaf 0xb, .*; choose 1 to 64, or another"):
        guest(host, low, 65)


@cpus.needs_processors
def test_apic_ids_are_all_that_differs_between_vcpus() -> None:
    for host in cpus.hosts().values():
        made = guest(host, vcpus=4)
        first, last = made.table.entries, made.table_for(3).entries
        assert first.keys() == last.keys()
        assert {leaf for leaf, _ in first if first[leaf, _] != last[leaf, _]} <= {1, 0xB}


@pytest.mark.parametrize("vcpus", [0, -1, 256])
def test_impossible_topologies(vcpus: int) -> None:
    host = HostDescription(CpuidTable({(0, 0): Registers(1, *cpus.INTEL)}))
    with pytest.raises(BadInput, match="vCPUs: cannot be had; choose 1 to 255"):
        guest_table(host, COMPAT, Topology(vcpus))


# ------------------------------------------------------------------------------------------------ single rules


def host_with(*names: str, vendor: tuple[int, int, int] = cpus.INTEL, max_basic: int = 7) -> HostDescription:
    """A host that offers exactly these features, and KVM's leaf."""
    words: dict[Word, int] = {}
    for name in names:
        feature = BY_NAME[name]
        words[feature.word] = words.get(feature.word, 0) | feature.mask
    entries = {(0, 0): Registers(max_basic, *vendor), (0x40000000, 0): KVM_SIGNATURE}
    entries[0x80000000, 0] = Registers(0x80000021, 0, 0, 0)
    for word, value in words.items():
        key = (word.leaf, word.subleaf)
        entries[key] = entries.get(key, Registers(0, 0, 0, 0))._replace(**{word.register: value})
    return HostDescription(CpuidTable(entries))


NO_LIMITS = Limits(None, None, None, None)


def allow(*names: str, limits: Limits = NO_LIMITS, moving: bool = False) -> Profile:
    return Profile("a test", "test", "title", "text", moving, False, names, (), (), (), limits, limits)


def test_visible_is_listed_and_offered_and_complete() -> None:
    host = host_with("fxsr", "sse", "sse2", "pni", "ssse3", "sse4_2", "popcnt", "aes")
    made = guest(host, allow("fxsr", "fpu", "sse", "sse2", "pni", "sse4_1", "sse4_2", "popcnt"))
    assert made.visible == {"popcnt"}  # fxsr requires fpu, sse requires fxsr ...
    assert made.hidden == (
        Hidden("fxsr", "needs fpu"),
        Hidden("sse", "needs fxsr"),
        Hidden("sse2", "needs sse"),
        Hidden("pni", "needs sse2"),
        Hidden("ssse3", "not in profile test"),
        Hidden("sse4_2", "needs sse4_1"),
        Hidden("aes", "not in profile test"),
    )
    assert made.lacking == ("fpu", "sse4_1")


def test_above_a_limit_is_hidden() -> None:
    host = host_with("smep", "syscall", "msr", "invtsc", "tsc")
    made = guest(host, allow("smep", "syscall", "msr", limits=Limits(6, 0x80000000, None, None)))
    assert made.visible == {"msr"}
    assert Hidden("smep", "above the highest leaf of profile test") in made.hidden
    assert (made.table.max_basic, made.table.max_extended) == (6, 0x80000000)
    # A limit only lowers.
    made = guest(host, allow("smep", limits=Limits(0xB, 0x8FFFFFFF, 52, None)))
    assert (made.table.max_basic, made.table.max_extended) == (7, 0x80000021)
    assert made.table.physical_bits == 36


def test_bits_that_no_host_decides() -> None:
    inverted, any_of = "zero_fcs_fds", "md_clear"
    with_both, without = host_with(inverted, any_of), host_with("smep")
    # An allow-list decides alone, on every host alike.
    for host in (with_both, without):
        assert guest(host, allow(inverted)).visible == {inverted}
        assert guest(host, allow(any_of)).visible == {any_of}
        assert guest(host, allow("smep")).visible <= {"smep"}
        assert guest(host, allow(inverted, any_of)).lacking == ()
    # The whole host shows them as it has them.
    assert guest(with_both, EVERYTHING).visible == {inverted, any_of}
    assert guest(without, EVERYTHING).visible == {"smep"}


def test_arch_capabilities_are_not_shown_on_amd() -> None:
    """KVM provides the MSR everywhere; AMD's processors do not have it."""
    name = "arch_capabilities"
    assert guest(host_with(name), EVERYTHING).visible == {name}
    made = guest(host_with(name, vendor=cpus.AMD), EVERYTHING)
    assert made.visible == frozenset()
    assert made.hidden == (Hidden(name, "KVM's own addition: processors of this vendor do not have it"),)


def test_never_whatever_a_profile_lists() -> None:
    barred = [f.name for f in FEATURES if f.barred and f.vendor != "amd" and not f.requires]
    assert {"vmx", "pdcm", "dts"} <= set(barred)
    host = host_with(*barred, "ht", "osxsave", "xsave", max_basic=0x24)
    for profile in (EVERYTHING, allow(*barred, "ht", "osxsave")):
        made = guest(host, profile)
        assert not made.visible & {*barred, "ht", "osxsave"}
        reasons = {row.name: row.reason for row in made.hidden}
        assert reasons["vmx"] == "virtualization inside the guest is never shown"
        assert reasons["pdcm"] == "performance monitoring is never shown"


def test_amd_has_no_leaf_4() -> None:
    for vendor, leaf4 in ((cpus.AMD, (0, 0, 0, 0)), (cpus.INTEL, (0x121, 2, 3, 4))):
        host = HostDescription(host_with(vendor=vendor).table.replace({(4, 0): Registers(0x121, 2, 3, 4)}))
        assert guest(host, EVERYTHING).table.get(4) == leaf4


def test_unknown_bits_are_hidden() -> None:
    host = host_with("smep")
    table = host.table.replace({(7, 0): Registers(2, *[0xFFFFFFFF] * 3), (7, 2): Registers(*[0xFFFFFFFF] * 4)})
    made = guest(HostDescription(table), EVERYTHING)
    for word, features in WORDS.items():
        known = sum(f.mask for f in features) | sum(n.mask for n in NUMBERS if n.word == word)
        assert made.table.word(word) & ~known == 0, word
    assert made.table.get(7, 2)[:3] == (0, 0, 0)


def test_highest_subleaf_of_leaf_7_is_the_last_with_a_feature() -> None:
    host = host_with(
        "smep", "sm3", "avx", "xsave", "fxsr", "fpu", "sse", "sse2", "spec_ctrl", "intel_psfd", max_basic=0xD
    )
    full = guest(host, EVERYTHING._replace(hide=("avx",)))
    assert "sm3" not in full.visible and full.table.get(7).eax == 2
    assert (7, 1) not in full.table.entries
    assert guest(host, allow("smep")).table.get(7).eax == 0
    assert (7, 0) not in guest(host, allow()).table.entries


def test_clock_rates_stay_behind_when_moving() -> None:
    host = host_with("tsc", max_basic=0x16)
    host = HostDescription(host.table.replace({(0x15, 0): Registers(2, 178, 38400000, 0)}))
    assert guest(host, allow("tsc")).table.get(0x15) == (2, 178, 38400000, 0)
    assert guest(host, allow("tsc", moving=True)).table.get(0x15) == (0, 0, 0, 0)
    assert guest(host, allow()).table.get(0x15) == (0, 0, 0, 0)


def test_five_level_paging_brings_its_linear_addresses() -> None:
    host = host_with("la57", "lm", "pae", "msr", "cx8", "cmov", "fpu", "fxsr", "sse", "sse2")
    host = HostDescription(host.table.replace({(0x80000008, 0): Registers(0x303934, 0, 0, 0)}))
    assert guest(host, EVERYTHING).table.get(0x80000008).eax == 0x303934
    hidden = guest(host, EVERYTHING._replace(hide=("la57",)))
    assert hidden.table.get(0x80000008).eax == 0x303034
    assert Levelled("linear address bits", 57, 48) in hidden.levelled
    base = ("lm", "pae", "msr", "cx8", "cmov", "fpu", "fxsr", "sse", "sse2")
    assert guest(host, allow(*base, limits=Limits(None, None, 40, 64))).table.get(0x80000008).eax == 0x3028
    assert guest(host, allow(limits=Limits(None, None, 40, 64))).table.get(0x80000008).eax == 0x2028


def test_kvms_leaves() -> None:
    host = host_with("hypervisor", "kvm_clocksource2", "kvm_steal_time")
    made = guest(host, allow("hypervisor", "kvm_clocksource2"))
    assert made.table.get(0x40000000) == (0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D)
    assert made.table.get(0x40000001) == (8, 0, 0, 0)
    # A guest that is not told of a hypervisor is told nothing by it.
    made = guest(host, allow("kvm_clocksource2"))
    assert made.visible == frozenset()
    assert not [leaf for leaf, _ in made.table.entries if 0x40000000 <= leaf < 0x80000000]
    assert Hidden("kvm_clocksource2", "needs hypervisor") in made.hidden
    # Nor does a host without KVM's leaves have them.
    bare = HostDescription(host.table.replace({(0x40000000, 0): None, (0x40000001, 0): None}))
    assert not [leaf for leaf, _ in guest(bare, EVERYTHING).table.entries if 0x40000000 <= leaf < 0x80000000]


def test_the_leaf_after_another_hypervisors_signature_is_not_kvms() -> None:
    host = host_with("hypervisor", "kvm_clocksource2", "kvm_steal_time")
    hyper_v = Registers(0x4000000B, 0x7263694D, 0x666F736F, 0x76482074)  # "Microsoft Hv"; its 0x40000001 says "Hv#1"
    table = host.table.replace({(0x40000000, 0): hyper_v, (0x40000001, 0): Registers(0x31237648, 0, 0, 0)})
    assert not [name for name in table.features() if name.startswith("kvm")]
    assert not table.has(BY_NAME["kvm_nop_io_delay"]) and HostDescription(table).kvm_features == 0
    made = guest(HostDescription(table), EVERYTHING)
    assert made.visible == {"hypervisor"}
    assert not [leaf for leaf, _ in made.table.entries if 0x40000000 <= leaf < 0x80000000]


def test_a_mirror_follows_what_it_repeats() -> None:
    """Not the host: some show 0x80000001.EDX without them (KVM copies them from leaf 1)."""
    host = host_with("fpu", "mmx", "syscall", "msr", "pge_mirror", vendor=cpus.AMD)
    for profile in (EVERYTHING, allow("fpu", "mmx", "syscall", "msr")):
        made = guest(host, profile)
        assert made.visible == {"fpu", "mmx", "syscall", "msr", "fpu_mirror", "mmx_mirror", "msr_mirror"}, profile.name
        assert made.table.get(0x80000001).edx == 0x00800821
    # On Intel's processors there are none, and AMX's are in a subleaf that only some have.
    assert guest(host_with("fpu"), EVERYTHING).visible == {"fpu"}
    amx = full_host(cpus.INTEL)
    assert "amx_int8_mirror" in guest(amx, EVERYTHING).visible
    first = HostDescription(amx.table.replace({(0x1E, 1): None, (0x1E, 0): Registers(0, 0x4010, 0, 0)}))
    made = guest(first, EVERYTHING)
    assert "amx_int8" in made.visible and "amx_int8_mirror" not in made.visible
    assert made.table.get(0x1E) == (0, 0x4010, 0, 0)


def test_vendors() -> None:
    hygon = host_with("cr8_legacy", "pni", vendor=cpus.HYGON)
    assert guest(hygon, EVERYTHING).visible == {"cr8_legacy"}
    assert guest(hygon, COMPAT).table.vendor == "HygonGenuine"
    nobody = host_with("cr8_legacy", "smep", vendor=cpus.NOBODY)
    assert guest(nobody, EVERYTHING).visible == {"smep"}
    with pytest.raises(BadInput, match="profile hyperv-r2"):
        guest(nobody, COMPAT)


# ------------------------------------------------------------------------------- hiding one feature hides all of it

# Where else than by its bit a feature is told of: leaf, subleaf (None: any), register, mask. Literal, as the manuals
# have it. What is not here are data of the host that say nothing certain: caches and TLBs (leaf 2 counts entries for
# 1 GiB pages), highest leaves, the topology leaves that are there without the x2APIC too.
ALL_BITS = 0xFFFFFFFF


def whole(leaf: int) -> list[tuple[int, int | None, str, int]]:
    return [(leaf, None, register, ALL_BITS) for register in ("eax", "ebx", "ecx", "edx")]


TOLD_OF = {
    "tsc": whole(0x15),
    "clflush": [(1, 0, "ebx", 0xFF00)],
    "hypervisor": whole(0x40000000) + whole(0x40000001),
    "xsave": whole(0xD),
    "avx": [(0xD, 0, "eax", 1 << 2), *whole(0x24), (0x8000001A, 0, "eax", 4)],
    "mpx": [(0xD, 0, "eax", 3 << 3), (7, 0, "ecx", 0x1F << 17)],
    "avx512f": [(0xD, 0, "eax", 7 << 5), *whole(0x24)],
    "pku": [(0xD, 0, "eax", 1 << 9), (7, 0, "ecx", 1 << 4)],
    "xsaves": [(0xD, 1, "ecx", ALL_BITS), (0xD, 0, "eax", 3 << 17), *whole(0x1D), *whole(0x1E)],
    "xfd": [(0xD, n, "ecx", 4) for n in range(2, 63)] + [(0xD, 0, "eax", 3 << 17)],
    "amx_tile": [(0xD, 0, "eax", 3 << 17), *whole(0x1D), *whole(0x1E)],
    "avx10": whole(0x24),
    "lm": [(0x80000008, 0, "eax", 0x1F00)],  # 32 linear bits are 0x20
    "la57": [(0x80000008, 0, "eax", 0x0900)],  # 48 of them 0x30, 57 0x39
    "pdpe1gb": whole(0x80000019),
    "sse": [(0x8000001A, 0, "eax", 3)],
    "topoext": whole(0x8000001D) + whole(0x8000001E),
    "eraps": [(0x80000021, 0, "ebx", ALL_BITS)],
}


def full_host(vendor: tuple[int, int, int]) -> HostDescription:
    """A processor with every feature that KVM gives guests of this vendor, and all that belongs to them."""
    ours = HostDescription(CpuidTable({(0, 0): Registers(0, *vendor)})).table.lineage
    host = host_with(*(f.name for f in FEATURES if f.vendor in ("any", ours)), vendor=vendor, max_basic=0x29)
    areas, end = {}, 576
    for n, c in COMPONENTS.items():
        if n >= 2:
            areas[n] = XsaveArea(c.size, 0 if c.supervisor else end, 3 if c.supervisor else 2)
            end += c.size
    for n in (9, 18):  # XFD can disable them
        areas[n] = areas[n]._replace(flags=6)
    instructions = host.table.get(0xD, 1).eax
    made = host.table.replace(xsave_leaf(areas, instructions, True))
    leaf1, leaf24, leaf21 = made.get(1), made.get(0x24), made.get(0x80000021)
    return HostDescription(
        made.replace(
            {
                (1, 0): leaf1._replace(eax=0x806F8, ebx=0x0800),
                (0x15, 0): Registers(2, 100, 25_000_000, 0),
                (0x1D, 0): Registers(1, 0, 0, 0),
                (0x1D, 1): Registers(0x04002000, 0x00080040, 16, 0),
                (0x1E, 0): Registers(1, 0x4010, 0, 0),
                (0x24, 0): leaf24._replace(eax=1, ebx=leaf24.ebx | 2),
                (0x80000000, 0): Registers(0x80000022, *vendor),
                (0x80000008, 0): made.get(0x80000008)._replace(eax=0x303934),
                (0x80000019, 0): Registers(0xF040F040, 0xF0400000, 0, 0),
                (0x8000001D, 0): Registers(0x121, 0x1C0003F, 0x3F, 0),
                (0x80000021, 0): leaf21._replace(ebx=0x00080000),
            }
        )
    )


def hides_all_of(host: HostDescription, visible: frozenset[str], name: str) -> None:
    """visible: what a guest sees there of which nothing is hidden."""
    made = guest(host, EVERYTHING._replace(hide=(name,)), vcpus=2)
    shown = made.table.features()
    gone = visible - shown
    assert gone >= {f for f in visible if f == name or name in all_requirements(f)}, name
    # What is hidden leaves nothing behind: neither what a manual says of it ...
    for feature in gone:
        for leaf, subleaf, register, mask in TOLD_OF.get(feature, []):
            for key, registers in made.table.entries.items():
                if key[0] == leaf and subleaf in (None, key[1]):
                    assert getattr(registers, register) & mask == 0, (name, feature, key, register)
    brought = {n for feature in shown for n in BY_NAME[feature].xsave}
    assert made.table.xcr0_mask | made.table.xss_mask == sum(1 << n for n in brought), name
    # ... nor anything that would not be so on a host that does not have it.
    without = host.table
    for feature in gone:
        word = BY_NAME[feature].word
        registers = without.get(word.leaf, word.subleaf)
        value = without.word(word) & ~BY_NAME[feature].mask
        without = without.replace({word[:2]: registers._replace(**{word.register: value})})
    assert guest(HostDescription(without), EVERYTHING, vcpus=2).table == made.table, name


@functools.cache
def all_requirements(name: str) -> set[str]:
    direct = BY_NAME[name].requires
    return {*direct, *(n for other in direct for n in all_requirements(other))}


@cpus.needs_processors
def test_a_hidden_feature_is_hidden_everywhere_on_real_processors() -> None:
    tried = set()
    for host in cpus.hosts().values():
        visible = guest(host, EVERYTHING, vcpus=2).visible
        for name in visible:
            if not (BY_NAME[name].mirrors or BY_NAME[name].topology):
                hides_all_of(host, visible, name)
                tried.add(name)
    assert len(tried) > 150


@pytest.mark.parametrize("vendor", [cpus.INTEL, cpus.AMD])
def test_a_hidden_feature_is_hidden_everywhere(vendor: tuple[int, int, int]) -> None:
    host = full_host(vendor)
    visible = guest(host, EVERYTHING, vcpus=2).visible
    assert {"avx10", "avx10_512", "avx512f", "la57", "clflush", "hypervisor"} <= visible
    assert ("amx_tile" in visible) == (vendor == cpus.INTEL) and ("eraps" in visible) == (vendor == cpus.AMD)
    for name in visible:
        if not (BY_NAME[name].mirrors or BY_NAME[name].topology):
            hides_all_of(host, visible, name)


def test_without_the_compacted_format_nothing_tells_of_it() -> None:
    """Two features bring it, so hiding either alone leaves it."""
    host = full_host(cpus.INTEL)
    for hide, compacts in ((("xsavec",), True), (("xsaves",), True), (("xsavec", "xsaves"), False)):
        table = guest(host, EVERYTHING._replace(hide=hide)).table
        assert any(area.aligned for area in table.xsave_areas().values()) == compacts, hide
        assert bool(table.get(0xD, 1).ebx) == compacts, hide


def test_what_tells_of_a_feature_is_there_while_it_is_shown() -> None:
    """Else the tests above could not fail."""
    met = set()
    for vendor in (cpus.INTEL, cpus.AMD):
        made = guest(full_host(vendor), EVERYTHING, vcpus=2)
        for name, places in TOLD_OF.items():
            for leaf, subleaf, register, mask in places:
                keys = [key for key in made.table.entries if key[0] == leaf and subleaf in (None, key[1])]
                if name in made.visible and any(getattr(made.table.get(*key), register) & mask for key in keys):
                    met.add(name)
    assert met == set(TOLD_OF)


# ------------------------------------------------------------------------------------------- on random input

names = st.sets(st.sampled_from([f.name for f in FEATURES]))
limits = st.builds(
    Limits,
    st.one_of(st.none(), st.integers(0, 0x24)),
    st.one_of(st.none(), st.just(0), st.integers(0x80000000, 0x80000024)),
    st.one_of(st.none(), st.integers(32, 52)),
    st.one_of(st.none(), st.just(64)),
)
random_profiles = st.one_of(
    st.builds(lambda hide: EVERYTHING._replace(hide=tuple(hide)), names),
    st.builds(lambda listed, limits, moves: allow(*listed, limits=limits, moving=moves), names, limits, st.booleans()),
    st.just(COMPAT),
)


@st.composite
def random_hosts(draw: st.DrawFn) -> HostDescription:
    """Random tables, tables of random features, and what KVM would make of either."""
    table = draw(st.one_of(cpus.tables(), st.builds(lambda chosen: host_with(*chosen, max_basic=0x24).table, names)))
    return draw(st.sampled_from([HostDescription, as_kvm_host]))(table)


@given(random_hosts(), random_profiles, st.integers(1, 255))
@settings(max_examples=150)
def test_rules_hold_for_any_host_and_profile(host: HostDescription, profile: Profile, vcpus: int) -> None:
    assume(host.table.lineage or profile.everything)
    limit = profile.limits(host.vendor).max_basic_leaf
    try:
        made = guest_table(host, profile, Topology(vcpus))
    except BadInput as error:
        assert vcpus > 64 and limit is not None and limit < 0xB and "has no leaf 0xb" in str(error)
        return
    table, offered = made.table, host.table
    shown = table.features()
    assert shown == made.visible

    allowed = profile.allowed(offered.vendor)
    for name in shown:
        feature = BY_NAME[name]
        if feature.topology:
            assert vcpus > 1
            continue
        assert name in allowed
        decided = feature.sense not in ("plain", "hint") and not profile.everything
        assert offered.has(feature) or decided or feature.mirrors in shown, name
        # Closed under requirements, and every state component has a place.
        assert shown >= set(feature.requires), name
        assert all(n < 2 or n in table.xsave_areas() for n in feature.xsave), name
        assert not feature.barred and not feature.dynamic
    # Everything that the host offers is accounted for.
    for name in offered.features() - shown:
        feature = BY_NAME[name]
        assert feature.mirrors or feature.topology or feature.dynamic or name in {row.name for row in made.hidden}
    assert not {row.name for row in made.hidden} & shown
    assert all(str(row) and row.reason.strip() for row in made.hidden)

    # No bit beyond the features, no leaf beyond the maxima, no zeros stored, no component that no feature brings.
    for word, features in WORDS.items():
        numbers = sum(n.shown(offered.word(word)) for n in NUMBERS if n.word == word and n.needs in shown)
        assert table.word(word) == sum(f.mask for f in features if f.name in shown) | numbers
    assert all(registers != (0, 0, 0, 0) for key, registers in table.entries.items() if key != (0, 0))
    for leaf, _ in table.entries:
        assert leaf <= table.max_basic or 0x40000000 <= leaf <= 0x40000001 or 0x80000000 <= leaf <= table.max_extended
    brought = {n for name in shown for n in BY_NAME[name].xsave}
    assert set(table.xsave_areas()) == brought - {0, 1}
    if "xsave" not in shown:
        assert not [key for key in table.entries if key[0] == 0xD]
    raised = vcpus > 64 and table.lineage != "amd" and table.max_basic == 0xB
    assert table.max_basic <= offered.max_basic or raised
    assert table.max_extended <= offered.max_extended
    assert table.physical_bits <= max(offered.physical_bits, 36)

    last = made.table_for(vcpus - 1)
    assert last.features() == shown
    assert last.entries.keys() >= table.entries.keys()


@given(random_hosts(), random_profiles)
def test_a_guest_of_a_guest_sees_the_same(host: HostDescription, profile: Profile) -> None:
    """Applying a profile twice hides nothing more: what is visible rests on nothing that is not."""
    assume(host.table.lineage or profile.everything)
    once = guest(host, profile)
    assume(once.table.get(0x40000000) != (0, 0, 0, 0) or "hypervisor" not in once.visible)
    assert guest(HostDescription(once.table), profile).visible == once.visible
