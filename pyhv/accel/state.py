"""A VM's processors as data: what every accelerator can hand out and take back.

The fields are pyhv's own names for architectural state (SDM Vol. 3, APM Vol. 2), not an accelerator's structures, so
that a snapshot written under one accelerator or kernel can be read under another. Integers are unsigned unless said
otherwise; the classes' order of fields is the order in which they are written.

RawState is the same as the engine's structures (csrc/pyhv.h), which are the same under every accelerator: the form in
which accelerators hand it out, and in which a migration carries it, for a guest stands and waits. structs.py makes each
of the other.
"""

from __future__ import annotations

from typing import NamedTuple

from pyhv.accel.data import Regs, Sregs


class Events(NamedTuple):
    """Exceptions, interrupts and modes that are on their way (struct pyhv_events)."""

    exception_injected: int = 0
    exception_pending: int = 0
    exception_vector: int = 0
    exception_has_error: int = 0
    exception_error: int = 0
    exception_has_payload: int = 0
    exception_payload: int = 0
    interrupt_injected: int = 0
    interrupt_vector: int = 0
    interrupt_soft: int = 0
    interrupt_shadow: int = 0
    nmi_injected: int = 0
    nmi_pending: int = 0
    nmi_masked: int = 0
    sipi_vector: int = 0
    smm: int = 0
    smi_pending: int = 0
    smm_inside_nmi: int = 0
    latched_init: int = 0
    triple_fault_pending: int = 0


class DebugRegs(NamedTuple):
    """DR0 to DR3, DR6, DR7."""

    db: tuple[int, ...]
    dr6: int
    dr7: int


class VcpuState(NamedTuple):
    """One vCPU, between two instructions and with no port or memory access pending."""

    vcpu: int
    """Its index, which is its APIC id."""
    regs: Regs
    sregs: Sregs
    xcr0: int
    xsave: bytes
    """The XSAVE area in its standard format, without the zeros at its end."""
    msrs: dict[int, int]
    """Index -> value, of the MSRs that the vCPU's CPUID table grants (cpu/msrs.py); IA32_TSC among them."""
    lapic: bytes
    """The LAPIC's 1024 bytes of registers, as its MMIO page shows them; empty without an irqchip."""
    events: Events
    debugregs: DebugRegs
    mp_state: int
    """0 runnable, 1 uninitialized (an AP that waits for INIT), 2 INIT received, 3 halted, 4 SIPI received."""


class Pic(NamedTuple):
    """One 8259A (struct pyhv_pic)."""

    last_irr: int
    irr: int
    imr: int
    isr: int
    priority_add: int
    irq_base: int
    read_reg_select: int
    poll: int
    special_mask: int
    init_state: int
    auto_eoi: int
    rotate_on_auto_eoi: int
    special_fully_nested_mode: int
    init4: int
    elcr: int
    elcr_mask: int


class Ioapic(NamedTuple):
    """The I/O APIC (struct pyhv_ioapic): 24 redirection entries."""

    base_address: int
    ioregsel: int
    id: int
    irr: int
    redirection: tuple[int, ...]


class PitChannel(NamedTuple):
    """One channel of the 8254 (struct pyhv_pit_channel)."""

    initial_count: int
    latched_count: int
    count_latched: int
    status_latched: int
    status: int
    read_state: int
    write_state: int
    write_latch: int
    rw_mode: int
    mode: int
    bcd: int
    gate: int


class Irqchip(NamedTuple):
    """The interrupt controllers and the timer of the PC."""

    pic: tuple[Pic, ...]
    ioapic: Ioapic
    pit: tuple[PitChannel, ...]  # empty without one
    pit_flags: int


class ProcessorsState(NamedTuple):
    """Everything that an accelerator holds of a paused VM, but for its memory."""

    vcpus: tuple[VcpuState, ...]
    irqchip: Irqchip | None
    clock: int
    """kvmclock in nanoseconds: the guest's monotonic time."""
    tsc_khz: int
    """Rate of the guest's time-stamp counter."""


class RawVcpu(NamedTuple):
    """A VcpuState; its number is its place in the RawState."""

    regs: bytes
    """struct pyhv_regs."""
    sregs: bytes
    """struct pyhv_sregs."""
    events: bytes
    """struct pyhv_events."""
    debugregs: bytes
    """struct pyhv_debugregs."""
    xcr0: int
    mp_state: int
    msr_indices: bytes
    """uint32_t[]."""
    msr_values: bytes
    """uint64_t[], as many."""
    lapic: bytes
    xsave: bytes
    """With or without the zeros at its end."""


class RawState(NamedTuple):
    """A ProcessorsState."""

    vcpus: tuple[RawVcpu, ...]
    irqchip: bytes
    """struct pyhv_irqchip; empty without one."""
    pit: bool
    """Whether there is one in it."""
    clock: int
    tsc_khz: int
