"""The KVM accelerator: thin classes over the C engine's objects."""

from __future__ import annotations

import errno

from pyhv._native import check, cpuid, ffi, lib, new_error
from pyhv.accel import structs
from pyhv.accel.data import CpuidRecord, Exit, Regs, Sregs
from pyhv.errors import HostError, NotAvailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pyhv.accel.kvm_state import Carried, Shown
    from pyhv.accel.protocol import AccelVcpu
    from pyhv.accel.state import RawState
    from pyhv.cpu.host import HostDescription
    from pyhv.cpu.table import CpuidTable

DEVICE = "/dev/kvm"

# Capability numbers of <linux/kvm.h> (KVM_CAP_*).
CAP_MAX_VCPUS = 66
CAP_TSC_CONTROL = 60
CAP_TSC_DEADLINE_TIMER = 72

_MAX_ENTRIES = 256  # PYHV_CPUID_MAX_ENTRIES
_MAX_MSRS = 2048


class KvmVcpu:
    """One vCPU (struct pyhv_vcpu); see AccelVcpu."""

    def __init__(self, vm: KvmVm, index: int) -> None:
        self.index = index
        error = new_error()
        self.handle: Any = check(lib.pyhv_vcpu_create(vm.handle, index, error), error)
        self._exit: Any = ffi.new("struct pyhv_exit *")
        self._table: Any = None  # the trap's table, which must live as long as the vCPU
        self.shown: Shown | None = None
        """What its table lets the guest have; kvm_state.py looks it up once."""
        self.carried: Carried | None = None
        """What of its MSRs is read; likewise."""

    def set_cpuid(self, table: CpuidTable) -> None:
        entries = table.as_entries()
        error = new_error()
        check(lib.pyhv_vcpu_set_cpuid(self.handle, entries, len(entries), error), error)

    def get_cpuid(self) -> CpuidTable:
        entries = ffi.new("struct pyhv_cpuid_entry[]", _MAX_ENTRIES)
        error = new_error()
        count = check(lib.pyhv_vcpu_get_cpuid(self.handle, entries, _MAX_ENTRIES, error), error)
        return structs.to_table(entries[0:count])

    def get_regs(self) -> Regs:
        regs, error = ffi.new("struct pyhv_regs *"), new_error()
        check(lib.pyhv_vcpu_get_regs(self.handle, regs, error), error)
        return structs.record(Regs, regs)

    def set_regs(self, regs: Regs) -> None:
        error = new_error()
        check(lib.pyhv_vcpu_set_regs(self.handle, structs.struct("pyhv_regs", regs), error), error)

    def get_sregs(self) -> Sregs:
        sregs, error = ffi.new("struct pyhv_sregs *"), new_error()
        check(lib.pyhv_vcpu_get_sregs(self.handle, sregs, error), error)
        return structs.to_sregs(sregs)

    def set_sregs(self, sregs: Sregs) -> None:
        error = new_error()
        check(lib.pyhv_vcpu_set_sregs(self.handle, structs.from_sregs(sregs), error), error)

    def read_tsc_khz(self) -> int:
        error = new_error()
        return int(check(lib.pyhv_vcpu_get_tsc_khz(self.handle, error), error))

    def read_capabilities(self) -> int:
        from pyhv.accel import kvm_state
        from pyhv.cpu.arch_capabilities import IA32_ARCH_CAPABILITIES

        return kvm_state.read_msrs(self, [IA32_ARCH_CAPABILITIES]).get(IA32_ARCH_CAPABILITIES, 0)

    def write_capabilities(self, value: int) -> None:
        from pyhv.accel import kvm_state
        from pyhv.cpu.arch_capabilities import IA32_ARCH_CAPABILITIES

        kvm_state.write_msrs(self, {IA32_ARCH_CAPABILITIES: value})

    def trap(self, table: CpuidTable, sites: Sequence[int], log_capacity: int = 0) -> None:
        entries = table.as_entries()
        self._table = ffi.new("struct pyhv_cpuid_table *")
        error = new_error()
        check(lib.pyhv_cpuid_table_init(self._table, entries, len(entries), error), error)
        config = ffi.new("struct pyhv_trap_config *")
        config.table = self._table
        config.site_count = len(sites)
        config.log_capacity = log_capacity
        for i, site in enumerate(sites):
            config.sites[i] = site
        check(lib.pyhv_vcpu_trap(self.handle, config, error), error)

    def trap_log(self) -> list[CpuidRecord]:
        return structs.take_log(lambda records, room: lib.pyhv_vcpu_trap_log(self.handle, records, room))

    def run(self) -> Exit:
        lib.pyhv_vcpu_run(self.handle, self._exit)
        return structs.to_exit(self._exit)

    def step(self) -> Exit:
        lib.pyhv_vcpu_step(self.handle, self._exit)
        return structs.to_exit(self._exit)

    def kick(self) -> None:
        error = new_error()
        check(lib.pyhv_vcpu_kick(self.handle, error), error)

    def waits_for_ever(self) -> bool:
        error = new_error()
        return bool(check(lib.pyhv_vcpu_waits_for_ever(self.handle, error), error))

    def counters(self) -> dict[str, int]:
        return structs.to_counters(lib.pyhv_vcpu_counters(self.handle))

    def close(self) -> None:
        handle, self.handle = self.handle, ffi.NULL  # first: Ctrl-C may come after any call
        lib.pyhv_vcpu_destroy(handle)


class KvmVm:
    """One VM (struct pyhv_vm); see AccelVm."""

    def __init__(self, kvm_fd: int, bus: Any, irqchip: bool, pit: bool, quick: bool) -> None:
        self.irqchip = irqchip
        self.pit = irqchip and pit
        self._kvm_fd = kvm_fd
        config = ffi.new("struct pyhv_vm_config *", {"irqchip": irqchip, "pit": pit, "late": quick})
        error = new_error()
        self.handle: Any = check(lib.pyhv_vm_create(kvm_fd, config, bus or ffi.NULL, error), error)

    def adopt(self, bus: Any, pit: bool) -> None:
        """Makes of a VM with an irqchip, and with neither bus nor PIT, what the caller of create_vm() wants."""
        lib.pyhv_vm_set_bus(self.handle, bus)
        if pit:
            error = new_error()
            try:
                check(lib.pyhv_vm_add_pit(self.handle, error), error)
            except HostError:
                self.close()
                raise
            self.pit = True

    def map(self, gpa: int, size: int, host: Any) -> None:
        error = new_error()
        check(lib.pyhv_vm_map(self.handle, gpa, size, host, error), error)

    def log_dirty(self, on: bool) -> None:
        error = new_error()
        check(lib.pyhv_vm_log_dirty(self.handle, on, error), error)

    def take_dirty(self, bitmap: Any) -> None:
        error = new_error()
        check(lib.pyhv_vm_take_dirty(self.handle, bitmap, error), error)

    def create_vcpu(self, index: int) -> KvmVcpu:
        return KvmVcpu(self, index)

    def resume(self) -> None:
        error = new_error()
        check(lib.pyhv_vm_resume(self.handle, error), error)

    def msr_list(self) -> tuple[int, ...]:
        """The MSRs that KVM lists (KVM_GET_MSR_INDEX_LIST)."""
        return _msr_list(self._kvm_fd, False)

    def warm_up(self, vcpus: Sequence[AccelVcpu], tables: Sequence[CpuidTable]) -> None:
        from pyhv.accel import kvm_state

        kvm_state.warm_up(self, vcpus, tables)  # type: ignore[arg-type]  # they are this VM's

    def capture(self, vcpus: Sequence[AccelVcpu], tables: Sequence[CpuidTable]) -> RawState:
        from pyhv.accel import kvm_state

        return kvm_state.capture(self, vcpus, tables)  # type: ignore[arg-type]  # they are this VM's

    def apply(
        self, vcpus: Sequence[AccelVcpu], tables: Sequence[CpuidTable], state: RawState, elapsed: int
    ) -> None:
        from pyhv.accel import kvm_state

        kvm_state.apply(self, vcpus, tables, state, elapsed)  # type: ignore[arg-type]

    def close(self) -> None:
        handle, self.handle = self.handle, ffi.NULL  # first: Ctrl-C may come after any call
        lib.pyhv_vm_destroy(handle)


class Kvm:
    """KVM through /dev/kvm; see Accelerator. Raises NotAvailable with what to do where it cannot be used."""

    name = "kvm"

    def __init__(self) -> None:
        self._description: HostDescription | None = None
        self._spares: list[KvmVm] = []
        """At most one VM made ahead of time by prepare(); a list, for its pop() is safe among threads."""
        error = new_error()
        self.fd: int = lib.pyhv_kvm_open(DEVICE.encode(), error)
        if self.fd < 0:
            raise _explain(error.errnum, ffi.string(error.detail).decode())
        self.max_vcpus = self.check_extension(CAP_MAX_VCPUS)

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION: 0 where this KVM does not have the capability."""
        error = new_error()
        return int(check(lib.pyhv_kvm_check_extension(self.fd, capability, error), error))

    def supported_cpuid(self) -> CpuidTable:
        """KVM_GET_SUPPORTED_CPUID, and what KVM gives without listing it: the hypervisor bit, which is user space's to
        set; TSC_DEADLINE, which older kernels offer by a capability only; and the processor's name."""
        from pyhv.cpu import features
        from pyhv.cpu.table import NAME_LEAVES, Registers

        entries = ffi.new("struct pyhv_cpuid_entry[]", _MAX_ENTRIES)
        error = new_error()
        count = check(lib.pyhv_kvm_supported_cpuid(self.fd, entries, _MAX_ENTRIES, error), error)
        table = structs.to_table(entries[0:count])
        ecx = table.get(1).ecx | features.BY_NAME["hypervisor"].mask
        if self.check_extension(CAP_TSC_DEADLINE_TIMER):
            ecx |= features.BY_NAME["tsc_deadline_timer"].mask
        names = {(leaf, 0): Registers(*cpuid(leaf, 0)) for leaf in NAME_LEAVES if leaf <= table.max_extended}
        return table.replace({(1, 0): table.get(1)._replace(ecx=ecx), **names})

    def msr_list(self, features: bool = False) -> tuple[int, ...]:
        """The MSRs that make up a vCPU's state, or with `features` those that describe the processor."""
        return _msr_list(self.fd, features)

    def feature_msrs(self) -> dict[int, int]:
        """The value of each feature MSR that can be read."""
        values: dict[int, int] = {}
        value, error = ffi.new("uint64_t *"), new_error()
        for index in self.msr_list(features=True):
            if lib.pyhv_kvm_feature_msr(self.fd, index, value, error) == 0:
                values[index] = value[0]
        return values

    def describe(self, whole: bool = True) -> HostDescription:
        if self._description is None:
            import os

            from pyhv.cpu.host import HostDescription

            self._description = HostDescription(self.supported_cpuid(), os.uname().release, self.name)
        if whole and not self._description.msrs:
            self._description = self._description._replace(
                feature_msrs=self.feature_msrs(),
                msrs=tuple(sorted(self.msr_list())),
                tsc_khz=self._read_tsc_khz(),
                tsc_scaling=self.check_extension(CAP_TSC_CONTROL) > 0,
            )
        return self._description

    def _read_tsc_khz(self) -> int:
        """The rate that a new vCPU's TSC has: the host's."""
        vm = self.create_vm(irqchip=False)
        try:
            vcpu = vm.create_vcpu(0)
            try:
                return vcpu.read_tsc_khz()
            finally:
                vcpu.close()
        finally:
            vm.close()

    def prepare(self) -> None:
        if not self._spares:
            self._spares.append(KvmVm(self.fd, None, True, False, False))

    def create_vm(self, bus: Any = None, irqchip: bool = True, pit: bool = False, quick: bool = False) -> KvmVm:
        if bus and irqchip:
            try:
                vm = self._spares.pop()
            except IndexError:
                pass
            else:
                vm.adopt(bus, pit)
                return vm
        return KvmVm(self.fd, bus, irqchip, pit, quick)

    def explain(self, exit: Exit) -> str:
        from pyhv.accel import kvm_exits

        return kvm_exits.explain(exit)

    def close(self) -> None:
        import os

        while self._spares:
            self._spares.pop().close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _msr_list(kvm_fd: int, features: bool) -> tuple[int, ...]:
    indices = ffi.new("uint32_t[]", _MAX_MSRS)
    error = new_error()
    count = check(lib.pyhv_kvm_msr_list(kvm_fd, features, indices, _MAX_MSRS, error), error)
    return tuple(indices[0:count])


def _explain(errnum: int, detail: str) -> NotAvailable:
    """Why /dev/kvm cannot be used, and what to do."""
    if errnum == errno.ENOENT:
        return NotAvailable(
            DEVICE,
            "there is no such device",
            "load the kernel's module (modprobe kvm_intel or kvm_amd), or enable virtualization in the firmware",
        )
    if errnum in (errno.EACCES, errno.EPERM):
        return NotAvailable(
            DEVICE,
            "this user may not open it",
            "add the user to the group that owns it (usermod -aG kvm USER, then log in again)",
        )
    return NotAvailable(DEVICE, str(HostError("open", errnum, detail)))
