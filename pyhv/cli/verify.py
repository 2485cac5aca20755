"""`pyhv verify FILE`: checks every byte of a snapshot."""

from __future__ import annotations

from pyhv.cli import output
from pyhv.cli.options import Command, Option
from pyhv.cli.say import one_line
from pyhv.snapshot import file

COMMAND = Command(
    "verify",
    "Check every byte of a snapshot against its checksums. Status 0: all is well; 2: what is damaged is named.",
    (
        Option("FILE", "a snapshot, as pyhv save writes it"),
        Option("--json", "print one JSON object: file, good, sections (how many), memory (bytes)"),
    ),
    """
example:
  pyhv verify t.pyhv && pyhv restore t.pyhv
""",
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = COMMAND.parse(arguments)
    with file.open_snapshot(given.file) as snapshot, output.Progress("verify", given.json) as progress:
        snapshot.reader.verify(progress)
    sections, memory = len(snapshot.reader.sections), snapshot.reader.memory_size
    if given.json:
        output.print_json({"file": given.file, "good": True, "sections": sections, "memory": memory})
    else:
        print(f"{one_line(given.file)}: good: {sections} sections, {output.size(memory)} of memory")
    return 0
