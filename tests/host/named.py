"""VMs with a name, started and controlled by `pyhv` as a user has it."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyhv.control import client

from .cli import COMMAND, TIMEOUT, call, environment

TICKER = ("run", "ticker", "--mem", "4M", "--append", "every=1")
ECHO = ("run", "faults", "--append", "echo")


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def processes_of(base: Path) -> list[int]:
    """Every process that was started with this runtime directory."""
    return processes_with(f"XDG_RUNTIME_DIR={base}")


def processes_with(setting: str) -> list[int]:
    """Every other process that was started with this in its environment; the zombies among them are gone."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            inherited = Path(f"/proc/{entry}/environ").read_bytes()
        except OSError:
            continue
        if f"{setting}\0".encode() in inherited and int(entry) != os.getpid():
            found.append(int(entry))
    return found


def assert_nothing_left(base: Path, patience: float = 10) -> None:
    deadline = time.monotonic() + patience  # those that were told to end may be about to
    while processes_of(base) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert processes_of(base) == []
    # What is kept of those that have ended is meant to be.
    assert [path for path in base.rglob("*") if path.name != "pyhv" and path.suffix != ".ended"] == []


def ok(*words: str) -> str:
    """What a command that succeeds prints, and nothing on stderr."""
    done = call(*words)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def detach(name: str, *words: str) -> int:
    """Starts a VM in the background; its process."""
    said = ok(*words, "--name", name, "--detach")
    match = re.fullmatch(rf"{name} runs in the background, pid (\d+)\n", said)
    assert match is not None, said
    return int(match[1])


def status(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(ok("status", name, "--json"))
    return value


def console(name: str, *words: str) -> subprocess.Popen[bytes]:
    """`pyhv console` with pipes."""
    return subprocess.Popen(
        [*COMMAND, "console", name, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(), bufsize=0,
    )  # fmt: skip


def read_until(process: subprocess.Popen[bytes], text: bytes) -> bytes:
    assert process.stdout is not None
    data = b""
    while text not in data:
        assert select.select([process.stdout], [], [], TIMEOUT)[0], data
        piece = process.stdout.read(1)
        assert piece, data
        data += piece
    return data


def rounds_of(name: str) -> int:
    """The last round that the ticker told of."""
    with client.Client(name) as connection:
        connection.call("console")
        data = b""
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline:
            for answer in connection.exchange():
                data += client.jsonrpc.decode_bytes(answer.result["data"])
            time.sleep(0.01)
    found = re.findall(rb"round (\d+)\n", data)
    return int(found[-1]) if found else 0
