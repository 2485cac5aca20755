"""The contract between pyhv and whatever executes a guest's instructions.

An accelerator offers a processor (describe) and makes VMs; a VM takes memory and makes vCPUs; a vCPU runs until
something stops it. The types here are the accelerators' common language, so that devices, memory, results and state
look the same under each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.accel.state import ProcessorsState
    from pyhv.cpu.host import HostDescription
    from pyhv.cpu.table import CpuidTable


class Stop(IntEnum):
    """Why a vCPU's run came back (enum pyhv_stop in csrc/pyhv.h, which explains each)."""

    KICKED = 1
    GUEST_EXIT = 2
    RESET = 3
    POWER_OFF = 4
    HALTED = 5
    TRIPLE_FAULT = 6
    DEBUG = 7
    INTERNAL_ERROR = 8
    FAIL_ENTRY = 9
    SYSTEM_EVENT = 10
    UNHANDLED = 11
    FAILED = 12
    TRAP_LOG_FULL = 13
    TRAP_LOST = 14


class Exit(NamedTuple):
    """What stopped a vCPU (struct pyhv_exit)."""

    stop: Stop
    exit_reason: int
    """The accelerator's own number of the last exit (KVM_EXIT_*)."""
    status: int
    """With GUEST_EXIT: the byte that the guest wrote."""
    suberror: int
    hardware_reason: int
    rip: int
    """Linear address where the vCPU stands."""
    data: tuple[int, ...]
    instruction: bytes
    """The guest's memory at rip, up to 16 bytes; empty where it cannot be read."""
    error: str
    """With FAILED: the system call and what it said."""


class Regs(NamedTuple):
    """General registers, RIP and RFLAGS."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2


class Segment(NamedTuple):
    """A segment register with its hidden part; `attributes` as in struct pyhv_segment."""

    selector: int
    base: int
    limit: int
    attributes: int


class Sregs(NamedTuple):
    """Segment, descriptor-table and control registers."""

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt_base: int
    gdt_limit: int
    idt_base: int
    idt_limit: int
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int
    pdptrs: tuple[int, ...]
    """The four page-directory-pointer entries that the processor holds in PAE paging outside long mode."""
    pdptrs_valid: int


class CpuidRecord(NamedTuple):
    """One CPUID instruction that `trap` answered."""

    vcpu: int
    rip: int
    """Linear address of the instruction."""
    cpl: int
    leaf: int
    subleaf: int
    hardware: tuple[int, int, int, int]
    """EAX, EBX, ECX, EDX as this host's processor answers."""
    guest: tuple[int, int, int, int]
    """EAX, EBX, ECX, EDX as the guest got them."""


class AccelVcpu(Protocol):
    """One virtual processor. Used by one thread at a time, except kick()."""

    index: int

    def set_cpuid(self, table: CpuidTable) -> None:
        """What CPUID answers from now on. Once, before the first run. Raises HostError."""

    def get_cpuid(self) -> CpuidTable:
        """What the accelerator says that CPUID answers: not always what was set. Raises HostError."""

    def get_regs(self) -> Regs: ...

    def set_regs(self, regs: Regs) -> None: ...

    def get_sregs(self) -> Sregs: ...

    def set_sregs(self, sregs: Sregs) -> None: ...

    def read_tsc_khz(self) -> int:
        """The rate of the guest's time-stamp counter in kHz."""

    def trap(self, table: CpuidTable, sites: Sequence[int], log_capacity: int = 0) -> None:
        """Answer CPUID from `table` by stopping in front of each: at the linear addresses `sites`, or, where that is
        empty, by stepping. The first `log_capacity` answers are kept for trap_log(). Once, before the first run."""

    def trap_log(self) -> list[CpuidRecord]:
        """Takes the records out of the log, oldest first."""

    def run(self) -> Exit:
        """Runs until something stops the vCPU; one long call into C without the GIL."""

    def step(self) -> Exit:
        """Executes one instruction: Exit.stop is DEBUG, or what else the instruction caused."""

    def kick(self) -> None:
        """Makes the current or the next run() return KICKED. Any thread."""

    def waits_for_ever(self) -> bool:
        """True if the vCPU is halted with interrupts off, or was never started: only another vCPU can wake it."""

    def counters(self) -> dict[str, int]:
        """How many exits of each kind there were (struct pyhv_counters)."""

    def close(self) -> None: ...


class AccelVm(Protocol):
    """One virtual machine: memory and vCPUs."""

    def map(self, gpa: int, size: int, host: Any) -> None:
        """Gives `size` bytes of this process at `host` (uint8_t *) to the guest at `gpa`. Raises HostError."""

    def create_vcpu(self, index: int) -> AccelVcpu:
        """The vCPU with APIC id `index`; index 0 boots, the others wait for INIT and SIPI. Raises HostError."""

    def capture(self, vcpus: Sequence[AccelVcpu], tables: Sequence[CpuidTable]) -> ProcessorsState:
        """The state of all its vCPUs, which stand, and of what they share. tables: what their CPUID answers. Raises
        HostError."""

    def apply(self, vcpus: Sequence[AccelVcpu], tables: Sequence[CpuidTable], state: ProcessorsState) -> None:
        """Puts a state into vCPUs that have their tables and memory and have never run. Raises HostError; the VM is
        then good for nothing but close()."""

    def close(self) -> None:
        """After its vCPUs."""


class Accelerator(Protocol):
    """Something that executes guest instructions."""

    name: str
    max_vcpus: int

    def describe(self) -> HostDescription:
        """The processor that it offers to guests. Raises HostError."""

    def create_vm(self, bus: Any = None, irqchip: bool = True) -> AccelVm:
        """A VM whose port accesses go to `bus` (struct pyhv_bus *). Without `irqchip` HLT ends a run. Raises
        HostError."""

    def explain(self, exit: Exit) -> str:
        """One clause for a person about an exit of a kind that only this accelerator knows."""

    def close(self) -> None: ...
