"""Could this VM go on on that host? Every reason why not, before anything moves.

    can_it_move.py SNAPSHOT HOST     a file of `pyhv save`, and what `pyhv host --json` wrote on the other host

Without arguments it tries a guest of this host, with and without the compatibility mode, on this host.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pyhv


def check(snapshot: str, host: str | None) -> bool:
    """Asks `pyhv check`, whose --json is one object whatever happens."""
    on = [] if host is None else ["--on", host]
    command = [sys.executable, "-m", "pyhv", "check", snapshot, *on, "--json"]
    answer = json.loads(subprocess.run(command, stdout=subprocess.PIPE).stdout)
    if "error" in answer:
        print("cannot tell:", answer["error"]["message"])
        return False
    print(snapshot, "can run" if answer["runs"] else "cannot run", "on", answer["on"])
    for reason in answer["reasons"]:
        print("  ", reason["text"])
    return bool(answer["runs"])


def main() -> int:
    if len(sys.argv) == 3:
        return 0 if check(sys.argv[1], sys.argv[2]) else 1
    with tempfile.TemporaryDirectory() as directory:
        for compat in (False, True):
            snapshot = str(Path(directory, "compat.pyhv" if compat else "host.pyhv"))
            with pyhv.Machine("hello", compat=compat) as vm:
                vm.save(snapshot)
            if not check(snapshot, None):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
