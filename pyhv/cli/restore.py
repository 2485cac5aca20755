"""`pyhv restore FILE`: a saved VM goes on, its console on stdin and stdout."""

from __future__ import annotations

import functools

from pyhv.accel.choose import ACCELERATORS, INTERCEPTS
from pyhv.cli import options, run
from pyhv.cli.options import Command, Option
from pyhv.cli.terminal import HELP
from pyhv.machine import Machine

COMMAND = Command(
    "restore",
    "Let a saved VM go on, and end with its guest's exit status.",
    (
        Option("FILE", "a snapshot, as pyhv save writes it"),
        Option("--verify", "check every byte of the memory first; without it, everything but the memory is checked"),
        Option("--strict-tsc", "refuse a host whose TSC runs at another rate, even if the guest was promised none"),
        run.OVERCOMMIT_OPTION,
        Option("--accel", "what runs it (see pyhv run --help)", default="auto", choices=ACCELERATORS),
        Option("--intercept", "who answers CPUID (see pyhv run --help)", default="auto", choices=INTERCEPTS),
        Option("--timeout", "end the VM after S seconds, with status 124", "S", convert=options.seconds),
        run.PIN_OPTION,
        run.FAIL_ON_OPTION,
        run.QUIET_OPTION,
        *run.NAME_OPTIONS,
        Option("--json", "capture the console and print one JSON object, as pyhv run does"),
    ),
    f"""
The guest's processor is compared with this host before anything else; if it cannot go on here, all reasons are listed
(pyhv check FILE asks without restoring). The file is not changed, and must stay as it is while the VM runs: its memory
is read from there when it is needed (pyhv save may replace it: that leaves the VM the old one). Every restored VM is a
clone with a UUID of its own, and without a name unless it is given one.

The console is stdin and stdout. If stdin is a terminal,
  {HELP}

examples:
  pyhv restore t.pyhv
  pyhv restore t.pyhv --name t --detach; pyhv console t
""",
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = COMMAND.parse(arguments)
    make = functools.partial(
        Machine.restore,
        given.file,
        verify=given.verify,
        strict_tsc=given.strict_tsc,
        overcommit=given.overcommit,
        accel=given.accel,
        intercept=given.intercept,
    )
    return run.run_machine(given, make)
