"""KVM's own numbers in words (<linux/kvm.h>, KVM_EXIT_* and KVM_INTERNAL_ERROR_*)."""

from __future__ import annotations

from pyhv.accel.data import Exit, Stop

EXIT_NAMES = [
    "UNKNOWN",
    "EXCEPTION",
    "IO",
    "HYPERCALL",
    "DEBUG",
    "HLT",
    "MMIO",
    "IRQ_WINDOW_OPEN",
    "SHUTDOWN",
    "FAIL_ENTRY",
    "INTR",
    "SET_TPR",
    "TPR_ACCESS",
    "S390_SIEIC",
    "S390_RESET",
    "DCR",
    "NMI",
    "INTERNAL_ERROR",
    "OSI",
    "PAPR_HCALL",
    "S390_UCONTROL",
    "WATCHDOG",
    "S390_TSCH",
    "EPR",
    "SYSTEM_EVENT",
    "S390_STSI",
    "IOAPIC_EOI",
    "HYPERV",
    "ARM_NISV",
    "X86_RDMSR",
    "X86_WRMSR",
    "DIRTY_RING_FULL",
    "AP_RESET_HOLD",
    "X86_BUS_LOCK",
    "XEN",
    "RISCV_SBI",
    "RISCV_CSR",
    "NOTIFY",
    "LOONGARCH_IOCSR",
    "MEMORY_FAULT",
]

_SUBERRORS = {
    1: "it cannot execute the instruction",
    2: "an event came while another was being delivered",
    3: "an event could not be delivered",
    4: "the processor exited for a reason that it did not expect",
}


def explain(exit: Exit) -> str:
    """One clause for an exit that ended a run, such as "KVM_EXIT_FAIL_ENTRY, hardware reason 0x80000021"."""
    name = EXIT_NAMES[exit.exit_reason] if exit.exit_reason < len(EXIT_NAMES) else str(exit.exit_reason)
    if exit.stop == Stop.INTERNAL_ERROR:
        why = _SUBERRORS.get(exit.suberror, "no reason known")
        data = f", data {' '.join(f'0x{value:x}' for value in exit.data)}" if exit.data else ""
        return f"KVM gave up: {why} (KVM_EXIT_{name}, suberror {exit.suberror}{data})"
    if exit.stop in (Stop.FAIL_ENTRY, Stop.UNHANDLED) and exit.hardware_reason:
        return f"KVM_EXIT_{name}, hardware reason 0x{exit.hardware_reason:x}"
    return f"KVM_EXIT_{name}, which pyhv does not handle"
