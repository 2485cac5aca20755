"""`pyhv stop NAME`: ends a running VM."""

from __future__ import annotations

from pyhv.cli.options import Command, Option
from pyhv.control.client import Client

_COMMAND = Command(
    "stop",
    "End a running VM.",
    (Option("NAME", "as given to pyhv run --name; see pyhv ls"),),
    """
The guest is not asked. The run ends with status 0 and the cause "stopped". Returns when the name is free.

example:
  pyhv stop t
""",
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = _COMMAND.parse(arguments)
    with Client(given.name) as client:
        client.status()  # does it answer at all?
        client.stop()
    return 0
