"""`pyhv receive URI`: waits for a VM that is migrated to here, and runs it."""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
from collections.abc import Callable
from types import SimpleNamespace

from pyhv.accel.choose import ACCELERATORS, INTERCEPTS
from pyhv.cli import failure, options, run
from pyhv.cli.migrate import TLS_OPTIONS
from pyhv.cli.options import Command, Option
from pyhv.cli.say import complain
from pyhv.cli.terminal import HELP
from pyhv.errors import BadInput, PyhvError, TimedOut
from pyhv.machine import Machine, check_processors
from pyhv.migration import protocol, transport
from pyhv.migration.destination import Destination
from pyhv.migration.protocol import Hello

# So long a VM of that name has to say what it is doing, in seconds.
_ASK = 2.0

COMMAND = Command(
    "receive",
    "Wait for a VM that is migrated to here, run it, and end with its guest's exit status.",
    (
        Option("URI", "where: unix:PATH, tcp://HOST:PORT, tls://HOST:PORT, tty:PATH, fd:IN,OUT, or - (stdin, stdout)"),
        Option("--wait", "give up with status 124 if nobody has come after S seconds", "S", convert=options.seconds),
        Option("--name", "give it this name instead of the one that it brings", "NAME"),
        Option("--forever", "go on taking VMs, each in the background under the name that it brings, until Ctrl-C"),
        Option("--detach", "leave it in the background once it runs, where its name finds it; with - always"),
        run.OVERCOMMIT_OPTION,
        Option("--accel", "what runs it (see pyhv run --help)", default="auto", choices=ACCELERATORS),
        Option("--intercept", "who answers CPUID (see pyhv run --help)", default="auto", choices=INTERCEPTS),
        Option("--timeout", "end the VM after S seconds here, with status 124", "S", convert=options.seconds),
        run.PIN_OPTION,
        run.FAIL_ON_OPTION,
        run.QUIET_OPTION,
        Option("--insecure", "allow tcp:// at other addresses than loopback: anybody may send a VM"),
        *TLS_OPTIONS,
        Option("--json", "capture the console and print one JSON object, as pyhv run does; not with -"),
    ),
    f"""
One VM is taken, with --forever one after the other. Whether it can run on this host is decided before anything is
moved; if it cannot, the source hears every reason. Until the VM runs here, any failure leaves it running there. Its
name comes with it. One that is paused comes paused.

The console is stdin and stdout. If stdin is a terminal,
  {HELP}

example:
  pyhv receive unix:m.sock
""",
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = COMMAND.parse(arguments)
    if given.name is not None:
        from pyhv.control import names

        names.check_name(given.name)
    # What is wrong here must not be found out when the VM is this side's already.
    check_processors(given.pin)
    failure.end_in_order()
    tls = None
    if given.tls_cert or given.tls_key or given.tls_ca:
        tls = transport.Tls(given.tls_cert or "", given.tls_key or "", given.tls_ca or "")
    address = transport.parse(given.uri, given.insecure)
    given.detach = given.detach or given.uri == "-"
    if given.uri == "-" and given.json:
        raise BadInput("--json", "cannot be combined with -", "stdout is the link")
    if given.forever:
        return _receive_all(given, address, tls)
    if not given.detach:
        return _receive(given, address, tls, lambda name: None)
    from pyhv.cli import named

    if address.scheme == "fd":
        # As descriptors of their own: in the background 0 and 1 become others.
        address = address._replace(fds=(os.dup(address.fds[0]), os.dup(address.fds[1])))
    keep = [fd for fd in address.fds if fd >= 0]
    tell = given.uri != "-"  # with it our stdout is the link
    return named.detach(lambda leave: _receive(given, address, tls, leave), "the receiver", given.json, keep, tell)


def _receive(
    given: SimpleNamespace, address: transport.Address, tls: transport.Tls | None, leave: Callable[[str], None]
) -> int:
    with transport.Listener(address, tls) as listener:
        if listener.where != address.text:
            complain(f"waiting at {listener.where}")  # the port was not known before
        Machine.prepare_arrival(given.accel)  # while nobody has come yet
        # Not for a stranger's sake: whoever looks at open ports would end it.
        channel = listener.accept(given.wait, lambda error: complain(f"{error}; it waits on"))
    if channel is None:
        raise _nobody(given)
    return _take(given, address, channel, leave)


def _nobody(given: SimpleNamespace) -> TimedOut:
    return TimedOut(given.uri, f"nobody came within {given.wait:g} seconds", "start pyhv migrate at the source")


def _receive_all(given: SimpleNamespace, address: transport.Address, tls: transport.Tls | None) -> int:
    """Takes VMs, each in a process of its own, until a signal."""
    if address.scheme in ("fd", "tty"):
        raise BadInput(given.uri, "brings one VM and no more", "leave --forever out")
    for name in ("json", "name", "detach"):
        if getattr(given, name):
            raise BadInput(f"--{name}", "cannot be combined with --forever", "each VM keeps the name that it brings")
    from pyhv.cli import named

    given.detach = True
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    with transport.Listener(address, tls) as listener:
        complain(f"waiting at {listener.where}")
        while True:
            taken = listener.take(given.wait)
            if taken is None:
                raise _nobody(given)
            sys.stdout.flush()
            sock = taken[0]
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.forget()
                # Who it is he has to show there: meanwhile others may come.
                come = functools.partial(_take_from, given, address, listener, taken)
                os._exit(named.take_along(come, [sock.fileno()]))
            sock.close()


def _take_from(
    given: SimpleNamespace,
    address: transport.Address,
    listener: transport.Listener,
    taken: tuple[socket.socket, str],
    leave: Callable[[str], None],
) -> int:
    channel = listener.admit(*taken)
    Machine.prepare_arrival(given.accel)
    return _take(given, address, channel, leave)


def _take(
    given: SimpleNamespace, address: transport.Address, channel: transport.Channel, leave: Callable[[str], None]
) -> int:
    """The VM that comes over this channel, to its end."""
    if address.scheme == "fd":
        # They are nobody else's, and whoever waits for their end, as ssh does, shall not wait for the VM's.
        channel = transport.Channel(*address.fds, channel.peer, lambda: _close(set(address.fds)))
    destination = Destination(channel)
    try:
        hello = destination.greet()
        name = given.name or hello.name
        make = functools.partial(
            Machine.arrive,
            destination,
            overcommit=given.overcommit,
            accel=given.accel,
            intercept=given.intercept,
        )
        if not name:
            if given.detach:
                raise BadInput("the VM", "has no name", "give pyhv receive --name, so that it can be found")
            given.name = None
            return run.run_machine(given, make)
        from pyhv.cli import named
        from pyhv.control import names

        names.check_name(name)
        return named.run_as(name, given, make, leave, _predecessor(address, channel, hello, name))
    except BaseException as error:
        destination.close(error)
        raise


def _predecessor(address: transport.Address, channel: transport.Channel, hello: Hello, name: str) -> int:
    """The process of this host that gives its name to the VM that comes; 0 where there is none, or what the source says
    of itself is not proven: then a name that somebody has is refused to it."""
    if name != hello.name or hello.host != protocol.boot_id():
        return 0
    if channel.is_of(hello.pid):
        return hello.pid
    if address.scheme != "fd":
        return 0
    # Who has given us descriptors, or has logged in by ssh, is this user. Which of his VMs it is its own process says.
    from pyhv.control.client import Client

    try:
        with Client(name) as client:
            facts = client.status(within=_ASK)
    except PyhvError:
        return 0
    own = {"pid": hello.pid, "uuid": hello.machine.uuid, "doing": "migrate"}
    return hello.pid if all(facts.get(key) == value for key, value in own.items()) else 0


def _close(fds: set[int]) -> None:
    for fd in fds:
        os.close(fd)
