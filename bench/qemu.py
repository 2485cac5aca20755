"""The rows of live migration beside QEMU's: the same idle guest with as much noise in its memory, over a UNIX socket.

QEMU runs by TCG, since its KVM does not start everywhere: a guest that waits in HLT has no use for either. Its guest is
a microvm without a kernel, whose firmware comes to HLT by itself; pyhv's is a bundled one whose first instructions are
CLI and HLT. Neither has the devices of a PC.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from bench import peers
from bench.measure import Pairs, Skip, alternate
from tests.lab.qmp import Monitor

_MIB = 1 << 20
_NOISE_AT = 16 * _MIB  # behind all that a guest has
_IDLE = bytes.fromhex("fa f4 ebfd")  # cli; 1: hlt; jmp 1b
_LIMIT = 120.0  # seconds


def total_256m(pairs: int) -> Pairs:
    return _row(256 * _MIB, pairs)[0]


def downtime_256m(pairs: int) -> Pairs:
    return _row(256 * _MIB, pairs)[1]


def total_1g(pairs: int) -> Pairs:
    return _row(1024 * _MIB, pairs)[0]


def downtime_1g(pairs: int) -> Pairs:
    return _row(1024 * _MIB, pairs)[1]


@functools.cache
def _row(used: int, pairs: int) -> tuple[Pairs, Pairs]:
    """Total times in s and downtimes in ms, of the same migrations. used: bytes of noise."""
    peers.need_kvm()
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        raise Skip("there is no qemu-system-x86_64 (Debian: qemu-system-x86)")
    stood: tuple[list[float], list[float]] = ([], [])

    def one(side: int) -> float:
        total, downtime = _by_pyhv(folder, used) if side == 0 else _by_qemu(program, folder, noise, used)
        stood[side].append(downtime * 1e3)
        return total

    room = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    if room < used * 5:  # the noise, and a guest on both sides of each
        raise Skip(f"/dev/shm has {room // _MIB} MiB free, {used * 5 // _MIB} are needed")
    with tempfile.TemporaryDirectory(prefix="pyhv-bench-", dir="/dev/shm") as directory:
        folder = Path(directory)
        noise = folder / "noise"
        with noise.open("wb") as file:
            for _ in range(used // _MIB):
                file.write(os.urandom(_MIB))
        (folder / "idle").write_bytes(idle_image())
        taken = alternate(lambda: one(0), lambda: one(1), pairs)
    said = f"downtime {median(stood[0][1:]):.2g} ms, QEMU's {median(stood[1][1:]):.2g}"
    return taken._replace(note=said), Pairs(stood[0][1:], stood[1][1:])


# ----------------------------------------------------------------------------------------------------------- pyhv


def idle_image() -> bytes:
    """The image of a bundled guest that waits for ever."""
    from pyhv import guests

    image = bytearray(Path(guests.path("hello")).read_bytes())
    entry, headers = struct.unpack_from("<QQ", image, 24)  # ELF64: e_entry, e_phoff; p_offset, p_vaddr
    offset, address = struct.unpack_from("<QQ", image, headers + 8)
    start = entry - address + offset
    image[start : start + len(_IDLE)] = _IDLE
    return bytes(image)


def _by_pyhv(folder: Path, used: int) -> tuple[float, float]:
    """Seconds in all and of downtime."""
    from pyhv.machine import Machine
    from pyhv.migration import transport

    uri = f"unix:{folder}/pyhv"
    with transport.Listener(transport.parse(uri)) as listener:
        target = os.fork()
        if target == 0:
            status = 1
            try:
                status = _take(listener)
            finally:
                os._exit(status)
        listener.forget()
        try:
            with Machine(str(folder / "idle"), memory=_NOISE_AT + used) as machine:
                with (folder / "noise").open("rb") as noise:
                    for at in range(_NOISE_AT, _NOISE_AT + used, _MIB):
                        machine.vm.memory.write(at, noise.read(_MIB))
                machine.start()
                summary = machine.migrate(uri)
        finally:
            os.kill(target, signal.SIGKILL)
            os.waitpid(target, 0)
            (folder / "pyhv").unlink(missing_ok=True)
    return summary.total_time, summary.downtime


def _take(listener: Any) -> int:
    from pyhv.machine import Machine
    from pyhv.migration.destination import Destination

    channel = listener.accept(_LIMIT)
    with Machine.arrive(Destination(channel)) as machine:
        machine.start()
        time.sleep(_LIMIT)  # until it is killed
    return 0


# ----------------------------------------------------------------------------------------------------------- QEMU


@contextmanager
def _qemu(program: str, folder: Path, name: str, memory: int, *more: str) -> Iterator[Monitor]:
    path = folder / name
    command = [program, "-M", "microvm", "-accel", "tcg", "-m", f"{memory // _MIB}M", "-nodefaults",
               "-no-user-config", "-display", "none", "-qmp", f"unix:{path},server=on,wait=off", *more]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    monitor = None
    try:
        monitor = Monitor.connect(str(path), _LIMIT, Skip)
        yield monitor
    finally:
        if monitor is not None:
            monitor.close()
        process.kill()
        process.wait()
        path.unlink(missing_ok=True)


def _by_qemu(program: str, folder: Path, noise: Path, used: int) -> tuple[float, float]:
    """Seconds until the target runs, and of downtime: both sides have one clock."""
    uri, memory = f"unix:{folder}/link", _NOISE_AT + used
    loader = ("-device", f"loader,file={noise},addr={_NOISE_AT},force-raw=on")
    with (
        _qemu(program, folder, "target", memory, "-incoming", uri) as target,
        _qemu(program, folder, "source", memory, *loader) as source,
    ):
        source.call("migrate-set-parameters", **{"max-bandwidth": 10**11, "downtime-limit": 50})
        time.sleep(0.5)  # the firmware comes to its end
        begin = time.time()
        source.call("migrate", uri=uri)
        end = target.wait_for("RESUME")
        return end - begin, end - source.wait_for("STOP")
