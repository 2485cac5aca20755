"""HostDescription: its JSON is exact and not trusted; as_kvm_host() makes of a raw dump what KVM would offer."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhv.cpu import profiles
from pyhv.cpu.feature_types import Word
from pyhv.cpu.features import BY_NAME, FEATURES, NUMBERS, WORDS
from pyhv.cpu.host import HostDescription, Verdict, as_kvm_host
from pyhv.cpu.policy import Topology, guest_table
from pyhv.cpu.table import CpuidTable, Registers, XsaveArea
from pyhv.errors import BadInput
from pyhv.state.needs import Needs

from . import cpus

AVX, X2APIC = BY_NAME["avx"], BY_NAME["x2apic"]

VERDICT = Verdict(leaks={0: {AVX.word: AVX.mask | 1}, 3: {}}, ignored=frozenset({3}))
HOST = HostDescription(
    table=CpuidTable({(0, 0): Registers(1, *cpus.INTEL), (1, 0): Registers(0x306C3, 0x800, 0x80000000, 1)}),
    kernel="6.1.0-18-cloud-amd64",
    accelerator="kvm",
    feature_msrs={0x10A: 0xFFFFFFFFFFFFFFFF, 0x480: 0},
    msrs=(0x10, 0x174, 0xC0000080),
    tsc_khz=2_400_000,
    tsc_scaling=True,
    verdict=VERDICT,
)


def rewritten(host: HostDescription) -> HostDescription:
    return HostDescription.from_json(json.loads(json.dumps(host.to_json())))


def test_json_loses_nothing() -> None:
    assert rewritten(HOST) == HOST
    assert rewritten(HOST._replace(verdict=None)) == HOST._replace(verdict=None)
    assert rewritten(HostDescription(HOST.table)) == HostDescription(HOST.table)


@given(cpus.tables())
def test_json_of_any_table_loses_nothing(table: CpuidTable) -> None:
    assert rewritten(HostDescription(table)) == HostDescription(table)


def test_verdict() -> None:
    assert Verdict({0: {}, 3: {}}).faithful
    assert Verdict({0: {AVX.word: 0}, 3: {}}).faithful
    assert not Verdict({0: {AVX.word: 1}, 3: {}}).faithful
    assert not Verdict({0: {}, 3: {}}, frozenset({3})).faithful
    assert Verdict.from_json(json.loads(json.dumps(VERDICT.to_json())), "a") == VERDICT


GOOD = HOST.to_json()
LEAK = GOOD["verdict"]["leaks"]["0"][0]


def spoilt(field: str, value: Any) -> dict[str, Any]:
    """GOOD with one field (a.b for one inside another) replaced."""
    made = json.loads(json.dumps(GOOD))
    inner = made
    *path, last = field.split(".")
    for step in path:
        inner = inner[step]
    inner[last] = value
    return made


def without(field: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != field}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "no host description"),
        ([GOOD], "no host description"),
        ({}, 'no host description: "format" must be "pyhv-host/1"; pyhv host --json writes one'),
        (spoilt("format", "pyhv-host/9"), "no host description"),
        (without("kernel"), 'the field "kernel" is missing'),
        ({**GOOD, "colour": 1}, 'unknown field "colour"'),
        (spoilt("kernel", 6), "kernel must be a line of at most 256 characters"),
        (spoilt("kernel", "x" * 257), "kernel must be a line"),
        (spoilt("kernel", "6.1\n"), "kernel must be a line"),
        (spoilt("accelerator", None), "accelerator must be a line"),
        (spoilt("processor", "Another"), "processor contradicts the name in cpuid"),
        (spoilt("tsc_khz", 2.4e6), "tsc_khz must be a whole number from 0 to 4294967295"),
        (spoilt("tsc_khz", True), "tsc_khz must be a whole number"),
        (spoilt("tsc_khz", -1), "tsc_khz must be a whole number"),
        (spoilt("tsc_scaling", 1), "tsc_scaling must be true or false"),
        (spoilt("cpuid", []), "no CPUID table"),
        (spoilt("cpuid.entries", []), "leaf 0 is missing"),
        (spoilt("msrs", {}), "msrs must be a list"),
        (spoilt("msrs", ["0x1"] * 4097), "msrs has 4097 items, at most 4096"),
        (spoilt("msrs", ["0x10", 17]), r"msrs\[1\] must be a hexadecimal number"),
        (spoilt("feature_msrs", []), "feature_msrs must be an object"),
        (spoilt("feature_msrs", {"10": "0x0"}), "feature_msrs: '10' must be a hexadecimal number"),
        (spoilt("feature_msrs", {"0x10": "0x10000000000000000"}), "feature_msrs.0x10 .* at most 16 digits"),
        (spoilt("feature_msrs", {hex(n): "0x0" for n in range(4097)}), "feature_msrs has 4097 fields"),
        (spoilt("verdict", False), "verdict must be an object"),
        (spoilt("verdict", {}), 'verdict: the field "faithful" is missing'),
        (spoilt("verdict.faithful", True), "verdict.faithful contradicts the leaks"),
        (spoilt("verdict.ignored", [1]), "verdict.ignored: the privilege levels are 0 and 3"),
        (spoilt("verdict.ignored", [False]), "verdict.ignored: the privilege levels"),
        (spoilt("verdict.ignored", [3, 3, 3]), "verdict.ignored has 3 items"),
        (spoilt("verdict.leaks", {"1": []}), "verdict.leaks.1: the privilege levels are 0 and 3"),
        (spoilt("verdict.leaks", {"3": {}}), "verdict.leaks.3 must be a list"),
        (spoilt("verdict.leaks", {"3": [LEAK, LEAK]}), r"verdict.leaks.3\[1\] is there twice"),
        (spoilt("verdict.leaks", {"3": [{**LEAK, "register": "rax"}]}), r"verdict.leaks.3\[0\].register must be one"),
        (spoilt("verdict.leaks", {"3": [{**LEAK, "subleaf": "1"}]}), r"verdict.leaks.3\[0\].subleaf must be a whole"),
        (spoilt("verdict.leaks", {"3": [{**LEAK, "mask": 1}]}), r"verdict.leaks.3\[0\].mask must be a hexadecimal"),
        (spoilt("verdict.leaks", {"3": [{**LEAK, "bit": 1}]}), r'verdict.leaks.3\[0\]: unknown field "bit"'),
    ],
)
def test_json_is_not_trusted(value: object, problem: str) -> None:
    with pytest.raises(BadInput, match=problem) as caught:
        HostDescription.from_json(value, "a.json")
    assert caught.value.subject == "a.json"
    assert "\n" not in str(caught.value)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just("0x0")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)


@given(st.sampled_from([*GOOD, *(f"verdict.{name}" for name in GOOD["verdict"]), "verdict.leaks.0"]), json_values)
def test_any_damage_is_a_description_or_bad_input(field: str, value: object) -> None:
    with contextlib.suppress(BadInput):
        HostDescription.from_json(spoilt(field, value))


# ------------------------------------------------------------------------------------------------- as_kvm_host


# What KVM adds by the processor's kind, though its CPUID does not tell of it.
ADDED = {
    *("syscall", "umip", "pdpe1gb", "spec_ctrl", "intel_stibp", "spec_ctrl_ssbd", "amd_ibpb", "amd_ibrs", "amd_stibp"),
    *("amd_ssbd", "virt_ssbd", "amd_ssb_no", "amd_ibpb_ret", "lfence_rdtsc", "null_sel_clr_base", "verw_clear", "sbpb"),
    *("ibpb_brtype", "tsa_sq_no", "tsa_l1_no"),
}


def kvm_host(raw: CpuidTable) -> CpuidTable:
    return as_kvm_host(raw).table


@given(cpus.tables())
def test_each_feature_follows_its_kvm_column(raw: CpuidTable) -> None:
    made = kvm_host(raw)
    has, had = made.features(), raw.features()
    for feature in FEATURES:
        if feature.kvm == "never":
            assert feature.name not in has
        elif feature.kvm == "passes" and feature.name not in ADDED:
            assert feature.name not in has or feature.name in had, feature.name
    assert {"kvm_clocksource2", "kvm_clocksource_stable"} <= has


@given(cpus.tables())
def test_nothing_unknown_gets_through(raw: CpuidTable) -> None:
    made = kvm_host(raw)
    for word, features in WORDS.items():
        known = sum(f.mask for f in features) | sum(n.mask for n in NUMBERS if n.word == word)
        assert made.word(word) & ~known == 0, word
    assert made.max_basic <= 0x24
    assert made.max_extended <= 0x80000022
    for leaf in (3, 5, 9, 0xA, 0xB, 0xF, 0x10, 0x15, 0x1F, 0x23, 0x8000001E, 0x8000001F, 0x80000022, 0x80000026):
        assert made.get(leaf) == (0, 0, 0, 0)


@given(cpus.tables())
def test_apic_ids_are_neutral(raw: CpuidTable) -> None:
    made = kvm_host(raw)
    assert made.get(1).ebx >> 16 == 0
    assert made.get(0x80000008).ecx == 0


def test_what_kvm_provides() -> None:
    raw = CpuidTable({(0, 0): Registers(7, *cpus.INTEL), (7, 0): Registers(0, 0, 0, 0)})
    made = kvm_host(raw)
    assert made.features() >= {"x2apic", "tsc_deadline_timer", "hypervisor", "tsc_adjust", "arat", "kvm_steal_time"}
    assert made.get(0x40000000) == (0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D)
    assert made.get(6) == (4, 0, 0, 0)
    # Not in a leaf that the processor does not have.
    raw = raw.replace({(0, 0): raw.get(0)._replace(eax=5), (7, 0): None})
    assert "tsc_adjust" not in kvm_host(raw).features()
    assert "arat" not in kvm_host(raw).features()


def test_other_hypervisors_leaves_are_not_passed_on() -> None:
    raw = CpuidTable({(0, 0): Registers(1, *cpus.INTEL), (0x40000000, 0): Registers(0x4000000B, 1, 2, 3)})
    raw = raw.replace({(0x40000003, 0): Registers(1, 1, 1, 1), (0x40000100, 0): Registers(1, 1, 1, 1)})
    assert {leaf for leaf, _ in kvm_host(raw).entries if 0x40000000 <= leaf < 0x80000000} == {0x40000000, 0x40000001}


def test_syscall_of_a_dump_made_in_32_bit_mode() -> None:
    word = BY_NAME["syscall"].word
    extended = {
        (0x80000000, 0): Registers(0x80000008, 0, 0, 0),
        (0x80000001, 0): Registers(0, 0, 0, BY_NAME["lm"].mask),
    }
    intel = CpuidTable({(0, 0): Registers(1, *cpus.INTEL), **extended})
    amd = CpuidTable({(0, 0): Registers(1, *cpus.AMD), **extended})
    assert kvm_host(intel).word(word) & BY_NAME["syscall"].mask
    assert not kvm_host(amd).word(word) & BY_NAME["syscall"].mask
    without_lm = intel.replace({(0x80000001, 0): Registers(0, 0, 0, 0)})
    assert not kvm_host(without_lm).word(word)


def test_a_dump_tells_no_tsc_rate() -> None:
    """Leaf 0x15 would give one, and nothing gives what belongs to it: whether KVM can scale the guest's there."""
    raw = CpuidTable({(0, 0): Registers(0x16, *cpus.INTEL), (0x15, 0): Registers(2, 0xB2, 38_400_000, 0)})
    assert as_kvm_host(raw).tsc_khz == 0
    assert as_kvm_host(raw, tsc_khz=1).tsc_khz == 1


# What KVM offers on these processors though their CPUID does not tell of it: by kvm_set_cpu_caps() and what vmx.c and
# svm.c make of it in Linux 6.18, worked out by hand for each. (Intel's show SYSCALL to 64-bit programs.)
ADDED_ON = {
    "intel-merom-core2-x6800": "pdpe1gb",  # no EPT; no leaf 7
    "intel-penryn-xeon-e5462": "pdpe1gb",
    "intel-nehalem-core-i7-920": "umip",
    "intel-ivybridge-core-i7-3770k": "umip",
    "intel-skylake-core-i7-6700k": "umip amd_ibpb amd_ibrs amd_stibp amd_ssbd amd_ibpb_ret",  # IBRS by microcode
    "intel-rocketlake-core-i7-11700k": "amd_ibpb amd_ibrs amd_stibp amd_ssbd",  # has UMIP, and enhanced IBRS
    "intel-alderlake-core-i5-12400": "amd_ibpb amd_ibrs amd_stibp amd_ssbd",
    "intel-raptorlake-core-i7-14700k": "amd_ibpb amd_ibrs amd_stibp amd_ssbd",
    "amd-k8-opteron-2210-he": "amd_ssb_no pdpe1gb",  # no nested paging before K10
    "amd-k10-opteron-2431": "amd_ssb_no",
    "amd-bulldozer-opteron-6238": "lfence_rdtsc virt_ssbd tsa_sq_no tsa_l1_no",
    "amd-zen2-ryzen-3950x": "intel_stibp spec_ctrl_ssbd virt_ssbd lfence_rdtsc null_sel_clr_base ibpb_brtype tsa_sq_no "
    "tsa_l1_no",
    "amd-zen5-ryzen-9950x": "spec_ctrl intel_stibp spec_ctrl_ssbd virt_ssbd tsa_sq_no tsa_l1_no",
}


@cpus.needs_processors
@pytest.mark.parametrize("name", ADDED_ON)
def test_what_kvm_adds_by_the_processors_kind(name: str) -> None:
    raw, made = cpus.processors()[name].table.features(), cpus.hosts()[name].table.features()
    provided = {f.name for f in FEATURES if f.kvm == "provides"}
    assert made - raw - provided - {"syscall"} == set(ADDED_ON[name].split())


@cpus.needs_processors
def test_what_kvm_leaves_out_on_amds_processors() -> None:
    assert "bus_lock_detect" in cpus.processors()["amd-zen5-ryzen-9950x"].table.features()
    assert "bus_lock_detect" not in cpus.hosts()["amd-zen5-ryzen-9950x"].table.features()


@cpus.needs_processors
def test_nested_paging_is_known() -> None:
    without = {n for n, host in cpus.hosts().items() if not host.table.get(0x80000008).eax >> 16}
    old = {"intel-netburst-xeon-5060", "intel-merom-core2-x6800", "intel-penryn-xeon-e5462", "amd-k8-opteron-2210-he"}
    assert without == old


@cpus.needs_processors
@pytest.mark.parametrize("profile", ["host", "hyperv-r2"])
def test_a_guest_is_not_refused_where_it_comes_from(profile: str) -> None:
    """Nor where the kernel there is one that shows what only the newest one does not add by itself."""
    for name, dump in cpus.processors().items():
        home = as_kvm_host(dump.table, name=name)
        for vcpus in (1, 4):
            made = guest_table(home, profiles.load(profile), Topology(vcpus))
            tables = tuple(made.table_for(vcpu) for vcpu in range(vcpus))
            needs = Needs(profile, made.hides, tables, frozenset(), 3_000_000)
            assert needs.reasons_against(home, strict_tsc=True) == [], name


@cpus.needs_processors
def test_real_processors() -> None:
    hosts = cpus.hosts()
    for name, host in hosts.items():
        raw = cpus.processors()[name].table
        assert rewritten(host) == host
        assert host.processor == raw.brand and host.vendor == raw.vendor
        assert (host.physical_bits, host.linear_bits) == (raw.physical_bits, 48)
        assert {"x2apic", "hypervisor", "syscall", "lm", "nx", "cx16", "pni"} <= host.table.features(), name
        assert not {"osxsave", "ospke", "monitor", "ht", "est"} & host.table.features(), name
        assert host.kvm_features & 0x01000009 == 0x01000009

    zen5 = hosts["amd-zen5-ryzen-9950x"]
    assert set(zen5.xsave) == {2, 5, 6, 7, 9, 11, 12}
    assert zen5.xsave[9] == XsaveArea(8, 0x980, 0)
    assert zen5.table.get(0xD) == (0x2E7, 0x988, 0x988, 0)
    assert zen5.table.get(0x8000000A)[:2] == (1, 8)
    # KVM tells there what Zen does not: LFENCE serializes.
    assert hosts["amd-zen-ryzen-1800x"].table.max_extended == 0x80000021
    assert hosts["amd-k10-opteron-2431"].table.max_extended == 0x8000001B
    # Lightweight profiling is not for guests: neither is its state.
    assert set(hosts["amd-bulldozer-opteron-6238"].xsave) == {2}
    assert hosts["amd-bulldozer-opteron-6238"].table.get(0xD) == (7, 0x340, 0x340, 0)
    # Processor trace, hardware P-states and last branch records are no guest's, CET and PKU are.
    raptor_lake = hosts["intel-raptorlake-core-i7-14700k"]
    assert set(raptor_lake.xsave) == {2, 9, 11, 12}
    assert raptor_lake.tsc_khz == 0
    assert raptor_lake.table.word(Word(0x80000007, 0, "edx")) == BY_NAME["invtsc"].mask
