"""What guests can do with model-specific registers on real KVM. The guest `msrs` writes to all that let themselves be
written; see guest_images/msrs/msrs.c."""

from __future__ import annotations

import re
import threading
from functools import lru_cache
from pathlib import Path

import pytest

import pyhv
from pyhv.accel.kvm import Kvm
from pyhv.cpu import arch_capabilities, msrs
from pyhv.migration.source import Limits

PROFILES = ("host", "hyperv-r2")
LOST = re.compile(r"(msrs: (0x[0-9a-f]{8}) lost 0x[0-9a-f]{16}, reads (0x[0-9a-f]{16}))\n")
#: What the guest writes to IA32_SYSENTER_ESP and _EIP.
PATTERNS = {0x175: 0x5A5A12345678, 0x176: 0x5A5A12345678}
HELD = re.compile(r"msrs: (0x[0-9a-f]{8}) holds (0x[0-9a-f]{16})\n")

KVM_OWN = range(0x4B564D00, 0x4B564E00)
K7_COUNTERS = range(0xC0010000, 0xC0010008)


@lru_cache(maxsize=len(PROFILES))
def held(profile: str) -> tuple[dict[int, int], tuple[int, ...]]:
    """The MSRs in which a guest of this profile finds what it wrote, with that value; and those that travel."""
    with pyhv.Machine("msrs", cpu=profile, memory="4M", append="rounds=1") as machine:
        result = machine.run(timeout=300)
        console = result.console.decode()
        assert (result.cause, result.status) == ("guest-exit", 0), console[-500:] + result.message
        found = {int(number, 16): int(value, 16) for number, value in HELD.findall(console)}
        assert f"msrs: {len(found)} hold what was written\n" in console
        return found, msrs.granted(machine.vm.tables[0])


def test_every_msr_that_kvm_lists_travels_or_has_a_reason_not_to() -> None:
    listed = Kvm().msr_list()
    assert len(listed) > 30
    assert [hex(number) for number in listed if number not in msrs.BY_NUMBER and not msrs.why_not(number)] == []


@pytest.mark.parametrize("profile", PROFILES)
def test_what_a_guest_can_write_travels_or_has_a_reason_not_to(profile: str, vendor: str) -> None:
    found, travel = held(profile)
    assert len(found) > 130
    assert [hex(n) for n in found if n not in travel and not msrs.why_not(n)] == []
    # What was forgotten once: the scan sees it.
    assert {0x140, 0x1FC, 0x402, 0xC0010015, {"amd": 0xC0010114, "intel": 0x3A}[vendor]} <= found.keys()


def lost(console: str, vendor: str) -> list[str]:
    """What the guest has lost, but for what cpu/msrs.py says of SYSENTER: there kvm_amd keeps the lower half."""
    halves = {}
    if vendor == "amd":
        halves = {number: value & 0xFFFFFFFF for number, value in PATTERNS.items()}
    found = LOST.findall(console)
    return [line for line, number, now in found if halves.get(int(number, 16)) != int(now, 16)]


def go_on(machine: pyhv.Machine, rounds: int) -> str:
    """Lets the guest look at its MSRs so many times more; its console."""
    before = machine.console().count(b"round")
    for _ in range(3000):
        result = machine.run(0.1)
        assert result.cause == "timeout", result.console[-500:].decode() + result.message
        if result.console.count(b"round") >= before + rounds:
            return result.console.decode()
    raise AssertionError("the guest does not get on")


@pytest.mark.parametrize("profile", PROFILES)
def test_they_are_there_after_a_restore_and_after_a_migration(profile: str, vendor: str, tmp_path: Path) -> None:
    """The guest itself says what it has lost."""
    with pyhv.Machine("msrs", cpu=profile, memory="4M") as machine:
        assert len(HELD.findall(go_on(machine, 1))) > 130
        machine.save(str(tmp_path / "saved"))
    with pyhv.Machine.restore(str(tmp_path / "saved")) as machine:
        assert lost(go_on(machine, 2), vendor) == []

        address = f"unix:{tmp_path}/socket"
        arrived: list[pyhv.Machine] = []

        listening = threading.Event()

        def receive() -> None:
            arrived.append(pyhv.Machine.receive(address, on_listening=lambda _: listening.set()))
            arrived[0].start()

        target = threading.Thread(target=receive)
        target.start()
        machine.start()
        assert listening.wait(60)
        machine.migrate(address, limits=Limits(downtime=10.0, silence=10.0))
        target.join()
    with arrived[0] as moved:
        assert lost(go_on(moved, 2), vendor) == []
        # And were one not set, the guest would say so.
        state = moved.vm.capture()
        del state.vcpus[0].msrs[0x140]
        with pyhv.Machine("msrs", cpu=profile, memory="4M") as other:
            other.vm.memory.write(0, moved.vm.memory.read(0, moved.vm.memory.size))
            other.vm.apply(state)
            gone = "msrs: 0x00000140 lost 0x0000000000000001, reads 0x0000000000000000"
            assert lost(go_on(other, 2), vendor) == [gone]


@pytest.mark.parametrize("profile", PROFILES)
def test_a_paravirtual_msr_is_there_where_its_feature_is_visible(profile: str) -> None:
    found, travel = held(profile)
    there = {number for number in found if number in KVM_OWN}
    assert there <= set(travel)
    assert bool({0x4B564D03} & there) == (profile == "host"), "steal time, which compatibility mode hides"


@pytest.mark.parametrize("profile", PROFILES)
def test_there_are_no_performance_counters(profile: str) -> None:
    assert not [hex(number) for number in held(profile)[0] if number in K7_COUNTERS]


def test_arch_capabilities_are_told_where_the_vendor_has_them(vendor: str, tmp_path: Path) -> None:
    """And are the guest's own after a restore, whatever this host offers new guests."""
    offered = Kvm().feature_msrs()[0x10A]
    with pyhv.Machine("ticker", memory="4M", append="every=1") as machine:
        assert ("arch_capabilities" in machine.guest.visible) == (vendor == "intel")
        if vendor == "amd":
            assert 0x10A not in machine.vm.capture().vcpus[0].msrs
            return
        assert machine.vm.vcpus[0].read_msrs([0x10A]) == {0x10A: arch_capabilities.shown(offered, False)} != {0x10A: 0}
        machine.vm.vcpus[0].write_msrs({0x10A: 0})
        machine.run(0.1)
        machine.save(str(tmp_path / "saved"))
    with pyhv.Machine.restore(str(tmp_path / "saved")) as machine:
        assert machine.vm.vcpus[0].read_msrs([0x10A]) == {0x10A: 0}
