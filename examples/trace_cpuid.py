"""Which CPUID leaves does a program read, and what does the compatibility mode answer otherwise than the processor?

The callback gets each CPUID on its vCPU's thread. The emulator calls it, or KVM with intercept="trap".
"""

from __future__ import annotations

from collections import Counter

import pyhv

reads: Counter[tuple[int, int]] = Counter()
changed: dict[tuple[int, int], pyhv.CpuidRecord] = {}


def note(record: pyhv.CpuidRecord) -> None:
    where = record.leaf, record.subleaf
    reads[where] += 1
    if record.guest != record.hardware:
        changed[where] = record


with pyhv.Machine("dispatch", compat=True, accel="emulator", on_cpuid=note) as vm:
    result = vm.run(timeout=30)
assert result.status == 0, result.message

for (leaf, subleaf), count in sorted(reads.items()):
    print(f"leaf {leaf:#x}.{subleaf:x}: read {count} times")
    if record := changed.get((leaf, subleaf)):
        for register, processor, guest in zip(("eax", "ebx", "ecx", "edx"), record.hardware, record.guest, strict=True):
            if processor != guest:
                print(f"    {register}  processor {processor:08x}  guest {guest:08x}")
