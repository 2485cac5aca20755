"""A VM's state and memory in one snapshot file: written, opened, judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pyhv.cpu import arch_capabilities, policy
from pyhv.cpu.table import CpuidTable
from pyhv.errors import BadInput
from pyhv.snapshot.container import Ram, Reader, Writer
from pyhv.state.needs import Needs
from pyhv.state.records import (
    RECORDS,
    DeviceRecord,
    MachineRecord,
    MachineState,
    PlatformRecord,
    VcpuRecord,
    WriterRecord,
)
from pyhv.vm.memory import GuestMemory


class Snapshot(NamedTuple):
    """An open snapshot of which everything but the memory has been checked. A context manager; close() closes it."""

    reader: Reader
    writer: WriterRecord
    state: MachineState
    tables: tuple[CpuidTable, ...]
    """The CPUID table of each vCPU."""

    @property
    def needs(self) -> Needs:
        """What the guest needs of a host."""
        machine, numbers = self.state.machine, {number for vcpu in self.state.vcpus for number in vcpu.msrs}
        khz = self.state.platform.tsc_khz
        capabilities = self.state.vcpus[0].msrs.get(arch_capabilities.IA32_ARCH_CAPABILITIES)
        return Needs(machine.profile, machine.hides, self.tables, frozenset(numbers), khz, capabilities)

    def close(self) -> None:
        self.reader.close()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def begin(
    path: str,
    record: WriterRecord,
    state: MachineState,
    memory: GuestMemory,
    progress: Callable[[int, int], None] | None = None,
) -> Writer:
    """Writes state and memory of a paused VM to what will be the file at `path` when the caller commits the writer;
    the VM may run on before that. record: who writes. Raises BadInput, HostError; nothing is left behind then."""
    writer = Writer(path)
    try:
        writer.add(record, mandatory=False)
        writer.add(state.machine)
        for number, vcpu in enumerate(state.vcpus):
            writer.add(vcpu, number)
        writer.add(state.platform)
        for number, device in enumerate(state.devices):
            writer.add(device, number)
        ram = memory.ram
        writer.write_memory(Ram(ram.fd, ram.size, ram.offset, ram.host, ram.of_a_file), progress)
    except BaseException:
        writer.close()
        raise
    return writer


def open_snapshot(path: str) -> Snapshot:
    """Opens a snapshot and checks all of it but its memory's content. Raises BadInput."""
    reader = Reader(path, RECORDS)
    try:
        writer = reader.optional(WriterRecord) or WriterRecord("", "", "", "", 0)
        state = MachineState(
            machine=reader.record(MachineRecord),
            vcpus=reader.records(VcpuRecord),
            platform=reader.record(PlatformRecord),
            devices=reader.records(DeviceRecord),
        )
        if not 1 <= len(state.vcpus) <= policy.MAX_VCPUS:
            raise BadInput(path, f"has {len(state.vcpus)} vCPUs")
        if state.machine.memory != reader.memory_size:
            problem = f"says {state.machine.memory} bytes of memory and has {reader.memory_size}"
            raise BadInput(path, problem, "use another copy of it")
        return Snapshot(reader, writer, state, state.tables(path))
    except BaseException:
        reader.close()
        raise
