"""`pyhv resume NAME...`: lets paused VMs run on."""

from __future__ import annotations

from typing import Any

from pyhv.cli import several
from pyhv.cli.options import Command, Option

COMMAND = Command(
    "resume",
    "Let a paused VM run on.",
    (
        several.NAMES,
        several.ALL,
        Option("--force", "also one that was handed over to another host by a migration, whatever became of it there"),
        Option("--json", "print one JSON object: name, state; of several VMs vms, a list of such objects"),
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
    given = COMMAND.parse(arguments)

    def resume(name: str) -> dict[str, Any]:
        with several.reach(name) as client:
            client.resume(given.force)
            return {"state": client.status()["state"]}

    return several.each(given, "resume", resume)
