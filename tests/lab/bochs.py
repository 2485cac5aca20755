"""Intel hosts: Bochs with VMX, booted from a disc, kvm_intel inside.

A host's clock there counts instructions, not seconds; while the guest idles Bochs skips ahead (sync=none). Nothing that
is timed inside means anything, and limits inside are in the host's own time.

Commands come in by the third serial port, what they print goes out by port 0xe9 to Bochs' standard output (see
guest/agent.c). What is large goes in by a second disk, the inbox: the lab writes to its file and says where.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

from . import image, packages, wire
from .errors import LabError
from .host import Host, bound_sends, patience
from .kinds import Kind
from .process import Process

MEMORY_MIB = 512
#: Instructions in a second of the host's time.
IPS = 100_000_000
INBOX_CYLINDERS = 256

COMMAND_LINE = (
    "console=ttyS0,115200 quiet mitigations=off nokaslr no_timer_check tsc=reliable panic=-1 cryptomgr.notests "
    "random.trust_cpu=on 8250.nr_uarts=4 lab_channel=bochs lab_root=/dev/sda lab_modules={modules}"
)


def disc(say: image.Say = image.say_nothing) -> Path:
    """The folder with the disc that Intel hosts boot from, whatever their kind."""
    modules = ",".join((packages.kernel(say) / "intel.rest").read_text().split())
    return image.boot_disc(COMMAND_LINE.format(modules=modules), say)


class BochsHost(Host):
    """An Intel host. `link` is the TCP port of this machine where the second serial port connects to, 0: nowhere."""

    START_LIMIT = 150.0

    def __init__(self, kind: Kind, name: str, folder: Path, *, link: int = 0) -> None:
        super().__init__(kind, name, folder)
        self._link = link
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._channel: socket.socket | None = None
        self._output, self._output_far = os.pipe2(os.O_CLOEXEC)
        self._inbox_at = 0

    def _launch(self) -> None:
        boot, root = disc() / "boot.iso", image.root() / "root.squashfs"
        # Bochs locks an image by a file beside it: the link has its own.
        (self.folder / "root.disk").symlink_to(root)
        with (self.folder / "inbox.disk").open("wb") as stream:
            stream.truncate(INBOX_CYLINDERS * image.CYLINDER)
        link = f"com2: enabled=1, mode=socket-client, dev=127.0.0.1:{self._link}\n" if self._link else ""
        vga = packages.BOCHS_VGA if packages.BOCHS_VGA.exists() else packages.VGA_OTHER
        # A host that talks to another must not run away from it: `slowdown` keeps its clock behind the real one.
        sync = "slowdown" if self._link else "none"
        (self.folder / "bochsrc").write_text(
            f"""\
config_interface: textconfig
display_library: rfb, options="timeout=0"
romimage: file={packages.BOCHS_BIOS}, options=fastboot
vgaromimage: file={vga}
memory: guest={MEMORY_MIB}, host={MEMORY_MIB}
cpu: model={self.kind.model}, count=1, ips={IPS}, reset_on_triple_fault=0, ignore_bad_msrs=1
clock: sync={sync}, time0={int(time.time())}
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15
ata0-master: type=disk, mode=flat, path={self.folder}/root.disk
ata0-slave: type=disk, mode=flat, path={self.folder}/inbox.disk
ata1-master: type=cdrom, path={boot}, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={self.console}
{link}com3: enabled=1, mode=socket-client, dev=127.0.0.1:{self._listener.getsockname()[1]}
port_e9_hack: enabled=1
speaker: enabled=0
sound: waveoutdrv=dummy
log: {self.folder}/bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
"""
        )
        (self.folder / "rc").write_text("c\n")
        self._process = Process(
            ["bochs-bin", "-q", "-f", str(self.folder / "bochsrc"), "-rc", str(self.folder / "rc")],
            self.folder / "emulator.log",
            stdout=self._output_far,
        )
        os.close(self._output_far)
        self._output_far = -1
        self._listener.settimeout(0.2)
        limit = time.monotonic() + 60
        while self._channel is None:
            with contextlib.suppress(TimeoutError):
                self._channel = self._listener.accept()[0]
                bound_sends(self._channel)
            if self._process.poll() is not None or time.monotonic() > limit:
                raise self.fail("died: Bochs has not come as far as its serial ports")
        self._listener.close()

    def _greet(self, limit: float) -> None:
        # What is sent before the agent listens is lost.
        if not self._wait(lambda: self._ready > 0, limit):
            raise self.fail(f"has not booted within {limit:.0f} s")
        super()._greet(limit)

    def _read_channel(self) -> bytes:
        return os.read(self._output, 1 << 18)

    def _write_channel(self, data: bytes) -> None:
        assert self._channel is not None
        self._channel.sendall(data)

    def _send_stdin(self, ident: int, data: bytes) -> None:
        if len(data) <= 2048:
            super()._send_stdin(ident, data)
            return
        size = INBOX_CYLINDERS * image.CYLINDER
        while data:
            if self._inbox_at >= size:
                # The agent takes one frame after the other: its answer to this one means that it has read the others'.
                super()._greet(60 * patience())
                self._inbox_at = 0
            part = data[: size - self._inbox_at]
            with (self.folder / "inbox.disk").open("r+b") as stream:
                stream.seek(self._inbox_at)
                stream.write(part)
            self._send(wire.encode(wire.Type.STDIN_DISK, ident, wire.stdin_disk(self._inbox_at, len(part))))
            self._inbox_at += -(-len(part) // 4096) * 4096
            data = data[len(part) :]

    def take(self, source: str, target: Path, timeout: float = 300) -> None:
        """Copies a large file out of the host by way of the inbox's disk, from where get() would take each byte through
        a port. No other command may be given input meanwhile."""
        size = int(self.run(["stat", "-c", "%s", source], check=True).text)
        if size > INBOX_CYLINDERS * image.CYLINDER:
            raise LabError(f"{self.name}: {source} has {size} bytes, too many for the inbox's disk")
        self.run(["dd", f"if={source}", "of=/dev/sdb", "bs=1M", "conv=fsync"], timeout=timeout, check=True)
        with (self.folder / "inbox.disk").open("rb") as stream, target.open("wb") as out:
            while size and (part := stream.read(min(size, 1 << 20))):
                out.write(part)
                size -= len(part)

    def _close_channel(self) -> None:
        self._listener.close()
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.shutdown(socket.SHUT_RDWR)
            self._channel.close()
        if self._output_far >= 0:
            os.close(self._output_far)
            self._output_far = -1
