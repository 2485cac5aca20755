"""The rows of save and restore."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from bench import peers
from bench.measure import Pairs, Skip, alternate
from bench.peers import Peer

_MIB = 1 << 20
_PAGE = 4096

# ------------------------------------------------------------------------------------------------------------ save


@contextmanager
def _machine(memory: int, used: int) -> Iterator[Any]:
    """A machine with `used` bytes of random content in pieces of 1 MiB, evenly spread over its memory."""
    import pyhv

    with pyhv.Machine("hello", memory=memory) as machine:
        for gpa in _places(machine, used):
            machine.vm.memory.write(gpa, os.urandom(_MIB))
        yield machine


def _places(machine: Any, used: int) -> list[int]:
    """Where the pieces are: not in the first 2 MiB, where guests are loaded, unless all is used."""
    memory = machine.vm.memory
    pieces, room = used // _MIB, memory.size // _MIB
    first = 0 if pieces == room else 2
    gpas = []
    for piece in range(pieces):
        at = (first + piece * (room - first) // pieces) * _MIB
        start, _, offset = next(region for region in reversed(memory.regions) if at >= region[2])
        gpas.append(start + at - offset)
    return gpas


def _need_room(place: Path, files: int, ram: int) -> None:
    """Raises Skip where there is not this much room for files in `place`, or not this much memory."""
    room = os.statvfs(place)
    if room.f_bavail * room.f_frsize < files:
        raise Skip(f"{place} has no room for {files >> 20} MiB")
    with open("/proc/meminfo", encoding="ascii") as info:
        available = next(int(line.split()[1]) << 10 for line in info if line.startswith("MemAvailable"))
    if available < ram:
        raise Skip(f"{ram >> 20} MiB of memory are not available")


def _file_system(place: Path) -> str:
    """The type of the file system, from the longest mount point that holds the place."""
    best, kind = "", "unknown"
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        for line in mounts:
            point, fs = line.split()[1:3]
            if len(point) >= len(best) and Path(point) in (place, *place.parents):
                best, kind = point, fs
    return kind


def _save_and_write(machine: Any, used: int, place: Path, pairs: int) -> tuple[Pairs, int]:
    """Seconds for Machine.save() and for a plain write of `used` bytes of the same memory (all of it, where all is
    used), and the bytes that the saved file takes on the disk. The last saved file is verified."""
    from pyhv._native import ffi
    from pyhv.snapshot import file

    saved, written = str(place / "saved.pyhv"), str(place / "written")
    memory = machine.vm.memory
    if used == memory.size:
        plain = memoryview(ffi.buffer(memory.ram.host, used))
    else:
        plain = memoryview(b"".join(memory.read(gpa, _MIB) for gpa in _places(machine, used)))
    on_disk = 0

    def ours() -> float:
        nonlocal on_disk
        Path(saved).unlink(missing_ok=True)
        start = time.perf_counter()
        machine.save(saved)
        took = time.perf_counter() - start
        on_disk = os.stat(saved).st_blocks * 512
        return took

    def peer() -> float:
        Path(written).unlink(missing_ok=True)
        start = time.perf_counter()
        fd = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            at = 0
            while at < len(plain):
                at += os.write(fd, plain[at:])
            os.fsync(fd)
        finally:
            os.close(fd)
        return time.perf_counter() - start

    taken = alternate(ours, peer, pairs)
    with file.open_snapshot(saved) as snapshot:
        snapshot.reader.verify()
    return taken, on_disk


def _save_full(place: Path, pairs: int) -> Pairs:
    """The rates for 1 GiB, in a directory on the file system in question."""
    peers.need_kvm()
    size = 1 << 30
    with tempfile.TemporaryDirectory(prefix="pyhv-bench-", dir=place) as directory:
        on_tmpfs = (kind := _file_system(place)) in ("tmpfs", "ramfs")
        _need_room(place, 3 * size, size * (5 if on_tmpfs else 2))
        with _machine(size, size) as machine:
            seconds, _ = _save_and_write(machine, size, Path(directory), pairs)
    return _rates(seconds, size, f"{kind}; the last file was verified")


def _rates(seconds: Pairs, size: int, note: str) -> Pairs:
    """MB/s."""
    return Pairs(*([size / 1e6 / s for s in samples] for samples in (seconds.ours, seconds.peer)), note=note)


def save(pairs: int) -> Pairs:
    """1 GiB of random bytes, on the file system of the checkout."""
    peers.BUILD.mkdir(exist_ok=True)
    return _save_full(peers.BUILD, pairs)


def save_tmpfs(pairs: int) -> Pairs:
    """The same where no disk waits: the processor's work alone."""
    place = Path("/dev/shm")
    if not place.is_dir() or _file_system(place) != "tmpfs":
        raise Skip("/dev/shm is no tmpfs")
    return _save_full(place, pairs)


def save_sparse(pairs: int) -> Pairs:
    """4 GiB of which 64 MiB are used, against a plain write of these 64 MiB."""
    peers.need_kvm()
    peers.BUILD.mkdir(exist_ok=True)
    size, used = 4 << 30, 64 * _MIB
    with tempfile.TemporaryDirectory(prefix="pyhv-bench-", dir=peers.BUILD) as directory:
        _need_room(peers.BUILD, 4 * used, 4 * used)
        with _machine(size, used) as machine:
            seconds, on_disk = _save_and_write(machine, used, Path(directory), pairs)
    note = f"{_file_system(peers.BUILD)}; the file takes {on_disk / _MIB:.1f} MiB on the disk and was verified"
    return _rates(seconds, used, note)


# --------------------------------------------------------------------------------------------------------- restore


class _Saved(NamedTuple):
    """A snapshot of a guest in front of its first instruction, which reads one byte and ends with it."""

    path: str
    status: int
    """That byte."""
    content: list[tuple[int, bytes]]
    """What the memory holds, (gpa, bytes): all of a small one, of a large one all that is used and a page behind it."""


_CHECKED_WHOLE = 64 * _MIB
# The processor marks the entries of page tables that it has used (SDM Vol. 3, "Accessed and Dirty Flags"): bits 5 and 6
# of the entries in the start state's tables, 0x2000 to 0x7fff (guest_images/README.md).
_TABLES = slice(0x2000, 0x8000)
_NO_MARKS = int.from_bytes((~0x60 & (1 << 64) - 1).to_bytes(8, "little") * (0x6000 // 8), "little")


def _save_guest(path: Path, size: int) -> _Saved:
    """Saves a guest with `size` bytes of memory, 60 MiB of them random."""
    used = 60 * _MIB
    status = 0x2A
    with _machine(size, used) as machine:
        memory = machine.vm.memory
        places = _places(machine, used)
        read_at = places[-1] if size <= 1 << 30 else places[len(places) // 4]  # in the first 2 GiB: a 32-bit address
        memory.write(read_at, bytes((status,)))
        code = b"\x8a\x04\x25" + read_at.to_bytes(4, "little")  # mov al, [read_at]
        code += b"\xe6\xf4\xf4"  # out 0xf4, al; hlt
        memory.write(machine.vm.vcpus[0].get_regs().rip, code)
        content = [(0, memory.read(0, min(size, _CHECKED_WHOLE)))]
        if size > _CHECKED_WHOLE:
            content += [(gpa, memory.read(gpa, _MIB + _PAGE)) for gpa in places if gpa >= _CHECKED_WHOLE]
        machine.save(str(path))
    return _Saved(str(path), status, content)


def _restore_ms(saved: _Saved, check: bool) -> float:
    """From the call of Machine.restore() until run() tells of the guest's first exit."""
    import pyhv

    start = time.perf_counter_ns()
    machine = pyhv.Machine.restore(saved.path)
    try:
        result = machine.run(timeout=10)
        took = time.perf_counter_ns() - start
        if (result.cause, result.status) != ("guest-exit", saved.status):
            raise Skip(f"the restored guest ended with {result.cause}, status {result.status}: {result.message}")
        if check:
            _check_memory(machine.vm.memory, saved)
    finally:
        machine.close()
    return took / 1e6


def _check_memory(memory: Any, saved: _Saved) -> None:
    for gpa, expected in saved.content:
        found = memory.read(gpa, len(expected))
        if gpa == 0:
            found, expected = _without_marks(found), _without_marks(expected)
        if found != expected:
            raise Skip(f"THE RESTORED MEMORY IS WRONG somewhere from {gpa:#x} on")


def _without_marks(first_pages: bytes) -> bytes:
    tables = int.from_bytes(first_pages[_TABLES], "little") & _NO_MARKS
    size = _TABLES.stop - _TABLES.start
    return first_pages[: _TABLES.start] + tables.to_bytes(size, "little") + first_pages[_TABLES.stop :]


def _evict(path: str) -> None:
    """Drops the file from the page cache. Raises Skip where that does not work."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            if os.preadv(fd, [bytearray(_PAGE)], 0, os.RWF_NOWAIT):  # EAGAIN: it would have to be read from the disk
                raise Skip("the file cannot be dropped from the page cache (posix_fadvise)")
        except BlockingIOError:
            pass
        except OSError as error:
            raise Skip(f"whether the file is in the page cache cannot be found out: {error.strerror}") from None
    finally:
        os.close(fd)


@contextmanager
def _c_peer(saved: _Saved) -> Iterator[tuple[Peer, list[str | Path]]]:
    """peer_restore on this snapshot, and its command."""
    from pyhv.cpu import msrs
    from pyhv.snapshot import file

    program = peers.build("peer_restore")
    with file.open_snapshot(saved.path) as snapshot:
        vcpu, table = snapshot.state.vcpus[0], snapshot.tables[0]
        offset, size = snapshot.reader.memory_offset, snapshot.reader.memory_size
    numbers = [number for number in vcpu.msrs if number not in (msrs.IA32_TSC, msrs.IA32_TSC_DEADLINE)]
    with peers.cpuid_file(table) as cpuid, tempfile.NamedTemporaryFile("w", suffix=".msrs") as list_of_msrs:
        list_of_msrs.write("".join(f"{number:x}\n" for number in numbers))
        list_of_msrs.flush()
        command: list[str | Path] = [program, saved.path, str(offset), str(size), str(vcpu.regs.rip), str(saved.status)]
        command += [cpuid, list_of_msrs.name]
        with Peer(command) as peer:
            yield peer, command


def _restore(pairs: int, prepare: Callable[[str], None]) -> Pairs:
    """64 MiB. prepare: is called with the file's path before each sample."""
    peers.need_kvm()
    peers.BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pyhv-bench-", dir=peers.BUILD) as directory:
        saved = _save_guest(Path(directory, "64m.pyhv"), 64 * _MIB)
        with _c_peer(saved) as (peer, command):

            def ours() -> float:
                prepare(saved.path)
                return _restore_ms(saved, check=True)

            def theirs() -> float:
                prepare(saved.path)
                return peer.sample() / 1e6

            taken = alternate(ours, theirs, pairs, warm_up=5)
            script = f"import pyhv\nfor _ in range(2):\n with pyhv.Machine.restore({saved.path!r}) as vm: vm.run(10)"
            note = f"least of {len(taken.peer)}: {min(taken.ours):.2f} ms, peer {min(taken.peer):.2f} ms"
            note += f"; memory compared after each; {peers.compare_ioctls(script, command)}"
            return taken._replace(note=note)


def restore(pairs: int) -> Pairs:
    """With the file in the page cache."""
    return _restore(pairs, lambda path: None)


def restore_cold(pairs: int) -> Pairs:
    """With the file on the disk only."""
    return _restore(pairs, _evict)


def restore_4g(pairs: int) -> Pairs:
    """A guest of 4 GiB against one of 64 MiB with the same content; what the kernel alone takes more is in the note."""
    peers.need_kvm()
    peers.BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pyhv-bench-", dir=peers.BUILD) as directory, ExitStack() as stack:
        large = _save_guest(Path(directory, "4g.pyhv"), 4 << 30)
        small = _save_guest(Path(directory, "64m.pyhv"), 64 * _MIB)
        c_large, c_small = (stack.enter_context(_c_peer(saved))[0] for saved in (large, small))
        c: tuple[list[float], list[float]] = ([], [])

        def ours() -> float:
            c[0].append(c_large.sample() / 1e6)
            c[1].append(c_small.sample() / 1e6)
            return _restore_ms(large, check=not len(c[0]) % 10)

        taken = alternate(ours, lambda: _restore_ms(small, check=False), pairs, warm_up=5)
        more = median([a - b for a, b in zip(*c, strict=True)])
        note = f"least {min(taken.ours):.2f} and {min(taken.peer):.2f} ms; the same ioctls in C: least "
        note += f"{min(c[0]):.2f} and {min(c[1]):.2f} ms, median +{more:.2f} ms; memory compared after every tenth"
        return taken._replace(note=note)
