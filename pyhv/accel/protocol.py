"""The contract between pyhv and whatever executes a guest's instructions.

An accelerator offers a processor (describe) and makes VMs; a VM takes memory and makes vCPUs; a vCPU runs until
something stops it. Only type checkers import this module: at run time an accelerator is what has these methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pyhv.accel.data import CpuidRecord, Exit, Regs, Sregs
from pyhv.accel.state import RawState
from pyhv.cpu.host import HostDescription
from pyhv.cpu.table import CpuidTable


class AccelVcpu(Protocol):
    """One virtual processor. Used by one thread at a time, except kick()."""

    index: int

    def set_cpuid(self, table: CpuidTable) -> None:
        """What CPUID answers from now on. Once, before the first run. Raises HostError."""

    def get_cpuid(self) -> CpuidTable:
        """What the accelerator says that CPUID answers: not always what was set. Raises HostError."""

    def get_regs(self) -> Regs: ...

    def set_regs(self, regs: Regs) -> None: ...

    def get_sregs(self) -> Sregs: ...

    def set_sregs(self, sregs: Sregs) -> None: ...

    def read_tsc_khz(self) -> int:
        """The rate of the guest's time-stamp counter in kHz."""

    def read_capabilities(self) -> int:
        """IA32_ARCH_CAPABILITIES, of a vCPU whose table shows it. Raises HostError."""

    def write_capabilities(self, value: int) -> None:
        """Sets it. Before the first run. Raises HostError."""

    def trap(self, table: CpuidTable, sites: Sequence[int], log_capacity: int = 0) -> None:
        """Answer CPUID from `table` by stopping in front of each: at the linear addresses `sites`, or, where that is
        empty, by stepping. The first `log_capacity` answers are kept for trap_log(). Once, before the first run."""

    def trap_log(self) -> list[CpuidRecord]:
        """Takes the records out of the log, oldest first."""

    def run(self) -> Exit:
        """Runs until something stops the vCPU; one long call into C without the GIL."""

    def step(self) -> Exit:
        """Executes one instruction: Exit.stop is DEBUG, or what else the instruction caused."""

    def kick(self) -> None:
        """Makes the current or the next run() return KICKED. Any thread. Raises HostError where a sandbox forbids to
        signal a thread."""

    def waits_for_ever(self) -> bool:
        """True if the vCPU is halted and only another vCPU can wake it: interrupts are off, and nothing makes an NMI,
        SMI or INIT; or if it was never started. Any thread, also while it runs: it is looked at within its run. Of
        several vCPUs each is looked at in its own moment: that all wait is certain only when none runs. Raises
        HostError."""

    def counters(self) -> dict[str, int]:
        """How many exits of each kind there were (struct pyhv_counters)."""

    def close(self) -> None: ...


class AccelVm(Protocol):
    """One virtual machine: memory and vCPUs."""

    def map(self, gpa: int, size: int, host: Any) -> None:
        """Gives `size` bytes of this process at `host` (uint8_t *) to the guest at `gpa`. Raises HostError."""

    def create_vcpu(self, index: int) -> AccelVcpu:
        """The vCPU with APIC id `index`; index 0 boots, the others wait for INIT and SIPI. Raises HostError."""

    def log_dirty(self, on: bool) -> None:
        """Begins, or ends, to note which pages of its memory are written by the guest or on its behalf. Also while it
        runs. Raises HostError."""

    def take_dirty(self, bitmap: Any) -> None:
        """ORs the pages written since log_dirty(True), or since the last call, into `bitmap` (uint64_t *): a bit a
        page, in the order in which memory was mapped. Also while it runs. Raises HostError."""

    def resume(self) -> None:
        """Before vCPUs that have run and were stopped run on: what the guest is to notice of the pause, and what not.
        Ticks of its timers that it slept through are one. Raises HostError."""

    def warm_up(self, vcpus: Sequence[AccelVcpu], tables: Sequence[CpuidTable]) -> None:
        """Loads and looks up what capture() and apply() need, so that they are quick when a guest stands and waits for
        them."""

    def capture(self, vcpus: Sequence[AccelVcpu], tables: Sequence[CpuidTable]) -> RawState:
        """The state of all its vCPUs, which stand, and of what they share. tables: what their CPUID answers. Raises
        HostError."""

    def apply(
        self, vcpus: Sequence[AccelVcpu], tables: Sequence[CpuidTable], state: RawState, elapsed: int
    ) -> None:
        """Puts a state into vCPUs that have their tables and memory and have never run. Their clocks go on as if it had
        been taken `elapsed` nanoseconds before the call. Raises HostError, ValueError for bytes that are no state; the
        VM is then good for nothing but close()."""

    def close(self) -> None:
        """After its vCPUs."""


class Accelerator(Protocol):
    """Something that executes guest instructions."""

    name: str
    max_vcpus: int

    def describe(self, whole: bool = True) -> HostDescription:
        """The processor that it offers to guests; not `whole`: without MSRs and TSC rate, which take time to find and
        which no guest's table depends on. Raises HostError."""

    def prepare(self) -> None:
        """Begins with the next VM, one with irqchip. The kernel goes on working on it for some milliseconds after the
        call, while the caller finds out what else the VM needs. Raises HostError."""

    def create_vm(self, bus: Any = None, irqchip: bool = True, pit: bool = False, quick: bool = False) -> AccelVm:
        """A VM whose port accesses go to `bus` (struct pyhv_bus *). Without `irqchip` HLT ends a run. `pit`: with the
        8254 timer, which kernels calibrate by. `quick`: be ready early, even if it then takes longer to close. Raises
        HostError."""

    def explain(self, exit: Exit) -> str:
        """One clause for a person about an exit of a kind that only this accelerator knows."""

    def close(self) -> None: ...
