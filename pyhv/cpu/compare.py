"""May a guest that sees this CPUID table run on that host? Every reason why not, typed; nothing is moved to find out.

Compared is what a guest can notice the lack of: features, the XSAVE area's layout, address bits, the CLFLUSH size. Not
compared is what a table may say on any host: family, model, stepping, names, caches, topology, highest leaves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from pyhv.cpu.features import BY_NAME, FEATURES, XSAVE_COMPONENTS
from pyhv.cpu.host import HostDescription
from pyhv.cpu.msrs import NAMES as MSR_NAMES
from pyhv.cpu.msrs import missing as missing_msrs
from pyhv.cpu.table import CpuidTable, XsaveArea


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
    """The guest may use physical addresses, `guest` bits wide, that the host does not have."""

    guest: int
    host: int

    def __str__(self) -> str:
        return f"the guest has {self.guest} physical address bits, the host {self.host}"


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


class TscDiffers(NamedTuple):
    """The guest counts on the rate of its time-stamp counter (kHz), and the host cannot give it that rate."""

    guest: int
    host: int
    why: str

    def __str__(self) -> str:
        rates = f"the guest's TSC runs at {self.guest} kHz, the host's at {self.host} kHz"
        return f"{rates} and cannot be scaled; {self.why}"


#: Why a guest cannot run on a host.
Reason = OtherVendor | MissingFeature | XsaveDiffers | TooManyAddressBits | ClflushSizeDiffers | MissingMsr | TscDiffers

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
) -> list[Reason]:
    """Every reason why a guest that sees the table `guest` cannot run on `host`; none: it can.

    msrs: numbers of the MSRs in its state. tsc_khz: its TSC's rate, 0 where it is not known. strict_tsc: another rate
    is a reason even where the guest was not promised a steady one.

    A feature is required where its bit is set and means that something is there. Not required are bits that say that
    something is absent or wants care (the table's value holds wherever the guest runs), those that follow the vCPU's
    state, and those of the topology; a bit that repeats another is not named twice.
    """
    reasons: list[Reason] = []
    if guest.vendor != host.vendor:
        reasons.append(OtherVendor(guest.vendor, host.vendor))

    shown, offered = guest.features(), host.table.features()
    missing = [
        f
        for f in FEATURES
        if f.name in shown
        and f.name not in offered
        and f.sense == "plain"
        and not (f.topology or f.dynamic)
        and not (f.mirrors and f.mirrors in shown and (f.mirrors not in offered or guest.vendor != host.vendor))
    ]
    reasons += [MissingFeature(f.name, f.title) for f in missing]

    places = host.xsave
    explained = {n for f in missing for n in f.xsave}
    for component, area in guest.xsave_areas().items():
        place = places.get(component)
        if place is None and component in explained:
            continue
        if place is None or _layout(place) != _layout(area):
            reasons.append(XsaveDiffers(component, area, place))

    if guest.physical_bits > host.physical_bits:
        reasons.append(TooManyAddressBits(guest.physical_bits, host.physical_bits))
    if guest.has(BY_NAME["clflush"]) and guest.clflush_bytes != host.table.clflush_bytes:
        reasons.append(ClflushSizeDiffers(guest.clflush_bytes, host.table.clflush_bytes))
    if host.msrs:  # a description made of a processor dump has none
        for number in sorted(missing_msrs(msrs, host.msrs)):
            reasons.append(MissingMsr(number, MSR_NAMES.get(number, "of an unknown name")))
    if tsc_differs(tsc_khz, host):
        promised = [name for name in ("invtsc", "tsc_deadline_timer") if name in shown]
        if promised:
            reasons.append(TscDiffers(tsc_khz, host.tsc_khz, f"the guest was shown {' and '.join(promised)}"))
        elif strict_tsc:
            reasons.append(TscDiffers(tsc_khz, host.tsc_khz, "a strict TSC was asked for"))
    return reasons


def _layout(area: XsaveArea) -> tuple[int, int, bool, bool]:
    """What a guest's save area depends on: not whether XFD can disable the component."""
    return area.size, area.offset, area.supervisor, area.aligned


def _area(area: XsaveArea) -> str:
    aligned = ", aligned to 64 when compacted" if area.aligned else ""
    return f"{area.size} bytes at {area.offset}{aligned}"
