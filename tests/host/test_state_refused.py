"""States that a restore must refuse, by name, instead of going on with another value than the guest's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import pyhv
from pyhv.accel import choose
from pyhv.accel.engine import AccelVcpu
from pyhv.cpu import features, policy
from pyhv.cpu.arch_capabilities import CAPABILITIES, IA32_ARCH_CAPABILITIES
from pyhv.state.records import MachineState

from .emulator import require
from .test_snapshot_state import change_vcpu, forge


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "saved"
    with pyhv.Machine("ticker", append="every=1", memory="4M", accel="kvm") as machine:
        machine.run(0.1)
        machine.save(str(path))
    return path


def refused(saved: Path, change: Any) -> pyhv.PyhvError:
    """The error with which a snapshot that was changed is refused; nothing is left open."""
    files = len(os.listdir("/proc/self/fd"))
    forge(saved, saved.with_name("forged"), change)
    with pytest.raises(pyhv.PyhvError) as error:
        pyhv.Machine.restore(str(saved.with_name("forged")), accel="kvm").close()
    assert len(os.listdir("/proc/self/fd")) == files
    assert "\n" not in str(error.value)
    return error.value


@pytest.mark.parametrize("field, value", [("interrupt_vector", 0x141), ("nmi_masked", 256), ("smm", 2)])
def test_an_event_that_does_not_fit(saved: Path, field: str, value: int) -> None:
    def change(state: MachineState) -> MachineState:
        return change_vcpu(state, events=state.vcpus[0].events._replace(**{field: value}))

    error = refused(saved, change)
    assert isinstance(error, pyhv.BadInput)
    assert f"{field} is {value:#x}, at most " in str(error)


@pytest.mark.parametrize("number, name", [(0x8B, "of an unknown name"), (0x4B564D03, "KVM_STEAL_TIME")])
def test_an_msr_that_the_guest_does_not_have(tmp_path: Path, number: int, name: str) -> None:
    path = tmp_path / "saved"
    with pyhv.Machine("ticker", compat=True, append="every=1", memory="4M", accel="kvm") as machine:
        machine.save(str(path))
    error = refused(path, lambda state: change_vcpu(state, msrs=state.vcpus[0].msrs | {number: 1}))
    assert isinstance(error, pyhv.Incompatible)
    assert f"the state sets MSR {name} ({number:#x}), which the guest's CPUID table does not give it" in str(error)


@pytest.mark.parametrize("accel", ["kvm", "emulator"])
def test_an_msr_that_comes_without_having_been_announced(accel: str) -> None:
    """As from the source of a migration: the accelerator itself looks."""
    if accel == "emulator":
        require()
    options: Any = {"compat": True, "memory": "4M", "accel": accel}
    with pyhv.Machine("ticker", **options) as one, pyhv.Machine("ticker", **options) as other:
        state = one.vm.capture()
        state.vcpus[0].msrs[0x4B564D03] = 1
        named = r"vCPU 0 has no such MSR by its CPUID table: KVM_STEAL_TIME \(0x4b564d03\)"
        with pytest.raises(ValueError, match=named):
            other.vm.apply(state)


def told(value: int) -> Any:
    """The guest sees IA32_ARCH_CAPABILITIES, as those of older versions do on AMD hosts too, and reads this there."""
    bit = features.find("arch_capabilities")

    def change(state: MachineState) -> MachineState:
        (leaf7,) = [entry for entry in state.vcpus[0].cpuid if entry[:2] == (7, 0)]
        shown = (*leaf7[:6], leaf7[6] | bit.mask)
        cpuid = tuple([shown if entry == leaf7 else entry for entry in state.vcpus[0].cpuid])
        return change_vcpu(state, cpuid=cpuid, msrs=state.vcpus[0].msrs | {IA32_ARCH_CAPABILITIES: value})

    return change


@pytest.mark.usefixtures("faithful")  # another KVM may not let the guest have its own
def test_arch_capabilities_are_the_guests_and_compared(saved: Path) -> None:
    host = choose.open_accelerator("kvm").describe()
    offered = host.feature_msrs.get(IA32_ARCH_CAPABILITIES)
    if offered is None or "arch_capabilities" not in host.table.features():
        pytest.skip("this KVM does not have IA32_ARCH_CAPABILITIES")
    there = [c for c in CAPABILITIES if c.sense == "there"]
    lacking = next(c for c in there if not offered & c.mask)
    error = refused(saved, told(offered | lacking.mask))
    assert isinstance(error, pyhv.Incompatible)
    assert f"the host does not have {lacking.name}, of which the guest was told" in str(error)
    fewer = offered & ~next(c.mask for c in there if offered & c.mask)
    forge(saved, saved.with_name("fewer"), told(fewer))
    with pyhv.Machine.restore(str(saved.with_name("fewer")), accel="kvm") as machine:
        assert machine.vm.vcpus[0].read_msrs([IA32_ARCH_CAPABILITIES]) == {IA32_ARCH_CAPABILITIES: fewer}
        assert fewer != offered
        assert machine.vm.capture().vcpus[0].msrs[IA32_ARCH_CAPABILITIES] == fewer
        machine.run(0.05)
        assert machine.vm.capabilities == fewer


def test_arch_capabilities_are_set_when_a_guest_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not left as KVM offers them: there may be bits that nobody knows."""
    monkeypatch.setattr(policy, "_NOT_HERE", {})  # as on an Intel processor
    written: list[int] = []
    monkeypatch.setattr(AccelVcpu, "read_msrs", lambda vcpu, indices: {IA32_ARCH_CAPABILITIES: 1 << 0 | 1 << 50})
    monkeypatch.setattr(AccelVcpu, "write_msrs", lambda vcpu, values: written.extend(values.values()))
    with pyhv.Machine("hello", memory="4M", accel="kvm") as machine:
        if "arch_capabilities" not in machine.guest.visible:
            pytest.skip("this KVM does not have IA32_ARCH_CAPABILITIES")
        assert written == [1 << 0]


def test_the_rate_that_the_guest_began_with_stays_its_own(saved: Path) -> None:
    """Whatever this host counts at: another may have, or make, that rate."""

    def change(state: MachineState) -> MachineState:
        return state._replace(platform=state.platform._replace(tsc_khz=state.platform.tsc_khz + 1))

    forge(saved, saved.with_name("other"), change)
    with pyhv.Machine.restore(str(saved.with_name("other")), accel="kvm") as machine:
        khz = machine.vm.capture().tsc_khz
        machine.run(0.05)
        assert khz == machine.vm.tsc_khz == machine.vm.capture().tsc_khz != machine.host.tsc_khz
