"""Guest RAM and its place in the guest's physical address space."""

from __future__ import annotations

import os

from pyhv._native.memory import Memory
from pyhv.errors import BadInput

PAGE_SIZE = 4096

# RAM stops here and goes on at 4 GiB: in between a PC has its PCI windows, I/O APIC, LAPIC and firmware, and KVM its
# pages for real-mode code (csrc/kvm/vm.c).
LOW_RAM_LIMIT = 3 << 30
HIGH_RAM_BASE = 4 << 30


class GuestMemory:
    """`size` bytes of guest RAM (a positive multiple of 4096): from 0 up to 3 GiB, what is more from 4 GiB on.

    file: a descriptor and an offset in it, where the RAM's content stands; it is mapped privately. Without it RAM is
    zeros. anonymous: it is about to be filled (_native/memory.py). ram: what is behind it. Raises HostError when the
    host refuses.
    """

    def __init__(self, size: int, file: tuple[int, int] | None = None, anonymous: bool = False) -> None:
        self.size = size
        self.low_size = min(size, LOW_RAM_LIMIT)
        self.ram = Memory(size, file, anonymous)
        self.written: set[int] | None = None
        """Numbers of the pages that the host has written, while somebody wants to know."""
        self.regions: list[tuple[int, int, int]] = [(0, self.low_size, 0)]
        """(gpa, bytes, offset in the backing memory) of each piece."""
        if size > self.low_size:
            self.regions.append((HIGH_RAM_BASE, size - self.low_size, self.low_size))

    def host_address(self, offset: int) -> object:
        """Where the byte at `offset` of the backing memory is mapped in this process (uint8_t *)."""
        return self.ram.host + offset

    def read(self, gpa: int, size: int) -> bytes:
        """`size` bytes at `gpa`. Raises BadInput where that is not RAM, HostError where it has gone away."""
        return self.ram.read(self._offset(gpa, size), size)

    def write(self, gpa: int, data: bytes | memoryview) -> None:
        """Puts `data` at `gpa`; every write to guest RAM from the host goes through here. Raises BadInput where
        that is not RAM, HostError where it has gone away."""
        offset = self._offset(gpa, len(data))
        self.ram.write(offset, data)
        if self.written is not None and data:
            first = offset // PAGE_SIZE
            self.written.update(range(first, (offset + len(data) - 1) // PAGE_SIZE + 1))

    def is_cut_short(self) -> bool:
        """Whether somebody has shortened the file behind it, so that parts of it are gone."""
        return self.ram.of_a_file and os.fstat(self.ram.fd).st_size < self.ram.offset + self.size

    def close(self) -> None:
        self.ram.close()

    def _offset(self, gpa: int, size: int) -> int:
        for start, length, offset in self.regions:
            if start <= gpa and gpa + size <= start + length:
                return offset + gpa - start
        raise BadInput("guest memory", f"no RAM at 0x{gpa:x} to 0x{gpa + size:x}")
