"""The frames that the lab and the agent inside a host send each other: one table, the twin of guest/agent.c.

A frame is a header of 20 bytes, little-endian, and a payload:

    offset  size  field
    0       4     magic, the bytes "PyLb"
    4       1     type
    5       3     zero
    8       4     id: which command it belongs to, chosen by the lab; 0 for frames that belong to none
    12      4     length of the payload, at most MAX_PAYLOAD
    16      4     CRC-32 (zlib's) of the first 16 bytes of the header and the payload

The magic and the checksum are there because one of the two channels (the debug port of Bochs) shares its stream
with whatever the emulator itself prints: the parser looks for the next whole frame and counts what it skipped.
"""

from __future__ import annotations

import enum
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

MAGIC = b"PyLb"
MAX_PAYLOAD = 65536
_HEAD = struct.Struct("<4sB3xII")
_CRC = struct.Struct("<I")
HEADER_SIZE = _HEAD.size + _CRC.size


class Type(enum.IntEnum):
    """What a frame says. Below 64: from the lab to the agent; from 64 on: from the agent to the lab."""

    HELLO = 1  # payload: hello(); the agent sets its clock, seed and address, and answers READY
    RUN = 2  # payload: run(); starts a command under this id
    STDIN = 3  # payload: bytes for the command's standard input; empty: end of it
    STDIN_DISK = 4  # payload: stdin_disk(); as STDIN, the bytes being on the inbox drive
    KILL = 5  # payload: signal number (u32), for the command's whole process group

    READY = 64  # payload: text, what the host is
    STDOUT = 65  # payload: bytes
    STDERR = 66  # payload: bytes
    EXIT = 67  # payload: i32, the wait status as waitpid gives it; or -errno where it could not be started


class Frame(NamedTuple):
    type: int
    id: int
    payload: bytes


def encode(kind: int, ident: int = 0, payload: bytes = b"") -> bytes:
    """One frame as bytes. Raises ValueError on a payload over MAX_PAYLOAD."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a frame's payload is at most {MAX_PAYLOAD} bytes, not {len(payload)}")
    head = _HEAD.pack(MAGIC, kind, ident, len(payload))
    return head + _CRC.pack(zlib.crc32(payload, zlib.crc32(head))) + payload


class Parser:
    """Takes bytes in any portions, gives whole frames. What is no frame is skipped and counted in `skipped`."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.skipped = 0

    def feed(self, data: bytes) -> Iterator[Frame]:
        buffer = self._buffer
        buffer += data
        while True:
            start = buffer.find(MAGIC)
            if start < 0:
                # A magic may be cut in two: its beginning stays.
                keep = next((n for n in range(3, 0, -1) if buffer.endswith(MAGIC[:n])), 0)
                self._skip(len(buffer) - keep)
                return
            self._skip(start)
            if len(buffer) < HEADER_SIZE:
                return
            _, kind, ident, length = _HEAD.unpack_from(buffer)
            if length > MAX_PAYLOAD:
                self._skip(1)
                continue
            if len(buffer) < HEADER_SIZE + length:
                return
            payload = bytes(buffer[HEADER_SIZE : HEADER_SIZE + length])
            (crc,) = _CRC.unpack_from(buffer, _HEAD.size)
            if crc != zlib.crc32(payload, zlib.crc32(bytes(buffer[: _HEAD.size]))):
                self._skip(1)
                continue
            del buffer[: HEADER_SIZE + length]
            yield Frame(kind, ident, payload)

    def _skip(self, count: int) -> None:
        if count:
            del self._buffer[:count]
            self.skipped += count


def hello(time_ns: int, seed: bytes, address: int, name: str) -> bytes:
    """The payload of HELLO: the real time, 32 bytes for the random number generator (hosts restored from one
    snapshot would otherwise draw the same numbers), the host's number on the network (0: none) and its name."""
    if len(seed) != 32 or not 0 <= address <= 254:
        raise ValueError("HELLO takes a seed of 32 bytes and an address from 0 to 254")
    return struct.pack("<Q32sI", time_ns, seed, address) + name.encode() + b"\0"


def run(argv: Sequence[str], env: Mapping[str, str], cwd: str, *, stdin: bool, terminal: bool = False) -> bytes:
    """The payload of RUN: flags, the number of arguments and of environment strings, then working directory,
    arguments and environment as strings that end in NUL."""
    strings = [cwd, *argv, *(f"{key}={value}" for key, value in env.items())]
    if not argv or any("\0" in text for text in strings):
        raise ValueError("a command has at least one argument, and none of its strings holds a NUL")
    flags = (1 if stdin else 0) | (2 if terminal else 0)
    body = b"".join(text.encode("utf-8", "surrogateescape") + b"\0" for text in strings)
    return struct.pack("<III", flags, len(argv), len(env)) + body


def stdin_disk(offset: int, length: int) -> bytes:
    """The payload of STDIN_DISK: where on the inbox drive the bytes are; the offset a multiple of 4096."""
    if offset % 4096 or length <= 0:
        raise ValueError("the inbox is read from multiples of 4096 bytes, and never nothing")
    return struct.pack("<QQ", offset, length)


def exit_status(payload: bytes) -> int:
    """EXIT's payload as subprocess counts it: 0 to 255, or -N for a command that signal N ended.

    Raises OSError where the agent could not start the command."""
    status = int.from_bytes(payload, "little", signed=True)
    if status < 0:
        raise OSError(-status, os.strerror(-status))
    signal = status & 0x7F
    return -signal if signal else status >> 8 & 0xFF
