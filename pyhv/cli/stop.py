"""`pyhv stop NAME...`: ends running VMs."""

from __future__ import annotations

from typing import Any

from pyhv.cli import several
from pyhv.cli.options import Command, Option

COMMAND = Command(
    "stop",
    "End a running VM.",
    (
        several.NAMES,
        several.ALL,
        Option(
            "--json",
            "print one JSON object: name, and of its end cause, status and message; of several VMs vms, a list of such "
            "objects",
        ),
    ),
    """
The guest is not asked. The run ends with status 0 and the cause "stopped". Returns when the name is free. A migration
that the VM is in the middle of is given up.

examples:
  pyhv stop t
  pyhv stop --all
""",
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    return several.each(COMMAND.parse(arguments), "stop", _stop)


def _stop(name: str) -> dict[str, Any]:
    with several.reach(name) as client:
        return client.stop()
