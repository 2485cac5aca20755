"""A running host: commands in it, files into and out of it, its console, its end."""

from __future__ import annotations

import collections
import contextlib
import io
import itertools
import os
import shutil
import signal
import socket
import struct
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from . import cache, wire
from .errors import CommandTimeout, HostFailed, LabError
from .image import SITE
from .kinds import Kind
from .process import Process

#: What a command's environment is unless the caller says otherwise.
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONPATH": SITE,
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONNOUSERSITE": "1",
}

#: How many lines of a host's console an error shows.
TAIL = 40
#: Runs whose logs were kept are deleted after so many seconds.
KEEP_LOGS = 7 * 24 * 3600


def patience() -> float:
    """By how much every time limit of the lab is multiplied: $PYHV_LAB_PATIENCE, else 1."""
    text = os.environ.get("PYHV_LAB_PATIENCE", "1")
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1000:
        raise LabError(f"PYHV_LAB_PATIENCE={text}: it should be a number above 0 that multiplies all time limits")
    return value


#: For how many seconds a host may take nothing of what it is sent; times patience().
SEND_LIMIT = 60.0


def bound_sends(connection: socket.socket) -> None:
    """Gives sending, and only that, the time limit: a socket's own timeout would hold for the reader's thread too."""
    seconds = int(SEND_LIMIT * patience()) + 1
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", seconds, 0))


class Result(NamedTuple):
    status: int  # 0 to 255, or -N for a command that signal N ended
    stdout: bytes
    stderr: bytes
    seconds: float  # of the lab's time, not the host's

    @property
    def text(self) -> str:
        return self.stdout.decode(errors="replace")


class Command:
    """A command that runs inside a host; Host.start() makes one. For use by one thread at a time."""

    def __init__(self, host: Host, ident: int, argv: Sequence[str]) -> None:
        self._host = host
        self._id = ident
        self.argv = list(argv)
        self.stdout = bytearray()
        self.stderr = bytearray()
        self._exit: bytes | None = None
        self._started = time.monotonic()
        self._ended = self._started

    @property
    def ended(self) -> bool:
        return self._exit is not None

    def send(self, data: bytes) -> None:
        """Gives the command bytes on its standard input, which must have been asked for."""
        self._host._send_stdin(self._id, data)

    def end_input(self) -> None:
        """Ends the command's standard input."""
        self._host._send(wire.encode(wire.Type.STDIN, self._id))

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to the command and all in its process group."""
        self._host._send(wire.encode(wire.Type.KILL, self._id, int(number).to_bytes(4, "little")))

    def wait_for(self, text: bytes, timeout: float = 60) -> None:
        """Waits until the standard output holds `text`.

        Raises CommandTimeout when it does not within `timeout` seconds, and LabError when the command ends before."""
        limit = timeout * patience()
        if not self._host._wait(lambda: text in self.stdout or self.ended, limit):
            raise CommandTimeout(f"{self._what()}: has not printed {text!r} within {limit:.0f} s{self._output()}")
        if text not in self.stdout:
            raise LabError(f"{self._what()}: ended without having printed {text!r}{self._output()}")

    def wait(self, timeout: float = 60, on_line: Callable[[str], None] | None = None) -> Result:
        """The result, once the command has ended. `on_line` gets each line of its standard output as it comes.

        Raises CommandTimeout after `timeout` seconds (the command is killed, the host goes on), HostFailed when the
        host dies or does not even answer to that, OSError when the command could not be started."""
        limit = timeout * patience()
        if on_line is not None:
            self._watch(on_line, limit)
            limit = max(0.0, limit - (time.monotonic() - self._started))
        if not self._host._wait(lambda: self.ended, limit):
            limit = timeout * patience()
            self.kill()
            if not self._host._wait(lambda: self.ended, 20 * patience()):
                what = f"hangs: a command did not end within {limit:.0f} s, nor when killed"
                raise self._host.fail(f"{what}: {' '.join(self.argv)}")
            raise CommandTimeout(f"{self._what()}: killed, it did not end within {limit:.0f} s{self._output()}")
        assert self._exit is not None
        try:
            status = wire.exit_status(self._exit)
        except OSError as error:
            error.filename = self.argv[0]
            raise
        return Result(status, bytes(self.stdout), bytes(self.stderr), self._ended - self._started)

    def _watch(self, on_line: Callable[[str], None], limit: float) -> None:
        """Passes on the lines of the standard output until the command ends or `limit` seconds are over."""
        passed, deadline = 0, time.monotonic() + limit

        def came() -> bool:
            return self.ended or self.stdout.find(b"\n", passed) >= 0

        while self._host._wait(came, max(0.0, deadline - time.monotonic())):
            ended = self.ended
            *lines, _ = bytes(self.stdout[passed:]).split(b"\n")
            for line in lines:
                on_line(line.decode(errors="replace"))
                passed += len(line) + 1
            if ended:
                return

    def _what(self) -> str:
        return f"{self._host.name}: {' '.join(self.argv)}"

    def _output(self) -> str:
        lines = (bytes(self.stdout) + bytes(self.stderr)).decode(errors="replace").splitlines()[-TAIL:]
        return "".join(f"\n    {line}" for line in lines)


class Host:
    """One host. Made by lab.Lab, which also ends it; a subclass knows the emulator.

    A host that fails is stopped at once, its log folder kept, and every later use of it raises the same HostFailed.
    """

    #: How many seconds a start may take when the machine is not busy; times patience().
    START_LIMIT = 60.0

    def __init__(self, kind: Kind, name: str, folder: Path, address: int = 0) -> None:
        self.kind = kind
        self.name = name
        self.folder = folder
        self.number = address
        self.console = folder / "console.log"
        self.ready_text = ""
        self.start_seconds = 0.0
        self._process: Process | None = None
        self._changed = threading.Condition()
        self._commands: dict[int, Command] = {}
        self._ids = itertools.count(1)
        self._sending = threading.Lock()
        self._parser = wire.Parser()
        self._reader: threading.Thread | None = None
        self._ready = 0
        self._gone: str | None = None
        self._failure: HostFailed | None = None
        self._stopped = False
        folder.mkdir(parents=True, exist_ok=True)

    # -- what a subclass gives --------------------------------------------------------------------------

    def _launch(self) -> None:
        """Starts the emulator; sets self._process. What follows is awaited by start_up()."""
        raise NotImplementedError

    def _read_channel(self) -> bytes:
        """Blocks for bytes from the agent; empty at the end."""
        raise NotImplementedError

    def _write_channel(self, data: bytes) -> None:
        raise NotImplementedError

    def _close_channel(self) -> None:
        raise NotImplementedError

    def _send_stdin(self, ident: int, data: bytes) -> None:
        for start in range(0, len(data), wire.MAX_PAYLOAD):
            self._send(wire.encode(wire.Type.STDIN, ident, data[start : start + wire.MAX_PAYLOAD]))

    # -- life -------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Its address on the hosts' network, where it has one."""
        return f"10.77.0.{self.number}"

    def start_up(self, limit: float | None = None) -> None:
        """Starts the host and returns when it takes commands. Raises HostFailed."""
        begin = time.monotonic()
        limit = (limit or self.START_LIMIT) * patience()
        try:
            self._launch()
        except OSError as error:
            raise self.fail(f"cannot be started: {error}") from error
        self._listen()
        self._greet(limit)
        self.start_seconds = time.monotonic() - begin

    def _listen(self) -> None:
        self._reader = threading.Thread(target=self._read, name=f"pyhv-lab {self.name}", daemon=True)
        self._reader.start()

    def _greet(self, limit: float) -> None:
        """Says hello, and waits for the answer to this very hello."""
        seen = self._ready
        name = f"host{self.number}" if self.number else "host"
        payload = wire.hello(time.time_ns(), os.urandom(32), self.number, name)
        self._send(wire.encode(wire.Type.HELLO, 0, payload))
        if not self._wait(lambda: self._ready > seen, limit):
            raise self.fail(f"has not booted within {limit:.0f} s")

    def stop(self) -> None:
        """Ends the host. Its logs are deleted unless it failed. To be called any number of times."""
        if self._stopped:
            return
        self._stopped = True
        if self._process is not None:
            self._process.stop()
        self._close_channel()
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join(10)
        if self._failure is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def fail(self, what: str) -> HostFailed:
        """Stops the host and gives the exception that says why."""
        with self._changed:
            if self._failure is None:
                self._failure = HostFailed(self.name, what, str(self.console), self.tail())
            self._changed.notify_all()
        self.stop()
        return self._failure

    def tail(self, lines: int = TAIL) -> str:
        """The last lines of its console; where there are none, those of the emulator's own log."""
        for path in (self.console, self.folder / "emulator.log"):
            with contextlib.suppress(OSError), path.open("rb") as stream:
                stream.seek(max(0, path.stat().st_size - 65536))
                text = stream.read().decode(errors="replace").replace("\r", "")
                kept = collections.deque((line for line in text.splitlines() if line.strip()), lines)
                if kept:
                    return "\n".join("".join(c if c.isprintable() or c == "\t" else "?" for c in line) for line in kept)
        return ""

    # -- the channel ------------------------------------------------------------------------------------

    def _send(self, data: bytes) -> None:
        self._check()
        try:
            with self._sending:
                self._write_channel(data)
        except BlockingIOError:
            raise self.fail(f"hangs: it has taken no input for {SEND_LIMIT:.0f} s") from None
        except OSError as error:
            self._died(error)
            self._check()

    def _read(self) -> None:
        error: OSError | None = None
        while True:
            try:
                data = self._read_channel()
            except OSError as caught:
                error, data = caught, b""
            if not data:
                break
            for frame in self._parser.feed(data):
                self._take(frame)
        self._died(error)

    def _died(self, error: OSError | None) -> None:
        status = self._process.wait(5) if self._process else None
        what = "has closed its channel" if status is None else f"exited with status {status}"
        with self._changed:
            if self._gone is None:
                self._gone = f"died: its emulator {what}"
            self._changed.notify_all()

    def _take(self, frame: wire.Frame) -> None:
        with self._changed:
            if frame.type == wire.Type.READY:
                self.ready_text = frame.payload.decode(errors="replace")
                self._ready += 1
            elif command := self._commands.get(frame.id):
                if frame.type == wire.Type.STDOUT:
                    command.stdout += frame.payload
                elif frame.type == wire.Type.STDERR:
                    command.stderr += frame.payload
                elif frame.type == wire.Type.EXIT and len(frame.payload) == 4:
                    command._ended = time.monotonic()
                    command._exit = frame.payload
                    del self._commands[frame.id]
            self._changed.notify_all()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._gone is not None:
            raise self.fail(self._gone)
        if self._stopped:
            raise LabError(f"{self.name}: was stopped")

    def _wait(self, condition: Callable[[], bool], limit: float) -> bool:
        """Waits for a condition on what the reader changes; False after `limit` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._gone or self._failure or self._stopped, limit)
            if condition():
                return True
        self._check()
        return False

    # -- commands ---------------------------------------------------------------------------------------

    def start(
        self,
        argv: Sequence[str],
        *,
        stdin: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str = "/tmp",
        terminal: bool = False,
    ) -> Command:
        """Starts a command and returns at once. `env` is added to ENVIRONMENT. With `stdin` it has a standard input
        that Command.send() fills, else /dev/null; with `terminal` all three are a terminal of its own."""
        command = Command(self, next(self._ids), argv)
        payload = wire.run(command.argv, {**ENVIRONMENT, **(env or {})}, cwd, stdin=stdin, terminal=terminal)
        with self._changed:
            self._commands[command._id] = command
        self._send(wire.encode(wire.Type.RUN, command._id, payload))
        return command

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | None = None,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
        cwd: str = "/tmp",
        check: bool = False,
    ) -> Result:
        """Runs a command to its end. With `check` a status other than 0 raises LabError with the output."""
        command = self.start(argv, stdin=stdin is not None, env=env, cwd=cwd)
        if stdin is not None:
            if stdin:
                command.send(stdin)
            command.end_input()
        result = command.wait(timeout)
        if check and result.status:
            raise LabError(f"{command._what()}: exit status {result.status}{command._output()}")
        return result

    # -- files ------------------------------------------------------------------------------------------

    def put(self, files: Mapping[str, Path | bytes], target: str = "/tmp", timeout: float = 120) -> None:
        """Copies files and folders into the host, under the folder `target`, which is made: {"name/inside": source}.
        A source is a file, a folder with all in it, or the content itself."""
        self.run(["mkdir", "-p", target], check=True)
        self.run(["tar", "-x", "-f", "-", "-C", target], stdin=pack(files), timeout=timeout, check=True)

    def get(self, source: str, target: Path, timeout: float = 120) -> None:
        """Copies a file, or what is in a folder, out of the host to `target`. Only files and folders are taken."""
        path = PurePosixPath(source)
        result = self.run(["tar", "-c", "-f", "-", "-C", str(path.parent), path.name], timeout=timeout)
        if result.status:
            why = result.stderr.decode(errors="replace").strip()
            raise LabError(f"{self.name}: {source} could not be copied out: {why}")
        unpack(result.stdout, path.name, target)


def pack(files: Mapping[str, Path | bytes]) -> bytes:
    """A tar archive of files, folders and contents under the names given, all owned by root."""
    out = io.BytesIO()

    def own(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        return member

    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, source in files.items():
            if isinstance(source, bytes):
                member = tarfile.TarInfo(name)
                member.size = len(source)
                member.mode = 0o755 if source.startswith((b"#!", b"\x7fELF")) else 0o644
                archive.addfile(member, io.BytesIO(source))
            else:
                archive.add(source.resolve(), name, filter=own)
    return out.getvalue()


def unpack(data: bytes, name: str, target: Path) -> None:
    """Writes what a tar archive has as `name`, a file or a folder, to `target`.

    The archive comes from inside a host, where a test may have done anything: names that lead elsewhere and whatever
    is neither file nor folder are refused (LabError)."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            if path.parts[:1] != (name,) or ".." in path.parts or not (member.isfile() or member.isdir()):
                raise LabError(f"{member.name}: not a file or a folder under {name}; not copied")
            place = target.joinpath(*path.parts[1:])
            if member.isdir():
                place.mkdir(parents=True, exist_ok=True)
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            stream = archive.extractfile(member)
            assert stream is not None
            with place.open("wb") as out:
                shutil.copyfileobj(stream, out)


def log_folder() -> Path:
    """A new folder for the logs of one run of the lab: under $PYHV_LAB_LOGS, else the cache's `logs`."""
    base = Path(os.environ.get("PYHV_LAB_LOGS") or cache.root() / "logs").resolve()
    base.mkdir(parents=True, exist_ok=True)
    for old in base.iterdir():
        with contextlib.suppress(OSError):
            if old.name.startswith("run-") and time.time() - old.stat().st_mtime > KEEP_LOGS:
                shutil.rmtree(old)
    stamp = time.strftime("run-%Y%m%d-%H%M%S")
    for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            folder = base / (stamp + suffix)
            folder.mkdir()
            return folder
    raise AssertionError


@contextlib.contextmanager
def logs() -> Iterator[Path]:
    """log_folder(), deleted at the end if no host left anything in it."""
    folder = log_folder()
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()
