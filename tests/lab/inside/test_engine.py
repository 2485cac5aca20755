"""The C engine's own test of KVM, with sanitizers, on a KVM that executes all that guests do."""

from __future__ import annotations

import os
import subprocess

import pytest

#: Under QEMU a hardware breakpoint never stops a nested guest: what the engine's test finds there is no fault of the
#: engine's. pyhv tries out whether they work before it relies on them.
WITHOUT_BREAKPOINTS = ("->cpuid_answered:", " logged:", " exit.stop:", " exit.rip:", "memcmp(exit.bytes, ask_twice")


@pytest.mark.skipif(os.environ.get("PYHV_LAB_VENDOR") == "intel", reason="sanitizers take too long under Bochs")
def test_the_engine_with_sanitizers() -> None:
    done = subprocess.run(
        ["/tmp/lab/engine/test_kvm"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    *lines, last = done.stdout.splitlines()
    assert done.returncode in (0, 1), done.stdout
    assert last.startswith("test_kvm: ") and " checks" in last, done.stdout
    assert [line for line in lines if not any(text in line for text in WITHOUT_BREAKPOINTS)] == []
