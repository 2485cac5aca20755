"""QEMU's part in ../bench.py: one host's side of a migration by QEMU; not a test by itself.

    python3 peer_qemu.py '{"memory": 128, "port": PORT, ...}'

The object says what there is to do: `memory`: MiB; `port`: where the VM is taken; port + 1 is for the news that it
runs. With `address`, the VM is started here and given to that host; without, it is waited for. What the VM is, the same
on both sides: with `noise`, a file for its memory, no kernel: its firmware waits in HLT; or `kernel`, `initrd` and
`append`, of a guest that says "bench: up" on its console.

Prints a line of JSON when it is ready, reads a line, and prints one when all is done: the source's has the seconds
that it took in all, those that the guest stood, and QEMU's own figures. The guest stood from the moment it stopped
at the source to the one when the news came there that it runs at the target, as for pyhv between hosts. It is a microvm
by KVM.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

from qmp import Monitor

QEMU = "/tmp/qemu"
SOCKET = f"{QEMU}/monitor"
CONSOLE = f"{QEMU}/console"
NOISE_AT = 16 << 20
LIMIT = 120.0  # seconds


def command_line(order: dict[str, Any]) -> list[str]:
    # A host's loader is this machine's, as its QEMU is; QEMU's libraries come with it.
    command = [f"{QEMU}/bin/qemu-system-x86_64", "-L", f"{QEMU}/share", "-accel", "kvm", "-m", str(order["memory"]),
               "-nodefaults", "-no-user-config", "-display", "none", "-qmp",
               f"unix:{SOCKET},server=on,wait=off"]  # fmt: skip
    leaves = "address" in order
    if "kernel" in order:
        # Without an RTC Linux probes for it for seconds. The model is one that every host of the lab can give.
        command += ["-M", "microvm,rtc=on", "-cpu", "Opteron_G1,-vme", "-kernel", order["kernel"]]
        command += ["-initrd", order["initrd"], "-append", order["append"]]
        command += ["-serial", f"file:{CONSOLE}" if leaves else "null"]
    else:
        command += ["-M", "microvm", "-cpu", "qemu64,-svm"]
        if leaves:
            command += ["-device", f"loader,file={order['noise']},addr={NOISE_AT},force-raw=on"]
    if not leaves:
        command += ["-incoming", f"tcp:0.0.0.0:{order['port']}"]
    return command


def wait_until_idle(order: dict[str, Any]) -> None:
    """Until the guest is where it is to be moved from."""
    if "kernel" not in order:
        time.sleep(1)  # the firmware comes to its end
        return
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if os.path.exists(CONSOLE):
            with open(CONSOLE, "rb") as console:
                if b"bench: up" in console.read():
                    return
        time.sleep(0.05)
    raise TimeoutError("the guest does not come up")


def give(monitor: Monitor, address: str, port: int) -> dict[str, Any]:
    with socket.create_connection((address, port + 1)) as news:
        # No limit on the bandwidth, and pyhv's own on the downtime.
        monitor.call("migrate-set-parameters", **{"max-bandwidth": 10**10, "downtime-limit": 50})
        begin = time.time()
        monitor.call("migrate", uri=f"tcp:{address}:{port}")
        news.recv(1)
        end = time.time()
        stood = end - monitor.wait_for("STOP")
    return {"total": end - begin, "downtime": stood, "qemu": monitor.call("query-migrate")}


def take(monitor: Monitor, news: socket.socket) -> dict[str, Any]:
    connection = news.accept()[0]
    monitor.wait_for("RESUME")
    connection.sendall(b".")
    connection.close()
    return {}


def main(order: dict[str, Any]) -> None:
    news = socket.create_server(("", order["port"] + 1))
    process = subprocess.Popen(command_line(order), env={**os.environ, "LD_LIBRARY_PATH": f"{QEMU}/lib"})
    try:
        monitor = Monitor.connect(SOCKET, LIMIT)
        if "address" in order:
            wait_until_idle(order)
        print(json.dumps({"ready": True}), flush=True)
        sys.stdin.readline()
        done = give(monitor, order["address"], order["port"]) if "address" in order else take(monitor, news)
        print(json.dumps(done), flush=True)
        sys.stdin.readline()
    finally:
        process.kill()
        process.wait()
        for path in (SOCKET, CONSOLE):
            if os.path.exists(path):
                os.unlink(path)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
