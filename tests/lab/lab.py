"""The lab: starts hosts, together and connected if wanted, and ends them all whatever happens."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from . import bochs, image, kinds, packages, qemu
from .errors import LabError
from .host import Host, log_folder
from .kinds import Kind


class Link:
    """A serial cable between two Intel hosts: /dev/ttyS1 of the one and of the other, at 115200 bits a second.

    It may have more ends than two: two of them are joined at a time, the first two to begin with. The lab passes the
    bytes on, so it can count them, join other ends and cut the cable."""

    def __init__(self, ends: int = 2) -> None:
        self._listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(ends)]
        self.ports = [listener.getsockname()[1] for listener in self._listeners]
        self._ends: list[socket.socket] = []
        self.passed = [0] * ends
        self._joined = (0, 1)
        self._cut = threading.Event()
        threading.Thread(target=self._connect, name="pyhv-lab link", daemon=True).start()

    def _connect(self) -> None:
        with contextlib.suppress(OSError):
            for listener in self._listeners:
                self._ends.append(listener.accept()[0])
                listener.close()
            for source in range(len(self._ends)):
                threading.Thread(target=self._pass, args=(source,), name="pyhv-lab link", daemon=True).start()

    def _pass(self, source: int) -> None:
        with contextlib.suppress(OSError):
            while data := self._ends[source].recv(4096):
                joined = self._joined
                if source in joined and not self._cut.is_set():
                    self._ends[joined[1 - joined.index(source)]].sendall(data)
                    self.passed[source] += len(data)

    def join(self, one: int, other: int) -> None:
        """Joins two ends, counted from 0 as the hosts were started; what any other one sends is lost."""
        self._joined = one, other

    def cut(self) -> None:
        """Cuts the cable: what is sent from now on is lost, and neither host is told, as with a real one."""
        self._cut.set()

    def mend(self) -> None:
        self._cut.clear()

    def close(self) -> None:
        for end in (*self._listeners, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class Lab:
    """A set of hosts, to be used in a `with` statement; at its end all are stopped.

    The logs of hosts that failed are kept in `folder`. `say` is told what takes long (downloads, snapshots).
    """

    def __init__(self, say: image.Say = image.say_nothing) -> None:
        self._say = say
        self.hosts: list[Host] = []
        self._links: list[Link] = []
        self._lock = threading.Lock()
        self._folder: Path | None = None
        # A multicast group of the lab's own: QEMU's hosts find each other by it, on the loopback interface only.
        numbers = secrets.token_bytes(3)
        self._group = f"239.{numbers[0]}.{numbers[1]}.{numbers[2]}:{20000 + secrets.randbelow(40000)}"
        self._numbers = iter(range(1, 255))

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def folder(self) -> Path:
        with self._lock:
            if self._folder is None:
                self._folder = log_folder()
            return self._folder

    def start(self, *names: str, connected: bool = False) -> list[Host]:
        """Starts hosts of these kinds side by side; returns when all take commands.

        `connected`: AMD hosts get a network among themselves (Host.address; 10.77.0.N, MTU 9000); Intel hosts, of
        which there must be two at least, a serial cable (`link`). Needs the packages of `setup`. Raises HostFailed of
        the first that failed; then none of these is left running.
        """
        wanted = [kinds.find(name) for name in names]
        prepare(wanted, self._say)
        if not wanted:
            return []
        made: list[Host] = []
        intel = sum(kind.vendor == "intel" for kind in wanted)
        if connected and intel == 1:
            raise LabError("a serial cable has two ends, and one Intel host wants one")
        link = None
        if connected and intel:
            link = Link(intel)
            self._links.append(link)
        ends = iter(link.ports if link else ())
        for kind in wanted:
            with self._lock:
                name = self._name(kind)
                if kind.vendor == "amd":
                    number = next(self._numbers) if connected else 0
                    group = self._group if connected else None
                    snapshot = qemu.snapshot(kind, self._say)
                    folder = self._make(name)
                    host: Host = qemu.QemuHost(kind, name, folder, number, snapshot=snapshot, group=group)
                else:
                    host = bochs.BochsHost(kind, name, self._make(name), link=next(ends, 0))
                self.hosts.append(host)
            made.append(host)
        try:
            with ThreadPoolExecutor(len(made)) as pool:
                list(pool.map(lambda host: host.start_up(), made))
        except BaseException:
            for host in made:
                host.stop()
            raise
        return made

    def start_one(self, name: str) -> Host:
        """Starts one host."""
        return self.start(name)[0]

    @property
    def link(self) -> Link:
        """The newest serial cable."""
        return self._links[-1]

    def _make(self, name: str) -> Path:
        if self._folder is None:
            self._folder = log_folder()
        return self._folder / name

    def _name(self, kind: Kind) -> str:
        taken = {host.name for host in self.hosts}
        return next(
            name
            for name in (kind.name if n == 1 else f"{kind.name}-{n}" for n in range(1, 1000))
            if name not in taken
        )

    def stop(self) -> None:
        """Ends all hosts."""
        for host in self.hosts:
            host.stop()
        for link in self._links:
            link.close()
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._folder.rmdir()  # nothing is in it when no host failed


def prepare(wanted: Sequence[Kind], say: image.Say = image.say_nothing) -> None:
    """Makes all that hosts of these kinds need and that the cache has not: packages, kernel, image, snapshots.

    Snapshots are made side by side, as many as there are processors. Raises LabError."""
    vendors = {kind.vendor for kind in wanted}
    packages.provide(vendors, say)
    packages.kernel(say)
    image.root(say)
    if "intel" in vendors:
        bochs.disc(say)
    amd = [kind for kind in dict.fromkeys(wanted) if kind.vendor == "amd"]
    if amd:
        image.initramfs("amd", say)
        with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda kind: qemu.snapshot(kind, say), amd))
