"""pyhv: a small KVM-backed x86 virtual machine monitor whose VMs move between processor generations.

with pyhv.Machine(image="cpuid", compat=True) as vm:
    result = vm.run(timeout=5)
"""

from __future__ import annotations

from pyhv.errors import (
    BadInput,
    Cancelled,
    GaveUp,
    HandoverUnknown,
    HostError,
    Incompatible,
    NotAvailable,
    NotFaithful,
    PyhvError,
    TimedOut,
    WrongState,
)
from pyhv.version import VERSION as __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.accel.data import CpuidRecord
    from pyhv.machine import Machine, RunResult
    from pyhv.migration.source import Limits, Progress, Summary
    from pyhv.migration.transport import Tls

__all__ = [
    "BadInput",
    "Cancelled",
    "CpuidRecord",
    "GaveUp",
    "HandoverUnknown",
    "HostError",
    "Incompatible",
    "Limits",
    "Machine",
    "NotAvailable",
    "NotFaithful",
    "Progress",
    "PyhvError",
    "RunResult",
    "Summary",
    "TimedOut",
    "Tls",
    "WrongState",
    "__version__",
]

# Where the rest is: imported when it is first used, for `pyhv features` needs no engine.
_HOMES = {
    "CpuidRecord": "pyhv.accel.data",
    "Limits": "pyhv.migration.source",
    "Machine": "pyhv.machine",
    "Progress": "pyhv.migration.source",
    "RunResult": "pyhv.machine",
    "Summary": "pyhv.migration.source",
    "Tls": "pyhv.migration.transport",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(__import__(_HOMES[name], fromlist=[name]), name)  # importlib would have to be imported
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
