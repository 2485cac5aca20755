"""A migration's wire, byte by byte, written anew from csrc/pyhv.h's description: what tests look at it and lie with."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

from pyhv._native import lib
from pyhv._native.link import PAGE_SIZE

HEADER = 16  # u32 type, u32 length of the payload, u64 sum


class Frame(NamedTuple):
    """One message as it stood on the wire."""

    kind: int
    payload: bytes
    """With the content of pages."""
    raw: bytes
    """Header and payload."""


def sum_of(head: bytes, payload: bytes, before: int) -> int:
    """The sum of the message with these first 8 bytes, after one with the sum `before`."""
    # Which tests/unit/test_container.py holds to another XXH64.
    return int(lib.pyhv_xxh64(payload, len(payload), lib.pyhv_xxh64(head, len(head), before)))


class Sealer:
    """Makes the messages of one direction, each with the sum that is due."""

    def __init__(self) -> None:
        self.sum = 0

    def __call__(self, kind: int, payload: bytes = b"", length: int | None = None) -> bytes:
        """length: what the header says, where that is a lie."""
        own = len(payload) - min(content_of(kind, payload), len(payload) // PAGE_SIZE * PAGE_SIZE)
        head = struct.pack("<II", kind, own if length is None else length)
        self.sum = sum_of(head, payload[:own], self.sum)
        return head + struct.pack("<Q", self.sum) + payload


class Splitter:
    """Takes the bytes of one direction as they come, and gives its messages; checks the sums."""

    def __init__(self) -> None:
        self._rest = b""
        self._sum = 0

    def __call__(self, data: bytes) -> list[Frame]:
        self._rest += data
        frames = []
        while len(self._rest) >= HEADER:
            kind, length, found = struct.unpack_from("<IIQ", self._rest)
            if len(self._rest) < HEADER + length:
                break
            size = HEADER + length + content_of(kind, self._rest[HEADER : HEADER + length])
            if len(self._rest) < size:
                break
            raw, self._rest = self._rest[:size], self._rest[size:]
            self._sum = sum_of(raw[:8], raw[HEADER : HEADER + length], self._sum)
            assert found == self._sum, "a message without the right sum"
            frames.append(Frame(kind, raw[HEADER:], raw))
        return frames


def content_of(kind: int, payload: bytes) -> int:
    """How many bytes of content belong to a message with this payload, which it may end with: those of the pages that a
    PAGES message says it has."""
    if kind != lib.PYHV_MESSAGE_PAGES or len(payload) < 8:
        return 0
    count = min(struct.unpack_from("<I", payload)[0], len(payload) // 8 - 1)
    words = struct.unpack_from(f"<{count}Q", payload, 8)
    return PAGE_SIZE * sum(word >> 40 & 0x7FFFFF for word in words if not word >> 63)


def pages(runs: list[tuple[int, int, bool]], content: bytes = b"") -> bytes:
    """The payload of a PAGES message and its content, each page with its sum. runs: first page, how many, whether they
    are zeros."""
    words = [first | count << 40 | zero << 63 for first, count, zero in runs]
    places = range(0, len(content), PAGE_SIZE)
    sums = [lib.pyhv_xxh64(content[at : at + PAGE_SIZE], PAGE_SIZE, 0) for at in places]
    return struct.pack(f"<II{len(words) + len(sums)}Q", len(words), 0, *words, *sums) + content


class Speaker:
    """One side of a conversation, spoken by hand over a socket; it says whatever it is told to."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.seal = Sealer()
        self._split = Splitter()
        self._frames: list[Frame] = []

    def say(self, kind: int, payload: bytes = b"") -> None:
        self.sock.sendall(self.seal(kind, payload))

    def hear(self, skip: tuple[int, ...] = (1,)) -> Frame:
        """The next message that is not of these types (heartbeats). Raises EOFError where none comes any more."""
        while True:
            while self._frames:
                frame = self._frames.pop(0)
                if frame.kind not in skip:
                    return frame
            data = self.sock.recv(1 << 20)
            if not data:
                raise EOFError
            self._frames += self._split(data)
