"""The rate of this machine's time stamp counter, which an emulated AMD host must be told (it cannot measure it)."""

from __future__ import annotations

import ctypes
import functools
import mmap
import time
from collections.abc import Callable

#: rdtsc; shl rdx, 32; or rax, rdx; ret
_RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")


def _pair(rdtsc: Callable[[], int]) -> tuple[int, int]:
    """The TSC and the clock (ns) at one moment: the quickest of some pairs is the one that nothing came between."""
    pairs = []
    for _ in range(50):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        ticks = rdtsc()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        pairs.append((after - before, ticks, (before + after) // 2))
    return min(pairs)[1:]


@functools.cache
def tsc_khz() -> int:
    """The TSC's rate in kHz, measured against CLOCK_MONOTONIC_RAW over 50 ms: right to some 10 ppm."""
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(_RDTSC)
        anchor = ctypes.c_char.from_buffer(page)
        rdtsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor))
        first = _pair(rdtsc)
        time.sleep(0.05)
        second = _pair(rdtsc)
        del rdtsc, anchor  # the page cannot be unmapped while something points into it
    return (second[0] - first[0]) * 1_000_000 // (second[1] - first[1])
