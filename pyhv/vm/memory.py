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

# What KVM takes of the kernel's memory for a GiB of a slot, at once and before any page is used: an entry of 8 bytes a
# page, 2 bytes a page and 4 bytes for 2 MiB (arch/x86/kvm, kvm_alloc_memslot_metadata); 2.4 MiB were measured. Kernels
# that allocate it later take less.
_KERNEL_SHARE_OF_A_GIB = 5 << 19

# Where the control groups are, and what the files of version 2 and of version 1 are called.
_CGROUPS = "/sys/fs/cgroup"
_MY_GROUPS = "/proc/self/cgroup"
_V2, _V1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
# Version 1 says "no limit" by the largest number of whole pages.
_NO_LIMIT = 1 << 62


def check_fits(size: int, subject: str, overcommit: bool = False) -> None:
    """Raises BadInput where the host's free memory cannot hold a guest's `size` bytes of RAM: before any of it is
    mapped, since the kernel's own tables for a large guest are enough to bring a host down.

    subject: what errors call it. overcommit: count the kernel's tables only, and leave half of what is free to
    everybody else. Memory that other guests have been promised and have not touched yet counts as free.
    """
    kernel = (size * _KERNEL_SHARE_OF_A_GIB >> 30) + PAGE_SIZE
    free, where = free_memory()
    most = (free << 30) // ((1 << 30) + _KERNEL_SHARE_OF_A_GIB)
    at_all = (free // 2 << 30) // _KERNEL_SHARE_OF_A_GIB
    if size > (at_all if overcommit else most):
        needs = f"needs {_show(size)} for the guest and {_show(kernel)} for the kernel's tables of it"
        advice = f"the most is {_show(most, down=True)}, with overcommit=True {_show(at_all, down=True)}"
        raise BadInput(subject, f"{needs}, and {where} has {_show(free, down=True)} of memory free", advice)


def free_memory() -> tuple[int, str]:
    """Bytes that this process could have without swapping, and who it is that has no more: the host, or a control group
    with a limit."""
    free, where = _available(), "this host"
    for limit, usage in _limits():
        group = os.path.dirname(limit)
        most = _number(limit)
        if most is None:
            continue
        # Pages of files are given back when they are asked for.
        statistics = _statistics(f"{group}/memory.stat")
        total = "total_" if limit.endswith(_V1[0]) else ""
        files = sum(statistics.get(f"{total}{kind}_file", 0) for kind in ("active", "inactive"))
        left = max(0, most - max(0, (_number(usage) or 0) - files))
        if left < free:
            free, where = left, f"control group {group.removeprefix(_CGROUPS)}"
    return free, where


def _available() -> int:
    try:
        with open("/proc/meminfo", "rb") as file:
            return int(file.read().partition(b"MemAvailable:")[2].split(None, 1)[0]) << 10
    except OSError:  # no /proc
        return os.sysconf("SC_AVPHYS_PAGES") * PAGE_SIZE


_found_limits: list[tuple[str, str]] | None = None


def _limits() -> list[tuple[str, str]]:
    """(file of the limit, file of the usage) of each control group around this process that has a limit. They are
    looked for once: a process seldom gets another group, and the files cost more than the rest."""
    global _found_limits
    if _found_limits is None:
        try:
            with open(_MY_GROUPS, encoding="utf-8", errors="surrogateescape") as file:
                groups = [line.rstrip("\n").split(":", 2) for line in file]
        except OSError:
            groups = []
        found = []
        for number, controllers, path in groups:
            if number == "0":
                base, names = _CGROUPS, _V2
            elif "memory" in controllers.split(","):
                base, names = f"{_CGROUPS}/memory", _V1
            else:
                continue
            # In a container the path may begin outside of what is mounted: those levels are not there to be read.
            parts = [part for part in path.split("/") if part]
            for depth in range(len(parts), -1, -1):
                limit, usage = (os.path.join(base, *parts[:depth], name) for name in names)
                if _number(limit) is not None:
                    found.append((limit, usage))
        _found_limits = found
    return _found_limits


def _number(path: str) -> int | None:
    """The number in a control group's file; None: there is no such file, or no limit in it."""
    try:
        with open(path, "rb") as file:
            text = file.read().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT else None


def _statistics(path: str) -> dict[str, int]:
    try:
        with open(path, encoding="ascii") as file:
            pairs = [line.split() for line in file]
    except OSError:
        return {}
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}


def _show(size: int, down: bool = False) -> str:
    """A number of bytes in a unit that --mem takes too, rounded up, or down."""
    for suffix, unit in (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20)):
        if size >= 10 * unit or suffix == "M" or (size >= unit and size % unit == 0):
            return f"{size // unit if down else -(-size // unit)}{suffix}"
    raise AssertionError


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

    def file(self) -> str:
        """The name of the file behind it, as the kernel knows it."""
        return os.readlink(f"/proc/self/fd/{self.ram.fd}")

    def close(self) -> None:
        """No VM may use it any more, and nobody can read or write it."""
        self.regions = []
        self.ram.close()

    def _offset(self, gpa: int, size: int) -> int:
        for start, length, offset in self.regions:
            if start <= gpa and gpa + size <= start + length:
                return offset + gpa - start
        raise BadInput("guest memory", f"no RAM at 0x{gpa:x} to 0x{gpa + size:x}")
