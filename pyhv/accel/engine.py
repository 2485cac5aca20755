"""VMs and vCPUs of the C engine: one wrapper, whichever accelerator executes the guest (csrc/pyhv.h)."""

from __future__ import annotations

import errno

from pyhv._native import check, ffi, lib, new_error, to_exception
from pyhv.accel import structs
from pyhv.accel.data import CpuidRecord, Exit, Regs, Sregs
from pyhv.errors import BadInput, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from pyhv.accel.state import RawState
    from pyhv.cpu.table import CpuidTable

MAX_ENTRIES: int = lib.PYHV_CPUID_MAX_ENTRIES
MAX_MSRS = 2048
"""More than any accelerator lists."""


class AccelVcpu:
    """One virtual processor (struct pyhv_vcpu). Used by one thread at a time, except kick() and waits_for_ever()."""

    def __init__(self, vm: AccelVm, index: int) -> None:
        self.index = index
        error = new_error()
        self.handle: Any = check(lib.pyhv_vcpu_create(vm.handle, index, error), error)
        self._exit: Any = ffi.new("struct pyhv_exit *")
        self._table: CpuidTable | None = None
        self._trap_table: Any = None  # which must live as long as the vCPU
        self._granted = False

    def set_cpuid(self, table: CpuidTable) -> None:
        """What CPUID answers from now on. Once, before the first run. Raises HostError."""
        entries = table.as_entries()
        error = new_error()
        check(lib.pyhv_vcpu_set_cpuid(self.handle, entries, len(entries), error), error)
        self._table = table

    def get_cpuid(self) -> CpuidTable:
        """What the accelerator says that CPUID answers: not always what was set. Raises HostError."""
        entries = ffi.new("struct pyhv_cpuid_entry[]", MAX_ENTRIES)
        error = new_error()
        count = check(lib.pyhv_vcpu_get_cpuid(self.handle, entries, MAX_ENTRIES, error), error)
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

    def read_msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """The values of those of the MSRs that there are here. Raises HostError."""
        values: dict[int, int] = {}
        wanted = list(indices)
        out, error = ffi.new("uint64_t[]", max(len(wanted), 1)), new_error()
        while wanted:
            taken = check(lib.pyhv_vcpu_get_msrs(self.handle, wanted, out, len(wanted), error), error)
            values.update(zip(wanted[:taken], out[0:taken], strict=True))
            wanted = wanted[taken + 1 :]  # the one that it stopped at does not exist here
        return values

    def write_msrs(self, values: Mapping[int, int]) -> None:
        """Raises HostError naming the first that is refused."""
        from pyhv.cpu import msrs

        indices, numbers = list(values), list(values.values())
        error = new_error()
        taken = check(lib.pyhv_vcpu_set_msrs(self.handle, indices, numbers, len(indices), error), error)
        if taken < len(indices):
            index = indices[taken]
            name = msrs.NAMES.get(index, "an MSR that pyhv does not know")
            raise HostError("MSRs", 0, f"vCPU {self.index}: {name} (0x{index:x}) refuses 0x{numbers[taken]:x}")

    def read_tsc_khz(self) -> int:
        """The rate of the guest's time-stamp counter in kHz."""
        error = new_error()
        return int(check(lib.pyhv_vcpu_get_tsc_khz(self.handle, error), error))

    def trap(self, table: CpuidTable, sites: Sequence[int], log_capacity: int = 0) -> None:
        """Answer CPUID from `table` by stopping in front of each: at the linear addresses `sites`, or, where that is
        empty, by stepping. The first `log_capacity` answers are kept for trap_log(). Once, before the first run."""
        entries = table.as_entries()
        self._trap_table = ffi.new("struct pyhv_cpuid_table *")
        error = new_error()
        check(lib.pyhv_cpuid_table_init(self._trap_table, entries, len(entries), error), error)
        config = ffi.new("struct pyhv_trap_config *")
        config.table = self._trap_table
        config.site_count = len(sites)
        config.log_capacity = log_capacity
        for i, site in enumerate(sites):
            config.sites[i] = site
        check(lib.pyhv_vcpu_trap(self.handle, config, error), error)

    def trap_log(self) -> list[CpuidRecord]:
        """Takes the records out of the log, oldest first."""
        return structs.take_log(lambda records, room: lib.pyhv_vcpu_trap_log(self.handle, records, room))

    def run(self) -> Exit:
        """Runs until something stops the vCPU; one long call into C without the GIL."""
        lib.pyhv_vcpu_run(self.handle, self._exit)
        return structs.to_exit(self._exit)

    def step(self) -> Exit:
        """Executes one instruction: Exit.stop is DEBUG, or what else the instruction caused."""
        lib.pyhv_vcpu_step(self.handle, self._exit)
        return structs.to_exit(self._exit)

    def kick(self) -> None:
        """Makes the current or the next run() return KICKED. Any thread. Raises HostError where a sandbox forbids to
        signal a thread."""
        error = new_error()
        check(lib.pyhv_vcpu_kick(self.handle, error), error)

    def waits_for_ever(self) -> bool:
        """True if the vCPU is halted and only another vCPU can wake it: interrupts are off, and nothing makes an NMI,
        SMI or INIT; or if it was never started. Any thread, also while it runs: it is looked at within its run. Of
        several vCPUs each is looked at in its own moment: that all wait is certain only when none runs. Raises
        HostError."""
        error = new_error()
        return bool(check(lib.pyhv_vcpu_waits_for_ever(self.handle, error), error))

    def counters(self) -> dict[str, int]:
        """How many exits of each kind there were (struct pyhv_counters)."""
        return structs.to_counters(lib.pyhv_vcpu_counters(self.handle))

    def grant(self, msr_list: Callable[[], Sequence[int]]) -> None:
        """Tells the engine what may be in this vCPU's state, by its CPUID table. msr_list: what the accelerator lists.
        Once, before its state is saved or loaded; when it is called again nothing happens."""
        if self._granted:
            return
        from pyhv.cpu import msrs

        assert self._table is not None
        numbers = tuple(sorted(msrs.granted(self._table)))
        rules = structs.msr_rules(numbers, frozenset(msrs.missing(numbers, msr_list())))
        components = self._table.xcr0_mask | self._table.xss_mask | _LEGACY_COMPONENTS
        error = new_error()
        check(lib.pyhv_vcpu_grant(self.handle, rules, len(numbers), components, error), error)
        self._granted = True

    def check_granted(self, numbers: Sequence[int]) -> None:
        """Raises ValueError that names all the MSRs which this vCPU cannot have."""
        from pyhv.cpu import msrs

        assert self._table is not None
        msrs.check_granted(numbers, frozenset(msrs.granted(self._table)), self.index)

    def close(self) -> None:
        handle, self.handle = self.handle, ffi.NULL  # first: Ctrl-C may come after any call
        lib.pyhv_vcpu_destroy(handle)


# x87 and SSE: components 0 and 1 of the XSAVE area, which every guest has.
_LEGACY_COMPONENTS = 3


class AccelVm:
    """One virtual machine: memory and vCPUs (struct pyhv_vm).

    handle: what the accelerator's own function has created; it is closed by close(). msr_list: the MSRs that the
    accelerator lists.
    """

    def __init__(self, handle: Any, msr_list: Callable[[], Sequence[int]]) -> None:
        self.handle = handle
        self._msr_list = msr_list
        self._state: structs.StateBuffer | None = None

    def map(self, gpa: int, size: int, host: Any) -> None:
        """Gives `size` bytes of this process at `host` (uint8_t *) to the guest at `gpa`. Raises HostError."""
        error = new_error()
        check(lib.pyhv_vm_map(self.handle, gpa, size, host, error), error)

    def create_vcpu(self, index: int) -> AccelVcpu:
        """The vCPU with APIC id `index`; index 0 boots, the others wait for INIT and SIPI. Raises HostError."""
        return AccelVcpu(self, index)

    def log_dirty(self, on: bool) -> None:
        """Begins, or ends, to note which pages of its memory are written by the guest or on its behalf. Also while it
        runs. Raises HostError."""
        error = new_error()
        check(lib.pyhv_vm_log_dirty(self.handle, on, error), error)

    def take_dirty(self, bitmap: Any) -> None:
        """ORs the pages written since log_dirty(True), or since the last call, into `bitmap` (uint64_t *): a bit a
        page, in the order in which memory was mapped. Also while it runs. Raises HostError."""
        error = new_error()
        check(lib.pyhv_vm_take_dirty(self.handle, bitmap, error), error)

    def resume(self) -> None:
        """Before vCPUs that have run and were stopped run on: what the guest is to notice of the pause, and what not.
        Ticks of its timers that it slept through are one. Raises HostError."""
        error = new_error()
        check(lib.pyhv_vm_resume(self.handle, error), error)

    def prepare_state(self, vcpus: Sequence[AccelVcpu]) -> structs.StateBuffer:
        """Does what capture() and apply() need once, so that they are quick when a paused guest waits for them. Also
        while it runs. Raises HostError."""
        for vcpu in vcpus:
            vcpu.grant(self._msr_list)
        if self._state is None:
            self._state = structs.StateBuffer(len(vcpus))
        return self._state

    def capture(self, vcpus: Sequence[AccelVcpu]) -> RawState:
        """The state of all its vCPUs, which are stopped, and of what they share. Raises HostError."""
        buffer, error = self.prepare_state(vcpus), new_error()
        check(lib.pyhv_vm_save_state(self.handle, buffer.head, error), error)
        return buffer.take()

    def apply(self, vcpus: Sequence[AccelVcpu], state: RawState, elapsed: int) -> None:
        """Puts a state into vCPUs that have their tables and memory and have never run. Their clocks go on as if it had
        been taken `elapsed` nanoseconds before the call. Raises HostError, BadInput for what the emulator does not
        have, ValueError for what no vCPU can have; the VM is then good for nothing but close()."""
        buffer, error = self.prepare_state(vcpus), new_error()
        buffer.put(state)
        if lib.pyhv_vm_load_state(self.handle, buffer.head, elapsed, error) == 0:
            return
        failure = to_exception(error)
        if error.errnum == errno.ERANGE:
            raise ValueError(str(failure))
        if failure.what == "state" and error.errnum == errno.EPERM:
            for vcpu, saved in zip(vcpus, state.vcpus, strict=True):
                vcpu.check_granted(list(structs.msrs(saved)))
        if failure.what == "state" and error.errnum == errno.ENOTSUP:
            raise BadInput(
                "this guest's state", f"the emulator does not have {failure.detail}", "let it go on on KVM"
            )
        raise failure

    def close(self) -> None:
        """After its vCPUs."""
        handle, self.handle = self.handle, ffi.NULL  # first: Ctrl-C may come after any call
        lib.pyhv_vm_destroy(handle)
