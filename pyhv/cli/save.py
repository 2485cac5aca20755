"""`pyhv save NAME FILE`: saves a running VM, or several, to files."""

from __future__ import annotations

import os
from typing import Any

from pyhv.cli import options, output, several
from pyhv.cli.options import Command, Option
from pyhv.errors import BadInput

COMMAND = Command(
    "save",
    "Save a running VM to a file, from which pyhv restore lets it go on.",
    (
        several.NAMES,
        Option(
            "FILE",
            "where to; a file that is there is replaced all at once, when the new one is complete. Of several VMs, or "
            "with --all, a directory, in which each gets a file NAME.pyhv",
        ),
        several.ALL,
        Option("--stop", "end the VM then, with the cause stopped; nothing in it runs after what was saved"),
        Option(
            "--json",
            "print one JSON object: name, path, stopped; of several VMs vms, a list of such objects. On stderr one a "
            "line meanwhile: done, total, bytes_per_second",
        ),
    ),
    """
The VM is paused until its memory is written and runs on then, unless it was paused before. If it cannot be saved it
goes on as it was, and a file that is there stays as it was. Ctrl-C gives it up. A VM that is being migrated is not
saved.

examples:
  pyhv save t t.pyhv --stop; pyhv restore t.pyhv
  pyhv save --all .
""",
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = COMMAND.parse(arguments)
    path = options.absolute(given.file)
    folder = given.all or len(given.name) > 1
    if folder and not os.path.isdir(path):
        raise BadInput(given.file, "is no directory, which several VMs are saved to", "name one that is there")

    def save(name: str) -> dict[str, Any]:
        target = os.path.join(path, f"{name}.pyhv") if folder else path
        with several.reach(name) as client, output.Progress("save", given.json) as progress:
            client.save(target, given.stop, progress)
        return {"path": target, "stopped": given.stop}

    return several.each(given, "save", save)
