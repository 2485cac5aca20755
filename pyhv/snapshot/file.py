"""A VM's state and memory in one snapshot file: written, opened, judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pyhv.cpu import compare, policy, profiles
from pyhv.cpu.host import HostDescription
from pyhv.cpu.table import CpuidTable
from pyhv.errors import BadInput, Incompatible
from pyhv.snapshot.container import Ram, Reader, Writer
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
    state: MachineState
    tables: tuple[CpuidTable, ...]
    """The CPUID table of each vCPU."""

    def close(self) -> None:
        self.reader.close()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def begin(
    path: str, state: MachineState, memory: GuestMemory, progress: Callable[[int, int], None] | None = None
) -> Writer:
    """Writes state and memory of a paused VM to what will be the file at `path` when the caller commits the writer;
    the VM may run on before that. Raises BadInput, HostError; nothing is left behind then."""
    writer = Writer(path)
    try:
        writer.add(state.writer, mandatory=False)
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
        state = MachineState(
            writer=reader.optional(WriterRecord) or WriterRecord("", "", "", "", 0),
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
        return Snapshot(reader, state, state.tables(path))
    except BaseException:
        reader.close()
        raise


def reasons_against(snapshot: Snapshot, host: HostDescription, strict_tsc: bool = False) -> list[compare.Reason]:
    """Every reason why the guest cannot go on on this host."""
    return compare.problems(
        snapshot.tables[0],
        host,
        msrs={number for vcpu in snapshot.state.vcpus for number in vcpu.msrs},
        tsc_khz=snapshot.state.platform.tsc_khz,
        strict_tsc=strict_tsc,
    )


def notes_for(snapshot: Snapshot, host: HostDescription) -> list[str]:
    """What a user should know about the guest on this host though it is no reason against it."""
    khz = snapshot.state.platform.tsc_khz
    if not compare.tsc_differs(khz, host):
        return []
    rates = f"the guest's TSC will run at {host.tsc_khz} kHz instead of {khz}, which cannot be scaled here"
    return [f"{rates}; kvmclock is right, a guest that counts TSC cycles is not"]


def check_compatible(snapshot: Snapshot, host: HostDescription, strict_tsc: bool = False) -> None:
    """Raises Incompatible with every reason against running the guest on this host."""
    if reasons := reasons_against(snapshot, host, strict_tsc):
        raise Incompatible(snapshot.reader.path, "cannot run on this host", reasons)


def guest_cpu(snapshot: Snapshot, host: HostDescription) -> policy.GuestCpu:
    """The processor that the guest saw, as it will see it here.

    It hides something if its profile did, or if this host could show it more than it saw: then hiding must be proved.
    """
    table, machine = snapshot.tables[0], snapshot.state.machine
    topology = policy.Topology(len(snapshot.tables))
    visible = table.features()
    hides = machine.hides or not policy.guest_table(host, profiles.load("host"), topology).visible <= visible
    return policy.GuestCpu(machine.profile, topology, hides, table, visible, (), (), ())
