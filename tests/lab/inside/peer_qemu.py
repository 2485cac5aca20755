"""QEMU's part in ../bench.py: one host's side of a migration by QEMU; not a test by itself.

    python3 peer_qemu.py MEMORY PORT                  waits for a VM at PORT
    python3 peer_qemu.py MEMORY PORT ADDRESS NOISE    starts a VM with the file NOISE in its memory, gives it to ADDRESS

Prints a line of JSON when it is ready, reads a line, and prints one when all is done: the source's has the seconds
that it took in all, those that the guest stood, and QEMU's own figures. The guest stood from the moment it stopped
at the source to the one when the news came there that it runs at the target, as for pyhv between hosts. It is a microvm
by KVM without a kernel: its firmware waits in HLT. MEMORY is in MiB; PORT + 1 is for the news.
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
NOISE_AT = 16 << 20


def give(monitor: Monitor, address: str, port: int) -> dict[str, Any]:
    with socket.create_connection((address, port + 1)) as news:
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


def main(memory: str, port: str, address: str = "", noise: str = "") -> None:
    # A host's loader is this machine's, as its QEMU is; QEMU's libraries come with it.
    command = [f"{QEMU}/bin/qemu-system-x86_64", "-L", f"{QEMU}/share", "-M", "microvm", "-accel", "kvm", "-cpu",
               "qemu64,-svm", "-m", memory, "-nodefaults", "-no-user-config", "-display", "none", "-qmp",
               f"unix:{SOCKET},server=on,wait=off"]  # fmt: skip
    if noise:
        command += ["-device", f"loader,file={noise},addr={NOISE_AT},force-raw=on"]
    else:
        command += ["-incoming", f"tcp:0.0.0.0:{port}"]
    news = socket.create_server(("", int(port) + 1))
    process = subprocess.Popen(command, env={**os.environ, "LD_LIBRARY_PATH": f"{QEMU}/lib"})
    try:
        monitor = Monitor.connect(SOCKET, 120)
        if noise:
            time.sleep(1)  # the firmware comes to its end
        print(json.dumps({"ready": True}), flush=True)
        sys.stdin.readline()
        done = give(monitor, address, int(port)) if noise else take(monitor, news)
        print(json.dumps(done), flush=True)
        sys.stdin.readline()
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
