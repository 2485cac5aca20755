"""The server of a VM's control socket: one thread, which never waits for a client.

What clients send is taken for hostile, though only the VM's user and root can connect. What a client may take of this
process is bounded: its requests are answered one after the other; as long as it does not read its answers no more of
its requests are read; and a reader of the console that is too slow misses output instead of having it kept.
"""

from __future__ import annotations

import collections
import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

from pyhv.control import jsonrpc
from pyhv.control.history import SIZE as HISTORY_SIZE
from pyhv.control.history import History
from pyhv.control.jsonrpc import Param, Request, RpcError
from pyhv.control.operations import Call, Deferred
from pyhv.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from pyhv.control.names import Claim

    class Controlled(Protocol):
        """What is controlled; Operations is one."""

        def status(self) -> dict[str, Any]: ...
        def submit(self, call: Call) -> None: ...
        def end(self) -> dict[str, Any] | None: ...


METHODS: dict[str, dict[str, Param]] = {
    "status": {},
    "pause": {},
    "resume": {"force": Param(bool)},
    "stop": {},
    "wait": {},
    "log": {},
    "save": {"path": Param(str, True, path=True), "stop": Param(bool)},
    "migrate": {
        "uri": Param(str, True),
        "insecure": Param(bool),
        "tls_cert": Param(str, path=True),
        "tls_key": Param(str, path=True),
        "tls_ca": Param(str, path=True),
        "strict_tsc": Param(bool),
        "downtime": Param(float),
        "bandwidth": Param(float),
        "timeout": Param(float),
        "rounds": Param(int),
        "least_rounds": Param(int),
        "on_timeout": Param(str),
        "compress": Param(bool),
        "heartbeat": Param(float),
        "silence": Param(float),
        "overrun": Param(float),
        "environment": Param(dict),
    },
    "cancel": {},
    "console": {"write": Param(bool)},
    "input": {"data": Param(str, True)},
}

MAX_CONNECTIONS = 32

# As long as a client has so many bytes of answers to read, its requests are not looked at.
_MAX_UNREAD = 64 << 10

# Console bytes in one notification: as base64 they make a line that is well below MAX_LINE.
_CONSOLE_PIECE = 16 << 10

# Once the VM has ended, clients have so long to read the rest; in seconds.
_FAREWELL = 1.0

# How long to leave connections waiting where the process has no descriptor left for them; in seconds.
_ACCEPT_AGAIN = 0.2


class _Connection:
    """One client."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.input_ended = False  # it sends no more, and may still read
        self.call: Call | None = None  # being carried out; deferred: to be answered at the end
        self.call_id: object = None
        self.call_answered = True  # whether anybody waits for the answer
        self.deferred = False
        self.position: int | None = None  # in the console's history; None: it is no reader
        self.told_end = False
        self.is_writer = False
        self.keys = b""  # for the guest, which has no room for them yet
        self.last_heard = time.monotonic()

    @property
    def idle(self) -> bool:
        """Whether it waits for nothing."""
        return self.call is None and self.position is None and not self.keys

    @property
    def wants_requests(self) -> bool:
        return self.call is None and not self.keys and len(self.outgoing) < _MAX_UNREAD

    def send(self, data: bytes) -> None:
        self.outgoing += data


class Server:
    """Serves one VM's control socket once it is started. A context manager; close() ends it at once.

    claim: the VM's name, released by close() and finish().
    """

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        self._listener: socket.socket | None = claim.listener
        self._connections: list[_Connection] = []
        self._history = History()
        self._console = -1
        self._keys = -1
        self._posted: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._accept_after = 0.0
        self._leave_at: float | None = None  # when the thread is to end
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self, controlled: Controlled, console: int, keys: int) -> None:
        """Starts serving. console: where the guest's output comes from, a descriptor that the server reads to its end
        and closes. keys: where input for the guest goes, a pipe that stays the caller's and must not block."""
        self._controlled = controlled
        self._console, self._keys = console, keys
        os.set_blocking(console, False)
        self._thread.start()

    def finish(self, record: dict[str, Any]) -> None:
        """The VM has come to its end (end() tells it), and nobody writes to `console` any more: keeps the record and
        the last of the console, gives up the name, says goodbye to the clients, which takes a second at most, and
        ends."""
        self._post(lambda: self._begin_farewell(record))
        self.close(at_once=False)

    def close(self, at_once: bool = True) -> None:
        """Ends the thread, closes all connections and releases the name; closing twice is allowed."""
        if self._wake < 0:
            return
        if self._thread.ident is not None:
            if at_once:
                self._post(self._leave)
            self._thread.join()
        self._claim.release()
        os.close(self._wake)
        self._wake = -1

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _post(self, work: Callable[[], None]) -> None:
        """Lets the server's thread do something. Any thread; `work` must not raise."""
        self._posted.append(work)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._wake, 1)

    def _leave(self) -> None:
        self._leave_at = 0.0

    def _begin_farewell(self, record: dict[str, Any]) -> None:
        # First of all: whoever is told of the end may look at how it was, and use the name again.
        self._listener = None
        while self._console >= 0 and self._read_console():
            pass
        data, missed = self._log()
        self._claim.leave({**record, "console_base64": jsonrpc.encode_bytes(data), "missed": missed})
        self._claim.release()
        self._leave_at = time.monotonic() + _FAREWELL

    # ------------------------------------------------------------------------------------------------ the loop

    def _run(self) -> None:
        try:
            while not self._is_over():
                self._turn()
        except BaseException as error:
            # The VM runs on without its control socket; it must not wait for its console to be read.
            with contextlib.suppress(OSError):
                what = f"{type(error).__name__}: {error}"
                os.write(2, f"pyhv: the control socket has failed, the VM runs on: {what!a}\n".encode())
            self._claim.release()
        finally:
            for connection in list(self._connections):
                self._drop(connection)
            if self._console >= 0:
                os.close(self._console)
                self._console = -1

    def _is_over(self) -> bool:
        if self._leave_at is None:
            return False
        if time.monotonic() >= self._leave_at:
            return True
        return self._console < 0 and not self._posted and not any(
            c.outgoing or c.deferred or (c.position is not None and not c.told_end) for c in self._connections
        )

    def _turn(self) -> None:
        """Waits until there is something to do and does all of it."""
        now = time.monotonic()
        timeout = None if self._leave_at is None else max(self._leave_at - now, 0.0)
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if self._listener is not None:
            if now >= self._accept_after:
                poll.register(self._listener, select.POLLIN)
            else:
                timeout = min(_ACCEPT_AGAIN, timeout if timeout is not None else _ACCEPT_AGAIN)
        if self._console >= 0:
            poll.register(self._console, select.POLLIN)
        if any(connection.keys for connection in self._connections):
            poll.register(self._keys, select.POLLOUT)
        by_fd = {connection.sock.fileno(): connection for connection in self._connections}
        for fd, connection in by_fd.items():
            events = 0
            if connection.wants_requests and not connection.input_ended:
                events |= select.POLLIN
            if connection.outgoing or self._has_output_for(connection):
                events |= select.POLLOUT
            poll.register(fd, events)  # a hangup is always told
        ready = dict(poll.poll(None if timeout is None else timeout * 1000 + 1))

        if self._wake in ready:
            os.eventfd_read(self._wake)
        while self._posted:
            self._posted.popleft()()
        for fd, connection in by_fd.items():
            if connection in self._connections:
                self._attend(connection, ready.get(fd, 0))
        # After the readers: they have what there was before more comes, so that only a slow one misses any.
        if self._console in ready:
            self._read_console()
        if self._listener is not None and self._listener.fileno() in ready:
            self._accept()

    def _attend(self, connection: _Connection, events: int) -> None:
        """Does what is to be done for a client; drops it on any error."""
        try:
            if events & select.POLLIN:
                self._receive(connection)
            if events & (select.POLLHUP | select.POLLERR | select.POLLNVAL) and not events & select.POLLIN:
                raise ConnectionError  # both directions are closed, and all that came is read
            self._write_keys(connection)
            while True:
                self._answer_requests(connection)
                self._send(connection)
                # Answers that had to wait for others to be sent: no event will come for them.
                if connection.outgoing or not (connection.wants_requests and b"\n" in connection.incoming):
                    break
            done = connection.input_ended and not (connection.outgoing or connection.incoming)
            if done and connection.idle:
                raise ConnectionError
        except Exception as error:
            if not isinstance(error, ConnectionError) and os.environ.get("PYHV_DEBUG"):
                import traceback

                traceback.print_exc()
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        if connection.call is not None:
            connection.call.cancelled = True
            connection.call = None  # they refer to each other
        self._connections.remove(connection)
        connection.sock.close()

    # ------------------------------------------------------------------------------------------------- clients

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError, InterruptedError):
            return
        except OSError:  # no descriptor, no memory
            self._accept_after = time.monotonic() + _ACCEPT_AGAIN
            return
        sock.setblocking(False)
        # The directory keeps others out already; this holds even if it does not.
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (os.geteuid(), 0):
            sock.close()
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            # One that waits for nothing makes room, so that idle connections keep nobody out.
            idle = [connection for connection in self._connections if connection.idle]
            if not idle:
                refusal = BadInput(self._claim.name, f"has {MAX_CONNECTIONS} connections already", "try again later")
                with contextlib.suppress(OSError):
                    sock.send(jsonrpc.encode_error(None, refusal))
                sock.close()
                return
            self._drop(min(idle, key=lambda connection: connection.last_heard))
        self._connections.append(_Connection(sock))

    def _receive(self, connection: _Connection) -> None:
        try:
            data = connection.sock.recv(jsonrpc.MAX_LINE)
        except (BlockingIOError, InterruptedError):
            return
        if data:
            connection.incoming += data
            connection.last_heard = time.monotonic()
        else:
            connection.input_ended = True

    def _answer_requests(self, connection: _Connection) -> None:
        while connection.wants_requests:
            end = connection.incoming.find(b"\n", 0, jsonrpc.MAX_LINE)
            if end < 0:
                if len(connection.incoming) >= jsonrpc.MAX_LINE:
                    error = RpcError(jsonrpc.INVALID_REQUEST, f"a line of more than {jsonrpc.MAX_LINE} bytes")
                    connection.send(jsonrpc.encode_error(None, error))
                    # Nobody knows where the next request begins.
                    connection.input_ended = True
                if connection.input_ended:
                    connection.incoming.clear()
                return
            line = bytes(connection.incoming[:end])
            del connection.incoming[: end + 1]
            if line.strip():
                self._answer(connection, line)

    def _answer(self, connection: _Connection, line: bytes) -> None:
        try:
            request = jsonrpc.parse_request(line, METHODS)
        except RpcError as error:
            connection.send(jsonrpc.encode_error(error.id, error))
            return
        try:
            result = self._carry_out(connection, request)
            if connection.call is not None:
                return  # the answer comes later
            answer = jsonrpc.encode_result(request.id, result)
        except (RpcError, BadInput) as failure:
            answer = jsonrpc.encode_error(request.id, failure)
        if not request.notification:
            connection.send(answer)

    def _carry_out(self, connection: _Connection, request: Request) -> object:
        """The result, unless a call was begun. Raises RpcError, BadInput."""
        if request.method == "status":
            return self._controlled.status()
        if request.method == "console":
            return self._attach(connection, request.params.get("write", False))
        if request.method == "log":
            data, missed = self._log()
            return {"data": jsonrpc.encode_bytes(data), "missed": missed}
        if request.method == "input":
            if not connection.is_writer:
                raise BadInput("console", "this connection is not its writer", "ask for it with console, write: true")
            try:
                connection.keys = jsonrpc.decode_bytes(request.params["data"])
            except ValueError as error:
                raise RpcError(jsonrpc.INVALID_PARAMS, f"input: data {error}", request.id) from None
            self._write_keys(connection)
            return {}
        call = Call(
            request.method,
            request.params,
            finished=lambda outcome: self._post(lambda: self._finish_call(connection, outcome)),
            progress=lambda facts: self._post(lambda: self._tell_progress(connection, facts)),
        )
        connection.call, connection.call_id = call, request.id
        connection.call_answered = not request.notification
        if request.method == "wait":
            connection.deferred = True
        else:
            self._controlled.submit(call)
        return None

    def _finish_call(self, connection: _Connection, outcome: object) -> None:
        if isinstance(outcome, Deferred):
            connection.deferred = True
            return
        connection.call = None
        if connection not in self._connections or not connection.call_answered:
            return
        if isinstance(outcome, BaseException):
            connection.send(jsonrpc.encode_error(connection.call_id, outcome))
        else:
            connection.send(jsonrpc.encode_result(connection.call_id, outcome))

    def _tell_progress(self, connection: _Connection, facts: dict[str, Any]) -> None:
        if connection in self._connections and connection.call_answered and not connection.outgoing:
            connection.send(jsonrpc.encode_notification("progress", facts))

    def _send(self, connection: _Connection) -> None:
        """Sends what there is, as far as the client reads."""
        self._say_goodbye(connection)
        while True:
            if not connection.outgoing:
                self._take_output(connection)
            if not connection.outgoing:
                return
            try:
                sent = connection.sock.send(connection.outgoing)
            except (BlockingIOError, InterruptedError):
                return
            del connection.outgoing[:sent]

    def _say_goodbye(self, connection: _Connection) -> None:
        """Answers who waits for the end, once it has come."""
        if self._leave_at is not None and connection.deferred:
            connection.deferred = False
            connection.call = None
            if connection.call_answered:
                connection.send(jsonrpc.encode_result(connection.call_id, self._controlled.end() or {}))

    # ------------------------------------------------------------------------------------------------- console

    def _attach(self, connection: _Connection, write: bool) -> dict[str, Any]:
        if write and not any(other.is_writer for other in self._connections):
            connection.is_writer = True
        if connection.position is None:
            connection.position = self._history.start
        return {"writer": connection.is_writer}

    def _has_output_for(self, connection: _Connection) -> bool:
        if connection.position is None or connection.told_end:
            return False
        return connection.position < self._history.end or self._output_is_over()

    def _output_is_over(self) -> bool:
        return self._console < 0 and self._leave_at is not None

    def _take_output(self, connection: _Connection) -> None:
        """The next piece of the console for a client, or how the VM ended."""
        if not self._has_output_for(connection):
            return
        assert connection.position is not None
        data, missed = self._history.read(connection.position, _CONSOLE_PIECE)
        if missed:
            connection.send(jsonrpc.encode_notification("missed", {"bytes": missed}))
        if data:
            connection.position += missed + len(data)
            connection.send(jsonrpc.encode_notification("output", {"data": jsonrpc.encode_bytes(data)}))
        else:
            connection.told_end = True
            connection.send(jsonrpc.encode_notification("end", self._controlled.end() or {}))

    def _read_console(self) -> bool:
        """Takes some of what the guest has printed. Returns whether there was any, or its end."""
        try:
            data = os.read(self._console, HISTORY_SIZE // 4)
        except (BlockingIOError, InterruptedError):
            return False
        if data:
            self._history.append(data)
        else:
            os.close(self._console)
            self._console = -1
        return True

    def _log(self) -> tuple[bytes, int]:
        """The last of the console, and how many bytes of it are gone."""
        return self._history.read(0, HISTORY_SIZE)

    def _write_keys(self, connection: _Connection) -> None:
        """Passes on what a client typed, as far as there is room."""
        if not connection.keys:
            return
        try:
            written = os.write(self._keys, connection.keys)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # nobody reads it any more
            written = len(connection.keys)
        connection.keys = connection.keys[written:]
