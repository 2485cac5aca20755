"""The KVM accelerator: what it offers, and how its VMs begin."""

from __future__ import annotations

import errno

from pyhv._native import check, cpuid, ffi, lib, new_error
from pyhv.accel import structs
from pyhv.accel.engine import MAX_ENTRIES, MAX_MSRS, AccelVm
from pyhv.errors import HostError, NotAvailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyhv.accel.data import Exit
    from pyhv.cpu.host import HostDescription
    from pyhv.cpu.table import CpuidTable

DEVICE = "/dev/kvm"

# Capability numbers of <linux/kvm.h> (KVM_CAP_*).
CAP_MAX_VCPUS = 66
CAP_TSC_CONTROL = 60
CAP_TSC_DEADLINE_TIMER = 72


class Kvm:
    """KVM through /dev/kvm; see Accelerator. Raises NotAvailable with what to do where it cannot be used."""

    name = "kvm"

    def __init__(self) -> None:
        self._description: HostDescription | None = None
        self._spares: list[AccelVm] = []
        """At most one VM made ahead of time by prepare(); a list, for its pop() is safe among threads."""
        self._msr_lists: dict[bool, tuple[int, ...]] = {}
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

        entries = ffi.new("struct pyhv_cpuid_entry[]", MAX_ENTRIES)
        error = new_error()
        count = check(lib.pyhv_kvm_supported_cpuid(self.fd, entries, MAX_ENTRIES, error), error)
        table = structs.to_table(entries[0:count])
        ecx = table.get(1).ecx | features.BY_NAME["hypervisor"].mask
        if self.check_extension(CAP_TSC_DEADLINE_TIMER):
            ecx |= features.BY_NAME["tsc_deadline_timer"].mask
        names = {(leaf, 0): Registers(*cpuid(leaf, 0)) for leaf in NAME_LEAVES if leaf <= table.max_extended}
        return table.replace({(1, 0): table.get(1)._replace(ecx=ecx), **names})

    def msr_list(self, features: bool = False) -> tuple[int, ...]:
        """The MSRs that make up a vCPU's state, or with `features` those that describe the processor."""
        if features not in self._msr_lists:  # which change with the kernel's module only
            indices = ffi.new("uint32_t[]", MAX_MSRS)
            error = new_error()
            count = check(lib.pyhv_kvm_msr_list(self.fd, features, indices, MAX_MSRS, error), error)
            self._msr_lists[features] = tuple(indices[0:count])
        return self._msr_lists[features]

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
            self._spares.append(self._new_vm(ffi.NULL, True, False, False))

    def create_vm(self, bus: Any = None, irqchip: bool = True, pit: bool = False, quick: bool = False) -> AccelVm:
        if bus and irqchip:
            try:
                vm = self._spares.pop()
            except IndexError:
                pass
            else:
                error = new_error()
                try:
                    check(lib.pyhv_kvm_vm_adopt(vm.handle, bus, pit, error), error)
                except HostError:
                    vm.close()
                    raise
                return vm
        return self._new_vm(bus or ffi.NULL, irqchip, pit, quick)

    def _new_vm(self, bus: Any, irqchip: bool, pit: bool, quick: bool) -> AccelVm:
        config = ffi.new("struct pyhv_vm_config *", {"irqchip": irqchip, "pit": pit, "late": quick})
        error = new_error()
        return AccelVm(check(lib.pyhv_kvm_vm_create(self.fd, config, bus, error), error), self.msr_list)

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
