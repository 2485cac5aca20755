"""`pyhv status NAME`: what a running VM is and does."""

from __future__ import annotations

import time

from pyhv.cli import ls, output, several
from pyhv.cli.options import Command, Option
from pyhv.cli.say import one_line
from pyhv.control.client import Client
from pyhv.control.names import Ended

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# What of a record pyhv log tells.
_IN_LOG = ("console_base64", "missed")

COMMAND = Command(
    "status",
    "Tell what a running VM is and does, or how one has ended.",
    (
        several.NAMES,
        several.ALL,
        Option(
            "--json",
            "print one JSON object: name, state, doing, uptime, uuid, profile, intercept, note, notes, vcpus, memory, "
            "image, pid, counters; cause, status and message, which are null while it runs; of one that has ended also "
            "registers and ended, the time in seconds since 1970; of several VMs vms, a list of such objects",
        ),
    ),
    """
Of a VM that has come to its end it tells how; pyhv log NAME has the last of its console. Both are kept until pyhv clear
NAME, or until another VM gets the name.

example:
  pyhv status t --json | jq .counters
""",
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = COMMAND.parse(arguments)
    found = []

    def ask(name: str) -> dict[str, Any]:
        try:
            with Client(name) as client:
                status = client.status()
        except Ended as ended:
            status = {key: value for key, value in ended.record.items() if key not in _IN_LOG}
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
    registers = status.pop("registers", "")
    if isinstance(status.get("ended"), int | float):
        status["ended"] = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status["ended"]))
    status.pop("notes" if status.get("note") else "note", None)
    status["uptime"] = ls.uptime(status.get("uptime"))
    status["memory"] = ls.memory(status.get("memory"))
    counters = status.get("counters")
    if isinstance(counters, dict):
        status["counters"] = ", ".join(f"{name} {count}" for name, count in counters.items())
    shown = {key: value for key, value in status.items() if value not in (None, "")}
    output.print_rows([(one_line(key), one_line(str(value))) for key, value in shown.items()])
    if isinstance(registers, str) and registers:
        print("\n".join(map(one_line, registers.splitlines())))
