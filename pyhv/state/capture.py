"""From a paused VM to records, and from records into a VM that has never run."""

from __future__ import annotations

import time
from collections.abc import Callable

from pyhv.cpu.host import HostDescription
from pyhv.errors import BadInput
from pyhv.state.records import (
    DeviceRecord,
    MachineRecord,
    MachineState,
    PlatformRecord,
    RawMachine,
    VcpuRecord,
    WriterRecord,
)
from pyhv.version import VERSION
from pyhv.vm.vm import Vm


def writer(host: HostDescription) -> WriterRecord:
    """This process, on this host, now."""
    return WriterRecord(VERSION, host.processor, host.kernel, host.accelerator, int(time.time()))


def capture(vm: Vm, machine: MachineRecord) -> MachineState:
    """All of a paused VM's state but its memory. machine: what its owner knows of it. Raises HostError."""
    processors = vm.capture()
    vcpus = tuple(
        VcpuRecord(tuple(table.as_entries()), *vcpu[1:])
        for table, vcpu in zip(vm.tables, processors.vcpus, strict=True)
    )
    return MachineState(machine, vcpus, PlatformRecord(*processors[1:]), _devices(vm))


def capture_raw(vm: Vm) -> RawMachine:
    """The same as a migration carries it. Raises HostError."""
    return RawMachine(vm.capture_raw(), _devices(vm))


def _devices(vm: Vm) -> tuple[DeviceRecord, ...]:
    return tuple([DeviceRecord(name, state) for name, state in vm.devices.save().items()])


def apply(vm: Vm, state: MachineState, where: str) -> None:
    """Puts the state into a VM that has the state's tables and memory and has never run. where: what errors call it.

    Raises BadInput for a state that no VM can have, HostError for what the host refuses; the VM is then good for
    nothing but close().
    """
    _put(vm, lambda: vm.apply(state.processors()), state.devices, where, 0)


def apply_raw(vm: Vm, state: RawMachine, where: str, elapsed: int = 0) -> None:
    """The same. elapsed: nanoseconds that have passed for the guest since its state was taken."""
    _put(vm, lambda: vm.apply_raw(state.processors, elapsed), state.devices, where, elapsed)


def _put(
    vm: Vm, put_processors: Callable[[], None], devices: tuple[DeviceRecord, ...], where: str, elapsed: int
) -> None:
    states = {device.name: device.state for device in devices}
    if len(states) != len(devices):
        raise BadInput(where, "has two states of one device")
    vm.devices.load(states, elapsed)
    try:
        put_processors()
    except (OverflowError, IndexError, TypeError, ValueError) as error:
        # The codec knows types and ranges; that a field of the C engine is narrower still shows here.
        raise BadInput(where, f"holds a state that no VM can have: {error}") from None
