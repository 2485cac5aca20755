"""The host is what the lab says it is: without this the other tests prove nothing."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

KVM_GET_API_VERSION = 0xAE00


def test_the_vendors_own_kvm_module_is_loaded(vendor: str) -> None:
    modules = {line.split()[0] for line in Path("/proc/modules").read_text().splitlines()}
    assert f"kvm_{vendor}" in modules


def test_dev_kvm_answers() -> None:
    descriptor = os.open("/dev/kvm", os.O_RDWR)
    try:
        assert fcntl.ioctl(descriptor, KVM_GET_API_VERSION) == 12
    finally:
        os.close(descriptor)


def test_the_processor_is_of_the_kind(kind: str) -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    # One feature that the kind has and one that its next older kin has not, where there are such.
    has, lacks = {
        "amd-opteron-g1": ("3dnow", "cx16"),
        "amd-opteron-g2": ("cx16", "popcnt"),
        "amd-opteron-g3": ("popcnt", "3dnow"),
        "amd-phenom": ("3dnow", "ssse3"),
        "amd-opteron-g4": ("avx", "fma"),
        "amd-opteron-g5": ("fma", "avx2"),
        "amd-epyc": ("avx2", "clwb"),
        "amd-epyc-rome": ("clwb", "erms"),
        "amd-epyc-milan": ("erms", "avx512f"),
        "amd-epyc-tsc": ("avx2", "clwb"),
        "intel-penryn": ("sse4_1", "sse4_2"),
        "intel-lynnfield": ("sse4_2", "avx"),
        "intel-sandybridge": ("avx", "avx2"),
        "intel-haswell": ("avx2", "avx512f"),
    }[kind]
    assert has in flags
    assert lacks not in flags


def test_the_clock_was_set_after_the_start(vendor: str) -> None:
    # A snapshot's clock stands still; the tests' files bear the time when they were put in.
    assert time.time() > Path(__file__).stat().st_mtime
    source = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource").read_text().strip()
    assert source == "tsc"
