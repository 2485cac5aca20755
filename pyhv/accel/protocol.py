"""What an accelerator is to the rest of pyhv: it offers a processor (describe) and makes VMs (engine.py).

Only type checkers import this module: at run time an accelerator is what has these methods.
"""

from __future__ import annotations

from typing import Any, Protocol

from pyhv.accel.data import Exit
from pyhv.accel.engine import AccelVm
from pyhv.cpu.host import HostDescription


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
