"""A host in which a process does what it is told with VMs: starts them, migrates them, receives them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import code, image
from .errors import LabError
from .host import Host, patience

#: How many seconds one order may take, by vendor, times patience().
LIMIT = {"amd": 60.0, "intel": 300.0}

#: What of inside/ it runs.
SCRIPTS = ("generations.py", "ring.py", "linux_ride.py")
#: Where distributions have libzstd, which pyhv takes where it is.
ZSTD = ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib")
#: What the process's environment has besides that of pyhv.
ENVIRONMENT = {**code.ENVIRONMENT, "LD_LIBRARY_PATH": f"{code.INSIDE}/lib"}


def files(say: image.Say = image.say_nothing) -> dict[str, Path | bytes]:
    """What a node needs in its host, for Host.put()."""
    found = {name: path for name, path in code.files(say).items() if name in ("site", "bin/pyhv")}
    for folder in ZSTD:
        if (library := Path(folder) / "libzstd.so.1").exists():
            found["lib/libzstd.so.1"] = library.resolve()
    return found | {name: code.HERE / "inside" / name for name in SCRIPTS}


class Node:
    """A host, and the process of inside/ring.py in it."""

    def __init__(
        self,
        host: Host,
        number: int,
        files: Mapping[str, Path | bytes],
        script: str = "ring.py",
        limit: float = 0.0,
    ) -> None:
        """number: of its end of the cable. files: files(), and what else it needs. script: another that understands
        orders. limit: how many seconds one may take there, times patience(), instead of LIMIT."""
        self.host = host
        self.number = number
        self.vendor = host.kind.vendor
        self._limit = limit or LIMIT[self.vendor]
        host.put(files, code.INSIDE)
        argv = ["python3", f"{code.INSIDE}/{script}"]
        self._command = host.start(argv, stdin=True, env=ENVIRONMENT, cwd=code.INSIDE)
        self._read = 0
        self.answer()

    def stop(self) -> None:
        """Ends the process, which has nothing left to do."""
        self._command.end_input()
        self._command.wait()

    def order(self, do: str, **words: object) -> None:
        self._command.send(json.dumps({"do": do, **words}).encode() + b"\n")

    def answer(self) -> dict[str, Any]:
        """The next answer. Raises LabError with the process's own words where something broke there."""
        limit = self._limit * patience()
        if not self.host._wait(self._has_line, limit):
            raise LabError(f"{self.host.name}: no answer within {limit:.0f} s")
        end = self._command.stdout.find(b"\n", self._read)
        if end < 0:
            raise LabError(f"{self.host.name}: ended: {self._command.stderr.decode(errors='replace')}")
        line, self._read = bytes(self._command.stdout[self._read : end]), end + 1
        answer = dict(json.loads(line))
        if "error" in answer:
            raise LabError(f"{self.host.name}: {answer['error']}")
        return answer

    def _has_line(self) -> bool:
        return self._command.ended or self._command.stdout.find(b"\n", self._read) >= 0

    def ask(self, do: str, **words: object) -> dict[str, Any]:
        self.order(do, **words)
        return self.answer()
