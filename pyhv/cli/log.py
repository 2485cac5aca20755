"""`pyhv log NAME`: the last that a VM has printed, whether it runs or has ended."""

from __future__ import annotations

import sys

from pyhv.cli import output
from pyhv.cli.options import Command, Option
from pyhv.cli.say import complain
from pyhv.control import client, names

COMMAND = Command(
    "log",
    "Print the last 64 KiB of a VM's console, of one that runs or has ended.",
    (
        Option("NAME", "as given to pyhv run --name; see pyhv ls --all"),
        Option(
            "--json",
            "print one JSON object: name, console and console_base64, missed (how many bytes before that are gone)",
        ),
    ),
    """
pyhv console NAME shows what a running VM goes on to print.

example:
  pyhv log t | grep -i panic
""",
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = COMMAND.parse(arguments)
    try:
        with client.Client(given.name) as connection:
            connection.status()  # does it answer at all?
            data, missed = connection.log()
    except names.Ended as ended:
        if "console_base64" not in ended.record:
            raise
        kept = {"data": ended.record["console_base64"], "missed": ended.record.get("missed")}
        data, missed = client.log_of(kept, given.name)
    if given.json:
        output.print_json({"name": given.name, **output.console(data), "missed": missed})
        return 0
    if missed:
        complain(f"{given.name}: {missed} bytes before this are gone")
    sys.stdout.buffer.write(data)
    return 0
