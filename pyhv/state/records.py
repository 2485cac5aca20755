"""The records that make up a VM's state.

What an accelerator holds of the processors is in accel/state.py; here it joins what pyhv itself knows of the VM.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pyhv.accel.data import Regs, Sregs
from pyhv.accel.state import DebugRegs, Events, Irqchip, ProcessorsState, RawState, VcpuState
from pyhv.cpu.table import CpuidTable
from pyhv.errors import BadInput
from pyhv.state.codec import record
from pyhv.state.schema import U8, U32, U64, Length

# struct pyhv_cpuid_entry: leaf, subleaf, whether ECX selects it, EAX, EBX, ECX, EDX.
CpuidEntry = tuple[U32, U32, U8, U32, U32, U32, U32]


@record("writer", 1)
class WriterRecord(NamedTuple):
    """Who wrote the state, for people; nothing depends on it."""

    pyhv: str
    processor: str
    kernel: str
    accelerator: str
    time: U64
    """Seconds since 1970."""


@record("machine", 1)
class MachineRecord(NamedTuple):
    """What the VM is."""

    uuid: str
    image: str
    """The guest's image as the user named it: for people."""
    command_line: str
    profile: str
    hides: bool
    """Whether the profile hides anything."""
    memory: U64
    """Bytes of RAM."""
    cpuid_sites: Annotated[tuple[U64, ...], Length(0, 4)]
    """Where all the guest's CPUID instructions are, if its image declares them."""
    enters_user_mode: bool
    """Whether the guest may execute CPUID at CPL 3."""


@record("vcpu", 1)
class VcpuRecord(NamedTuple):
    """One vCPU: what it is (its CPUID table) and where it stands."""

    cpuid: Annotated[tuple[CpuidEntry, ...], Length(1, 256)]
    regs: Regs
    sregs: Sregs
    xcr0: U64
    xsave: Annotated[bytes, Length(0, 16384)]
    msrs: Annotated[dict[U32, U64], Length(0, 512)]
    lapic: Annotated[bytes, Length(0, 1024)]
    events: Events
    debugregs: DebugRegs
    mp_state: U32


@record("platform", 1)
class PlatformRecord(NamedTuple):
    """What the vCPUs share: interrupt controllers, timer, clock."""

    irqchip: Irqchip | None
    clock: U64
    """kvmclock in nanoseconds."""
    tsc_khz: U32


@record("device", 1)
class DeviceRecord(NamedTuple):
    """A device of ours; its file in csrc/devices documents the bytes."""

    name: str
    state: Annotated[bytes, Length(1, 8192)]


RECORDS = (WriterRecord, MachineRecord, VcpuRecord, PlatformRecord, DeviceRecord)


class MachineState(NamedTuple):
    """All of a VM's state but its memory."""

    machine: MachineRecord
    vcpus: tuple[VcpuRecord, ...]
    platform: PlatformRecord
    devices: tuple[DeviceRecord, ...]

    def tables(self, where: str) -> tuple[CpuidTable, ...]:
        """Each vCPU's CPUID table. where: what errors call this state. Raises BadInput for one that makes no sense."""
        tables = []
        for number, vcpu in enumerate(self.vcpus):
            try:
                tables.append(CpuidTable.from_entries(vcpu.cpuid))
            except BadInput as error:
                raise BadInput(f"{where}: vcpu[{number}].cpuid", error.problem) from None
        return tuple(tables)

    def processors(self) -> ProcessorsState:
        """The part that the accelerator takes."""
        vcpus = tuple(VcpuState(number, *vcpu[1:]) for number, vcpu in enumerate(self.vcpus))
        return ProcessorsState(vcpus, *self.platform)


class RawMachine(NamedTuple):
    """The same as a migration carries it, whose two sides have agreed on the machine and its tables before."""

    processors: RawState
    devices: tuple[DeviceRecord, ...]
