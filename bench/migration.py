"""The rows of live migration: pages over a link between processes, against a bare socket; an idle guest's hops."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import struct
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench import peers
from bench.measure import Goal, Pairs, Skip, alternate
from bench.peers import Peer
from bench.qemu import idle_image

if TYPE_CHECKING:
    from pyhv._native.memory import Memory
    from pyhv.machine import Machine
    from pyhv.migration.transport import Address, Listener

_SIZE = 1 << 30
_MIB = 1 << 20
_END = 100  # the type of the message that says that all was sent, and of its answer


def _pairs(pairs: int, request: str) -> Pairs:
    from pyhv._native.memory import Memory

    source = Memory(_SIZE)
    try:
        for at in range(0, _SIZE, _MIB):
            source.write(at, os.urandom(_MIB))
        with Peer([peers.build("peer_socket"), str(_SIZE)]) as peer:

            def bare() -> float:
                _borrow().close()
                return _SIZE / peer.sample(request) * 1e3

            rates = alternate(lambda: _SIZE / _seconds(source) / 1e6, bare, pairs)
        return rates._replace(note="every page was compared afterwards")
    finally:
        source.close()


_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of <asm-generic/mman-common.h>, Linux 5.14


def _borrow() -> mmap.mmap:
    """As much memory as a receiver needs; close it just before. In a VM whose host takes back what is free, the first
    touch of a page is the host's work otherwise, which takes ten times as long as all that is measured here."""
    room = mmap.mmap(-1, _SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        room.madvise(mmap.MADV_DONTFORK)
        room.madvise(mmap.MADV_HUGEPAGE)
        room.madvise(_POPULATE_WRITE)
    return room


def _seconds(source: Memory) -> float:
    """From the moment when both processes are ready until the receiver has all and has said so."""
    from pyhv._native.link import Link
    from pyhv._native.memory import Memory

    room = _borrow()
    ours, theirs = socket.socketpair()
    target = Memory(_SIZE, anonymous=True)
    sender = os.fork()
    if sender == 0:
        status = 1
        try:
            ours.close()
            status = _send(source, theirs)
        finally:
            os._exit(status)
    theirs.close()
    link = None
    try:
        ours.settimeout(60)
        if ours.recv(1) != b"r":
            raise Skip("the sender has ended")
        room.close()
        start = time.perf_counter()
        link = Link(ours.fileno(), ours.fileno(), 0.1, 10)
        link.expect_pages(target)
        message = link.receive(60)
        if message is None or message[0] != _END:
            raise Skip("the pages did not come within a minute")
        link.send(_END)
        took = time.perf_counter() - start
        _compare(source, target)
        return took
    finally:
        if link:
            link.close()
        ours.close()
        target.close()
        os.kill(sender, signal.SIGKILL)
        os.waitpid(sender, 0)


def _send(source: Memory, end: socket.socket) -> int:
    """The sender's process. Its memory is mapped, as that of a VM is which has run."""
    from pyhv._native.link import Link, PageSet

    for at in range(0, _SIZE, 4096):
        source.host[at]
    link = Link(end.fileno(), end.fileno(), 0.1, 10)
    pages = PageSet(_SIZE)
    end.send(b"r")
    pages.add_content(source)
    if not link.send_pages(link.sending(source, pages, 0)):
        return 1
    link.send(_END)
    return 0 if link.receive(60) else 1


def _compare(source: Memory, target: Memory) -> None:
    """Raises Skip where a page differs."""
    from pyhv._native import ffi

    for at in range(0, _SIZE, _MIB):
        if bytes(ffi.buffer(source.host + at, _MIB)) != bytes(ffi.buffer(target.host + at, _MIB)):
            raise Skip(f"THE MEMORY DIFFERS in the MiB at {at:#x}")


def migration(pairs: int) -> Pairs:
    """1 GiB of random bytes over a UNIX socket, against a bare socket whose reader throws the bytes away."""
    return _pairs(pairs, "read")


def migration_kept(pairs: int) -> Pairs:
    """The same, against a reader that keeps what it reads, in new memory like a guest's."""
    return _pairs(pairs, "keep")


_HOP_LIMIT = 30.0  # seconds


def idle(pairs: int) -> Pairs:
    """Downtimes in ms of an idle guest of 256 MiB that two processes hand to and fro, against a byte that goes to the
    other process and comes back."""
    peers.need_kvm()
    from pyhv.machine import Machine
    from pyhv.migration import transport

    with tempfile.TemporaryDirectory(prefix="pyhv-bench-") as folder, contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(transport.Listener(transport.parse(f"unix:{folder}/{i}"))) for i in (0, 1)]
        ours, theirs = socket.socketpair()
        other = os.fork()
        if other == 0:
            try:
                ours.close()
                _other_node(theirs, listeners)
            finally:
                os._exit(1)
        theirs.close()
        ours.settimeout(_HOP_LIMIT)
        guest: Machine | None = None

        def hop() -> float:
            nonlocal guest
            if guest is not None:
                ours.send(b"take")
                downtime = _give(guest, listeners[1].address)
                guest = None
                _told(ours)
                return downtime
            ours.send(b"give")
            guest = _take(listeners[0])
            return float(struct.unpack("d", _told(ours))[0])

        def there_and_back() -> float:
            start = time.perf_counter()
            ours.send(b"echo")
            _told(ours)
            return (time.perf_counter() - start) * 1e3

        try:
            (Path(folder) / "idle").write_bytes(idle_image())
            guest = Machine(str(Path(folder) / "idle"), memory=256 * _MIB)
            guest.start()
            taken = alternate(hop, there_and_back, pairs)
        finally:
            if guest is not None:
                guest.close()
            ours.close()
            os.kill(other, signal.SIGKILL)
            os.waitpid(other, 0)
    ordered = sorted(taken.ours)
    return taken._replace(note=f"p50 {ordered[len(ordered) // 2]:.2f}, p99 {Goal('p99', 0).reached(taken):.2f} ms")


def _told(sock: socket.socket) -> bytes:
    if not (said := sock.recv(8)):
        raise Skip("the other process has ended")
    return said


def _give(guest: Machine, address: Address) -> float:
    from pyhv.migration import transport

    with transport.connect(address) as channel:
        summary = guest.depart(channel)
    guest.close()
    return summary.downtime * 1e3


def _take(listener: Listener) -> Machine:
    from pyhv.accel import choose
    from pyhv.machine import Machine
    from pyhv.migration.destination import Destination

    choose.open_accelerator().prepare()
    channel = listener.accept(_HOP_LIMIT)
    if channel is None:
        raise Skip("the guest did not come")
    guest = Machine.arrive(Destination(channel))
    guest.start()
    return guest


def _other_node(sock: socket.socket, listeners: list[Listener]) -> None:
    """The other process: does what it is told, until it is killed."""
    guest: Machine | None = None
    while what := sock.recv(4):
        if what == b"take":
            guest = _take(listeners[1])
            sock.send(b"taken")
        elif what == b"give" and guest is not None:
            sock.send(struct.pack("d", _give(guest, listeners[0].address)))
        else:
            sock.send(what)
