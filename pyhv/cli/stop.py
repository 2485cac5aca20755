"""`pyhv stop NAME...`: ends running VMs."""

from __future__ import annotations

from typing import Any

from pyhv.cli import several
from pyhv.cli.options import Command, Option
from pyhv.cli.say import complain
from pyhv.control.client import record_of
from pyhv.control.names import Ended
from pyhv.errors import HostError

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
that the VM is in the middle of is given up. A VM that has ended already stays as it is.

examples:
  pyhv stop t
  pyhv stop --all
""",
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    return several.each(COMMAND.parse(arguments), "stop", _stop)


def _stop(name: str) -> dict[str, Any]:
    try:
        with several.reach(name) as client:
            return client.stop()
    except Ended as ended:
        complain(str(ended))
        record = ended.record
    except HostError:
        # It may have hung up because somebody else has just stopped it.
        kept = record_of(name)
        if kept is None:
            raise
        record = kept
    return {key: record.get(key) for key in ("cause", "status", "message")}
