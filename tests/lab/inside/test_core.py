"""The core's promises on real KVM: what guests read is what the policy computed, at every privilege level."""

from __future__ import annotations

import pytest

import pyhv
from pyhv._native import check, cpuid, ffi, lib, new_error
from pyhv.accel import choose, probe
from pyhv.accel.data import CpuidRecord
from pyhv.cpu import dumps, features, profiles
from pyhv.cpu.compare import problems
from pyhv.cpu.host import as_kvm_host
from pyhv.cpu.policy import Topology, guest_table
from pyhv.cpu.table import INDEXED_LEAVES, REGISTERS, CpuidTable, Registers

# The published list by leaf, register and bit (Hyper-V's processor compatibility mode, both vendors').
PUBLISHED = {
    "SSSE3": (1, "ecx", 9),
    "SSE4.1": (1, "ecx", 19),
    "SSE4.2": (1, "ecx", 20),
    "POPCNT": (1, "ecx", 23),
    "XSAVE": (1, "ecx", 26),
    "AVX": (1, "ecx", 28),
    "F16C": (1, "ecx", 29),
    "LZCNT": (0x80000001, "ecx", 5),
    "SSE4A": (0x80000001, "ecx", 6),
    "misaligned SSE": (0x80000001, "ecx", 7),
    "XOP": (0x80000001, "ecx", 11),
    "FMA4": (0x80000001, "ecx", 16),
    "3DNow! extensions": (0x80000001, "edx", 30),
    "3DNow!": (0x80000001, "edx", 31),
}

# What every generation shows in compatibility mode: literals, not the profile's own words.
KEPT = {
    "intel": {(1, "ecx"): 0x80202001, (0x80000001, "ecx"): 0x1, (0x80000001, "edx"): 0x20100800},
    "amd": {(1, "ecx"): 0x80202001, (0x80000001, "ecx"): 0x11, (0x80000001, "edx"): 0x21D3FBFF},
}
# Emulated processors lack VME (bit 1 of 1.EDX and of its mirror), which every real one has.
VME = 1 << 1
BASE_EDX = 0x078BFBFF


def run(image: str, **options: object) -> tuple[pyhv.RunResult, pyhv.Machine]:
    with pyhv.Machine(image, **options) as machine:  # type: ignore[arg-type]
        result = machine.run(timeout=300)
    assert (result.cause, result.status) == ("guest-exit", 0), result.message + result.registers
    return result, machine


def read_cpuid(**options: object) -> tuple[CpuidTable, pyhv.Machine]:
    result, machine = run("cpuid", **options)
    return dumps.parse(result.console.decode(), "guest"), machine


def answer(table: CpuidTable, leaf: int, subleaf: int) -> Registers:
    """What a processor with this table answers, by cpuid.c."""
    c_table, error = ffi.new("struct pyhv_cpuid_table *"), new_error()
    entries = table.as_entries()
    check(lib.pyhv_cpuid_table_init(c_table, entries, len(entries), error), error)
    dynamic, out = ffi.new("struct pyhv_cpuid_dynamic *", {"xcr0": 1, "apic_base": 1 << 11}), ffi.new("uint32_t[4]")
    lib.pyhv_cpuid_answer(c_table, dynamic, leaf, subleaf, out)
    return Registers(*out)


def differences(read: CpuidTable, table: CpuidTable) -> list[str]:
    """Every register in which what the guest read is not what the table answers."""
    found = []
    for leaf, subleaf in sorted({*read.entries, *table.entries}):
        for register in ("eax", "ebx", "ecx", "edx"):
            got, want = (getattr(r, register) for r in (read.get(leaf, subleaf), answer(table, leaf, subleaf)))
            if got != want:
                found.append(f"{leaf:#x}.{subleaf:#x} {register}: {got:#010x}, expected {want:#010x}")
    return found


def test_this_host_is_faithful() -> None:
    verdict = probe.verdict(choose.open_accelerator())
    assert verdict.faithful, verdict


@pytest.mark.parametrize("level", ["", "cpl3"])
@pytest.mark.parametrize("profile", profiles.names())
def test_a_guest_reads_exactly_its_table(profile: str, level: str) -> None:
    read, machine = read_cpuid(cpu=profile, append=level)
    assert machine.choice.intercept == "kernel"
    assert differences(read, machine.guest.table) == []
    if not level:
        leaf1 = read.get(1)
        planted = read.replace({(1, 0): leaf1._replace(edx=leaf1.edx ^ 1 << 26)})
        assert len(differences(planted, machine.guest.table)) == 1, "the comparison does not see one bit"


def dump_of_this_host() -> CpuidTable:
    """What the processor under this kernel answers, as `cpuid -r` would print it."""
    lines = []
    for first in (0, 0x80000000):
        for leaf in range(first, cpuid(first, 0)[0] + 1):
            for subleaf in range(64 if leaf in INDEXED_LEAVES else 1):
                values = " ".join(f"{name}=0x{v:08x}" for name, v in zip(REGISTERS, cpuid(leaf, subleaf), strict=True))
                lines.append(f"0x{leaf:08x} 0x{subleaf:02x}: {values}")
    few = [line for line in lines if not line.endswith("eax=0x00000000 ebx=0x00000000 ecx=0x00000000 edx=0x00000000")]
    return dumps.parse("CPU 0:\n" + "\n".join(few), "this host")


def test_a_dump_of_this_host_offers_what_kvm_offers_here() -> None:
    """So that pyhv check --on a dump refuses no guest that started on such a processor."""
    offered, of_dump = choose.open_accelerator().describe(), as_kvm_host(dump_of_this_host())
    lacking = offered.table.features() - of_dump.table.features()
    assert not [name for name in lacking if not features.BY_NAME[name].barred]  # the others no guest sees
    for profile in profiles.names():
        made = guest_table(offered, profiles.load(profile), Topology(1))
        assert problems(made.table, of_dump) == [], profile


def test_every_vcpu_has_its_own_apic_id() -> None:
    read, machine = read_cpuid(compat=True, cpus=4)
    assert differences(read, machine.guest.table) == []
    assert [machine.guest.table_for(i).get(1).ebx >> 24 for i in range(4)] == [0, 1, 2, 3]


def test_the_published_list_is_hidden_and_the_rest_is_kept(vendor: str, kind: str) -> None:
    read, _ = read_cpuid(compat=True, append="cpl3")
    for name, (leaf, register, bit) in PUBLISHED.items():
        assert not getattr(read.get(leaf), register) >> bit & 1, name
    kept = dict(KEPT[vendor])
    if kind == "amd-opteron-g1":  # lacks CMPXCHG16B, as no real processor with SVM does
        kept[1, "ecx"] &= ~(1 << 13)
    for (leaf, register), word in kept.items():
        assert getattr(read.get(leaf), register) | VME == word | VME, f"{leaf:#x} {register}"
    assert read.get(1).edx | VME == BASE_EDX
    others = [w for w in features.WORDS if (w.leaf, w.register) not in {*kept, (1, "edx")} and w.leaf != 0x40000001]
    assert [w for w in others if read.word(w)] == []


def test_trap_and_kernel_give_the_same_answers() -> None:
    for level in ("", "cpl3"):
        by_kernel, _ = run("cpuid", compat=True, intercept="kernel", append=level)
        by_trap, _ = run("cpuid", compat=True, intercept="trap", append=level)
        assert by_trap.console == by_kernel.console
        assert by_trap.counters["cpuid_answered"] > 10
        assert by_kernel.counters["cpuid_answered"] == 0


def test_stepping_gives_the_same_answers() -> None:
    with pyhv.Machine("refuse", intercept="kernel") as machine:
        by_kernel = machine.run(timeout=300)
    records: list[CpuidRecord] = []
    with pyhv.Machine("refuse", on_cpuid=records.append) as machine:
        machine.vm.vcpus[0].trap(machine.guest.table, (), 64)
        by_steps = machine.run(timeout=300)
    assert (by_steps.console, by_steps.status) == (by_kernel.console, by_kernel.status)
    assert [r.leaf for r in records] and {r.rip for r in records} == set(machine.image.cpuid_sites)


def test_the_program_that_does_not_adapt_refuses() -> None:
    with pyhv.Machine("refuse", compat=True) as machine:
        result = machine.run(timeout=300)
    assert (result.status, result.console) == (42, b"refuse: this program needs SSE4.2\n")


def test_the_program_that_adapts_takes_the_baseline() -> None:
    result, _ = run("dispatch", compat=True)
    assert b"path baseline" in result.console
    result, machine = run("dispatch")
    best = next(name for name in ("erms", "sse4_2", "popcnt", "") if name in machine.guest.visible or not name)
    path = {"erms": b"erms", "sse4_2": b"sse4.2", "popcnt": b"popcnt", "": b"baseline"}[best]
    assert b"path " + path in result.console


def test_state_written_back_is_unchanged() -> None:
    """A vCPU's state, taken, put into another VM and taken again: all is there, but for time, which goes on."""
    with pyhv.Machine("ticker", compat=True, append="every=100", memory="4M") as first:
        assert first.run(timeout=0.5).cause == "timeout"
        before = first.vm.capture()
        with pyhv.Machine("ticker", compat=True, append="every=100", memory="4M") as second:
            second.vm.apply(before)
            after = second.vm.capture()
            tsc = 0x10
            assert after.vcpus[0].msrs.pop(tsc) >= before.vcpus[0].msrs.pop(tsc)
            assert after.vcpus == before.vcpus
            assert after.irqchip == before.irqchip
            assert after.clock >= before.clock
            planted = after.vcpus[0]._replace(regs=after.vcpus[0].regs._replace(r11=after.vcpus[0].regs.r11 ^ 1))
            assert planted != before.vcpus[0], "the comparison does not see one register"


def test_hidden_is_not_blocked(kind: str, vendor: str, record_property: object) -> None:
    """What runs although it is hidden, and what truly faults (docs/hidden-is-not-blocked.md has the table)."""
    result, machine = run("instructions", compat=True)
    rows = [line.split(" ", 2) for line in result.console.decode().splitlines()]
    outcome = {name: (shown, became) for name, shown, became in rows}
    assert all(shown == "hidden" for shown, _ in outcome.values()), outcome
    has = machine.host.table.features()
    # Without XSAVE in CPUID KVM refuses CR4.OSXSAVE, so nothing that rests on it can run.
    assert outcome["cr4.osxsave"][1] == "#GP"
    for name in ("xsave", "xcr0.avx", "avx", "f16c", "fma", "avx2"):
        assert outcome[name][1] == "#UD", (name, outcome[name])
    for bit in ("umip", "fsgsbase", "pcide", "smep", "smap", "pke"):
        assert outcome[f"cr4.{bit}"][1] == "#GP", (bit, outcome[f"cr4.{bit}"])
    # These have no switch: they run where the processor has them, and fault where it has not.
    for name in ("ssse3", "sse4_1", "sse4_2", "popcnt"):
        assert outcome[name][1] == ("runs" if name in has else "#UD"), (name, outcome[name])
    assert outcome["abm"][1] == ("runs" if "abm" in has else "runs as BSR")
    record_property("instructions", result.console.decode())  # type: ignore[operator]
