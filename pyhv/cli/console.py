"""`pyhv console NAME`: attaches this terminal to the console of a running VM."""

from __future__ import annotations

import os
import select
import signal

from pyhv.cli import output
from pyhv.cli.options import Command, Option
from pyhv.cli.say import complain
from pyhv.cli.terminal import CHUNK, ENDING, EscapeKey, RawMode, Signals, Typed, in_foreground, is_pipe, tell
from pyhv.control import jsonrpc
from pyhv.control.client import Client
from pyhv.control.jsonrpc import Answer
from pyhv.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_HELP = "Ctrl-A x: leave the console, the VM runs on    Ctrl-A Ctrl-A: send Ctrl-A to the guest    Ctrl-A h: this help"

COMMAND = Command(
    "console",
    "Attach to the console of a running VM.",
    (
        Option("NAME", "as given to pyhv run --name; see pyhv ls"),
        Option("--read-only", "only show what the guest prints, and leave the keys to others"),
        Option(
            "--json",
            "leave the keys to others, and print one JSON object when the VM ends: name, cause, status, message, "
            "console and console_base64, missed (how many bytes of it are missing)",
        ),
    ),
    f"""
Shows the last 64 KiB that the guest has printed, and from then on all that it prints. Any number may watch; the keys go
to the guest from the terminal that the VM was started on and from one other. If stdin is a terminal,
  {_HELP}

example:
  pyhv console t < /dev/null         only watch, until the VM ends
  pyhv console t

exit status: the guest's when the VM ends; 0 when the user leaves
""",
)

# So much is on its way to the VM's process; what is typed meanwhile waits here.
_MAX_UNSENT = 64 << 10


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = COMMAND.parse(arguments)
    with Client(given.name) as client:
        client.status()  # does it answer at all?
        if given.json:
            return _capture(client)
        return _Session(client, not given.read_only).run()


def _capture(client: Client) -> int:
    """Waits for the VM's end and prints the object. Returns the exit status."""
    data, missed = bytearray(), 0
    client.call("console")
    while True:
        for answer in client.exchange():
            facts = _facts_of(answer)
            if answer.method == "output":
                data += _output_of(client, facts)
            elif answer.method == "missed":
                missed += facts["bytes"] if type(facts.get("bytes")) is int else 0
            elif answer.method == "end":
                cause, message, status = facts.get("cause"), facts.get("message"), _status_of(facts)
                end = {"name": client.name, "cause": cause, "status": status, "message": message}
                output.print_json(end | output.console(bytes(data)) | {"missed": missed})
                return status
        poll = select.poll()
        poll.register(client, select.POLLIN)
        poll.poll()


def _facts_of(answer: Answer) -> dict[str, Any]:
    """What the VM says. Raises the error that it says."""
    if answer.error is not None:
        raise answer.error
    return answer.result if isinstance(answer.result, dict) else {}


def _output_of(client: Client, facts: dict[str, Any]) -> bytes:
    """The bytes of a notification of output. Raises HostError."""
    try:
        return jsonrpc.decode_bytes(facts.get("data"))
    except ValueError:
        raise HostError(f"the control socket of {client.name}", 0, "its output is no base64") from None


def _status_of(end: dict[str, Any]) -> int:
    """The exit status in a notification of the end."""
    status = end.get("status")
    return status if type(status) is int and 0 <= status <= 255 else 125


class _Session:
    """A terminal, or whatever stdin and stdout are, at a VM's console."""

    def __init__(self, client: Client, write: bool) -> None:
        self._client = client
        attached = client.call("console", {"write": write})
        self._writes = isinstance(attached, dict) and attached.get("writer") is True
        self._terminal = os.isatty(0)
        if write and not self._writes:
            complain(f"{client.name}: another console has the keys; this one only shows")
        self._raw = RawMode()
        self._escape = EscapeKey()
        self._typed = Typed()  # keys that the VM's process does not take yet

    def run(self) -> int:
        """Until the VM ends or the user leaves. Returns the exit status."""
        with Signals() as signals:
            try:
                if self._terminal and in_foreground():
                    self._raw.enter()
                status = self._attend(signals)
            finally:
                self._raw.leave()
        if self._terminal and self._unsent:
            complain(f"{self._client.name}: the last that was typed is lost: the guest has not taken it")
        return status

    @property
    def _unsent(self) -> bool:
        return bool(self._typed.waiting or self._client.unsent)

    def _attend(self, signals: Signals) -> int:
        reads_keys = in_foreground() if self._terminal else self._writes
        while True:
            self._pass_on()
            for answer in self._client.exchange():
                status = self._take(answer)
                if status is not None:
                    return status
            poll = select.poll()
            poll.register(signals.descriptor, select.POLLIN)
            poll.register(self._client, select.POLLIN | (select.POLLOUT if self._unsent else 0))
            if reads_keys and (self._terminal or self._client.unsent < _MAX_UNSENT):
                poll.register(0, select.POLLIN)
            if is_pipe(1):
                poll.register(1, 0)  # errors are always reported
            ready = dict(poll.poll())
            if 1 in ready:
                raise BrokenPipeError
            if signals.descriptor in ready:
                numbers = signals.take()
                if ending := [number for number in numbers if number in ENDING]:
                    return 0 if self._terminal else 128 + ending[0]
                if signal.SIGCONT in numbers:
                    self._raw.enter_again()
            if 0 in ready:
                try:
                    keys = os.read(0, CHUNK)
                except OSError:  # the terminal has gone away
                    keys = b""
                if not keys:
                    reads_keys = False
                elif self._type(keys):
                    return 0

    def _take(self, answer: Answer) -> int | None:
        """Shows what came from the VM. Returns the exit status where that is the end."""
        facts = _facts_of(answer)
        if answer.method == "output":
            data = _output_of(self._client, facts)
            while data:
                data = data[os.write(1, data) :]
        elif answer.method == "missed":
            self._say(f"{facts.get('bytes')} bytes of the console are missing: they came too fast")
        elif answer.method == "end":
            self._raw.leave()
            complain(f"{self._client.name} has ended: {facts.get('message') or facts.get('cause')}")
            return _status_of(facts)
        return None

    def _type(self, keys: bytes) -> bool:
        """Passes on what was typed. Returns whether the user leaves."""
        commands: list[str] = []
        if self._terminal:
            keys, commands = self._escape.feed(keys)
        if keys and self._writes:
            self._typed.add(keys)
        if "help" in commands:
            tell(_HELP)
        return "end" in commands

    def _pass_on(self) -> None:
        """Queues what was typed, as far as the VM's process takes it, which waits for its guest."""
        while self._typed.waiting and self._client.unsent < _MAX_UNSENT:
            self._client.type(self._typed.take(CHUNK))

    def _say(self, text: str) -> None:
        if self._terminal:
            tell(text)
        else:
            complain(text)
