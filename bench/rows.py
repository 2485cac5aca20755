"""The rows. Each is one function that takes the number of pairs and returns that many samples of pyhv and its peer.

A row imports pyhv when it is measured: what does not work fails in its own row.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import peers
from bench.emulator import emulator_loop, emulator_process
from bench.measure import Goal, Pairs, Row, Skip, alternate
from bench.migration import idle, migration, migration_kept
from bench.peers import Peer
from bench.qemu import downtime_1g, downtime_256m, total_1g, total_256m
from bench.snapshots import restore, restore_4g, restore_cold, save, save_sparse, save_tmpfs

_HELLO = b"hello from a pyhv guest\n"

# ------------------------------------------------------------------------------------------------- hello, from a shell


# Python as a user has it: bytecode is cached on disk, as it is by every installation.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def _wall_ms(command: list[str], expected: bytes) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, env=ENVIRONMENT)
    took = (time.perf_counter() - start) * 1e3
    if done.returncode or done.stdout != expected:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise Skip(f"{' '.join(command)} ended with {done.returncode}" + (f": {said[-1]}" if said else ""))
    return took


def process(pairs: int) -> Pairs:
    """`pyhv run hello` as a user starts it, with its output in a pipe, against the same interpreter doing nothing."""
    peers.need_kvm()
    script = Path(sys.executable).with_name("pyhv")
    pyhv = [str(script)] if script.exists() else [sys.executable, "-m", "pyhv"]
    return alternate(
        lambda: _wall_ms([*pyhv, "run", "hello"], _HELLO),
        lambda: _wall_ms([sys.executable, "-c", "pass"], b""),
        pairs,
        warm_up=2,
    )


# -------------------------------------------------------------------------------------------- hello, inside a process


def machine(pairs: int) -> Pairs:
    """Machine("hello"): create, run, destroy, against a C program that makes the same calls on KVM."""
    peers.need_kvm()
    import pyhv

    def ours() -> float:
        start = time.perf_counter_ns()
        with pyhv.Machine("hello") as vm:
            result = vm.run(timeout=10)
        took = time.perf_counter_ns() - start
        if result.console != _HELLO:
            raise Skip(f"the guest hello ended with {result.cause}: {result.message}")
        return took / 1e6

    with pyhv.Machine("hello") as vm, peers.cpuid_file(vm.vm.vcpus[0].get_cpuid()) as cpuid:
        command: list[str | Path] = [peers.build("peer_hello"), vm.image.name, str(vm.vm.memory.size), cpuid]
        with Peer(command) as peer:
            pairs_taken = alternate(ours, lambda: peer.sample() / 1e6, pairs, warm_up=10)
        twice = "import pyhv\nfor _ in range(2):\n with pyhv.Machine('hello') as vm: vm.run()"
        return pairs_taken._replace(note=peers.compare_ioctls(twice, command))


# ----------------------------------------------------------------------------------------------------------- exits

_UNCLAIMED_PORT = 0x300
_RAM = 2 << 20


def _exits_guest(accesses: int) -> bytes:
    """A guest that accesses a port that nobody claims `accesses` times, reads and writes in turn, then ends.

    The same bytes are 32-bit and 64-bit code.
    """
    return b"".join(
        (
            b"\xb9" + struct.pack("<I", accesses // 2),  # mov ecx, accesses / 2
            b"\xba" + struct.pack("<I", _UNCLAIMED_PORT),  # mov edx, port
            b"\xec",  # again: in al, dx
            b"\xee",  # out dx, al
            b"\xff\xc9",  # dec ecx
            b"\x75\xfa",  # jnz again
            b"\xba" + struct.pack("<I", 0xF4),  # mov edx, debug exit
            b"\x31\xc0",  # xor eax, eax
            b"\xee",  # out dx, al
            b"\xf4",  # hlt
        )
    )


def _exits_by_pyhv(code: bytes, accesses: int) -> Callable[[], float]:
    """A function that runs the guest in a fresh VM by the engine's loop, with all its devices on the bus; exits/s."""
    from pyhv.accel.data import Stop
    from pyhv.accel.kvm import Kvm
    from pyhv.boot import flat, start64
    from pyhv.vm.devices import Devices
    from pyhv.vm.memory import GuestMemory

    kvm = Kvm()
    image = flat.parse(code, "exits")

    def sample() -> float:
        memory = GuestMemory(_RAM)
        devices = Devices(_RAM, 0)
        vm = kvm.create_vm(devices.bus, irqchip=False)
        vm.map(0, _RAM, memory.host_address(0))
        vcpu = vm.create_vcpu(0)
        try:
            regs, sregs = start64.load(image, memory, "", 1, vcpu.get_sregs())
            vcpu.set_sregs(sregs)
            vcpu.set_regs(regs)
            start = time.perf_counter_ns()
            exit = vcpu.run()
            took = time.perf_counter_ns() - start
            if exit.stop != Stop.GUEST_EXIT or vcpu.counters()["port_io"] != accesses + 1:
                raise Skip(f"the guest stopped with {exit.stop.name}: {exit.error}")
        finally:
            vcpu.close()
            vm.close()
            devices.close()
            memory.close()
        return (accesses + 1) / took * 1e9

    return sample


def exits(pairs: int) -> Pairs:
    """Port accesses that no device claims: the engine's run loop against a bare one."""
    peers.need_kvm()
    accesses = 2000
    code = _exits_guest(accesses)
    program = peers.build("peer_exits")
    image = peers.BUILD / "exits.bin"
    image.write_bytes(code)
    with Peer([program, image, str(_RAM)]) as peer:
        return alternate(
            _exits_by_pyhv(code, accesses), lambda: (accesses + 1) / peer.sample() * 1e9, pairs, warm_up=2
        )


def pykvm(pairs: int) -> Pairs:
    """The same guest, run by pykvm (PyPI, 2019): by ctypes and fcntl.ioctl, a call of Python for every exit."""
    peers.need_kvm()
    accesses = 2000
    code = _exits_guest(accesses)
    peers.BUILD.mkdir(exist_ok=True)
    image = peers.BUILD / "exits.bin"
    image.write_bytes(code)
    with tempfile.TemporaryDirectory(prefix="pyhv-bench-") as place:
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--target", place]
        done = subprocess.run([*command, "pykvm==1.0.6"], capture_output=True, text=True, timeout=300)
        types = Path(place, "pykvm/kvm_types.py")
        if done.returncode or not types.exists():
            raise Skip(f"pip install pykvm: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
        # It is of Python 2's time: as it stands it cannot be imported.
        types.write_text(types.read_text().replace("+ 63) / 64", "+ 63) // 64"))
        environment = ENVIRONMENT | {"PYTHONPATH": place}
        with Peer([sys.executable, peers.HERE / "peer_pykvm.py", image, str(_RAM)], environment) as peer:
            return alternate(
                _exits_by_pyhv(code, accesses), lambda: (accesses + 1) / peer.sample() * 1e9, pairs, warm_up=2
            )


# ----------------------------------------------------------------------------------------------------------- cpuid


def cpuid(pairs: int) -> Pairs:
    """One answer of cpuid.c, in C, against a search of the table as KVM makes it."""
    if not (peers.ROOT / "csrc/gen/cpuid_bits.h").exists():
        raise Skip("csrc/gen/cpuid_bits.h: not generated; run make install")
    with Peer([peers.build("peer_cpuid", "cpuid.c", "error.c")]) as peer:
        return alternate(lambda: peer.sample("answer"), lambda: peer.sample("search"), pairs)


_RATE = Goal("ratio", 0.85, at_least=True)
_LINK_RATE = Goal("ratio", 0.8, at_least=True)
_EMULATED_RATE, _EMULATED = Goal("ratio", 0.9, at_least=True), Goal("difference", 150)
_AHEAD = Goal("ratio", 1)

ROWS = (
    Row("process", "pyhv run hello, a whole process", "python3 -c pass", "ms", Goal("difference", 40), 25, process),
    Row("machine", "Machine: create, run hello, destroy", "C, same ioctls", "ms", Goal("ratio", 1.5), 300, machine),
    Row("restore", "restore() to the first exit, 64 MiB", "C, same ioctls", "ms", Goal("least", 3), 60, restore),
    Row("restore-cold", "the same, not in the page cache", "C, same ioctls", "ms", None, 30, restore_cold),
    Row("restore-4g", "the same, 4 GiB", "pyhv, 64 MiB", "ms", Goal("least difference", 3), 60, restore_4g),
    Row("save", "save() of 1 GiB of random bytes", "write, fsync", "MB/s", _RATE, 5, save),
    Row("save-tmpfs", "the same to /dev/shm", "write, fsync", "MB/s", _RATE, 5, save_tmpfs),
    Row("save-sparse", "the same, 64 MiB used of 4 GiB", "write, fsync: 64 MiB", "MB/s", _RATE, 10, save_sparse),
    Row("migration", "1 GiB over a UNIX socket", "write, read", "MB/s", _LINK_RATE, 5, migration),
    Row("migration-kept", "the same", "write, read, keep", "MB/s", None, 5, migration_kept),
    Row("idle", "downtime of an idle guest, 256 MiB", "a byte to a process and back", "ms", Goal("p99", 5), 200, idle),
    Row("live-256m", "live migration, 256 MiB used", "QEMU, TCG", "s", _AHEAD, 5, total_256m),
    Row("live-256m-downtime", "its downtime", "QEMU, TCG", "ms", _AHEAD, 5, downtime_256m),
    Row("exits", "port exits", "C, bare KVM_RUN loop", "exits/s", Goal("ratio", 0.97, at_least=True), 60, exits),
    Row("emulator", "10^8 instructions, emulator", "the bare library", "1/s", _EMULATED_RATE, 7, emulator_loop),
    Row("emulator-process", "cpuid --compat, emulator", "python3 -c pass", "ms", _EMULATED, 15, emulator_process),
    Row("cpuid", "one answer of cpuid.c", "C, linear search", "ns", Goal("value", 20), 60, cpuid),
)

# Measured where they are asked for: they need something from outside, or long.
OPTIONAL = (
    Row("live-1g", "live migration, 1 GiB used", "QEMU, TCG", "s", _AHEAD, 3, total_1g),
    Row("live-1g-downtime", "its downtime", "QEMU, TCG", "ms", _AHEAD, 3, downtime_1g),
    Row("pykvm", "port exits", "pykvm 1.0.6", "exits/s", None, 30, pykvm),
)
