"""One host's part in what ../node.py is used for; not a test by itself.

    python3 ring.py

Does what each line of JSON on its standard input says, and answers with a line of JSON:

    {"do": "start", "profile": NAME, "pages": N}     starts a ticker
    {"do": "idle", "memory": BYTES, "used": BYTES}   starts a guest that waits, so much of its memory is full of noise
    {"do": "boot", "image": FILE, "initrd": FILE, "append": LINE, "memory": BYTES, "until": TEXT}
                                                     starts a Linux guest, and waits until it has said that
    {"do": "set_clock", "clock": NS}                 sets the host's clock
    {"do": "listen", "uri": URI}                     listens
    {"do": "receive", "lines": N}                    takes what comes there, and lets it run until it has printed
    {"do": "migrate", "uri": URI, "limits": {...}}   gives away what runs here; it runs on if it is not taken
    {"do": "end"}                                    ends what runs here, and says what became of it

The URI "relay:NAME" stands for two FIFOs, NAME.in and NAME.out, for hosts that only the lab connects. One process for
all of it: to start Python and to import pyhv takes longer on some hosts than a migration.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import termios
import time
import traceback
import zlib
from typing import Any

from generations import guest_time, prepare

import pyhv
from pyhv import guests
from pyhv.accel import choose
from pyhv.cpu.compare import MissingFeature
from pyhv.cpu.msrs import IA32_TSC
from pyhv.migration import transport
from pyhv.migration.destination import Destination
from pyhv.migration.source import Limits

SPEED = termios.B115200
NOISE_AT = 16 << 20  # behind all that a guest has
LIMIT = 600.0  # seconds that anything may take; the lab has limits of its own

TLS = transport.Tls(*(f"/tmp/lab/{name}.pem" for name in ("certificate", "key", "authority")))


class Node:
    """What the process has: a machine, or a place where it waits for one."""

    def __init__(self) -> None:
        self.machine: pyhv.Machine | None = None
        self.listener: transport.Listener | None = None

    @property
    def guest(self) -> pyhv.Machine:
        assert self.machine is not None
        return self.machine

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        return dict(getattr(self, order.pop("do"))(**order))

    def start(self, profile: str, pages: int) -> dict[str, Any]:
        memory = (2 << 20) + pages * 4096 + (1 << 20)
        self.machine = pyhv.Machine("ticker", cpu=profile, memory=memory, append=f"pages={pages} every=1")
        prepare(self.machine)
        self.machine.start()
        self.wait_for_lines(2)
        return {}

    def idle(self, memory: int, used: int) -> dict[str, Any]:
        # A bundled guest whose first instructions are others: CLI, then HLT for ever.
        with open(guests.path("hello"), "rb") as file:
            image = bytearray(file.read())
        entry, headers = struct.unpack_from("<QQ", image, 24)
        offset, _, address = struct.unpack_from("<QQQ", image, headers + 8)
        start = entry - address + offset
        image[start : start + 4] = bytes.fromhex("fa f4 ebfd")
        with open("/tmp/idle", "wb") as file:
            file.write(image)
        self.machine = pyhv.Machine("/tmp/idle", cpu="hyperv-r2", memory=memory)
        noise = os.urandom(1 << 20)
        for at in range(NOISE_AT, NOISE_AT + used, len(noise)):
            self.machine.vm.memory.write(at, noise)
        self.machine.start()
        return {}

    def boot(self, image: str, initrd: str, append: str, memory: int, until: str) -> dict[str, Any]:
        self.machine = pyhv.Machine(image, initrd=initrd, append=append, cpu="hyperv-r2", memory=memory)
        self.machine.start()
        deadline = time.monotonic() + LIMIT
        while until.encode() not in self.guest.console():
            if self.guest.vm.stopped is not None or time.monotonic() > deadline:
                raise TimeoutError(f"the guest does not say {until}: {self.guest.console()[-200:]!r}")
            time.sleep(0.05)
        return {}

    def wait_for_lines(self, count: int) -> None:
        """Until the guest has printed so many more, or ended."""
        wanted = self.guest.console().count(b"\n") + count
        deadline = time.monotonic() + LIMIT
        while self.guest.vm.stopped is None and self.guest.console().count(b"\n") < wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the guest prints nothing: {self.guest.console()[-200:]!r}")
            time.sleep(0.01)

    def set_clock(self, clock: int) -> dict[str, Any]:
        time.clock_settime_ns(time.CLOCK_REALTIME, clock)
        return {}

    def listen(self, uri: str) -> dict[str, Any]:
        self.listener = transport.Listener(address_of(uri), TLS if uri.startswith("tls:") else None)
        pyhv.Machine.prepare_arrival()  # as pyhv receive does
        return {}

    def receive(self, lines: int) -> dict[str, Any]:
        assert self.listener is not None
        with self.listener as listener:
            channel = listener.accept(LIMIT)
        assert channel is not None, "nobody came"
        destination = Destination(channel)
        try:
            machine = pyhv.Machine.arrive(destination)
        except pyhv.Incompatible as error:
            return refusal(error)
        self.machine = machine
        machine.start()
        self.wait_for_lines(lines)
        machine.pause()
        look = self.look()
        machine.start()
        return {"refused": [], "notes": machine.notes, "look": look}

    def migrate(self, uri: str, limits: dict[str, Any]) -> dict[str, Any]:
        try:
            with transport.connect(address_of(uri), TLS if uri.startswith("tls:") else None) as channel:
                summary = self.guest.depart(channel, limits=Limits(**limits))
        except pyhv.Incompatible as error:
            self.wait_for_lines(2)
            return refusal(error)
        return {"refused": [], "summary": summary._asdict()}

    def end(self) -> dict[str, Any]:
        machine = self.guest
        machine.pause()
        with machine:
            tables = repr([table.as_entries() for table in machine.vm.tables])
            answer = {
                "ended": machine.vm.stopped is not None,
                "console": machine.console().decode("ascii", "replace"),
                "look": self.look(),
                "tsc_khz": machine.choice.accelerator.describe().tsc_khz,
                "tables": zlib.crc32(tables.encode()),
                "profile": machine.guest.profile,
                "intercept": machine.choice.intercept,
            }
        self.machine = None
        return answer

    def look(self) -> dict[str, Any]:
        """The clocks of the guest, which stands, or has gone: they count on. And those of the host then, in ns."""
        before = time.time_ns(), time.monotonic_ns()
        tsc = self.guest.vm.capture().vcpus[0].msrs[IA32_TSC]
        after = time.time_ns(), time.monotonic_ns()
        real, monotonic = ((a + b) // 2 for a, b in zip(before, after, strict=True))
        return {"tsc": tsc, "time": guest_time(self.guest, tsc), "real": real, "monotonic": monotonic}


def address_of(uri: str) -> transport.Address:
    scheme, _, path = uri.partition(":")
    if scheme == "relay":
        # Open for both: nobody waits for the other end to be opened, and none ever closes.
        ends = [os.open(f"{path}.{way}", os.O_RDWR) for way in ("in", "out")]
        uri = f"fd:{ends[0]},{ends[1]}"
    if scheme == "tty":
        set_up(path)
    return transport.parse(uri, insecure=True)


def set_up(path: str) -> None:
    """Sets a serial line's speed, which pyhv leaves as it is: 9600 bits a second where nobody sets it. And lets every
    byte interrupt: when Bochs' receive FIFO is read just before its timeout, a byte is in it that never came."""
    line = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    settings = termios.tcgetattr(line)
    settings[4] = settings[5] = SPEED
    termios.tcsetattr(line, termios.TCSANOW, settings)
    os.close(line)
    with open(f"/sys/class/tty/{os.path.basename(path)}/rx_trig_bytes", "w") as trigger:
        trigger.write("1")


def refusal(error: pyhv.Incompatible) -> dict[str, Any]:
    named = [reason.name for reason in error.reasons if isinstance(reason, MissingFeature)]
    return {"refused": [str(reason) for reason in error.reasons], "named": named, "message": str(error)}


def main(node: Node) -> None:
    choose.open_accelerator().prepare()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        try:
            answer = node.obey(json.loads(line))
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(Node())
