"""`pyhv resume NAME`: lets a paused VM run on."""

from __future__ import annotations

from pyhv.cli.options import Command, Option
from pyhv.control.client import Client

_COMMAND = Command(
    "resume",
    "Let a paused VM run on.",
    (
        Option("NAME", "as given to pyhv run --name; see pyhv ls"),
        Option("--force", "also one that was handed over to another host by a migration, whatever became of it there"),
    ),
    """
A running VM stays as it is. One that was handed over, and whose other side did not answer, may run there: --force is
for when it is certain that it does not, for two copies of one VM do harm.

example:
  pyhv resume t
""",
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = _COMMAND.parse(arguments)
    with Client(given.name) as client:
        client.status()  # does it answer at all?
        client.resume(given.force)
    return 0
