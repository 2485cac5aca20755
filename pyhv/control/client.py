"""A client of a VM's control socket."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Sequence

from pyhv.control import jsonrpc, names
from pyhv.control.jsonrpc import Answer
from pyhv.errors import BadInput, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# A server answers status at once, whatever its VM does; in seconds.
ANSWERS_WITHIN = 10.0

_CHUNK = 64 << 10


class Silent(HostError):
    """Nothing came in the time that there was for it."""


class Client:
    """A connection to the running VM of a name. A context manager; close() closes it.

    Raises BadInput where there is no such VM, HostError where its process does not answer. Every other method
    raises HostError too when the connection breaks.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._socket = names.connect(name)
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._answers: list[Answer] = []  # that came and were not taken yet
        self._last_id = 0

    def close(self) -> None:
        """Closes the connection; closing twice is allowed."""
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor, to wait for answers or for room."""
        return self._socket.fileno()

    # ------------------------------------------------------------------------------------------------- calls

    def status(self, within: float = ANSWERS_WITHIN) -> dict[str, Any]:
        """What the VM is and does; docs/control.md has the meaning of each value. within: seconds to wait for it."""
        result = self.call("status", within=within)
        if not isinstance(result, dict):
            raise self._broken("what came from it is no status")
        return result

    def pause(self) -> None:
        """Stops the guest between two instructions; returns when it stands. No effect on a paused VM."""
        self.call("pause")

    def resume(self, force: bool = False) -> None:
        """Lets the guest run on. No effect on a running VM. force: also one that was handed over to another host, and
        may run there."""
        self.call("resume", {"force": True} if force else None)

    def migrate(
        self, uri: str, params: dict[str, Any] | None = None, progress: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        """Migrates the VM to the side that waits at `uri`; raises what Machine.migrate raises. params: of the method;
        docs/control.md has them. progress: is called now and then with the fields of migration.source.Progress. Returns
        those of its Summary."""
        summary = self.call("migrate", {"uri": uri, **(params or {})}, progress)
        if not isinstance(summary, dict):
            raise self._broken("what came from it is no summary")
        return summary

    def cancel_migration(self) -> None:
        """Gives up the migration that another client has begun: the VM stays here. Raises BadInput where there is none,
        or it is too late."""
        self.call("cancel")

    def save(self, path: str, stop: bool = False, progress: Callable[[int, int], None] | None = None) -> None:
        """Saves the VM to the absolute path, as Machine.save does; raises what that raises. stop: end the VM then, and
        return when its name is free; nothing in it runs after what was saved. progress: is called now and then with the
        bytes of memory done and all that there are."""
        params = {"path": path} | ({"stop": True} if stop else {})

        def tell(facts: dict[str, Any]) -> None:
            if progress is not None:
                progress(*self._numbers(facts, "done", "total"))

        self.call("save", params, tell)

    def stop(self) -> dict[str, Any]:
        """Ends the VM, with the cause "stopped", unless it has just ended by itself; returns how it ended (cause,
        status, message), when its name is free. Raises BadInput where it has been migrated in the meantime, and runs
        there."""
        end = self.call("stop")
        if not isinstance(end, dict):
            raise self._broken("what came from it is no end")
        if end.get("cause") == "migrated":
            raise BadInput(self.name, f"was not stopped: {end.get('message')}", "stop it there")
        return end

    def wait(self, within: float | None = None) -> dict[str, Any]:
        """Waits until the VM has ended, and its name is free; returns how (cause, status, message). within: at most so
        many seconds; Silent is raised then."""
        end = self.call("wait", within=within)
        if not isinstance(end, dict):
            raise self._broken("what came from it is no end")
        return end

    def log(self) -> tuple[bytes, int]:
        """The last that the guest has printed, at most 64 KiB, and how many bytes before that are gone."""
        return log_of(self.call("log"), self.name)

    def call(
        self,
        method: str,
        params: dict[str, Any] | None = None,
        progress: Callable[[dict[str, Any]], None] | None = None,
        within: float | None = None,
    ) -> Any:
        """Sends a request and waits for its result, at most `within` seconds. Raises the error that it is answered
        with: BadInput or HostError."""
        self._last_id += 1
        self._outgoing += jsonrpc.encode_request(method, params or {}, self._last_id)
        deadline = None if within is None else time.monotonic() + within
        others: list[Answer] = []
        try:
            while True:
                self._receive()
                while self._answers:
                    answer = self._answers.pop(0)
                    if answer.id == self._last_id or (answer.id is None and answer.error is not None):
                        if answer.error is not None:  # without an id: it does not take us
                            raise answer.error
                        return answer.result
                    if answer.method != "progress":
                        others.append(answer)
                    elif progress is not None:
                        progress(answer.result)
                self._wait(deadline, within)
        finally:
            self._answers[:0] = others  # for exchange()

    def _wait(self, deadline: float | None, within: float | None) -> None:
        """Waits until something comes or more can be sent. Raises HostError when the deadline has passed."""
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise Silent(
                self._subject, 0, f"nothing came from it within {within:g} seconds; is its process stopped?"
            )
        poll = select.poll()
        poll.register(self, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
        poll.poll(None if left is None else left * 1000 + 1)

    def _numbers(self, params: dict[str, Any], *keys: str) -> list[int]:
        values = [params.get(key) for key in keys]
        if not all(type(value) is int for value in values):
            raise self._broken("what came from it is no progress")
        return [value for value in values if type(value) is int]

    # ------------------------------------------------------------------------------- without waiting: the console

    @property
    def unsent(self) -> int:
        """Bytes that wait until the server reads them."""
        return len(self._outgoing)

    def type(self, keys: bytes) -> None:
        """Queues input for the guest's console; exchange() sends it."""
        self._outgoing += jsonrpc.encode_request("input", {"data": jsonrpc.encode_bytes(keys)}, None)

    def exchange(self) -> list[Answer]:
        """Sends what can be sent and takes what has come, without waiting. Raises HostError when the server is gone."""
        self._receive()
        answers, self._answers = self._answers, []
        return answers

    def _receive(self) -> None:
        try:
            while self._outgoing:
                sent = self._socket.send(self._outgoing)
                del self._outgoing[:sent]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:  # it may have said something before it went
            self._outgoing.clear()
        gone = False
        try:
            data = self._socket.recv(_CHUNK)
            gone = not data
            self._incoming += data
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            gone = True
        while (end := self._incoming.find(b"\n")) >= 0:
            self._answers.append(jsonrpc.parse_answer(bytes(self._incoming[:end]), self.name))
            del self._incoming[: end + 1]
        if gone and not self._answers:
            raise self._broken("its process has ended")
        if len(self._incoming) > jsonrpc.MAX_ANSWER:
            raise self._broken("what came from it is too long")

    @property
    def _subject(self) -> str:
        return f"the control socket of {self.name}"

    def _broken(self, detail: str) -> HostError:
        return HostError(self._subject, 0, detail)


def record_of(name: str) -> dict[str, Any] | None:
    """What is kept of a VM that has ended; None of one that runs or never was. Raises BadInput, HostError."""
    try:
        names.connect(name).close()
    except names.Ended as ended:
        return ended.record
    except BadInput:
        pass
    return None


def all_ended(running: Sequence[str]) -> list[tuple[str, dict[str, Any] | None]]:
    """The name of every VM that has ended and is kept, but for those of these names, with what is kept of it but its
    console. The last one first."""
    with names.Directory() as directory:
        records = [(name, directory.ended(name)) for name in directory.ended_names() if name not in running]
    for _, record in records:
        if record is not None:
            record.pop("console_base64", None)
    return [(name, record) for name, record in records if record is not None]


def log_of(value: Any, name: str) -> tuple[bytes, int]:
    """As Client.log(), of what came, or what was kept. Raises HostError."""
    try:
        return jsonrpc.decode_bytes(value["data"]), int(value["missed"])
    except (ValueError, KeyError, TypeError):
        raise HostError(f"the log of {name}", 0, "what came is no log") from None


def all_statuses(within: float = ANSWERS_WITHIN) -> list[tuple[str, dict[str, Any] | None]]:
    """The name of every running VM with its status; None for one whose process does not answer within so many seconds,
    all together. Removes what dead ones left. Raises BadInput for a runtime directory that cannot be trusted."""
    found: list[tuple[str, dict[str, Any] | None]] = []
    with names.Directory() as directory:
        running = names.live_names(directory)
    deadline = time.monotonic() + within
    for name in running:
        try:
            with Client(name) as client:
                # One that is stopped must not use up the time of those behind it.
                left = deadline - time.monotonic()
                found.append((name, client.status(max(left, 0.2))))
        except BadInput:  # it has ended in the meantime
            continue
        except HostError:
            found.append((name, None))
    return found
