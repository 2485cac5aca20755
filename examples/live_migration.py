"""Move a running VM to another process, and see how long its guest stood still.

Between two hosts the command line does this: `pyhv migrate NAME ssh://host`. Both sides of it are shown here.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import pyhv


def destination(uri: str, pipe: Connection) -> None:
    """Waits for the VM, and runs it until its guest has ended."""
    with pyhv.Machine.receive(uri, on_listening=pipe.send, timeout=60) as vm:
        result = vm.run(timeout=60)
    pipe.send((result.cause, result.status, result.console.decode()))


def main() -> None:
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:  # only its owner may enter: nobody else can wait at the socket
        uri = f"unix:{Path(directory, 'move.sock')}"
        here, there = spawn.Pipe()
        process = spawn.Process(target=destination, args=(uri, there))
        process.start()
        here.recv()  # it listens
        # `ticker` checks all its memory in each round, and ends with status 1 if anything was lost.
        with pyhv.Machine("ticker", append="every=20 rounds=40") as vm:
            vm.start()
            vm.expect(b"round 20\n", timeout=60)
            summary = vm.migrate(uri)
        print(f"moved in {summary.total_time * 1000:.0f} ms, of which the guest stood {summary.downtime * 1000:.1f} ms")
        cause, status, console = here.recv()
        process.join()
    print(f"there it ended: {cause} {status}, its last line: {console.splitlines()[-1]}")
    assert (cause, status) == ("guest-exit", 0)


if __name__ == "__main__":
    main()
