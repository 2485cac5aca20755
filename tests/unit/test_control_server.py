"""The server of the control socket, without a VM: clients of every kind, honest, slow, many and hostile."""

from __future__ import annotations

import base64
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyhv.control import jsonrpc, names, server
from pyhv.control.client import Client, all_statuses
from pyhv.control.history import SIZE, History
from pyhv.control.operations import Call, Deferred, Operations
from pyhv.errors import BadInput, HostError

TIMEOUT = 30


class FakeVm:
    """What is controlled: calls end when the test says so, or at once."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.outcome: Callable[[Call], object] | None = lambda call: {}
        self.ended: dict[str, Any] | None = None

    def status(self) -> dict[str, Any]:
        return {"name": "t", "state": "ended" if self.ended else "running"}

    def submit(self, call: Call) -> None:
        self.calls.append(call)
        if self.outcome is not None:
            call.finished(self.outcome(call))

    def end(self) -> dict[str, Any] | None:
        return self.ended


class Served:
    """A server with both ends of the console."""

    def __init__(self) -> None:
        self.vm = FakeVm()
        self.server = server.Server(names.claim("t"))
        copy, self.guest_output = os.pipe()
        self.guest_input, self.keys = os.pipe()
        os.set_blocking(self.keys, False)
        os.set_blocking(self.guest_input, False)
        self.server.start(self.vm, copy, self.keys)

    def finish(self, cause: str = "guest-exit", message: str = "") -> None:
        """The guest has come to its end."""
        self.vm.ended = {"cause": cause, "status": 7, "message": message}
        os.close(self.guest_output)
        self.guest_output = -1
        self.server.finish({})

    def close(self) -> None:
        self.server.close()
        for fd in (self.guest_output, self.guest_input, self.keys):
            if fd >= 0:
                os.close(fd)

    def keys_typed(self) -> bytes:
        try:
            return os.read(self.guest_input, 1 << 20)
        except BlockingIOError:
            return b""


class Raw:
    """A client that sends what it likes."""

    def __init__(self) -> None:
        self.sock = names.connect("t")
        self.sock.settimeout(TIMEOUT)
        self._read = b""

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *exception: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def line(self) -> Any:
        """The next line; None at the end."""
        while b"\n" not in self._read:
            data = self.sock.recv(65536)
            if not data:
                assert not self._read
                return None
            self._read += data
        line, _, self._read = self._read.partition(b"\n")
        return json.loads(line)

    def ask(self, method: str, id: object = 1, **params: object) -> Any:
        self.send(request(method, id, **params))
        return self.line()

    def output(self, size: int) -> bytes:
        """So many bytes of the console."""
        data = b""
        while len(data) < size:
            message = self.line()
            assert message["method"] == "output"
            data += base64.b64decode(message["params"]["data"])
        return data


def request(method: str, id: object = 1, **params: object) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "method": method, "params": params, "id": id}).encode() + b"\n"


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(scope="module", autouse=True)
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("run")
        patch.setenv("XDG_RUNTIME_DIR", str(path))
        yield path


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.close()
    assert not made.server._thread.is_alive()


def assert_well() -> None:
    """The server answers others."""
    with Client("t") as client:
        assert client.status()["state"] == "running"


# ---------------------------------------------------------------------------------------------------- requests


def test_the_client(served: Served) -> None:
    with Client("t") as client:
        assert client.status() == {"name": "t", "state": "running"}
        client.pause()
        client.resume()
        client.save("/tmp/x", stop=True)
        client.save("/tmp/x")
    assert [(call.method, call.params) for call in served.vm.calls] == [
        ("pause", {}), ("resume", {}), ("save", {"path": "/tmp/x", "stop": True}), ("save", {"path": "/tmp/x"}),
    ]  # fmt: skip


@pytest.mark.parametrize("error", [BadInput("/x", "is a directory", "name it"), HostError("write /x", 28, "none made")])
def test_errors_reach_the_caller(served: Served, error: Exception) -> None:
    served.vm.outcome = lambda call: error
    with Client("t") as client:
        with pytest.raises(type(error)) as raised:
            client.pause()
        assert str(raised.value) == str(error)
        served.vm.outcome = lambda call: RuntimeError("secret")
        with pytest.raises(HostError, match=r"internal error: RuntimeError$"):
            client.pause()
    assert_well()


def test_progress(served: Served) -> None:
    served.vm.outcome = None
    seen: list[tuple[int, int]] = []
    with Client("t") as client:
        thread = threading.Thread(target=lambda: client.save("/x", progress=lambda *numbers: seen.append(numbers)))
        thread.start()
        wait_for(lambda: served.vm.calls)
        call = served.vm.calls[0]
        for done in (1, 2):
            call.progress({"done": done, "total": 2})
            wait_for(lambda: len(seen) == done)  # noqa: B023
        call.finished({})
        thread.join()
    assert seen == [(1, 2), (2, 2)]


def test_requests_of_one_client_are_answered_in_order(served: Served) -> None:
    served.vm.outcome = None
    with Raw() as client:
        client.send(request("pause", 1) + request("status", 2) + request("nosuch", 3))
        wait_for(lambda: served.vm.calls)
        assert_well()  # others need not wait
        served.vm.calls[0].finished({})
        assert [client.line()["id"] for _ in range(3)] == [1, 2, 3]


def test_half_lines(served: Served) -> None:
    with Raw() as client:
        for byte in request("status", "x"):
            client.send(bytes([byte]))
        assert client.line()["id"] == "x"
        client.send(b'\n \r\n{"jsonrpc"')  # empty lines are nothing
        assert_well()
        client.sock.shutdown(socket.SHUT_WR)
        assert client.line() is None  # what never became a line is dropped


def test_who_sends_no_more_is_still_answered(served: Served) -> None:
    """As `echo ... | socat - UNIX:...` does."""
    served.vm.outcome = None
    with Raw() as client:
        client.send(request("status") + request("pause", 2))
        client.sock.shutdown(socket.SHUT_WR)
        assert client.line()["result"]["name"] == "t"
        wait_for(lambda: served.vm.calls)
        served.vm.calls[0].finished({})
        assert client.line() == {"jsonrpc": "2.0", "result": {}, "id": 2}
        assert client.line() is None


def test_notifications_get_no_answer(served: Served) -> None:
    with Raw() as client:
        for method in ("pause", "status", "input"):
            client.send(json.dumps({"jsonrpc": "2.0", "method": method}).encode() + b"\n")
        assert client.line()["error"]["code"] == -32602  # input without data: broken, so nobody knows what it was
        assert client.ask("status", 5)["id"] == 5
    assert [call.method for call in served.vm.calls] == ["pause"]


def test_garbage_is_refused_and_the_next_line_is_understood(served: Served) -> None:
    with Raw() as client:
        client.send(b"garbage\n\x00\xff\n[]\n")
        assert [client.line()["error"]["code"] for _ in range(3)] == [-32700, -32700, -32600]
        assert client.ask("status")["result"]["name"] == "t"


def test_lines_have_a_limit(served: Served) -> None:
    with Raw() as client:
        padding = 65536 - len(request("status", ""))
        assert client.ask("status", "x" * padding)["id"] == "x" * padding  # just so
        with pytest.raises(OSError):  # the server hangs up on it
            for _ in range(1000):
                client.send(b"y" * 65536)
    with Raw() as client:
        client.send(b"y" * 65536)
        assert client.line()["error"]["code"] == -32600
        assert client.line() is None
    assert_well()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.binary(max_size=40)
        | st.sampled_from([b"\n", b"{}\n", b"[]\n", b"x" * 70000, request("status"), request("console", write=True)])
        | st.sampled_from([request("input", data="QQ=="), request("pause"), request("save", path="/x")]),
        max_size=12,
    ),
    st.booleans(),
)
def test_whatever_is_sent(chunks: list[bytes], reads: bool) -> None:
    made = Served()
    try:
        with Raw() as client:
            try:
                for chunk in chunks:
                    client.send(chunk)
                    if reads:
                        client.sock.settimeout(0.001)
                        try:
                            client.sock.recv(65536)
                        except TimeoutError:
                            pass
                        client.sock.settimeout(TIMEOUT)
            except OSError:
                pass
            assert_well()
        assert_well()
    finally:
        made.close()


# ------------------------------------------------------------------------------------------- many, slow, hostile


def test_who_does_not_read_is_not_listened_to(served: Served) -> None:
    with Raw() as client:
        client.sock.settimeout(0.3)
        sent = 0
        with pytest.raises(TimeoutError):
            for _ in range(100):
                client.send(request("status") * 1000)
                sent += 1
        assert sent < 100
        [connection] = served.server._connections
        assert len(connection.outgoing) < server._MAX_UNREAD + 4096
        assert len(connection.incoming) < 2 * 65536
        assert_well()
        client.sock.settimeout(TIMEOUT)
        for _ in range(1000 * sent):  # and now it reads: nothing was lost
            assert client.line()["id"] == 1


def test_many_connections(served: Served) -> None:
    clients = [Raw() for _ in range(100)]
    assert_well()  # idle ones make room
    wait_for(lambda: len(served.server._connections) <= server.MAX_CONNECTIONS)
    for client in clients:
        client.sock.close()
    wait_for(lambda: not served.server._connections)


def test_those_that_wait_for_something_do_not_make_room(served: Served) -> None:
    served.vm.outcome = None
    clients = [Raw() for _ in range(server.MAX_CONNECTIONS)]
    for index, client in enumerate(clients):
        if index % 2:
            client.send(request("pause"))
        else:
            assert client.ask("console")["result"] == {"writer": False}
    wait_for(lambda: len(served.vm.calls) == server.MAX_CONNECTIONS // 2)
    with pytest.raises(BadInput, match="t: has 32 connections already; try again later"):
        assert_well()
    clients[0].sock.close()
    wait_for(lambda: len(served.server._connections) < server.MAX_CONNECTIONS)
    assert_well()
    for client in clients:
        client.sock.close()


def test_who_hangs_up_cancels(served: Served) -> None:
    served.vm.outcome = None
    with Raw() as client:
        client.send(request("save", path="/x"))
        wait_for(lambda: served.vm.calls)
        assert not served.vm.calls[0].cancelled
    wait_for(lambda: served.vm.calls[0].cancelled)
    served.vm.calls[0].progress({"done": 1, "total": 2})
    served.vm.calls[0].finished({})
    assert_well()


def test_no_descriptors_left(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([OSError(24, "Too many open files")] * 2)

    class Listener:
        def __init__(self, real: socket.socket) -> None:
            self.fileno = real.fileno
            self._real = real

        def accept(self) -> Any:
            for failure in failures:
                raise failure
            return self._real.accept()

    assert served.server._listener is not None
    served.server._listener = Listener(served.server._listener)  # type: ignore[assignment]
    assert_well()  # a little later
    assert next(failures, None) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_other_users_are_sent_away(served: Served, base: Path) -> None:
    path = base / "pyhv" / "t.sock"
    with names.Directory() as directory:  # one that an administrator opened up after it was checked
        os.chmod(base / "pyhv", 0o711)
        os.chmod(path, 0o666)
        try:
            child = os.fork()
            if child == 0:
                status = 9
                try:
                    os.setgid(4711)
                    os.setuid(4711)
                    sock = socket.socket(socket.AF_UNIX)
                    sock.settimeout(TIMEOUT)
                    sock.connect(f"/proc/self/fd/{directory._fd}/t.sock")
                    sock.sendall(request("stop"))
                    status = len(sock.recv(100))
                except (BrokenPipeError, ConnectionResetError):
                    status = 0
                finally:
                    os._exit(min(status, 99))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        finally:
            os.chmod(base / "pyhv", 0o700)
    assert served.vm.calls == []
    assert_well()


def test_a_failure_of_the_server_lets_the_vm_run_on(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise RuntimeError("planted")

    served.server._post(fail)
    served.server._thread.join(TIMEOUT)
    assert "the control socket has failed, the VM runs on: 'RuntimeError: planted'" in capfd.readouterr().err
    with pytest.raises(BrokenPipeError):  # no wait for a reader that is gone
        os.write(served.guest_output, b"x")
    with pytest.raises(BadInput, match="none runs at all"):
        names.connect("t")


# --------------------------------------------------------------------------------------------------- the client


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (b"", "its process has ended"),
        (b"{}\n", "what came from it is no answer"),
        (b'{"jsonrpc":"2.0","result":[],"id":1}\n', "what came from it is no status"),
        (b"x" * (2 << 20), "what came from it is too long"),
        (b'{"jsonrpc":"2.0","error":{"code":7,"message":"odd"},"id":null}\n', "odd"),
    ],
)
def test_servers_that_are_none(base: Path, said: bytes, problem: str) -> None:
    with names.claim("t") as claim, Client("t") as client:
        claim.listener.setblocking(True)
        sock, _ = claim.listener.accept()

        def say() -> None:
            with sock:
                try:
                    sock.sendall(said)
                except OSError:
                    pass

        thread = threading.Thread(target=say)
        thread.start()
        with pytest.raises(HostError, match=f"the control socket of t: {problem}"):
            client.status()
        client.close()
        thread.join()


def test_a_process_that_does_not_answer(base: Path) -> None:
    with names.claim("t"):
        with Client("t") as client, pytest.raises(HostError, match=r"within 0\.05 seconds; is its process stopped\?"):
            client.status(within=0.05)
        assert all_statuses(0.05) == [("t", None)]


# -------------------------------------------------------------------------------------------------- the console


def test_readers_see_what_was_before_and_what_comes(served: Served) -> None:
    os.write(served.guest_output, b"before ")
    wait_for(lambda: served.server._history.end == 7)
    with Raw() as one, Raw() as two:
        assert one.ask("console")["result"] == {"writer": False}
        assert one.output(7) == b"before "
        os.write(served.guest_output, b"after")
        assert two.ask("console")["result"] == {"writer": False}
        assert one.output(5) == b"after"
        assert two.output(12) == b"before after"
        assert one.ask("status")["id"] == 1  # everything else goes on


def test_what_comes_with_an_answer_is_not_lost(served: Served) -> None:
    os.write(served.guest_output, b"before")
    wait_for(lambda: served.server._history.end == 6)
    with Client("t") as client:
        client.call("console")
        time.sleep(0.05)
        client.status()  # its answer comes behind the output
        [answer] = client.exchange()
        assert (answer.method, base64.b64decode(answer.result["data"])) == ("output", b"before")


def test_one_writer(served: Served) -> None:
    with Raw() as one, Raw() as two:
        assert one.ask("console", write=True)["result"] == {"writer": True}
        assert two.ask("console", write=True)["result"] == {"writer": False}
        assert one.ask("input", data="AAH/")["result"] == {}
        assert served.keys_typed() == b"\x00\x01\xff"
        assert "is not its writer" in two.ask("input", data="AAH/")["error"]["message"]
        assert one.ask("input", data="A")["error"]["code"] == -32602
        one.sock.close()
        wait_for(lambda: len(served.server._connections) == 1)
        assert two.ask("console", write=True)["result"] == {"writer": True}
    assert served.keys_typed() == b""


def test_input_waits_for_the_guest_and_is_not_lost(served: Served) -> None:
    with Raw() as writer:
        assert writer.ask("console", write=True)["result"] == {"writer": True}
        data = os.urandom(300000)
        pieces = [data[at : at + 30000] for at in range(0, len(data), 30000)]
        lines = b"".join(request("input", data=base64.b64encode(piece).decode()) for piece in pieces)
        thread = threading.Thread(target=lambda: writer.send(lines))
        thread.start()
        time.sleep(0.05)
        assert_well()
        received = b""
        deadline = time.monotonic() + TIMEOUT
        while len(received) < len(data) and time.monotonic() < deadline:
            received += served.keys_typed()
        thread.join()
        assert received == data


def test_a_reader_that_does_not_read_blocks_nobody(served: Served) -> None:
    with Raw() as stuck, Raw() as quick:
        stuck.ask("console")
        quick.ask("console")
        data = os.urandom(4096)
        for _ in range(500):  # 2 MB: more than history and socket hold
            assert os.write(served.guest_output, data) == 4096
            assert quick.output(4096) == data
        stuck_connection = next(c for c in served.server._connections if c.outgoing)
        assert len(stuck_connection.outgoing) < 65536
        # It gets what is still there, and is told what is not.
        missed = received = 0
        while missed + received < 500 * 4096:
            message = stuck.line()
            if message["method"] == "missed":
                missed += message["params"]["bytes"]
            else:
                last = base64.b64decode(message["params"]["data"])
                received += len(last)
        assert missed > 0
        assert missed + received == 500 * 4096
        assert (data * 5).endswith(last[-4096:])


def test_the_end(served: Served, base: Path) -> None:
    served.vm.outcome = lambda call: Deferred()
    with Raw() as reader, Raw() as stopper, Raw() as gone:
        reader.ask("console")
        gone.send(request("stop"))
        gone.sock.close()
        stopper.send(request("stop", 9))
        wait_for(lambda: len(served.vm.calls) == 2)
        os.write(served.guest_output, b"last words")
        served.finish()
        assert os.listdir(base / "pyhv") == ["t.ended"]
        assert json.loads((base / "pyhv" / "t.ended").read_bytes()) == {
            "console_base64": jsonrpc.encode_bytes(b"last words"), "missed": 0,
        }  # fmt: skip
        end = {"cause": "guest-exit", "status": 7, "message": ""}
        assert reader.output(10) == b"last words"
        assert reader.line() == {"jsonrpc": "2.0", "method": "end", "params": end}
        assert reader.line() is None
        assert stopper.line() == {"jsonrpc": "2.0", "result": end, "id": 9}
        assert stopper.line() is None


def test_a_stop_that_comes_too_late_says_so(served: Served) -> None:
    """The VM was handed over just before: it runs there, and whoever wanted to end it must know."""
    served.vm.outcome = lambda call: Deferred()
    finisher = threading.Timer(0.1, lambda: served.finish("migrated", "migrated to x"))
    finisher.start()
    with Client("t") as client, pytest.raises(BadInput, match="t: was not stopped: migrated to x; stop it there"):
        client.stop()
    finisher.join()


def test_what_ended_a_vm_first_counts() -> None:
    machine = mock.MagicMock()
    operations = Operations("t")
    operations.control(machine)
    operations._stop("migrated")
    operations._stop("stopped")
    assert operations.ending == "migrated" and machine.vm.interrupt.call_count == 2
    operations.close()


def test_the_end_does_not_wait_for_who_does_not_read(served: Served) -> None:
    with Raw() as stuck:
        stuck.ask("console")
        for _ in range(300):
            os.write(served.guest_output, b"x" * 4096)
        started = time.monotonic()
        served.finish()
        assert 0.9 < time.monotonic() - started < 10


def test_close_is_at_once(served: Served, base: Path) -> None:
    with Raw() as reader:
        reader.ask("console")
        started = time.monotonic()
        served.server.close()
        assert time.monotonic() - started < 0.9
        assert os.listdir(base / "pyhv") == []
        assert reader.line() is None


@given(st.lists(st.integers(0, 3 * SIZE)), st.lists(st.integers(0, 8 * SIZE)), st.integers(1, 2 * SIZE))
def test_history(appended: list[int], positions: list[int], limit: int) -> None:
    history, everything = History(), b""
    for index, size in enumerate(appended):
        data = bytes([index % 251]) * size
        history.append(data)
        everything += data
    assert history.end == len(everything)
    assert len(history._data) <= 2 * SIZE
    for position in positions:
        at = min(position, len(everything))
        data, missed = history.read(at, limit)
        assert missed == max(len(everything) - SIZE - at, 0)
        assert data == everything[at + missed : at + missed + limit]
