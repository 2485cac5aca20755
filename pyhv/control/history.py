"""The last of what a guest has printed, for any number of readers, each at a pace of its own."""

from __future__ import annotations

SIZE = 64 << 10


class History:
    """A stream of bytes of which the last SIZE are kept. Positions count from its first byte."""

    def __init__(self) -> None:
        self._data = bytearray()
        self.end = 0
        """The position behind the last byte."""

    @property
    def start(self) -> int:
        """The position of the first byte that is kept."""
        return max(self.end - SIZE, 0)

    def append(self, data: bytes) -> None:
        self._data += data
        self.end += len(data)
        if len(self._data) > 2 * SIZE:  # not with every byte
            del self._data[:-SIZE]

    def read(self, position: int, limit: int) -> tuple[bytes, int]:
        """At most `limit` bytes for a reader at `position`, and how many it has missed because they are gone."""
        missed = max(self.start - position, 0)
        at = len(self._data) - (self.end - position - missed)
        return bytes(self._data[at : at + limit]), missed
