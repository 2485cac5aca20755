"""The software accelerator: a CPU emulator library (Unicorn 2.1.4) in this process; see docs/emulator.md.

Thin classes over the C engine's objects, as in kvm.py. The library is not imported: it is found here and opened there.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any, cast

from pyhv._native import check, cpuid, ffi, lib, new_error
from pyhv.accel import structs
from pyhv.accel.data import CpuidRecord, Exit, Regs, Sregs, Stop
from pyhv.errors import HostError, NotAvailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.accel.protocol import AccelVcpu, AccelVm
    from pyhv.accel.state import RawState
    from pyhv.cpu.host import HostDescription
    from pyhv.cpu.table import CpuidTable

LIBRARY = "libunicorn.so.2"
_INSTALL = "pip install 'pyhv[emulator]' (it brings unicorn 2.1.4, GPL-2.0)"

_NO_CODE = (
    "it translates code into memory that is writable and executable, which this process may not have "
    "(PR_SET_MDWE, systemd's MemoryDenyWriteExecute=yes)"
)

# The features that the library has, by the table `tcg_features` of its qemu/target/i386/cpu.c. Left out of them: SVM,
# which no guest is shown; XSAVE, whose components it lacks (AVX), so that nothing would come of it; MPX, PKU and
# 5-level paging, whose state is not moved; MONITOR, with no one to wait for; PCOMMIT, which no processor has;
# SSE4A, whose INSERTQ takes its bits from the wrong register. What is left tests/host/test_emulator_features.py
# executes.
FEATURES = frozenset(
    "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 "
    "pni pclmulqdq ssse3 cx16 sse4_1 sse4_2 movbe popcnt aes hypervisor rdrand "
    "fsgsbase bmi1 smep bmi2 erms adx smap clflushopt clwb "
    "syscall nx mmxext rdtscp 3dnow 3dnowext pdpe1gb lm lahf_lm cr8_legacy abm".split()
)

# Where the tables end: what follows describes what the library lacks (XSAVE, processor trace, ...).
_MAX_BASIC, _MAX_EXTENDED = 0xB, 0x80000008
_PHYSICAL_BITS = 40

# What the TSC counts at where the host's rate is not known: its value is made of the clock's.
_TSC_KHZ = 1_000_000

_MAX_ENTRIES = 256  # PYHV_CPUID_MAX_ENTRIES
_MAX_MSRS = 256


class EmulatorVcpu:
    """The vCPU (struct pyhv_emulator_vcpu); see AccelVcpu."""

    def __init__(self, vm: EmulatorVm, index: int, tsc_khz: int) -> None:
        self.index = index
        error = new_error()
        self.msrs: Any = None
        """Those of its state; emulator_state.py looks them up once."""
        self.handle: Any = check(lib.pyhv_emulator_vcpu_create(vm.handle, index, tsc_khz, error), error)
        self._exit: Any = ffi.new("struct pyhv_exit *")

    def set_cpuid(self, table: CpuidTable) -> None:
        entries = table.as_entries()
        error = new_error()
        check(lib.pyhv_emulator_vcpu_set_cpuid(self.handle, entries, len(entries), error), error)

    def get_cpuid(self) -> CpuidTable:
        entries = ffi.new("struct pyhv_cpuid_entry[]", _MAX_ENTRIES)
        error = new_error()
        count = check(lib.pyhv_emulator_vcpu_get_cpuid(self.handle, entries, _MAX_ENTRIES, error), error)
        return structs.to_table(entries[0:count])

    def get_regs(self) -> Regs:
        regs, error = ffi.new("struct pyhv_regs *"), new_error()
        check(lib.pyhv_emulator_vcpu_get_regs(self.handle, regs, error), error)
        return structs.record(Regs, regs)

    def set_regs(self, regs: Regs) -> None:
        error = new_error()
        check(lib.pyhv_emulator_vcpu_set_regs(self.handle, structs.struct("pyhv_regs", regs), error), error)

    def get_sregs(self) -> Sregs:
        sregs, error = ffi.new("struct pyhv_sregs *"), new_error()
        check(lib.pyhv_emulator_vcpu_get_sregs(self.handle, sregs, error), error)
        return structs.to_sregs(sregs)

    def set_sregs(self, sregs: Sregs) -> None:
        error = new_error()
        check(lib.pyhv_emulator_vcpu_set_sregs(self.handle, structs.from_sregs(sregs), error), error)

    def read_tsc_khz(self) -> int:
        return int(lib.pyhv_emulator_vcpu_get_tsc_khz(self.handle))

    def read_capabilities(self) -> int:
        raise HostError("IA32_ARCH_CAPABILITIES", 0, "the emulator does not have it")

    def write_capabilities(self, value: int) -> None:
        raise HostError("IA32_ARCH_CAPABILITIES", 0, "the emulator does not have it")

    def trap(self, table: CpuidTable, sites: Sequence[int], log_capacity: int = 0) -> None:
        """Every CPUID is answered by us anyway, at every address and privilege level; what remains is the log."""
        error = new_error()
        check(lib.pyhv_emulator_vcpu_log_cpuid(self.handle, log_capacity, error), error)

    def trap_log(self) -> list[CpuidRecord]:
        return structs.take_log(lambda records, room: lib.pyhv_emulator_vcpu_cpuid_log(self.handle, records, room))

    def run(self) -> Exit:
        lib.pyhv_emulator_vcpu_run(self.handle, self._exit)
        return structs.to_exit(self._exit)

    def step(self) -> Exit:
        lib.pyhv_emulator_vcpu_step(self.handle, self._exit)
        return structs.to_exit(self._exit)

    def kick(self) -> None:
        error = new_error()
        check(lib.pyhv_emulator_vcpu_kick(self.handle, error), error)

    def waits_for_ever(self) -> bool:
        return bool(lib.pyhv_emulator_vcpu_waits_for_ever(self.handle))

    def counters(self) -> dict[str, int]:
        return structs.to_counters(lib.pyhv_emulator_vcpu_counters(self.handle))

    def close(self) -> None:
        handle, self.handle = self.handle, ffi.NULL  # first: Ctrl-C may come after any call
        lib.pyhv_emulator_vcpu_destroy(handle)


class EmulatorVm:
    """One VM (struct pyhv_emulator_vm); see AccelVm."""

    def __init__(self, bus: Any, irqchip: bool, pit: bool, tsc_khz: int) -> None:
        self.irqchip = irqchip
        self.pit = irqchip and pit
        self._tsc_khz = tsc_khz
        config = ffi.new("struct pyhv_vm_config *", {"irqchip": irqchip, "pit": pit})
        error = new_error()
        self.handle: Any = check(lib.pyhv_emulator_vm_create(config, bus or ffi.NULL, error), error)

    def map(self, gpa: int, size: int, host: Any) -> None:
        error = new_error()
        check(lib.pyhv_emulator_vm_map(self.handle, gpa, size, host, error), error)

    def log_dirty(self, on: bool) -> None:
        error = new_error()
        check(lib.pyhv_emulator_vm_log_dirty(self.handle, on, error), error)

    def take_dirty(self, bitmap: Any) -> None:
        error = new_error()
        check(lib.pyhv_emulator_vm_take_dirty(self.handle, bitmap, error), error)

    def create_vcpu(self, index: int) -> EmulatorVcpu:
        return EmulatorVcpu(self, index, self._tsc_khz)

    def resume(self) -> None:
        """Its timers count what they miss as one tick anyway, and it has no clock that could tell the guest."""

    def warm_up(self, vcpus: Sequence[AccelVcpu], tables: Sequence[CpuidTable]) -> None:
        from pyhv.accel import emulator_state

        emulator_state.warm_up(cast("Sequence[EmulatorVcpu]", vcpus), tables)

    def capture(self, vcpus: Sequence[AccelVcpu], tables: Sequence[CpuidTable]) -> RawState:
        from pyhv.accel import emulator_state

        return emulator_state.capture(self, cast("Sequence[EmulatorVcpu]", vcpus), tables)

    def apply(
        self, vcpus: Sequence[AccelVcpu], tables: Sequence[CpuidTable], state: RawState, elapsed: int
    ) -> None:
        from pyhv.accel import emulator_state

        emulator_state.apply(self, cast("Sequence[EmulatorVcpu]", vcpus), tables, state, elapsed)

    def close(self) -> None:
        handle, self.handle = self.handle, ffi.NULL  # first: Ctrl-C may come after any call
        lib.pyhv_emulator_vm_destroy(handle)


class Emulator:
    """The library, opened; see Accelerator. Raises NotAvailable with what to do where it cannot be used."""

    name = "emulator"
    max_vcpus = 1

    def __init__(self) -> None:
        self._description: HostDescription | None = None
        path = find_library()
        error = new_error()
        if lib.pyhv_emulator_open(path.encode(), error) < 0:
            detail = ffi.string(error.detail).decode("utf-8", "replace")
            if path == LIBRARY and error.errnum == errno.ENOENT:
                raise NotAvailable("the emulator", f"{LIBRARY} is not installed", _INSTALL)
            if error.errnum in (errno.EACCES, errno.EPERM):
                raise NotAvailable("the emulator", _NO_CODE, 'allow it to pyhv, or use KVM: accel="kvm"')
            raise NotAvailable("the emulator", detail, _INSTALL)
        self.tsc_khz = int(lib.pyhv_emulator_host_tsc_khz()) or _TSC_KHZ

    def describe(self, whole: bool = True) -> HostDescription:
        if self._description is None:
            from pyhv.cpu.host import HostDescription

            self._description = HostDescription(
                offered_table(),
                os.uname().release,
                self.name,
                msrs=msr_list(),
                tsc_khz=self.tsc_khz,
                tsc_scaling=True,
            )
        return self._description

    def prepare(self) -> None:
        """Nothing takes time that could be spent meanwhile."""

    def create_vm(self, bus: Any = None, irqchip: bool = True, pit: bool = False, quick: bool = False) -> AccelVm:
        return EmulatorVm(bus, irqchip, pit, self.tsc_khz)

    def explain(self, exit: Exit) -> str:
        if exit.stop == Stop.INTERNAL_ERROR and exit.suberror == lib.PYHV_SUBERROR_LOST_MEMORY:
            return "guest memory that the guest wanted is gone"
        if exit.stop == Stop.INTERNAL_ERROR and exit.suberror == lib.PYHV_SUBERROR_NO_EVENT:
            return exit.error
        if exit.stop == Stop.INTERNAL_ERROR:
            return "the emulator finds no instruction there: it is no RAM"
        return f"the emulator stopped for reason {exit.exit_reason}"

    def close(self) -> None:
        """The library stays open until the process ends."""


def msr_list() -> tuple[int, ...]:
    """The MSRs that make up a vCPU's state, ascending."""
    indices = ffi.new("uint32_t[]", _MAX_MSRS)
    return tuple(indices[0 : lib.pyhv_emulator_msr_list(indices, _MAX_MSRS)])


def find_library() -> str:
    """Where the library is: in the Python package `unicorn`, which is not imported; else its name, for the system's own
    places. The environment's PYHV_UNICORN, the path of a file, goes before both."""
    if path := os.environ.get("PYHV_UNICORN"):
        return path if "/" in path else f"./{path}"
    for directory in sys.path:
        path = os.path.join(directory or ".", "unicorn", "lib", LIBRARY)
        if os.path.exists(path):
            return path
    return LIBRARY


def offered_table() -> CpuidTable:
    """What guests can be shown: vendor, version, name and caches of this host's processor, and of its features those
    that the library has. So a guest of the emulator can go on on this host's KVM, as far as that offers them."""
    from pyhv.cpu.features import FEATURES as ALL
    from pyhv.cpu.host import as_kvm_host
    from pyhv.cpu.table import EXTENDED, HYPERVISOR, CpuidTable, Registers

    host = as_kvm_host(_native_dump()).table
    offered: dict[tuple[int, int], Registers] = {}
    for (leaf, subleaf), registers in host.entries.items():
        if leaf <= _MAX_BASIC or EXTENDED <= leaf <= _MAX_EXTENDED:
            offered[leaf, subleaf] = registers
    for feature in ALL:
        key = feature.word.leaf, feature.word.subleaf
        kept = feature.name in FEATURES or (feature.mirrors is not None and feature.mirrors in FEATURES)
        if key in offered and feature.sense == "plain" and not kept:
            value = getattr(offered[key], feature.word.register) & ~feature.mask
            offered[key] = offered[key]._replace(**{feature.word.register: value})
    offered[0, 0] = offered[0, 0]._replace(eax=min(host.max_basic, _MAX_BASIC))
    if host.max_extended:
        offered[EXTENDED, 0] = offered[EXTENDED, 0]._replace(eax=min(host.max_extended, _MAX_EXTENDED))
    if (0x80000008, 0) in offered:
        physical = min(host.physical_bits, _PHYSICAL_BITS)
        offered[0x80000008, 0] = offered[0x80000008, 0]._replace(eax=48 << 8 | physical)
    assert not any(HYPERVISOR <= leaf < EXTENDED for leaf, _ in offered)
    return CpuidTable(offered)


def _native_dump() -> CpuidTable:
    """CPUID as the processor that runs this program answers it, as far as offered_table() needs it."""
    from pyhv.cpu.table import EXTENDED, CpuidTable, Registers

    def ask(leaf: int, subleaf: int = 0) -> Registers:
        return Registers(*cpuid(leaf, subleaf))

    entries = {(leaf, 0): ask(leaf) for leaf in range(min(ask(0).eax, _MAX_BASIC) + 1)}
    entries[0, 0] = ask(0)._replace(eax=min(ask(0).eax, _MAX_BASIC))
    most = ask(EXTENDED).eax
    if EXTENDED <= most <= EXTENDED + 0xFFFF:
        entries |= {(leaf, 0): ask(leaf) for leaf in range(EXTENDED, min(most, _MAX_EXTENDED) + 1)}
        entries[EXTENDED, 0] = ask(EXTENDED)._replace(eax=min(most, _MAX_EXTENDED))
    if (4, 0) in entries:  # Intel's caches, one a subleaf
        for subleaf in range(1, 16):
            if not entries[4, subleaf - 1].eax & 0x1F:
                break
            entries[4, subleaf] = ask(4, subleaf)
    if (7, 0) in entries:
        entries |= {(7, subleaf): ask(7, subleaf) for subleaf in range(1, min(entries[7, 0].eax, 2) + 1)}
    return CpuidTable(entries)
