"""How a run ended, for people and as JSON: the same of a VM with a name and of one without."""

from __future__ import annotations

import os

from pyhv.arguments import as_options
from pyhv.cli import output
from pyhv.cli.say import complain
from pyhv.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyhv.machine import Machine, RunResult

REBOOTS = "the guest has reset itself and is started again"


def tell(result: RunResult) -> None:
    """Says on stderr what became of a guest that did not end by itself."""
    if result.message:
        complain(result.message)
    if result.registers and result.cause not in ("interrupted", "stopped", "migrated"):
        os.write(2, result.registers.encode() + b"\n")


def describe(machine: Machine, result: RunResult) -> dict[str, Any]:
    """What --json prints."""
    console = output.console(result.console)
    description = {
        "cause": result.cause,
        "status": result.status,
        "message": as_options(result.message),
        "registers": result.registers,
        "profile": machine.guest.profile,
        "intercept": machine.choice.intercept,
        "note": as_options(machine.choice.note),
        "notes": [as_options(note) for note in machine.notes],
        "vcpus": len(machine.vm.vcpus),
        **console,
        "counters": result.counters,
    }
    return description | _parse_cpuid(console["console"])


def _parse_cpuid(text: str) -> dict[str, Any]:
    """The CPUID table that a guest printed as `cpuid -r` does, and the names of the features in it; or nothing."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    if not lines or not lines[0].startswith("CPU"):
        return {}
    from pyhv.cpu import dumps

    try:
        table = dumps.parse("\n".join(lines), "console")
    except BadInput:
        return {}
    return {"cpuid": table.to_json(), "features": sorted(table.features())}
