"""The rows of live migration: pages over a link, from one process to another, against a bare socket."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import time
from typing import TYPE_CHECKING

from bench import peers
from bench.measure import Pairs, Skip, alternate
from bench.peers import Peer

if TYPE_CHECKING:
    from pyhv._native.memory import Memory

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
                _settle()
                return _SIZE / peer.sample(request) * 1e3

            rates = alternate(lambda: _SIZE / _seconds(source) / 1e6, bare, pairs)
        return rates._replace(note="every page was compared afterwards")
    finally:
        source.close()


_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of <asm-generic/mman-common.h>, Linux 5.14


def _settle() -> None:
    """Has this machine's kernel hold memory for a receiver. In a VM whose host takes back what is free, the first touch
    of a page is the host's work otherwise, which takes ten times as long as all that is measured here."""
    with mmap.mmap(-1, _SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as room, contextlib.suppress(OSError):
        room.madvise(mmap.MADV_HUGEPAGE)
        room.madvise(_POPULATE_WRITE)


def _seconds(source: Memory) -> float:
    """From the moment when both processes are ready until the receiver has all and has said so."""
    from pyhv._native.link import Link
    from pyhv._native.memory import Memory

    _settle()
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
