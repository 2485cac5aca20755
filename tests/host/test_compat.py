"""Compatibility mode: what the guest read, not what was asked for."""

from __future__ import annotations

import pytest

import pyhv
from pyhv._native import check, ffi, lib, new_error
from pyhv.accel import choose, probe
from pyhv.accel.data import CpuidRecord
from pyhv.accel.protocol import Accelerator
from pyhv.cpu import dumps, features
from pyhv.cpu.host import Verdict
from pyhv.cpu.table import CpuidTable, Registers

from .conftest import run

# The published list (Hyper-V's documentation of processor compatibility mode; bit by bit: leaf, register, bit).
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


def answer(table: CpuidTable, leaf: int, subleaf: int) -> Registers:
    """What a processor with this table answers, by cpuid.c: more than what the table holds (leaf 0xB's last level)."""
    c_table, error = ffi.new("struct pyhv_cpuid_table *"), new_error()
    entries = table.as_entries()
    check(lib.pyhv_cpuid_table_init(c_table, entries, len(entries), error), error)
    dynamic, out = ffi.new("struct pyhv_cpuid_dynamic *", {"xcr0": 1, "apic_base": 1 << 11}), ffi.new("uint32_t[4]")
    lib.pyhv_cpuid_answer(c_table, dynamic, leaf, subleaf, out)
    return Registers(*out)


def differences(read: CpuidTable, expected: CpuidTable) -> list[str]:
    """Every register of every leaf in which what the guest read is not what the policy computed."""
    # Bits that follow the vCPU's state: OSXSAVE and OSPKE; leaf 0xD's sizes follow XCR0.
    dynamic = {(f.word.leaf, f.word.subleaf, f.word.register): 1 << f.bit for f in features.FEATURES if f.dynamic}
    found = []
    for leaf, subleaf in sorted({*read.entries, *expected.entries}):
        for register in ("eax", "ebx", "ecx", "edx"):
            ignore = dynamic.get((leaf, subleaf, register), 0)
            if (leaf, register) == (0xD, "ebx") and subleaf < 2:
                ignore = 0xFFFFFFFF
            got = getattr(read.get(leaf, subleaf), register) & ~ignore
            want = getattr(answer(expected, leaf, subleaf), register) & ~ignore
            if got != want:
                found.append(f"{leaf:#x}.{subleaf:#x} {register}: {got:#010x}, expected {want:#010x}")
    return found


def read_cpuid(machine: pyhv.Machine) -> CpuidTable:
    result = machine.run(60)
    assert (result.cause, result.status) == ("guest-exit", 0), result.message
    return dumps.parse(result.console.decode(), "guest")


@pytest.mark.parametrize("cpus", [1, 4])
def test_the_guest_reads_exactly_the_table(cpus: int) -> None:
    with pyhv.Machine("cpuid", compat=True, cpus=cpus) as machine:
        read = read_cpuid(machine)
        assert differences(read, machine.guest.table) == []


def test_the_comparison_notices_one_bit() -> None:
    with pyhv.Machine("cpuid", compat=True) as machine:
        read = read_cpuid(machine)
        leaf1 = read.get(1)
        changed = read.replace({(1, 0): leaf1._replace(ecx=leaf1.ecx | 1 << 9)})
        assert differences(changed, machine.guest.table) == [
            f"0x1.0x0 ecx: {leaf1.ecx | 1 << 9:#010x}, expected {leaf1.ecx:#010x}"
        ]


def test_the_published_list_is_hidden_and_what_is_kept_is_there() -> None:
    with pyhv.Machine("cpuid", compat=True) as machine:
        read = read_cpuid(machine)
    for name, (leaf, register, bit) in PUBLISHED.items():
        assert not getattr(read.get(leaf), register) >> bit & 1, name
    # The profile's words (kvm-facts of both vendors), less what this host does not offer at all.
    offered = machine.host.table
    assert read.get(1).ecx == 0x80202001 & offered.get(1).ecx
    assert read.get(1).edx | 0x200 == 0x078BFBFF & offered.get(1).edx | 0x200
    extended = 0x20100800 if offered.lineage == "intel" else 0x21D3FBFF
    assert read.get(0x80000001).edx == extended & offered.get(0x80000001).edx
    assert read.get(1).edx & 0x07808111 == 0x07808111, "what 64-bit code rests on is missing"


def test_without_compat_the_guest_sees_more() -> None:
    with pyhv.Machine("cpuid") as plain, pyhv.Machine("cpuid", compat=True) as compat:
        assert read_cpuid(compat).features() < read_cpuid(plain).features()


def test_at_cpl_3_too(faithful: None) -> None:
    with pyhv.Machine("cpuid", compat=True, append="cpl3") as machine:
        assert machine.choice.intercept == "kernel"
        assert differences(read_cpuid(machine), machine.guest.table) == []


def test_a_guest_that_goes_to_cpl_3_is_refused_where_that_cannot_be_hidden(unfaithful: None) -> None:
    with pytest.raises(pyhv.NotFaithful, match="CPL 3") as refusal:
        pyhv.Machine("cpuid", accel="kvm", compat=True, append="cpl3")
    assert "avx" in refusal.value.leaks
    assert "choices: " in str(refusal.value)


def test_kernel_is_refused_with_the_features_where_it_does_not_hide(unfaithful: None) -> None:
    with pytest.raises(pyhv.NotFaithful) as refusal:
        pyhv.Machine("cpuid", compat=True, intercept="kernel")
    assert {"ssse3", "sse4_1", "popcnt", "avx"} <= set(refusal.value.leaks)


def test_the_probe_agrees_with_what_a_guest_reads(unfaithful: None, accelerator: Accelerator) -> None:
    """The host profile with an explicit trap-less run shows the forced bits: the probe found just those."""
    verdict = probe.verdict(accelerator)
    with pyhv.Machine("cpuid") as machine:
        read = read_cpuid(machine)
        leaks = set(choose.leaking_features(verdict, machine.guest, 0))
        shown = {n for n in read.features() - machine.guest.table.features() if features.find(n).sense == "plain"}
        assert shown - {"osxsave", "ospke"} <= leaks


def test_the_program_that_adapts() -> None:
    result = run("dispatch", compat=True)
    assert (result.cause, result.status) == ("guest-exit", 0)
    assert b"baseline" in result.console and b" ok" in result.console


def test_the_program_that_does_not() -> None:
    result = run("refuse", compat=True)
    assert (result.cause, result.status) == ("guest-exit", 42)
    assert result.console == b"refuse: this program needs SSE4.2\n"


def test_ticker_sees_nothing_change() -> None:
    result = run("ticker", compat=True, append="rounds=3", memory="4M")
    assert (result.cause, result.status) == ("guest-exit", 0), result.console


@pytest.mark.parametrize("image", ["hello", "refuse", "dispatch"])
def test_stepping_gives_the_same_output_as_breakpoints(image: str) -> None:
    def result(sites: bool) -> pyhv.RunResult:
        with pyhv.Machine(image, compat=True, intercept="trap", memory="4M") as machine:
            if not sites:
                machine.vm.vcpus[0].trap(machine.guest.table, ())
            return machine.run(60)

    stepped, stopped = result(sites=False), result(sites=True)
    assert (stepped.console, stepped.status) == (stopped.console, stopped.status)
    assert stepped.counters["cpuid_answered"] == stopped.counters["cpuid_answered"]
    assert stepped.counters["traps"] > stopped.counters["traps"]


def test_each_cpuid_is_recorded() -> None:
    records: list[CpuidRecord] = []
    with pyhv.Machine("cpuid", compat=True, on_cpuid=records.append) as machine:
        read = read_cpuid(machine)
    assert {r.rip for r in records} == set(machine.image.cpuid_sites)
    assert {(r.leaf, r.subleaf) for r in records} >= set(read.entries)
    leaf1 = next(r for r in records if r.leaf == 1)
    assert leaf1.guest[2] == read.get(1).ecx
    assert leaf1.hardware[0] == leaf1.guest[0]


def test_one_verdict_a_process(monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator) -> None:
    first = probe.verdict(accelerator)
    monkeypatch.setattr(probe, "_probe", lambda _: pytest.fail("probed twice"))
    assert probe.verdict(accelerator) is first


def test_the_probe_notices_a_table_that_hides_less(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the vCPU is given a table that shows LZCNT, which the probe's own table hides."""
    from pyhv.accel.engine import AccelVcpu

    lzcnt = features.find("lzcnt")
    table = probe.least_table()
    assert lzcnt.word not in probe.verdict(accelerator).leaks[0]
    more = table.replace({(0x80000001, 0): table.get(0x80000001)._replace(ecx=1 << lzcnt.bit)})
    real = AccelVcpu.set_cpuid
    monkeypatch.setattr(AccelVcpu, "set_cpuid", lambda self, _: real(self, more))
    found: Verdict = probe._probe(accelerator)
    assert found.leaks[0][lzcnt.word] == 1 << lzcnt.bit
    assert not found.faithful
