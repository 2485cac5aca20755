"""pyhv: a small KVM-backed x86 virtual machine monitor whose VMs move between processor generations.

    with pyhv.Machine(image="cpuid", compat=True) as vm:
        result = vm.run(timeout=5)
"""

from __future__ import annotations

from pyhv.errors import BadInput, HostError, NotAvailable, NotFaithful, PyhvError
from pyhv.machine import Machine, RunResult

__all__ = ["BadInput", "HostError", "Machine", "NotAvailable", "NotFaithful", "PyhvError", "RunResult"]
__version__ = "0.1.0"
