"""`pyhv wait NAME...`: waits until VMs have ended."""

from __future__ import annotations

import time
from typing import Any

from pyhv.cli import options, several
from pyhv.cli.options import Command, Option
from pyhv.control import client, names
from pyhv.errors import HostError
from pyhv.outcome import status_of

COMMAND = Command(
    "wait",
    "Wait until a VM has ended, and end with its guest's exit status.",
    (
        several.NAMES,
        several.ALL,
        Option("--timeout", "give up after S seconds, with status 124; the VM runs on", "S", convert=options.seconds),
        Option(
            "--json",
            "print one JSON object: name, and of its end cause, status and message; of several VMs vms, a list of such "
            "objects",
        ),
    ),
    """
A VM that has ended already is as good as one that ends now. Of several VMs the largest exit status counts.

example:
  pyhv wait t; pyhv log t
""",
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = COMMAND.parse(arguments)
    deadline = None if given.timeout is None else time.monotonic() + given.timeout
    statuses = [0]

    def wait(name: str) -> dict[str, Any]:
        end = _end_of(name, deadline)
        statuses.append(end["status"])
        return end

    failed = several.each(given, "wait", wait)
    return max(failed, *statuses)


def _end_of(name: str, deadline: float | None) -> dict[str, Any]:
    """How the VM ended, or that it has not."""
    try:
        with client.Client(name) as connection:
            connection.status()  # does it answer at all?
            end = connection.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
    except client.Silent:
        if deadline is None or time.monotonic() < deadline:
            raise
        return {"cause": None, "status": status_of("timeout"), "message": "it has not ended yet"}
    except names.Ended as ended:
        end = ended.record
    except HostError:
        record = client.record_of(name)  # it was killed meanwhile
        if record is None:
            raise
        end = record
    status = end.get("status")
    return {
        "cause": end.get("cause"),
        "status": status if type(status) is int and 0 <= status <= 255 else status_of("internal-error"),
        "message": end.get("message"),
    }
