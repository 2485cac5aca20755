"""`pyhv status NAME`: what a running VM is and does."""

from __future__ import annotations

from pyhv.cli import ls, one_line, output, several
from pyhv.cli.options import Command, Option
from pyhv.control.client import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

COMMAND = Command(
    "status",
    "Tell what a running VM is and does.",
    (
        several.NAMES,
        several.ALL,
        Option(
            "--json",
            "print one JSON object: name, state, doing, uptime, uuid, profile, intercept, note, vcpus, memory, image, "
            "pid, counters; cause, status and message, which are null while it runs; of several VMs vms, a list of "
            "such objects",
        ),
    ),
    """
A VM that has come to its end has no name any more: pyhv console NAME, attached before, tells how it ended.

example:
  pyhv status t --json | jq .counters
""",
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = COMMAND.parse(arguments)
    found = []

    def ask(name: str) -> dict[str, Any]:
        with Client(name) as client:
            status = client.status()
        found.append(status)
        return status

    result = several.each(given, "status", ask)
    if not given.json:
        for index, status in enumerate(found):
            if index:
                print()
            _print(status)
    return result


def _print(status: dict[str, Any]) -> None:
    status["uptime"] = ls.uptime(status.get("uptime"))
    status["memory"] = ls.memory(status.get("memory"))
    counters = status.get("counters")
    if isinstance(counters, dict):
        status["counters"] = ", ".join(f"{name} {count}" for name, count in counters.items())
    shown = {key: value for key, value in status.items() if value not in (None, "")}
    output.print_rows([(one_line(key), one_line(str(value))) for key, value in shown.items()])
