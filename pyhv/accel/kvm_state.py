"""Taking a VM's processors out of KVM, and putting them back: in an order that KVM's own side effects dictate.

Source of the reasons: Documentation/virt/kvm/api.rst and arch/x86/kvm/x86.c.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pyhv._native import check, ffi, lib, new_error, to_exception
from pyhv.accel import structs
from pyhv.accel.state import RawState, RawVcpu
from pyhv.cpu import msrs
from pyhv.cpu.arch_capabilities import IA32_ARCH_CAPABILITIES
from pyhv.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from pyhv.accel.kvm import KvmVcpu, KvmVm
    from pyhv.cpu.table import CpuidTable

_U64 = (1 << 64) - 1
_XSAVE_MAX = 16384  # PYHV_XSAVE_MAX
_LAPIC_SIZE = 1024  # PYHV_LAPIC_SIZE

# The XSAVE area: XSTATE_BV stands at byte 512; x87 and SSE (components 0 and 1) are in the 512 bytes before it (SDM
# Vol. 1, "XSAVE Area").
_XSTATE_BV = slice(512, 520)
_LEGACY_COMPONENTS = 3


class Shown(NamedTuple):
    """What a guest can have, by its CPUID table."""

    granted: frozenset[int]
    """The MSRs that may be in its state."""
    components: int
    """Those of the XSAVE area, a bit each."""


class Carried(NamedTuple):
    """What is read of a vCPU's MSRs: those that are granted and that this KVM has."""

    indices: Any
    """uint32_t[]: first those that always travel, then those that do where they hold something unusual."""
    always: int
    """How many the first are."""
    always_indices: bytes
    usual: bytes
    """uint64_t[] of the others: what they usually hold."""
    tsc: int | None
    """Where among them IA32_TSC is."""

    @classmethod
    def of(cls, numbers: Iterable[int]) -> Carried:
        known = [msrs.BY_NUMBER[number] for number in numbers]
        always = [msr.number for msr in known if msr.usual is None]
        rest = [(msr.number, msr.usual) for msr in known if msr.usual is not None]
        return cls(
            ffi.new("uint32_t[]", [*always, *(number for number, _ in rest)]),
            len(always),
            structs.to_bytes(ffi.new("uint32_t[]", always)),
            structs.to_bytes(ffi.new("uint64_t[]", [usual for _, usual in rest])),
            always.index(msrs.IA32_TSC) if msrs.IA32_TSC in always else None,
        )

    def pack(self, values: Any) -> tuple[bytes, bytes]:
        """Indices and values of those that travel, of the values (uint64_t[]) of all."""
        data = structs.to_bytes(values)
        end = 8 * self.always
        if data[end:] == self.usual:
            return self.always_indices, data[:end]
        places = [*range(self.always)]
        places += [n for n in range(self.always, len(values)) if data[8 * n : 8 * n + 8] != self.usual_of(n)]
        indices = [self.indices[n] for n in places]
        return structs.to_bytes(ffi.new("uint32_t[]", indices)), b"".join([data[8 * n : 8 * n + 8] for n in places])

    def usual_of(self, place: int) -> bytes:
        at = 8 * (place - self.always)
        return self.usual[at : at + 8]


# Those MSRs that KVM does not list, though it has them, and that this kernel's KVM does not have: looked for once.
_absent: set[int] = set()


def warm_up(vm: KvmVm, vcpus: Sequence[KvmVcpu], tables: Sequence[CpuidTable]) -> None:
    """Looks up what capture() and apply() need to know of the tables."""
    for vcpu, table in zip(vcpus, tables, strict=True):
        _carried(vm, vcpu, table)


def _shown(vcpu: KvmVcpu, table: CpuidTable) -> Shown:
    if vcpu.shown is None:
        components = table.xcr0_mask | table.xss_mask | _LEGACY_COMPONENTS
        vcpu.shown = Shown(frozenset(msrs.granted(table)), components)
    return vcpu.shown


def _carried(vm: KvmVm, vcpu: KvmVcpu, table: CpuidTable) -> Carried:
    if vcpu.carried is None:
        granted = _shown(vcpu, table).granted
        others = msrs.missing(granted, vm.msr_list())
        vcpu.carried = Carried.of(sorted(granted.difference(_absent, others, (msrs.SSP,))))
    return vcpu.carried


def capture(vm: KvmVm, vcpus: Sequence[KvmVcpu], tables: Sequence[CpuidTable]) -> RawState:
    """The state of a VM whose vCPUs all stand. tables: what their CPUID answers. Raises HostError."""
    error = new_error()
    clock = ffi.new("struct pyhv_clock *")
    check(lib.pyhv_vm_get_clock(vm.handle, clock, error), error)
    # At once: both go on while the rest is taken.
    counters = _counters(vcpus)
    states = tuple(
        _capture_vcpu(vm, vcpu, table, counter) for vcpu, table, counter in zip(vcpus, tables, counters, strict=True)
    )
    return RawState(states, _capture_irqchip(vm), vm.pit, clock.ns, vcpus[0].read_tsc_khz())


def _capture_vcpu(vm: KvmVm, vcpu: KvmVcpu, table: CpuidTable, counter: int | None) -> RawVcpu:
    handle, error = vcpu.handle, new_error()
    # First: the call itself settles INIT and SIPI that are pending, which changes registers and events.
    mp_state = check(lib.pyhv_vcpu_get_mp_state(handle, error), error)
    regs, sregs = ffi.new("struct pyhv_regs *"), ffi.new("struct pyhv_sregs *")
    check(lib.pyhv_vcpu_get_regs(handle, regs, error), error)
    check(lib.pyhv_vcpu_get_sregs(handle, sregs, error), error)
    xcr0 = ffi.new("uint64_t *")
    check(lib.pyhv_vcpu_get_xcr0(handle, xcr0, error), error)
    area = ffi.new("uint8_t[]", _XSAVE_MAX)
    size = check(lib.pyhv_vcpu_get_xsave(handle, area, _XSAVE_MAX, error), error)
    lapic = b""
    if vm.irqchip:
        page = ffi.new("uint8_t[]", _LAPIC_SIZE)
        check(lib.pyhv_vcpu_get_lapic(handle, page, error), error)
        lapic = structs.to_bytes(page)
    debugregs = ffi.new("struct pyhv_debugregs *")
    check(lib.pyhv_vcpu_get_debugregs(handle, debugregs, error), error)
    carried, values = _read_carried(vm, vcpu, table)
    if counter is not None and carried.tsc is not None:
        values[carried.tsc] = counter
    msr_indices, msr_values = carried.pack(values)
    if msrs.SSP in _shown(vcpu, table).granted:
        ssp = ffi.new("uint64_t *")
        if check(lib.pyhv_vcpu_get_ssp(handle, ssp, error), error) == 0 and ssp[0]:
            msr_indices += structs.to_bytes(ffi.new("uint32_t *", msrs.SSP))
            msr_values += structs.to_bytes(ssp)
    # Last: what the calls before have settled or injected is in there.
    events = ffi.new("struct pyhv_events *")
    check(lib.pyhv_vcpu_get_events(handle, events, error), error)
    return RawVcpu(
        structs.to_bytes(regs),
        structs.to_bytes(sregs),
        structs.to_bytes(events),
        structs.to_bytes(debugregs),
        xcr0[0],
        mp_state,
        msr_indices,
        msr_values,
        lapic,
        _shown_components(ffi.buffer(area, size)[:], _shown(vcpu, table)),
    )


def _read_carried(vm: KvmVm, vcpu: KvmVcpu, table: CpuidTable) -> tuple[Carried, Any]:
    """Those of the MSRs which the guest can have that this KVM has, and their values (uint64_t[])."""
    error = new_error()
    while True:
        carried = _carried(vm, vcpu, table)
        count = len(carried.indices)
        values = ffi.new("uint64_t[]", count)
        taken = check(lib.pyhv_vcpu_get_msrs(vcpu.handle, carried.indices, values, count, error), error)
        if taken == count:
            return carried, values
        # The one that it stopped at does not exist here.
        there = list(carried.indices)
        number = there.pop(taken)
        if number in msrs.UNLISTED:
            _absent.add(number)
        vcpu.carried = Carried.of(there)


def apply(
    vm: KvmVm, vcpus: Sequence[KvmVcpu], tables: Sequence[CpuidTable], state: RawState, elapsed: int
) -> None:
    """Puts `state` into vCPUs that have never run. Their memory is mapped (PDPTRs are read from it) and their CPUID
    tables are set (control-register bits that the table forbids are refused). The clocks go on as if it had been taken
    `elapsed` nanoseconds before the call. Raises HostError, ValueError for bytes that are no state; the VM is then good
    for nothing but close()."""
    taken = time.monotonic_ns() - elapsed
    error = new_error()
    pairs = list(zip(vcpus, state.vcpus, strict=True))
    values = [structs.msrs(saved) for saved in state.vcpus]
    for vcpu, found in zip(vcpus, values, strict=True):
        msrs.check_granted(found, _shown(vcpu, tables[vcpu.index]).granted, vcpu.index)
    for vcpu, saved in pairs:
        _check_fits(lib.pyhv_vcpu_set_sregs(vcpu.handle, structs.view("pyhv_sregs", saved.sregs), error), error)
        # CR4.OSXSAVE, which SREGS brings, decides whether XCR0 may be set; XCR0 which components XSAVE may set.
        check(lib.pyhv_vcpu_set_xcr0(vcpu.handle, saved.xcr0, error), error)
        shown = _shown(vcpu, tables[vcpu.index])
        area = _shown_components(saved.xsave.ljust(_XSTATE_BV.stop, b"\0"), shown)
        # Never KVM_SET_FPU: it loses MXCSR.
        check(lib.pyhv_vcpu_set_xsave(vcpu.handle, area, len(area), error), error)
        # The rate before the counter: a new rate rescales what the counter holds.
        if vcpu.read_tsc_khz() != state.tsc_khz:
            # Not done where the host cannot scale. That this guest can live with the host's rate has been decided
            # before (cpu/compare.py). Where it can scale that was the reason to take the guest, so it must.
            check(lib.pyhv_vcpu_set_tsc_khz(vcpu.handle, state.tsc_khz, error), error)
    counters = [found.pop(msrs.IA32_TSC, None) for found in values]
    deadlines = [found.pop(msrs.IA32_TSC_DEADLINE, 0) for found in values]
    for vcpu, found in zip(vcpus, values, strict=True):
        # First: it decides whether there is IA32_TSX_CTRL. And not where it is so: not every KVM lets it be set.
        told = found.pop(IA32_ARCH_CAPABILITIES, None)
        if told is not None and vcpu.read_capabilities() != told:
            vcpu.write_capabilities(told)
        ssp = found.pop(msrs.SSP, None)
        if ssp is not None:
            check(lib.pyhv_vcpu_set_ssp(vcpu.handle, ssp, error), error)
        lfence = found.pop(msrs.AMD64_DE_CFG, None)
        write_msrs(vcpu, found)
        if lfence is not None:
            # A host that does not know the bit takes none, and needs none (cpu/msrs.py).
            check(lib.pyhv_vcpu_set_msrs(vcpu.handle, [msrs.AMD64_DE_CFG], [lfence], 1, error), error)
    _apply_tsc(vcpus, counters, state.tsc_khz, taken)
    if state.irqchip:
        # Every LAPIC before the I/O APIC, which routes to them, and delivers at once what is pending.
        for vcpu, saved in pairs:
            if len(saved.lapic) != _LAPIC_SIZE:
                raise HostError("KVM_SET_LAPIC", 0, f"vCPU {vcpu.index}: {len(saved.lapic)} bytes, not {_LAPIC_SIZE}")
            check(lib.pyhv_vcpu_set_lapic(vcpu.handle, saved.lapic, error), error)
        _check_fits(lib.pyhv_vm_set_irqchip(vm.handle, structs.view("pyhv_irqchip", state.irqchip), error), error)
    for (vcpu, saved), deadline in zip(pairs, deadlines, strict=True):
        # After TSC and LAPIC: set before either the deadline is lost, and the timer never fires.
        if deadline:
            write_msrs(vcpu, {msrs.IA32_TSC_DEADLINE: deadline})
        # Clears pending exceptions: so before the events.
        check(lib.pyhv_vcpu_set_regs(vcpu.handle, structs.view("pyhv_regs", saved.regs), error), error)
        _check_fits(lib.pyhv_vcpu_set_events(vcpu.handle, structs.view("pyhv_events", saved.events), error), error)
        check(lib.pyhv_vcpu_set_debugregs(vcpu.handle, structs.view("pyhv_debugregs", saved.debugregs), error), error)
        # Last of the vCPU: from here on it may be woken.
        check(lib.pyhv_vcpu_set_mp_state(vcpu.handle, saved.mp_state, error), error)
    clock = ffi.new("struct pyhv_clock *", {"ns": state.clock + time.monotonic_ns() - taken})
    check(lib.pyhv_vm_set_clock(vm.handle, clock, error), error)
    for vcpu in vcpus:
        check(lib.pyhv_vcpu_clock_paused(vcpu.handle, error), error)


def _check_fits(result: int, error: Any) -> None:
    """check() of a call that is given a saved structure: ValueError for a number that no vCPU can have."""
    if result < 0 and error.errnum == errno.ERANGE:
        raise ValueError(str(to_exception(error)))
    check(result, error)


def _apply_tsc(vcpus: Sequence[KvmVcpu], counters: Sequence[int | None], khz: int, since: int) -> None:
    """Lets the vCPUs' time-stamp counters go on from what they showed at one moment: `since`, in ns of CLOCK_MONOTONIC.
    khz: their rate."""
    # Not by writing the MSR: KVM takes a value less than a second from what the counter shows for an attempt to
    # synchronize it with other vCPUs, and leaves it as it is. A guest saved in its first second would lose that time.
    offset = _tsc_offset(vcpus[0])
    now = 0 if offset is None else read_msrs(vcpus[0], [msrs.IA32_TSC])[msrs.IA32_TSC]
    shift = (time.monotonic_ns() - since) * khz // 1_000_000
    error = new_error()
    for vcpu, counter in zip(vcpus, counters, strict=True):
        if counter is None:
            continue
        if offset is None:  # before Linux 5.16
            write_msrs(vcpu, {msrs.IA32_TSC: counter + shift & _U64})
        else:
            wanted = counter + shift + offset - now & _U64
            check(lib.pyhv_vcpu_set_tsc_offset(vcpu.handle, wanted, error), error)


def _counters(vcpus: Sequence[KvmVcpu]) -> list[int | None]:
    """What the vCPUs' time-stamp counters show at one moment: read one after the other, they would jump for a guest
    that compares them. None where this KVM does not tell."""
    base = read_msrs(vcpus[0], [msrs.IA32_TSC]).get(msrs.IA32_TSC)
    first = _tsc_offset(vcpus[0])
    if base is None or first is None:
        return [None] * len(vcpus)
    counters: list[int | None] = [base]
    for vcpu in vcpus[1:]:
        offset = _tsc_offset(vcpu)
        assert offset is not None
        counters.append(base + offset - first & _U64)
    return counters


def _tsc_offset(vcpu: KvmVcpu) -> int | None:
    offset, error = ffi.new("uint64_t *"), new_error()
    return None if check(lib.pyhv_vcpu_get_tsc_offset(vcpu.handle, offset, error), error) else int(offset[0])


def read_msrs(vcpu: KvmVcpu, indices: Sequence[int]) -> dict[int, int]:
    """The values of those of the MSRs that this KVM has."""
    values: dict[int, int] = {}
    wanted = list(indices)
    out, error = ffi.new("uint64_t[]", max(len(wanted), 1)), new_error()
    while wanted:
        taken = check(lib.pyhv_vcpu_get_msrs(vcpu.handle, wanted, out, len(wanted), error), error)
        values.update(zip(wanted[:taken], out[0:taken], strict=True))
        wanted = wanted[taken + 1 :]  # the one that it stopped at does not exist here
    return values


def write_msrs(vcpu: KvmVcpu, values: Mapping[int, int]) -> None:
    """Writes MSRs; raises HostError naming the first that this KVM refuses."""
    indices, numbers = list(values), list(values.values())
    error = new_error()
    taken = check(lib.pyhv_vcpu_set_msrs(vcpu.handle, indices, numbers, len(indices), error), error)
    if taken < len(indices):
        index = indices[taken]
        name = msrs.NAMES.get(index, "an MSR that pyhv does not know")
        raise HostError("KVM_SET_MSRS", 0, f"vCPU {vcpu.index}: {name} (0x{index:x}) refuses 0x{numbers[taken]:x}")


def _shown_components(area: bytes, shown: Shown) -> bytes:
    """An XSAVE area in which only components are marked present that the guest's table shows: KVM before Linux 6.7
    hands out what the host has, and a lesser host would refuse it."""
    present = int.from_bytes(area[_XSTATE_BV], "little") & shown.components
    return area[: _XSTATE_BV.start] + present.to_bytes(8, "little") + area[_XSTATE_BV.stop :]


def _capture_irqchip(vm: KvmVm) -> bytes:
    if not vm.irqchip:
        return b""
    chip, error = ffi.new("struct pyhv_irqchip *"), new_error()
    check(lib.pyhv_vm_get_irqchip(vm.handle, chip, error), error)
    return structs.to_bytes(chip)
