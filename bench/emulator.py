"""The emulator's rows. Its figures stand apart from KVM's: none of them says anything about the other."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from bench import peers
from bench.measure import Pairs, Skip, alternate
from bench.peers import Peer

_ROUNDS = 50_000_000  # of two instructions
_CODE = bytes.fromhex("ffc9 75fc f4")  # again: dec ecx; jnz again; hlt


def _need_emulator() -> str:
    """The library's path. Raises Skip."""
    from pyhv.accel import choose, emulator
    from pyhv.errors import NotAvailable

    try:
        choose.open_accelerator("emulator")
    except NotAvailable as error:
        raise Skip(str(error)) from None
    return emulator.find_library()


def emulator_process(pairs: int) -> Pairs:
    """`pyhv run cpuid --compat` as a user starts it, on the emulator, against the same interpreter doing nothing."""
    from bench.rows import ENVIRONMENT

    _need_emulator()
    script = Path(sys.executable).with_name("pyhv")
    pyhv = [str(script)] if script.exists() else [sys.executable, "-m", "pyhv"]

    def wall_ms(command: list[str]) -> float:
        start = time.perf_counter()
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, env=ENVIRONMENT)
        if done.returncode:
            raise Skip(f"{' '.join(command)} ended with {done.returncode}")
        return (time.perf_counter() - start) * 1e3

    return alternate(
        lambda: wall_ms([*pyhv, "run", "cpuid", "--compat", "--accel", "emulator"]),
        lambda: wall_ms([sys.executable, "-c", "pass"]),
        pairs,
        warm_up=2,
    )


def emulator_loop(pairs: int) -> Pairs:
    """10^8 instructions of a loop, in a vCPU with all its callbacks, against the bare library in C; instructions/s."""
    library = _need_emulator()
    from pyhv._native.memory import Memory
    from pyhv.accel import choose, long_mode, probe
    from pyhv.accel.data import Regs, Stop

    entry, size = 0x6000, 0x10000
    memory = Memory(size)
    vm = choose.open_accelerator("emulator").create_vm(irqchip=False)
    vm.map(0, size, memory.host)
    vcpu = vm.create_vcpu(0)
    vcpu.set_cpuid(probe.least_table())
    rights = long_mode.PRESENT | long_mode.WRITABLE
    tables = {0x1000: 0x2000 | rights, 0x2000: 0x3000 | rights, 0x3000: rights | long_mode.LARGE_PAGE}
    for place, value in tables.items():
        memory.write(place, value.to_bytes(8, "little"))
    memory.write(0x4000, long_mode.gdt(0x4100))
    memory.write(entry, _CODE)
    vcpu.set_sregs(long_mode.sregs(vcpu.get_sregs(), 0x1000, 0x4000, 0x4100))

    def ours() -> float:
        vcpu.set_regs(Regs(rip=entry, rcx=_ROUNDS))
        start = time.perf_counter()
        stop = vcpu.run().stop
        took = time.perf_counter() - start
        if stop != Stop.HALTED:
            raise Skip(f"the guest stopped with {stop.name}")
        return 2 * _ROUNDS / took

    try:
        with Peer([peers.build("peer_emulator"), library]) as peer:
            return alternate(ours, lambda: 2 * _ROUNDS / peer.sample() * 1e9, pairs)
    finally:
        vcpu.close()
        vm.close()
        memory.close()
