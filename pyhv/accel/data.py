"""The accelerators' common language: registers, what stopped a vCPU, what CPUID answered.

Under each accelerator these look the same, and so do devices, memory, results and state, which are made of them.
"""

from __future__ import annotations

from pyhv.light import IntEnum, NamedTuple


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
    PANIC = 15
    TRAP_EVENT = 16


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
    """With FAILED: the system call and what it said. With INTERNAL_ERROR: what cannot be done, or ""."""


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
