"""The software accelerator: a CPU emulator library (Unicorn 2.1.4) in this process; see docs/emulator.md.

The library is not imported: it is found here and opened by the C engine.
"""

from __future__ import annotations

import errno
import os
import sys

from pyhv._native import check, cpuid, ffi, lib, new_error
from pyhv.accel.data import Exit, Stop
from pyhv.accel.engine import MAX_MSRS, AccelVm
from pyhv.errors import NotAvailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

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
        config = ffi.new("struct pyhv_vm_config *", {"irqchip": irqchip, "pit": pit, "tsc_khz": self.tsc_khz})
        error = new_error()
        return AccelVm(check(lib.pyhv_emulator_vm_create(config, bus or ffi.NULL, error), error), msr_list)

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
    indices = ffi.new("uint32_t[]", MAX_MSRS)
    return tuple(indices[0 : lib.pyhv_emulator_msr_list(indices, MAX_MSRS)])


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
