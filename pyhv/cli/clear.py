"""`pyhv clear NAME...`: drops what is kept of VMs that have ended."""

from __future__ import annotations

from typing import Any

from pyhv.cli import failure, output, several
from pyhv.cli.options import Command, Option
from pyhv.cli.say import complain
from pyhv.control import names
from pyhv.control.ended import KEPT
from pyhv.errors import BadInput

COMMAND = Command(
    "clear",
    "Drop what is kept of a VM that has ended.",
    (
        several.NAMES,
        Option("--all", "of all VMs that have ended, instead of those named"),
        Option("--json", "print one JSON object: cleared, a list of names; failures, a list of objects"),
    ),
    f"""
Of a VM with a name that has ended it is kept how, with which registers, and the last of its console, for pyhv status,
wait, log and ls --all; until it is cleared, another VM gets the name, or {KEPT} others have ended.

example:
  pyhv clear --all
""",
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = COMMAND.parse(arguments)
    if given.all == bool(given.name):
        problem = "cannot be combined with names" if given.all else "pyhv clear needs it"
        raise BadInput("--all" if given.all else "NAME", problem, "see pyhv clear --help")
    cleared: list[str] = []
    failures: list[dict[str, Any]] = []
    with names.Directory() as directory:
        for name in directory.ended_names() if given.all else given.name:
            names.check_name(name)
            if directory.clear(name):
                cleared.append(name)
            elif not given.all:
                error = BadInput(name, "nothing is kept of a VM of this name", "pyhv ls --all shows those that ended")
                complain(str(error))
                failures.append({"name": name, **failure.to_json(error)})
    if given.json:
        output.print_json({"cleared": cleared, "failures": failures})
    return 2 if failures else 0
