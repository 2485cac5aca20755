"""One host's part in ../outside/test_linux_ride.py; not a test by itself.

    python3 linux_ride.py

As ring.py, with a Linux guest (../guest/ride.c) instead of a ticker. The orders that are others than there:

    {"do": "start", "word": W, "image": PATH, ...}   boots one, and lets it set its time by its RTC
    {"do": "stay", "word": W}                        lets it go on until its timers have fired, and asks it
    {"do": "set", "word": W}                         lets it set its time, and asks it
    {"do": "receive", "word": W, "plant": BOOL}      takes what comes, and asks it; with a clock that was set back
    {"do": "save", "path": P}                        saves what runs here to P, packed
    {"do": "restore", "word": W, "path": P}          restores that, and asks it
    {"do": "off"}                                    lets it switch itself off, and says how the run ended

To ask is to type "ask W"; the answer has the guest's line, and what the clocks showed here before and after it.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from typing import Any

import ring

import pyhv
from pyhv.accel.state import RawState
from pyhv.migration.destination import Destination
from pyhv.vm.vm import Vm

#: By how much the planted clock is set back.
BACK = 3 * 10**9
_EXTENT = struct.Struct("<QQ")  # offset and size of what follows


def clocks() -> list[int]:
    return [time.time_ns(), time.monotonic_ns()]


class Rider(ring.Node):
    """What the process has."""

    def __init__(self) -> None:
        super().__init__()
        self._read = 0
        self._line, self._keyboard = os.pipe()

    def _type(self, text: str) -> None:
        os.write(self._keyboard, text.encode())

    def _wait_for(self, word: str, count: int = 1) -> str:
        """The line in which the guest has said something that begins with this word, the count-th from now on."""
        deadline = time.monotonic() + ring.LIMIT
        while True:
            *lines, _ = self.guest.console()[self._read :].split(b"\n")
            for line in lines:
                self._read += len(line) + 1
                text = line.decode("ascii", "replace").strip()
                if text.startswith("ride: ") and f"{text.split(' ', 2)[-1]} ".startswith(f"{word} "):
                    count -= 1
                    if count == 0:
                        return text
            if self.guest.vm.stopped is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no {word!r} from the guest: {self.guest.console()[-4000:].decode()}")
            time.sleep(0.01)

    def _ask(self, word: str) -> dict[str, Any]:
        before = clocks()
        self._type(f"ask {word}\n")
        line = self._wait_for(f"answer {word}")
        return {"line": line, "before": before, "after": clocks()}

    def start(self, word: str, image: str, profile: str, memory: str, cpus: int, append: str) -> dict[str, Any]:  # type: ignore[override]
        self.machine = pyhv.Machine(
            image, initrd=f"{os.path.dirname(image)}/initrd", cpu=profile, memory=memory, cpus=cpus, append=append,
            console_in=self._line,
        )  # fmt: skip
        self.machine.start()
        self._wait_for("ready")
        return self.set(word)

    def set(self, word: str) -> dict[str, Any]:
        self._type("set\n")
        self._wait_for("set")
        return self._ask(word)

    def stay(self, word: str) -> dict[str, Any]:
        # Two of each: the second was armed after the move.
        self._wait_for("timer realtime", 2)
        return self._ask(word)

    def receive(self, word: str, plant: bool = False) -> dict[str, Any]:  # type: ignore[override]
        assert self.listener is not None
        with self.listener as listener:
            channel = listener.accept(ring.LIMIT)
        assert channel is not None, "nobody came"
        apply = Vm.apply_raw
        if plant:
            Vm.apply_raw = _set_back  # type: ignore[method-assign]
        try:
            machine = pyhv.Machine.arrive(Destination(channel), console_in=self._line)
        finally:
            Vm.apply_raw = apply  # type: ignore[method-assign]
        return {"refused": [], **self._begin(machine, word)}

    def _begin(self, machine: pyhv.Machine, word: str) -> dict[str, Any]:
        self.machine, self._read = machine, 0
        began = clocks()
        machine.start()
        return {**self._ask(word), "began": began}

    def save(self, path: str) -> dict[str, Any]:
        self.guest.pause()
        stood = clocks()
        self.guest.save("/tmp/saved")
        with open("/tmp/saved", "rb") as saved, open(path, "wb") as packed:
            end, at = os.fstat(saved.fileno()).st_size, 0
            while True:
                try:
                    at = os.lseek(saved.fileno(), at, os.SEEK_DATA)
                except OSError:
                    break
                hole = os.lseek(saved.fileno(), at, os.SEEK_HOLE)
                saved.seek(at)
                packed.write(_EXTENT.pack(at, hole - at))
                packed.write(saved.read(hole - at))
                at = hole
            packed.write(_EXTENT.pack(end, 0))
        os.unlink("/tmp/saved")
        return {"stood": stood, "size": os.path.getsize(path)}

    def restore(self, word: str, path: str) -> dict[str, Any]:
        with open(path, "rb") as packed, open("/tmp/restored", "wb") as saved:
            size = 1
            while size:
                at, size = _EXTENT.unpack(packed.read(_EXTENT.size))
                saved.seek(at)
                saved.write(packed.read(size))
            saved.truncate(at)
        os.unlink(path)
        machine = pyhv.Machine.restore("/tmp/restored", console_in=self._line)
        os.unlink("/tmp/restored")
        return self._begin(machine, word)

    def off(self) -> dict[str, Any]:
        self._type("off\n")
        result = self.guest.result(self.guest.vm.wait(ring.LIMIT))
        return {"cause": result.cause, "status": result.status, "message": result.message}

    def end(self) -> dict[str, Any]:
        machine = self.guest
        machine.pause()
        with machine:
            self.machine = None
            return {
                "console": machine.console().decode("ascii", "replace"),
                "tables": zlib.crc32(repr([table.as_entries() for table in machine.vm.tables]).encode()),
                "profile": machine.guest.profile,
                "intercept": machine.choice.intercept,
                "notes": machine.notes,
            }


def _set_back(vm: Vm, state: RawState, elapsed: int = 0, apply: Any = Vm.apply_raw) -> None:
    # A rehearsal's state has hardly begun to count.
    apply(vm, state._replace(clock=max(state.clock - BACK, 0)), elapsed)


if __name__ == "__main__":
    ring.main(Rider())
