"""The model-specific registers that are part of a guest's state, and what gives a guest each.

Two lists, which together name every MSR that KVM lists or lets a guest write: those that travel (MSRS), and those that
do not (EXCEPTIONS), each with its reason. tests/lab/inside/test_msrs.py compares them with KVM's own list and with
what a guest can write.

A guest's state has only MSRs that its CPUID table gives it. So a host that lacks an MSR which this guest could not use
is no reason to refuse it, and nobody can set another by a state.

Sources: SDM Vol. 4; APM Vol. 2 appendix A; KVM's Documentation/virt/kvm/x86/msr.rst; for what KVM gives to whom its
arch/x86/kvm/x86.c, vmx/vmx.c and svm/svm.c.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from pyhv.cpu import arch_capabilities

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.cpu.table import CpuidTable

IA32_TSC = 0x10
IA32_TSC_DEADLINE = 0x6E0
AMD64_DE_CFG = 0xC0011029
#: Not an MSR: the shadow-stack pointer, which is in a state under the number that KVM keeps for it and gives no guest
#: (MSR_KVM_INTERNAL_GUEST_SSP).
SSP = 0x4B564DFF


class Msr(NamedTuple):
    """One MSR that travels."""

    number: int
    name: str
    grants: tuple[str, ...] = ()
    """Names of features, or a vendor ("intel", "amd"), each of which brings it; empty: KVM gives it to every guest."""
    usual: int | None = None
    """What it holds in a new vCPU, and in nearly every other: then it does not travel."""
    listed: bool = True
    """Whether it is in KVM's list (KVM_GET_MSR_INDEX_LIST) where KVM has it; else KVM always has it."""


def _range(first: int, count: int, name: str, *grants: str, listed: bool = True) -> list[Msr]:
    return [Msr(first + i, f"{name}{i}", grants, listed=listed) for i in range(count)]


def _banks(count: int) -> list[Msr]:
    """Machine-check banks. KVM gives so many to every vCPU (KVM_MAX_MCE_BANKS)."""
    names = ("CTL", "STATUS", "ADDR", "MISC")
    return [
        Msr(0x400 + 4 * bank + i, f"IA32_MC{bank}_{name}", usual=0, listed=False)
        for bank in range(count)
        for i, name in enumerate(names)
    ]


MSRS: tuple[Msr, ...] = (
    Msr(IA32_TSC, "IA32_TSC", ("tsc",)),
    Msr(0x11, "KVM_WALL_CLOCK", ("kvm_clocksource",)),
    Msr(0x12, "KVM_SYSTEM_TIME", ("kvm_clocksource",)),
    Msr(0x34, "MSR_SMI_COUNT", usual=0),
    Msr(0x3A, "IA32_FEATURE_CONTROL", ("intel",), usual=0),
    Msr(0x3B, "IA32_TSC_ADJUST", ("tsc_adjust",)),
    Msr(0x48, "IA32_SPEC_CTRL", ("spec_ctrl", "intel_stibp", "spec_ctrl_ssbd", "amd_ibrs", "amd_stibp", "amd_ssbd")),
    Msr(0x9E, "IA32_SMBASE", usual=0x30000),
    Msr(0xE1, "IA32_UMWAIT_CONTROL", ("waitpkg",)),
    Msr(arch_capabilities.IA32_ARCH_CAPABILITIES, "IA32_ARCH_CAPABILITIES", ("arch_capabilities",)),
    Msr(0x122, "IA32_TSX_CTRL", ("arch_capabilities",), usual=0),
    Msr(0x140, "MSR_MISC_FEATURES_ENABLES", usual=0),
    Msr(0x174, "IA32_SYSENTER_CS", ("sep",)),
    # An AMD guest can hold 64 bits in these, and kvm_amd takes 32 back (svm_set_msr()): SYSENTER in long mode faults.
    Msr(0x175, "IA32_SYSENTER_ESP", ("sep",)),
    Msr(0x176, "IA32_SYSENTER_EIP", ("sep",)),
    Msr(0x17A, "IA32_MCG_STATUS", ("mca",)),
    Msr(0x1A0, "IA32_MISC_ENABLE"),
    Msr(0x1C4, "IA32_XFD", ("xfd",)),
    Msr(0x1C5, "IA32_XFD_ERR", ("xfd",)),
    Msr(0x1D9, "IA32_DEBUGCTL", usual=0, listed=False),
    Msr(0x1FC, "MSR_POWER_CTL", usual=0),
    *_range(0x200, 16, "IA32_MTRR_PHYS", "mtrr", listed=False),  # base and mask of eight ranges
    Msr(0x250, "IA32_MTRR_FIX64K_00000", ("mtrr",), listed=False),
    Msr(0x258, "IA32_MTRR_FIX16K_80000", ("mtrr",), listed=False),
    Msr(0x259, "IA32_MTRR_FIX16K_A0000", ("mtrr",), listed=False),
    *_range(0x268, 8, "IA32_MTRR_FIX4K_", "mtrr", listed=False),
    Msr(0x277, "IA32_PAT", ("pat",)),
    Msr(0x2FF, "IA32_MTRR_DEF_TYPE", ("mtrr",), listed=False),
    *_banks(32),
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
    Msr(SSP, "SSP", ("cet_ss",), usual=0, listed=False),
    Msr(0xC0000081, "IA32_STAR", ("syscall",)),
    Msr(0xC0000082, "IA32_LSTAR", ("lm",)),
    Msr(0xC0000083, "IA32_CSTAR", ("lm",)),
    Msr(0xC0000084, "IA32_FMASK", ("lm",)),
    Msr(0xC0000102, "IA32_KERNEL_GS_BASE", ("lm",)),
    Msr(0xC0000103, "IA32_TSC_AUX", ("rdtscp", "rdpid")),
    Msr(0xC0010015, "MSR_HWCR", usual=0),
    Msr(0xC0010114, "MSR_VM_CR", ("amd",), usual=0, listed=False),
    Msr(0xC0010117, "MSR_VM_HSAVE_PA", ("amd",), usual=0),
    Msr(0xC001011F, "AMD64_VIRT_SPEC_CTRL", ("virt_ssbd",)),
    Msr(0xC0010140, "AMD64_OSVW_ID_LENGTH", ("osvw",), listed=False),
    Msr(0xC0010141, "AMD64_OSVW_STATUS", ("osvw",), listed=False),
    # Its one bit makes LFENCE wait. A host that does not know the bit refuses it, and needs none: its LFENCE waits
    # anyway (Linux, init_amd()). So it is set where it can be (csrc/kvm/state.c).
    Msr(AMD64_DE_CFG, "AMD64_DE_CFG", ("amd",), listed=False),
)


class NotCarried(NamedTuple):
    """MSRs that KVM lists, or that a guest can write, and that do not travel."""

    first: int
    last: int
    why: str


_SREGS = "is in Sregs"
_NO_PMU = "no guest is shown a PMU, and KVM gives none (KVM_CAP_PMU_CAPABILITY)"
_NO_PT = "no guest is shown processor trace, which ties it to its host"
_NO_HYPERV = "KVM gives it only with Hyper-V's CPUID leaves, which no guest is shown"
_CONSTANT = "is KVM's constant, which a guest cannot change"

EXCEPTIONS: tuple[NotCarried, ...] = (
    NotCarried(0x1B, 0x1B, _SREGS),
    NotCarried(0x8B, 0x8B, _CONSTANT),  # the microcode's revision
    NotCarried(0x8C, 0x8F, "no guest is shown SGX, which ties it to its host"),
    NotCarried(0xC1, 0xC8, _NO_PMU),
    NotCarried(0xCE, 0xCE, _CONSTANT),  # that CPUID can be made to fault
    NotCarried(0x17B, 0x17B, "KVM's machine checks have no MCG_CTL unless they are set up with one"),
    NotCarried(0x186, 0x18D, _NO_PMU),
    NotCarried(0x1DB, 0x1DE, "the last branch, which the next one overwrites"),
    NotCarried(0x309, 0x30C, _NO_PMU),
    NotCarried(0x345, 0x345, _NO_PMU),
    NotCarried(0x38D, 0x390, _NO_PMU),
    NotCarried(0x3F1, 0x3F2, _NO_PMU),
    NotCarried(0x480, 0x491, "no guest is shown VMX"),
    NotCarried(0x4C1, 0x4C8, _NO_PMU),
    NotCarried(0x4D0, 0x4D0, "KVM's machine checks have no local ones unless they are set up with them"),
    NotCarried(0x560, 0x587, _NO_PT),
    NotCarried(0x600, 0x600, _NO_PMU),
    NotCarried(0x800, 0x8FF, "is on the local APIC's page"),
    NotCarried(0x40000000, 0x400001FF, _NO_HYPERV),
    NotCarried(0x4B564D07, 0x4B564D07, "is a command, and reads as zero"),  # KVM_ASYNC_PF_ACK
    NotCarried(0x4B564D08, 0x4B564D08, "KVM gives it only to guests with encrypted memory"),
    NotCarried(0xC0000080, 0xC0000080, _SREGS),
    NotCarried(0xC0000100, 0xC0000101, _SREGS),
    NotCarried(0xC0000104, 0xC0000104, "no guest is shown SVM"),
    NotCarried(0xC0000300, 0xC0000303, _NO_PMU),
    NotCarried(0xC0010000, 0xC0010007, _NO_PMU),
    NotCarried(0xC0010200, 0xC001020B, _NO_PMU),
)

BY_NUMBER = {msr.number: msr for msr in MSRS}
NAMES = {msr.number: msr.name for msr in MSRS}

#: KVM gives every VM these, though its own list leaves them out.
UNLISTED = frozenset(msr.number for msr in MSRS if not msr.listed)


# granted() is called while a guest is restored.
_TO_ALL = tuple(msr.number for msr in MSRS if not msr.grants)
_BY_GRANT = tuple((msr.number, msr.grants) for msr in MSRS if msr.grants)


def granted(table: CpuidTable, visible: frozenset[str] | None = None) -> tuple[int, ...]:
    """Numbers of the MSRs that a guest with this CPUID table may use. visible: its features, if they are known."""
    given = (table.features() if visible is None else visible) | {table.lineage}
    return _TO_ALL + tuple([number for number, grants in _BY_GRANT if not given.isdisjoint(grants)])


def missing(wanted: Iterable[int], host_list: Iterable[int]) -> list[int]:
    """Which of the wanted MSRs a host with this list (KVM_GET_MSR_INDEX_LIST) does not have."""
    has = UNLISTED.union(host_list)
    return [index for index in wanted if index not in has]


def required(table: CpuidTable, host_list: Iterable[int]) -> list[int]:
    """Those of a guest's MSRs that another host must have, whatever they hold, if this one has them (host_list)."""
    has = frozenset(host_list)
    return [n for n in granted(table) if n in has and BY_NUMBER[n].usual is None]


def why_not(number: int) -> str:
    """Why an MSR does not travel; "" for one that does, or that pyhv does not know."""
    return next((e.why for e in EXCEPTIONS if e.first <= number <= e.last), "")


def check_granted(numbers: Iterable[int], allowed: frozenset[int], vcpu: int) -> None:
    """Raises ValueError where a vCPU's state has MSRs that its CPUID table does not give it: naming them all."""
    if others := sorted(frozenset(numbers) - allowed):
        named = ", ".join([f"{NAMES.get(n, 'an MSR that pyhv does not know')} ({n:#x})" for n in others])
        raise ValueError(f"vCPU {vcpu} has no such MSR by its CPUID table: {named}")
