"""QEMU's monitor (QEMU, docs/interop/qmp-spec). Needs nothing else of the lab: inside/peer_qemu.py has it beside it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from typing import Any


class Monitor:
    """The monitor behind a connected socket, which is given over: one command at a time, one thread.

    timeout: seconds to wait for each answer. error: what is raised, with one line, where QEMU refuses a command, does
    not answer or is gone.
    """

    def __init__(self, connection: socket.socket, timeout: float, error: type[Exception] = RuntimeError) -> None:
        self._socket = connection
        self._error = error
        self._events: list[dict[str, Any]] = []
        connection.settimeout(timeout)
        self._stream = connection.makefile("rb")
        self._next()  # the greeting
        self.call("qmp_capabilities")

    @classmethod
    def connect(cls, path: str, timeout: float, error: type[Exception] = RuntimeError) -> Monitor:
        """The monitor at a UNIX socket that QEMU, just started, has yet to make; waits `timeout` seconds for it too."""
        connection = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + timeout
        while True:
            try:
                connection.connect(path)
                return cls(connection, timeout, error)
            except OSError as reason:
                if time.monotonic() > deadline:
                    connection.close()
                    raise error(f"QEMU does not start: {reason.strerror}") from None
                time.sleep(0.01)

    def _next(self) -> dict[str, Any]:
        try:
            line = self._stream.readline()
        except TimeoutError:
            raise self._error("QEMU's monitor does not answer") from None
        except OSError as reason:
            raise self._error(f"QEMU's monitor: {reason}") from None
        if not line:
            raise self._error("QEMU has closed its monitor")
        return dict(json.loads(line))

    def call(self, command: str, *, descriptors: Sequence[int] = (), **arguments: object) -> Any:
        """The command's answer. descriptors: are handed to QEMU with it."""
        request = json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"
        try:
            if descriptors:
                socket.send_fds(self._socket, [request], descriptors)
            else:
                self._socket.sendall(request)
        except OSError as reason:
            raise self._error(f"QEMU's monitor: {reason}") from None
        while True:
            answer = self._next()
            if "error" in answer:
                raise self._error(f"QEMU refuses {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
            self._events.append(answer)

    def wait_for(self, event: str) -> float:
        """When the first event of this name happened, in seconds of CLOCK_REALTIME."""
        while not (found := [one for one in self._events if one["event"] == event]):
            self._events.append(self._next())
        stamp = found[0]["timestamp"]
        return float(stamp["seconds"] + stamp["microseconds"] / 1e6)

    def wait_migrated(self, timeout: float) -> None:
        """Until a migration, either way, has come to its end."""
        limit = time.monotonic() + timeout
        while time.monotonic() < limit:
            state = self.call("query-migrate")
            if state.get("status") == "completed":
                return
            if state.get("status") in ("failed", "cancelled"):
                why = state.get("error-desc", "no reason given")
                raise self._error(f"QEMU: the migration {state['status']}: {why}")
            time.sleep(0.005)
        raise self._error(f"QEMU: the migration was not done within {timeout:.0f} s")

    def close(self) -> None:
        self._stream.close()
        self._socket.close()
