"""The model-specific registers that are part of a guest's state, and the feature that grants each.

An allow-list, like the profiles: of the many MSRs that KVM can list only those travel that the guest can have written,
because its CPUID table told it that they are there. So a host that lacks an MSR which this guest could not use is no
reason to refuse it.

Sources: SDM Vol. 4; APM Vol. 2 appendix A; KVM's Documentation/virt/kvm/x86/msr.rst. The numbers of IA32_EFER,
IA32_APIC_BASE, FS.base and GS.base are missing on purpose: they are in Sregs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.cpu.table import CpuidTable

IA32_TSC = 0x10
IA32_TSC_DEADLINE = 0x6E0


class Msr(NamedTuple):
    """One MSR. grants: names of features, each of which brings it; empty: every processor has it."""

    number: int
    name: str
    grants: tuple[str, ...] = ()


def _range(first: int, count: int, name: str, *grants: str) -> list[Msr]:
    return [Msr(first + i, f"{name}{i}", grants) for i in range(count)]


MSRS: tuple[Msr, ...] = (
    Msr(IA32_TSC, "IA32_TSC", ("tsc",)),
    Msr(0x11, "KVM_WALL_CLOCK", ("kvm_clocksource",)),
    Msr(0x12, "KVM_SYSTEM_TIME", ("kvm_clocksource",)),
    Msr(0x3B, "IA32_TSC_ADJUST", ("tsc_adjust",)),
    Msr(0x48, "IA32_SPEC_CTRL", ("spec_ctrl", "intel_stibp", "spec_ctrl_ssbd", "amd_ibrs", "amd_stibp", "amd_ssbd")),
    Msr(0xE1, "IA32_UMWAIT_CONTROL", ("waitpkg",)),
    Msr(0x174, "IA32_SYSENTER_CS", ("sep",)),
    Msr(0x175, "IA32_SYSENTER_ESP", ("sep",)),
    Msr(0x176, "IA32_SYSENTER_EIP", ("sep",)),
    Msr(0x17A, "IA32_MCG_STATUS", ("mca",)),
    Msr(0x1A0, "IA32_MISC_ENABLE"),
    Msr(0x1C4, "IA32_XFD", ("xfd",)),
    Msr(0x1C5, "IA32_XFD_ERR", ("xfd",)),
    *_range(0x200, 16, "IA32_MTRR_PHYS", "mtrr"),  # base and mask of eight ranges
    Msr(0x250, "IA32_MTRR_FIX64K_00000", ("mtrr",)),
    Msr(0x258, "IA32_MTRR_FIX16K_80000", ("mtrr",)),
    Msr(0x259, "IA32_MTRR_FIX16K_A0000", ("mtrr",)),
    *_range(0x268, 8, "IA32_MTRR_FIX4K_", "mtrr"),
    Msr(0x277, "IA32_PAT", ("pat",)),
    Msr(0x2FF, "IA32_MTRR_DEF_TYPE", ("mtrr",)),
    Msr(0x6A0, "IA32_U_CET", ("cet_ss", "ibt")),
    Msr(0x6A2, "IA32_S_CET", ("cet_ss", "ibt")),
    *_range(0x6A4, 4, "IA32_PL_SSP", "cet_ss"),
    Msr(0x6A8, "IA32_INTERRUPT_SSP_TABLE_ADDR", ("cet_ss",)),
    Msr(IA32_TSC_DEADLINE, "IA32_TSC_DEADLINE", ("tsc_deadline_timer",)),
    Msr(0xD90, "IA32_BNDCFGS", ("mpx",)),
    Msr(0xDA0, "IA32_XSS", ("xsaves",)),
    Msr(0x4B564D00, "KVM_WALL_CLOCK_NEW", ("kvm_clocksource2",)),
    Msr(0x4B564D01, "KVM_SYSTEM_TIME_NEW", ("kvm_clocksource2",)),
    Msr(0x4B564D02, "KVM_ASYNC_PF_EN", ("kvm_async_pf",)),
    Msr(0x4B564D03, "KVM_STEAL_TIME", ("kvm_steal_time",)),
    Msr(0x4B564D04, "KVM_PV_EOI_EN", ("kvm_pv_eoi",)),
    Msr(0x4B564D05, "KVM_POLL_CONTROL", ("kvm_poll_control",)),
    Msr(0x4B564D06, "KVM_ASYNC_PF_INT", ("kvm_async_pf_int",)),
    Msr(0xC0000081, "IA32_STAR", ("syscall",)),
    Msr(0xC0000082, "IA32_LSTAR", ("lm",)),
    Msr(0xC0000083, "IA32_CSTAR", ("lm",)),
    Msr(0xC0000084, "IA32_FMASK", ("lm",)),
    Msr(0xC0000102, "IA32_KERNEL_GS_BASE", ("lm",)),
    Msr(0xC0000103, "IA32_TSC_AUX", ("rdtscp", "rdpid")),
    Msr(0xC001011F, "AMD64_VIRT_SPEC_CTRL", ("virt_ssbd",)),
)

NAMES = {msr.number: msr.name for msr in MSRS}

#: KVM gives every VM these, though its own list leaves them out.
UNLISTED = frozenset(msr.number for msr in MSRS if msr.name.startswith("IA32_MTRR"))


def granted(table: CpuidTable) -> tuple[int, ...]:
    """Indices of the MSRs that a guest with this CPUID table may use."""
    visible = table.features()
    return tuple(msr.number for msr in MSRS if not msr.grants or visible.intersection(msr.grants))


def missing(wanted: Iterable[int], host_list: Iterable[int]) -> list[int]:
    """Which of the wanted MSRs a host with this list (KVM_GET_MSR_INDEX_LIST) does not have."""
    has = UNLISTED.union(host_list)
    return [index for index in wanted if index not in has]
