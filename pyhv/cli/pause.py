"""`pyhv pause NAME...`: stops running VMs between two instructions."""

from __future__ import annotations

from typing import Any

from pyhv.cli import several
from pyhv.cli.options import Command, Option

COMMAND = Command(
    "pause",
    "Stop a running VM between two instructions.",
    (
        several.NAMES,
        several.ALL,
        Option("--json", "print one JSON object: name, state; of several VMs vms, a list of such objects"),
    ),
    """
Returns when every vCPU is stopped. A paused VM stays as it is; pyhv resume lets it run on. A --timeout that it was
started with goes on. A VM that is being migrated is not paused.

example:
  pyhv pause t
""",
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    return several.each(COMMAND.parse(arguments), "pause", _pause)


def _pause(name: str) -> dict[str, Any]:
    with several.reach(name) as client:
        client.pause()
        return {"state": client.status()["state"]}
