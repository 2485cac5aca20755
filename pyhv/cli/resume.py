"""`pyhv resume NAME`: lets a paused VM run on."""

from __future__ import annotations

from pyhv.cli.options import Command, Option
from pyhv.control.client import Client

_COMMAND = Command(
    "resume",
    "Let a paused VM run on.",
    (Option("NAME", "as given to pyhv run --name; see pyhv ls"),),
    """
A running VM stays as it is.

example:
  pyhv resume t
""",
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = _COMMAND.parse(arguments)
    with Client(given.name) as client:
        client.status()  # does it answer at all?
        client.resume()
    return 0
