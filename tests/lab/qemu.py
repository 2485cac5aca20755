"""AMD hosts: QEMU's TCG with SVM and nested paging, on a microvm, resumed from a snapshot of the booted host.

The snapshot is taken once per kind on the machine that uses it. The host's RAM is a file (sparse) that every host of
the kind maps privately: hosts start in a fraction of a second and share the pages that they do not write to.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from . import cache, clock, image, packages
from .errors import HostFailed, LabError
from .host import Host, bound_sends, logs, patience
from .kinds import Kind
from .process import Process
from .qmp import Monitor

MEMORY_MIB = 768

#: `quiet`, or a console on an emulated UART costs 12 s; nr_uarts=1, or probing three absent ones costs half a second;
#: no_timer_check, as the PIT is not wired to the I/O APIC as the check wants it. norandmaps: what the emulator has
#: translated of a program's code it can use again where the program is next loaded to the same place, which halves the
#: time that Python takes to start.
_COMMAND_LINE = (
    "console=ttyS0 quiet mitigations=off panic=-1 nokaslr norandmaps no_timer_check cryptomgr.notests "
    "random.trust_cpu=on 8250.nr_uarts=1 tsc=reliable tsc_early_khz={khz} "
    "lab_channel=virtio lab_root=/dev/vda lab_modules={modules}"
)

#: Run before the snapshot is taken: what the first test would else wait for is in the page cache then.
WARM_UP = "import _cffi_backend, argparse, ctypes, enum, json, pytest, re, socket, subprocess, tempfile, threading"

#: A snapshot is of no use where the TSC's rate differs from its own by more than this (KVM's own tolerance is 250 ppm;
#: the hosts' clocks would only run that much wrong).
_TSC_TOLERANCE = 500e-6

#: The RAM is in its file already and stays out of the state.
_IGNORE_SHARED = [{"capability": "x-ignore-shared", "state": True}]


@functools.cache
def version() -> str:
    """QEMU's version line."""
    done = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()[0]


class QemuHost(Host):
    """An AMD host. With a `snapshot` it is resumed from there, else booted with its RAM in the file `ram`."""

    def __init__(
        self, kind: Kind, name: str, folder: Path, address: int = 0, *,
        snapshot: Path | None = None, ram: Path | None = None, group: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(kind, name, folder, address)
        self._snapshot = snapshot
        self._ram = ram or (snapshot / "ram" if snapshot else None)
        self._group = group
        self._channel, self._channel_far = socket.socketpair()
        bound_sends(self._channel)
        self._qmp_near, self._qmp_far = socket.socketpair()
        self.qmp: Monitor | None = None

    def _arguments(self) -> list[str]:
        kernel, initramfs, root = packages.kernel(), image.initramfs("amd"), image.root()
        share = "off" if self._snapshot else "on"
        modules = ",".join((kernel / "amd.rest").read_text().split())
        khz = round(clock.tsc_khz() * self.kind.tsc_factor)
        arguments = [
            "qemu-system-x86_64", "-name", self.name, "-nodefaults", "-no-user-config", "-no-reboot",
            "-display", "none", "-accel", "tcg,thread=multi", "-M", "microvm,rtc=on,memory-backend=m0",
            "-cpu", self.kind.model, "-smp", "1", "-m", str(MEMORY_MIB),
            "-object", f"memory-backend-file,id=m0,size={MEMORY_MIB}M,mem-path={_escape(self._ram)},share={share}",
            "-chardev", f"file,id=console,path={_escape(self.console)}", "-serial", "chardev:console",
            "-chardev", f"socket,id=monitor,fd={self._qmp_far.fileno()}", "-mon", "chardev=monitor,mode=control",
            "-kernel", str(kernel / "vmlinux"), "-initrd", str(initramfs / "initramfs.cpio"),
            "-append", _COMMAND_LINE.format(khz=khz, modules=modules),
            "-drive", f"if=none,id=d0,file={_escape(root / 'root.squashfs')},format=raw,readonly=on,file.locking=off",
            "-device", "virtio-blk-device,drive=d0",
            "-device", "virtio-serial-device,max_ports=2",
            "-chardev", f"socket,id=agent,fd={self._channel_far.fileno()}",
            "-device", "virtserialport,chardev=agent,nr=1,name=pyhv-lab",
        ]  # fmt: skip
        if self._group:
            arguments += ["-netdev", f"socket,id=n0,mcast={self._group},localaddr=127.0.0.1"]
        else:
            # A cable to nowhere: the device must be there all the same, for the snapshot has it.
            arguments += ["-netdev", "hubport,id=n0,hubid=0"]
        arguments += ["-device", "virtio-net-device,netdev=n0,mac=52:54:00:00:00:fe"]
        return arguments

    def _launch(self) -> None:
        arguments = self._arguments()
        descriptors = [self._channel_far.fileno(), self._qmp_far.fileno()]
        with contextlib.ExitStack() as stack:
            state = None
            if self._snapshot:
                state = stack.enter_context((self._snapshot / "state").open("rb"))
                descriptors.append(state.fileno())
                arguments += ["-incoming", "defer"]
            self._process = Process(arguments, self.folder / "emulator.log", pass_fds=descriptors)
            self._channel_far.close()
            self._qmp_far.close()
            try:
                self.qmp = Monitor(self._qmp_near, 60 * patience(), LabError)
                if state:
                    self.qmp.call("migrate-set-capabilities", capabilities=_IGNORE_SHARED)
                    self.qmp.call("migrate-incoming", uri=f"fd:{state.fileno()}")
                    self.qmp.wait_migrated(60 * patience())
                    self.qmp.call("cont")
            except LabError as error:
                status = self._process.wait(1)
                raise self.fail(str(error) if status is None else f"died: QEMU exited with status {status}") from error

    def _read_channel(self) -> bytes:
        return self._channel.recv(1 << 18)

    def _write_channel(self, data: bytes) -> None:
        self._channel.sendall(data)

    def _close_channel(self) -> None:
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        for end in (self._channel, self._qmp_near, self._channel_far, self._qmp_far):
            end.close()

    def set_link(self, up: bool) -> None:
        """Plugs the host's network cable in or pulls it."""
        assert self.qmp is not None
        self.qmp.call("set_link", name="n0", up=up)

    def pause(self) -> None:
        """Stops the host's processor, as a machine that hangs; resume() lets it go on."""
        assert self.qmp is not None
        self.qmp.call("stop")

    def resume(self) -> None:
        assert self.qmp is not None
        self.qmp.call("cont")


def _escape(path: Path | None) -> str:
    """A path as QEMU's option syntax takes it: a comma is doubled."""
    return str(path).replace(",", ",,")


def snapshot(kind: Kind, say: image.Say = image.say_nothing) -> Path:
    """The folder of the snapshot of a booted host of this kind: `ram`, `state`, `facts.json`; made if need be.

    Raises HostFailed where the host does not boot."""
    inputs: Mapping[str, object] = {
        "kind": kind._asdict(),
        "qemu": version(),
        "kernel": packages.kernel(say).name,
        "initramfs": image.initramfs("amd", say).name,
        "root": image.root(say).name,
        # The way of starting and the protocol with the agent.
        "recipe": [cache.file_digest(Path(__file__).with_name(name)) for name in ("qemu.py", "wire.py")],
    }

    def accept(folder: Path) -> bool:
        rate = json.loads((folder / "facts.json").read_text())["tsc_khz"]
        return abs(clock.tsc_khz() / float(rate) - 1) < _TSC_TOLERANCE

    def build(folder: Path) -> None:
        say(f"booting {kind.name} for its snapshot")
        with logs() as log:
            host = QemuHost(kind, kind.name, log / kind.name, ram=folder / "ram")
            try:
                host.start_up(120)
                host.run(["python3", "-c", WARM_UP], timeout=120, check=True)
                _save(host, folder)
            except (LabError, OSError) as error:
                if isinstance(error, HostFailed):
                    raise
                raise host.fail(f"no snapshot could be taken: {error}") from error
            finally:
                host.stop()
        facts = {"tsc_khz": clock.tsc_khz(), "boot_seconds": round(host.start_seconds, 3)}
        (folder / "facts.json").write_text(json.dumps(facts) + "\n")

    return cache.artefact(f"snapshot-{kind.name}", inputs, build, accept=accept)


def _save(host: QemuHost, folder: Path) -> None:
    qmp = host.qmp
    assert qmp is not None
    qmp.call("stop")
    qmp.call("migrate-set-capabilities", capabilities=_IGNORE_SHARED)
    descriptor = os.open(folder / "state", os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        qmp.call("getfd", descriptors=[descriptor], fdname="state")
    finally:
        os.close(descriptor)
    qmp.call("migrate", uri="fd:state")
    qmp.wait_migrated(120 * patience())
    with contextlib.suppress(LabError):
        qmp.call("quit")
