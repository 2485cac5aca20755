"""`pyhv pause NAME`: stops a running VM between two instructions."""

from __future__ import annotations

from pyhv.cli.options import Command, Option
from pyhv.control.client import Client

_COMMAND = Command(
    "pause",
    "Stop a running VM between two instructions.",
    (Option("NAME", "as given to pyhv run --name; see pyhv ls"),),
    """
Returns when every vCPU stands. A paused VM stays as it is; pyhv resume lets it run on. A --timeout that it was started
with goes on.

example:
  pyhv pause t
""",
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = _COMMAND.parse(arguments)
    with Client(given.name) as client:
        client.status()  # does it answer at all?
        client.pause()
    return 0
