"""`pyhv verify FILE`: checks every byte of a snapshot."""

from __future__ import annotations

from pyhv.cli import one_line, output
from pyhv.cli.options import Command, Option
from pyhv.snapshot import file

_COMMAND = Command(
    "verify",
    "Check every byte of a snapshot against its checksums. Status 0: all is well; 2: what is damaged is named.",
    (Option("FILE", "a snapshot, as pyhv save writes it"),),
    """
example:
  pyhv verify t.pyhv && pyhv restore t.pyhv
""",
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = _COMMAND.parse(arguments)
    with file.open_snapshot(given.file) as snapshot, output.Progress("verify") as progress:
        snapshot.reader.verify(progress)
    sections, memory = len(snapshot.reader.sections), output.size(snapshot.reader.memory_size)
    print(f"{one_line(given.file)}: good: {sections} sections, {memory} of memory")
    return 0
