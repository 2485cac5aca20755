"""The thread that moves bytes between a TLS connection and a socketpair: the engine knows only descriptors."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading

from pyhv.migration import waits

# TLS records have at most 16 KiB; a few of them a turn.
_PIECE = 256 << 10


class Pump:
    """Owns a TLS connection. fd: the other end, for whoever talks over it. close() flushes and closes both."""

    def __init__(self, connection: ssl.SSLSocket) -> None:
        self._connection = connection
        self._near, self._far = socket.socketpair()
        self.fd = self._near.fileno()
        connection.setblocking(False)
        self._far.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="tls", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """What was written before is sent, if the other side takes it; closing twice is allowed."""
        with contextlib.suppress(OSError):
            self._near.shutdown(socket.SHUT_WR)
        self._thread.join(waits.TLS_END.seconds())
        self._near.close()
        if self._thread.is_alive():  # the other side takes no more
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            self._thread.join()

    def _run(self) -> None:
        try:
            self._move()
        except OSError:  # SSLError is one: the end of the connection is all that the other end must know
            pass
        finally:
            self._far.close()
            self._connection.close()

    def _move(self) -> None:
        to_peer, to_us = b"", b""
        ending = False  # our side sends no more
        while True:
            events = {self._connection.fileno(): 0, self._far.fileno(): 0}
            moved = False
            if not to_us:
                try:
                    to_us = self._connection.recv(_PIECE)
                    if not to_us:
                        return
                    moved = True
                except ssl.SSLWantReadError:
                    events[self._connection.fileno()] |= select.POLLIN
                except ssl.SSLWantWriteError:
                    events[self._connection.fileno()] |= select.POLLOUT
            if to_us:
                try:
                    to_us = to_us[self._far.send(to_us) :]
                    moved = True
                except BlockingIOError:
                    events[self._far.fileno()] |= select.POLLOUT
            if not to_peer and not ending:
                try:
                    to_peer = self._far.recv(_PIECE)
                    ending = not to_peer
                    moved = True
                except BlockingIOError:
                    events[self._far.fileno()] |= select.POLLIN
            if to_peer:
                try:
                    to_peer = to_peer[self._connection.send(to_peer) :]
                    moved = True
                except ssl.SSLWantWriteError:
                    events[self._connection.fileno()] |= select.POLLOUT
                except ssl.SSLWantReadError:
                    events[self._connection.fileno()] |= select.POLLIN
            elif ending:
                with contextlib.suppress(ssl.SSLWantReadError):
                    self._connection.unwrap()
                return
            if not moved:
                poll = select.poll()
                for descriptor, wanted in events.items():
                    if wanted:
                        poll.register(descriptor, wanted)
                poll.poll()
