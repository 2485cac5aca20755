"""The rows of live migration: pages over a link, from one process to another, against a bare socket."""

from __future__ import annotations

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
            rates = alternate(
                lambda: _SIZE / _seconds(source) / 1e6, lambda: _SIZE / peer.sample(request) * 1e3, pairs
            )
        return rates._replace(note="every page was compared afterwards")
    finally:
        source.close()


def _seconds(source: Memory) -> float:
    """From the moment when both processes are ready until the receiver has all and has said so."""
    from pyhv._native.link import Link
    from pyhv._native.memory import Memory

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


def migration_stored(pairs: int) -> Pairs:
    """The same, against a reader that puts what it reads into new shared memory, as a guest's must be."""
    return _pairs(pairs, "store")
