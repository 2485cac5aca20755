"""One snapshot, many VMs: start a guest once, save it where it is ready, and let copies go on from there.

Each copy maps the file's memory and reads what it needs, so restoring takes milliseconds and memory is shared.
"""

from __future__ import annotations

import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyhv

COPIES = 4


def go_on(snapshot: Path) -> int:
    """The first tick that a copy prints."""
    with pyhv.Machine.restore(snapshot) as vm:
        vm.start()
        return int(vm.expect(re.compile(rb"round (\d+)\n"), timeout=30)[1])


with tempfile.TemporaryDirectory() as directory:
    snapshot = Path(directory, "ready.pyhv")
    with pyhv.Machine("ticker", append="every=5") as vm:
        vm.start()
        vm.expect(b"round 5\n", timeout=30)
        vm.save(snapshot)
    with ThreadPoolExecutor(COPIES) as pool:  # a running guest does not hold Python's lock
        ticks = list(pool.map(go_on, [snapshot] * COPIES))

print(f"{COPIES} copies went on")
assert len(set(ticks)) == 1, f"all from the same place: {ticks}"
