"""May a guest that sees this CPUID table run on that host? Every reason why not, typed; nothing is moved to find out.

Compared is what a guest can notice the lack of: features, the numbers that belong to them, the XSAVE area's layout,
address bits, the CLFLUSH size. Not compared is what a table may say on any host: _ON_ANY_HOST. Whatever is in a table
besides cannot be judged, and is a reason: pyhv shows no guest such a thing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

from pyhv.cpu import arch_capabilities
from pyhv.cpu.features import BY_NAME, FEATURES, NUMBERS, WORDS, XSAVE_COMPONENTS
from pyhv.cpu.host import HostDescription
from pyhv.cpu.msrs import NAMES as MSR_NAMES
from pyhv.cpu.msrs import granted as granted_msrs
from pyhv.cpu.msrs import missing as missing_msrs
from pyhv.cpu.table import EXTENDED, HYPERVISOR, NAME_LEAVES, REGISTERS, CpuidTable, XsaveArea


class OtherVendor(NamedTuple):
    """The vendors differ ("intel", "amd" or a vendor's 12 characters): their features are not each other's."""

    guest: str
    host: str

    def __str__(self) -> str:
        return f"the guest's processor is of vendor {self.guest}, the host's of vendor {self.host}"


class MissingFeature(NamedTuple):
    """The guest sees a feature that the host does not offer."""

    name: str
    title: str

    def __str__(self) -> str:
        return f"the host does not offer {self.name} ({self.title})"


class NotForGuests(NamedTuple):
    """The guest sees a feature that no guest may see: virtualization of its own, or performance monitoring."""

    name: str
    title: str

    def __str__(self) -> str:
        return f"the guest sees {self.name} ({self.title}), which is for no guest"


class NotKnown(NamedTuple):
    """The guest sees bits of a CPUID register whose meaning pyhv does not know, or that belong to no guest."""

    leaf: int
    subleaf: int
    register: str
    bits: int

    def __str__(self) -> str:
        where = f"0x{self.leaf:x}{f'.{self.subleaf}' if self.subleaf else ''}.{self.register}"
        return f"the guest sees bits 0x{self.bits:08x} of CPUID {where}, which pyhv shows to no guest and cannot judge"


class NumberDiffers(NamedTuple):
    """A number that belongs to a feature is on the host not what the guest counts on."""

    name: str
    title: str
    guest: int
    host: int
    compare: str
    """What must hold, of the guest's number to the host's: "at most", "at least" or "equal"."""

    def __str__(self) -> str:
        return f"{self.name} ({self.title}) is {self.guest} for the guest and {self.host} on the host"


class XsaveDiffers(NamedTuple):
    """A component of the guest's XSAVE area has another size or place on the host, or none (None)."""

    component: int
    guest: XsaveArea
    host: XsaveArea | None

    def __str__(self) -> str:
        known = XSAVE_COMPONENTS.get(self.component)
        name = f"XSAVE component {self.component}" + (f" ({known.name})" if known else "")
        if self.host is None:
            return f"the host does not have {name}"
        return f"{name} has {_area(self.guest)} in the guest and {_area(self.host)} on the host"


class TooManyAddressBits(NamedTuple):
    """The guest may use addresses, `guest` bits wide, that the host does not have."""

    guest: int
    host: int
    kind: str = "physical"
    """ "physical" or "linear"."""

    def __str__(self) -> str:
        return f"the guest has {self.guest} {self.kind} address bits, the host {self.host}"


class ClflushSizeDiffers(NamedTuple):
    """One CLFLUSH flushes another number of bytes."""

    guest: int
    host: int

    def __str__(self) -> str:
        return f"CLFLUSH flushes {self.guest} bytes for the guest and {self.host} bytes on the host"


class MissingMsr(NamedTuple):
    """The guest's state holds an MSR that the host does not have."""

    number: int
    name: str

    def __str__(self) -> str:
        return f"the host does not have MSR {self.name} ({self.number:#x})"


class MsrNotGiven(NamedTuple):
    """The guest's state holds an MSR that its own CPUID table does not give it: no guest's state has it."""

    number: int
    name: str

    def __str__(self) -> str:
        return f"the state sets MSR {self.name} ({self.number:#x}), which the guest's CPUID table does not give it"


class LacksCapability(NamedTuple):
    """The guest was told in IA32_ARCH_CAPABILITIES of what the host does not have (cpu/arch_capabilities.py)."""

    name: str

    def __str__(self) -> str:
        return f"the host does not have {self.name}, of which the guest was told in IA32_ARCH_CAPABILITIES"


class NeedsCare(NamedTuple):
    """The host's IA32_ARCH_CAPABILITIES asks for care of which the guest was not told."""

    name: str

    def __str__(self) -> str:
        return f"the host needs care of which the guest was not told: {self.name} in IA32_ARCH_CAPABILITIES"


class TscDiffers(NamedTuple):
    """The guest counts on the rate of its time-stamp counter (kHz), and the host cannot give it that rate."""

    guest: int
    host: int
    why: str

    def __str__(self) -> str:
        rates = f"the guest's TSC runs at {self.guest} kHz, the host's at {self.host} kHz"
        return f"{rates} and cannot be scaled; {self.why}"


class VcpusDiffer(NamedTuple):
    """Two vCPUs of the guest see more than their own APIC id differently: pyhv makes no such guest."""

    vcpu: int

    def __str__(self) -> str:
        return f"vCPU {self.vcpu} sees another processor than vCPU 0"


#: Why a guest with one CPUID table cannot run on a host.
TableReason = (
    OtherVendor
    | MissingFeature
    | NotForGuests
    | NotKnown
    | NumberDiffers
    | XsaveDiffers
    | TooManyAddressBits
    | ClflushSizeDiffers
    | MissingMsr
    | MsrNotGiven
    | LacksCapability
    | NeedsCare
    | TscDiffers
)


class OnVcpu(NamedTuple):
    """A reason that holds for the table of one vCPU, and not for vCPU 0's."""

    vcpu: int
    reason: TableReason

    def __str__(self) -> str:
        return f"vCPU {self.vcpu}: {self.reason}"


#: Why a guest cannot run on a host.
Reason = TableReason | VcpusDiffer | OnVcpu

# What a table may say on any host, and is compared with nothing: highest leaves, family and version, APIC ids,
# topology, caches and TLBs, names, clock rates, KVM's signature. (Vendor, the TSC's rate, leaf 0xD and address bits
# are compared, by rules of their own.) Leaves with nothing else in them:
_ON_ANY_HOST = frozenset(
    (0x0, 0x2, 0x4, 0xB, 0xD, 0x15, 0x16, 0x1F, HYPERVISOR, EXTENDED, *NAME_LEAVES)
    + (0x80000005, 0x80000006, 0x80000019, 0x8000001D, 0x8000001E)
)
# and registers of leaves that hold features too.
_ON_ANY_HOST_BESIDE = (
    *((0x1, 0, "eax"), (0x1, 0, "ebx"), (0x80000001, 0, "eax"), (0x80000001, 0, "ebx")),
    *((0x80000008, 0, "eax"), (0x80000008, 0, "ecx")),
    *((0x7, 0, "eax"), (0x1E, 0, "eax"), (0x24, 0, "eax")),  # the highest subleaf
    *((0xD, 1, "ebx"), (0xD, 1, "ecx"), (0xD, 1, "edx")),  # sizes and components
)


@functools.cache
def _unknown(lineage: str) -> dict[tuple[int, int], tuple[int, int, int, int]]:
    """For each leaf and subleaf with features or numbers, the bits of its registers that mean nothing there."""
    known: dict[tuple[int, int], list[int]] = {}

    def add(leaf: int, subleaf: int, register: str, mask: int) -> None:
        known.setdefault((leaf, subleaf), [0, 0, 0, 0])[REGISTERS.index(register)] |= mask

    vendors = ("any", lineage)
    for word, members in WORDS.items():
        add(*word, sum(f.mask for f in members if f.vendor in vendors))
    for number in NUMBERS:
        if BY_NAME[number.needs].vendor in vendors:
            add(*number.word, number.mask)
    for leaf, subleaf, register in _ON_ANY_HOST_BESIDE:
        add(leaf, subleaf, register, 0xFFFFFFFF)
    return {key: (~masks[0], ~masks[1], ~masks[2], ~masks[3]) for key, masks in known.items()}


# Two rates that differ by less are one (KVM's own tolerance without scaling, tsc_tolerance_ppm, arch/x86/kvm/x86.c).
_TSC_TOLERANCE_PPM = 250


def tsc_differs(guest_khz: int, host: HostDescription) -> bool:
    """Whether the guest's TSC would run at another rate on this host; not where a rate is unknown (0)."""
    if not guest_khz or not host.tsc_khz or host.tsc_scaling:
        return False
    return abs(guest_khz - host.tsc_khz) * 1_000_000 > guest_khz * _TSC_TOLERANCE_PPM


def problems(
    guest: CpuidTable,
    host: HostDescription,
    msrs: Iterable[int] = (),
    tsc_khz: int = 0,
    strict_tsc: bool = False,
    capabilities: int | None = None,
) -> list[TableReason]:
    """Every reason why a guest that sees the table `guest` cannot run on `host`; none: it can.

    msrs: numbers of the MSRs in its state. tsc_khz: its TSC's rate, 0 where it is not known. strict_tsc: another rate
    is a reason even where the guest was not promised a steady one. capabilities: its IA32_ARCH_CAPABILITIES, None where
    it has none or that is not known.

    A feature is required where its bit is set and means that something is there. Not required are bits that say that
    something is absent or wants care (the table's value holds wherever the guest runs), those that follow the vCPU's
    state, and those of the topology; a bit that repeats another is not named twice.
    """
    reasons: list[TableReason] = []
    if guest.vendor != host.vendor:
        reasons.append(OtherVendor(guest.vendor, host.vendor))

    shown, offered = guest.features(), host.table.features()
    suspect = [f for f in FEATURES if f.name in shown and (f.barred or f.name not in offered)]
    missing = [
        f
        for f in suspect
        if f.sense == "plain"
        and not (f.topology or f.dynamic or f.barred)
        and not (f.mirrors and (f.mirrors in shown or f.mirrors in offered))
    ]
    reasons += [NotForGuests(f.name, f.title) for f in suspect if f.barred]
    reasons += [MissingFeature(f.name, f.title) for f in missing]
    reasons += _unknown_bits(guest)
    for n in NUMBERS:
        if n.needs in shown and n.needs in offered:
            here, there = n.of(guest.word(n.word)), n.of(host.table.word(n.word))
            if not _holds(n.compare, here, there):
                reasons.append(NumberDiffers(n.name, n.title, here, there, n.compare))

    places = host.xsave
    explained = {n for f in missing for n in f.xsave}
    compacts = "xsavec" in shown or "xsaves" in shown
    for component, area in _announced_areas(guest).items():
        place = places.get(component)
        if place is None and component in explained:
            continue
        if place is None or _layout(place, compacts) != _layout(area, compacts):
            reasons.append(XsaveDiffers(component, area, place))

    if guest.physical_bits > host.physical_bits:
        reasons.append(TooManyAddressBits(guest.physical_bits, host.physical_bits))
    if guest.linear_bits > host.linear_bits and "la57" not in (f.name for f in missing):
        reasons.append(TooManyAddressBits(guest.linear_bits, host.linear_bits, "linear"))
    if guest.has(BY_NAME["clflush"]) and guest.clflush_bytes != host.table.clflush_bytes:
        reasons.append(ClflushSizeDiffers(guest.clflush_bytes, host.table.clflush_bytes))
    numbers, given = frozenset(msrs), frozenset(granted_msrs(guest, shown))
    for number in sorted(numbers - given):
        reasons.append(MsrNotGiven(number, MSR_NAMES.get(number, "of an unknown name")))
    if host.msrs:  # a description made of a processor dump has none
        for number in sorted(missing_msrs(numbers & given, host.msrs)):
            reasons.append(MissingMsr(number, MSR_NAMES[number]))
    offers = host.feature_msrs.get(arch_capabilities.IA32_ARCH_CAPABILITIES)
    if capabilities is not None and offers is not None:
        reasons += [LacksCapability(name) for name in arch_capabilities.lacking(capabilities, offers)]
        reasons += [NeedsCare(name) for name in arch_capabilities.untold(capabilities, offers)]
    if tsc_differs(tsc_khz, host):
        promised = [name for name in ("invtsc", "tsc_deadline_timer") if name in shown]
        if promised:
            reasons.append(TscDiffers(tsc_khz, host.tsc_khz, f"the guest was shown {' and '.join(promised)}"))
        elif strict_tsc:
            reasons.append(TscDiffers(tsc_khz, host.tsc_khz, "a strict TSC was asked for"))
    return reasons


def _unknown_bits(guest: CpuidTable) -> list[NotKnown]:
    """What the table says that has no rule here."""
    found = []
    unknown = _unknown(guest.lineage)
    for key, (eax, ebx, ecx, edx) in guest.entries.items():
        masks = unknown.get(key)
        if masks is None:
            if key[0] in _ON_ANY_HOST:
                continue
            masks = (-1, -1, -1, -1)
        if eax & masks[0] or ebx & masks[1] or ecx & masks[2] or edx & masks[3]:
            for name, value, mask in zip(REGISTERS, (eax, ebx, ecx, edx), masks, strict=True):
                if bits := value & mask:
                    found.append(NotKnown(*key, name, bits))
    return found


def _holds(compare: str, guest: int, host: int) -> bool:
    return {"at most": guest <= host, "at least": guest >= host, "equal": guest == host}[compare]


def _announced_areas(guest: CpuidTable) -> dict[int, XsaveArea]:
    """The guest's XSAVE components; one that a mask announces and no subleaf describes is there, with no size."""
    areas = guest.xsave_areas()
    announced = (guest.xcr0_mask | guest.xss_mask) & ~3  # x87 and SSE live in the area's first 512 bytes
    if announced.bit_count() > len(areas):
        areas = {n: XsaveArea(0, 0, 0) for n in range(64) if announced >> n & 1} | areas
    return areas


def _layout(area: XsaveArea, compacts: bool) -> tuple[int, int, bool, bool]:
    """What a guest's save area depends on: not whether XFD can disable the component, and how components are packed
    only where the guest has the compacted format."""
    return area.size, area.offset, area.supervisor, area.aligned and compacts


def _area(area: XsaveArea) -> str:
    aligned = ", aligned to 64 when compacted" if area.aligned else ""
    return f"{area.size} bytes at {area.offset}{aligned}"
