"""What the tests of the emulator share: whether it is there, and guests that KVM and it run alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyhv.accel import choose
from pyhv.errors import NotAvailable

#: A processor that this suite's KVMs, interpreting ones too, and the emulator can show: what the two are compared on.
COMMON = """
name = "common"
title = "What KVM and the emulator both have"
description = "For tests."
moving = true
[features]
common = [
    "fpu", "de", "pse", "tsc", "msr", "pae", "mce", "cx8", "apic", "sep", "mtrr", "pge", "mca", "cmov", "pat", "pse36",
    "clflush", "mmx", "fxsr", "sse", "sse2", "cx16", "hypervisor", "lahf_lm", "syscall", "nx", "lm",
]
amd = ["cr8_legacy", "mmxext"]
[limits]
max_basic_leaf = 0xB
max_extended_leaf = 0x80000008
physical_address_bits = { intel = 36, amd = 40 }
clflush_size = 64
"""


def require() -> None:
    """Skips where there is no emulator, with the reason."""
    try:
        choose.open_accelerator("emulator")
    except NotAvailable as error:
        pytest.skip(str(error))


def require_kvm() -> None:
    try:
        choose.open_accelerator("kvm")
    except NotAvailable as error:
        pytest.skip(str(error))


def common_profile(directory: Path) -> str:
    path = directory / "common.toml"
    path.write_text(COMMON)
    return str(path)
