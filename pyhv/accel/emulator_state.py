"""Taking a VM's processor out of the emulator, and putting one in, be it the emulator's own or KVM's.

What the emulator does not have is refused by name, before anything is changed.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyhv._native import check, ffi, lib, new_error
from pyhv.accel import structs
from pyhv.accel.emulator import msr_list
from pyhv.accel.state import RawState, RawVcpu
from pyhv.cpu import msrs
from pyhv.errors import BadInput, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyhv.accel.emulator import EmulatorVcpu, EmulatorVm
    from pyhv.cpu.table import CpuidTable

_U64 = (1 << 64) - 1
_XSAVE_MAX = 16384  # PYHV_XSAVE_MAX
_LAPIC_SIZE = 1024  # PYHV_LAPIC_SIZE

# XSTATE_BV of the XSAVE area (SDM Vol. 1, "XSAVE Area"), and the components before it: x87 and SSE.
_XSTATE_BV = slice(512, 520)
_LEGACY_COMPONENTS = 3


def warm_up(vcpus: Sequence[EmulatorVcpu], tables: Sequence[CpuidTable]) -> None:
    """Looks up what capture() needs to know of the tables."""
    for vcpu, table in zip(vcpus, tables, strict=True):
        _msrs(vcpu, table)


def _msrs(vcpu: EmulatorVcpu, table: CpuidTable) -> Any:
    """The MSRs that the table grants and the emulator has: uint32_t[]."""
    if vcpu.msrs is None:
        has = msr_list()
        vcpu.msrs = ffi.new("uint32_t[]", [index for index in msrs.granted(table) if index in has])
    return vcpu.msrs


def capture(vm: EmulatorVm, vcpus: Sequence[EmulatorVcpu], tables: Sequence[CpuidTable]) -> RawState:
    """The state of a VM whose vCPU stands. tables: what its CPUID answers. Raises HostError."""
    (vcpu,), (table,) = vcpus, tables
    handle, error = vcpu.handle, new_error()
    clock = lib.pyhv_emulator_vm_get_clock(vm.handle)
    wanted = _msrs(vcpu, table)
    values = ffi.new("uint64_t[]", len(wanted))
    check(lib.pyhv_emulator_vcpu_get_msrs(handle, wanted, values, len(wanted), error), error)
    area = ffi.new("uint8_t[]", _XSAVE_MAX)
    size = check(lib.pyhv_emulator_vcpu_get_xsave(handle, area, _XSAVE_MAX, error), error)
    lapic = ffi.new("uint8_t[]", _LAPIC_SIZE)
    lib.pyhv_emulator_vm_get_lapic(vm.handle, lapic)
    regs, sregs = ffi.new("struct pyhv_regs *"), ffi.new("struct pyhv_sregs *")
    check(lib.pyhv_emulator_vcpu_get_regs(handle, regs, error), error)
    check(lib.pyhv_emulator_vcpu_get_sregs(handle, sregs, error), error)
    debugregs, events = ffi.new("struct pyhv_debugregs *"), ffi.new("struct pyhv_events *")
    check(lib.pyhv_emulator_vcpu_get_debugregs(handle, debugregs, error), error)
    check(lib.pyhv_emulator_vcpu_get_events(handle, events, error), error)
    state = RawVcpu(
        regs=structs.to_bytes(regs),
        sregs=structs.to_bytes(sregs),
        events=structs.to_bytes(events),
        debugregs=structs.to_bytes(debugregs),
        xcr0=1,
        mp_state=lib.pyhv_emulator_vcpu_get_mp_state(handle),
        msr_indices=structs.to_bytes(wanted),
        msr_values=structs.to_bytes(values),
        lapic=structs.to_bytes(lapic) if vm.irqchip else b"",
        xsave=bytes(ffi.buffer(area, size)),
    )
    return RawState((state,), _capture_irqchip(vm), vm.pit, clock, vcpu.read_tsc_khz())


def apply(
    vm: EmulatorVm, vcpus: Sequence[EmulatorVcpu], tables: Sequence[CpuidTable], state: RawState, elapsed: int
) -> None:
    """Puts `state` into a vCPU that has never run, and whose memory and table are set. Its clocks go on as if it had
    been taken `elapsed` nanoseconds before the call. Raises BadInput for what the emulator does not have, HostError,
    ValueError for bytes that are no state; the VM is then good for nothing but close()."""
    (vcpu,), (table,), (saved,) = vcpus, tables, state.vcpus
    values = structs.msrs(saved)
    msrs.check_granted(values, frozenset(msrs.granted(table)), vcpu.index)
    # Without effect here: the emulator's LFENCE waits anyway.
    values.pop(msrs.AMD64_DE_CFG, None)
    _check(saved, values)
    handle, error = vcpu.handle, new_error()
    check(lib.pyhv_emulator_vcpu_set_sregs(handle, structs.view("pyhv_sregs", saved.sregs), error), error)
    area = saved.xsave.ljust(_XSTATE_BV.stop, b"\0")
    check(lib.pyhv_emulator_vcpu_set_xsave(handle, area, len(area), error), error)
    # The rate before the counter, which goes on from the moment it is set.
    lib.pyhv_emulator_vcpu_set_tsc_khz(handle, state.tsc_khz)
    if msrs.IA32_TSC in values:
        values[msrs.IA32_TSC] = values[msrs.IA32_TSC] + elapsed * state.tsc_khz // 1_000_000 & _U64
    _write_msrs(vcpu, values)
    if state.irqchip:
        if len(saved.lapic) != _LAPIC_SIZE:
            raise HostError("local APIC", 0, f"{len(saved.lapic)} bytes, not {_LAPIC_SIZE}")
        lib.pyhv_emulator_vm_set_lapic(vm.handle, saved.lapic)
        chip = structs.view("pyhv_irqchip", state.irqchip)
        check(lib.pyhv_emulator_vm_set_irqchip(vm.handle, chip, error), error)
    check(lib.pyhv_emulator_vcpu_set_regs(handle, structs.view("pyhv_regs", saved.regs), error), error)
    debugregs = structs.view("pyhv_debugregs", saved.debugregs)
    check(lib.pyhv_emulator_vcpu_set_debugregs(handle, debugregs, error), error)
    check(lib.pyhv_emulator_vcpu_set_mp_state(handle, saved.mp_state, error), error)
    # Last: an exception or interrupt that was on its way is delivered here, to the stack and the tables that are set.
    check(lib.pyhv_emulator_vcpu_set_events(handle, structs.view("pyhv_events", saved.events), error), error)
    lib.pyhv_emulator_vm_set_clock(vm.handle, state.clock + elapsed)


def _check(saved: RawVcpu, values: dict[int, int]) -> None:
    """Raises BadInput with all that the emulator cannot take over."""
    has = msr_list()
    missing = [index for index, value in values.items() if value and index not in has]
    wrong = [msrs.NAMES.get(index, f"MSR {index:#x}") for index in missing]
    if saved.xcr0 != 1:
        wrong.append(f"XCR0 {saved.xcr0:#x}")
    present = int.from_bytes(saved.xsave[_XSTATE_BV], "little")
    if present & ~_LEGACY_COMPONENTS:
        wrong.append(f"XSAVE components {present & ~_LEGACY_COMPONENTS:#x}")
    if wrong:
        raise BadInput("this guest's state", f"the emulator does not have {', '.join(wrong)}", "let it go on on KVM")


def _write_msrs(vcpu: EmulatorVcpu, values: dict[int, int]) -> None:
    has = msr_list()
    indices = [index for index in values if index in has]
    numbers = [values[index] for index in indices]
    error = new_error()
    taken = check(lib.pyhv_emulator_vcpu_set_msrs(vcpu.handle, indices, numbers, len(indices), error), error)
    if taken < len(indices):
        name = msrs.NAMES.get(indices[taken], "an MSR that pyhv does not know")
        raise HostError("the emulator", 0, f"{name} (0x{indices[taken]:x}) refuses 0x{numbers[taken]:x}")


def _capture_irqchip(vm: EmulatorVm) -> bytes:
    if not vm.irqchip:
        return b""
    chip = ffi.new("struct pyhv_irqchip *")
    lib.pyhv_emulator_vm_get_irqchip(vm.handle, chip)
    return structs.to_bytes(chip)
