"""A conversation with a guest on its console: what it is sent, and what is expected of it."""

from __future__ import annotations

import os
import select
import threading
import time

from pyhv.errors import BadInput, TimedOut
from pyhv.vm import life

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re

    from pyhv.vm.vm import Vm

# How long to wait for room for input before looking whether the VM is still there; in milliseconds.
_SLICE_MS = 50

# So much of what came instead is shown in an error; in bytes.
_SHOWN = 80


class Console:
    """The console of one VM. captured: its output is kept. has_input: its input comes from elsewhere."""

    def __init__(self, vm: Vm, captured: bool, has_input: bool) -> None:
        self._vm = vm
        self._captured = captured
        self._has_input = has_input
        self._at = 0  # expect() has seen so many bytes of output
        self._keys = (-1, -1)  # a pipe, once something is sent
        self._lock = threading.Lock()  # around the pipe

    def send(self, data: bytes, timeout: float | None) -> None:
        """See Machine.send()."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise BadInput(f"data {data!r}", "is no bytes", f"give bytes, not {type(data).__name__}")
        if self._has_input:
            raise BadInput("the console", "has console_in as its input", "write there, or leave console_in out")
        left, deadline = memoryview(data).cast("B"), None if timeout is None else time.monotonic() + timeout
        self._open()
        while left:
            with self._lock:
                if self._vm.life.state in (life.UNKNOWN, life.MOVED, life.ENDED, life.CLOSED) or self._keys[1] < 0:
                    raise self._vm.life.refusal("send")
                try:
                    left = left[os.write(self._keys[1], left) :]
                    continue
                except BlockingIOError:
                    room = select.poll()
                    room.register(self._keys[1], select.POLLOUT)
            if deadline is not None and time.monotonic() >= deadline:
                problem = f"took {len(data) - len(left)} of {len(data)} bytes within {timeout:g} seconds"
                raise TimedOut("the guest", problem, "it reads no console input, or is paused")
            room.poll(_SLICE_MS)

    def _open(self) -> None:
        with self._lock:
            if self._keys[0] >= 0 or self._vm.life.state == life.CLOSED:
                return
            self._keys = os.pipe()
            os.set_blocking(self._keys[1], False)
        self._vm.take_input(self._keys[0])

    def expect(self, what: bytes | re.Pattern[bytes], timeout: float | None) -> re.Match[bytes]:
        """See Machine.expect()."""
        import re

        if not self._captured:
            raise BadInput("the console", "is not captured", "leave console_out out")
        pattern = re.compile(re.escape(what)) if isinstance(what, bytes) else what
        if not isinstance(pattern, re.Pattern) or not isinstance(pattern.pattern, bytes):
            raise BadInput(f"pattern {what!r}", "is no bytes", "give bytes, or re.compile() of bytes")
        shown = what if isinstance(what, bytes) else pattern.pattern
        vm, seen, match = self._vm, -1, None
        if vm.life.state in (life.BUILT, life.PAUSED) and not pattern.search(vm.output(self._at)[0]):
            raise vm.life.refusal("expect")
        text, begin = b"", self._at

        def found() -> bool:
            nonlocal text, begin, seen, match
            text, begin = vm.output(self._at)
            if begin + len(text) != seen:
                seen = begin + len(text)
                match = pattern.search(text)
            return match is not None

        reason = vm.wait_for(timeout, found)
        if match is not None:
            self._at = begin + match.end()
            return match
        last = f"the last that it printed is {bytes(text[-_SHOWN:])!r}"
        if reason == "timeout":
            raise TimedOut("the guest", f"did not print {shown!r} within {timeout:g} seconds", last)
        problem = "was stopped" if reason == "stopped" else ""
        raise vm.life.refusal("expect", problem, f"{shown!r} did not come; {last}")

    def close(self) -> None:
        """After the VM."""
        with self._lock:
            keys, self._keys = self._keys, (-1, -1)
        for descriptor in keys:
            if descriptor >= 0:
                os.close(descriptor)
