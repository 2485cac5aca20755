"""What commands share that do the same to one VM or to several: pyhv stop a b, pyhv pause --all."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from pyhv.cli import failure, output
from pyhv.cli.options import Option
from pyhv.cli.say import complain
from pyhv.control import client, names
from pyhv.control.client import Client
from pyhv.errors import BadInput, PyhvError

NAMES = Option("NAME", "one or more, as given to pyhv run --name; see pyhv ls", required=False, repeated=True)
ALL = Option("--all", "all VMs that run under a name, instead of those named")


def chosen(given: SimpleNamespace, command: str) -> list[str]:
    """The names that were given, or with --all those of all VMs that run. Raises BadInput."""
    if given.all and given.name:
        raise BadInput("--all", "cannot be combined with names", "leave one out")
    if given.all:
        with names.Directory() as directory:
            return names.live_names(directory)
    if not given.name:
        raise BadInput("NAME", f"pyhv {command} needs it", f"see pyhv {command} --help")
    found: list[str] = given.name
    return found


def each(given: SimpleNamespace, command: str, act: Callable[[str], dict[str, Any]]) -> int:
    """Does one thing to each of the VMs, one after the other; what fails for one does not keep it from the others.

    act: gets the name, does it, and returns what --json prints. Returns the exit status: the largest there was. Of a
    single VM that was named it raises what `act` raises.
    """
    found = chosen(given, command)
    single = len(found) == 1 and not given.all
    results, status = [], 0
    for name in found:
        try:
            result = act(name)
        except PyhvError as error:
            if single:
                raise
            complain(*failure.lines(error))
            result = failure.to_json(error)
            status = max(status, result["status"])
        results.append({"name": name, **result})
    if given.json:
        output.print_json(results[0] if single else {"vms": results})
    return status


def reach(name: str) -> Client:
    """A client of the VM, which answers; says so where what is asked next has to wait for something else. Raises
    BadInput, HostError."""
    connection = client.Client(name)
    try:
        doing = connection.status().get("doing")
    except BaseException:
        connection.close()
        raise
    if doing and doing != "migrate":  # during a migration it is refused, or gives it up
        complain(f"{name}: waits until its {doing} is done")
    return connection
