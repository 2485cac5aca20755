"""`pyhv save NAME FILE`: saves a running VM to a file."""

from __future__ import annotations

import os

from pyhv.cli import output
from pyhv.cli.options import Command, Option
from pyhv.control.client import Client

_COMMAND = Command(
    "save",
    "Save a running VM to a file, from which pyhv restore lets it go on.",
    (
        Option("NAME", "as given to pyhv run --name; see pyhv ls"),
        Option("FILE", "where to; a file that is there is replaced all at once, when the new one is complete"),
        Option("--stop", "end the VM then, with the cause stopped; nothing in it runs after what was saved"),
        Option("--json", "print one JSON object a line: its event is progress (done, total: bytes of memory) or saved"),
    ),
    """
The VM is paused until its memory is written and runs on then, unless it was paused before. If it cannot be saved it
goes on as it was, and a file that is there stays as it was. Ctrl-C gives it up.

example:
  pyhv save t t.pyhv --stop; pyhv restore t.pyhv
""",
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = _COMMAND.parse(arguments)
    path = os.path.abspath(given.file)
    with Client(given.name) as client:
        client.status()  # does it answer at all?
        if given.json:

            def tell(done: int, total: int) -> None:
                output.print_event("progress", {"done": done, "total": total})

            client.save(path, given.stop, tell)
            output.print_event("saved", {"path": path})
        else:
            with output.Progress("save") as progress:
                client.save(path, given.stop, progress)
    return 0
