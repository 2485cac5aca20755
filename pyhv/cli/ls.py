"""`pyhv ls`: the VMs that run under a name."""

from __future__ import annotations

from pyhv.cli import output
from pyhv.cli.options import Command, Option
from pyhv.cli.say import one_line
from pyhv.control import client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

COMMAND = Command(
    "ls",
    "List the VMs that run under a name, and remove what dead ones left behind.",
    (
        Option("--all", "also those that have ended, with how they ended"),
        Option("--json", "print one JSON object: vms, a list with what pyhv status --json prints of each"),
    ),
    """
They are those of this user: their control sockets are in $XDG_RUNTIME_DIR/pyhv, or in /tmp/pyhv-UID where that variable
is not set.

example:
  pyhv ls --json | jq -r '.vms[] | select(.state == "paused") | .name'
""",
)

# All VMs together; in seconds.
_PATIENCE = 3.0

_TITLES = ("NAME", "STATE", "CPUS", "MEM", "PROFILE", "UPTIME", "IMAGE")


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = COMMAND.parse(arguments)
    found = client.all_statuses(_PATIENCE)
    if given.all:
        found += client.all_ended([name for name, _ in found])
    if given.json:
        output.print_json({"vms": [status or {"name": name, "state": None} for name, status in found]})
        return 0
    rows = [_TITLES, *(_row(name, status) for name, status in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_TITLES))]
    for row in rows:
        print("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _row(name: str, status: dict[str, Any] | None) -> tuple[str, ...]:
    if status is None:
        return (name, "no answer", "", "", "", "", "")
    state = str(status.get("state"))
    if state == "ended":
        state += f": {status.get('cause')}, {status.get('status')}"
    return (
        name,
        one_line(state),
        one_line(str(status.get("vcpus", "?"))),
        memory(status.get("memory")),
        one_line(str(status.get("profile", "?"))),
        uptime(status.get("uptime")),
        one_line(str(status.get("image", "?"))),
    )


def memory(value: object) -> str:
    """Bytes as the user would give them: "64M"."""
    if not isinstance(value, int):
        return "?"
    for shift, unit in ((30, "G"), (20, "M"), (10, "K")):
        if value >= 1 << shift and value % (1 << shift) == 0:
            return f"{value >> shift}{unit}"
    return str(value)


def uptime(value: object) -> str:
    """Seconds as the two largest units: "3m07s"."""
    if not isinstance(value, int | float):
        return "?"
    seconds = int(value)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds // 60 % 60:02}m"
    return f"{seconds // 86400}d{seconds // 3600 % 24:02}h"
