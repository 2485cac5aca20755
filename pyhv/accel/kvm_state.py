"""Taking a VM's processors out of KVM, and putting them back: in an order that KVM's own side effects dictate.

Source of the reasons: Documentation/virt/kvm/api.rst and arch/x86/kvm/x86.c.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pyhv._native import check, ffi, lib, new_error
from pyhv.accel import structs
from pyhv.accel.state import DebugRegs, Events, Irqchip, ProcessorsState, VcpuState
from pyhv.cpu import msrs
from pyhv.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.accel.kvm import KvmVcpu, KvmVm
    from pyhv.cpu.table import CpuidTable

_U64 = (1 << 64) - 1
_XSAVE_MAX = 16384  # PYHV_XSAVE_MAX
_LAPIC_SIZE = 1024  # PYHV_LAPIC_SIZE

# The XSAVE area: XSTATE_BV stands at byte 512; x87 and SSE (components 0 and 1) are in the 512 bytes before it (SDM
# Vol. 1, "XSAVE Area").
_XSTATE_BV = slice(512, 520)
_LEGACY_COMPONENTS = 3

# Written apart from the others: see _apply_tsc() and apply().
_TIME_MSRS = (msrs.IA32_TSC, msrs.IA32_TSC_DEADLINE)


class Shown(NamedTuple):
    """What a guest can have, by its CPUID table."""

    msrs: tuple[int, ...]
    components: int
    """Those of the XSAVE area, a bit each."""


def warm_up(vcpus: Sequence[KvmVcpu], tables: Sequence[CpuidTable]) -> None:
    """Looks up what capture() and apply() need to know of the tables."""
    for vcpu, table in zip(vcpus, tables, strict=True):
        _shown(vcpu, table)


def _shown(vcpu: KvmVcpu, table: CpuidTable) -> Shown:
    if vcpu.shown is None:
        components = table.xcr0_mask | table.xss_mask | _LEGACY_COMPONENTS
        vcpu.shown = Shown(msrs.granted(table), components)
    return vcpu.shown


def capture(vm: KvmVm, vcpus: Sequence[KvmVcpu], tables: Sequence[CpuidTable]) -> ProcessorsState:
    """The state of a VM whose vCPUs all stand. tables: what their CPUID answers. Raises HostError."""
    error = new_error()
    clock = ffi.new("struct pyhv_clock *")
    check(lib.pyhv_vm_get_clock(vm.handle, clock, error), error)
    # At once: both go on while the rest is taken.
    tsc = read_msrs(vcpus[0], [msrs.IA32_TSC]).get(msrs.IA32_TSC)
    states = [_capture_vcpu(vm, vcpu, table) for vcpu, table in zip(vcpus, tables, strict=True)]
    return ProcessorsState(_same_moment(vcpus, states, tsc), _capture_irqchip(vm), clock.ns, vcpus[0].read_tsc_khz())


def _capture_vcpu(vm: KvmVm, vcpu: KvmVcpu, table: CpuidTable) -> VcpuState:
    handle, error = vcpu.handle, new_error()
    shown = _shown(vcpu, table)
    # First: the call itself settles INIT and SIPI that are pending, which changes registers and events.
    mp_state = check(lib.pyhv_vcpu_get_mp_state(handle, error), error)
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    xcr0 = ffi.new("uint64_t *")
    check(lib.pyhv_vcpu_get_xcr0(handle, xcr0, error), error)
    area = ffi.new("uint8_t[]", _XSAVE_MAX)
    size = check(lib.pyhv_vcpu_get_xsave(handle, area, _XSAVE_MAX, error), error)
    lapic = ffi.new("uint8_t[]", _LAPIC_SIZE)
    if vm.irqchip:
        check(lib.pyhv_vcpu_get_lapic(handle, lapic, error), error)
    debugregs = ffi.new("struct pyhv_debugregs *")
    check(lib.pyhv_vcpu_get_debugregs(handle, debugregs, error), error)
    values = read_msrs(vcpu, shown.msrs)
    # Last: what the calls before have settled or injected is in there.
    events = ffi.new("struct pyhv_events *")
    check(lib.pyhv_vcpu_get_events(handle, events, error), error)
    return VcpuState(
        vcpu=vcpu.index,
        regs=regs,
        sregs=sregs,
        xcr0=xcr0[0],
        xsave=_shown_components(bytes(ffi.buffer(area, size)), shown).rstrip(b"\0"),
        msrs=values,
        lapic=bytes(ffi.buffer(lapic)) if vm.irqchip else b"",
        events=structs.record(Events, events),
        debugregs=DebugRegs(tuple(debugregs.db), debugregs.dr6, debugregs.dr7),
        mp_state=mp_state,
    )


def apply(vm: KvmVm, vcpus: Sequence[KvmVcpu], tables: Sequence[CpuidTable], state: ProcessorsState) -> None:
    """Puts `state` into vCPUs that have never run. Their memory is mapped (PDPTRs are read from it) and their CPUID
    tables are set (control-register bits that the table forbids are refused). The clocks are those of the moment of
    the call. Raises HostError; the VM is then good for nothing but close()."""
    called = time.monotonic_ns()
    error = new_error()
    pairs = list(zip(vcpus, state.vcpus, strict=True))
    for vcpu, saved in pairs:
        vcpu.set_sregs(saved.sregs)
        # CR4.OSXSAVE, which SREGS brings, decides whether XCR0 may be set; XCR0 which components XSAVE may set.
        check(lib.pyhv_vcpu_set_xcr0(vcpu.handle, saved.xcr0, error), error)
        shown = _shown(vcpu, tables[vcpu.index])
        area = _shown_components(saved.xsave.ljust(_XSTATE_BV.stop, b"\0"), shown)
        # Never KVM_SET_FPU: it loses MXCSR.
        check(lib.pyhv_vcpu_set_xsave(vcpu.handle, area, len(area), error), error)
        # The rate before the counter: a new rate rescales what the counter holds.
        if vcpu.read_tsc_khz() != state.tsc_khz:
            # Refused where the host cannot scale. That this guest can live with the host's rate has been decided
            # before (cpu/compare.py), and nothing is left to do about it here.
            lib.pyhv_vcpu_set_tsc_khz(vcpu.handle, state.tsc_khz, error)
    for vcpu, saved in pairs:
        write_msrs(vcpu, {number: value for number, value in saved.msrs.items() if number not in _TIME_MSRS})
    _apply_tsc(pairs, state.tsc_khz, called)
    if state.irqchip is not None:
        # Every LAPIC before the I/O APIC, which routes to them, and delivers at once what is pending.
        for vcpu, saved in pairs:
            if len(saved.lapic) != _LAPIC_SIZE:
                raise HostError("KVM_SET_LAPIC", 0, f"vCPU {saved.vcpu}: {len(saved.lapic)} bytes, not {_LAPIC_SIZE}")
            check(lib.pyhv_vcpu_set_lapic(vcpu.handle, saved.lapic, error), error)
        _apply_irqchip(vm, state.irqchip)
    for vcpu, saved in pairs:
        # After TSC and LAPIC: set before either the deadline is lost, and the timer never fires.
        if deadline := saved.msrs.get(msrs.IA32_TSC_DEADLINE, 0):
            write_msrs(vcpu, {msrs.IA32_TSC_DEADLINE: deadline})
        vcpu.set_regs(saved.regs)  # clears pending exceptions: so before the events
        check(lib.pyhv_vcpu_set_events(vcpu.handle, structs.struct("pyhv_events", saved.events), error), error)
        check(lib.pyhv_vcpu_set_debugregs(vcpu.handle, structs.struct("pyhv_debugregs", saved.debugregs), error), error)
        # Last of the vCPU: from here on it may be woken.
        check(lib.pyhv_vcpu_set_mp_state(vcpu.handle, saved.mp_state, error), error)
    clock = ffi.new("struct pyhv_clock *", {"ns": state.clock + time.monotonic_ns() - called})
    check(lib.pyhv_vm_set_clock(vm.handle, clock, error), error)
    for vcpu, _ in pairs:
        check(lib.pyhv_vcpu_clock_paused(vcpu.handle, error), error)


def _apply_tsc(pairs: Sequence[tuple[KvmVcpu, VcpuState]], khz: int, since: int) -> None:
    """Lets the vCPUs' time-stamp counters go on where they were saved, from one and the same moment on: since, in ns of
    CLOCK_MONOTONIC. khz: their rate."""
    first, saved_first = pairs[0]
    if msrs.IA32_TSC not in saved_first.msrs:
        return
    # Not by writing the MSR: KVM takes a value less than a second from what the counter shows for an attempt to
    # synchronize it with other vCPUs, and leaves it as it is. A guest saved in its first second would lose that time.
    offset = _tsc_offset(first)
    if offset is None:  # before Linux 5.16
        for vcpu, saved in pairs:
            write_msrs(vcpu, {msrs.IA32_TSC: saved.msrs[msrs.IA32_TSC]})
        return
    shift = offset - read_msrs(first, [msrs.IA32_TSC])[msrs.IA32_TSC] + (time.monotonic_ns() - since) * khz // 1_000_000
    error = new_error()
    for vcpu, saved in pairs:
        wanted = saved.msrs[msrs.IA32_TSC] + shift & _U64
        check(lib.pyhv_vcpu_set_tsc_offset(vcpu.handle, wanted, error), error)


def _same_moment(
    vcpus: Sequence[KvmVcpu], states: Sequence[VcpuState], base: int | None
) -> tuple[VcpuState, ...]:
    """The states with the time-stamp counters that the vCPUs had at one moment, when that of the first was `base`: they
    were read one after the other, and a guest that compares them would see them jump."""
    offsets = [_tsc_offset(vcpu) for vcpu in vcpus]
    if base is None or offsets[0] is None:
        return tuple(states)
    for state, offset in zip(states, offsets, strict=True):
        assert offset is not None
        state.msrs[msrs.IA32_TSC] = base + offset - offsets[0] & _U64
    return tuple(states)


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


def _capture_irqchip(vm: KvmVm) -> Irqchip | None:
    if not vm.irqchip:
        return None
    chip, error = ffi.new("struct pyhv_irqchip *"), new_error()
    check(lib.pyhv_vm_get_irqchip(vm.handle, chip, error), error)
    return structs.to_irqchip(chip, vm.pit)


def _apply_irqchip(vm: KvmVm, irqchip: Irqchip) -> None:
    error = new_error()
    if bool(irqchip.pit) != vm.pit:
        raise HostError("KVM_SET_PIT2", 0, "one of the state and the VM has a PIT, the other has none")
    check(lib.pyhv_vm_set_irqchip(vm.handle, structs.from_irqchip(irqchip), error), error)
