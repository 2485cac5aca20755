"""pyhv: a small KVM-backed x86 virtual machine monitor whose VMs move between processor generations.

with pyhv.Machine(image="cpuid", compat=True) as vm:
    result = vm.run(timeout=5)
"""

from __future__ import annotations

from pyhv.errors import (
    BadInput,
    Cancelled,
    HandoverUnknown,
    HostError,
    Incompatible,
    NotAvailable,
    NotFaithful,
    PyhvError,
    TimedOut,
    WrongState,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.machine import Machine, RunResult

__all__ = [
    "BadInput",
    "Cancelled",
    "HandoverUnknown",
    "HostError",
    "Incompatible",
    "Machine",
    "NotAvailable",
    "NotFaithful",
    "PyhvError",
    "RunResult",
    "TimedOut",
    "WrongState",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Machine and RunResult are imported when they are first used: `pyhv features` needs no engine."""
    if name in ("Machine", "RunResult"):
        from pyhv import machine

        return getattr(machine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
